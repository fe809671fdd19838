// y = x W^T by AVX-512's dot products of bfloat16 pairs and of four bytes: for few rows, where reading the weights is
// what takes the time. See float32.simd.cpp.

#include "parts.h"
#include "rounding.h"

namespace fused::cpu {
namespace FT_ISA {
namespace {

constexpr int kVectors = 4, kRows = 6;  // 24 sums
constexpr int64_t kTile = 1024;         // bytes: 16 columns and all of a tile's depth
// The weights this many bytes on are asked for, line after line: by itself the processor follows the four tiles that
// are read side by side less well (32,000 x 512 int8 weights from memory, 8 rows: 1.08 -> 0.68 ms).
constexpr int64_t kAhead = 32768;

struct BFloat16 {
  using Rounded = bf16;
  using Sum = __m512;
  static constexpr int kTogether = 2;
  static FT_INLINE Sum zero() { return _mm512_setzero_ps(); }
  static FT_INLINE Sum add(Sum sum, int32_t x, __m512i w) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)w);
  }
  static FT_INLINE Vec value(const Linear&, Sum sum, int64_t, int64_t) { return (Vec)sum; }
};

// Rows of x are levels + 128, unsigned as the instruction wants them; 128 * (the sum of the weights) is taken off
// again.
struct Int8 {
  using Rounded = uint8_t;
  using Sum = __m512i;
  static constexpr int kTogether = 4;
  static FT_INLINE Sum zero() { return _mm512_setzero_si512(); }
  static FT_INLINE Sum add(Sum sum, int32_t x, __m512i w) { return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(x), w); }
  static FT_INLINE Vec value(const Linear& args, Sum sum, int64_t m, int64_t n) {
    const IVec exact = (IVec)sum - load_raw<IVec>(args.weight->offset() + n);
    return to_float(exact) * (load(args.weight->scale() + n) * row_scales<uint8_t>(args)[m]);
  }
};

template <class Form, int R>
FT_INLINE void block(const Linear& args, const char* panel, int64_t m, int64_t n) {
  const int64_t depth = args.weight->depth(), steps = depth / Form::kTogether;
  const typename Form::Rounded* x = rounded_row<typename Form::Rounded>(args, m);
  typename Form::Sum sums[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[r][j] = Form::zero();
  for (int64_t tile = 0; tile < steps; tile += 16, panel += kVectors * kTile) {
    for (int64_t i = 0; i < 16; ++i) {
      __m512i w[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        w[j] = _mm512_load_si512(panel + j * kTile + i * 64);
        __builtin_prefetch(panel + kAhead + (i * kVectors + j) * 64, 0, 2);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t together;
        std::memcpy(&together, x + r * depth + (tile + i) * Form::kTogether, sizeof together);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sums[r][j] = Form::add(sums[r][j], together, w[j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      store_sum(args, m + r, n + j * kWidth, Form::value(args, sums[r][j], m + r, n + j * kWidth));
}

template <class Form, int R>
void blocks(const Linear& args, const char* panel, int64_t m, int64_t n, int rows) {
  if (rows == R) return block<Form, R>(args, panel, m, n);
  if constexpr (R > 1) blocks<Form, R - 1>(args, panel, m, n, rows);
}

template <class Form>
void multiply(const Linear& args) {
  const PackedWeight& w = *args.weight;
  for_each_panel(args, [&](int64_t panel, int64_t first, int64_t count) {
    const char* weights = static_cast<const char*>(w.data.get()) + panel * w.depth() * kPanel * w.element_bytes();
    for_equal_blocks(kRows, count,
                     [&](int64_t m, int rows) { blocks<Form, kRows>(args, weights, first + m, panel * kPanel, rows); });
  });
}

}  // namespace
}  // namespace FT_ISA

void linear_bfloat16_dots(const Linear& args) {
  FT_ISA::round_rows<bf16>(args);
  FT_ISA::multiply<FT_ISA::BFloat16>(args);
}

void linear_int8_dots(const Linear& args) {
  if (!args.rounded) FT_ISA::round_rows_to_unsigned(args);
  FT_ISA::multiply<FT_ISA::Int8>(args);
}

}  // namespace fused::cpu
