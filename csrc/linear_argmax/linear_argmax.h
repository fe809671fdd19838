#pragma once
// The largest result of a float32 linear layer, and whose it is, without computing all of them:
//
//   y = x W^T + bias       values[m] = max_n y[m, n]       places[m] = the first n where it is
//
// A greedy search asks the product with the vocabulary for no more, and that is bound by reading W. The int8 form Q of
// W is a quarter of it, and its product z = x' Q^T says within which bounds a result lies (Cauchy and Schwarz):
//
//   |y_n - z_n - bias_n| <= |x| |W_n - Q_n| + |x - x'| |Q_n| + rounding
//
// x' is x to sixteen bits, as two rows of levels, so that nearly all of the bound is W's rounding: with random numbers
// 0.17 of the results' standard deviation. A column whose upper bound is below the largest lower one can't be the
// largest. Of the others (of 32,000 random results about four are left) `linear` computes the panels: value and place
// are what a search through all its results finds, to the bit.
//
// At N = 32,000, K = 512: 16.4 MB of Q, 0.3 MB of bounds and 0.1 MB a panel, where W is 65.5 MB.

#include <cstdint>
#include <memory>

#include "../linear/linear.h"

namespace fused::cpu {

// W in both forms, and what Q is off by. Read-only once made.
struct Screen {
  PackedWeight weight, rounded;  // f32 and int8, of the same matrix
  const float* bias = nullptr;   // nullptr: 0
  float largest = 0.0f;          // of size()
  std::shared_ptr<void> bounds;  // float32, each to full panels: |W_n - Q_n|, then |W_n| + |W_n - Q_n|

  int64_t columns() const { return weight.panels() * kPanel; }
  float* error() const { return static_cast<float*>(bounds.get()); }
  float* size() const { return error() + columns(); }
  int64_t bytes() const { return rounded.bytes() + 2 * columns() * int64_t(sizeof(float)); }
};

Screen make_screen(const PackedWeight& weight, const PackedWeight& rounded, const float* bias);

struct LinearArgmax {
  const Screen* screen = nullptr;
  int64_t M = 0;
  const float* x = nullptr;
  int64_t x_stride = 0;
  float* values = nullptr;    // (M,); NaN where a result is
  int64_t* places = nullptr;  // (M,)
};

// Returns how many panels were computed from W, of all rows together.
int64_t linear_argmax(const LinearArgmax& args);

}  // namespace fused::cpu
