// Layer norm forward on the CPU: one thread a row, and memory is passed over once. The row's total is made in a
// buffer that stays in the first two caches, where the sums and the output read it again.
//
// Moves 2 (3 with residual, 4 with total kept) * M * N elements; bound by memory. Outcome: 125 % of the rate of a copy
// (Zen 5; 124 % on a Xeon), since 25 MB are partly in the last cache.

#include "../common/parallel.h"
#include "../common/stream.h"
#include "columns.h"

namespace fused::cpu::FT_ISA {
namespace {

constexpr int64_t kHeld = 16384;    // the longest row whose total is kept on the stack: 64 KiB
constexpr int64_t kStretch = 4096;  // of a longer one this much is made at a time: 16 KiB, in the first-level cache
constexpr int64_t kTaskElements = 8192;  // rows that one thread takes at a time hold about this much

// What a row's total is the sum of.
template <class T>
struct Summands {
  const T* x;
  const T* residual;
  Untyped<T> x_bias;
  const RowDropout* dropout;
  int64_t index;

  // N columns of the total from `first` on, into `held`, and into `kept` if somebody asked for it.
  __attribute__((noinline)) void sum(int64_t first, int64_t N, float* held, const typename Output<T>::Row& kept) const {
    if (kept.data)
      sum_and(first, N, held, [&](int64_t i, int count, Vec total) FT_LAMBDA { kept.put(first + i, total, count); });
    else
      sum_and(first, N, held, [](int64_t, int, Vec) FT_LAMBDA {});
  }

  template <class F>
  FT_INLINE void sum_and(int64_t first, int64_t N, float* held, const F& keep) const {
    const T *const x_part = x + first, *const residual_part = residual ? residual + first : nullptr;
    const auto put = [&](int64_t i, int count, Vec total) FT_LAMBDA {
      store(held + i, total, count);
      keep(i, count, total);
    };
    if (dropout || x_bias.data)
      return each_vector(
          N, dropout, index,
          [&](int64_t i, int count, int, Vec factor) FT_LAMBDA {
            Vec total = load(x_part + i, count);
            if (x_bias.data) total += x_bias.at(first + i, count);
            total = dropped(total, factor);
            if (residual_part) total += load(residual_part + i, count);
            put(i, count, rounded<T>(total));
          },
          first);
    if (residual_part)
      return each_vector(N, [&](int64_t i, int count, int) FT_LAMBDA {
        put(i, count, rounded<T>(load(x_part + i, count) + load(residual_part + i, count)));
      });
    each_vector(N, [&](int64_t i, int count, int) FT_LAMBDA { put(i, count, load(x_part + i, count)); });
  }
};

// The row's total: in memory, or made again at each visit, a stretch at a time.
template <class T>
struct Total {
  const float* row;  // nullptr: made again
  const Summands<T>* summands;
  float* held;

  template <class F>
  FT_INLINE void each(int64_t N, const F& f) const {
    const int64_t most = row ? N : kStretch;  // a multiple of four vectors: slots are those of the row as one
    for (int64_t first = 0; first < N; first += most) {
      const int64_t left = N - first, stretch = left < most ? left : most;
      if (!row) summands->sum(first, stretch, held, {});
      const float* const part = row ? row : held;
      each_vector(stretch,
                  [&](int64_t i, int count, int slot) FT_LAMBDA { f(first + i, count, slot, load(part + i, count)); });
    }
  }
};

// Statistics and output of one row. The variance is summed around the mean: sum(x^2) - mean^2 would lose it where
// |mean| >> std. What the mean's own rounding left behind is summed in the same pass and taken off again.
template <class T>
void normalise(const LayerNormForward& args, const Total<T>& source, const Output<T>& y_rows, int64_t row) {
  const int64_t N = args.N;
  float mean = 0.0f;
  if (!args.rms) {
    RowSum sum;
    source.each(N, [&](int64_t, int, int slot, Vec total) FT_LAMBDA { sum.slot[slot] += total; });
    mean = sum.value() / float(N);
  }
  RowSum rest, squares;
  source.each(N, [&](int64_t, int count, int slot, Vec total) FT_LAMBDA {
    const Vec centred = only_first(total - mean, count);
    rest.slot[slot] += centred;
    squares.slot[slot] += centred * centred;
  });
  const float correction = args.rms ? 0.0f : rest.value() / float(N);
  const float variance = squares.value() / float(N) - correction * correction;
  const float rstd = 1.0f / __builtin_sqrtf(variance + args.eps);
  if (args.mean) args.mean[row] = mean + correction;
  if (args.rstd) args.rstd[row] = rstd;

  const float shift = -correction * rstd;
  const auto y = y_rows.row(row);
  with_affine<T>(args.weight, args.bias, args.param_dtype, [&](auto weight, auto bias) {
    source.each(N, [&](int64_t i, int count, int, Vec total) FT_LAMBDA {
      const Vec normal = (total - mean) * rstd + shift;
      y.put(i, normal * weight.at(i, count) + bias.at(i, count), count);
    });
  });
}

template <class T>
void forward_row(const LayerNormForward& args, const Output<T>& y, const Output<T>& total_out,
                 const RowDropout* dropout, int64_t row) {
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  const T* residual = args.residual ? static_cast<const T*>(args.residual) + row * args.residual_stride : nullptr;
  if constexpr (sizeof(T) == 4)
    if (!residual && !args.x_bias && !dropout && !total_out.data)
      return normalise(args, Total<T>{x, nullptr, nullptr}, y, row);

  const Summands<T> summands{x, residual, {args.x_bias, args.param_dtype == DType::f32, 0.0f}, dropout, row};
  float held[kHeld];
  const bool hold = args.N <= kHeld;
  const auto kept = total_out.row(row);
  if (hold || kept.data)
    for (int64_t first = 0; first < args.N; first += kHeld) {
      const int64_t left = args.N - first;
      summands.sum(first, left < kHeld ? left : kHeld, held, kept);
    }
  normalise(args, Total<T>{hold ? held : nullptr, &summands, held}, y, row);
}

}  // namespace

void layer_norm_forward(const LayerNormForward& args) {
  const RowDropout dropout = dropout_of(args);
  const int64_t wanted = kTaskElements / args.N, rows = wanted < 1 ? 1 : wanted;
  dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Output<T> y(args.y, args.M, args.N), total(args.total, args.M, args.N);
    parallel_for((args.M + rows - 1) / rows, args.M * args.N, [&](int64_t task) {
      for (int64_t row = task * rows; row < args.M && row < (task + 1) * rows; ++row)
        forward_row<T>(args, y, total, args.seed ? &dropout : nullptr, row);
      stream_fence();
    });
  });
}

}  // namespace fused::cpu::FT_ISA
