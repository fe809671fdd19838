#pragma once
// The activations and their derivatives, each a type that a loop is compiled for, for the CPU kernels of bias_act.
// Included only by *.simd.cpp files.

#include "../common/columns.h"
#include "../common/gelu.h"
#include "bias_act.h"

namespace fused::cpu::FT_ISA {

struct Relu {
  static FT_INLINE Vec value(Vec h) { return h <= 0.0f ? Vec{} : h; }  // NaN stays NaN
  static FT_INLINE Vec times_slope(Vec d, Vec y) { return y <= 0.0f ? Vec{} : d; }
};

struct Gelu {
  static FT_INLINE Vec value(Vec h) { return gelu(h); }
  static FT_INLINE Vec times_slope(Vec d, Vec h) { return d * gelu_slope(h); }
};

struct GeluTanh {
  static FT_INLINE Vec value(Vec h) { return gelu_tanh(h); }
  static FT_INLINE Vec times_slope(Vec d, Vec h) { return d * gelu_tanh_slope(h); }
};

// f(T{}, Activation{}) with the storage type and the activation as types; of T a Tag.
template <class Args, class F>
FT_INLINE void with_types(const Args& args, const F& f) {
  with_storage(args.dtype, [&](auto tag) {
    if (args.activation == Activation::relu) return f(tag, Relu{});
    if (args.activation == Activation::gelu) return f(tag, Gelu{});
    return f(tag, GeluTanh{});
  });
}

}  // namespace fused::cpu::FT_ISA
