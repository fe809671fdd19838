#include "advance_beams.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../common/check.h"

namespace fused::cpu {
namespace {

constexpr double kNever = -std::numeric_limits<double>::infinity();

// Row `to` of the sentence's new hypotheses: continuation i, of probability `score`.
void extend(const AdvanceBeams& args, int64_t b, int64_t to, int64_t i, double score) {
  const int64_t place = args.places[b * args.m + i], beam = place / args.V, token = place - beam * args.V;
  const int64_t parent = b * args.k + beam, row = b * args.k + to;
  args.parents[row] = parent;
  args.next_scores[row] = score;
  int64_t* const tokens = args.next_tokens + row * (args.T + 1);
  std::memcpy(tokens, args.tokens + parent * args.T, size_t(args.T) * sizeof(int64_t));
  tokens[args.T] = token;
  float* const log_probs = args.next_log_probs + row * args.T;
  std::memcpy(log_probs, args.log_probs + parent * (args.T - 1), size_t(args.T - 1) * sizeof(float));
  log_probs[args.T - 1] = args.near[b * args.m + i] - args.behind[parent];
}

}  // namespace

Advanced advance_beams(const AdvanceBeams& args) {
  FT_REQUIRE(args.k >= 1 && args.m >= args.k && args.T >= 1 && args.V >= 1,
             "there must be as many continuations as hypotheses, got " << args.m << " and " << args.k);
  Advanced found;
  std::vector<double> left(size_t(args.m));
  for (int64_t b = 0; b < args.B; ++b) {
    const double first = args.scores[b * args.k];
    for (int64_t i = 0; i < args.m; ++i) {
      const float near = args.near[b * args.m + i];
      const int64_t place = args.places[b * args.m + i];
      FT_REQUIRE(place >= 0 && place < args.k * args.V,
                 "a place must be below " << args.k * args.V << ", got " << place);
      const bool ends = place % args.V == args.eos;
      found.nan |= std::isnan(near);
      found.ended |= ends;
      left[size_t(i)] = ends ? kNever : first + double(near);
    }
    // They come in descending order but for those that end, which are -inf here: so do those that are chosen.
    std::vector<bool> taken(size_t(args.m), false);
    for (int64_t to = 0; to < args.k; ++to) {
      size_t best = size_t(args.m);
      for (size_t i = 0; i < size_t(args.m); ++i)
        if (!taken[i] && (best == size_t(args.m) || left[i] > left[best])) best = i;
      taken[best] = true;
      extend(args, b, to, int64_t(best), left[best]);
    }
    const double* const scores = args.next_scores + b * args.k;
    found.hopeless |= scores[0] == kNever;
    for (int64_t to = 0; to < args.k; ++to) args.next_behind[b * args.k + to] = float(scores[to] - scores[0]);
  }
  return found;
}

}  // namespace fused::cpu
