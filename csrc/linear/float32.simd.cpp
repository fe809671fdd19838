// y = x W^T with float32 weights: few rows are bound by reading the weights, many by the multiply-adds.
//
// A panel is gone through in chunks of K that stay in the first-level cache while every block of rows passes; the sums
// wait in `running` in between. All that time the weights kAhead rows on are asked for, at the rate at which these are
// used up, so that memory is read while there is something to multiply: 32 rows against 38 M weights on one thread of a
// Xeon take 16.5 ms, where reading takes 8 and multiplying 13.9. (Blocks of rows over all of K, one after another, took
// 23 ms: the first waited for memory, and the others left it idle. Asking for the next panel without chunks took 20:
// whatever comes from the second-level cache waits behind what is asked for.)
//
// With AVX-512 one block of rows reads a panel once, from end to end. AMD's processors look ahead of that by
// themselves, and more is in their way: 65 MB against 4 rows take a Zen 5 1.72 ms without it and 2.1 with it, at 38
// GB/s of 40 that it reads at most.

#include "block.h"
#include "parts.h"
#include "sparse.h"

namespace fused::cpu::FT_ISA {

namespace {

// Up to kRowsInChunks rows.
void multiply_in_chunks(const Linear& args, const float* weights, int64_t n, int64_t first, int64_t count,
                        int64_t due) {
  alignas(64) float running[kRowsInChunks * kPanel], total[kRowsInChunks * kPanel];
  for (int64_t k = 0; k < args.weight->K; k += kChunk) {
    Chunk chunk{k, smaller(k + kChunk, args.weight->K), weights + (k + kAhead) * kPanel, due, running, total};
    for_each_block(count, [&](int part, int64_t m, int rows) {
      blocks<kRows, false>(args, weights + part, first + m, n + part, rows, chunk);
      chunk.running += rows * kBlock, chunk.total += rows * kBlock;
    });
  }
}

}  // namespace

void linear_float32(const Linear& args) {
  const PackedWeight& w = *args.weight;
  Places places;
  if (places.find(args))
    return for_each_panel(args, [&](int64_t panel, int64_t, int64_t) {
      const float* weights = static_cast<const float*>(w.data.get()) + panel * w.K * kPanel;
      for (int part = 0; part < kPanel; part += kBlock)
        sparse_blocks<kRows>(args, places, weights + part, panel * kPanel + part);
    });
  for_each_panel(args, [&](int64_t panel, int64_t first, int64_t count) {
    const float* weights = static_cast<const float*>(w.data.get()) + panel * w.K * kPanel;
    const int64_t n = panel * kPanel, blocks_of_rows = (count + kRows - 1) / kRows;
    // A row of a panel is passed blocks_of_rows * kPanel / kBlock times, and has kPanel / kLine lines.
    const bool once = blocks_of_rows * kPanel == kBlock;  // never with narrower vectors, whose block is half a panel
    const bool left_alone = count > kRowsInChunks || (once && is_amd());
    const int64_t due = left_alone ? 0 : 64 * (kBlock / kLine) / blocks_of_rows;
    if (once || (count > kRowsInChunks && kBlock == kPanel))
      return multiply_panel<false>(args, weights, n, first, count, due);
    // Narrower vectors: a block reads half of each line group of a panel, which without chunks is too much for the
    // first-level cache.
    for (int64_t m = 0; m < count; m += kRowsInChunks)
      multiply_in_chunks(args, weights, n, first + m, smaller(kRowsInChunks, count - m), due);
  });
}

}  // namespace fused::cpu::FT_ISA
