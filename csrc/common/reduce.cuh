#pragma once
// Sums over a warp or a block, in an order that never changes.

#include "launch.cuh"

namespace fused::cuda {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

FT_DEVICE float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kWholeWarp, v, offset);
  return v;
}

// kCount sums over the kThreads threads that share a row: one warp, or the whole block. Every thread gets them.
// `shared` holds kCount * kWarp floats and may be used again at once; a warp needs none.
template <int kThreads, int kCount>
FT_DEVICE void row_sums(float (&v)[kCount], float* shared) {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp, "whole warps, at most 32");
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = warp_sum(v[i]);
  if constexpr (kThreads > kWarp) {
    constexpr int kWarps = kThreads / kWarp;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    __syncthreads();  // the last sums have been read
    if (lane == 0)
#pragma unroll
      for (int i = 0; i < kCount; ++i) shared[i * kWarp + warp] = v[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = warp_sum(lane < kWarps ? shared[i * kWarp + lane] : 0.0f);
  }
}

}  // namespace fused::cuda
