#pragma once
// A block of y = x W^T in float32: what linear and matmul share. Included by linear/*.simd.cpp.
//
// Up to kRows rows beside kBlock columns, all sums in registers. W lies in panels of 64 columns, and these as
// [64 / kBlock][K][kBlock].
//
// With AVX2 that is 6 rows and two vectors: 12 multiply-adds and 8 loads for each k, 6 cycles. 60 and 252 rows beside
// 2048 x 512 weights run at 91 to 99 % of what multiply-adds alone reach on one thread of a Zen 3 that has its core to
// itself. With somebody else on the core's other thread, instructions are short: multiply-adds alone lose nothing, this
// loop 24 % as GCC leaves it, and 10 % unrolled four times. What else it lost there, with 64 rows and more:
//   sums moved between registers, one kept in memory, as GCC mixes the four steps    10 %: add_product(), the barrier
//   weights of the block after next asked for, or those of many rows not at all      5 to 15 %: Chunk::ahead is the
//   next lines of y that are not there when sums are stored                               5 %: asked for a chunk before
//   a question for each vector that is stored                                        3 %: store_sums()
// so that 64 rows take 0.8 to 0.9 and 256 rows 0.8 of the time that they took.

#include "epilogue.h"

namespace fused::cpu::FT_ISA {
constexpr bool kWide = FT_WIDTH == 16;
constexpr int kVectors = FT_WIDTH == 8 ? 2 : 4;  // of columns in a block
constexpr int kRows = FT_WIDTH == 4 ? 3 : 6;     // kRows * kVectors sums and a row of weights fill the registers
constexpr int kBlock = kVectors * kWidth;        // columns: columns_together()
constexpr int64_t kLine = 16;                    // floats of a cache line
constexpr int64_t kChunk = kWide ? 64 : 256;     // rows of a block's weights: 16 KiB
// So many products are added up one by one, and then these sums: one by one all 2048 of a feed-forward layer lose 2
// bits more than torch's product does.
constexpr int64_t kSum = 256;
// Rows of weights ahead of the chunk: 64 KiB. (64, 128 and 512 rows came out 0 to 8 % slower.) With narrower vectors it
// is the block that comes next.
constexpr int64_t kAhead = 256;
// Rows ahead that are brought to the first-level cache: 8 KiB. (With 4, a product of 4 rows takes a tenth longer.)
constexpr int64_t kNear = kWide ? 32 : 0;
// Rows of weights between two looks at what to ask for: a loop with nothing else in it is a tenth quicker with AVX2.
constexpr int kTurn = kWide ? 1 : 16;
constexpr int kUnrolled = kWide ? 1 : 4;
constexpr int64_t kRowsInChunks = 96;

// How x lies: (M, K), or (K, M), with x_stride between rows; or [K][R] for each block of R rows (gather.h).
enum class Order { rows, columns, gathered };

struct Chunk {
  int64_t begin, end;        // of K
  const float* ahead;        // the next weights to ask for
  int64_t lines_in_64_rows;  // how many cache lines of them, for 64 rows of weights used up
  float *running, *total;    // of a block: the sum since the last multiple of kSum, and that up to it

