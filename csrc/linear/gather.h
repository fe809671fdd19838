#pragma once
// Rows of x as float32, in the order in which blocks of narrow vectors read them: [K][R] for each block of R rows. For
// x of 16 bits or with columns that are contiguous; rows of float32 are as quickly read as they lie. Included by
// linear/*.simd.cpp.

#include "../common/transpose.h"
#include "block.h"

namespace fused::cpu::FT_ISA {

constexpr int64_t kSlice = 128;  // of K, for a task

// Columns begin ... end of the first `rows` of `there` rows of x, whose strides are `row` and `column`, one of them 1,
// into out [K][rows]; what lies there up to column `limit` may be overwritten.
template <class T>
FT_INLINE void gather_block(const T* x, int64_t row, int64_t column, int64_t rows, int64_t there, int64_t begin,
                            int64_t end, int64_t limit, float* out) {
  // Whole vectors are stored, whose last lanes the next k overwrites.
  const int64_t stop = limit * rows;
  if (row == 1) {
    const int some = int(smaller(kWidth, there));
    for (int64_t k = begin; k < end; ++k)
      store(out + k * rows, load(x + k * column, some), int(smaller(kWidth, stop - k * rows)));
    return;
  }
  const T* lines[kWidth];
#pragma GCC unroll 16
  for (int r = 0; r < kWidth; ++r) lines[r] = x + smaller(r, rows - 1) * row;
  int64_t k = begin;
  for (; k + kWidth <= end && (k + kWidth - 1) * rows + kWidth <= stop; k += kWidth) {
    Vec square[kWidth];
#pragma GCC unroll 16
    for (int r = 0; r < kWidth; ++r) square[r] = load(lines[r] + k);
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) store(out + (k + i) * rows, square[i]);
  }
  for (; k < end; ++k)
    for (int64_t r = 0; r < rows; ++r) out[k * rows + r] = to_float(lines[r][k]);
}

// x (M, K) into `out`: blocks as for_equal_blocks has them, of each kRowsInChunks rows.
template <class T>
void gather_rows(const T* x, int64_t row, int64_t column, int64_t M, int64_t K, float* out) {
  const int64_t groups = (M + kRowsInChunks - 1) / kRowsInChunks, slices = (K + kSlice - 1) / kSlice;
  parallel_for(groups * slices, M * K, [&](int64_t task) {
    const int64_t first = task / slices * kRowsInChunks, begin = task % slices * kSlice;
    const int64_t end = smaller(begin + kSlice, K), few = row == 1 ? 16 : kSlice;
    // Few of K at a time where neighbours lie along M: all blocks read from the same lines.
    for (int64_t k = begin; k < end; k += few)
      for_equal_blocks(kRows, smaller(kRowsInChunks, M - first), [&](int64_t m, int rows) {
        m += first;
        gather_block(x + m * row, row, column, rows, M - m, k, smaller(k + few, end), end, out + m * K);
      });
  });
}

}  // namespace fused::cpu::FT_ISA
