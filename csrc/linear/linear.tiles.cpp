// y = x W^T by AMX: a tile of 16 rows of x times a tile of 16 columns of the weights, 32 deep in bfloat16 and 64 in
// int8, is one instruction of 16 cycles: 1024 (2048) multiply-adds a cycle.
//
// 32 rows and 32 columns at a time are four tiles of sums, and each tile that is loaded serves two products. Up to 16
// rows and 64 columns are four tiles of sums too, and the weights are read once, in the order in which they lie.
//
// 32 rows against 38 M weights in bfloat16 on one thread of a Xeon: 5 ms, of which reading alone takes 3.2 and
// multiplying 3.6; 7 ms where the panel after the one at hand is not asked for.

#include "parts.h"
#include "rounding.h"

namespace fused::cpu {
namespace FT_ISA {
namespace {

constexpr int64_t kTile = 1024;  // bytes

struct alignas(64) Palette {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 ... 3 are sums, 4 and 5 rows of x, 6 and 7 weights. `upper` rows in the first of x's tiles, `lower` in the
// second; where there is no second, all sums are of the first.
FT_INLINE void configure(int upper, int lower) {
  Palette p;
  for (int t = 0; t < 8; ++t) p.row_bytes[t] = 64, p.rows[t] = 16;
  const int of_second = lower > 0 ? lower : upper;
  p.rows[0] = p.rows[1] = p.rows[4] = uint8_t(upper);
  p.rows[2] = p.rows[3] = p.rows[5] = uint8_t(of_second);
  asm volatile("" : : "m"(p) : "memory");  // GCC's intrinsic names but the first 8 bytes as what it reads
  _tile_loadconfig(&p);
}

struct BFloat16 {
  using Rounded = bf16;
  using Sum = float;
  static FT_INLINE Vec value(const Linear&, const float* sum, int64_t, int64_t) { return load(sum); }
};

struct Int8 {
  using Rounded = uint8_t;
  using Sum = int32_t;
  static FT_INLINE Vec value(const Linear& args, const int32_t* sum, int64_t m, int64_t n) {
    const IVec exact = load_raw<IVec>(sum) - load_raw<IVec>(args.weight->offset() + n);
    return to_float(exact) * (load(args.weight->scale() + n) * row_scales<uint8_t>(args)[m]);
  }
};

// The intrinsics take the tiles' numbers as text.
#define FT_MULTIPLY(sum, x, w)                         \
  do {                                                 \
    if constexpr (sizeof(typename Form::Rounded) == 2) \
      _tile_dpbf16ps(sum, x, w);                       \
    else                                               \
      _tile_dpbusd(sum, x, w);                         \
  } while (false)

#define FT_CLEAR_SUMS() \
  do {                  \
    _tile_zero(0);      \
    _tile_zero(1);      \
    _tile_zero(2);      \
    _tile_zero(3);      \
  } while (false)
#define FT_STORE_SUMS(sums)         \
  do {                              \
    _tile_stored(0, (sums)[0], 64); \
    _tile_stored(1, (sums)[1], 64); \
    _tile_stored(2, (sums)[2], 64); \
    _tile_stored(3, (sums)[3], 64); \
  } while (false)

template <class Form>
FT_INLINE void store_tile(const Linear& args, const typename Form::Sum* sums, int rows, int64_t m, int64_t n) {
  for (int r = 0; r < rows; ++r) store_sum(args, m + r, n, Form::value(args, sums + r * 16, m + r, n));
}

// The panel after this one, asked for a step of K at a time while this one is multiplied. Where a panel is passed once,
// reading is all that takes time, and the processor's own prefetching is quicker.
struct Ahead {
  const char* next;
  int lines;  // of 64 bytes, a step

