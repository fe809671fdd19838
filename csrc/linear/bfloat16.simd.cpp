// y = x W^T with bfloat16 weights and float32 arithmetic, for processors that do not multiply bfloat16: a bfloat16 is
// the upper half of a float32, so two weights come out of 32 bits by a shift and a mask. See float32.simd.cpp.

#include "parts.h"
#include "rounding.h"

namespace fused::cpu::FT_ISA {
namespace {

constexpr int kVectors = 4, kRows = FT_WIDTH == 16 ? 5 : 2, kBlock = kVectors * kWidth;

template <int R>
FT_INLINE void block(const Linear& args, const uint16_t* panel, int part, int64_t m, int64_t n) {
  const int64_t depth = args.weight->depth();
  const float* x = rounded_row<float>(args, m);
  Vec sums[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[r][j] = Vec{};
  for (int64_t k = 0; k < depth; k += 2) {
    const uint16_t* row = panel + k / 32 * 32 * kPanel + k % 32 * 16;
    Vec even[kVectors], odd[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const int column = part + j * kWidth;
      const auto pair = load_raw<UVec>(row + column / 16 * 512 + column % 16 * 2);
      even[j] = (Vec)(pair << 16);
      odd[j] = (Vec)(pair & 0xffff0000u);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec first = splat(x[r * depth + k]), second = splat(x[r * depth + k + 1]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[r][j] = sums[r][j] + first * even[j] + second * odd[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store_sum(args, m + r, n + j * kWidth, sums[r][j]);
}

template <int R>
void blocks(const Linear& args, const uint16_t* panel, int part, int64_t m, int64_t n, int rows) {
  if (rows == R) return block<R>(args, panel, part, m, n);
  if constexpr (R > 1) blocks<R - 1>(args, panel, part, m, n, rows);
}

}  // namespace

void linear_bfloat16(const Linear& args) {
  const PackedWeight& w = *args.weight;
  round_rows<float>(args);
  for_each_panel(args, [&](int64_t panel, int64_t first, int64_t count) {
    const uint16_t* weights = static_cast<const uint16_t*>(w.data.get()) + panel * w.depth() * kPanel;
    for (int part = 0; part < kPanel; part += kBlock)
      for_equal_blocks(kRows, count, [&](int64_t m, int rows) {
        blocks<kRows>(args, weights, part, first + m, panel * kPanel + part, rows);
      });
  });
}

}  // namespace fused::cpu::FT_ISA
