#pragma once
// How attention's CPU kernels cut the work, and the moves between memory and tiles.
//
// A lane of a vector is a query: a tile is up to 3 vectors of queries (48 with AVX-512) beside a block of 64 keys, and
// its scores are stored key by key. So the softmax runs down the keys with plain vertical instructions, keys and
// values are broadcast one element at a time from where they lie, and nothing is padded in D or S. A chunk is up to 192
// queries of one head that share each block of keys while it is in the caches: reading and converting a block took as
// long as two tiles' softmax (with 96 queries 15 % of the time at 512 keys on a Zen 3; less where it isn't copied).

#include "../common/simd.h"
#include "../common/transpose.h"
#include "attention.h"
#include "scratch.h"

namespace fused::cpu::FT_ISA {

constexpr int kLanes = kMaxVecs * kWidth;  // queries of a whole tile
constexpr int kTiles = kQueries / kLanes;  // of a chunk
static_assert(kLanes <= kMaxLanes && kQueries % kLanes == 0, "scratch.h has the memory");

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// One sequence of the batch under one query head.
struct Sequence {
  int64_t b, h, hk;
  int64_t L, S;    // its queries and its keys, after k_lengths
  int64_t shift;   // query i stands at key position i + shift
  int64_t q0, k0;  // first token, for packed batches
};

FT_INLINE Sequence sequence(const Attention& args, int64_t b, int64_t h) {
  Sequence s{b, h, h / (args.H / args.Hk), args.L, args.S, 0, 0, 0};
  if (args.q_offsets != nullptr) {
    s.q0 = args.q_offsets[b];
    s.L = args.q_offsets[b + 1] - s.q0;
    s.k0 = args.k_offsets[b];
    s.S = args.k_offsets[b + 1] - s.k0;
  }
  if (args.k_lengths != nullptr) s.S = smaller(s.S, args.k_lengths[b]);
  if (args.causal == Causal::bottom_right) s.shift = s.S - s.L;
  return s;
}

template <class T>
FT_INLINE T* row_of(const Attention& args, const Rows& x, const Sequence& s, int64_t head, int64_t token0,
                    int64_t row) {
  const int64_t batch = args.q_offsets == nullptr ? s.b * x.batch : token0 * x.row;
  return static_cast<T*>(x.data) + batch + head * x.head + row * x.row;
}

// Queries first ... first + rows of a sequence, in `vecs` vectors; and which keys they can see at all.
struct Tile {
  int64_t first;
  int rows, vecs;
  int64_t low, high;            // keys outside [low, high) are seen by none of them
  int64_t full_low, full_high;  // keys inside are seen by all of them, as far as causal and window go
};

// Tiles begin at multiples of kMaxVecs vectors whatever L is: sums over queries, tile by tile, have the same bits in a
// padded batch and in a packed one.
struct Tiling {
  int64_t vectors, tiles;
  explicit Tiling(int64_t L) : vectors((L + kWidth - 1) / kWidth), tiles((vectors + kMaxVecs - 1) / kMaxVecs) {}
  int64_t first_vector(int64_t tile) const { return smaller(tile * kMaxVecs, vectors); }
};

FT_INLINE Tile make_tile(const Attention& args, const Sequence& s, const Tiling& tiling, int64_t index) {
  Tile t;
  t.first = tiling.first_vector(index) * kWidth;
  const int64_t stop = smaller(tiling.first_vector(index + 1) * kWidth, s.L);
  t.rows = int(stop - t.first);
  t.vecs = int((t.rows + kWidth - 1) / kWidth);
  const int64_t first = t.first + s.shift, last = stop - 1 + s.shift;
  t.low = t.full_low = 0;
  t.high = t.full_high = s.S;
  const auto limit_right = [&](int64_t reach) {
    t.high = smaller(t.high, last + reach + 1);
    t.full_high = smaller(t.full_high, first + reach + 1);
  };
  if (args.causal != Causal::none) limit_right(0);
  if (args.window_right >= 0) limit_right(args.window_right);
  if (args.window_left >= 0) {
    t.low = larger(0, first - args.window_left);
    t.full_low = larger(0, last - args.window_left);
  }
  return t;
}

// ---------------------------------------------------------------- transposition

// rows [vecs * kWidth][ld] -> panel [columns][lanes]; columns up to the next vector are read, and must exist.
FT_INLINE void rows_to_panel(const float* rows, int64_t ld, int columns, int vecs, float* panel, int64_t lanes) {
  for (int v = 0; v < vecs; ++v) {
    for (int c = 0; c < columns; c += kWidth) {
      Vec r[kWidth];
      for (int i = 0; i < kWidth; ++i) r[i] = load(rows + (v * kWidth + i) * ld + c);
      transpose(r);
      const int count = int(smaller(kWidth, columns - c));
      for (int i = 0; i < count; ++i) store(panel + (c + i) * lanes + v * kWidth, r[i]);
    }
  }
}

// `rows` rows of D elements -> `factor` times them as panel [D][vecs * kWidth], zero beyond the last row.
template <class T>
FT_INLINE void scaled_rows_to_panel(const T* in, int64_t stride, int rows, int D, float factor, int vecs,
                                    float* panel) {
  const int lanes = vecs * kWidth;
  const Vec f = splat(factor);
  for (int v = 0; v < vecs; ++v, in += kWidth * stride, panel += kWidth) {
    const int there = rows - v * kWidth;
    for (int c = 0; c < D; c += kWidth) {
      const int count = int(smaller(kWidth, D - c));
      Vec r[kWidth];
      if (there >= kWidth && count == kWidth)
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) r[i] = load(in + i * stride + c) * f;
      else
        for (int i = 0; i < kWidth; ++i) r[i] = i < there ? load(in + i * stride + c, count) * f : Vec{};
      transpose(r);
      if (count == kWidth)
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) store(panel + (c + i) * lanes, r[i]);
      else
        for (int i = 0; i < count; ++i) store(panel + (c + i) * lanes, r[i]);
    }
  }
}

