// y = x W^T with int8 weights and levels of x, for processors without dot products of bytes: the bytes of 32 bits
// become two pairs of 16-bit numbers, whose products are summed in pairs.

#include "chunks.h"

namespace fused::cpu::FT_ISA {
namespace {

typedef int16_t SVec __attribute__((vector_size(FT_WIDTH * 4)));

// a[2i] * b[2i] + a[2i + 1] * b[2i + 1]
FT_INLINE IVec multiply_pairs(SVec a, SVec b) {
#if defined(__AVX512F__)
  return (IVec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (IVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (IVec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
  return (IVec)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
#else
  IVec sum;
  for (int i = 0; i < kWidth; ++i) sum[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sum;
#endif
}

struct Int8 {
  using Rounded = int16_t;
  using Sum = IVec;
  static constexpr int kTogether = 4;
  struct Weights {
    SVec even, odd;
  };
  using Factors = Weights;
  static FT_INLINE Weights unpack(const char* p) {
    const auto four = load_raw<SVec>(p);
    return {(four << 8) >> 8, four >> 8};
  }
  static FT_INLINE SVec pair(const int16_t* x) {
    int32_t both;
    std::memcpy(&both, x, sizeof both);
#if defined(__AVX512F__)
    return (SVec)_mm512_set1_epi32(both);
#elif defined(__AVX2__)
    return (SVec)_mm256_set1_epi32(both);  // from memory, where GCC makes two moves of splat_int()
#else
    return (SVec)splat_int(both);
#endif
  }
  static FT_INLINE Factors factors(const int16_t* x) { return {pair(x), pair(x + 2)}; }
  static FT_INLINE IVec add(IVec sum, const Factors& x, const Weights& w) {
    return sum + (multiply_pairs(w.even, x.even) + multiply_pairs(w.odd, x.odd));
  }
  static FT_INLINE Vec value(const Linear& args, IVec sum, int64_t m, int64_t n) {
    return to_float(sum) * (load(args.weight->scale() + n) * row_scales<int16_t>(args)[m]);
  }
};

#if defined(__AVX2__) && !defined(__AVX512F__)
// Up to kFewLevels levels of x: bytes that are kFewLevels + 1 more than these are multiplied as they are. A Zen 3 takes
// two such products of vectors a cycle, and one of 16-bit numbers: 64 rows 166 GOP/s where Int8 has 126, and
// float32 97.
struct FewLevels {
  using Rounded = uint8_t;
  using Sum = IVec;
  using Weights = __m256i;
  using Factors = __m256i;
  static constexpr int kTogether = 4, kMore = kFewLevels + 1;
  static FT_INLINE Weights unpack(const char* p) { return load_raw<__m256i>(p); }
  static FT_INLINE Factors factors(const uint8_t* x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm256_set1_epi32(four);
  }
  static FT_INLINE IVec add(IVec sum, Factors x, Weights w) {
    __m256i ones = _mm256_set1_epi16(1);
    asm("" : "+x"(ones));  // in a register: there is enough else to load
    return sum + (IVec)_mm256_madd_epi16(_mm256_maddubs_epi16(x, w), ones);
  }
  static FT_INLINE Vec value(const Linear& args, IVec sum, int64_t m, int64_t n) {
    const IVec exact = sum - (load_raw<IVec>(args.weight->offset() + n) >> 1);  // of 128 times the weights
    return to_float(exact) * (load(args.weight->scale() + n) * row_scales<uint8_t>(args)[m]);
  }
};
static_assert(2 * FewLevels::kMore == 128, "what offset() is of");
#endif

}  // namespace

void linear_int8(const Linear& args) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (args.levels <= kFewLevels) {
    if (!args.rounded) round_rows_to_unsigned(args, FewLevels::kMore);
    return multiply_packed<FewLevels>(args);
  }
#endif
  if (!args.rounded)
    round_rows_to_levels<int16_t>(args, [](int16_t* out, IVec level) {
      constexpr int kPlace[4] = {0, 2, 1, 3};  // each pair beside what it is multiplied with
      for (int i = 0; i < kWidth; ++i) out[i / 4 * 4 + kPlace[i % 4]] = int16_t(level[i]);
    });
  multiply_packed<Int8>(args);
}

}  // namespace fused::cpu::FT_ISA
