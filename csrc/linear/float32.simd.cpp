// y = x W^T with float32 weights: few rows are bound by reading the weights, many by the multiply-adds.
//
// A block is up to kRows rows beside four vectors of columns, all sums in registers. A panel is gone through in chunks
// of K that stay in the first-level cache while every block of rows passes; the sums wait in `partial` in between. All
// that time the weights kAhead rows on are asked for, at the rate at which these are used up, so that memory is read
// while there is something to multiply: 32 rows against 38 M weights on one thread of a Xeon take 16.5 ms, where
// reading takes 8 and multiplying 13.9. (Blocks of rows over all of K, one after another, took 23 ms: the first waited
// for memory, and the others left it idle. Asking for the next panel without chunks took 20: whatever comes from the
// second-level cache waits behind what is asked for.)

#include "epilogue.h"
#include "parts.h"

namespace fused::cpu::FT_ISA {
namespace {

constexpr int kVectors = 4;                    // of columns in a block
constexpr int kRows = FT_WIDTH == 16 ? 6 : 3;  // kRows * kVectors sums and a row of weights fill the registers
constexpr int kBlock = kVectors * kWidth;      // columns
constexpr int64_t kLine = 16;                  // floats of a cache line
constexpr int64_t kChunk = 64;                 // rows of a panel: 16 KiB
// So many products are added up one by one, and then these sums: one by one all 2048 of a feed-forward layer lose 2 bits
// more than torch's product does.
constexpr int64_t kSum = 256;
// Rows of a panel ahead of the chunk: 64 KiB. (64, 128 and 512 rows came out 0 to 8 % slower.)
constexpr int64_t kAhead = 256;
constexpr int64_t kNear = 4;  // rows ahead that come from the second-level cache to the first
// More rows multiply for so long that reading the weights no longer shows, and for these the sums need not wait.
constexpr int64_t kRowsInChunks = 96;

struct Chunk {
  int64_t begin, end;        // of K
  const float* ahead;        // the next weights to ask for
  int64_t lines_in_64_rows;  // how many cache lines of them, for 64 rows of a panel used up
  float *running, *total;    // of a block: the sum since the last multiple of kSum, and that up to it
};

template <int R>
FT_INLINE void block(const Linear& args, const float* weights, int64_t m, int64_t n, Chunk& chunk) {
  const float* x = args.x + m * args.x_stride;
  Vec sums[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      sums[r][j] = chunk.begin % kSum == 0 ? Vec{} : load(chunk.running + (r * kVectors + j) * kWidth);
  const float* ahead = chunk.ahead;
  int64_t due = 0;  // in 64ths of a line
  for (int64_t k = chunk.begin; k < chunk.end; ++k) {
    for (due += chunk.lines_in_64_rows; due >= 64; due -= 64, ahead += kLine) __builtin_prefetch(ahead, 0, 2);
    const float* row = weights + k * kPanel;
    Vec w[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      w[j] = load(row + j * kWidth);
      if (j * kWidth % kLine == 0) __builtin_prefetch(row + kNear * kPanel + j * kWidth);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec factor = splat(x[r * args.x_stride + k]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[r][j] += factor * w[j];
    }
  }
  chunk.ahead = ahead;
  const auto each = [&](auto f) {
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

template <int R>
void blocks(const Linear& args, const float* weights, int64_t m, int64_t n, int rows, Chunk& chunk) {
  if (rows == R) return block<R>(args, weights, m, n, chunk);
  if constexpr (R > 1) blocks<R - 1>(args, weights, m, n, rows, chunk);
}

}  // namespace

void linear_float32(const Linear& args) {
  const PackedWeight& w = *args.weight;
  for_each_panel(args, [&](int64_t panel, int64_t first, int64_t count) {
    const float* weights = static_cast<const float*>(w.data.get()) + panel * w.K * kPanel;
    alignas(64) float running[kRowsInChunks * kPanel], total[kRowsInChunks * kPanel];
    const int64_t blocks_of_rows = (count + kRows - 1) / kRows;
    const bool wait = blocks_of_rows > 1 && count <= kRowsInChunks;
    // A row of a panel is passed blocks_of_rows * kPanel / kBlock times, and has kPanel / kLine lines.
    const int64_t due = count > kRowsInChunks ? 0 : 64 * (kBlock / kLine) / blocks_of_rows;
    const auto chunk_of = [&](int64_t k, int64_t length) {
      return Chunk{k, smaller(k + length, w.K), weights + (k + kAhead) * kPanel, due, running, total};
    };
    const auto every_block = [&](auto f) {
      for (int part = 0; part < kPanel; part += kBlock)
        for_equal_blocks(kRows, count, [&](int64_t m, int rows) { f(part, m, rows); });
    };
    const auto multiply = [&](Chunk& chunk, int part, int64_t m, int rows) {
      blocks<kRows>(args, weights + part, first + m, panel * kPanel + part, rows, chunk);
    };
    if (wait) {
      for (int64_t k = 0; k < w.K; k += kChunk) {
        Chunk chunk = chunk_of(k, kChunk);
        every_block([&](int part, int64_t m, int rows) {
          multiply(chunk, part, m, rows);
          chunk.running += rows * kBlock, chunk.total += rows * kBlock;
        });
      }
    } else {
      every_block([&](int part, int64_t m, int rows) {
        for (int64_t k = 0; k < w.K; k += kSum) {
          Chunk chunk = chunk_of(k, kSum);
          multiply(chunk, part, m, rows);
        }
      });
    }
  });
}

}  // namespace fused::cpu::FT_ISA