// panel [columns][lanes] -> the first `rows` rows of memory, row stride ld
template <class T>
FT_INLINE void panel_to_rows(const float* panel, int64_t lanes, int columns, int rows, T* out, int64_t ld) {
  for (int v = 0; v * kWidth < rows; ++v) {
    const int valid = int(smaller(kWidth, rows - v * kWidth));
    for (int c = 0; c < columns; c += kWidth) {
      const int count = int(smaller(kWidth, columns - c));
      Vec r[kWidth];
      for (int i = 0; i < kWidth; ++i) r[i] = i < count ? load(panel + (c + i) * lanes + v * kWidth) : Vec{};
      transpose(r);
      for (int i = 0; i < valid; ++i) store(out + (v * kWidth + i) * ld + c, r[i], count);
    }
  }
}

// ---------------------------------------------------------------- memory to float32 tiles

// `rows` rows of D elements -> [rows][ld] floats, zero beyond D (ld is a whole number of vectors): times `factor`, or,
// where `finite` is asked for, as they are, and *finite is whether all of them are finite. Meanwhile asks for the same
// number of rows at `next`, which are read next: the hardware's own prefetcher stops at every page, and a page is only
// 16 rows. Four vectors stand side by side, since what is not finite is found by a chain of additions.
template <class T>
FT_INLINE void load_rows(const T* in, int64_t stride, int64_t rows, int D, float factor, bool* finite, float* out,
                         int64_t ld, const T* next, int64_t next_stride) {
  constexpr int kTogether = 4, kStep = kTogether * kWidth;
  Vec nonfinite[kTogether]{};
  const Vec f = splat(factor);
  const auto put = [&](float* to, Vec x, Vec& odd) {
    if (finite != nullptr)
      odd += x * Vec{};  // 0 for every finite number, NaN for NaN and infinities
    else
      x *= f;
    store(to, x);
  };
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = in + r * stride;
    float* to = out + r * ld;
    int d = 0;
    for (; d + kStep <= D; d += kStep) {
      for (int line = 0; line < kStep; line += int(64 / sizeof(T)))
        __builtin_prefetch(next + r * next_stride + d + line);
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) put(to + d + i * kWidth, load(row + d + i * kWidth), nonfinite[i]);
    }
    if (d < D) __builtin_prefetch(next + r * next_stride + d);
    for (; d < ld; d += kWidth)
      put(to + d, d + kWidth <= D ? load(row + d) : d < D ? load(row + d, D - d) : Vec{}, nonfinite[0]);
  }
  if (finite != nullptr) *finite = reduce_sum((nonfinite[0] + nonfinite[1]) + (nonfinite[2] + nonfinite[3])) == 0.0f;
}
template <class T>
FT_INLINE void load_rows(const T* in, int64_t stride, int64_t rows, int D, float factor, float* out, int64_t ld) {
  load_rows(in, stride, rows, D, factor, nullptr, out, ld, in, stride);
}

