#pragma once
// One block of keys and values beside a few query rows: scores, softmax, weighted sum.
//
// A lane is an element of a head: keys and values are read as they lie, whole vectors at a time, and each is loaded
// once for up to kGroup query rows. (`attention` has queries as lanes, which a single query would leave idle.) Sums
// over keys run in the order of the keys, each row's own in the same order whatever rows stand beside it.

#include "../common/simd.h"
#include "decode_attention.h"

namespace fused::cpu::FT_ISA::decode {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

constexpr int kRows = 16;                         // query rows of a task
constexpr int kBlock = 64;                        // keys of a block: its values stay in the first cache, D = 64 ... 128
constexpr int kGroup = kRegisters == 32 ? 4 : 2;  // query rows in registers
constexpr int kKeysAtOnce = 4;                    // keys in registers: kGroup * 4 sums run side by side
constexpr int kLd = kMaxHeadWidth;                // floats between rows of queries and sums

FT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The sums of kWidth vectors: lane i of the result is the sum of the lanes of v[i]. Each step adds the halves of
// vectors kHalf apart and packs the two results into one.
template <int kHalf>
FT_INLINE Vec sum_lanes(Vec* v) {
  if constexpr (kHalf == 0) {
    return v[0];
  } else {
    IVec low{}, high{};
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      low[i] = (i & kHalf) ? kWidth + i - kHalf : i;
      high[i] = (i & kHalf) ? kWidth + i : i + kHalf;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) v[i] = shuffle(v[i], v[i + kHalf], low) + shuffle(v[i], v[i + kHalf], high);
    return sum_lanes<kHalf / 2>(v);
  }
}

// Where the keys and values of a block lie: a key, its value, the next key.
template <class T>
struct Block {
  const T* rows[2 * kBlock];
  int count;

  FT_INLINE const T* key(int j) const { return rows[2 * j]; }
  FT_INLINE const T* value(int j) const { return rows[2 * j + 1]; }
};

// Asks for the rows of the block that comes next while one is computed: a cache's rows are scattered, and the
// hardware's own prefetcher begins anew at each. The rows come in the order of the memory (a value behind its key) and
// evenly over all that is computed of a block: all keys first and then all values, or all of them beside its first
// query rows, left memory idle in between. 256 caches of 17 keys, 8 heads of 64 float32, out of memory on one thread of
// a Zen 3: 25 ms for six layers that way, 16 this way, and 14 for reading alone; with 4 queries to each of 32 keys
// 13, 6.8 and 5.5. In another hour memory read 12 GB/s on one thread, and the first took 18 where reading alone takes
// 8; 64 caches took 4.2 to 5.6, and a plain sum over the same rows 2.3 to 2.6. Without asking it takes 1.2 to 1.7 times
// as long, asking for the second-level cache alone 1.0 to 1.3, with 8 keys and 8 vectors of values at once 1.0 to 1.35.
template <class T>
class Ahead {
 public:
  // next: nullptr where nothing comes. groups: how many groups of query rows the block is computed beside.
  FT_INLINE Ahead(const Block<T>* next, int groups, int D)
      : next_(next), rows_(next == nullptr ? 0 : 2 * next->count), every_(groups), wait_(groups), D_(D) {}

  // Called for each key of a group, and once more with its value if all rows of the group see it.
  FT_INLINE void ask() {
    if (--wait_ > 0) return;
    wait_ = every_;
    if (row_ < rows_) fetch();
  }
  FT_INLINE void ask_for_the_rest() {  // where the next block has more keys, or not all of this one's are seen
    while (row_ < rows_) fetch();
  }

 private:
  FT_INLINE void fetch() {
    const T* const row = next_->rows[row_++];
    for (int d = 0; d < D_; d += int(64 / sizeof(T))) __builtin_prefetch(row + d);
  }

  const Block<T>* const next_;
  const int rows_, every_;
  int wait_, row_ = 0;
  const int D_;
};

// scores[m][j] = q[m] . keys[j] for MR rows; beyond the last key, up to a whole vector, any finite number or NaN.
template <int MR, class T>
FT_INLINE void score(const float* q, const Block<T>& block, Ahead<T>& ahead, int D, float* scores) {
  const int whole = D / kWidth * kWidth, rest = D - whole;
  for (int j0 = 0; j0 < block.count; j0 += kWidth) {
    Vec sums[MR][kWidth];
    for (int j = 0; j < kWidth; j += kKeysAtOnce) {
      const T* keys[kKeysAtOnce];
      Vec c[MR][kKeysAtOnce];
#pragma GCC unroll 4
      for (int x = 0; x < kKeysAtOnce; ++x) {
        const int index = j0 + j + x;
        keys[x] = block.key(int(smaller(index, block.count - 1)));
        if (index < block.count) ahead.ask();
#pragma GCC unroll 4
        for (int m = 0; m < MR; ++m) c[m][x] = Vec{};
      }
      if (j0 + j < block.count) {
        for (int d = 0; d < whole; d += kWidth) {
#pragma GCC unroll 4
          for (int x = 0; x < kKeysAtOnce; ++x) {
            const Vec key = load(keys[x] + d);
#pragma GCC unroll 4
            for (int m = 0; m < MR; ++m) c[m][x] += key * load(q + m * kLd + d);
          }
        }
        if (rest > 0) {
#pragma GCC unroll 4
          for (int x = 0; x < kKeysAtOnce; ++x) {
            const Vec key = load(keys[x] + whole, rest);
#pragma GCC unroll 4
            for (int m = 0; m < MR; ++m) c[m][x] += key * load(q + m * kLd + whole);
          }
        }
      }
#pragma GCC unroll 4
      for (int x = 0; x < kKeysAtOnce; ++x)
#pragma GCC unroll 4
        for (int m = 0; m < MR; ++m) sums[m][j + x] = c[m][x];
    }
    for (int m = 0; m < MR; ++m) store(scores + m * kBlock + j0, sum_lanes<kWidth / 2>(sums[m]));
  }
}

