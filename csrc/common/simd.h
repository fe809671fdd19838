#pragma once
// One vector of float32 lanes, its loads and stores from every storage type, and exp().
//
// Included only by *.simd.cpp files, once per instruction set (see isa.h). The vectors are the compiler's own
// (GCC and Clang vector extensions): +, *, <, and ?: are written as on scalars and map to SSE2, AVX2, AVX-512
// or NEON; -ffp-contract=fast turns a * b + c into one fused multiply-add. Intrinsics appear only where the
// language has no word: half conversion and masked tails.

#include <cstdint>
#include <cstring>

#include "dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define FT_WIDTH 16
#elif defined(__AVX2__)
#define FT_WIDTH 8
#else
#define FT_WIDTH 4
#endif

#define FT_INLINE inline __attribute__((always_inline))

namespace fused::cpu::FT_ISA {

constexpr int kWidth = FT_WIDTH;

typedef float Vec __attribute__((vector_size(FT_WIDTH * 4)));
typedef int32_t IVec __attribute__((vector_size(FT_WIDTH * 4)));  // also what a comparison of Vec gives: 0 or -1
typedef uint32_t UVec __attribute__((vector_size(FT_WIDTH * 4)));
typedef uint16_t HVec __attribute__((vector_size(FT_WIDTH * 2)));  // 16-bit storage of one Vec

constexpr float kInf = __builtin_inff();

FT_INLINE Vec splat(float x) { return x - Vec{}; }  // x - 0, not 0 + x: keeps the sign of zero
FT_INLINE IVec splat_int(int32_t x) { return x - IVec{}; }
FT_INLINE UVec splat_uint(uint32_t x) { return x - UVec{}; }
FT_INLINE IVec as_int(Vec x) { return (IVec)x; }
FT_INLINE Vec as_float(IVec x) { return (Vec)x; }
FT_INLINE Vec to_float(IVec x) { return __builtin_convertvector(x, Vec); }

// 0, 1, 2 ... one a lane
FT_INLINE IVec lanes_index() {
  IVec v{};
  for (int i = 0; i < kWidth; ++i) v[i] = i;
  return v;
}

template <class V, class T>
FT_INLINE V load_raw(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
FT_INLINE void store_raw(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// ---------------------------------------------------------------- storage types

FT_INLINE float half_bits_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
  } else {  // subnormal: mantissa * 2^-24 is exact in float32
    const float value = float(mantissa) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

FT_INLINE uint16_t float_to_half_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00u);   // NaN
  if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to infinity
  if (bits < 0x38800000u) {                                  // subnormal: let the adder round to 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &magnitude, 4);
    return uint16_t(sign | (rounded - 0x3f000000u));
  }
  const uint32_t odd = (bits >> 13) & 1u;
  return uint16_t(sign | ((bits - 0x38000000u + 0xfffu + odd) >> 13));
}

FT_INLINE float to_float(float x) { return x; }
FT_INLINE float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
FT_INLINE float to_float(f16 x) { return half_bits_to_float(x.bits); }

FT_INLINE void from_float(float x, float& out) { out = x; }
FT_INLINE void from_float(float x, bf16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out.bits = uint16_t((bits >> 16) | 0x7fffu);  // a NaN must not round into infinity
  } else {
    out.bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}
FT_INLINE void from_float(float x, f16& out) { out.bits = float_to_half_bits(x); }

// dispatch() of dtype.h without its error path, whose std:: code is not to be compiled here.
template <class F>
FT_INLINE void with_storage(DType dtype, F&& f) {
  if (dtype == DType::f32) return f(Tag<float>{});
  if (dtype == DType::f16) return f(Tag<f16>{});
  return f(Tag<bf16>{});
}

// ---------------------------------------------------------------- vector loads and stores

FT_INLINE Vec load(const float* p) { return load_raw<Vec>(p); }
FT_INLINE void store(float* p, Vec v) { store_raw(p, v); }

// To the nearest bfloat16, ties to even: the upper half of each lane; what is in the lower one means nothing.
FT_INLINE UVec to_bf16(Vec v) {
  const UVec bits = (UVec)v, nan = (UVec)(v != v);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) | (nan & 0x7fff0000u);  // a NaN must not round into infinity
}
#if defined(__AVX2__) && !defined(__AVX512F__)
// What GCC makes of __builtin_convertvector takes twice as many instructions.
FT_INLINE Vec load(const bf16* p) {
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
}
FT_INLINE void store(bf16* p, Vec v) {
  const __m256i upper = _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_shuffle_epi8((__m256i)to_bf16(v), upper), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(halves));
}
#else
FT_INLINE Vec load(const bf16* p) {
  const UVec wide = __builtin_convertvector(load_raw<HVec>(p), UVec);
  return (Vec)(wide << 16);
}
FT_INLINE void store(bf16* p, Vec v) { store_raw(p, __builtin_convertvector(to_bf16(v) >> 16, HVec)); }
#endif

FT_INLINE Vec load(const f16* p) {
#if defined(__AVX512F__)
  // The maskz forms of these intrinsics: GCC 12's plain ones read an undefined register and warn about it.
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = half_bits_to_float(p[i].bits);
  return v;
#endif
}
FT_INLINE void store(f16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
  for (int i = 0; i < kWidth; ++i) p[i].bits = float_to_half_bits(v[i]);
#endif
}

