#pragma once
// The likeliest continuations of a beam search's hypotheses.
//
//   value[r, v] = (x[r, v] - max_v x[r, v]) - log(sum over v of exp(x[r, v] - max)) + addend[r]
//   values, places: the k highest of each sentence's beams * V, and where they are: beam * V + v
//
//   x       (M, V): row r is hypothesis r % beams of sentence r / beams
//   addend  (M,) float32
//   values  (M / beams, k) float32
//   places  (M / beams, k) int64
//
// The higher value first; of equal values the lower beam, within a beam the higher x, of equal x the lower v. x = -inf
// has the value -inf, in a row of nothing else too. A NaN or +inf in a sentence's rows or addends makes all its values
// NaN, and its places 0 ... k - 1. All arithmetic is float32.

#include <cstdint>

#include "../common/dtype.h"

namespace fused {

struct LogSoftmaxTopK {
  int64_t M, V, beams, k;  // M a multiple of beams; beams at most kMostBeams, k at most kMostKept and beams * V
  DType dtype;             // of x
  const void* x = nullptr;
  int64_t x_stride = 0;
  const float* addend = nullptr;  // nullptr: zeros
  float* values = nullptr;
  int64_t* places = nullptr;
  // Working memory, for each part of each row: k logits (their bits) and then k tokens, best first; and the part's
  // maximum and sum of exp(x - maximum).
  int32_t* kept = nullptr;
  float* sums = nullptr;
};

constexpr int kMostKept = 64, kMostBeams = 64;

inline void check(const LogSoftmaxTopK& args) {
  FT_REQUIRE(args.beams >= 1 && args.beams <= kMostBeams, "beams must be 1 ... 64, got " << args.beams);
  FT_REQUIRE(args.M % args.beams == 0, "rows must be a multiple of beams, got " << args.M << " and " << args.beams);
  FT_REQUIRE(args.k >= 1 && args.k <= kMostKept && args.k <= args.beams * args.V,
             "k must be 1 ... 64 and at most beams * V, got " << args.k);
  FT_REQUIRE(args.V < int64_t(1) << 31, "a row must have fewer than 2^31 columns");
}

namespace cpu {
void log_softmax_top_k(const LogSoftmaxTopK& args);  // a row is one part
}  // namespace cpu

namespace cuda {
int64_t log_softmax_top_k_parts(int64_t V);  // of a row: V alone decides, so that a sentence's bits are its own
void log_softmax_top_k(const LogSoftmaxTopK& args, void* stream);
}  // namespace cuda

}  // namespace fused
