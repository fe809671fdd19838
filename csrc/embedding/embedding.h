#pragma once
// Token lookup, scale, positions and dropout in one pass, and its gradient.
//
//   forward   out[n, :]   = dropout(table[token[n], :] * scale + positions[p(n), :])
//   backward  dtable[v,:] = scale * sum over n with token[n] = v, in ascending n, of dropout(dout[n, :])
//
// Rows of padding tokens are 0, and give no gradient. Dropout draws row n, column c (csrc/common/row_dropout.h); what
// it drops is 0 whatever it was. Tables and gradients are float32, float16 or bfloat16, all of one type; positions and
// arithmetic are float32. Deterministic: the bits do not depend on the number of threads.

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace fused {

struct EmbeddingDropout {
  const int64_t* seed;  // one number, in the kernel's memory; nullptr: no dropout
  uint32_t threshold;   // see kernels/_philox.py
  float keep_scale;
};

struct EmbeddingForward {
  const void* tokens;           // (N,) int32 or int64
  const void* table;            // (V, E), rows table_stride elements apart
  const float* positions;       // (P, E) contiguous; nullptr: none are looked up
  const double* waves;          // on CUDA, (2, E): positions are computed, column c of position p being
                                //   sin(p * waves[0, c] + waves[1, c] * pi/2); nullptr: they are not
  const int64_t* position_ids;  // (N,): p(n) = position_ids[n]; nullptr: p(n) = start(n / L) + n % L, where
  const int64_t* starts;        //   start(i) = starts[i], (N / L,); nullptr: the number `start`. The caller sees to
  int64_t start;                //   it that 0 <= p(n) < P.
  void* out;                    // (N, E) contiguous
  int64_t* first_bad;           // on the CPU, set to the smallest n with a token outside 0 ... V - 1, or -1; out is
                                //   then incomplete. On CUDA nobody is told: out[n, :] is NaN before dropout.
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

// The same on CUDA, where the caller has sorted the tokens.
struct EmbeddingBackwardSorted {
  const void* dout;      // (N, E), rows dout_stride elements apart
  const void* tokens;    // (N,) ascending; those outside 0 ... V - 1 give no gradient
  const int64_t* order;  // (N,): the row of dout of each, ascending among equal tokens
  void* dtable;          // (V, E) contiguous, zeros: rows of tokens that do not occur are not written
  float* partial;  // (2, chunks, E) uninitialised, chunks = ceil(N / chunk): sums of runs of equal tokens that are
                   //   cut at every `chunk` tokens; what begins a chunk and began before it, and what ends it and
                   //   goes on. nullptr: one chunk
  int64_t N, V, E, chunk, dout_stride;
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

namespace cuda {
void embedding_forward(const EmbeddingForward& args, void* stream);
void embedding_backward(const EmbeddingBackwardSorted& args, void* stream);
}  // namespace cuda

}  // namespace fused
