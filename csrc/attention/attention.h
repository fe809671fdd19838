#pragma once
// Masked softmax attention.
//
//   out = dropout(softmax(scale * q k^T + bias, over the keys that are not masked)) v            for each head
//   lse = log(sum of exp(scale * q k^T + bias) over those keys)                                  -inf if there are none
//
//   q, out, dout, dq   (B, H, L, D), or packed (T, H, D): strides in elements, the last axis contiguous
//   k, v, dk, dv       (B, Hk, S, D), or packed; query head h reads key head h / (H / Hk)
//   lse, delta         (B, H, L) float32, strided like q without its last axis
//   keep               bytes, 0 = masked; bias: added to the scores, -inf = masked; both strided, stride 0 broadcasts
//
// D is 1 ... 256. All arithmetic and every sum is float32 (on CUDA, weights and their gradients are rounded to a 16-bit
// dtype where they are factors of a product). A row with nothing to attend to gives out = 0, lse = -inf and no
// gradient. What a masked key or value holds (NaN included) reaches neither the outputs nor the gradients.

#include <cstdint>

#include "../common/dtype.h"

namespace fused {

enum class Causal : int { none = 0, top_left = 1, bottom_right = 2 };

// A (B, H, L, D) tensor; for packed batches `batch` is unused and `row` steps over tokens.
struct Rows {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

// A (B, H, L, S) mask or bias.
struct Scores {
  const void* data = nullptr;  // nullptr: absent
  int64_t stride[4] = {0, 0, 0, 0};
};

struct Attention {
  int64_t B, H, Hk, L, S, D;  // packed: L and S of the longest sequence
  DType dtype;                // of q, k, v, out, dout
  Rows q, k, v;
  float scale;

  Scores keep;
  Scores bias;
  DType bias_dtype = DType::f32;
  Causal causal = Causal::none;
  int64_t window_left = -1, window_right = -1;  // -1: no limit
  const int64_t* k_lengths = nullptr;           // (B,)
  const int64_t* q_offsets = nullptr;           // (B + 1,), packed batches
  const int64_t* k_offsets = nullptr;

  float dropout_p = 0.0f;  // 0: no dropout
  uint32_t dropout_threshold = 0;
  float dropout_scale = 1.0f;
  uint64_t seed = 0;

  float* scratch = nullptr;  // CPU: for each OpenMP thread what scratch.h says

  // CUDA alone.
  const uint64_t* seed_data = nullptr;         // instead of `seed`: one number in the kernel's memory
  uint64_t* keep_bits = nullptr;               // uninitialised: a word for 64 keys, and once what `keep` broadcasts
  int multiprocessors = 1;                     // of the device
  int64_t keep_bits_stride[4] = {0, 0, 0, 0};  // this and what follows: set by the launchers
  bool vectors = false, bias_vectors = false;  // every row of every tensor, of bias, starts at a multiple of 16 bytes
};

struct AttentionForward : Attention {
  Rows out;
  Rows lse;  // float32; row strides only, no last axis
};

struct AttentionBackward : Attention {
  Rows out, dout, lse;
  Rows dq;                      // dtype
  Rows dk, dv;                  // CUDA: dtype. CPU: float32, D padded to a multiple of 16
  float* dbias_data = nullptr;  // float32, bias's own shape, zero on entry; nullptr: not wanted
  int64_t dbias_stride[4] = {0, 0, 0, 0};

  // CUDA alone.
  Rows statistics;  // uninitialised: two floats for each query, strided like lse
  // dbias_data then holds dbias_parts times the bias's dbias_count elements, uninitialised (but 0 where the bias
  // reaches beyond the longest sequence); blocks sum into them, and dbias_out, in bias_dtype and dense, is their sum.
  void* dbias_out = nullptr;
  int64_t dbias_count = 0;
  int dbias_parts = 1;
};

struct AttentionWeights : Attention {
  Rows lse;
  void* weights;         // (B, H, L, S) contiguous, dtype; written whole, 0 where masked
  void* mean = nullptr;  // (B, L, S) contiguous, dtype: over the heads; nullptr: not wanted. CPU alone
};

constexpr int kMaxHeadWidth = 256;

namespace cpu {

void attention_forward(const AttentionForward& args);
void attention_backward(const AttentionBackward& args);
void attention_weights(const AttentionWeights& args);
}  // namespace cpu

namespace cuda {
void attention_forward(const AttentionForward& args, void* stream);
void attention_backward(const AttentionBackward& args, void* stream);
void attention_weights(const AttentionWeights& args, void* stream);
}  // namespace cuda

}  // namespace fused
