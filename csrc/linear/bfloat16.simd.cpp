// y = x W^T with bfloat16 weights and float32 arithmetic, for processors that do not multiply bfloat16: a bfloat16 is
// the upper half of a float32, so two weights come out of 32 bits by a shift and a mask.

#include "chunks.h"

namespace fused::cpu::FT_ISA {
namespace {

struct BFloat16 {
  using Rounded = float;
  using Sum = Vec;
  static constexpr int kTogether = 2;
  struct Weights {
    Vec even, odd;
  };
  using Factors = Weights;
  static FT_INLINE Weights unpack(const char* p) {
    const auto pair = load_raw<UVec>(p);
    return {(Vec)(pair << 16), (Vec)(pair & 0xffff0000u)};
  }
  static FT_INLINE Factors factors(const float* x) { return {splat(x[0]), splat(x[1])}; }
  static FT_INLINE Vec add(Vec sum, const Factors& x, const Weights& w) {
    return sum + x.even * w.even + x.odd * w.odd;
  }
  static FT_INLINE Vec value(const Linear&, Vec sum, int64_t, int64_t) { return sum; }
};

}  // namespace

void linear_bfloat16(const Linear& args) {
  round_rows<float>(args);
  multiply_packed<BFloat16>(args);
}

}  // namespace fused::cpu::FT_ISA
