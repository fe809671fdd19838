// csrc/common as C functions over arrays, for tests/csrc/test_common.py. Compiled once per instruction set.

#include <cstdint>

#include "common/philox.h"
#include "common/simd.h"

using namespace fused;
using namespace fused::cpu::FT_ISA;

namespace {

// One element kind into another, `step` lanes at a time: kWidth for whole vectors, less for masked tails.
template <class From, class To>
void convert(const From* in, To* out, int64_t count, int step) {
  for (int64_t i = 0; i < count; i += step) {
    const int lanes_here = int(count - i < step ? count - i : step);
    store(out + i, load(in + i, lanes_here), lanes_here);
  }
}

template <class From, class To>
void convert_scalar(const From* in, To* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) from_float(to_float(in[i]), out[i]);
}

}  // namespace

extern "C" {

int probe_width() { return kWidth; }

void probe_f16_to_f32(const f16* in, float* out, int64_t count, int step) { convert(in, out, count, step); }
void probe_bf16_to_f32(const bf16* in, float* out, int64_t count, int step) { convert(in, out, count, step); }
void probe_f32_to_f32(const float* in, float* out, int64_t count, int step) { convert(in, out, count, step); }
void probe_f32_to_f16(const float* in, f16* out, int64_t count, int step) { convert(in, out, count, step); }
void probe_f32_to_bf16(const float* in, bf16* out, int64_t count, int step) { convert(in, out, count, step); }

void probe_scalar_f16_to_f32(const f16* in, float* out, int64_t count) { convert_scalar(in, out, count); }
void probe_scalar_bf16_to_f32(const bf16* in, float* out, int64_t count) { convert_scalar(in, out, count); }
void probe_scalar_f32_to_f16(const float* in, f16* out, int64_t count) { convert_scalar(in, out, count); }
void probe_scalar_f32_to_bf16(const float* in, bf16* out, int64_t count) { convert_scalar(in, out, count); }

// count is a multiple of kWidth
void probe_exp(const float* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) store(out + i, exp(load(in + i)));
}
void probe_exp_shifted(const float* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) store(out + i, exp_shifted(load(in + i)));
}

void probe_reduce_sum(const float* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) out[i / kWidth] = reduce_sum(load(in + i));
}

// in: (blocks, 3, kWidth) counter words; out: (blocks, 4, kWidth)
void probe_philox(const uint32_t* in, uint32_t* out, int64_t blocks, uint64_t seed) {
  for (int64_t b = 0; b < blocks; ++b) {
    const uint32_t* c = in + b * 3 * kWidth;
    const PhiloxWords words =
        philox(load_raw<UVec>(c), load_raw<UVec>(c + kWidth), load_raw<UVec>(c + 2 * kWidth), seed);
    for (int i = 0; i < 4; ++i) store_raw(out + (b * 4 + i) * kWidth, words.word[i]);
  }
}
}
