#pragma once
// The kernels of linear.cpp, one for each form of the weights, and of matmul.cpp, compiled for each instruction set;
// and what they have in common with what prepares their operands.

#include "../common/isa.h"
#include "linear.h"
#include "matmul.h"

namespace fused::cpu {

// Float32 columns that a kernel computes together (block.h), and in which weights are packed.
inline int64_t columns_together() { return isa() == Isa::avx512 ? 64 : 16; }
// Whether matmul puts x in the order of these kernels as well (gather.h).
inline bool gathers() { return isa() != Isa::avx512; }

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
