#pragma once
// Cross entropy of rows of logits x with a target distribution q(v) = a [v = target] + b, and its gradient:
//
//   loss  = -sum_v q(v) log softmax(x)_v + z lse^2           lse = log sum_v exp(x_v)
//   dx_v  = dloss (p_v (1 + 2 z lse) - a [v = target] - b)    p = softmax(x)
//
// a and b, with a + V b = 1, are target_weight and every_weight: label smoothing of either convention. What is saved of
// a row is its maximum, top, and log_sum = log sum_v exp(x_v - top): their sum would lose what top is large by. So
//
//   loss = log_sum + a (top - x_target) + b sum_v (top - x_v) + z lse^2
//
// of which no term but the first can be negative.
//
// Logits are M rows of V contiguous elements, any stride apart, float32, float16 or bfloat16; arithmetic, losses and
// statistics are float32. A row whose target is ignore_index has loss and gradient 0 and is not read; one whose target
// is outside 0 ... V - 1, and is not ignore_index, has loss and gradient NaN, and nothing is read out of bounds.

#include <cstdint>

#include "../common/dtype.h"

namespace fused {

struct CrossEntropyForward {
  const void* logits;
  int64_t logits_stride;
  const void* targets;  // (M,) int32 or int64
  float* losses;        // (M,)
  float* top;           // (M,)
  float* log_sum;       // (M,)
  int64_t M, V, ignore_index;
  float target_weight, every_weight, z_loss;
  bool wide_targets;  // int64, not int32
  DType dtype;
};

struct CrossEntropyBackward {
  const float* dlosses;  // (M,), dlosses_stride elements apart
  int64_t dlosses_stride;
  const void* logits;
  int64_t logits_stride;
  const void* targets;
  const float* top;
  const float* log_sum;
  void* dlogits;  // may be logits, with the same stride
  int64_t dlogits_stride;
  int64_t M, V, ignore_index;
  float target_weight, every_weight, z_loss;
  bool wide_targets;
  DType dtype;
};

namespace cpu {
void cross_entropy_forward(const CrossEntropyForward& args);
void cross_entropy_backward(const CrossEntropyBackward& args);
}  // namespace cpu

namespace cuda {
void cross_entropy_forward(const CrossEntropyForward& args, void* stream);
void cross_entropy_backward(const CrossEntropyBackward& args, void* stream);
}  // namespace cuda

}  // namespace fused
