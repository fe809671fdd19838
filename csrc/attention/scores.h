#pragma once
// From raw products to masked, biased scores of one tile and one block of keys; and the dropout of its weights.
//
// Masks select, they never add: a NaN in a masked key is gone after this step. Only tiles that a mask really cuts pay
// for it: blocks masked whole are skipped before any product, blocks seen whole get no test at all.

#include "../common/philox.h"
#include "tiles.h"

namespace fused::cpu::FT_ISA {

FT_INLINE void transpose_bytes(uint64_t* w) {  // 8 x 8, one row a word
  const auto swap = [&](int step, uint64_t mask) {
    for (int i = 0; i < 8; ++i) {
      if (i & step) continue;
      const uint64_t t = ((w[i] >> (8 * step)) ^ w[i + step]) & mask;
      w[i + step] ^= t;
      w[i] ^= t << (8 * step);
    }
  };
  swap(1, 0x00ff00ff00ff00ffull);
  swap(2, 0x0000ffff0000ffffull);
  swap(4, 0x00000000ffffffffull);
}

// Loads the block's part of `keep`. Returns how many of its first `count` keys need computing: 0 if every score is
// masked, and without a last run of keys that nobody sees (the padding of a batch).
FT_INLINE int load_keep(const Attention& args, const Sequence& s, const Tile& t, int64_t j0, int count,
                        MaskTile& tile) {
  tile.has_keep = false;
  if (args.keep.data == nullptr) return count;
  const int64_t* stride = args.keep.stride;
  const uint8_t* base = static_cast<const uint8_t*>(args.keep.data) + s.b * stride[0] + s.h * stride[1] +
                        t.first * stride[2] + j0 * stride[3];
  bool any = false, all = true;
  if (stride[2] == 0) {  // one answer per key
    while (count > 0 && base[(count - 1) * stride[3]] == 0) --count;
    for (int j = 0; j < count; ++j) {
      const bool keep = base[j * stride[3]] != 0;
      any |= keep;
      all &= keep;
    }
    if (any && !all)
      for (int j = 0; j < count; ++j) std::memset(tile.keep[j], base[j * stride[3]], kMaxLanes);
  } else {
    uint64_t some = 0, every = ~uint64_t(0);
    for (int lane = 0; lane < t.rows; lane += 8) {
      for (int j = 0; j < count; j += 8) {
        uint64_t w[8];
        const int keys = int(smaller(8, count - j));
        for (int i = 0; i < 8; ++i) {
          if (lane + i >= t.rows) {
            w[i] = w[i - 1];  // lanes beyond the tile repeat its last row: they change neither any nor all
            continue;
          }
          const uint8_t* row = base + (lane + i) * stride[2] + j * stride[3];
          uint8_t bytes[8];
          if (stride[3] == 1 && keys == 8) {
            std::memcpy(bytes, row, 8);
          } else {
            for (int c = 0; c < 8; ++c) bytes[c] = row[(c < keys ? c : keys - 1) * stride[3]];
          }
          std::memcpy(&w[i], bytes, 8);
          some |= w[i];
          every &= w[i];
        }
        transpose_bytes(w);
        for (int c = 0; c < keys; ++c) std::memcpy(&tile.keep[j + c][lane], &w[c], 8);
      }
    }
    any = some != 0;
    all = every == 0x0101010101010101ull;
  }
  tile.has_keep = any && !all;
  return any ? count : 0;
}

// Adds the block's part of `bias` to the scores, [count][NV vectors]; its -inf selects, as a mask does.
template <int NV>
FT_INLINE void add_bias(const Attention& args, const Sequence& s, const Tile& t, int64_t j0, int count, float* scores) {
  constexpr int lanes = NV * kWidth;
  const int64_t* stride = args.bias.stride;
  const auto add = [&](float* score, Vec bias) {
    const Vec minus_inf = splat(-kInf);
    store(score, bias == minus_inf ? minus_inf : load(score) + bias);
  };
  with_storage(args.bias_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* base = static_cast<const T*>(args.bias.data) + s.b * stride[0] + s.h * stride[1] + t.first * stride[2] +
                    j0 * stride[3];
    if (stride[2] == 0) {
      for (int j = 0; j < count; ++j) {
        const Vec bias = splat(to_float(base[j * stride[3]]));
        for (int v = 0; v < NV; ++v) add(scores + j * lanes + v * kWidth, bias);
      }
    } else if (stride[3] == 1) {
      for (int lane = 0; lane < lanes; lane += kWidth) {
        for (int j = 0; j < count; j += kWidth) {
          const int keys = int(smaller(kWidth, count - j));
          Vec r[kWidth];
          for (int i = 0; i < kWidth; ++i)
            r[i] = lane + i < t.rows ? load(base + (lane + i) * stride[2] + j, keys) : Vec{};
          transpose(r);
          for (int c = 0; c < keys; ++c) add(scores + (j + c) * lanes + lane, r[c]);
        }
      }
    } else {
      for (int j = 0; j < count; ++j) {
        float bias[lanes];
        for (int lane = 0; lane < lanes; ++lane)
          bias[lane] = lane < t.rows ? to_float(base[lane * stride[2] + j * stride[3]]) : 0.0f;
        for (int v = 0; v < NV; ++v) add(scores + j * lanes + v * kWidth, load(bias + v * kWidth));
      }
    }
  });
}

