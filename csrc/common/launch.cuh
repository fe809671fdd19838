#pragma once
// The three places where CUDA is no C++: device functions, shared memory and launches. A .cu that keeps to these
// names is compiled by nvcc, and by g++ with an emulator's header (FT_EMULATED), which runs the kernels on the CPU.

#include <cstdint>

#ifdef FT_EMULATED
#include <cuda_emu.h>

#define FT_DEVICE inline
#define FT_SHARED FX_SHARED

namespace fused::cuda {

template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t grid, int block, void*, const A&... args) {
  emu::launch(kernel, dim3(unsigned(grid)), dim3(unsigned(block)), 0, args...);
}

}  // namespace fused::cuda

#else
#include <cuda_runtime.h>

#include "check.cuh"

#define FT_DEVICE __device__ __forceinline__
#define FT_SHARED(Type, name, extent) \
  using name##_type = Type extent;    \
  __shared__ name##_type name

namespace fused::cuda {

// kernel<<<grid, block>>> on `stream` (a cudaStream_t) of the current device; the extra braces of <<<>>> stay here.
template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t grid, int block, void* stream, const A&... args) {
  FT_REQUIRE(grid >= 1 && grid <= 0x7fffffff, "a grid of " << grid << " blocks is more than CUDA takes");
  kernel<<<unsigned(grid), unsigned(block), 0, static_cast<cudaStream_t>(stream)>>>(args...);
  FT_CUDA(cudaGetLastError());
}

}  // namespace fused::cuda
#endif
