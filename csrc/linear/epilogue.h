#pragma once
// What is done with the sums of a product before they are stored: y = activation(sum + bias) + residual. And the tasks
// that a product is cut into. Included by linear/*.simd.cpp.

#include "../common/gelu.h"
#include "../common/parallel.h"
#include "../common/simd.h"
#include "linear.h"

namespace fused::cpu::FT_ISA {

FT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

FT_INLINE Vec activated(Activation activation, Vec x) {
  if (activation == Activation::relu) return x < 0.0f ? Vec{} : x;  // NaN stays NaN
  if (activation == Activation::gelu) return gelu(x);
  if (activation == Activation::silu) return x / (splat(1.0f) + exp(-x));
  return x;
}

// Columns n ... n + kWidth (as far as there are) of row m.
FT_INLINE void store_sum(const Linear& args, int64_t m, int64_t n, Vec sum) {
  if (n >= args.weight->N) return;
  const int count = int(smaller(kWidth, args.weight->N - n));
  if (args.bias) sum += load(args.bias + n, count);
  sum = activated(args.activation, sum);
  if (args.residual) sum += load(args.residual + m * args.residual_stride + n, count);
  store(args.y + m * args.y_stride + n, sum, count);
}

[[gnu::noinline]] inline void store_one_by_one(const Linear& args, int64_t m, int64_t n, int rows, int vectors,
                                               const float* sums) {
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < vectors; ++j, sums += kWidth) store_sum(args, m + r, n + j * kWidth, load(sums));
}

// Rows m ... m + R beside V vectors of columns from n on. What is usual is done without a question for each vector:
// that made 360 instructions after some 3000 cycles of multiplying, and long code is gone from the caches by then.
template <int R, int V>
FT_INLINE void store_sums(const Linear& args, int64_t m, int64_t n, Vec (&sums)[R][V]) {
  const auto each = [&](const auto& f) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) f(r, j);
  };
  const bool usual =
      n + V * kWidth <= args.weight->N && (args.activation == Activation::none || args.activation == Activation::relu);
  if (!usual) {
    alignas(64) float kept[R * V * kWidth];
    each([&](int r, int j) { store(kept + (r * V + j) * kWidth, sums[r][j]); });
    return store_one_by_one(args, m, n, R, V, kept);
  }
  if (args.bias) each([&](int r, int j) { sums[r][j] += load(args.bias + n + j * kWidth); });
  if (args.activation == Activation::relu)
    each([&](int r, int j) { sums[r][j] = activated(Activation::relu, sums[r][j]); });
  if (args.residual)
    each([&](int r, int j) { sums[r][j] += load(args.residual + (m + r) * args.residual_stride + n + j * kWidth); });
  each([&](int r, int j) { store(args.y + (m + r) * args.y_stride + n + j * kWidth, sums[r][j]); });
}

// A task is a panel of columns for up to kTaskRows rows: those of width 512 stay in the second-level cache beside the
// panel. (96 and 192 rows came out up to 8 % slower at 256 rows, which are then two tasks.)
constexpr int64_t kTaskRows = 384;

// Threads take some neighbours at a time, as they come to it: of two on a machine with others one is often the slower,
// and the other waits for it (2 threads of a Zen 3: halves beforehand take 1.0 to 1.3 times as long).
template <class F>
void for_each_panel(const Linear& args, const F& f) {  // f(panel, first row, rows)
  const PackedWeight& w = *args.weight;
  const int64_t panels = w.panels(), groups = (args.M + kTaskRows - 1) / kTaskRows;
  parallel_runs(panels * groups, args.M * w.N * w.K / 4, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / panels * kTaskRows;
      f(task % panels, first, smaller(kTaskRows, args.M - first));
    }
  });
}

// f(first row, rows) for blocks of at most `most` rows that are as equal as can be: one row alone wastes a block.
template <class F>
FT_INLINE void for_equal_blocks(int64_t most, int64_t count, const F& f) {
  const int64_t blocks = (count + most - 1) / most, step = (count + blocks - 1) / blocks;
  for (int64_t m = 0; m < count; m += step) f(m, int(smaller(step, count - m)));
}

}  // namespace fused::cpu::FT_ISA
