// Weights into the order in which the kernels read them, and back. Done once a model, so written for reading.

#include <atomic>
#include <cmath>
#include <cstring>

#include "../common/pages.h"
#include "../common/parallel.h"
#include "parts.h"

namespace fused::cpu {
namespace {

constexpr int64_t kColumns = 16;  // of a tile

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

// Where W[n, k] lies, in elements.
int64_t place(const PackedWeight& w, int64_t n, int64_t k) {
  const int64_t panel = n / kPanel, column = n % kPanel;
  if (w.form == WeightForm::f32)
    return (panel * kPanel + column / w.columns * w.columns) * w.K + k * w.columns + column % w.columns;
  const int64_t together = w.form == WeightForm::bf16 ? 2 : 4, tile = kColumns * together;
  const int64_t tiles = (panel * (w.depth() / tile) + k / tile) * (kPanel / kColumns) + column / kColumns;
  return ((tiles * kColumns + k % tile / together) * kColumns + column % kColumns) * together + k % together;
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
    const float* row = weight + n * stride;
    if (form == WeightForm::f32) {
      auto* out = static_cast<float*>(w.data.get());
      for (int64_t k = 0; k < K; ++k) {
        out[place(w, n, k)] = row[k];
        if (!std::isfinite(row[k])) finite = false;
      }
    } else if (form == WeightForm::bf16) {
      auto* out = static_cast<uint16_t*>(w.data.get());
      for (int64_t k = 0; k < K; ++k) out[place(w, n, k)] = to_bf16(row[k]);
    } else {
      float largest = 0.0f;
      for (int64_t k = 0; k < K; ++k) largest = std::fmax(largest, std::fabs(row[k]));
      const float scale = largest / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
      auto* out = static_cast<int8_t*>(w.data.get());
      int32_t sum = 0;
      for (int64_t k = 0; k < K; ++k) {
        const float level = std::nearbyint(row[k] * inverse);
        const auto q = int8_t(level > 127.0f ? 127.0f : level < -127.0f ? -127.0f : level);
        out[place(w, n, k)] = q;
        sum += q;
      }
      scales[n] = scale;
      offsets[n] = 128 * sum;
    }
  });
  w.finite = finite;
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
  parallel_for(w.N, w.N * w.K, [&](int64_t n) {
    for (int64_t k = 0; k < w.K; ++k) {
      const int64_t from = place(w, n, k);
      float& to = out[n * w.K + k];
      if (w.form == WeightForm::f32) to = static_cast<const float*>(w.data.get())[from];
      if (w.form == WeightForm::bf16) to = from_bf16(static_cast<const uint16_t*>(w.data.get())[from]);
      if (w.form == WeightForm::int8) to = w.scale()[n] * float(static_cast<const int8_t*>(w.data.get())[from]);
    }
  });
}

}  // namespace fused::cpu
