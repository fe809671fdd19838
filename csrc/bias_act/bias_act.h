#pragma once
// The step between the two matrices of a feed-forward network, in one pass over memory:
//
//   y = dropout(activation(x + bias))
//
//   relu        max(h, 0)
//   gelu        h/2 (1 + erf(h / sqrt(2)))
//   gelu_tanh   h/2 (1 + tanh(u)),  u = sqrt(2/pi) (h + 0.044715 h^3)
//
// Tensors are M rows of N contiguous elements; inputs have any row stride (in elements; 0 repeats a row), outputs lie
// dense. Storage is `dtype`; bias is `bias_dtype`, which is dtype or f32. All arithmetic is float32, rounded once.
// Dropout: common/row_dropout.h, row = 0 ... M - 1, col = 0 ... N - 1; what it drops is 0 whatever it was.

#include <algorithm>
#include <cstdint>

#include "../common/dtype.h"

namespace fused {

// The numbers are the contract with kernels/bias_act/native.py.
enum class Activation : int { relu = 0, gelu = 1, gelu_tanh = 2 };

struct BiasActForward {
  const void* x;
  int64_t x_stride;
  const void* bias;     // (N,) or nullptr: 0
  const int64_t* seed;  // one number, in the kernel's memory; nullptr: no dropout
  void* y;
  int64_t M, N;
  uint32_t dropout_threshold;  // a 32-bit word below it is dropped
  float dropout_scale;         // what the others are multiplied by
  Activation activation;
  DType dtype, bias_dtype;
};

//   dx    = dy * dropout's factor * activation'(x + bias)
//   dbias = sum over rows of dx
//
// ReLU's derivative, and its mask, are read off y: `saved` is y, bias and seed are nullptr, and dropout_scale
// multiplies where y is positive. Else `saved` is x. Outputs that are nullptr are not computed. The sum is taken in a
// fixed order: `parts` groups of rows, each into its own row of the partial buffer, then those rows in order.
struct BiasActBackward {
  const void* dy;
  int64_t dy_stride;
  const void* saved;
  int64_t saved_stride;
  const void* bias;
  const int64_t* seed;
  void* dx;
  float* dbias;    // (N,) float32
  float* partial;  // (parts, N), uninitialised; needed where dbias is asked for
  int64_t parts;
  int64_t M, N;
  uint32_t dropout_threshold;
  float dropout_scale;
  Activation activation;
  DType dtype, bias_dtype;
};

namespace cpu {
void bias_act_forward(const BiasActForward& args);
void bias_act_backward(const BiasActBackward& args);
}  // namespace cpu

namespace cuda {
// Into how many groups rows are cut: the sums are taken by about as many blocks as run at once, with 128 threads of up
// to 96 registers. Each group of rows costs N floats of traffic, written and read again, so a group has some rows.
inline int64_t bias_act_backward_parts(int64_t M, int64_t N, int64_t bytes, int64_t multiprocessors) {
  constexpr int64_t kBlocksPerMultiprocessor = 5, kFewestRows = 8;
  constexpr int64_t kStripBytes = 2048;  // of the columns of a block: 128 threads, 16 bytes each
  const int64_t strips = (N * bytes + kStripBytes - 1) / kStripBytes;
  const int64_t at_once = kBlocksPerMultiprocessor * multiprocessors;
  return std::max<int64_t>(1, std::min((M + kFewestRows - 1) / kFewestRows, at_once / strips));
}

void bias_act_forward(const BiasActForward& args, void* stream);
void bias_act_backward(const BiasActBackward& args, void* stream);
}  // namespace cuda

}  // namespace fused
