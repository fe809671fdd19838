#pragma once
// Tensors of int32 or int64, which a kernel reads as int64: tokens and targets.

#include "launch.cuh"

namespace fused::cuda {

FT_DEVICE int64_t integer_at(const void* data, bool wide, int64_t index) {
  return wide ? static_cast<const int64_t*>(data)[index] : static_cast<const int32_t*>(data)[index];
}

}  // namespace fused::cuda
