#pragma once
// A product of few rows, many of whose factors are 0, as ReLU leaves them: half with random weights, nine of ten in a
// trained model. Such a product is bound by reading the weights, and where all rows have a 0 in a place, the weights
// that it would be multiplied by are not read. Sums are the same: a finite weight times 0 adds nothing (but may turn
// -0, which a product too small for float32 leaves, into 0).
//
// 2048 x 512 weights from memory on one thread of an AMD EPYC: 108 us; of which half are needed, 83; a quarter, 39; a
// tenth, 15. (With a column's weights side by side over all panels, 8 KiB at a time, half are read in 67 us; that would
// take a second copy of them.)

#include "block.h"

namespace fused::cpu::FT_ISA {

constexpr int64_t kMostPlaces = 8192;  // of K: their list is on the stack
constexpr int64_t kPlacesAhead = 32;   // whose weights are asked for
constexpr int64_t kTelling = 128;      // places that tell whether it is worth it: most products have no 0 at all
// Above so many of the places seen it isn't. A block of narrow vectors reads one line in each place, and lines here
// and there come slower than all of them: half of 2048 x 512 weights in 0.45 ms on a Zen 3, all of them in 0.38, a
// quarter in 0.26.
FT_INLINE int64_t most_places(int64_t seen) { return kWide ? seen - seen / 4 : seen * 3 / 8; }

// The places of K in which some row is not 0.
struct Places {
  int64_t count = 0;
  uint16_t list[kMostPlaces];

  // Whether few enough are left; only then are they in the list.
  bool find(const Linear& args) {
    const int64_t K = args.weight->K;
    if (args.M > kRows || K > kMostPlaces || !args.weight->finite) return false;
    for (int64_t k = 0; k < K; k += kWidth) {
      const int lanes = int(smaller(kWidth, K - k));
      IVec used{};
      for (int64_t m = 0; m < args.M; ++m) used |= load(args.x + m * args.x_stride + k, lanes) != 0.0f;
      for (int i = 0; i < lanes; ++i) list[count] = uint16_t(k + i), count += used[i] != 0;
      const int64_t seen = k + lanes;
      if ((seen >= kTelling || seen == K) && count > most_places(seen)) return false;
    }
    return true;
  }
};

// R rows beside kBlock columns, added up in the parts in which block() adds them.
template <int R>
FT_INLINE void sparse_block(const Linear& args, const Places& places, const float* weights, int64_t n) {
  const int64_t K = args.weight->K, count = places.count;
  alignas(64) float total[R * kBlock] = {};  // never read before it is written, but GCC 12 warns
  Vec sums[R][kVectors] = {};
  const auto each = [&](auto f) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) f(sums[r][j], total + (r * kVectors + j) * kWidth);
  };
  int64_t i = 0;
  for (int64_t begin = 0; begin < K; begin += kSum) {
    each([](Vec& sum, float*) { sum = Vec{}; });
    for (; i < count && places.list[i] < begin + kSum; ++i) {
      const int64_t k = places.list[i], next = i + kPlacesAhead;
      const int64_t ahead = next < count ? places.list[next] : next < 2 * count ? K + places.list[next - count] : K;
      const float* row = weights + k * kBlock;
      Vec w[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        w[j] = load(row + j * kWidth);
        if (j * kWidth % kLine == 0) __builtin_prefetch(weights + ahead * kBlock + j * kWidth);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec factor = splat(args.x[r * args.x_stride + k]);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sums[r][j] += factor * w[j];
      }
    }
    if (begin > 0) each([](Vec& sum, float* before) { sum += load(before); });
    if (begin + kSum < K) each([](Vec& sum, float* before) { store(before, sum); });
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store_sum(args, r, n + j * kWidth, sums[r][j]);
}

template <int R>
inline void sparse_blocks(const Linear& args, const Places& places, const float* weights, int64_t n) {
  if (args.M == R) return sparse_block<R>(args, places, weights, n);
  if constexpr (R > 1) sparse_blocks<R - 1>(args, places, weights, n);
}

}  // namespace fused::cpu::FT_ISA
