// The checked entry of each attention kernel; the kernels are in the *.simd.cpp files beside this one.

#include "attention.h"

#include "../common/isa.h"

namespace fused::cpu {

FT_DECLARE_ISA(attention_forward, AttentionForward)
FT_DECLARE_ISA(attention_backward, AttentionBackward)
FT_DECLARE_ISA(attention_weights, AttentionWeights)

namespace {

void check(const Attention& args) {
  FT_REQUIRE(args.D >= 1 && args.D <= kMaxHeadWidth, "the head width must be 1 ... 256, got " << args.D);
  FT_REQUIRE(args.Hk >= 1 && args.H % args.Hk == 0, "H must be a multiple of Hk, got " << args.H << " and " << args.Hk);
  FT_REQUIRE(args.L < (int64_t(1) << 31) && args.S < (int64_t(1) << 31), "sequences must be shorter than 2^31");
  FT_REQUIRE(args.scratch != nullptr, "scratch memory is missing");
}

}  // namespace

void attention_forward(const AttentionForward& args) {
  if (args.B == 0 || args.H == 0 || args.L == 0) return;
  check(args);
  FT_DISPATCH_ISA(attention_forward, args);
}

void attention_backward(const AttentionBackward& args) {
  if (args.B == 0 || args.H == 0 || args.L == 0) return;
  check(args);
  FT_DISPATCH_ISA(attention_backward, args);
}

void attention_weights(const AttentionWeights& args) {
  if (args.B == 0 || args.H == 0 || args.L == 0 || args.S == 0) return;
  check(args);
  FT_DISPATCH_ISA(attention_weights, args);
}

}  // namespace fused::cpu
