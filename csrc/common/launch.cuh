#pragma once
// The places where CUDA is no C++: device functions, shared memory and launches. A .cu that keeps to these names is
// compiled by nvcc, and by g++ with the emulator of tests/csrc on the include path (FT_EMULATED), which runs the
// kernels on the CPU.

#include <cstdint>

namespace fused::cuda {

// Blocks of a launch.
struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

}  // namespace fused::cuda

#ifdef FT_EMULATED
#include <cuda_emu.h>

#define FT_DEVICE inline
#define FT_SHARED EMU_SHARED

namespace fused::cuda {

inline char* dynamic_shared() { return emu::dynamic_memory(); }

template <class... P, class... A>
void launch(void (*kernel)(P...), const Grid& grid, int block, int64_t shared_bytes, void*, const A&... args) {
  emu::launch(kernel, dim3(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z)), dim3(unsigned(block)),
              size_t(shared_bytes), args...);
}

}  // namespace fused::cuda

#else
#include <cuda_runtime.h>

#include "check.cuh"

#define FT_DEVICE __device__ __forceinline__

// A __shared__ variable: FT_SHARED(float, sums, [32]).
#define FT_SHARED(Type, name, extent) \
  using name##_type = Type extent;    \
  __shared__ name##_type name

namespace fused::cuda {

// The shared memory that the launch asked for, aligned to 1024 bytes.
FT_DEVICE char* dynamic_shared() {
  extern __shared__ __align__(1024) char fused_dynamic_shared[];
  return fused_dynamic_shared;
}

// An address in shared memory as PTX takes it.
FT_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// kernel<<<grid, block, shared_bytes>>> on `stream` (a cudaStream_t) of the current device; the extra braces of <<<>>>
// stay here.
template <class... P, class... A>
void launch(void (*kernel)(P...), const Grid& grid, int block, int64_t shared_bytes, void* stream, const A&... args) {
  FT_REQUIRE(grid.x >= 1 && grid.x <= 0x7fffffff && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535,
             "a grid of " << grid.x << " x " << grid.y << " x " << grid.z << " blocks is more than CUDA takes");
  // A kernel that wants more than 48 KB of shared memory must say so. That limit holds for its static variables too,
  // which tests/csrc/test_cuda_builds.py keeps below 8 KB.
  constexpr int64_t kUnasked = 40 << 10;
  if (shared_bytes > kUnasked)
    FT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  kernel<<<dim3(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z)), unsigned(block), size_t(shared_bytes),
           static_cast<cudaStream_t>(stream)>>>(args...);
  FT_CUDA(cudaGetLastError());
}

}  // namespace fused::cuda
#endif

namespace fused::cuda {

// The same for a row of blocks that need no dynamic shared memory.
template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t grid, int block, void* stream, const A&... args) {
  launch(kernel, Grid{grid}, block, 0, stream, args...);
}

}  // namespace fused::cuda
