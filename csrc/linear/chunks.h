#pragma once
// y = x W^T with weights that vectors have to unpack, bfloat16 or int8: the loops that both have in common.
//
// As in float32.simd.cpp a panel is gone through in chunks of K that stay in the first-level cache while all blocks of
// rows and columns pass, and meanwhile the chunk after it is asked for. (Block after block over all of K, with what of
// the panel each needs of its own, AVX2 read 32,000 x 512 int8 weights from memory in 4.3 ms for one row; so it takes
// 2.3, of 1.5 for reading alone.)
//
// A Form is how 32 bits of a column's weights are multiplied: `Rounded` is x's type in scratch, `Sum` a vector of sums,
// `kTogether` how many weights those 32 bits are; unpack() and add() multiply them, value() is a finished result.

#include "parts.h"
#include "rounding.h"

namespace fused::cpu::FT_ISA {

// Sums of kPackedRows * kPackedVectors, beside two vectors for each of the weights and two of x.
constexpr int kPackedVectors = FT_WIDTH == 16 ? 4 : 2, kPackedRows = FT_WIDTH == 16 ? 5 : 4;
constexpr int kPackedBlock = kPackedVectors * kWidth;  // columns
constexpr int64_t kTileBytes = 1024;                   // 16 columns and 16 * kTogether of K
constexpr int64_t kTilesInChunk = 4;                   // of each column: 16 KiB of a panel
constexpr int64_t kRowsTogether = 96;                  // whose sums wait between chunks

template <class Form>
struct PackedChunk {
  int64_t depth;       // of a row of x
  int64_t begin, end;  // tiles
  bool first, last;
  const char* ahead;      // the next weights to ask for
  int64_t lines_of_tile;  // how many cache lines of them, while a block passes a tile
  typename Form::Sum* running;
};

template <class Form, int R>
FT_INLINE void packed_block(const Linear& args, const char* panel, int part, int64_t m, int64_t n,
                            PackedChunk<Form>& chunk) {
  const int64_t depth = chunk.depth;
  const auto* x =
      static_cast<const typename Form::Rounded*>(args.scratch) + m * depth + chunk.begin * 16 * Form::kTogether;
  const auto each = [&](const auto& f) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < kPackedVectors; ++j) f(r, j);
  };
  typename Form::Sum sums[R][kPackedVectors];
  each([&](int r, int j) { sums[r][j] = chunk.first ? typename Form::Sum{} : chunk.running[r * kPackedVectors + j]; });
  for (int64_t tile = chunk.begin; tile < chunk.end; ++tile) {
    const char* row = panel + tile * (kPanel / 16) * kTileBytes;
    for (int64_t i = 0; i < chunk.lines_of_tile; ++i) __builtin_prefetch(chunk.ahead + i * 64, 0, 2);
    chunk.ahead += chunk.lines_of_tile * 64;
    for (int i = 0; i < 16; ++i, row += 64, x += Form::kTogether) {
      typename Form::Weights w[kPackedVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kPackedVectors; ++j) {
        const int column = part + j * kWidth;
        w[j] = Form::unpack(row + column / 16 * kTileBytes + column % 16 * 4);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const auto factors = Form::factors(x + r * depth);
#pragma GCC unroll 4
        for (int j = 0; j < kPackedVectors; ++j) sums[r][j] = Form::add(sums[r][j], factors, w[j]);
      }
      loads_wait();
    }
  }
  if (!chunk.last) return each([&](int r, int j) { chunk.running[r * kPackedVectors + j] = sums[r][j]; });
  Vec results[R][kPackedVectors];
  each([&](int r, int j) { results[r][j] = Form::value(args, sums[r][j], m + r, n + part + j * kWidth); });
  store_sums(args, m, n + part, results);
}

template <class Form, int R>
inline void packed_blocks(const Linear& args, const char* panel, int part, int64_t m, int64_t n, int rows,
                          PackedChunk<Form>& chunk) {
  if (rows == R) return packed_block<Form, R>(args, panel, part, m, n, chunk);
  if constexpr (R > 1) packed_blocks<Form, R - 1>(args, panel, part, m, n, rows, chunk);
}

// x has been rounded.
template <class Form>
void multiply_packed(const Linear& args) {
  const PackedWeight& w = *args.weight;
  const int64_t tiles = w.depth() / (16 * Form::kTogether);
  for_each_panel(args, [&](int64_t panel, int64_t first, int64_t count) {
    const char* weights = static_cast<const char*>(w.data.get()) + panel * w.depth() * kPanel * w.element_bytes();
    alignas(64) typename Form::Sum running[kRowsTogether * kPanel / kWidth];
    for (int64_t m0 = 0; m0 < count; m0 += kRowsTogether) {
      const int64_t rows = smaller(kRowsTogether, count - m0);
      const int64_t passes = (rows + kPackedRows - 1) / kPackedRows * (kPanel / kPackedBlock);
      // While a tile of all columns passes, as many lines of what comes are asked for; once, by the first rows.
      const int64_t lines = m0 > 0 ? 0 : (kPanel / 16 * kTileBytes / 64 + passes - 1) / passes;
      for (int64_t tile = 0; tile < tiles; tile += kTilesInChunk) {
        const int64_t end = smaller(tile + kTilesInChunk, tiles);
        const char* const ahead = weights + end * (kPanel / 16) * kTileBytes;
        PackedChunk<Form> chunk{w.depth(), tile, end, tile == 0, end == tiles, ahead, lines, running};
        for (int part = 0; part < kPanel; part += kPackedBlock)
          for_equal_blocks(kPackedRows, rows, [&](int64_t m, int some) {
            packed_blocks<Form, kPackedRows>(args, weights, part, first + m0 + m, panel * kPanel, some, chunk);
            chunk.running += some * kPackedVectors;
          });
      }
    }
  });
}

}  // namespace fused::cpu::FT_ISA
