// What bounds a row's results, and which of them is the largest. See linear_argmax.h.

#include "screen.h"

#include "../common/simd.h"

namespace fused::cpu::FT_ISA {
namespace {

constexpr float kHalfUlp = 0x1p-24f;
// Rows of other lengths (0 among them, and what is not finite), or whose results may reach further than this, are not
// screened: a level, a bound or a part of a sum might overflow.
constexpr float kShortest = 1e-15f, kLongest = 1e15f, kFarthest = 1e36f;
// A scale of products below the normal numbers loses digits, of each of the up to 127 * 127 K that a sum may be made
// of.
constexpr float kLeast = 2e-38f, kLeastOfProduct = 4e-41f;

FT_INLINE int lanes(int64_t n, int64_t end) { return end - n < kWidth ? int(end - n) : kWidth; }

FT_INLINE Vec magnitude(Vec x) { return x < 0.0f ? -x : x; }

void split_row(const Screening& s, int64_t m) {
  const int64_t K = s.screen->weight.K;
  const float* x = s.x + m * s.x_stride;
  float *coarse = s.rows + s.levels * m * K, *rest = s.levels == 2 ? coarse + K : nullptr, *reach = s.reach + 2 * m;
  Vec top{}, squares{};
  for (int64_t k = 0; k < K; k += kWidth) {
    const Vec v = load(x + k, lanes(k, K));
    top = vmax(magnitude(v), top), squares += v * v;
  }
  const float largest = largest_lane(top), length = __builtin_sqrtf(reduce_sum(squares));
  const bool bounded = length >= kShortest && length <= kLongest && length * s.screen->largest <= kFarthest;
  const auto steps = float(s.steps);
  const float step = bounded ? largest / steps : 0.0f, inverse = bounded ? steps / largest : 0.0f;
  Vec left{}, off{};
  for (int64_t k = 0; k < K; k += kWidth) {
    const int count = lanes(k, K);
    const Vec v = bounded ? load(x + k, count) : Vec{}, level = round_nearest(v * inverse), near = level * step;
    store(coarse + k, near, count);
    const Vec beside = v * inverse - level;  // in levels, where squares are of a size that float32 has
    off += beside * beside;
    if (rest == nullptr) continue;
    store(rest + k, v - near, count);
    left = vmax(magnitude(v - near), left);
  }
  // |x - x'|: `rest` is rounded to levels of its own, off by half of one at most. Without it, as it came out, in
  // levels, where v * inverse and linear's own level are together off by 127 * 5 half ulps. Float32 sums of K products
  // are off by K + 2 half ulps of |x| |W_n| at most in whatever order; the products with Q, which are exact, by a few.
  const float root = __builtin_sqrtf(float(K));
  const float beyond = rest != nullptr ? largest_lane(left) / (2.0f * steps) * root
                                       : step * (__builtin_sqrtf(reduce_sum(off)) + 1e-4f * root);
  reach[0] = bounded ? 1.001f * length : __builtin_nanf("");
  reach[1] = 1.001f * (beyond + float(K + 32) * kHalfUlp * length);
}

void bound_row(const Bounding& b, int64_t m) {
  const Screening& s = *b.screening;
  const Screen& screen = *s.screen;
  const int64_t together = screen.weight.columns, end = b.first + b.count;
  const float by_error = s.reach[2 * m], by_size = s.reach[2 * m + 1];
  const float least_bound = kLeast + float(screen.weight.K) * kLeastOfProduct;
  const float* results = b.results + s.levels * m * b.stride - b.first;
  const float* rest = s.levels == 2 ? results + b.stride : nullptr;
  Vec lowest = splat(-kInf);
  for (int64_t n = b.first; n < end;) {
    float* upper = s.upper + n / together * s.M + m;
    Vec highest = splat(-kInf);
    for (const int64_t stop = n + together < end ? n + together : end; n < stop; n += kWidth) {
      const Vec bias = screen.bias ? load(screen.bias + n, lanes(n, end)) : Vec{};
      const Vec finite = vmin(magnitude(bias), splat(3e38f));  // without it -inf would have no upper bound
      const Vec bound = load(screen.error() + n) * by_error + load(screen.size() + n) * by_size +
                        finite * (8.0f * kHalfUlp) + least_bound;
      Vec z = load(results + n);
      if (rest != nullptr) z += load(rest + n);
      z += bias;
      const IVec there = lanes_index() + splat_int(int32_t(n)) < splat_int(int32_t(end));
      highest = vmax(there ? z + bound : splat(-kInf), highest);
      lowest = vmax(there ? z - bound : splat(-kInf), lowest);
    }
    *upper = largest_lane(highest);
  }
  b.lowest[m] = largest_lane(lowest);
}

}  // namespace

void find_largest(const Results& r) {
  for (int64_t m = 0; m < r.M; ++m) {
    const float* const y = r.results + m * r.stride;
    // Of each lane the largest so far and the first place of it.
    Vec top = splat(-kInf);
    IVec place = lanes_index(), nan{};
    for (int64_t n = 0; n < r.count; n += kWidth) {
      const int there = lanes(n, r.count);
      const Vec v = there == kWidth ? load(y + n) : load(y + n, there);
      const IVec index = lanes_index() + splat_int(int32_t(n));
      const IVec greater = (v > top) & (index < splat_int(int32_t(r.count)));
      top = greater ? v : top;
      place = greater ? index : place;
      nan |= v != v;
    }
    int best = 0, any = nan[0];
    for (int lane = 1; lane < kWidth; ++lane) {
      any |= nan[lane];
      if (top[lane] > top[best] || (top[lane] == top[best] && place[lane] < place[best])) best = lane;
    }
    r.values[m] = top[best], r.places[m] = place[best];
    for (int64_t n = 0; any != 0; ++n)
      if (y[n] != y[n]) r.values[m] = y[n], r.places[m] = n, any = 0;
  }
}

void split_rows(const Screening& s) {
  for (int64_t m = 0; m < s.M; ++m) split_row(s, m);
}

void bound_columns(const Bounding& b) {
  for (int64_t m = 0; m < b.screening->M; ++m) bound_row(b, m);
}

}  // namespace fused::cpu::FT_ISA
