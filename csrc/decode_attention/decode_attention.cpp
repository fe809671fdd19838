// The checked entry of decode attention on the CPU; the kernel is in forward.simd.cpp.

#include "decode_attention.h"

#include "../common/check.h"
#include "../common/isa.h"

namespace fused::cpu {

FT_DECLARE_ISA(decode_attention, DecodeAttention)

namespace {

int64_t at(const DecodeAttention::Integers& x, int64_t index) {
  return x.wide ? static_cast<const int64_t*>(x.data)[index] : static_cast<const int32_t*>(x.data)[index];
}

// As FT_REQUIRE, in the words of the reference: these numbers come from the caller of the op as they are, who knows
// nothing of this file's functions.
void require_within(const char* name, int64_t value, int64_t most) {
  if (value >= 0 && value <= most) return;
  std::ostringstream text;
  text << name << " must be between 0 and " << most << ", got " << value;
  throw std::invalid_argument(text.str());
}

// Numbers that would lead out of the cache's memory. Beside the cache itself this is little to read: one number of a
// table for 2 * Hk * D of the keys and values.
void check_numbers(const DecodeAttention& args) {
  for (int64_t b = 0; b < args.B; ++b) {
    const int64_t length = args.lengths.data == nullptr ? args.C : at(args.lengths, b);
    require_within("lengths", length, args.C);
    if (args.rows.data == nullptr) continue;
    const int64_t read = args.rows_position == 0 ? 1 : length;
    for (int64_t j = 0; j < read; ++j)
      require_within("rows", at(args.rows, b * args.rows_batch + j * args.rows_position), args.R - 1);
  }
}

}  // namespace

int64_t decode_attention_partial(int64_t B, int64_t H, int64_t L, int64_t C, int64_t D) {
  const int64_t splits = (C + kSplit - 1) / kSplit;
  return splits <= 1 ? 0 : B * H * L * splits * ((D + 15) / 16 * 16 + 2);
}

void decode_attention(const DecodeAttention& args) {
  if (args.B == 0 || args.H == 0 || args.L == 0) return;
  FT_REQUIRE(args.D >= 1 && args.D <= kMaxHeadWidth, "the head width must be 1 ... 256, got " << args.D);
  FT_REQUIRE(args.Hk >= 1 && args.H % args.Hk == 0, "H must be a multiple of Hk, got " << args.H << " and " << args.Hk);
  FT_REQUIRE(args.rows.data != nullptr || args.R == args.B, "without rows, R must be B");
  FT_REQUIRE(args.C <= kSplit || args.partial != nullptr, "working memory is missing");
  check_numbers(args);
  FT_DISPATCH_ISA(decode_attention, args);
}

}  // namespace fused::cpu
