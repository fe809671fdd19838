// y = x W^T with float32 weights: few rows are bound by reading the weights, many by the multiply-adds.
//
// A panel is gone through in chunks of K that stay in the first-level cache while every block of rows passes; the sums
// wait in `running` in between. All that time the weights kAhead rows on are asked for, at the rate at which these are
// used up, so that memory is read while there is something to multiply: 32 rows against 38 M weights on one thread of a
// Xeon take 16.5 ms, where reading takes 8 and multiplying 13.9. (Blocks of rows over all of K, one after another, took
// 23 ms: the first waited for memory, and the others left it idle. Asking for the next panel without chunks took 20:
// whatever comes from the second-level cache waits behind what is asked for.)
//
// One block of rows reads a panel once, from end to end. AMD's processors look ahead of that by themselves, and more is
// in their way: 65 MB against 4 rows take a Zen 5 1.72 ms without it and 2.1 with it, at 38 GB/s of 40 that it reads at
// most. With AVX2 that holds for one row alone: on a Zen 3 2 to 6 take 1 to 11 % less time with it.

#include "block.h"
#include "parts.h"
#include "sparse.h"

namespace fused::cpu::FT_ISA {

void linear_float32(const Linear& args) {
  const PackedWeight& w = *args.weight;
  FT_REQUIRE(w.columns == kBlock, "the weight is packed for another instruction set than this was compiled for");
  Places places;
  if (places.find(args))
    return for_each_panel(args, [&](int64_t panel, int64_t, int64_t) {
      const float* weights = static_cast<const float*>(w.data.get()) + panel * w.K * kPanel;
      for_each_block(args, weights, panel * kPanel, [&](int64_t part, const float* own) {
        sparse_blocks<kRows>(args, places, own, panel * kPanel + part);
      });
    });
  for_each_panel(args, [&](int64_t panel, int64_t first, int64_t count) {
    const float* weights = static_cast<const float*>(w.data.get()) + panel * w.K * kPanel;
    const int64_t n = panel * kPanel, blocks_of_rows = (count + kRows - 1) / kRows;
    // A row of a block's weights is passed blocks_of_rows times, and has kBlock / kLine lines.
    const bool once = blocks_of_rows == 1, many = count > kRowsInChunks;
    const bool left_alone = (many && kWide) || (once && is_amd() && (kWide || count == 1));
    const int64_t passes = many ? kRowsInChunks / kRows : blocks_of_rows;
    const int64_t due = left_alone ? 0 : 64 * (kBlock / kLine) / passes;
    // Many rows multiply for so long that reading the weights no longer shows, and there the sums need not wait.
    if (once || (many && kWide)) return multiply_panel<Order::rows>(args, weights, n, first, count, due);
    for (int64_t m = 0; m < count; m += kRowsInChunks) {
      const int64_t rows = smaller(kRowsInChunks, count - m);
      const float* const after = m + kRowsInChunks < count ? weights : weights + w.K * kPanel;
      multiply_in_chunks<Order::rows>(args, weights, n, first + m, rows, due, after);
    }
  });
}

}  // namespace fused::cpu::FT_ISA
