#include "float_types.h"

// The CPU kernels' conversions, which tests/csrc/test_common.py holds to torch's for every number.
#define FT_ISA emulated
#include "common/simd.h"

namespace emu {

float half_values[1 << 16];

uint16_t half_bits(float x) { return fused::cpu::emulated::float_to_half_bits(x); }

namespace {

struct Filled {
  Filled() {
    for (uint32_t bits = 0; bits < 1u << 16; ++bits)
      half_values[bits] = fused::cpu::emulated::half_bits_to_float(uint16_t(bits));
  }
} filled;

}  // namespace
}  // namespace emu
