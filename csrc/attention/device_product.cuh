#pragma once
// The two matrix products of attention, on tiles in shared memory, by one warp.
//
//   product_nt:  c (16 R x 8 N) += a b^T    rows of two tiles against each other: scores, dP
//   product_nn:  c (16 R x 8 N) += p b      weights in registers times rows of a tile: out, dq, dk, dv
//
// c and p are held as the tensor cores hold them (common/mma.cuh), for every dtype: 16-bit types go through mma.sync
// with float32 sums; float32 is multiplied by the ordinary units in the same places, since tf32 would lose half the
// digits. There product_nt adds up four terms at a time, and product_nn those of a tile, before they are added to c:
// long sums are sums of short ones, always in the same order.

#include "../common/mma.cuh"
#include "device_tile.cuh"

namespace fused::cuda {

// Floats a warp needs to hand its weights round in product_nn<float>: 16 R rows of 8 K, and 4 to spread the banks.
template <class T, int R, int K>
constexpr int scratch_floats() {
  return sizeof(T) == 4 ? 16 * R * (8 * K + 4) : 0;
}

// Fragments after this are not loaded before it. Where a kernel holds nearly all registers in sums, the compiler for
// sm_90 loads further ahead than there are registers for.
FT_DEVICE void no_loads_ahead() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __syncwarp();
#endif
}

// c += a[a_row ...] b[0 ...]^T; a_row is a multiple of 16
template <int R, int N, class T, int kCols>
FT_DEVICE void product_nt(float (&c)[R][N][4], const Tile<T, kCols>& a, int a_row, const Tile<T, kCols>& b) {
  const int lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    const int a_place = a.place(a_row + lane % 16, lane / 16);
    const int b_place = b.place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < kCols / 16; ++k) {
      uint32_t fa[R][4];
#pragma unroll
      for (int r = 0; r < R; ++r) ldmatrix_x4(fa[r], a.data + a.further(a_place, k * 2) + r * 16 * kCols);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t fb[4];
        ldmatrix_x4(fb, b.data + b.further(b_place, k * 2) + n * 8 * kCols);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          mma_m16n8k16<T>(c[r][n], fa[r], fb[0], fb[1]);
          mma_m16n8k16<T>(c[r][n + 1], fa[r], fb[2], fb[3]);
        }
      }
    }
  } else {
#pragma unroll 1
    for (int k = 0; k < kCols / 4; ++k) {
      float4 fa[R][2];
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          fa[r][half] = *reinterpret_cast<const float4*>(a.chunk(a_row + r * 16 + half * 8 + group(), k));
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float4 fb = *reinterpret_cast<const float4*>(b.chunk(n * 8 + pair() + e, k));
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float4& x = fa[r][half];
              c[r][n][half * 2 + e] += fmaf(x.w, fb.w, fmaf(x.z, fb.z, fmaf(x.y, fb.y, x.x * fb.x)));
            }
        }
    }
  }
}

// c += p b[0 ...], columns b_col ... b_col + 8 N - 1 of b; p is rounded to T. `scratch`: the warp's own.
template <int R, int K, int N, class T, int kCols>
FT_DEVICE void product_nn(float (&c)[R][N][4], const float (&p)[R][K][4], const Tile<T, kCols>& b, int b_col,
                          float* scratch) {
  const int lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    const int b_place = b.place(lane % 16, b_col / 8 + lane / 16);
    uint32_t fa[K / 2][R][4];  // all of it at once: half the registers of p
#pragma unroll
    for (int k = 0; k < K; k += 2)
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          fa[k / 2][r][i] = pack<T>(p[r][k + i / 2][i % 2 * 2], p[r][k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int k = 0; k < K; k += 2) {
      no_loads_ahead();
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t fb[4];
        ldmatrix_x4_trans(fb, b.data + b.further(b_place, n) + k * 8 * kCols);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          mma_m16n8k16<T>(c[r][n], fa[k / 2][r], fb[0], fb[1]);
          mma_m16n8k16<T>(c[r][n + 1], fa[k / 2][r], fb[2], fb[3]);
        }
      }
    }
  } else {
    constexpr int kStride = 8 * K + 4, kAtOnce = 4;
    static_assert(N % kAtOnce == 0, "whole groups of columns");
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int k = 0; k < K; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          store_pair(scratch + (r * 16 + half * 8 + group()) * kStride + k * 8 + pair(), p[r][k][half * 2],
                     p[r][k][half * 2 + 1]);
    __syncwarp();
    const int b_place = b.place(0, (b_col + pair()) / 4) + pair() % 4;
#pragma unroll
    for (int first = 0; first < N; first += kAtOnce) {
      float sum[R][kAtOnce][4] = {};
#pragma unroll 1
      for (int k = 0; k < 8 * K; k += 8) {
        Pack<float, 4> fa[R][2];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (i % 4 == 0)
#pragma unroll
            for (int r = 0; r < R; ++r)
#pragma unroll
              for (int half = 0; half < 2; ++half)
                fa[r][half] =
                    *reinterpret_cast<const Pack<float, 4>*>(scratch + (r * 16 + half * 8 + group()) * kStride + k + i);
#pragma unroll
          for (int n = 0; n < kAtOnce; ++n) {
            // row k + i turns its chunks by i, and so does this
            const int place = b.further(b_place ^ (i * 4), (first + n) * 2) + (k + i) * kCols;
            const float2 fb = *reinterpret_cast<const float2*>(b.data + place);
#pragma unroll
            for (int r = 0; r < R; ++r)
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                sum[r][n][half * 2] = fmaf(fa[r][half].element[i % 4], fb.x, sum[r][n][half * 2]);
                sum[r][n][half * 2 + 1] = fmaf(fa[r][half].element[i % 4], fb.y, sum[r][n][half * 2 + 1]);
              }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) c[r][first + n][i] += sum[r][n][i];
    }
    __syncwarp();  // the scratch memory is free again
  }
}

template <int R, int N>
FT_DEVICE void clear(float (&c)[R][N][4]) {
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[r][n][i] = 0.0f;
}

}  // namespace fused::cuda
