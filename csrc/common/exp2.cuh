#pragma once
// 2^x by the special function unit: about 2 units in the last place, 0 where the result would be subnormal.

#include "launch.cuh"

#ifdef FT_EMULATED
#include <cmath>
#endif

namespace fused::cuda {

#ifdef FT_EMULATED
inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}
#else
FT_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

}  // namespace fused::cuda
