#pragma once
// Layer norm of the sum of a residual stream and a sublayer's output, over the last axis:
//
//   total = residual + dropout(x + x_bias)
//   y     = (total - mean) * rstd * weight + bias        rstd = 1 / sqrt(var + eps), var the biased variance
//
// and RMS norm, the same with mean = 0 and var = mean of total^2. What is not given drops out of the formula.
//
// Tensors are M rows of N contiguous elements; inputs have any row stride (in elements; 0 repeats a row), outputs
// lie dense. Storage is `dtype`; weight, bias and x_bias are `param_dtype`, which is dtype or f32. All arithmetic
// is float32, but total is rounded to dtype before it is normalised, kept or not: y is the norm of the total that
// is returned, and backward, which reads it, differentiates what forward did. Dropout: common/philox.h with
// outer = 0, row = 0 ... M - 1, col = 0 ... N - 1.

#include <algorithm>
#include <cstdint>

#include "../common/dtype.h"

namespace fused {

struct LayerNormForward {
  const void* x;
  int64_t x_stride;
  const void* residual;  // nullptr: 0
  int64_t residual_stride;
  const void* x_bias;   // (N,) or nullptr: 0
  const void* weight;   // (N,) or nullptr: 1
  const void* bias;     // (N,) or nullptr: 0
  const int64_t* seed;  // one number, in the kernel's memory; nullptr: no dropout
  void* y;
  void* total;  // nullptr: not kept
  float* mean;  // (M,); nullptr: not kept
  float* rstd;  // (M,); nullptr: not kept
  int64_t M, N;
  float eps;
  uint32_t dropout_threshold;  // a 32-bit word below it is dropped
  float dropout_scale;         // what the others are multiplied by
  bool rms;
  DType dtype, param_dtype;
};

// With g = dy * weight, n = (total - mean) * rstd and means over the row:
//
//   dresidual = rstd * (g - mean(g) - n * mean(g * n)) + dtotal        (RMS norm: without mean(g))
//   dx        = dresidual * dropout's factor
//   dweight   = sum over rows of dy * n,  dbias = sum of dy,  dx_bias = sum of dx
//
// Outputs that are nullptr are not computed. The sums are taken in a fixed order: `parts` groups of rows, cut by
// M and parts alone, each into its own row of the partial buffers, then those rows in order.
struct LayerNormBackward {
  const void* dy;  // nullptr: 0; then dweight and dbias must be nullptr
  int64_t dy_stride;
  const void* dtotal;  // the gradient that reached total itself; nullptr: 0
  int64_t dtotal_stride;
  const void* total;
  int64_t total_stride;
  const void* weight;
  const float* mean;  // nullptr if rms
  const float* rstd;
  const int64_t* seed;
  void* dx;
  void* dresidual;
  void* dweight;  // (N,) param_dtype, as dbias and dx_bias
  void* dbias;
  void* dx_bias;
  float* partial_dweight;  // (parts, N), uninitialised; needed where its sum is asked for
  float* partial_dbias;
  float* partial_dx_bias;
  int64_t parts;
  int64_t M, N;
  uint32_t dropout_threshold;
  float dropout_scale;
  bool rms;
  DType dtype, param_dtype;
};

namespace cuda {
// Into how many groups rows are cut: the sums are taken by at most as many blocks as run at once: each costs N floats
// of traffic a sum, written and read again. Up to kWarpColumns columns a block takes a row a warp (backward.cu).
inline int64_t layer_norm_backward_parts(int64_t M, int64_t N, int64_t multiprocessors) {
  constexpr int64_t kBlocksPerMultiprocessor = 2, kWarpColumns = 1024, kWarpRows = 8;
  const int64_t rows = N <= kWarpColumns ? kWarpRows : 1;
  return std::max<int64_t>(1, std::min((M + rows - 1) / rows, kBlocksPerMultiprocessor * multiprocessors));
}
}  // namespace cuda

// std::invalid_argument unless the arguments keep to the contract; every launcher calls it first.
void check(const LayerNormForward& args);
void check(const LayerNormBackward& args);

namespace cpu {
void layer_norm_forward(const LayerNormForward& args);
void layer_norm_backward(const LayerNormBackward& args);
}  // namespace cpu

namespace cuda {
void layer_norm_forward(const LayerNormForward& args, void* stream);
void layer_norm_backward(const LayerNormBackward& args, void* stream);
}  // namespace cuda

}  // namespace fused
