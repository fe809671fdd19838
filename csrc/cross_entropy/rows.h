#pragma once
// What both directions of cross entropy on the CPU share: a row's target, and rows over threads.
// Included only by *.simd.cpp files.

#include "../common/parallel.h"
#include "../common/simd.h"
#include "cross_entropy.h"

namespace fused::cpu::FT_ISA {

constexpr int64_t kTaskElements = 1 << 12;  // rows that a thread takes at a time hold about this much: 4 us
constexpr int64_t kWorkOfLogit = 4;         // beside elements that are only moved: see kParallelWork

template <class Args>
FT_INLINE int64_t target_of(const Args& args, int64_t row) {
  if (args.wide_targets) return static_cast<const int64_t*>(args.targets)[row];
  return static_cast<const int32_t*>(args.targets)[row];
}

FT_INLINE float first_lane(Vec v) { return v[0]; }

// f(row) for each row, and done() where a thread has been through some. Ignored rows cost next to nothing and lie side
// by side where sentences were padded, so the threads take what is next.
template <class F, class Done>
FT_INLINE void each_row(int64_t M, int64_t V, const F& f, const Done& done) {
  const int64_t wanted = kTaskElements / V, rows = wanted < 1 ? 1 : wanted;
  parallel_tasks((M + rows - 1) / rows, kWorkOfLogit * M * V, [&](int64_t task) {
    for (int64_t row = task * rows; row < M && row < (task + 1) * rows; ++row) f(row);
    done();
  });
}

}  // namespace fused::cpu::FT_ISA
