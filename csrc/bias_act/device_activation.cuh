#pragma once
// The activations, their derivatives, and how threads are laid over a tile, for the kernels of bias_act.

#include <cmath>

#include "../common/row_dropout.cuh"
#include "../common/vector_width.cuh"
#include "bias_act.h"

namespace fused::cuda {

constexpr float kSqrtHalf = 0.7071067811865476f;
constexpr float kInverseSqrtTwoPi = 0.3989422804014327f;
constexpr float kTwiceSqrtTwoOverPi = 1.5957691216057308f;
constexpr float kCubic = 0.044715f;

// (1 + tanh(u)) / 2 of gelu_tanh, and its derivative by 2u. The first is the logistic function of 2u; from exp(-|2u|)
// neither overflows nor is made of a difference.
FT_DEVICE void tanh_parts(float h, float& share, float& slope) {
  const float twice_u = (h + h * h * h * kCubic) * kTwiceSqrtTwoOverPi;
  const float small = expf(-fabsf(twice_u)), inverse = 1.0f / (1.0f + small);
  share = (twice_u < 0.0f ? small : 1.0f) * inverse;
  slope = small * inverse * inverse;
}

// The activation is the same for all threads: one branch for kVec elements.
template <int kVec>
FT_DEVICE void activate(Activation activation, float (&h)[kVec]) {
  if (activation == Activation::relu) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) h[i] = h[i] <= 0.0f ? 0.0f : h[i];  // NaN stays NaN
  } else if (activation == Activation::gelu) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) h[i] = 0.5f * h[i] * (1.0f + erff(h[i] * kSqrtHalf));
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      float share, slope;
      tanh_parts(h[i], share, slope);
      h[i] *= share;
    }
  }
}

// d becomes d * activation'(h); for ReLU h may as well be its output.
template <int kVec>
FT_DEVICE void times_derivative(Activation activation, const float (&h)[kVec], float (&d)[kVec]) {
  if (activation == Activation::relu) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) d[i] = h[i] <= 0.0f ? 0.0f : d[i];
  } else if (activation == Activation::gelu) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float share = 0.5f * (1.0f + erff(h[i] * kSqrtHalf));
      d[i] *= share + h[i] * expf(-0.5f * h[i] * h[i]) * kInverseSqrtTwoPi;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      float share, slope;
      tanh_parts(h[i], share, slope);
      d[i] *= share + h[i] * slope * (1.0f + h[i] * h[i] * (3.0f * kCubic)) * kTwiceSqrtTwoOverPi;
    }
  }
}

// bias at columns col ...: float32 or T; 0 where there is none.
template <class T, int kVec>
FT_DEVICE void load_bias(const void* bias, bool is_float, int64_t col, float (&out)[kVec]) {
  if (bias == nullptr) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] = 0.0f;
  } else if (sizeof(T) == 4 || is_float) {
    load(static_cast<const float*>(bias) + col, out);
  } else {
    load(static_cast<const T*>(bias) + col, out);
  }
}

// A block of kThreads has 2^lane_bits threads side by side, each with kVec columns, and with what is left of them goes
// that many rows at once; `strips` such widths cover N. Blocks are numbered along the columns first.
constexpr int kThreads = 128;

struct Cut {
  int lane_bits;
  unsigned strips;
};

template <int kVec>
Cut cut_columns(int64_t N) {
  int bits = 0;
  while ((kVec << bits) < N && (1 << bits) < kThreads) ++bits;
  const int64_t width = int64_t(kVec) << bits;
  return {bits, unsigned((N + width - 1) / width)};
}

}  // namespace fused::cuda
