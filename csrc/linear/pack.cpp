// Weights into the order in which the kernels read them, and back.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "../common/pages.h"
#include "../common/parallel.h"
#include "parts.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fused::cpu {
namespace {

constexpr int64_t kColumns = 16;  // of a tile
constexpr int64_t kPart = 64;     // of K: whole tiles

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);  // NaN stays NaN
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

// NaN if one of them is, whose bits are those of the largest numbers.
float largest_magnitude(const float* row, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, row + i, 4);
    largest = std::max(largest, bits & 0x7fffffff);
  }
  float x;
  std::memcpy(&x, &largest, 4);
  return x;
}

int8_t level(float x) {
  const float inside = x < 127.0f ? x > -127.0f ? x : -127.0f : 127.0f;  // NaN, of a row that is refused: 127
#if defined(__x86_64__)
  return int8_t(_mm_cvtss_si32(_mm_set_ss(inside)));  // std::nearbyint is a call
#else
  return int8_t(std::nearbyint(inside));
#endif
}

// f(k, where W[n, k] lies, in elements) for a row's part from `begin` on, which is the first of a tile.
template <class F>
void for_each_place(const PackedWeight& w, int64_t n, int64_t begin, int64_t end, const F& f) {
  const int64_t panel = n / kPanel, column = n % kPanel;
  if (w.form == WeightForm::f32) {
    const int64_t first = (panel * kPanel + column / w.columns * w.columns) * w.K + column % w.columns;
    for (int64_t k = begin; k < end; ++k) f(k, first + k * w.columns);
    return;
  }
  const int64_t together = w.form == WeightForm::bf16 ? 2 : 4, depth = kColumns * together;  // of a tile
  for (int64_t tile = begin; tile < end; tile += depth) {
    const int64_t number = (panel * (w.depth() / depth) + tile / depth) * (kPanel / kColumns) + column / kColumns;
    int64_t place = (number * kColumns * kColumns + column % kColumns) * together;
    const int64_t stop = std::min(tile + depth, end);
    for (int64_t k = tile; k < stop; k += together, place += kColumns * together)
      for (int64_t i = k; i < std::min(k + together, stop); ++i) f(i, place + i - k);
  }
}

// f(n, begin, end) for parts of all rows; those of kColumns rows that lie in the same cache lines one after another.
template <class F>
void for_each_part(const PackedWeight& w, const F& f) {
  parallel_for((w.N + kColumns - 1) / kColumns, w.N * w.K, [&](int64_t group) {
    const int64_t end = std::min((group + 1) * kColumns, w.N);
    for (int64_t k = 0; k < w.K; k += kPart)
      for (int64_t n = group * kColumns; n < end; ++n) f(n, k, std::min(k + kPart, w.K));
  });
}

}  // namespace

PackedWeight pack_weight(const float* weight, int64_t stride, int64_t N, int64_t K, WeightForm form) {
  FT_REQUIRE(N >= 1 && K >= 1, "a weight must have rows and columns, got " << N << " x " << K);
  // A sum of K products of bytes must fit into an int32.
  FT_REQUIRE(form != WeightForm::int8 || K <= 65536, "int8 weights may have 65536 inputs at most, got " << K);
  PackedWeight w;
  w.N = N, w.K = K, w.form = form, w.columns = columns_together();
  w.data = allocate_pages(size_t(w.bytes()));
  if (form == WeightForm::int8) {
    w.scaled = w.panels() * kPanel;
    w.scales = allocate_pages(size_t(w.scaled) * 8);
  }
  auto* scales = const_cast<float*>(w.scale());
  auto* offsets = const_cast<int32_t*>(w.offset());
  std::atomic<bool> finite{true};
  parallel_for(N, N * K, [&](int64_t n) {
    const float largest = largest_magnitude(weight + n * stride, K);
    if (!std::isfinite(largest)) finite = false;
    if (form == WeightForm::int8) scales[n] = largest / 127.0f;
  });
  w.finite = finite;
  for_each_part(w, [&](int64_t n, int64_t begin, int64_t end) {
    const float* row = weight + n * stride;
    if (form == WeightForm::f32) {
      auto* out = static_cast<float*>(w.data.get());
      for_each_place(w, n, begin, end, [&](int64_t k, int64_t place) { out[place] = row[k]; });
    } else if (form == WeightForm::bf16) {
      auto* out = static_cast<uint16_t*>(w.data.get());
      for_each_place(w, n, begin, end, [&](int64_t k, int64_t place) { out[place] = to_bf16(row[k]); });
    } else {
      const float one_by = 1.0f / scales[n], inverse = std::isfinite(one_by) ? one_by : 0.0f;  // all but 0 is 0
      auto* out = static_cast<int8_t*>(w.data.get());
      int32_t sum = 0;
      for_each_place(w, n, begin, end, [&](int64_t k, int64_t place) {
        const auto q = level(row[k] * inverse);
        out[place] = q;
        sum += q;
      });
      offsets[n] += 128 * sum;
    }
  });
  return w;
}

PackedWeight columns_of(const PackedWeight& w, int64_t first, int64_t count) {
  const auto view = [](void* p) { return std::shared_ptr<void>(std::shared_ptr<void>(), p); };
  PackedWeight some = w;
  some.N = w.N - first < count ? w.N - first : count;
  some.data = view(static_cast<char*>(w.data.get()) + first * w.depth() * w.element_bytes());
  some.scales = view(const_cast<float*>(w.scale()) + (w.form == WeightForm::int8 ? first : 0));
  return some;
}

void unpack_weight(const PackedWeight& w, float* out) {
  for_each_part(w, [&](int64_t n, int64_t begin, int64_t end) {
    float* row = out + n * w.K;
    if (w.form == WeightForm::f32) {
      const auto* from = static_cast<const float*>(w.data.get());
      for_each_place(w, n, begin, end, [&](int64_t k, int64_t place) { row[k] = from[place]; });
    } else if (w.form == WeightForm::bf16) {
      const auto* from = static_cast<const uint16_t*>(w.data.get());
      for_each_place(w, n, begin, end, [&](int64_t k, int64_t place) { row[k] = from_bf16(from[place]); });
    } else {
      const auto* from = static_cast<const int8_t*>(w.data.get());
      for_each_place(w, n, begin, end, [&](int64_t k, int64_t place) { row[k] = w.scale()[n] * float(from[place]); });
    }
  });
}

}  // namespace fused::cpu
