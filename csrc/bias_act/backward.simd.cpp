// Bias, activation and dropout on the CPU, backward: one thread a group of rows, one pass. The sums over rows go into
// the group's own float32 row, and those rows are added up at the end, in order, so that the number of threads changes
// nothing.
//
// Moves 3 * M * N elements; ReLU is bound by memory, GELU by its 40 operations an element.

#include "../common/parallel.h"
#include "../common/stream.h"
#include "activation.h"

namespace fused::cpu::FT_ISA {
namespace {

template <class T, class Act>
void backward_row(const BiasActBackward& args, const Output<T>& dx_rows, const RowDropout* dropout, float* sums,
                  int64_t row) {
  const T* dy = static_cast<const T*>(args.dy) + row * args.dy_stride;
  const T* saved = static_cast<const T*>(args.saved) + row * args.saved_stride;
  const Untyped<T> bias{args.bias, args.bias_dtype == DType::f32, 0.0f};
  const auto dx = dx_rows.row(row);
  const auto finish = [&](int64_t i, int count, Vec d) FT_LAMBDA {
    d = Act::times_slope(d, load(saved + i, count) + bias.at(i, count));
    if (dx.data) dx.put(i, d, count);
    if (sums) accumulate(sums, i, count, d);
  };
  if (dropout == nullptr)
    each_vector(args.N, [&](int64_t i, int count, int)
                            FT_LAMBDA { finish(i, count, load(dy + i, count) * args.dropout_scale); });
  else
    each_vector(args.N, dropout, row, [&](int64_t i, int count, int, Vec factor) FT_LAMBDA {
      finish(i, count, dropped(load(dy + i, count), factor));
    });
}

void add_up(const BiasActBackward& args) {
  parallel_for((args.N + kWidth - 1) / kWidth, args.parts * args.N, [&](int64_t vector) {
    const int64_t i = vector * kWidth;
    add_parts(args.partial, args.parts, args.N, args.dbias, i, args.N - i < kWidth ? int(args.N - i) : kWidth);
  });
}

}  // namespace

void bias_act_backward(const BiasActBackward& args) {
  const RowDropout dropout = dropout_of(args);
  with_types(args, [&](auto tag, auto activation) {
    using T = typename decltype(tag)::type;
    const Output<T> dx(args.dx, args.M, args.N);
    parallel_for(args.parts, args.M * args.N, [&](int64_t part) {
      const int64_t first = part * args.M / args.parts, last = (part + 1) * args.M / args.parts;
      float* sums = args.partial ? args.partial + part * args.N : nullptr;
      if (sums) each_vector(args.N, [&](int64_t i, int count, int) FT_LAMBDA { store(sums + i, Vec{}, count); });
      for (int64_t row = first; row < last; ++row)
        backward_row<T, decltype(activation)>(args, dx, args.seed ? &dropout : nullptr, sums, row);
      stream_fence();
    });
  });
  if (args.dbias) add_up(args);
}

}  // namespace fused::cpu::FT_ISA
