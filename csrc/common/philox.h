#pragma once
// Dropout bits: Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
//
// Element (outer, row, col) of a tensor reads word (col % 4) of the block with
//   key     = the low and high halves of the 64-bit seed
//   counter = (col / 4, row, outer, 0)
// and is kept where that word, as an unsigned number, is >= threshold = min(floor(p * 2^32), 2^32 - 1).
// kernels/_philox.py draws the same bits in plain torch. Included only by *.simd.cpp files.

#include "simd.h"

namespace fused::cpu::FT_ISA {

struct PhiloxWords {
  UVec word[4];
};

// The low and high 32 bits of x * factor.
FT_INLINE void multiply_wide(UVec x, uint32_t factor, UVec& low, UVec& high) {
#if defined(__AVX512F__)
  const __m512i a = (__m512i)x, m = _mm512_set1_epi32(int(factor));
  const __m512i even = _mm512_maskz_mul_epu32(0xff, a, m),
                odd = _mm512_maskz_mul_epu32(0xff, _mm512_maskz_srli_epi64(0xff, a, 32), m);
  low = (UVec)_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_maskz_slli_epi64(0xff, odd, 32));
  high = (UVec)_mm512_mask_mov_epi32(_mm512_maskz_srli_epi64(0xff, even, 32), 0xaaaa, odd);
#elif defined(__AVX2__)
  const __m256i a = (__m256i)x, m = _mm256_set1_epi32(int(factor));
  const __m256i even = _mm256_mul_epu32(a, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), m);
  low = (UVec)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high = (UVec)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
  for (int i = 0; i < kWidth; ++i) {
    const uint64_t product = uint64_t(x[i]) * factor;
    low[i] = uint32_t(product);
    high[i] = uint32_t(product >> 32);
  }
#endif
}

// One block of four words for each lane.
FT_INLINE PhiloxWords philox(UVec c0, UVec c1, UVec c2, uint64_t seed) {
  UVec c3{};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    UVec low0, high0, low1, high1;
    multiply_wide(c0, 0xD2511F53u, low0, high0);
    multiply_wide(c2, 0xCD9E8D57u, low1, high1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fused::cpu::FT_ISA
