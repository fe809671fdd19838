// Cross entropy backward on the CPU: one thread a row, one read of the logits and one write of their gradient, which
// may take their place; elsewhere a large one goes past the caches.
//
// Moves 2 * M * V elements; bound by memory.

#include "../common/columns.h"
#include "../common/stream.h"
#include "rows.h"

namespace fused::cpu::FT_ISA {
namespace {

template <class T>
using Row = typename Output<T>::Row;

template <class T>
FT_INLINE void fill(const Row<T>& out, int64_t V, float value) {
  each_vector(V, [&](int64_t i, int count, int) FT_LAMBDA { out.put(i, splat(value), count); });
}

template <class T>
void backward_row(const CrossEntropyBackward& args, const Row<T>& out, int64_t row) {
  const int64_t target = target_of(args, row);
  if (target == args.ignore_index) return fill<T>(out, args.V, 0.0f);
  if (target < 0 || target >= args.V) return fill<T>(out, args.V, __builtin_nanf(""));
  const T* x = static_cast<const T*>(args.logits) + row * args.logits_stride;
  const float dloss = args.dlosses[row * args.dlosses_stride], top = args.top[row], log_sum = args.log_sum[row];
  const float share = 1.0f + 2.0f * args.z_loss * (top + log_sum);
  each_vector(args.V, [&](int64_t i, int count, int) FT_LAMBDA {
    Vec d = exp((load(x + i, count) - top) - log_sum) * share - args.every_weight;
    const int64_t lane = target - i;
    if (lane >= 0 && lane < kWidth) d -= (lanes_index() == int32_t(lane)) ? splat(args.target_weight) : Vec{};
    out.put(i, d * dloss, count);
  });
}

}  // namespace

void cross_entropy_backward(const CrossEntropyBackward& args) {
  with_storage(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool apart = args.dlogits != args.logits && args.dlogits_stride == args.V;
    const Output<T> dense(args.dlogits, args.M, args.V);
    each_row(
        args.M, args.V,
        [&](int64_t row) {
          T* data = static_cast<T*>(args.dlogits) + row * args.dlogits_stride;
          backward_row<T>(args, {data, apart && dense.streamed}, row);
        },
        [] { stream_fence(); });
  });
}

}  // namespace fused::cpu::FT_ISA
