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
// Of each row `linear` first computes the block of columns, as it packs them together, whose upper bound is the
// largest; a column whose upper bound is below the largest of these results, or a lower bound, can't be the largest.
// The other blocks are computed too: value and place are what a search through all results finds, to the bit.
//
// x' is x in one or two levels of seven or eight bits. With two nearly all of the bound is W's rounding, with random
// numbers 0.17 of the results' standard deviation, and of 32,000 results' blocks about 2 are computed; one of eight
// bits makes the bound twice that, and one of seven (AVX2's, see kFewLevels) three times that, of which about 8 are
// left, but z is half the work. A block is 16 columns, but 64 with AVX-512: there they would be a quarter of a megabyte
// more than they are worth, and dot products of bytes cost little, so x has two levels; elsewhere one.
//
// At N = 32,000, K = 512: 16.4 MB of Q, 0.3 MB of bounds and 33 KB a block (131 with AVX-512), where W is 65.5 MB. One
// thread of a Zen 3, beside all results and their maxima: 1 row 0.9 and 3.1 ms, 4 rows 1.3 and 3.5, 8 rows 2.1 and 4.1,
// 32 rows 8.0 and 12.8, 64 rows 15.7 and 23.9. (By eight bits, and without the first block: 4 rows 1.7 ms, 8 rows 2.9,
// 32 rows 10.9; rounding x for each group of panels anew took an eighth more with 64 rows.) Where bounds leave too much
// all results are computed, and never written to memory; and so are those of more than 32 rows where bytes are
// multiplied no sooner than float32 (neither AVX2 nor AVX-512).

#include <cstdint>
#include <memory>

#include "../common/isa.h"
#include "../linear/linear.h"

namespace fused::cpu {

// W in both forms, and what Q is off by. Read-only once made.
struct Screen {
  PackedWeight weight, rounded;  // f32 and int8, of the same matrix
  const float* bias = nullptr;   // nullptr: 0
  float largest = 0.0f;          // of size()
  std::shared_ptr<void> bounds;  // float32, each to full panels: |W_n - Q_n|, then |W_n| + |W_n - Q_n|

  int64_t columns() const { return weight.panels() * kPanel; }
  int64_t blocks() const { return (weight.N + weight.columns - 1) / weight.columns; }
  float* error() const { return static_cast<float*>(bounds.get()); }
  float* size() const { return error() + columns(); }
  // Whether the float32 columns that lie together are narrow, as with AVX2, where screening and all else was measured.
  bool narrow() const { return weight.columns < kPanel; }
  // For how many rows screening is quicker than all results: always, where bytes are multiplied sooner than float32.
  int64_t most_screened() const { return narrow() && isa() != Isa::avx2 ? 32 : INT64_MAX; }
  // For how many rows linear_argmax is quicker than linear and a search through what it wrote: always; with AVX-512
  // measured up to 6, which were slower.
  int64_t most_rows() const { return narrow() ? INT64_MAX : 4; }
  int64_t bytes() const { return rounded.bytes() + 2 * columns() * int64_t(sizeof(float)); }
};

Screen make_screen(const PackedWeight& weight, const PackedWeight& rounded, const float* bias);

struct LinearArgmax {
  const Screen* screen = nullptr;
  int64_t M = 0;
  const float* x = nullptr;
  int64_t x_stride = 0;
  int levels = 0;             // of x': 1 or 2; 0: the quicker
  float* values = nullptr;    // (M,); NaN where a result is
  int64_t* places = nullptr;  // (M,)
};

// Returns how many blocks were computed from W, of all rows together.
int64_t linear_argmax(const LinearArgmax& args);

}  // namespace fused::cpu
