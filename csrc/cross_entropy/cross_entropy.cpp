// The checked entries of cross entropy on the CPU.

#include "cross_entropy.h"

#include "../common/isa.h"

namespace fused::cpu {

FT_DECLARE_ISA(cross_entropy_forward, CrossEntropyForward)
FT_DECLARE_ISA(cross_entropy_backward, CrossEntropyBackward)

void cross_entropy_forward(const CrossEntropyForward& args) {
  FT_REQUIRE(args.M >= 0 && args.V >= 1, "M must not be negative, and V at least 1");
  if (args.M > 0) FT_DISPATCH_ISA(cross_entropy_forward, args);
}

void cross_entropy_backward(const CrossEntropyBackward& args) {
  FT_REQUIRE(args.M >= 0 && args.V >= 1, "M must not be negative, and V at least 1");
  FT_REQUIRE(args.dlogits != args.logits || args.dlogits_stride == args.logits_stride,
             "a gradient in place has the logits' stride");
  if (args.M > 0) FT_DISPATCH_ISA(cross_entropy_backward, args);
}

}  // namespace fused::cpu
