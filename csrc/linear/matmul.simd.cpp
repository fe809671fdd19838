// y = x w^T with w as it lies: each panel of it is packed by the thread that multiplies by it, while it is in its
// cache.
//
// Bound by the multiply-adds, 2 M N K. Packing is N K elements a slab of K and group of rows, at about 4 a nanosecond.

#include <omp.h>

#include <memory>

#include "../common/transpose.h"
#include "block.h"
#include "parts.h"

namespace fused::cpu::FT_ISA {
namespace {

// Of K at a time: a panel is then at most 512 KiB, and stays in the second-level cache beside what else is used with
// it. What is beyond is added to y.
constexpr int64_t kSlab = 2048, kSlabOfTransposed = 1024;
constexpr int64_t kRowsCopied = 96;  // of a transposed x
constexpr int64_t kTasks = 4;        // for each thread at least, for equal loads, if there are rows for them:
constexpr int64_t kRowsOfTask = 96;  // a task of fewer would pack for more than a tenth of its time

// Columns n ... n + 64 of w^T, [length][64]; zeros beyond N.
void pack_panel(const Matmul& args, int64_t n, int64_t k, int64_t length, float* out) {
  const int64_t count = smaller(kPanel, args.N - n);
  const float* w = args.w.data + n * args.w.row + k * args.w.column;
  if (args.w.row == 1) {
    for (int64_t i = 0; i < length; ++i, w += args.w.column, out += kPanel)
      for (int64_t j = 0; j < kPanel; j += kWidth)
        store(out + j, j < count ? load(w + j, int(smaller(kWidth, count - j))) : Vec{});
    return;
  }
  for (int64_t i = 0; i < length; i += kWidth) {
    const int there = int(smaller(kWidth, length - i));
    for (int64_t j = 0; j < kPanel; j += kWidth) {
      Vec square[kWidth];
      for (int row = 0; row < kWidth; ++row)
        square[row] = j + row < count ? load(w + (j + row) * args.w.row + i, there) : Vec{};
      transpose(square);
      for (int row = 0; row < there; ++row) store(out + (i + row) * kPanel + j, square[row]);
    }
  }
}

// Rows first ... first + count of a transposed x beside a panel. They are copied together first: columns of a matrix
// that is wide lie in few sets of the caches, where they push each other out (2048 x 2048 floats: 94 instead of 225
// GFLOP/s).
void multiply_transposed(const Linear& args, const float* weights, int64_t n, int64_t first, int64_t count,
                         float* copy) {
  for (int64_t m = first; m < first + count; m += kRowsCopied) {
    const int64_t rows = smaller(kRowsCopied, first + count - m);
    for (int64_t k = 0; k < args.weight->K; ++k)
      for (int64_t i = 0; i < rows; i += kWidth) {
        const int there = int(smaller(kWidth, rows - i));
        store(copy + k * kRowsCopied + i, load(args.x + k * args.x_stride + m + i, there), there);
      }
    Linear part = args;
    part.x = copy, part.x_stride = kRowsCopied;
    part.y += m * args.y_stride;
    if (part.residual) part.residual += m * args.residual_stride;
    multiply_panel<true>(part, weights, n, 0, rows, 0);
  }
}

// For a panel, and for rows of a transposed x.
float* memory_of_thread() {
  struct alignas(64) Line {
    float lanes[16];
  };
  constexpr int64_t kMost = kSlab * kPanel > kSlabOfTransposed * (kPanel + kRowsCopied)
                                ? kSlab * kPanel
                                : kSlabOfTransposed * (kPanel + kRowsCopied);
  thread_local const std::unique_ptr<Line[]> memory(new Line[kMost / 16]);
  return memory[0].lanes;
}

}  // namespace

void matmul_float32(const Matmul& args) {
  const bool transposed = args.x.column != 1;
  const int64_t slab = transposed ? kSlabOfTransposed : kSlab;
  const int64_t panels = (args.N + kPanel - 1) / kPanel, wanted = kTasks * omp_get_max_threads();
  const int64_t most = (args.M + kRowsOfTask - 1) / kRowsOfTask;
  const int64_t groups = panels >= wanted ? 1 : smaller(most, (wanted + panels - 1) / panels);
  const int64_t rows = ((args.M + groups - 1) / groups + kRowsCopied - 1) / kRowsCopied * kRowsCopied;
  for (int64_t k = 0; k < args.K; k += slab) {
    PackedWeight shape;
    shape.N = args.N, shape.K = smaller(slab, args.K - k);
    Linear part;
    part.weight = &shape;
    part.M = args.M;
    part.x = args.x.data + k * args.x.column;
    part.x_stride = transposed ? args.x.column : args.x.row;
    part.bias = k == 0 ? args.bias : nullptr;
    part.residual = k == 0 ? args.addend : args.y;
    part.residual_stride = k == 0 ? args.addend_stride : args.y_stride;
    part.y = args.y, part.y_stride = args.y_stride;
    parallel_for(panels * groups, args.M * args.N * shape.K / 4, [&](int64_t task) {
      const int64_t n = task / groups * kPanel, first = task % groups * rows;
      if (first >= args.M) return;
      const int64_t count = smaller(rows, args.M - first);
      float* const weights = memory_of_thread();
      pack_panel(args, n, k, shape.K, weights);
      if (transposed)
        multiply_transposed(part, weights, n, first, count, weights + kSlabOfTransposed * kPanel);
      else
        multiply_panel<false>(part, weights, n, first, count, 0);
    });
  }
}

}  // namespace fused::cpu::FT_ISA
