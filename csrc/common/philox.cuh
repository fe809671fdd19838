#pragma once
// Dropout bits on the device: the same as philox.h and kernels/_philox.py.

#include "launch.cuh"

namespace fused::cuda {

// The four words of the block with counter (c0, c1, c2, 0) and the seed as key.
FT_DEVICE uint4 philox(uint32_t c0, uint32_t c1, uint32_t c2, uint64_t seed) {
  uint32_t c3 = 0, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(0xD2511F53u) * c0, product1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(product1);
    c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// 0 or keep_scale for columns col ... col + kCount - 1 of `row`, outer = 0. kCount is 1, or a multiple of 4 with
// col a multiple of 4.
template <int kCount>
FT_DEVICE void dropout_factors(uint64_t seed, uint32_t threshold, float keep_scale, int64_t row, int64_t col,
                               float (&factor)[kCount]) {
  static_assert(kCount == 1 || kCount % 4 == 0, "whole Philox blocks");
#pragma unroll
  for (int first = 0; first < kCount; first += 4) {
    const uint4 words = philox(uint32_t((col + first) / 4), uint32_t(row), 0, seed);
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    if constexpr (kCount == 1) {
      const int which = int(col % 4);
      const uint32_t mine = which < 2 ? (which == 0 ? word[0] : word[1]) : (which == 2 ? word[2] : word[3]);
      factor[0] = mine >= threshold ? keep_scale : 0.0f;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) factor[first + i] = word[i] >= threshold ? keep_scale : 0.0f;
    }
  }
}

}  // namespace fused::cuda
