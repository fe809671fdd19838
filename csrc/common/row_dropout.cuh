#pragma once
// Dropout of row-wise ops on the device: outer = 0, row is the flat row index and col the column.

#include "philox.cuh"

namespace fused::cuda {

// x at columns col ... of `row` is multiplied by keep_scale where it is kept, and else becomes 0, whatever it was: a
// product with 0 would leave NaN and infinity NaN. kVec and col as dropout_factors has them.
template <int kVec>
FT_DEVICE void drop(uint64_t seed, uint32_t threshold, float keep_scale, int64_t row, int64_t col, float (&x)[kVec]) {
  float factor[kVec];
  dropout_factors(seed, threshold, keep_scale, row, col, factor);
#pragma unroll
  for (int i = 0; i < kVec; ++i) x[i] = factor[i] > 0.0f ? x[i] * factor[i] : 0.0f;
}

}  // namespace fused::cuda