  // Reading the weights bounds few rows, and whatever else is asked for is in its way.
  FT_INLINE bool passed_once() const { return running == total; }
};

// Rows m ... m + R beside the columns n ... n + kBlock, whose weights of this chunk are [K][kBlock]. kApart: of how
// many products there are sums of their own.
template <int R, Order kOrder, int64_t kApart>
FT_INLINE void block(const Linear& args, const float* weights, int64_t m, int64_t n, Chunk& chunk) {
  constexpr bool kSideBySide = kOrder != Order::rows;  // the factors of one k
  const int64_t between = kOrder == Order::gathered ? args.weight->K : kSideBySide ? 1 : args.x_stride;
  const float* x = args.x + m * between;
  const int64_t stride = args.x_stride;
  Vec sums[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      sums[r][j] = chunk.begin % kApart == 0 ? Vec{} : load(chunk.running + (r * kVectors + j) * kWidth);
  const auto step = [&](const float* row, const float* factor, const float* third) __attribute__((always_inline)) {
    const auto factor_of = [&](int r) __attribute__((always_inline)) {
      if (kSideBySide) return splat(factor[r]);
      return splat(kWide || r < 3 ? factor[r * stride] : third[(r - 3) * stride]);
    };
    // Beside the sums AVX2 has registers for two vectors of weights and one factor; the others take one vector at a
    // time.
    if constexpr (kVectors < kRows && !kWide) {
      Vec w[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) w[j] = load(row + j * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec f = factor_of(r);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sums[r][j] = add_product(sums[r][j], f, w[j]);
      }
    } else {
      Vec factors[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) factors[r] = factor_of(r);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const Vec w = load(row + j * kWidth);
        if (kNear > 0 && j * kWidth % kLine == 0) __builtin_prefetch(row + kNear * kBlock + j * kWidth);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r][j] += factors[r] * w;
      }
    }
  };
  const int64_t along = kOrder == Order::gathered ? R : kSideBySide ? args.x_stride : 1;
  const float *row = weights, *factor = x + chunk.begin * along;
  // An instruction can add 0, 1 or 2 strides to an address by itself.
  const float* third = factor + 3 * stride;
  if constexpr (!kSideBySide && !kWide) asm("" : "+r"(third));
  const float* ahead = chunk.ahead;
  if constexpr (kWide) {
    int64_t due = 0;  // in 64ths of a line
    for (int64_t k = chunk.begin; k < chunk.end; ++k, row += kBlock, factor += along) {
      for (due += chunk.lines_in_64_rows; due >= 64; due -= 64, ahead += kLine) __builtin_prefetch(ahead, 0, 2);
      step(row, factor, third);
    }
  } else {
    if (chunk.end == args.weight->K && !chunk.passed_once())
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) __builtin_prefetch(args.y + (m + r) * args.y_stride + n, 1);
    const int lines = int((chunk.lines_in_64_rows * kTurn + 63) / 64);
    const int64_t rest = (chunk.end - chunk.begin) % kTurn;
    const float* const end = weights + (chunk.end - chunk.begin - rest) * kBlock;
    while (row != end) {
#pragma GCC unroll 1
      for (int i = 0; i < lines; ++i, ahead += kLine) __builtin_prefetch(ahead, 0, 2);
      const float* const turn = row + kTurn * kBlock;
      do {
#pragma GCC unroll 8
        for (int i = 0; i < kUnrolled; ++i, row += kBlock, factor += along, third += along) {
          step(row, factor, third);
          loads_wait();
        }
      } while (row != turn);
    }
#pragma GCC unroll 1
    for (int64_t i = 0; i < rest; ++i, row += kBlock, factor += along, third += along) step(row, factor, third);
  }
  chunk.ahead = ahead;
  const auto each = [&](auto f) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) f(r, j, (r * kVectors + j) * kWidth);
  };
  const bool done = chunk.end == args.weight->K;
  if (!done && chunk.end % kApart != 0)
    return each([&](int r, int j, int place) { store(chunk.running + place, sums[r][j]); });
  if (chunk.begin >= kApart) each([&](int r, int j, int place) { sums[r][j] += load(chunk.total + place); });
  if (done)
    store_sums(args, m, n, sums);
  else
    each([&](int r, int j, int place) { store(chunk.total + place, sums[r][j]); });
}

template <int R, Order kOrder, int64_t kApart = kSum>
inline void blocks(const Linear& args, const float* weights, int64_t m, int64_t n, int rows, Chunk& chunk) {
  if (rows == R) return block<R, kOrder, kApart>(args, weights, m, n, chunk);
  if constexpr (R > 1) blocks<R - 1, kOrder, kApart>(args, weights, m, n, rows, chunk);
}

// f(first column within the panel, its block's weights) for the blocks of columns of the panel from n on.
template <class F>
FT_INLINE void for_each_block(const Linear& args, const float* weights, int64_t n, const F& f) {
  const int64_t there = smaller(kPanel, args.weight->N - n);
  for (int64_t part = 0; part < there; part += kBlock) f(part, weights + part * args.weight->K);
}

// `count` rows from `first` on beside the panel of columns from n on; block by block over all of K.
// due: of a Chunk's lines_in_64_rows.
template <Order kOrder>
inline void multiply_panel(const Linear& args, const float* weights, int64_t n, int64_t first, int64_t count,
                           int64_t due) {
  alignas(64) float total[kRows * kBlock];
  const int64_t K = args.weight->K;
  for_each_block(args, weights, n, [&](int64_t part, const float* own) {
    for_equal_blocks(kRows, count, [&](int64_t m, int rows) {
      for (int64_t k = 0; k < K; k += kSum) {
        // nothing is left running
        Chunk chunk{k, smaller(k + kSum, K), own + (k + kAhead) * kBlock, due, total, total};
        blocks<kRows, kOrder>(args, own + k * kBlock, first + m, n + part, rows, chunk);
      }
    });
  });
}

// The same for up to kRowsInChunks rows, in chunks of K that stay in the first-level cache while all these rows pass.
// after: the weights that are multiplied by next.
template <Order kOrder>
void multiply_in_chunks(const Linear& args, const float* weights, int64_t n, int64_t first, int64_t count, int64_t due,
                        const float* after) {
  alignas(64) float running[kRowsInChunks * kPanel], total[kRowsInChunks * kPanel];
  const int64_t K = args.weight->K, there = smaller(kPanel, args.weight->N - n);
  for (int64_t k = 0; k < K; k += kChunk) {
    Chunk chunk{k, smaller(k + kChunk, K), nullptr, due, running, total};
    for_each_block(args, weights, n, [&](int64_t part, const float* own) {
      if constexpr (kWide) {
        const int64_t row = k + kAhead;  // beyond K: in the next panel
        chunk.ahead = own + (row < K ? row * kBlock : K * kPanel + (row - K) * kBlock);
      } else if (part + kBlock < there) {
        chunk.ahead = own + (K + k) * kBlock;
      } else {
        chunk.ahead = chunk.end < K ? weights + chunk.end * kBlock : after;
      }
      for_equal_blocks(kRows, count, [&](int64_t m, int rows) {
        blocks<kRows, kOrder>(args, own + k * kBlock, first + m, n + part, rows, chunk);
        chunk.running += rows * kBlock, chunk.total += rows * kBlock;
      });
    });
  }
}

}  // namespace fused::cpu::FT_ISA
