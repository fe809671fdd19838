#pragma once
// Attention of a few newest queries over cached keys and values: what a decoding step does. For inference alone.
//
//   out[b, h, i] = sum over j of softmax_j(scale * q[b, h, i] . k_j) v_j
//   lse[b, h, i] = log(sum of exp(scale * q[b, h, i] . k_j))                            -inf if there are no keys
//
//   over the keys j < n_b - (L - 1 - i) if causal, else j < n_b;                        n_b = lengths[b], or C
//   k_j = k[r, h / (H / Hk), j], likewise v_j, out of the cache's row r = rows[b * rows_batch + j * rows_position],
//   or r = b where there are no rows: one stride of 0 and a query reads one row alone; with both, each position is
//   read from the row that the table says (beams that were reordered without moving the cache).
//
//   q, out   (B, H, L, D)
//   k, v     (R, Hk, C, D): the cache, R rows with room for C positions
//   lse      (B, H, L) float32, contiguous
//
// D is 1 ... 256. All arithmetic and every sum is float32. A query without keys gives out = 0, lse = -inf. Memory at
// and beyond n_b, and of rows that nobody names, is never read; a key that one query does not see never touches it, NaN
// or not. A sequence's result depends on its own queries, keys and n_b, and on nothing else of the batch.

#include <cstdint>

#include "../common/dtype.h"

namespace fused {

struct DecodeAttention {
  // A tensor of four axes, the last contiguous; strides of the others in elements.
  struct Tensor {
    void* data = nullptr;
    int64_t stride[3] = {0, 0, 0};
  };
  // int32 or int64 numbers.
  struct Integers {
    const void* data = nullptr;  // nullptr: absent
    bool wide = false;           // int64
  };

  int64_t B, H, Hk, L, D, R, C;
  DType dtype;  // of q, k, v, out
  Tensor q, k, v, out;
  Integers lengths;  // (B,), each 0 ... C
  Integers rows;     // each 0 ... R - 1 where it is read
  int64_t rows_batch = 0, rows_position = 0;
  float scale = 1.0f;
  bool causal = true;
  float* lse = nullptr;      // nullptr: not wanted
  float* partial = nullptr;  // working memory, see below; may be nullptr if that is 0 floats
};

namespace cpu {
constexpr int kMaxHeadWidth = 256;
// A task takes this many keys of a head at most; longer caches are split, and the parts merged in order. Few enough
// that one long sequence feeds all threads; a part costs (D + 2) floats written and read beside 2 * kSplit * D keys'.
constexpr int64_t kSplit = 256;

int64_t decode_attention_partial(int64_t B, int64_t H, int64_t L, int64_t C, int64_t D);  // floats
void decode_attention(const DecodeAttention& args);
}  // namespace cpu

namespace cuda {
// A split of keys is for one block. Nothing is known about lengths on the host: splits follow from C alone, and those
// beyond a sequence's keys end at once. With more than one, `partial` has B * H * L * splits * (D + 2) floats. Numbers
// in lengths and rows that are out of range count as the nearest that is not.
void decode_attention(const DecodeAttention& args, int64_t split_keys, void* stream);
}  // namespace cuda

}  // namespace fused
