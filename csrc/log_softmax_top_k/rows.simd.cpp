// log-softmax and top-k of rows on the CPU: one pass over the logits, in blocks that stay in the first cache between
// the search for what is among the k best and the sum of exp.
//
// The k best so far are a sorted list. A logit below its last is dropped with the others of its vector, or of eight
// vectors; of n logits in random order about k log(n / k) are not. Bound by exp: about 15 operations a logit.

#include "../common/parallel.h"
#include "../common/simd.h"
#include "log_softmax_top_k.h"

namespace fused::cpu::FT_ISA {
namespace {

constexpr int kBlock = 1024;  // logits of a block, and
constexpr int kGroup = 8;     // vectors of a group that is looked at as one

FT_INLINE bool any(IVec yes) {
  int32_t lane[kWidth], all = 0;
  store_raw(lane, yes);
  for (int i = 0; i < kWidth; ++i) all |= lane[i];
  return all != 0;
}

// The k best of the logits so far, sorted; they come in the order of their tokens, so that of equal ones the first
// stays ahead. NaN is never taken.
struct Best {
  float logit[kMostKept];
  int32_t token[kMostKept];
  int k, count = 0;

  FT_INLINE bool is_full() const { return count == k; }

  FT_INLINE void offer(float x, int32_t place) {
    if (!(x == x) || (is_full() && !(x > logit[k - 1]))) return;
    int rank = is_full() ? k - 1 : count++;
    for (; rank > 0 && logit[rank - 1] < x; --rank) {
      logit[rank] = logit[rank - 1];
      token[rank] = token[rank - 1];
    }
    logit[rank] = x;
    token[rank] = place;
  }
};

// x[0 ... count) of a vector, which may be its row's last; -inf in the other lanes.
template <class T>
FT_INLINE Vec logits_at(const T* x, int64_t count) {
  if (count >= kWidth) return load(x);
  return lanes_index() < splat_int(int32_t(count)) ? load(x, int(count)) : splat(-kInf);
}

template <class T>
void row(const LogSoftmaxTopK& args, int64_t r) {
  const T* x = static_cast<const T*>(args.x) + r * args.x_stride;
  Best best;
  best.k = int(args.k);
  Vec top = splat(-kInf), total{};
  float maximum = -kInf;
  for (int64_t first = 0; first < args.V; first += kBlock) {
    const int64_t stop = first + kBlock < args.V ? first + kBlock : args.V;
    for (int64_t group = first; group < stop; group += kGroup * kWidth) {
      Vec highest = splat(-kInf);
      int64_t end = group + kGroup * kWidth;
      if (end <= stop) {
#pragma GCC unroll 8
        for (int i = 0; i < kGroup; ++i) highest = vmax(load(x + group + i * kWidth), highest);
      } else {
        end = stop;
        for (int64_t col = group; col < end; col += kWidth) highest = vmax(logits_at(x + col, end - col), highest);
      }
      top = vmax(highest, top);
      if (best.is_full() && !any(highest > splat(best.logit[best.k - 1]))) continue;
      for (int64_t col = group; col < end; col += kWidth) {
        const Vec logits = logits_at(x + col, end - col);
        if (best.is_full() && !any(logits > splat(best.logit[best.k - 1]))) continue;
        float lane[kWidth];
        store(lane, logits);
        for (int i = 0; i < kWidth && col + i < end; ++i) best.offer(lane[i], int32_t(col + i));
      }
    }
    const float before = maximum;
    maximum = largest_lane(top);
    const Vec shift = splat(maximum == -kInf ? 0.0f : maximum);
    Vec sum{};  // of the block alone: its rounding errors don't grow with the row
    int64_t col = first;
#pragma GCC unroll 4
    for (; col + kWidth <= stop; col += kWidth) sum += exp_shifted(load(x + col) - shift);
    if (col < stop) sum += exp_shifted(logits_at(x + col, stop - col) - shift);
    total = total * exp_shifted(splat(before) - shift) + sum;
  }

  const float sum = reduce_sum(total), log_sum = __builtin_logf(sum), shift = maximum == -kInf ? 0.0f : maximum;
  const float addend = args.addend ? args.addend[r] : 0.0f;
  const bool hopeless = sum != sum || !(addend < kInf);
  args.sums[r] = hopeless ? __builtin_nanf("") : log_sum;
  int32_t* kept = args.kept + r * 2 * args.k;
  for (int rank = 0; rank < best.count; ++rank) {
    const float logit = best.logit[rank], value = (logit == -kInf ? logit : (logit - shift) - log_sum) + addend;
    std::memcpy(kept + rank, &value, sizeof value);
    kept[args.k + rank] = best.token[rank];
  }
}

}  // namespace

void log_softmax_top_k_rows(const LogSoftmaxTopK& args) {
  parallel_for(args.M, args.M * args.V, [&](int64_t r) {
    with_storage(args.dtype, [&](auto tag) { row<typename decltype(tag)::type>(args, r); });
  });
}

}  // namespace fused::cpu::FT_ISA
