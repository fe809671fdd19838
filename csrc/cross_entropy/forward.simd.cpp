// Cross entropy forward on the CPU: one thread a row, and the logits are read from memory once, in blocks that stay in
// the first-level cache between the search for their maximum and the sums relative to it. What the blocks before have
// summed is carried over to a new maximum, as in online softmax (Milakov and Gimelshein 2018).
//
// Moves M * V elements; about 15 operations a logit, most of them exp's.

#include "../common/columns.h"
#include "../common/parallel.h"
#include "rows.h"

namespace fused::cpu::FT_ISA {
namespace {

constexpr int64_t kBlock = 2048;  // logits: 8 KiB in float32

// The largest of x[0 ... count); NaN is passed over, and comes back out of the sums.
template <class T>
FT_INLINE float largest(const T* x, int64_t count) {
  Vec top[4] = {splat(-kInf), splat(-kInf), splat(-kInf), splat(-kInf)};
  each_vector(count, [&](int64_t i, int n, int slot) FT_LAMBDA {
    const Vec v = load(x + i, n);
    top[slot] = vmax(n == kWidth ? v : (lanes_index() < n ? v : splat(-kInf)), top[slot]);
  });
  float lane[kWidth];
  store(lane, vmax(vmax(top[0], top[1]), vmax(top[2], top[3])));
  float all = lane[0];
  for (int i = 1; i < kWidth; ++i) all = lane[i] > all ? lane[i] : all;
  return all;
}

// What is known of a row after some of its blocks. shift is top, or 0 as long as there is nothing but -inf.
struct Running {
  float top = -kInf, shift = 0.0f;
  float exps = 0.0f;  // sum of exp(x - shift)
  float gaps = 0.0f;  // sum of shift - x, which smoothing needs

  template <bool kSmoothed, class T>
  FT_INLINE void add(const T* x, int64_t seen, int64_t count) {
    const float block_top = largest(x, count), new_top = block_top > top ? block_top : top;
    const float new_shift = new_top == -kInf ? 0.0f : new_top;
    RowSum block_exps, block_gaps;
    each_vector(count, [&](int64_t i, int n, int slot) FT_LAMBDA {
      const Vec gap = new_shift - load(x + i, n);
      block_exps.slot[slot] += only_first(exp(-gap), n);
      if (kSmoothed) block_gaps.slot[slot] += only_first(gap, n);
    });
    exps = exps * first_lane(exp(splat(top - new_shift))) + block_exps.value();
    if (kSmoothed) gaps += float(seen) * (new_shift - shift) + block_gaps.value();
    top = new_top, shift = new_shift;
  }
};

template <class T, bool kSmoothed>
FT_INLINE Running sums_of(const T* x, int64_t V) {
  Running sums;
  for (int64_t first = 0; first < V; first += kBlock)
    sums.add<kSmoothed>(x + first, first, V - first < kBlock ? V - first : kBlock);
  return sums;
}

template <class T>
void forward_row(const CrossEntropyForward& args, int64_t row) {
  const int64_t target = target_of(args, row);
  if (target < 0 || target >= args.V || target == args.ignore_index) {  // not read
    args.losses[row] = target == args.ignore_index ? 0.0f : __builtin_nanf("");
    args.top[row] = args.log_sum[row] = 0.0f;
    return;
  }
  const T* x = static_cast<const T*>(args.logits) + row * args.logits_stride;
  const Running sums = args.every_weight > 0.0f ? sums_of<T, true>(x, args.V) : sums_of<T, false>(x, args.V);
  const float log_sum = __builtin_logf(sums.exps), lse = sums.top + log_sum;
  float loss = log_sum + lse * (args.z_loss * lse);
  if (args.target_weight != 0.0f) loss += args.target_weight * (sums.top - to_float(x[target]));
  if (args.every_weight > 0.0f) loss += args.every_weight * sums.gaps;
  args.losses[row] = loss;
  args.top[row] = sums.top;
  args.log_sum[row] = log_sum;
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& args) {
  with_storage(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    each_row(args.M, args.V, [&](int64_t row) { forward_row<T>(args, row); }, [] {});
  });
}

}  // namespace fused::cpu::FT_ISA
