#pragma once
// The passes of linear_argmax around its products, compiled for each instruction set.

#include "../common/isa.h"
#include "linear_argmax.h"

namespace fused::cpu {

// Working memory of a call. M rows of x.
struct Screening {
  const Screen* screen;
  int64_t M, levels;
  int steps;  // of x's magnitudes, in each level
  const float* x;
  int64_t x_stride;
  float* rows;   // (levels * M, K): x to its steps, and with two levels beneath it what that leaves
  float* reach;  // (M, 2): what error() and size() are multiplied by in a bound; NaN where there is none
  float* upper;  // (blocks, M): no result of the block is above it
};

// Some neighbouring panels of Q: the bounds of their results.
struct Bounding {
  const Screening* screening;
  int64_t first, count;  // columns; first of a panel
  const float* results;  // (levels * M, stride): x' Q^T
  int64_t stride;
  float* lowest;  // (M,): some result is not below it
};

// Without bounds: all results of some neighbouring columns, and where the largest of each row is.
struct Results {
  int64_t M, count, stride;
  const float* results;  // (M, stride), `count` of each row
  float* values;         // (M,); the first NaN if there is one
  int64_t* places;       // (M,): of the first such result
};

FT_DECLARE_ISA(split_rows, Screening)    // x -> rows, reach
FT_DECLARE_ISA(bound_columns, Bounding)  // results, reach -> the columns' part of upper, lowest
FT_DECLARE_ISA(find_largest, Results)

}  // namespace fused::cpu
