// Bias, activation and dropout on the CPU, forward: one thread a row, one read and one write.
//
// Moves 2 * M * N elements; ReLU is bound by memory, GELU by its 40 operations an element.

#include "../common/parallel.h"
#include "../common/stream.h"
#include "activation.h"

namespace fused::cpu::FT_ISA {
namespace {

constexpr int64_t kTaskElements = 1 << 14;  // rows that one thread takes at a time hold about this much

template <class T, class Act>
void forward_row(const BiasActForward& args, const Output<T>& y_rows, const RowDropout* dropout, int64_t row) {
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  const Untyped<T> bias{args.bias, args.bias_dtype == DType::f32, 0.0f};
  const auto y = y_rows.row(row);
  if (dropout == nullptr)
    each_vector(args.N, [&](int64_t i, int count, int)
                            FT_LAMBDA { y.put(i, Act::value(load(x + i, count) + bias.at(i, count)), count); });
  else
    each_vector(args.N, dropout, row, [&](int64_t i, int count, int, Vec factor) FT_LAMBDA {
      y.put(i, dropped(Act::value(load(x + i, count) + bias.at(i, count)), factor), count);
    });
}

}  // namespace

void bias_act_forward(const BiasActForward& args) {
  const RowDropout dropout = dropout_of(args);
  const int64_t wanted = kTaskElements / args.N, rows = wanted < 1 ? 1 : wanted;
  with_types(args, [&](auto tag, auto activation) {
    using T = typename decltype(tag)::type;
    const Output<T> y(args.y, args.M, args.N);
    parallel_for((args.M + rows - 1) / rows, args.M * args.N, [&](int64_t task) {
      for (int64_t row = task * rows; row < args.M && row < (task + 1) * rows; ++row)
        forward_row<T, decltype(activation)>(args, y, args.seed ? &dropout : nullptr, row);
      stream_fence();
    });
  });
}

}  // namespace fused::cpu::FT_ISA
