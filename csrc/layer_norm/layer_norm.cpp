// The launchers of layer norm on the CPU, and the checks that both devices' launchers begin with.

#include "layer_norm.h"

#include "../common/isa.h"

namespace fused {
namespace {

template <class Args>
void check_common(const char* name, const Args& args) {
  FT_REQUIRE(args.M >= 0 && args.N >= 1, name << " needs M >= 0 and N >= 1, got " << args.M << " and " << args.N);
  FT_REQUIRE(args.param_dtype == args.dtype || args.param_dtype == DType::f32,
             name << " takes weight and bias in float32 or in the dtype of x");
}

}  // namespace

void check(const LayerNormForward& args) {
  check_common("layer_norm_forward", args);
  FT_REQUIRE(args.M == 0 || (args.x && args.y), "layer_norm_forward needs x and y");
}

void check(const LayerNormBackward& args) {
  check_common("layer_norm_backward", args);
  FT_REQUIRE(args.parts >= 1, "layer_norm_backward needs parts >= 1, got " << args.parts);
  FT_REQUIRE(args.M == 0 || (args.total && args.rstd && (args.mean || args.rms)),
             "layer_norm_backward needs total and its statistics");
  FT_REQUIRE(args.dy || (!args.dweight && !args.dbias) || args.M == 0, "dweight and dbias need dy");
  FT_REQUIRE((!args.dweight || args.partial_dweight) && (!args.dbias || args.partial_dbias) &&
                 (!args.dx_bias || args.partial_dx_bias),
             "each sum over rows needs its partial buffer");
}

namespace cpu {

FT_DECLARE_ISA(layer_norm_forward, LayerNormForward)
FT_DECLARE_ISA(layer_norm_backward, LayerNormBackward)

void layer_norm_forward(const LayerNormForward& args) {
  check(args);
  if (args.M > 0) FT_DISPATCH_ISA(layer_norm_forward, args);
}

void layer_norm_backward(const LayerNormBackward& args) {
  check(args);
  FT_DISPATCH_ISA(layer_norm_backward, args);  // without rows the sums are still written: zeros
}

}  // namespace cpu
}  // namespace fused
