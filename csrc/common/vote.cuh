#pragma once
// __syncthreads() that also tells every thread whether any thread of the block said yes.

#include "launch.cuh"

namespace fused::cuda {

FT_DEVICE bool syncthreads_or(bool mine) { return __syncthreads_or(mine); }

}  // namespace fused::cuda
