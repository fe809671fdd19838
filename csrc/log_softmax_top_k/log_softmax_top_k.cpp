// The checked entry of log-softmax and top-k on the CPU, and the choice among a sentence's rows; their k best are found
// in rows.simd.cpp.

#include "log_softmax_top_k.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../common/isa.h"

namespace fused::cpu {

FT_DECLARE_ISA(log_softmax_top_k_rows, LogSoftmaxTopK)

namespace {

void rows(const LogSoftmaxTopK& args) { FT_DISPATCH_ISA(log_softmax_top_k_rows, args); }

// The best of a sentence's rows, whose own lists are sorted: of equal values that of the first row.
void choose(const LogSoftmaxTopK& args, int64_t sentence) {
  float* values = args.values + sentence * args.k;
  int64_t* places = args.places + sentence * args.k;
  const int64_t first = sentence * args.beams, count = std::min(args.k, args.V);
  if (std::any_of(args.sums + first, args.sums + first + args.beams, [](float sum) { return std::isnan(sum); })) {
    for (int64_t rank = 0; rank < args.k; ++rank) values[rank] = NAN, places[rank] = rank;
    return;
  }
  int64_t taken[kMostBeams] = {};
  for (int64_t rank = 0; rank < args.k; ++rank) {
    int64_t chosen = -1;
    for (int64_t beam = 0; beam < args.beams; ++beam) {
      if (taken[beam] == count) continue;
      float value;
      std::memcpy(&value, args.kept + (first + beam) * 2 * args.k + taken[beam], sizeof value);
      if (chosen < 0 || value > values[rank]) chosen = beam, values[rank] = value;
    }
    const int64_t token = args.kept[(first + chosen) * 2 * args.k + args.k + taken[chosen]++];
    places[rank] = chosen * args.V + token;
  }
}

}  // namespace

void log_softmax_top_k(const LogSoftmaxTopK& args) {
  if (args.M == 0) return;
  check(args);
  rows(args);
  for (int64_t sentence = 0; sentence < args.M / args.beams; ++sentence) choose(args, sentence);
}

}  // namespace fused::cpu
