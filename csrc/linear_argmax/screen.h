#pragma once
// The two passes of linear_argmax around the product with the rounded weights, compiled for each instruction set.

#include "../common/isa.h"
#include "linear_argmax.h"

namespace fused::cpu {

// Working memory of a call. M rows of x; `columns` is N to full panels.
struct Screening {
  const Screen* screen;
  int64_t M, levels;
  const float* x;
  int64_t x_stride;
  float* rows;      // (levels * M, K): x to eight bits, and with two levels beneath it what that leaves
  float* results;   // (levels * M, columns): their products
  float* reach;     // (M, 2): what error() and size() are multiplied by in a bound; NaN where there is none
  uint8_t* wanted;  // (M, blocks): whether the block may hold the largest result
};

FT_DECLARE_ISA(split_rows, Screening)   // x -> rows, reach
FT_DECLARE_ISA(mark_blocks, Screening)  // results, reach -> wanted; results are used up

}  // namespace fused::cpu