// The softmax of one row, carried over blocks. Returns what its sums so far are to be multiplied by.
struct Softmax {
  float maximum = -kInf, sum = 0.0f;

  // scores[0 ... count) become weights, relative to the maximum so far.
  FT_INLINE float fold(float* scores, int count) {
    if (count == 0) return 1.0f;
    const int vectors = (count + kWidth - 1) / kWidth;
    float* last = scores + (vectors - 1) * kWidth;
    store(last, lanes_index() < splat_int(count - (vectors - 1) * kWidth) ? load(last) : splat(-kInf));
    Vec top = splat(maximum);
    for (int v = 0; v < vectors; ++v) top = vmax(load(scores + v * kWidth), top);
    const float before = maximum;
    maximum = largest_lane(top);
    // While all scores are -inf: shift by 0, so that exp gives 0 and not NaN.
    const Vec shift = splat(maximum == -kInf ? 0.0f : maximum);
    Vec total{};
    for (int v = 0; v < vectors; ++v) {
      const Vec weight = exp_shifted(load(scores + v * kWidth) - shift);
      store(scores + v * kWidth, weight);
      total += weight;
    }
    const float decay = exp_shifted(splat(before) - shift)[0];
    sum = sum * decay + reduce_sum(total);
    return decay;
  }
};

// sums[m] = sums[m] * decay[m] + weights[m][0 ... counts[m]) values, for NV vectors at column d of MR rows. Each row
// takes its own number of keys: a value that it does not see is not multiplied by 0 either, which would keep a NaN.
// `ahead`: nullptr where it isn't asked.
template <int MR, int NV, bool kPart, class T>
FT_INLINE void weigh(const float* weights, const int* counts, const float* decay, const Block<T>& block,
                     Ahead<T>* ahead, int D, int d, float* sums) {
  const int part = D - d;
  const auto load_value = [&](int j, int n) {
    if constexpr (kPart) return load(block.value(j) + d, part);
    return load(block.value(j) + d + n * kWidth);
  };
  int common = counts[0];
  Vec c[MR][NV];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
    common = int(smaller(common, counts[m]));
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) c[m][n] = Vec{};
  }
  for (int j = 0; j < common; ++j) {
    if (ahead != nullptr) ahead->ask();
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      const Vec value = load_value(j, n);
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) c[m][n] += splat(weights[m * kBlock + j]) * value;
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
    for (int j = common; j < counts[m]; ++j)
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) c[m][n] += splat(weights[m * kBlock + j]) * load_value(j, n);
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      float* to = sums + m * kLd + d + n * kWidth;
      store(to, load(to) * splat(decay[m]) + c[m][n]);
    }
  }
}

// Folds a block into the sums of MR rows. counts[m]: how many of the block's keys row m sees.
template <int MR, class T>
FT_INLINE void fold_rows(const float* q, const Block<T>& block, Ahead<T>& ahead, const int* counts, int D,
                         Softmax* softmax, float* sums) {
  constexpr int NV = 4;
  float scores[MR * kBlock], decay[MR];
  score<MR>(q, block, ahead, D, scores);
  for (int m = 0; m < MR; ++m) decay[m] = softmax[m].fold(scores + m * kBlock, counts[m]);
  const auto asked = [&](int d) { return d == 0 ? &ahead : nullptr; };
  int d = 0;
  for (; d + NV * kWidth <= D; d += NV * kWidth)
    weigh<MR, NV, false>(scores, counts, decay, block, asked(d), D, d, sums);
  for (; d + kWidth <= D; d += kWidth) weigh<MR, 1, false>(scores, counts, decay, block, asked(d), D, d, sums);
  if (d < D) weigh<MR, 1, true>(scores, counts, decay, block, asked(d), D, d, sums);
}

// The same for as many rows as fit in registers, of `rows` that are left; returns how many it took.
template <class T>
FT_INLINE int fold_group(int rows, const float* q, const Block<T>& block, Ahead<T>& ahead, const int* counts, int D,
                         Softmax* softmax, float* sums) {
  if constexpr (kGroup >= 4) {
    if (rows >= 4) {
      fold_rows<4>(q, block, ahead, counts, D, softmax, sums);
      return 4;
    }
  }
  if (rows >= 2) {
    fold_rows<2>(q, block, ahead, counts, D, softmax, sums);
    return 2;
  }
  fold_rows<1>(q, block, ahead, counts, D, softmax, sums);
  return 1;
}

}  // namespace fused::cpu::FT_ISA::decode
