#pragma once
// Which elements of a tile of scores are seen, their bias, and which of their weights dropout keeps.
//
// A warp holds a tile of scores either way round: queries as rows (forward, dq) or keys as rows (dk and dv). What may
// be seen is a 64-bit word for each query, a bit for each key of an aligned group of 64: the query's interval and the
// bits of `keep`, packed beforehand. Masks select, they never add: a NaN in a masked key is gone after this step. Tiles
// whose words are all ones are not tested, and those whose words are all zeros are not computed.

#include "../common/philox.cuh"
#include "device_product.cuh"
#include "device_sequence.cuh"

namespace fused::cuda {

constexpr int kWordKeys = 64;
constexpr uint64_t kWholeWord = ~uint64_t(0);

// Bits 0 ... n - 1.
FT_DEVICE uint64_t bits_below(int n) { return n <= 0 ? 0 : (n >= kWordKeys ? kWholeWord : (uint64_t(1) << n) - 1); }

// The word of query `row` for keys first ... first + 63, `first` a multiple of 64. cut: whether the query's interval
// may end in there.
FT_DEVICE uint64_t seen_keys(const Attention& args, const Sequence& s, int head, int row, int first, bool cut) {
  if (row >= s.L) return 0;
  uint64_t word = kWholeWord;
  if (cut) {
    const int position = row + s.shift;
    word = bits_below(min(s.S, position + s.right + 1) - first) & ~bits_below(position - s.left - first);
  }
  if (args.keep_bits != nullptr)
    word &= args.keep_bits[s.b * args.keep_bits_stride[0] + head * args.keep_bits_stride[1] +
                           row * args.keep_bits_stride[2] + first / kWordKeys * args.keep_bits_stride[3]];
  return word;
}

// What a warp may see of a tile. The words are in shared memory, to be read by the lanes that hold a query's scores.
struct Seen {
  const uint64_t* words = nullptr;  // nullptr: all of it, untested
  bool any = true, all = true;      // whether the warp has an element that is seen, and whether every element is

  // Bit i: whether query `index` of the warp sees key i of the tile.
  FT_DEVICE uint64_t of(int index) const { return words == nullptr ? kWholeWord : words[index]; }
};

// For queries row ... row + kQueries - 1 and keys first ... first + kKeys - 1, which lie in one aligned group of 64.
// Holds until the warp's next call.
template <int kQueries, int kKeys, int kThreads>
FT_DEVICE Seen what_is_seen(const Attention& args, const Sequence& s, int head, int row, int first, bool cut) {
  static_assert(kQueries <= kWarp && kKeys <= kWordKeys, "a lane for each query, a bit for each key");
  constexpr uint64_t kTile = kWholeWord >> (kWordKeys - kKeys);
  FT_SHARED(uint64_t, words, [kThreads]);
  const int query = row + lane_id() % kQueries;
  const uint64_t word =
      seen_keys(args, s, head, query, first / kWordKeys * kWordKeys, cut) >> first % kWordKeys & kTile;
  Seen seen;
  seen.any = __any_sync(kWholeWarp, word != 0);
  // what queries beyond the end would see never matters
  seen.all = __all_sync(kWholeWarp, word == kTile || query >= s.L);
  __syncwarp();  // the last words have been read
  words[threadIdx.x] = word;
  __syncwarp();
  seen.words = words + (threadIdx.x - lane_id());
  return seen;
}

// ---------------------------------------------------------------- queries as rows

template <int R, int N>
FT_DEVICE void scale_scores(float scale, float (&scores)[R][N][4]) {
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[r][n][i] *= scale;
}

// Scores of elements that are not seen become -inf.
template <int R, int N>
FT_DEVICE void mask_scores(const Seen& seen, float (&scores)[R][N][4]) {
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint64_t word = seen.of(r * 16 + half * 8 + group()) >> pair();
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (!(word >> (8 * n + e) & 1)) scores[r][n][half * 2 + e] = -INFINITY;
    }
}

// Keys as rows, 32 queries: the same. The tile that `seen` is about begins at the warp's first key.
template <int R>
FT_DEVICE void mask_columns(const Seen& seen, float (&scores)[R][4][4]) {
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint64_t word = seen.of(n * 8 + pair() + e) >> group();
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (!(word >> (r * 16 + half * 8) & 1)) scores[r][n][half * 2 + e] = -INFINITY;
    }
}

// ---------------------------------------------------------------- dropout

struct Dropout {
  uint64_t seed;
  uint32_t threshold, outer;

  FT_DEVICE Dropout(const Attention& args, const Sequence& s, int head)
      : seed(args.seed_data == nullptr ? 0 : *args.seed_data),
        threshold(args.dropout_threshold),
        outer(uint32_t(s.b * args.H + head)) {}

  // Bits 0 ... 3: whether weights (row, 4 block ... 4 block + 3) are kept.
  FT_DEVICE uint32_t kept(int row, int block) const {
    const uint4 words = philox(uint32_t(block), uint32_t(row), outer, seed);
    return uint32_t(words.x >= threshold) | uint32_t(words.y >= threshold) << 1 | uint32_t(words.z >= threshold) << 2 |
           uint32_t(words.w >= threshold) << 3;
  }
};

// Queries as rows: bit 4 n + i of kept[r] is element i of tile n. One Philox block serves four neighbouring keys, which
// two lanes hold: the even one draws for its first row, the odd one for its second, and they exchange what they drew.
template <int R, int N>
FT_DEVICE void kept_rows(const Dropout& dropout, int row, int first, uint32_t (&kept)[R]) {
  const bool odd = lane_id() & 1;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    uint32_t mine = 0;
    const int query = row + r * 16 + (odd ? 8 : 0) + group();
#pragma unroll 1
    for (int n = 0; n < N; ++n) mine |= dropout.kept(query, (first + n * 8 + pair()) / 4) << (4 * n);
    const uint32_t other = __shfl_xor_sync(kWholeWarp, mine, 1);
    const uint32_t low = (odd ? other : mine) >> (odd ? 2 : 0), high = (odd ? mine : other) >> (odd ? 2 : 0);
    kept[r] = (low & 0x33333333u) | (high & 0x33333333u) << 2;
  }
}

// Keys as rows, 32 queries: the same bits. Four lanes, group() = 4 x ... 4 x + 3, hold the four keys of a Philox block;
// each draws for two of their eight queries.
template <int R>
FT_DEVICE void kept_columns(const Dropout& dropout, int key, int first, uint32_t (&kept)[R]) {
  const int which = group() % 4;
  uint32_t mine = 0;
#pragma unroll 1
  for (int e = 0; e < 2; ++e)
#pragma unroll 1
    for (int rows = 0; rows < 2 * R; ++rows)
      mine |= dropout.kept(first + which * 8 + pair() + e, (key + rows * 8 + group()) / 4) << (4 * (e * 2 * R + rows));
#pragma unroll
  for (int r = 0; r < R; ++r) kept[r] = 0;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const uint32_t drawn = __shfl_sync(kWholeWarp, mine, lane_id() / 16 * 16 + n * 4 + lane_id() % 4) >> which;
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) kept[r] |= (drawn >> (4 * (i % 2 * 2 * R + r * 2 + i / 2)) & 1) << (4 * n + i);
  }
}

// Zeros the weights that are not kept.
template <int R, int N>
FT_DEVICE void drop(const uint32_t (&kept)[R], float (&weights)[R][N][4]) {
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (!(kept[r] >> (4 * n + i) & 1)) weights[r][n][i] = 0.0f;
}

}  // namespace fused::cuda
