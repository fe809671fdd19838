#pragma once
// Rows of x in the form in which a kernel multiplies them, in args.scratch: M (to full tiles of 16) rows of depth()
// elements, zeros beyond K, and for int8 the row's scale.

#include "epilogue.h"

namespace fused::cpu::FT_ISA {

template <class T>
FT_INLINE T* rounded_row(const Linear& args, int64_t m) {
  return static_cast<T*>(args.scratch) + m * args.weight->depth();
}

template <class T>
FT_INLINE float* row_scales(const Linear& args) {  // of int8
  return reinterpret_cast<float*>(rounded_row<T>(args, (args.M + 15) / 16 * 16));
}

// x as `T`, float or bf16.
template <class T>
void round_rows(const Linear& args) {
  const int64_t K = args.weight->K, depth = args.weight->depth();
  parallel_for(args.M, args.M * K, [&](int64_t m) {
    const float* x = args.x + m * args.x_stride;
    T* out = rounded_row<T>(args, m);
    for (int64_t k = 0; k < K; k += kWidth) {
      const int count = int(smaller(kWidth, K - k));
      store(out + k, load(x + k, count), count);
    }
    for (int64_t k = K; k < depth; ++k) from_float(0.0f, out[k]);
  });
}

// x as args.levels levels of the row's largest magnitude, up and down: `put` writes kWidth neighbours of a row. A row
// that is not finite gets the scale NaN, and so its results.
template <class T, class F>
void round_rows_to_levels(const Linear& args, const F& put) {
  const int64_t K = args.weight->K, depth = args.weight->depth();
  float* scales = row_scales<T>(args);
  const auto levels = float(args.levels);
  parallel_for(args.M, args.M * K, [&](int64_t m) {
    const float* x = args.x + m * args.x_stride;
    Vec top{}, zero{};
    for (int64_t k = 0; k < K; k += kWidth) {
      const Vec v = load(x + k, int(smaller(kWidth, K - k)));
      top = vmax(v < 0.0f ? -v : v, top);
      zero += v * 0.0f;  // NaN where v is not finite
    }
    float lane[kWidth], largest = 0.0f;
    store(lane, top);
    for (float value : lane) largest = value > largest ? value : largest;
    const float nothing = reduce_sum(zero), by = levels / largest;
    const float inverse = nothing == 0.0f && by < kInf ? by : 0.0f;  // of 0, and what is next to it
    scales[m] = largest / levels + nothing;
    T* out = rounded_row<T>(args, m);
    for (int64_t k = 0; k < depth; k += kWidth) {
      const Vec v = k < K ? load(x + k, int(smaller(kWidth, K - k))) : Vec{};
      Vec scaled = nothing == 0.0f ? v * inverse : Vec{};
      asm("" : "+m"(scaled));  // rounded as a product, not within the multiply-add that would round it on
      const IVec level = __builtin_convertvector(round_nearest(scaled), IVec);
      put(out + k, level);
    }
  });
}

// The same as bytes, each `more` than the level.
inline void round_rows_to_unsigned(const Linear& args, int32_t more = 128) {
  round_rows_to_levels<uint8_t>(args, [&](uint8_t* out, IVec level) {
    typedef uint8_t Bytes __attribute__((vector_size(FT_WIDTH)));
    store_raw(out, __builtin_convertvector(level + more, Bytes));
  });
}

}  // namespace fused::cpu::FT_ISA
