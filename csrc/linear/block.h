#pragma once
// A block of y = x W^T in float32: what linear and matmul share. Included by linear/*.simd.cpp.
//
// Up to kRows rows beside four vectors of columns, all sums in registers. W lies in panels [K][64].

#include "epilogue.h"

namespace fused::cpu::FT_ISA {
constexpr int kVectors = 4;                    // of columns in a block
constexpr int kRows = FT_WIDTH == 16 ? 6 : 3;  // kRows * kVectors sums and a row of weights fill the registers
constexpr int kBlock = kVectors * kWidth;      // columns
constexpr int64_t kLine = 16;                  // floats of a cache line
constexpr int64_t kChunk = 64;                 // rows of a panel: 16 KiB
// So many products are added up one by one, and then these sums: one by one all 2048 of a feed-forward layer lose 2
// bits more than torch's product does.
constexpr int64_t kSum = 256;
// Rows of a panel ahead of the chunk: 64 KiB. (64, 128 and 512 rows came out 0 to 8 % slower.) With AVX2 the
// next chunk is 5 % quicker (Zen 3).
constexpr int64_t kAhead = FT_WIDTH == 16 ? 256 : kChunk;
// Rows ahead that are brought to the first-level cache: 8 KiB. (With 4, a product of 4 rows takes a tenth longer.) With
// narrower vectors every panel is passed more than once, in chunks that are there already.
constexpr int64_t kNear = FT_WIDTH == 16 ? 32 : 0;
constexpr int kUnrolled = FT_WIDTH == 16 ? 1 : 4;  // rows of a panel in a turn of the loop
// More rows multiply for so long that reading the weights no longer shows, and for these the sums need not wait.
constexpr int64_t kRowsInChunks = 96;

struct Chunk {
  int64_t begin, end;        // of K
  const float* ahead;        // the next weights to ask for
  int64_t lines_in_64_rows;  // how many cache lines of them, for 64 rows of a panel used up
  float *running, *total;    // of a block: the sum since the last multiple of kSum, and that up to it
};

// kTransposed: x is (K, M), x_stride between its rows.
template <int R, bool kTransposed>
FT_INLINE void block(const Linear& args, const float* weights, int64_t m, int64_t n, Chunk& chunk) {
  const float* x = kTransposed ? args.x + m : args.x + m * args.x_stride;
  Vec sums[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      sums[r][j] = chunk.begin % kSum == 0 ? Vec{} : load(chunk.running + (r * kVectors + j) * kWidth);
  const float* ahead = chunk.ahead;
  int64_t due = 0;  // in 64ths of a line
  const auto step = [&](const float* row, const float* factor) __attribute__((always_inline)) {
    Vec factors[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) factors[r] = splat(kTransposed ? factor[r] : factor[r * args.x_stride]);
    // One vector of weights at a time: beside the sums and the factors AVX2 has no second register for them.
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const Vec w = load(row + j * kWidth);
      if (kNear > 0 && j * kWidth % kLine == 0) __builtin_prefetch(row + kNear * kPanel + j * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][j] += factors[r] * w;
    }
  };
  const int64_t along = kTransposed ? args.x_stride : 1;
  const float *row = weights + chunk.begin * kPanel, *factor = x + chunk.begin * along;
  for (int64_t k = chunk.begin; k < chunk.end; k += kUnrolled) {
    for (due += kUnrolled * chunk.lines_in_64_rows; due >= 64; due -= 64, ahead += kLine)
      __builtin_prefetch(ahead, 0, 2);
    if (chunk.end - k >= kUnrolled) {
#pragma GCC unroll 4
      for (int i = 0; i < kUnrolled; ++i) step(row + i * kPanel, factor + i * along);
      row += kUnrolled * kPanel, factor += kUnrolled * along;
    } else {
      for (int64_t i = k; i < chunk.end; ++i, row += kPanel, factor += along) step(row, factor);
    }
  }
  chunk.ahead = ahead;
  const auto each = [&](auto f) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) f(r, j, (r * kVectors + j) * kWidth);
  };
  const bool done = chunk.end == args.weight->K;
  if (!done && chunk.end % kSum != 0)
    return each([&](int r, int j, int place) { store(chunk.running + place, sums[r][j]); });
  if (chunk.begin >= kSum) each([&](int r, int j, int place) { sums[r][j] += load(chunk.total + place); });
  if (done)
    each([&](int r, int j, int) { store_sum(args, m + r, n + j * kWidth, sums[r][j]); });
  else
    each([&](int r, int j, int place) { store(chunk.total + place, sums[r][j]); });
}

template <int R, bool kTransposed>
inline void blocks(const Linear& args, const float* weights, int64_t m, int64_t n, int rows, Chunk& chunk) {
  if (rows == R) return block<R, kTransposed>(args, weights, m, n, chunk);
  if constexpr (R > 1) blocks<R - 1, kTransposed>(args, weights, m, n, rows, chunk);
}

// f(first column within the panel, first row, rows) for the blocks of `count` rows beside a panel.
template <class F>
FT_INLINE void for_each_block(int64_t count, const F& f) {
  for (int part = 0; part < kPanel; part += kBlock)
    for_equal_blocks(kRows, count, [&](int64_t m, int rows) { f(part, m, rows); });
}

// `count` rows from `first` on beside columns n ... n + 64, whose weights are [K][64]; block by block over all of K.
// due: of a Chunk's lines_in_64_rows.
template <bool kTransposed>
inline void multiply_panel(const Linear& args, const float* weights, int64_t n, int64_t first, int64_t count,
                           int64_t due) {
  alignas(64) float total[kRows * kBlock];
  const int64_t K = args.weight->K;
  for_each_block(count, [&](int part, int64_t m, int rows) {
    for (int64_t k = 0; k < K; k += kSum) {
      Chunk chunk{k,    smaller(k + kSum, K), weights + (k + kAhead) * kPanel, due, total,
                  total};  // nothing is left running
      blocks<kRows, kTransposed>(args, weights + part, first + m, n + part, rows, chunk);
    }
  });
}

}  // namespace fused::cpu::FT_ISA
