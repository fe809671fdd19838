// y = x w^T with w as it lies: each panel of it is packed, as float32, by the thread that multiplies by it, while it is
// in its cache.
//
// Bound by the multiply-adds, 2 M N K, in 16 bits too, since these are float32's. Packing is N K elements a slab of K
// and group of rows, at about 4 a nanosecond; copying x is M K for every panel of 64 columns with AVX-512, and once, in
// the order of the blocks, with narrower vectors.

#include <omp.h>

#include <memory>

#include "block.h"
#include "gather.h"
#include "parts.h"

namespace fused::cpu::FT_ISA {
namespace {

// Of K at a time: a panel is then at most 512 KiB, and stays in the second-level cache beside what else is used with
// it. What is beyond is added to y.
constexpr int64_t kSlab = 2048;
constexpr int64_t kRowsCopied = kRowsInChunks;
constexpr int64_t kCopiedRow = kMostCopied + 16;  // of floats: not a power of two, whose rows would share cache sets
constexpr int64_t kTasks = 4;        // for each thread at least, for equal loads, if there are rows for them:
constexpr int64_t kRowsOfTask = 96;  // a task of fewer would pack for more than a tenth of its time

// Of a thread: a panel, and beside it, where x is copied, these rows of x and, where y has 16 bits, of y.
struct alignas(64) Memory {
  float panel[(kWide ? kSlab : kMostCopied) * kPanel];
  float x[kWide ? kRowsCopied * kCopiedRow : 1];
  float y[kRowsCopied * kPanel];
};
Memory& memory_of_thread() {
  thread_local const std::unique_ptr<Memory> memory(new Memory);
  return *memory;
}

// Columns n ... n + 64 of w^T, [64 / kBlock][length][kBlock]; zeros beyond N.
template <class T>
void pack_panel(const Matmul& args, int64_t n, int64_t k, int64_t length, float* out) {
  const int64_t count = smaller(kPanel, args.N - n);
  const T* w = static_cast<const T*>(args.w.data) + n * args.w.row + k * args.w.column;
  const auto place = [&](int64_t i, int64_t j) { return out + (j / kBlock * length + i) * kBlock + j % kBlock; };
  if (args.w.row == 1) {
    for (int64_t i = 0; i < length; ++i, w += args.w.column) {
      if (count == kPanel) {
#pragma GCC unroll 16
        for (int64_t j = 0; j < kPanel; j += kWidth) store(place(i, j), load(w + j));
      } else {
        for (int64_t j = 0; j < kPanel; j += kWidth)
          store(place(i, j), j < count ? load(w + j, int(smaller(kWidth, count - j))) : Vec{});
      }
    }
    return;
  }
  const auto pack = [&](int64_t i, int64_t j) __attribute__((always_inline)) {
    const int there = int(smaller(kWidth, length - i));
    Vec square[kWidth];
    if (there == kWidth && j + kWidth <= count) {
#pragma GCC unroll 16
      for (int row = 0; row < kWidth; ++row) square[row] = load(w + (j + row) * args.w.row + i);
    } else {
      for (int row = 0; row < kWidth; ++row)
        square[row] = j + row < count ? load(w + (j + row) * args.w.row + i, there) : Vec{};
    }
    transpose(square);
    if (there == kWidth) {
#pragma GCC unroll 16
      for (int row = 0; row < kWidth; ++row) store(place(i, j) + row * kBlock, square[row]);
    } else {
      for (int row = 0; row < there; ++row) store(place(i, j) + row * kBlock, square[row]);
    }
  };
  if constexpr (kWide) {
    for (int64_t i = 0; i < length; i += kWidth)
      for (int64_t j = 0; j < kPanel; j += kWidth) pack(i, j);
  } else {  // few rows at a time: all 64 share few sets of the first-level cache
    for (int64_t j = 0; j < kPanel; j += kWidth)
      for (int64_t i = 0; i < length; i += kWidth) pack(i, j);
  }
}

// `rows` runs of `length` elements that lie `stride` apart in x, as floats.
template <class T>
void copy_rows(const T* x, int64_t stride, int64_t rows, int64_t length, float* out, int64_t out_stride) {
  for (int64_t row = 0; row < rows; ++row, x += stride, out += out_stride)
    for (int64_t i = 0; i < length; i += kWidth) {
      const int there = int(smaller(kWidth, length - i));
      store(out + i, load(x + i, there), there);
    }
}

template <class T>
void store_rounded(const float* sums, int64_t rows, int64_t columns, T* y, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row, sums += kPanel, y += stride)
    for (int64_t j = 0; j < columns; j += kWidth) store(y + j, load(sums + j), int(smaller(kWidth, columns - j)));
}

// Where the rows of a slab's product go, and what is added to them.
struct Slab {
  int64_t k, length;
  const float* bias;
  const float* addend;
  int64_t addend_stride;
  float* y;  // nullptr: to args.y, rounded
  int64_t y_stride;
};

// Rows first ... first + count beside columns n ... n + 64. Where x was not gathered for all columns, rows of a
// transposed one are copied together first: columns of a matrix that is wide lie in few sets of the caches, where they
// push each other out (2048 x 2048 floats: 94 instead of 225 GFLOP/s).
template <class T>
void multiply(const Matmul& args, const Slab& slab, int64_t n, int64_t first, int64_t count) {
  Memory& memory = memory_of_thread();
  pack_panel<T>(args, n, slab.k, slab.length, memory.panel);
  PackedWeight shape;
  shape.N = smaller(kPanel, args.N - n), shape.K = slab.length;
  Linear panel;
  panel.weight = &shape;
  panel.M = args.M;
  panel.bias = slab.bias ? slab.bias + n : nullptr;
  panel.residual = slab.addend ? slab.addend + n : nullptr, panel.residual_stride = slab.addend_stride;
  panel.y = slab.y ? slab.y + n : nullptr, panel.y_stride = slab.y_stride;
  const bool transposed = args.x.column != 1;
  [[maybe_unused]] const T* x = static_cast<const T*>(args.x.data) + slab.k * args.x.column;
  if constexpr (kWide && sizeof(T) == sizeof(float))
    if (!transposed) {
      panel.x = x, panel.x_stride = args.x.row;
      return multiply_panel<Order::rows>(panel, memory.panel, 0, first, count, 0);
    }
  for (int64_t m = first; m < first + count; m += kRowsCopied) {
    const int64_t rows = smaller(kRowsCopied, first + count - m);
    Linear part = panel;
    part.x = memory.x, part.x_stride = transposed ? kRowsCopied : kCopiedRow;
    if (part.residual) part.residual += m * part.residual_stride;
    if (slab.y)
      part.y += m * part.y_stride;
    else
      part.y = memory.y, part.y_stride = kPanel;
    if constexpr (!kWide) {
      part.x = args.gathered + m * slab.length;
      multiply_in_chunks<Order::gathered>(part, memory.panel, 0, 0, rows, 0, memory.panel);
    } else if (transposed) {
      copy_rows(x + m, args.x.column, slab.length, rows, memory.x, kRowsCopied);
      multiply_panel<Order::columns>(part, memory.panel, 0, 0, rows, 0);
    } else {
      copy_rows(x + m * args.x.row, args.x.row, rows, slab.length, memory.x, kCopiedRow);
      multiply_panel<Order::rows>(part, memory.panel, 0, 0, rows, 0);
    }
    if (!slab.y) store_rounded(memory.y, rows, shape.N, static_cast<T*>(args.y) + m * args.y_stride + n, args.y_stride);
  }
}

template <class T>
void multiply_all(const Matmul& args) {
  const bool copied = !kWide || sizeof(T) != sizeof(float) || args.x.column != 1, rounded = args.y_dtype != DType::f32;
  const int64_t most_of_k = copied ? kMostCopied : kSlab;
  const int64_t panels = (args.N + kPanel - 1) / kPanel, wanted = kTasks * omp_get_max_threads();
  const int64_t most = (args.M + kRowsOfTask - 1) / kRowsOfTask;
  const int64_t groups = panels >= wanted ? 1 : smaller(most, (wanted + panels - 1) / panels);
  const int64_t rows = ((args.M + groups - 1) / groups + kRowsCopied - 1) / kRowsCopied * kRowsCopied;
  float* const sums = rounded ? args.sums : static_cast<float*>(args.y);  // of the slabs so far
  const int64_t sums_stride = rounded ? args.N : args.y_stride;
  for (int64_t k = 0; k < args.K; k += most_of_k) {
    const bool last = k + most_of_k >= args.K;
    const Slab slab{k,
                    smaller(most_of_k, args.K - k),
                    k == 0 ? args.bias : nullptr,
                    k == 0 ? args.addend : sums,
                    k == 0 ? args.addend_stride : sums_stride,
                    rounded && last ? nullptr : sums,
                    sums_stride};
    if constexpr (!kWide) {
      const T* x = static_cast<const T*>(args.x.data) + k * args.x.column;
      gather_rows(x, args.x.row, args.x.column, args.M, slab.length, args.gathered);
    }
    parallel_tasks(panels * groups, args.M * args.N * slab.length / 4, [&](int64_t task) {
      const int64_t first = task % groups * rows;
      if (first < args.M) multiply<T>(args, slab, task / groups * kPanel, first, smaller(rows, args.M - first));
    });
  }
}

}  // namespace

void matmul_panels(const Matmul& args) {
  FT_REQUIRE(kWide || args.gathered != nullptr, "working memory is missing");
  with_storage(args.dtype, [&](auto tag) { multiply_all<typename decltype(tag)::type>(args); });
}

}  // namespace fused::cpu::FT_ISA
