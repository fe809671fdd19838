#pragma once
// Walking along a row, for the CPU kernels of row-wise ops: vector after vector, with dropout's factors where there is
// dropout, and sums over a row and over rows in an order that the shape alone decides.
// Included only by *.simd.cpp files.

#include "row_dropout.h"

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

// The same with dropout's factors, f(first, count, slot, factor): 1 where `dropout` is nullptr. `before`: columns that
// the row has ahead of these, a multiple of four.
template <class F>
FT_INLINE void each_vector(int64_t N, const RowDropout* dropout, int64_t row, const F& f, int64_t before = 0) {
  RowFactors factors{{splat(1.0f), splat(1.0f), splat(1.0f), splat(1.0f)}};
  for (int64_t i = 0; i < N; i += 4 * kWidth) {
    if (dropout) factors = row_dropout(*dropout, row, before + i);
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

// A row of parameters of either type, or none given: asks at each vector.
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

template <class Args>
FT_INLINE RowDropout dropout_of(const Args& args) {
  return {args.seed ? uint64_t(*args.seed) : 0, args.dropout_threshold, args.dropout_scale};
}

// sums[i ...] += v, of one group of rows.
FT_INLINE void accumulate(float* sums, int64_t i, int count, Vec v) {
  store(sums + i, load(sums + i, count) + v, count);
}

// One vector of columns of a sum over rows: the rows of `partial` in order, with what each addition rounds away carried
// on (Kahan), so that the number of parts does not show in the result.
template <class P>
FT_INLINE void add_parts(const float* partial, int64_t parts, int64_t N, P* out, int64_t i, int count) {
  Vec sum{}, lost{};
  for (int64_t part = 0; part < parts; ++part) {
    const Vec term = load(partial + part * N + i, count) - lost;
    const Vec next = sum + term;
    lost = (next - sum) - term;
    sum = next;
  }
  store(out + i, sum, count);
}

}  // namespace fused::cpu::FT_ISA
