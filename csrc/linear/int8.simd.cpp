// y = x W^T with int8 weights and levels of x, for processors without dot products of bytes: the bytes of 32 bits
// become two pairs of 16-bit numbers, whose products are summed in pairs. See float32.simd.cpp.

#include "parts.h"
#include "rounding.h"

namespace fused::cpu::FT_ISA {
namespace {

typedef int16_t SVec __attribute__((vector_size(FT_WIDTH * 4)));

constexpr int kVectors = 4, kRows = FT_WIDTH == 16 ? 5 : 2, kBlock = kVectors * kWidth;

// a[2i] * b[2i] + a[2i + 1] * b[2i + 1]
FT_INLINE IVec multiply_pairs(SVec a, SVec b) {
#if defined(__AVX512F__)
  return (IVec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (IVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (IVec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
  return (IVec)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
#else
  IVec sum;
  for (int i = 0; i < kWidth; ++i) sum[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sum;
#endif
}

template <int R>
FT_INLINE void block(const Linear& args, const int8_t* panel, int part, int64_t m, int64_t n) {
  const int64_t depth = args.weight->depth();
  const int16_t* x = rounded_row<int16_t>(args, m);
  const float* row_scale = row_scales<int16_t>(args) + m;
  IVec sums[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[r][j] = IVec{};
  for (int64_t k = 0; k < depth; k += 4) {
    const int8_t* row = panel + k / 64 * 64 * kPanel + k % 64 * 16;
    SVec even[kVectors], odd[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const int column = part + j * kWidth;
      const auto four = load_raw<SVec>(row + column / 16 * 1024 + column % 16 * 4);
      even[j] = (four << 8) >> 8;
      odd[j] = four >> 8;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t pairs[2];
      std::memcpy(pairs, x + r * depth + k, sizeof pairs);
      const auto first = (SVec)splat_int(pairs[0]), second = (SVec)splat_int(pairs[1]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[r][j] += multiply_pairs(even[j], first) + multiply_pairs(odd[j], second);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const Vec scale = load(args.weight->scale() + n + j * kWidth) * row_scale[r];
      store_sum(args, m + r, n + j * kWidth, to_float(sums[r][j]) * scale);
    }
}

template <int R>
void blocks(const Linear& args, const int8_t* panel, int part, int64_t m, int64_t n, int rows) {
  if (rows == R) return block<R>(args, panel, part, m, n);
  if constexpr (R > 1) blocks<R - 1>(args, panel, part, m, n, rows);
}

}  // namespace

void linear_int8(const Linear& args) {
  const PackedWeight& w = *args.weight;
  round_rows_to_levels<int16_t>(args, [](int16_t* out, IVec level) {
    constexpr int kPlace[4] = {0, 2, 1, 3};  // each pair beside what it is multiplied with
    for (int i = 0; i < kWidth; ++i) out[i / 4 * 4 + kPlace[i % 4]] = int16_t(level[i]);
  });
  for_each_panel(args, [&](int64_t panel, int64_t first, int64_t count) {
    const int8_t* weights = static_cast<const int8_t*>(w.data.get()) + panel * w.depth() * kPanel;
    for (int part = 0; part < kPanel; part += kBlock)
      for_equal_blocks(kRows, count, [&](int64_t m, int rows) {
        blocks<kRows>(args, weights, part, first + m, panel * kPanel + part, rows);
      });
  });
}

}  // namespace fused::cpu::FT_ISA
