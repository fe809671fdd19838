#pragma once
// Sine and cosine in float64 without tables or stack, for positions that are computed as they are added.

#include <cmath>

#include "../common/launch.cuh"

namespace fused::cuda {

// sin(angle + quarters * pi/2), by Taylor's series of sine and cosine around the nearest quarter turn: right to 1e-15
// as long as the angle has less than 2^20 quarter turns, and beyond as far as float64 tells such angles apart. (CUDA's
// own sin is as good, but keeps a reduction of huge angles at hand that needs stack.)
FT_DEVICE double sine(double angle, int quarters) {
  // pi/2 in three parts, of which the first two have 33 bits: times a whole number below 2^20 they are exact.
  constexpr double kHalfPi1 = 0x1.921fb544p+0, kHalfPi2 = 0x1.0b4611a6p-34, kHalfPi3 = 0x1.3198a2e037073p-69;
  constexpr double kTwoOverPi = 0x1.45f306dc9c883p-1;
  const double nearest = floor(angle * kTwoOverPi + 0.5);
  const double x = ((angle - nearest * kHalfPi1) - nearest * kHalfPi2) - nearest * kHalfPi3;
  const double z = x * x;

  double s = -1.0 / 1307674368000.0;  // -1/15!, 1/13! ...: the next would add 5e-17 at pi/4
  s = s * z + 1.0 / 6227020800.0;
  s = s * z - 1.0 / 39916800.0;
  s = s * z + 1.0 / 362880.0;
  s = s * z - 1.0 / 5040.0;
  s = s * z + 1.0 / 120.0;
  s = s * z - 1.0 / 6.0;
  s = x + x * (z * s);

  double c = 1.0 / 20922789888000.0;  // 1/16!, -1/14! ...
  c = c * z - 1.0 / 87178291200.0;
  c = c * z + 1.0 / 479001600.0;
  c = c * z - 1.0 / 3628800.0;
  c = c * z + 1.0 / 40320.0;
  c = c * z - 1.0 / 720.0;
  c = c * z + 1.0 / 24.0;
  c = c * z - 0.5;
  c = 1.0 + z * c;

  const int64_t quadrant = int64_t(nearest) + quarters;
  const double value = quadrant & 1 ? c : s;
  return quadrant & 2 ? -value : value;
}

}  // namespace fused::cuda
