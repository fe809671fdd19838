// y = x W^T with bfloat16 weights and float32 arithmetic, for processors that do not multiply bfloat16: a bfloat16 is
// the upper half of a float32, so two weights come out of 32 bits by a shift and a mask.

#include "block.h"
#include "chunks.h"
#include "gather.h"

namespace fused::cpu::FT_ISA {
namespace {

// From so many rows on weights are unpacked before they are multiplied by.
constexpr int64_t kLeastUnpacked = 24;

struct BFloat16 {
  using Rounded = float;
  using Sum = Vec;
  static constexpr int kTogether = 2;
  struct Weights {
    Vec even, odd;
  };
  using Factors = Weights;
  static FT_INLINE Weights unpack(const char* p) {
    const auto pair = load_raw<UVec>(p);
    return {(Vec)(pair << 16), (Vec)(pair & 0xffff0000u)};
  }
  static FT_INLINE Factors factors(const float* x) { return {splat(x[0]), splat(x[1])}; }
  static FT_INLINE Vec add(Vec sum, const Factors& x, const Weights& w) {
    return sum + x.even * w.even + x.odd * w.odd;
  }
  static FT_INLINE Vec value(const Linear&, Vec sum, int64_t, int64_t) { return sum; }
};

// 32 rows of weights beside 16 columns, as block.h has them.
void unpack_tile(const char* tile, float* out) {
  for (int pair = 0; pair < 16; ++pair, tile += 64, out += 32)
    for (int j = 0; j < 16; j += kWidth) {
      const auto w = BFloat16::unpack(tile + 4 * j);
      store(out + j, w.even);
      store(out + 16 + j, w.odd);
    }
}

// Many rows: a chunk is unpacked once, and multiplied by as float32. The same sums, in the same order; 64 rows take 0.8
// of the time, and 16 as long.
void multiply_unpacked(const Linear& args) {
  constexpr int64_t kTile = 32, kAllTogether = INT64_MAX;
  const PackedWeight& w = *args.weight;
  Linear gathered = args;
  gather_rows(args.x, args.x_stride, 1, args.M, w.K, static_cast<float*>(args.scratch));
  gathered.x = static_cast<const float*>(args.scratch);
  for_each_panel(args, [&](int64_t panel, int64_t first, int64_t count) {
    alignas(64) float running[kRowsInChunks * kPanel], weights[kChunk * kBlock];
    const char* const packed = static_cast<const char*>(w.data.get()) + panel * w.depth() * kPanel * 2;
    const int64_t n = panel * kPanel, there = smaller(kPanel, w.N - n);
    for (int64_t m0 = 0; m0 < count; m0 += kRowsInChunks) {
      const int64_t rows = smaller(kRowsInChunks, count - m0), passes = (rows + kRows - 1) / kRows;
      for (int64_t k = 0; k < w.K; k += kChunk) {
        const char* const chunk_of_all = packed + k * kPanel * 2;
        Chunk chunk{k, smaller(k + kChunk, w.K), nullptr, 32 / passes, running, nullptr};
        chunk.ahead = reinterpret_cast<const float*>(chunk_of_all + kChunk * kPanel * 2);
        for (int64_t part = 0; part < there; part += kBlock) {
          for (int64_t at = k; at < chunk.end; at += kTile)
            unpack_tile(chunk_of_all + ((at - k) / kTile * (kPanel / 16) + part / 16) * kTileBytes,
                        weights + (at - k) * kBlock);
          for_equal_blocks(kRows, rows, [&](int64_t m, int some) {
            blocks<kRows, Order::gathered, kAllTogether>(gathered, weights, first + m0 + m, n + part, some, chunk);
            chunk.running += some * kBlock;
          });
        }
      }
    }
  });
}

}  // namespace

void linear_bfloat16(const Linear& args) {
  if constexpr (!kWide)
    if (args.M >= kLeastUnpacked) return multiply_unpacked(args);
  round_rows<float>(args);
  multiply_packed<BFloat16>(args);
}

}  // namespace fused::cpu::FT_ISA
