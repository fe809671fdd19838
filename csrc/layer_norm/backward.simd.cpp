// Layer norm backward on the CPU: one thread a group of rows. Two passes over each row, the second from the cache;
// the sums over rows (dweight, dbias, dx_bias) go into the group's own float32 row, and those rows are added up at
// the end, in order, so that the number of threads changes nothing.
//
// Moves 3 (4 with dropout or with a gradient of total) * M * N elements; bound by memory. Outcome, with forward: 95 %
// of the rate of a copy.

#include "../common/parallel.h"
#include "../common/stream.h"
#include "columns.h"

namespace fused::cpu::FT_ISA {
namespace {

// One row of a dense or strided tensor, or nullptr.
template <class T, class Pointer>
FT_INLINE T* row_of(Pointer* tensor, int64_t row, int64_t stride) {
  return tensor ? static_cast<T*>(tensor) + row * stride : nullptr;
}

// The float32 rows that a group of rows adds to; nullptr where the gradient is not asked for.
struct Sums {
  float* dweight;
  float* dbias;
  float* dx_bias;
};

template <class T>
void backward_row(const LayerNormBackward& args, const Output<T>& dx_rows, const Output<T>& dresidual_rows,
                  const RowDropout* dropout, const Sums& sums, int64_t row) {
  const int64_t N = args.N;
  const T* dy = row_of<const T>(args.dy, row, args.dy_stride);
  const T* dtotal = row_of<const T>(args.dtotal, row, args.dtotal_stride);
  const T* total = row_of<const T>(args.total, row, args.total_stride);
  const auto dx = dx_rows.row(row), dresidual = dresidual_rows.row(row);
  const Untyped<T> weight{args.weight, args.param_dtype == DType::f32, 1.0f};
  const float mean = args.rms ? 0.0f : args.mean[row], rstd = args.rstd[row];

  float mean_g = 0.0f, mean_gn = 0.0f;
  if (dy) {
    RowSum sum_g, sum_gn;
    each_vector(N, [&](int64_t i, int count, int slot) FT_LAMBDA {
      const Vec dy_i = load(dy + i, count);  // 0 beyond the row, so no mask is needed
      const Vec g = dy_i * weight.at(i, count);
      const Vec normal = (load(total + i, count) - mean) * rstd;
      sum_g.slot[slot] += g;
      sum_gn.slot[slot] += g * normal;
      if (sums.dweight) accumulate(sums.dweight, i, count, dy_i * normal);
      if (sums.dbias) accumulate(sums.dbias, i, count, dy_i);
    });
    if (!args.rms) mean_g = sum_g.value() / float(N);
    mean_gn = sum_gn.value() / float(N);
  }
  if (!dx.data && !dresidual.data && !sums.dx_bias) return;

  each_vector(N, dropout, row, [&](int64_t i, int count, int, Vec factor) FT_LAMBDA {
    Vec d{};
    if (dy) {
      const Vec g = load(dy + i, count) * weight.at(i, count);
      const Vec normal = (load(total + i, count) - mean) * rstd;
      d = ((g - mean_g) - normal * mean_gn) * rstd;
    }
    if (dtotal) d += load(dtotal + i, count);
    if (dresidual.data) dresidual.put(i, d, count);
    d = dropped(d, factor);
    if (dx.data) dx.put(i, d, count);
    if (sums.dx_bias) accumulate(sums.dx_bias, i, count, d);
  });
}

template <class T>
void backward_part(const LayerNormBackward& args, const RowDropout* dropout, int64_t part) {
  const int64_t first = part * args.M / args.parts, last = (part + 1) * args.M / args.parts;
  const Sums sums{row_of<float>(args.partial_dweight, part, args.N), row_of<float>(args.partial_dbias, part, args.N),
                  row_of<float>(args.partial_dx_bias, part, args.N)};
  for (float* row : {sums.dweight, sums.dbias, sums.dx_bias})
    if (row) each_vector(args.N, [&](int64_t i, int count, int) FT_LAMBDA { store(row + i, Vec{}, count); });
  const Output<T> dx(args.dx, args.M, args.N), dresidual(args.dresidual, args.M, args.N);
  for (int64_t row = first; row < last; ++row) backward_row(args, dx, dresidual, dropout, sums, row);
  stream_fence();
}

void finish_sums(const LayerNormBackward& args) {
  const int64_t vectors = (args.N + kWidth - 1) / kWidth;
  dispatch(args.param_dtype, [&](auto tag) {
    using P = typename decltype(tag)::type;
    parallel_for(vectors, 3 * args.parts * args.N, [&](int64_t vector) {
      const int64_t i = vector * kWidth;
      const int count = args.N - i < kWidth ? int(args.N - i) : kWidth;
      if (args.dweight) add_parts(args.partial_dweight, args.parts, args.N, static_cast<P*>(args.dweight), i, count);
      if (args.dbias) add_parts(args.partial_dbias, args.parts, args.N, static_cast<P*>(args.dbias), i, count);
      if (args.dx_bias) add_parts(args.partial_dx_bias, args.parts, args.N, static_cast<P*>(args.dx_bias), i, count);
    });
  });
}

}  // namespace

void layer_norm_backward(const LayerNormBackward& args) {
  const RowDropout dropout = dropout_of(args);
  dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(args.parts, args.M * args.N,
                 [&](int64_t part) { backward_part<T>(args, args.seed ? &dropout : nullptr, part); });
  });
  if (args.dweight || args.dbias || args.dx_bias) finish_sums(args);
}

}  // namespace fused::cpu::FT_ISA
