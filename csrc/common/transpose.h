#pragma once
// The transpose of a square of floats in registers. Included by *.simd.cpp only.

#include "simd.h"

namespace fused::cpu::FT_ISA {

// Swaps the off-diagonal halves of every 2 * kHalf square; for all powers of two, that is the transpose.
template <int kHalf>
FT_INLINE void transpose_steps(Vec* r) {
  if constexpr (kHalf >= 1) {
    IVec upper{}, lower{};
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      upper[i] = (i & kHalf) ? kWidth + i - kHalf : i;
      lower[i] = (i & kHalf) ? kWidth + i : i + kHalf;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      if (i & kHalf) continue;
      const Vec a = r[i], b = r[i + kHalf];
      r[i] = shuffle(a, b, upper);
      r[i + kHalf] = shuffle(a, b, lower);
    }
    transpose_steps<kHalf / 2>(r);
  }
}
// kWidth vectors, as the rows of a square.
FT_INLINE void transpose(Vec* r) { transpose_steps<kWidth / 2>(r); }

}  // namespace fused::cpu::FT_ISA
