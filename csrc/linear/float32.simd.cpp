// y = x W^T with float32 weights: few rows are bound by reading the weights, many by the multiply-adds.
//
// A block is up to kRows rows beside four vectors of columns, all sums in registers. A panel's weights lie in the order
// in which they are read, and are read from memory once: further rows find them in the second-level cache.

#include "epilogue.h"
#include "parts.h"

namespace fused::cpu::FT_ISA {
namespace {

constexpr int kVectors = 4;                    // of columns in a block
constexpr int kRows = FT_WIDTH == 16 ? 6 : 3;  // kRows * kVectors sums and a row of weights fill the registers
// Rows of a panel that are asked for early: 1 KiB. On a Xeon with AMX, one row of x against 38 M weights took 8.2 ms
// with it, 9.8 ms without, and 12.4 ms with 16 rows.
constexpr int64_t kAhead = 4;
constexpr int kBlock = kVectors * kWidth;  // columns

template <int R>
FT_INLINE void block(const Linear& args, const float* weights, int64_t m, int64_t n) {
  const int64_t K = args.weight->K;
  const float* x = args.x + m * args.x_stride;
  Vec sums[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[r][j] = Vec{};
  for (int64_t k = 0; k < K; ++k) {
    const float* row = weights + k * kPanel;
    Vec w[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      w[j] = load(row + j * kWidth);
      if (j * kWidth % 16 == 0) __builtin_prefetch(row + kAhead * kPanel + j * kWidth);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec factor = splat(x[r * args.x_stride + k]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[r][j] += factor * w[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store_sum(args, m + r, n + j * kWidth, sums[r][j]);
}

template <int R>
void blocks(const Linear& args, const float* weights, int64_t m, int64_t n, int rows) {
  if (rows == R) return block<R>(args, weights, m, n);
  if constexpr (R > 1) blocks<R - 1>(args, weights, m, n, rows);
}

}  // namespace

void linear_float32(const Linear& args) {
  const PackedWeight& w = *args.weight;
  for_each_panel(args, [&](int64_t panel, int64_t first, int64_t count) {
    const float* weights = static_cast<const float*>(w.data.get()) + panel * w.K * kPanel;
    for (int part = 0; part < kPanel; part += kBlock)
      for_equal_blocks(kRows, count, [&](int64_t m, int rows) {
        blocks<kRows>(args, weights + part, first + m, panel * kPanel + part, rows);
      });
  });
}

}  // namespace fused::cpu::FT_ISA
