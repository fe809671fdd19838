#pragma once
// What the CPU kernels of layer norm share beyond common/columns.h: its parameters, and the row's total as stored.
// Included only by *.simd.cpp files.

#include <type_traits>

#include "../common/columns.h"
#include "layer_norm.h"

namespace fused::cpu::FT_ISA {

// v as it is after being stored as T.
template <class T>
FT_INLINE Vec rounded(Vec v) {
  if constexpr (sizeof(T) == sizeof(float)) return v;
  if constexpr (std::is_same_v<T, bf16>) return (Vec)(to_bf16(v) & 0xffff0000u);
  T stored[kWidth];
  store(stored, v);
  return load(stored);
}

// weight or bias, of the type that a loop was compiled for.
template <class P>
struct Typed {
  const P* data;

  FT_INLINE Vec at(int64_t i, int count) const { return load(data + i, count); }
};

// Calls f(weight, bias), compiled once more for the usual case that both are given: the loop is 20 % shorter.
template <class T, class F>
FT_INLINE void with_affine(const void* weight, const void* bias, DType param_dtype, const F& f) {
  const bool both = weight && bias, is_float = param_dtype == DType::f32;
  if (both && is_float)
    f(Typed<float>{static_cast<const float*>(weight)}, Typed<float>{static_cast<const float*>(bias)});
  else if (both && sizeof(T) < 4)
    f(Typed<T>{static_cast<const T*>(weight)}, Typed<T>{static_cast<const T*>(bias)});
  else
    f(Untyped<T>{weight, is_float, 1.0f}, Untyped<T>{bias, is_float, 0.0f});
}

}  // namespace fused::cpu::FT_ISA
