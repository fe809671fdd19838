#pragma once
// What a step of beam search makes of the likeliest continuations, for hypotheses on the CPU: those that live on.
//
//   near, places (B, m): what log_softmax_top_k found, with `behind` as its addend
//   likeliest[b, i] = scores[b, 0] + near[b, i]
//   the k likeliest of a sentence that do not end with eos; of equal ones, and of those that are -inf, the first
//
// Some hundred numbers are touched. It is one call because torch's operations would be forty, at 10 us each where a
// model's weights have driven their code out of the caches.

#include <cstdint>

namespace fused::cpu {

struct AdvanceBeams {
  int64_t B = 0, k = 0, m = 0;  // sentences, hypotheses of each, continuations of each sentence; m >= k
  int64_t T = 0;                // tokens of a hypothesis, bos counted
  int64_t V = 0, eos = 0;
  const float* near = nullptr;       // (B, m)
  const int64_t* places = nullptr;   // (B, m): beam * V + token
  const double* scores = nullptr;    // (B, k)
  const float* behind = nullptr;     // (B, k)
  const int64_t* tokens = nullptr;   // (B, k, T)
  const float* log_probs = nullptr;  // (B, k, T - 1)

  // Of those that live on; all contiguous.
  double* next_scores = nullptr;    // (B, k)
  float* next_behind = nullptr;     // (B, k): next_scores[b, i] - next_scores[b, 0]
  int64_t* next_tokens = nullptr;   // (B, k, T + 1)
  float* next_log_probs = nullptr;  // (B, k, T)
  int64_t* parents = nullptr;       // (B, k): which of the B * k hypotheses each extends
};

struct Advanced {
  bool nan = false;       // a value of near is NaN
  bool ended = false;     // a continuation ends with eos, however unlikely
  bool hopeless = false;  // a sentence has nothing to go on from
};

Advanced advance_beams(const AdvanceBeams& args);

}  // namespace fused::cpu
