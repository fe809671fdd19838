#pragma once
// What the forward and backward kernels of cross entropy share: a row's target, and how many threads take a row.

#include "../common/integers.cuh"
#include "../common/reduce.cuh"
#include "../common/vector_width.cuh"
#include "cross_entropy.h"

namespace fused::cuda {

constexpr float kInfinity = INFINITY;
constexpr unsigned kNan = 0x7fc00000u;

constexpr int kBlockThreads = 256;      // of a row
constexpr int kWarpRows = 4;            // rows of a block where a warp takes a row
constexpr int64_t kWarpColumns = 1024;  // up to this many

struct Target {
  int64_t word;
  bool counts;  // is not ignore_index
  bool inside;  // and is in the vocabulary
};

template <class Args>
FT_DEVICE Target target_of(const Args& args, int64_t row) {
  const int64_t word = integer_at(args.targets, args.wide_targets, row);
  const bool counts = word != args.ignore_index;
  return {word, counts, counts && word >= 0 && word < args.V};
}

}  // namespace fused::cuda
