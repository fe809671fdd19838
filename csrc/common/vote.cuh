#pragma once
// __syncthreads() that also tells every thread whether any thread of the block said yes.

#include "reduce.cuh"

namespace fused::cuda {

#ifdef FT_EMULATED
inline bool syncthreads_or(bool mine) {
  FT_SHARED(int, said, [kWarp]);
  const bool any = __any_sync(kWholeWarp, mine);
  said[threadIdx.x / kWarp] = any;
  __syncthreads();
  bool all = false;
  for (int warp = 0; warp < int(blockDim.x) / kWarp; ++warp) all |= said[warp] != 0;
  __syncthreads();
  return all;
}
#else
FT_DEVICE bool syncthreads_or(bool mine) { return __syncthreads_or(mine); }
#endif

}  // namespace fused::cuda
