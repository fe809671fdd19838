#pragma once
// The online softmax of a warp's rows (Milakov and Gimelshein 2018), and values that are NaN or infinite.
//
// Multiply-adds are written out: left to the compiler, it fuses a product with a sum in one kernel and not in another,
// and large and small tiles would differ in the last bit.

#include "../common/exp2.cuh"
#include "device_bias.cuh"

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

  // The scores of rows (r, half) become weights exp(score - maximum). Returns what the sums so far are to be multiplied
  // by, as the maximum may have moved: `sum` has been. unit: what scores are multiplied by to be logarithms of 2; never
  // 0 or less.
  template <class T, int N>
  FT_DEVICE float weigh(int r, int half, float (&scores)[R][N][4], float unit) {
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
    sum[r][half] = fmaf(sum[r][half], decay, more);
    return decay;
  }

  // All rows: scores become weights, and what `out` holds is scaled to the new maximum.
  template <class T, int N, int M>
  FT_DEVICE void add(float (&scores)[R][N][4], float unit, float (&out)[R][M][4]) {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float decay = weigh<T>(r, half, scores, unit);
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

// Adds the NaN and infinite values of a tile of keys to the rows that see them, and to no other: for tiles where some
// keys are masked, since in the product with weights 0 * NaN would reach every row. Rare, slow and small. values: the
// tile's first row in global memory, as the tile itself has been cleaned. masks(row, key): whether a bias does.
template <int R, int M, class T, class F>
FT_DEVICE void add_nonfinite_values(const Seen& seen, const Source<T>& values, int keys, F&& masks,
                                    float (&out)[R][M][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll 1
    for (int which = 0; which < 2 * R; ++which) {
      const int row = which * 8 + group();
      const uint64_t word = seen.of(row);
      float sum[2] = {0.0f, 0.0f};
#pragma unroll 1
      for (int key = 0; key < keys && key < values.count; ++key) {
        if (!(word >> key & 1) || masks(row, key)) continue;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int col = m * 8 + pair() + e;
          const float value = col < values.width ? to_float(values.data[key * values.stride + col]) : 0.0f;
          if (!(fabsf(value) < INFINITY)) sum[e] += value;
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (which == r * 2 + i / 2) out[r][m][i] += sum[i % 2];
    }
  }
}

}  // namespace fused::cuda