// Adds the bias and selects -inf where masked. scores: [count][NV vectors].
template <int NV>
FT_INLINE void mask_scores(const Attention& args, const Sequence& s, const Tile& t, int64_t j0, int count,
                           const MaskTile& tile, float* scores) {
  constexpr int lanes = NV * kWidth;
  const Vec minus_inf = splat(-kInf);
  if (args.bias.data != nullptr) add_bias<NV>(args, s, t, j0, count, scores);
  if (tile.has_keep) {
    typedef uint8_t Bytes __attribute__((vector_size(FT_WIDTH)));
    for (int j = 0; j < count; ++j) {
      for (int v = 0; v < NV; ++v) {
        const IVec keep = __builtin_convertvector(load_raw<Bytes>(&tile.keep[j][v * kWidth]), IVec);
        float* score = scores + j * lanes + v * kWidth;
        store(score, keep != IVec{} ? load(score) : minus_inf);
      }
    }
  }
  if (j0 < t.full_low || j0 + count > t.full_high) {  // the edge of causal or window runs through this block
    constexpr int32_t kFar = 0x3fffffff;
    int32_t right = args.causal != Causal::none ? 0 : kFar;
    if (args.window_right >= 0 && args.window_right < right) right = int32_t(args.window_right);
    const int32_t left = args.window_left >= 0 && args.window_left < kFar ? int32_t(args.window_left) : kFar;
    for (int v = 0; v < NV; ++v) {
      // distance of key j0 from each query's own position
      const IVec distance = int32_t(j0 - t.first - s.shift) - v * kWidth - lanes_index();
      for (int j = 0; j < count; ++j) {
        float* score = scores + j * lanes + v * kWidth;
        const IVec d = distance + j;
        store(score, (d <= right) & (d >= -left) ? load(score) : minus_inf);
      }
    }
  }
}

// f(j, v, kept): for each key of the block and vector of queries, the lanes that dropout keeps (-1) or not (0).
template <int NV, class F>
FT_INLINE void for_each_dropout(const Attention& args, const Sequence& s, const Tile& t, int64_t j0, int count, F&& f) {
  const UVec outer = splat_uint(uint32_t(s.b * args.H + s.h)), threshold = splat_uint(args.dropout_threshold);
  for (int v = 0; v < NV; ++v) {
    const UVec rows = (UVec)(int32_t(t.first + v * kWidth) + lanes_index());
    for (int j = 0; j < count; j += 4) {  // j0 is a multiple of 4, so one Philox block is four keys
      const PhiloxWords words = philox(splat_uint(uint32_t(j0 + j) / 4), rows, outer, args.seed);
      for (int c = 0; c < 4 && j + c < count; ++c) f(j + c, v, (IVec)(words.word[c] >= threshold));
    }
  }
}

}  // namespace fused::cpu::FT_ISA
