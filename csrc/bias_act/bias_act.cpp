// The checked entries of bias_act on the CPU.

#include "bias_act.h"

#include "../common/isa.h"

namespace fused::cpu {

FT_DECLARE_ISA(bias_act_forward, BiasActForward)
FT_DECLARE_ISA(bias_act_backward, BiasActBackward)

void bias_act_forward(const BiasActForward& args) {
  FT_REQUIRE(args.M >= 0 && args.N >= 1, "M must not be negative, and N at least 1");
  FT_REQUIRE(args.bias_dtype == args.dtype || args.bias_dtype == DType::f32, "bias is of dtype or float32");
  if (args.M > 0) FT_DISPATCH_ISA(bias_act_forward, args);
}

void bias_act_backward(const BiasActBackward& args) {
  FT_REQUIRE(args.M >= 0 && args.N >= 1 && args.parts >= 1, "M must not be negative, and N and parts at least 1");
  FT_REQUIRE(args.bias_dtype == args.dtype || args.bias_dtype == DType::f32, "bias is of dtype or float32");
  FT_REQUIRE(!args.dbias == !args.partial, "dbias and its partial sums go together");
  FT_DISPATCH_ISA(bias_act_backward, args);  // without rows the sums are still written: zeros
}

}  // namespace fused::cpu
