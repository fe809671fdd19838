#pragma once
// A linear layer for inference on the CPU, its weights packed once for the order in which the kernels read them:
//
//   y = activation(x W^T + bias) + residual             x (M, K), W (N, K), bias (N,), residual and y (M, N)
//
// x, bias, residual and y are float32; their rows may lie apart. The weights are kept in one of three forms:
//
//   f32    as they are
//   bf16   rounded to bfloat16. Where the processor multiplies bfloat16 itself, x is rounded to it as well.
//   int8   W[n, k] = scale[n] * q[n, k], scale[n] = max |W[n, :]| / 127. Each row of x is likewise rounded to 255
//   levels
//          of its own largest magnitude; products are summed exactly, as integers.
//
// Sums are float32 (int32 for int8). A row of y depends on its own row of x alone, and has the same bits in any batch.

#include <cstdint>
#include <memory>

#include "../common/check.h"

namespace fused {

// The numbers are the contract with kernels/linear.
enum class WeightForm : int { f32 = 0, bf16 = 1, int8 = 2 };
enum class Activation : int { none = 0, relu = 1, gelu = 2, silu = 3 };  // gelu: x * Phi(x), the exact one

// How products are computed; each is there where the processor has it, and `best` is the fastest of those.
enum class Multiplier : int {
  best = 0,
  vectors = 1,  // float32 multiply-adds (bf16), 16-bit multiply-adds (int8): everywhere
  dots = 2,     // AVX512-BF16's and AVX512-VNNI's dot products
  tiles = 3,    // AMX
};

namespace cpu {

constexpr int64_t kPanel = 64;  // columns of y that are computed one after another, or together
// A row of x is rounded to -kLevels ... kLevels for int8 weights. With no more than kFewLevels AVX2 multiplies 1.3
// times as fast, for who can do with less: two products of a weight and a level between 0 and 127 fit 16 bits.
constexpr int kLevels = 127, kFewLevels = 63;

// W, read-only once made.
//   f32    [N / 64][64 / columns][K][columns]: those that the kernel of this instruction set computes together
//   bf16   [N / 64][K / 32][4][16][16][2]: of panel, 32 of K, 16 columns: a tile of AMX, pairs along K
//   int8   [N / 64][K / 64][4][16][16][4]: likewise, four along K
// Columns beyond N and K are zeros.
struct PackedWeight {
  int64_t N = 0, K = 0;
  WeightForm form = WeightForm::f32;
  int64_t columns = kPanel;  // f32: see above
  bool finite = true;        // as it was given: no infinity, no NaN
  std::shared_ptr<void> data;
  std::shared_ptr<void> scales;  // int8: `scaled` float32, and as many int32: 128 * sum over k of q[n, k]
  int64_t scaled = 0;            // N to full panels; in a part of a weight still that of the whole

  int64_t panels() const { return (N + kPanel - 1) / kPanel; }
  int64_t depth() const {  // K to the multiple that is stored
    const int64_t unit = form == WeightForm::f32 ? 1 : form == WeightForm::bf16 ? 32 : 64;
    return (K + unit - 1) / unit * unit;
  }
  int64_t element_bytes() const { return form == WeightForm::f32 ? 4 : form == WeightForm::bf16 ? 2 : 1; }
  int64_t bytes() const { return panels() * kPanel * depth() * element_bytes(); }
  const float* scale() const { return static_cast<const float*>(scales.get()); }
  const int32_t* offset() const { return reinterpret_cast<const int32_t*>(scale() + scaled); }
};

// weight (N, K) with rows `stride` elements apart.
PackedWeight pack_weight(const float* weight, int64_t stride, int64_t N, int64_t K, WeightForm form);
// Its `count` columns (or as many as there are) from `first` on, the first of a panel, or of float32's columns that lie
// together. It keeps nothing alive, and what follows it in its last panel are other columns.
PackedWeight columns_of(const PackedWeight& weight, int64_t first, int64_t count);
// What the packed weights stand for, (N, K) contiguous.
void unpack_weight(const PackedWeight& weight, float* out);

struct Linear {
  const PackedWeight* weight = nullptr;
  int64_t M = 0;
  const float* x = nullptr;
  int64_t x_stride = 0;
  const float* bias = nullptr;      // nullptr: 0
  const float* residual = nullptr;  // nullptr: 0; may be y
  int64_t residual_stride = 0;
  float* y = nullptr;
  int64_t y_stride = 0;
  Activation activation = Activation::none;
  Multiplier multiplier = Multiplier::best;
  int levels = kLevels;     // int8: of x's magnitudes, 1 ... kLevels
  void* scratch = nullptr;  // linear_scratch() bytes, aligned to 64
  // int8: x is in scratch already, from a call that differs in nothing but which columns of a weight it was for.
  bool rounded = false;
};

bool has_multiplier(WeightForm form, Multiplier multiplier);
// Working memory for M rows: x rounded to the form of the weights, or in the order of bfloat16's kernel.
int64_t linear_scratch(const PackedWeight& weight, int64_t M);
void linear(const Linear& args);

}  // namespace cpu
}  // namespace fused
