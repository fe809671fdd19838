#pragma once
// The online softmax of a warp's rows (Milakov and Gimelshein 2018), and values that are NaN or infinite.

#include "../common/exp2.cuh"
#include "device_mask.cuh"

namespace fused::cuda {

// exp(score - shift) = 2^((score - shift) unit). In 16-bit types one multiply-add, whose rounding of shift * unit is
// the same for a whole row and drops out; float32 subtracts first.
template <class T>
FT_DEVICE float exp_of_difference(float score, float shift, float unit) {
  return exp2_fast(sizeof(T) == 4 ? (score - shift) * unit : fmaf(score, unit, -shift * unit));
}

template <int R>
struct Softmax {
  float maximum[R][2], sum[R][2];  // sum: of this lane's columns alone, until finish()

  FT_DEVICE Softmax() {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        maximum[r][half] = -INFINITY;
        sum[r][half] = 0.0f;
      }
  }

  // scores become weights exp(score - maximum), and what the sum and `out` hold is scaled to the new maximum. unit:
  // what scores are multiplied by to be logarithms of 2; never 0 or less.
  template <class T, int N, int M>
  FT_DEVICE void add(float (&scores)[R][N][4], float unit, float (&out)[R][M][4]) {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = maximum[r][half];
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) top = fmaxf(top, scores[r][n][half * 2 + e]);
        top = fmaxf(top, __shfl_xor_sync(kWholeWarp, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kWholeWarp, top, 2));
        // While a row has seen masked keys alone its maximum is -inf: shift by 0, so that exp gives 0 and not NaN.
        const float shift = top == -INFINITY ? 0.0f : top;
        const float decay = exp2_fast((maximum[r][half] - shift) * unit);  // 1 where the maximum has not moved
        maximum[r][half] = top;
        float more = 0.0f;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& score = scores[r][n][half * 2 + e];
            score = exp_of_difference<T>(score, shift, unit);
            more += score;
          }
        sum[r][half] = sum[r][half] * decay + more;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int e = 0; e < 2; ++e) out[r][m][half * 2 + e] *= decay;
      }
  }

  // The whole row's sum, in every lane that holds a part of it.
  FT_DEVICE void finish() {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[r][half] += __shfl_xor_sync(kWholeWarp, sum[r][half], 1);
        sum[r][half] += __shfl_xor_sync(kWholeWarp, sum[r][half], 2);
      }
  }
};

// Adds the NaN and infinite values of a tile to the rows that see them (scores are not -inf), and to no other: for
// tiles where some keys are masked, since in the product with weights 0 * NaN would reach every row. Rare and slow: the
// sums are moved to local memory for it, so that the usual path keeps its registers.
template <int R, int N, int M, class T, int kCols>
FT_DEVICE void add_nonfinite_values(const float (&scores)[R][N][4], const Tile<T, kCols>& values,
                                    float (&out)[R][M][4]) {
  uint32_t seen[R] = {};  // bit 4 n + i, as in kept_rows
  float sums[M][R][4];
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < N; ++n) seen[r] |= uint32_t(scores[r][n][i] != -INFINITY) << (4 * n + i);
#pragma unroll
      for (int m = 0; m < M; ++m) sums[m][r][i] = out[r][m][i];
    }
#pragma unroll 1
  for (int key = 0; key < 8 * N; ++key) {
    const int owner = lane_id() / 4 * 4 + key % 8 / 2;  // the lane of my rows that holds this key's scores
    uint32_t bits[R];
#pragma unroll
    for (int r = 0; r < R; ++r) bits[r] = __shfl_sync(kWholeWarp, seen[r], owner) >> (key / 8 * 4 + key % 2);
#pragma unroll 1
    for (int col = 0; col < 2 * M; ++col) {
      const float value = to_float(*values.at(key, col / 2 * 8 + pair() + col % 2));
      if (fabsf(value) < INFINITY) continue;
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (bits[r] >> (2 * half) & 1) sums[col / 2][r][half * 2 + col % 2] += value;
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[r][m][i] = sums[m][r][i];
}

}  // namespace fused::cuda
