#pragma once
// A product of two matrices on the CPU, for training, where weights change with every step:
//
//   y = x w^T + bias + addend              x (M, K), w (N, K), bias (N,), addend and y (M, N)
//
// x and w are of one dtype; y is of that dtype too, or float32, as bias and addend are. Sums are float32, and rounded
// once. Of x and w either the rows or the columns are contiguous: x W^T, dy W and dy^T x are all this. The rows of y
// and addend lie `stride` elements apart; addend may be y.

#include <cstdint>

#include "../common/dtype.h"

namespace fused::cpu {

struct Matrix {
  const void* data = nullptr;
  int64_t row = 0, column = 0;  // strides, one of them 1
};

struct Matmul {
  int64_t M = 0, N = 0, K = 0;
  DType dtype = DType::f32;
  Matrix x, w;
  const float* bias = nullptr;    // nullptr: 0
  const float* addend = nullptr;  // nullptr: 0
  int64_t addend_stride = 0;
  DType y_dtype = DType::f32;
  void* y = nullptr;
  int64_t y_stride = 0;
  float* sums = nullptr;      // (M, N), working memory where y has 16 bits and K is above kMostCopied
  float* gathered = nullptr;  // (M, up to kMostCopied), working memory where kernels gather rows
};

// Of K at a time, where x is copied first: as float32 of what has 16 bits, rows of a transposed one together, or in the
// order of the kernel.
constexpr int64_t kMostCopied = 1024;

void matmul(const Matmul& args);

// Whether this is the quicker one here in float32, and not torch's product; whether it is for few rows beside many
// weights.
bool matmul_is_quicker();
bool matmul_is_quicker_for_few_rows();

}  // namespace fused::cpu