// Whether all of `count` floats are finite; meanwhile asks for as many at `next`. As load_rows does, without a copy.
FT_INLINE bool all_finite(const float* in, int64_t count, const float* next) {
  constexpr int kTogether = 4, kStep = kTogether * kWidth;
  Vec nonfinite[kTogether]{};
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    for (int line = 0; line < kStep; line += 16) __builtin_prefetch(next + i + line);
#pragma GCC unroll 4
    for (int n = 0; n < kTogether; ++n) nonfinite[n] += load(in + i + n * kWidth) * Vec{};
  }
  for (; i < count; i += kWidth) nonfinite[0] += load(in + i) * Vec{};
  return reduce_sum((nonfinite[0] + nonfinite[1]) + (nonfinite[2] + nonfinite[3])) == 0.0f;
}

// Keys j0 ... j0 + count of one sequence, as float32 rows of `ld`.
struct KeyBlock {
  int64_t j0;
  int count;
  int64_t ld;
  float *k_rows, *v_rows;  // memory for them; of what lies in such rows already there is no copy
  const float *k, *v;
  // What a weight of 0 may multiply: NaN and Inf replaced by 0. The same memory as k and v if those are finite.
  const float *k_safe, *v_safe;
};

// The block with its memory laid out from `scratch`, block_floats(D) of it, and what that leaves for the finite copies.
FT_INLINE KeyBlock make_block(float* scratch, int64_t D, float*& spare_k, float*& spare_v) {
  const int64_t ld = row_floats(D), size = kKeys * ld;
  spare_k = scratch + 2 * size, spare_v = scratch + 3 * size;
  return {0, 0, ld, scratch, scratch + size, nullptr, nullptr, nullptr, nullptr};
}

FT_INLINE void copy_finite(const float* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const Vec x = load(in + i);
    store(out + i, x * Vec{} == Vec{} ? x : Vec{});
  }
}

// `more`: whether the block after this one will be read too.
FT_INLINE void load_block(const Attention& args, const Sequence& s, int64_t j0, int count, bool more, float* spare_k,
                          float* spare_v, bool wants_v, KeyBlock& block) {
  block.j0 = j0;
  block.count = count;
  const int D = int(args.D);
  with_storage(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* k = row_of<T>(args, args.k, s, s.hk, s.k0, j0);
    const T* v = row_of<T>(args, args.v, s, s.hk, s.k0, j0);
    const auto rows_of = [&](const T* in, int64_t stride, float* copy, const T* next, int64_t next_stride, float* spare,
                             const float*& rows, const float*& safe) {
      bool finite = true;
      rows = copy;
      if constexpr (sizeof(T) == sizeof(float)) {
        if (stride == block.ld && D == block.ld) rows = in, finite = all_finite(in, count * block.ld, next);
      }
      if (rows == copy) load_rows(in, stride, count, D, 1.0f, &finite, copy, block.ld, next, next_stride);
      safe = finite ? rows : spare;
      if (!finite) copy_finite(rows, count * block.ld, spare);
    };
    rows_of(k, args.k.row, block.k_rows, wants_v ? v : k, args.v.row, spare_k, block.k, block.k_safe);
    if (wants_v)
      rows_of(v, args.v.row, block.v_rows, more ? k + kKeys * args.k.row : k, args.k.row, spare_v, block.v,
              block.v_safe);
  });
}

template <int N>
struct Int {
  static constexpr int value = N;
};

// Calls f(Int<NV>{}) with the tile's number of vectors as a constant.
template <class F>
FT_INLINE void with_vecs(int vecs, F&& f) {
  if (vecs == 3) return f(Int<3>{});
  if (vecs == 2) return f(Int<2>{});
  return f(Int<1>{});
}

}  // namespace fused::cpu::FT_ISA
