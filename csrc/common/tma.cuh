#pragma once
// TMA of sm_90: one thread lets the hardware copy a box of a tensor into shared memory. Tensors are of rank 4 and of
// 16-bit elements; a box is 64 columns (128 bytes) wide and up to 256 rows high, and lies in shared memory under the
// 128-byte swizzle that wgmma reads: byte b of row r stands at r * 128 + (b ^ (r % 8) * 16). What is outside of the
// tensor arrives as 0.

#include "barrier.cuh"
#include "dtype.cuh"

#ifndef FT_EMULATED
#include <cuda.h>
#include <cudaTypedefs.h>

namespace fused::cuda {

// A kernel takes it as `const __grid_constant__ TensorMap`.
using TensorMap = CUtensorMap;

// Starts to copy the box that begins at (col, row, axis2, axis3). `shared` is a multiple of 1024 bytes. The bytes,
// box_rows * 128 whatever lies outside, count for the phase of `barrier` that expects them.
FT_DEVICE void tma_load(void* shared, const TensorMap& map, uint64_t* barrier, int col, int row, int axis2, int axis3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(col), "r"(row), "r"(axis2), "r"(axis3)
      : "memory");
}

// The driver's function, found at run time: an extension that is linked with the driver would not load without one.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  FT_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else
  FT_CUDA(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
  FT_REQUIRE(found == cudaDriverEntryPointSuccess, "the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

// On the host: the map of a tensor of T (__half or __nv_bfloat16) with these sizes and strides, in elements, the
// innermost axis first and contiguous. `base` and the strides in bytes are multiples of 16; the sizes are at least 1.
template <class T>
TensorMap tensor_map(const void* base, const int64_t (&sizes)[4], const int64_t (&strides)[3], int box_rows) {
  static_assert(sizeof(T) == 2, "elements of 16 bits");
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = tensor_map_encoder();
  constexpr bool kIsHalf = std::is_same_v<T, __half>;
  const cuuint64_t size[4] = {cuuint64_t(sizes[0]), cuuint64_t(sizes[1]), cuuint64_t(sizes[2]), cuuint64_t(sizes[3])};
  const cuuint64_t stride[3] = {cuuint64_t(strides[0]) * 2, cuuint64_t(strides[1]) * 2, cuuint64_t(strides[2]) * 2};
  const cuuint32_t box[4] = {64, cuuint32_t(box_rows), 1, 1}, step[4] = {1, 1, 1, 1};
  TensorMap map;
  const CUresult status =
      encode(&map, kIsHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
             const_cast<void*>(base), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FT_REQUIRE(status == CUDA_SUCCESS, "TMA does not take a tensor of this shape (error " << int(status) << ")");
  return map;
}

}  // namespace fused::cuda
#endif
