#pragma once
// What the CPU kernels of layer norm share: walking along a row, parameters of either type, the row's total.
// Included only by *.simd.cpp files.

#include "../common/row_dropout.h"
#include "layer_norm.h"

namespace fused::cpu::FT_ISA {

#define FT_LAMBDA __attribute__((always_inline))

// f(first, count, slot) for each vector of columns. Four vectors in turn have slots 0 ... 3, so that sums kept
// one a slot do not wait for each other; count is the constant kWidth but for the row's last vectors.
template <class F>
FT_INLINE void each_vector(int64_t N, const F& f) {
  int64_t i = 0;
  for (; i + 4 * kWidth <= N; i += 4 * kWidth) {
    f(i, kWidth, 0);
    f(i + kWidth, kWidth, 1);
    f(i + 2 * kWidth, kWidth, 2);
    f(i + 3 * kWidth, kWidth, 3);
  }
  for (; i < N; i += kWidth) f(i, N - i < kWidth ? int(N - i) : kWidth, 0);
}

// The same with dropout's factors, f(first, count, slot, factor): 1 where `dropout` is nullptr.
template <class F>
FT_INLINE void each_vector(int64_t N, const RowDropout* dropout, int64_t row, const F& f) {
  RowFactors factors{{splat(1.0f), splat(1.0f), splat(1.0f), splat(1.0f)}};
  for (int64_t i = 0; i < N; i += 4 * kWidth) {
    if (dropout) factors = row_dropout(*dropout, row, i);
    if (i + 4 * kWidth <= N) {
      f(i, kWidth, 0, factors.part[0]);
      f(i + kWidth, kWidth, 1, factors.part[1]);
      f(i + 2 * kWidth, kWidth, 2, factors.part[2]);
      f(i + 3 * kWidth, kWidth, 3, factors.part[3]);
    } else {
      for (int m = 0; i + m * kWidth < N; ++m) {
        const int64_t left = N - i - m * kWidth;
        f(i + m * kWidth, left < kWidth ? int(left) : kWidth, 0, factors.part[m]);
      }
    }
  }
}

// x as dropout leaves it: 0 where its factor is 0, whatever it was. A product would leave NaN and infinity NaN.
FT_INLINE Vec dropped(Vec x, Vec factor) { return (factor > Vec{}) ? x * factor : Vec{}; }

// One sum over a row, in an order that depends on N alone.
struct RowSum {
  Vec slot[4] = {};

  FT_INLINE float value() const { return reduce_sum((slot[0] + slot[1]) + (slot[2] + slot[3])); }
};

// The first `count` lanes of v; the others 0.
FT_INLINE Vec only_first(Vec v, int count) { return count == kWidth ? v : (lanes_index() < count ? v : Vec{}); }

// v as it is after being stored as T.
template <class T>
FT_INLINE Vec rounded(Vec v) {
  if constexpr (sizeof(T) == sizeof(float)) return v;
  T stored[kWidth];
  store(stored, v);
  return load(stored);
}

// weight, bias or x_bias, of the type that a loop was compiled for.
template <class P>
struct Typed {
  const P* data;

  FT_INLINE Vec at(int64_t i, int count) const { return load(data + i, count); }
};

// The same of either type, or not given at all: asks at each vector.
template <class T>
struct Untyped {
  const void* data;
  bool is_float;
  float absent;

  FT_INLINE Vec at(int64_t i, int count) const {
    if (data == nullptr) return splat(absent);
    if (sizeof(T) == 4 || is_float) return load(static_cast<const float*>(data) + i, count);
    return load(static_cast<const T*>(data) + i, count);
  }
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

template <class Args>
FT_INLINE RowDropout dropout_of(const Args& args) {
  return {args.seed ? uint64_t(*args.seed) : 0, args.dropout_threshold, args.dropout_scale};
}

}  // namespace fused::cpu::FT_ISA
