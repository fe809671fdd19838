#pragma once
// What the CUDA kernels of layer norm share: reading parameters of either type, and the total of some columns.

#include "../common/row_dropout.cuh"
#include "../common/vector_width.cuh"
#include "layer_norm.h"

namespace fused::cuda {

// weight, bias or x_bias at columns col ...: float32 or T, or `absent` where it was not given.
template <class T, int kVec>
FT_DEVICE void load_parameter(const void* data, bool is_float, int64_t col, float absent, float (&out)[kVec]) {
  if (data == nullptr) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] = absent;
  } else if (sizeof(T) == 4 || is_float) {
    load(static_cast<const float*>(data) + col, out);
  } else {
    load(static_cast<const T*>(data) + col, out);
  }
}

// residual + dropout(x + x_bias) at columns col ... of a row, rounded to T.
template <class T, int kVec>
FT_DEVICE void load_total(const LayerNormForward& args, uint64_t seed, int64_t row, int64_t col, float (&total)[kVec]) {
  load(static_cast<const T*>(args.x) + row * args.x_stride + col, total);
  if (args.x_bias) {
    float x_bias[kVec];
    load_parameter<T>(args.x_bias, args.param_dtype == DType::f32, col, 0.0f, x_bias);
#pragma unroll
    for (int i = 0; i < kVec; ++i) total[i] += x_bias[i];
  }
  if (args.seed) drop(seed, args.dropout_threshold, args.dropout_scale, row, col, total);
  if (args.residual) {
    float residual[kVec];
    load(static_cast<const T*>(args.residual) + row * args.residual_stride + col, residual);
#pragma unroll
    for (int i = 0; i < kVec; ++i) total[i] += residual[i];
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) total[i] = rounded<T>(total[i]);
}

}  // namespace fused::cuda
