#pragma once
// Token lookup, scale, positions and dropout in one pass, and its gradient.
//
//   forward   out[n, :]   = dropout(table[token[n], :] * scale + positions[p(n), :])
//   backward  dtable[v,:] = scale * sum over n with token[n] = v, in ascending n, of dropout(dout[n, :])
//
// Rows of padding tokens are 0, and give no gradient. Dropout draws row n, column c (csrc/common/row_dropout.h).
// Tables and gradients are float32, float16 or bfloat16, all of one type; positions and arithmetic are float32.
// Deterministic: the bits do not depend on the number of threads.

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace fused {

struct EmbeddingDropout {
  bool active;
  uint64_t seed;
  uint32_t threshold;  // see kernels/_philox.py
  float keep_scale;
};

struct EmbeddingForward {
  const void* tokens;           // (N,) int32 or int64
  const void* table;            // (V, E), rows table_stride elements apart
  const float* positions;       // (P, E) contiguous; nullptr: none are added
  const int64_t* position_ids;  // (N,): p(n) = position_ids[n]; nullptr: p(n) = start(n / L) + n % L, where
  const int64_t* starts;        //   start(i) = starts[i], (N / L,); nullptr: the number `start`. The caller sees to
  int64_t start;                //   it that 0 <= p(n) < P.
  void* out;                    // (N, E) contiguous
  int64_t* first_bad;           // set to the smallest n with a token outside 0 ... V - 1, or -1; out is then incomplete
  int64_t N, L, V, E, table_stride;
  int64_t padding_idx;  // -1: none
  float scale;
  EmbeddingDropout dropout;
  bool wide_tokens;  // int64, not int32
  DType dtype;
};

struct EmbeddingBackward {
  const void* dout;    // (N, E), rows dout_stride elements apart
  const void* tokens;  // (N,), all within 0 ... V - 1
  int64_t* order;      // (N,) scratch
  int64_t* ends;       // (V + 1,) scratch
  void* dtable;        // (V, E) contiguous; every element is written
  int64_t N, V, E, dout_stride;
  int64_t padding_idx;
  float scale;
  EmbeddingDropout dropout;
  bool wide_tokens;
  DType dtype;
};

namespace cpu {
void embedding_forward(const EmbeddingForward& args);
void embedding_backward(const EmbeddingBackward& args);
}  // namespace cpu

}  // namespace fused
