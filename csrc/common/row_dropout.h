#pragma once
// Dropout of row-wise ops: the factors of a stretch of consecutive columns of one row, from philox.h's bits.
//
// Here outer = 0, row is the flat row index and col the column. Included only by *.simd.cpp files.

#include "philox.h"

namespace fused::cpu::FT_ISA {

constexpr int kDropoutColumns = 4 * kWidth;  // one Philox block a lane, four words a block

struct RowDropout {
  uint64_t seed;
  uint32_t threshold;  // a word below it is dropped
  float keep_scale;    // what a kept element is multiplied by: 1 / (1 - p)
};

struct RowFactors {
  Vec part[4];  // part[i], lane j: column col + i * kWidth + j
};

// In each group of four lanes: lane k of out[j] is lane j of w[k] (a 4 x 4 transpose per 128 bits).
FT_INLINE void transpose_groups(const UVec* w, UVec* out) {
#if defined(__AVX512F__)
  // maskz: as in simd.h, no false warning from GCC 12
  const __m512i a = (__m512i)w[0], b = (__m512i)w[1], c = (__m512i)w[2], d = (__m512i)w[3];
  const __m512i ab_low = _mm512_maskz_unpacklo_epi32(0xffff, a, b), ab_high = _mm512_maskz_unpackhi_epi32(0xffff, a, b);
  const __m512i cd_low = _mm512_maskz_unpacklo_epi32(0xffff, c, d), cd_high = _mm512_maskz_unpackhi_epi32(0xffff, c, d);
  out[0] = (UVec)_mm512_maskz_unpacklo_epi64(0xff, ab_low, cd_low);
  out[1] = (UVec)_mm512_maskz_unpackhi_epi64(0xff, ab_low, cd_low);
  out[2] = (UVec)_mm512_maskz_unpacklo_epi64(0xff, ab_high, cd_high);
  out[3] = (UVec)_mm512_maskz_unpackhi_epi64(0xff, ab_high, cd_high);
#elif defined(__AVX2__)
  const __m256i a = (__m256i)w[0], b = (__m256i)w[1], c = (__m256i)w[2], d = (__m256i)w[3];
  const __m256i ab_low = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
  const __m256i cd_low = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
  out[0] = (UVec)_mm256_unpacklo_epi64(ab_low, cd_low);
  out[1] = (UVec)_mm256_unpackhi_epi64(ab_low, cd_low);
  out[2] = (UVec)_mm256_unpacklo_epi64(ab_high, cd_high);
  out[3] = (UVec)_mm256_unpackhi_epi64(ab_high, cd_high);
#else
  static_assert(kWidth == 4);
  for (int j = 0; j < 4; ++j) out[j] = UVec{w[0][j], w[1][j], w[2][j], w[3][j]};
#endif
}

// 0 or keep_scale for columns col ... col + kDropoutColumns - 1 of `row`; col is a multiple of 4.
FT_INLINE RowFactors row_dropout(const RowDropout& dropout, int64_t row, int64_t col) {
  // Lane 4 q + j works on the block of columns that transpose_groups puts into group q of part j.
  const UVec lane = (UVec)lanes_index();
  const UVec block = splat_uint(uint32_t(col / 4)) + (lane & 3u) * uint32_t(kWidth / 4) + (lane >> 2);
  const PhiloxWords words = philox(block, splat_uint(uint32_t(row)), UVec{}, dropout.seed);
  UVec bits[4];
  transpose_groups(words.word, bits);
  RowFactors factors;
  for (int i = 0; i < 4; ++i)
    factors.part[i] = (bits[i] >= splat_uint(dropout.threshold)) ? splat(dropout.keep_scale) : Vec{};
  return factors;
}

}  // namespace fused::cpu::FT_ISA