  Ahead(const char* from, int64_t passes) : next(from), lines(passes > 1 ? int(4 * kTile / 64 / passes) : 0) {}
  FT_INLINE void ask() {
    for (int i = 0; i < lines; ++i) __builtin_prefetch(next + i * 64, 0, 2);
    next += lines * 64;
  }
};

// Up to 16 rows beside a whole panel.
template <class Form>
FT_INLINE void narrow(const Linear& args, const char* panel, int64_t m, int rows, int64_t n, Ahead& ahead) {
  const int64_t stride = args.weight->depth() * int64_t(sizeof(typename Form::Rounded)), steps = stride / 64;
  const char* x = reinterpret_cast<const char*>(rounded_row<typename Form::Rounded>(args, m));
  FT_CLEAR_SUMS();
  for (int64_t k = 0; k < steps; ++k, panel += 4 * kTile) {
    ahead.ask();
    _tile_loadd(4, x + k * 64, stride);
    _tile_loadd(6, panel, 64);
    FT_MULTIPLY(0, 4, 6);
    _tile_loadd(7, panel + kTile, 64);
    FT_MULTIPLY(1, 4, 7);
    _tile_loadd(6, panel + 2 * kTile, 64);
    FT_MULTIPLY(2, 4, 6);
    _tile_loadd(7, panel + 3 * kTile, 64);
    FT_MULTIPLY(3, 4, 7);
  }
  alignas(64) typename Form::Sum sums[4][256];
  FT_STORE_SUMS(sums);
  for (int j = 0; j < 4; ++j) store_tile<Form>(args, sums[j], rows, m, n + j * 16);
}

// 17 ... 32 rows beside half a panel.
template <class Form>
FT_INLINE void square(const Linear& args, const char* panel, int64_t m, int rows, int64_t n, Ahead& ahead) {
  const int64_t stride = args.weight->depth() * int64_t(sizeof(typename Form::Rounded)), steps = stride / 64;
  const char* x = reinterpret_cast<const char*>(rounded_row<typename Form::Rounded>(args, m));
  FT_CLEAR_SUMS();
  for (int64_t k = 0; k < steps; ++k, panel += 4 * kTile) {
    ahead.ask();
    _tile_loadd(4, x + k * 64, stride);
    _tile_loadd(6, panel, 64);
    FT_MULTIPLY(0, 4, 6);
    _tile_loadd(7, panel + kTile, 64);
    FT_MULTIPLY(1, 4, 7);
    _tile_loadd(5, x + 16 * stride + k * 64, stride);
    FT_MULTIPLY(2, 5, 6);
    FT_MULTIPLY(3, 5, 7);
  }
  alignas(64) typename Form::Sum sums[4][256];
  FT_STORE_SUMS(sums);
  for (int j = 0; j < 4; ++j) store_tile<Form>(args, sums[j], j < 2 ? 16 : rows - 16, m + j / 2 * 16, n + j % 2 * 16);
}

template <class Form>
void multiply(const Linear& args) {
  const PackedWeight& w = *args.weight;
  for_each_panel(args, [&](int64_t panel, int64_t first, int64_t count) {
    const int64_t bytes = w.depth() * kPanel * w.element_bytes(), n = panel * kPanel;
    const char* weights = static_cast<const char*>(w.data.get()) + panel * bytes;
    Ahead ahead(weights + bytes, count / 32 * 2 + (count % 32 > 16 ? 2 : count % 32 > 0));
    int64_t m = 0;
    if (count > 16) configure(16, 16);
    for (; count - m >= 32; m += 32)
      for (int half = 0; half < 2; ++half)
        square<Form>(args, weights + half * 2 * kTile, first + m, 32, n + half * 32, ahead);
    const int rest = int(count - m);
    if (rest > 16) {
      configure(16, rest - 16);
      for (int half = 0; half < 2; ++half)
        square<Form>(args, weights + half * 2 * kTile, first + m, rest, n + half * 32, ahead);
    } else if (rest > 0) {
      configure(rest, 0);
      narrow<Form>(args, weights, first + m, rest, n, ahead);
    }
    _tile_release();
  });
}

}  // namespace
}  // namespace FT_ISA

void linear_bfloat16_tiles(const Linear& args) {
  FT_ISA::round_rows<bf16>(args);
  FT_ISA::multiply<FT_ISA::BFloat16>(args);
}

void linear_int8_tiles(const Linear& args) {
  if (!args.rounded) FT_ISA::round_rows_to_unsigned(args);
  FT_ISA::multiply<FT_ISA::Int8>(args);
}

}  // namespace fused::cpu
