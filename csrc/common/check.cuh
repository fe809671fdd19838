#pragma once
// Errors of the CUDA half: FT_CUDA is the device's or the driver's fault (RuntimeError in Python).

#include <cuda_runtime_api.h>

#include "check.h"

#define FT_CUDA(expression)                                                                 \
  do {                                                                                      \
    const cudaError_t status = (expression);                                                \
    if (status != cudaSuccess) {                                                            \
      std::ostringstream text;                                                              \
      text << __func__ << ": " << cudaGetErrorString(status) << " (" << #expression << ")"; \
      throw std::runtime_error(text.str());                                                 \
    }                                                                                       \
  } while (false)
