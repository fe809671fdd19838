#pragma once
// The two passes of linear_argmax around the product with the rounded weights, compiled for each instruction set.

#include "../common/isa.h"
#include "linear_argmax.h"

namespace fused::cpu {

// Working memory of a call. M rows of x; `columns` is N to full panels.
struct Screening {
  const Screen* screen;
  int64_t M;
  const float* x;
  int64_t x_stride;
  float* rows;      // (2 M, K): x to eight bits, and beneath it what that leaves
  float* results;   // (2 M, columns): their products
  float* reach;     // (M, 2): what error() and size() are multiplied by in a bound; NaN where there is none
  uint8_t* wanted;  // (M, panels): whether the panel may hold the largest result
};

FT_DECLARE_ISA(split_rows, Screening)   // x -> rows, reach
FT_DECLARE_ISA(mark_panels, Screening)  // results, reach -> wanted; results are used up

}  // namespace fused::cpu