// The first `count` (1 ... kWidth) lanes; the others are 0 and their memory is not touched.
template <class T>
FT_INLINE Vec load(const T* p, int count) {
  if (count == kWidth) return load(p);
  T buffer[kWidth] = {};
  for (int i = 0; i < count; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
FT_INLINE void store(T* p, Vec v, int count) {
  if (count == kWidth) return store(p, v);
  T buffer[kWidth];
  store(buffer, v);
  for (int i = 0; i < count; ++i) p[i] = buffer[i];
}
#if defined(__AVX512F__)
FT_INLINE Vec load(const float* p, int count) { return (Vec)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1u), p); }
FT_INLINE void store(float* p, Vec v, int count) { _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1u), (__m512)v); }
#endif

// ---------------------------------------------------------------- arithmetic

// sum + a * b, where a loop has as many sums as registers. GCC picks one of three registers for the result, and where
// it mixes steps of such a loop it moves sums about and keeps some in memory; in these words the result takes the sum's
// register.
FT_INLINE Vec add_product(Vec sum, Vec a, Vec b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
#else
  return sum + a * b;
#endif
}
// What comes behind it is not loaded before it.
FT_INLINE void loads_wait() { asm volatile("" ::: "memory"); }

FT_INLINE Vec vmax(Vec a, Vec b) { return a > b ? a : b; }  // NaN in a: gives b
FT_INLINE Vec vmin(Vec a, Vec b) { return a < b ? a : b; }

// Lanes `from` of a and b side by side.
FT_INLINE Vec shuffle(Vec a, Vec b, IVec from) {
#if defined(__clang__)
  Vec out;
  for (int i = 0; i < kWidth; ++i) out[i] = from[i] < kWidth ? a[from[i]] : b[from[i] - kWidth];
  return out;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// Of numbers; what comes out with NaN among them may or may not be NaN.
FT_INLINE float largest_lane(Vec v) {
#pragma GCC unroll 4
  for (int half = kWidth / 2; half > 0; half /= 2) v = vmax(v, shuffle(v, v, lanes_index() ^ splat_int(half)));
  return v[0];
}

// Sums pairwise, so that the rounding error grows with log2(kWidth).
FT_INLINE float reduce_sum(Vec v) {
  float lane[kWidth];
  store(lane, v);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

FT_INLINE Vec round_nearest(Vec x) {  // for |x| < 2^22
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (Vec)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else  // the adder's own rounding
  const Vec magic = splat(12582912.0f);
  Vec shifted = x + magic;
  asm("" : "+m"(shifted));  // keeps the compiler from folding (x + c) - c
  return shifted - magic;
#endif
}

// 2^n p for whole n and p from 2^-1 to 2. Where n is beyond float32's exponents, or NaN, it means nothing.
FT_INLINE Vec times_power_of_2(Vec p, Vec n) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  // n onto the exponent of p: where n is 128, p is below 1.
  return (Vec)((UVec)p + ((UVec) __builtin_convertvector(n, IVec) << 23));
#endif
}

// e^x, relative error below 2 ulp (2^n times a degree-6 polynomial on |r| <= ln(2)/2, Cephes coefficients).
// Exactly 1 at 0; exactly 0 below -87.33, where float32's smallest numbers begin, and for -inf; +inf above 88.7228; NaN
// stays NaN.
FT_INLINE Vec exp(Vec x) {
  const Vec low = splat(-87.33f), high = splat(88.7228f);
#if defined(__AVX512F__)
  const Vec n = (Vec)_mm512_maskz_roundscale_ps(0xffff, (__m512)(x * splat(1.44269504f)), 0);
#else
  const Vec n = round_nearest(x * splat(1.44269504f));
#endif
  Vec r = x - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.0f);
  const Vec out = x < low ? Vec{} : times_power_of_2(p, n);
  return x > high ? splat(kInf) : out;
}

// e^x where a maximum was taken off x, so that it is below 88 and what is far below 0 is small beside other results:
// relative error below 1.2e-7 + |x| / 7e7. Exactly 1 at 0; exactly 0 below -87.33 and for -inf; NaN stays NaN. 8
// multiplications and multiply-adds where exp() takes 10: a multiply-add that rounds once makes r, 2^r is a polynomial
// of degree 6 on |r| <= 1/2, fitted to the least relative error with exactly 1 at 0.
FT_INLINE Vec exp_shifted(Vec x) {
#if defined(__FMA__) || defined(__aarch64__)
  const Vec by = splat(1.44269504f);
#if defined(__AVX512F__)
  const Vec n = (Vec)_mm512_maskz_roundscale_ps(0xffff, (__m512)(x * by), 0);
  const Vec r = (Vec)_mm512_fmsub_ps((__m512)x, (__m512)by, (__m512)n);
#else
  const Vec n = round_nearest(x * by);
#if defined(__aarch64__)
  const Vec r = (Vec)vfmaq_f32((float32x4_t)-n, (float32x4_t)x, (float32x4_t)by);
#else
  const Vec r = (Vec)_mm256_fmsub_ps((__m256)x, (__m256)by, (__m256)n);
#endif
#endif
  Vec p = splat(1.5353361628e-4f);
  p = p * r + splat(1.3398874417e-3f);
  p = p * r + splat(9.6184373588e-3f);
  p = p * r + splat(5.5503324711e-2f);
  p = p * r + splat(2.4022647914e-1f);
  p = p * r + splat(6.9314720286e-1f);
  p = p * r + splat(1.0f);
  return x < splat(-87.33f) ? Vec{} : times_power_of_2(p, n);
#else  // without such a multiply-add r would be off by what n is long
  return exp(x);
#endif
}

}  // namespace fused::cpu::FT_ISA
