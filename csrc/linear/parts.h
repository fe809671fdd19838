#pragma once
// The kernels of linear.cpp, one for each form of the weights, and of matmul.cpp, compiled for each instruction set.

#include "../common/isa.h"
#include "linear.h"
#include "matmul.h"

namespace fused::cpu {
FT_DECLARE_ISA(linear_float32, Linear)
FT_DECLARE_ISA(linear_bfloat16, Linear)
FT_DECLARE_ISA(linear_int8, Linear)
FT_DECLARE_ISA(matmul_panels, Matmul)
#if defined(__x86_64__)
// Only where has_multiplier() says so.
void linear_bfloat16_dots(const Linear& args);
void linear_int8_dots(const Linear& args);
void linear_bfloat16_tiles(const Linear& args);
void linear_int8_tiles(const Linear& args);
#endif
}  // namespace fused::cpu
