#pragma once
// A product of two float32 matrices on the CPU, for training, where weights change with every step:
//
//   y = x w^T + bias + addend              x (M, K), w (N, K), bias (N,), addend and y (M, N)
//
// Of x and w either the rows or the columns are contiguous: x W^T, dy W and dy^T x are all this. The rows of y and
// addend lie `stride` elements apart; addend may be y.

#include <cstdint>

namespace fused::cpu {

struct Matrix {
  const float* data = nullptr;
  int64_t row = 0, column = 0;  // strides, one of them 1
};

struct Matmul {
  int64_t M = 0, N = 0, K = 0;
  Matrix x, w;
  const float* bias = nullptr;    // nullptr: 0
  const float* addend = nullptr;  // nullptr: 0
  int64_t addend_stride = 0;
  float* y = nullptr;
  int64_t y_stride = 0;
};

void matmul(const Matmul& args);

// Whether this is the quicker one here, and not torch's product.
bool matmul_is_quicker();

}  // namespace fused::cpu
