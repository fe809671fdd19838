#pragma once
// Hypotheses and guesses of what follows them, embedded and computed side by side by one step of a decoder.
//
//   level 0       `size` hypotheses of each of B sentences, which the caller has
//   level d       the `width` likeliest extensions of a sentence's hypotheses of level d - 1, in the opinion of a
//   draft:
//                 a step of `draft` on these alone, its logits, and the best of beams x vocabulary (log_softmax_top_k)
//   out           what `decoder` makes of all levels' rows at once: of one sentence all levels, then of the next
//
// The draft reads the keys and values that the decoder has written for earlier positions, and writes its own for its
// levels; the decoder writes over these. Row i of a level of sentence b is in row b * slots + i of the cache.
//
// Each part is the op of its own folder, with the same bits. One call, because all that lies between two of them is a
// few numbers: in Python that takes 1 ms a level where weights have driven its code out of the caches, a fifth of
// decoding one sentence.

#include <cstdint>

#include "decoder_step.h"
#include "tokens.h"

namespace fused::cpu {

struct StepAhead {
  // The cache, memory, and `length`: positions there are ahead of level 0. rows, beams, x, out, ancestors, positions
  // and slots are this call's to set; memory's rows are of B sentences.
  DecoderStep step;
  TokenTable embedding;
  const Decoder* draft = nullptr;        // may be nullptr where levels is 0
  const DecoderLinear* guess = nullptr;  // the draft's projection to logits (V, E)

  int64_t B = 0, size = 0, levels = 0, width = 0;
  int64_t slots = 0;                // rows of the cache for each sentence, at least size and width
  const int64_t* tokens = nullptr;  // (B * size,), the last of each hypothesis of level 0
  const double* scores = nullptr;   // (B, >= size): their log-probabilities; nullptr: all are as likely
  int64_t scores_stride = 0;        // from a sentence to the next
  // Where the histories of level 0 are: those of rows `from` (B * size,) of a former call's `ancestors`, which lie
  // former_stride apart and have room for `length` positions. nullptr: there is no history.
  const int32_t* former = nullptr;
  int64_t former_stride = 0;
  const int64_t* from = nullptr;

  int64_t room = 0;              // positions that the cache has
  float* out = nullptr;          // (B * each, E), each = size + levels * width
  int32_t* ancestors = nullptr;  // (B * each, room): in which row of the cache each position of a row's history is
  int64_t* guesses = nullptr;  // (B, levels, width): V * (which of its sentence in the level before it extends) + token
};

// Returns the number of the first token of level 0 that is not in the table, and has done nothing then; -1: all are.
int64_t step_ahead(const Decoder& decoder, const StepAhead& args);

}  // namespace fused::cpu
