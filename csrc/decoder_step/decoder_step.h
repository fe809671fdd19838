#pragma once
// One step of a Transformer's decoder on the CPU: all layers on the newest position of every hypothesis, in one call.
//
// A step is about a dozen small kernels a layer. Called one by one from Python, what surrounds them takes as long as
// they do at a batch of one; here they follow each other directly. Each is the op of its own folder:
//
//   post-norm   x = norm(x + sublayer(x))        pre-norm   x = x + sublayer(norm(x)), and a norm at the end
//   sublayers   attention over the cache, attention over the encoder's output, feed-forward
//
// All numbers but packed weights are float32. x, out (rows, E); E = H * D.

#include <cstdint>
#include <vector>

#include "../linear/linear.h"
#include "tokens.h"

namespace fused::cpu {

struct DecoderLinear {
  PackedWeight weight;
  const float* bias = nullptr;  // nullptr: 0
};

struct DecoderNorm {
  bool present = false;
  const float* weight = nullptr;
  const float* bias = nullptr;
};

struct DecoderLayer {
  DecoderLinear qkv, self_out;      // (3 E, E), (E, E)
  DecoderLinear query, memory_out;  // of the attention to memory, whose keys and values the caller has computed
  DecoderLinear up, down;           // (F, E), (E, F)
  DecoderNorm norms[3];
};

struct Decoder {
  int64_t E = 0, H = 0;
  bool norm_first = false;
  float eps = 1e-5f;
  Activation activation = Activation::relu;
  std::vector<DecoderLayer> layers;
  DecoderNorm final_norm;
};

struct DecoderStep {
  int64_t rows = 0, beams = 1;      // hypotheses; those of a sequence lie together
  const float* x = nullptr;         // the embedded tokens, contiguous; or nullptr, and
  const int64_t* tokens = nullptr;  // (rows,), to be looked up in
  TokenTable embedding;
  float* out = nullptr;  // contiguous; may not be x

  // Keys and values of the positions so far: (layers, 2, cache_rows, H, room, D), D contiguous. Row i's history is at
  // position j in row ancestors[i, j] (int32), or in row i; its new position goes to row i.
  int64_t length = 0;  // positions there are; the new one is written at this place
  // Where rows are of several positions: row i's new one is positions[i] <= length, and goes to row slots[i] (rows,).
  // No two rows may have one place. All are written before any is read, so that a row can be another's history.
  const int64_t *positions = nullptr, *slots = nullptr;
  float* cache = nullptr;
  int64_t cache_stride[5] = {0, 0, 0, 0, 0};
  int64_t cache_rows = 0;
  const int32_t* ancestors = nullptr;
  int64_t ancestors_stride = 0;

  // Keys and values of memory, a pair for each layer: (memory_rows, H, S, D), strides in elements, D contiguous.
  const std::vector<std::pair<const float*, const float*>>* memory = nullptr;
  int64_t memory_stride[3] = {0, 0, 0};
  int64_t memory_rows = 0, S = 0;
  const int32_t* memory_lengths = nullptr;  // (rows / beams,); nullptr: S
  const int64_t* sources = nullptr;         // (rows / beams,), the row of memory each sequence reads; nullptr: its own

  double* seconds = nullptr;  // (kParts,), added to: where the time went; nullptr: nobody asks
};

enum Part { kProducts, kAttention, kNorms, kParts };

// Returns -1; or the number of the first token that is not in the table, and has done nothing then.
int64_t decoder_step(const Decoder& decoder, const DecoderStep& step);

}  // namespace fused::cpu
