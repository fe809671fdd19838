#pragma once
// GELU of a vector, exact and in the approximation by tanh, and their derivatives. Included only by *.simd.cpp files.

#include "simd.h"

namespace fused::cpu::FT_ISA {

struct NormalTail {
  Vec bell;  // e^(-x^2 / 2)
  Vec tail;  // Phi(-|x|)
};

// The tail of Phi is e^(-x^2 / 2) t P(t) with t = 1 / (1 + 0.3 |x|), its relative error below 4e-7: P was fitted to it
// on 0 <= |x| <= 14 by reweighted least squares.
FT_INLINE NormalTail normal_tail(Vec x) {
  const Vec size = x < 0.0f ? -x : x, t = splat(1.0f) / (splat(1.0f) + splat(0.3f) * size);
  Vec p = splat(-0.020613018423318863f);
  p = p * t + splat(0.1123768538236618f);
  p = p * t + splat(-0.22807015478610992f);
  p = p * t + splat(0.19158537685871124f);
  p = p * t + splat(-0.07925055921077728f);
  p = p * t + splat(0.096059650182724f);
  p = p * t + splat(0.07842491567134857f);
  p = p * t + splat(0.11022747308015823f);
  p = p * t + splat(0.11957282572984695f);
  p = p * t + splat(0.11968663334846497f);
  const Vec bell = exp(splat(-0.5f) * x * x);
  return {bell, bell * (p * t)};
}

// x Phi(x).
FT_INLINE Vec gelu(Vec x) {
  const Vec tail = normal_tail(x).tail;
  return x < 0.0f ? (tail == 0.0f ? Vec{} : x * tail) : x - (tail == 0.0f ? Vec{} : x * tail);  // inf: not inf * 0
}

// Phi(x) + x phi(x).
FT_INLINE Vec gelu_slope(Vec x) {
  const NormalTail normal = normal_tail(x);
  return (x < 0.0f ? normal.tail : splat(1.0f) - normal.tail) + x * normal.bell * splat(0.3989422804014327f);
}

// (1 + tanh(u)) / 2 with u = sqrt(2/pi) (x + 0.044715 x^3), and its derivative by 2u. The first is the logistic
// function of 2u; from exp(-|2u|) neither overflows nor is made of a difference.
struct TanhShare {
  Vec share, slope;
};

FT_INLINE TanhShare tanh_share(Vec x) {
  const Vec twice_u = (x + x * x * x * splat(0.044715f)) * splat(1.5957691216057308f);
  const Vec small = exp(twice_u < 0.0f ? twice_u : -twice_u), inverse = splat(1.0f) / (splat(1.0f) + small);
  return {(twice_u < 0.0f ? small : splat(1.0f)) * inverse, small * inverse * inverse};
}

FT_INLINE Vec gelu_tanh(Vec x) { return x * tanh_share(x).share; }

FT_INLINE Vec gelu_tanh_slope(Vec x) {
  const TanhShare tanh = tanh_share(x);
  const Vec inner = splat(1.5957691216057308f) + x * x * splat(3.0f * 0.044715f * 1.5957691216057308f);
  return tanh.share + x * tanh.slope * inner;
}

}  // namespace fused::cpu::FT_ISA
