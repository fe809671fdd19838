#pragma once
// The tensor cores of sm_80: ldmatrix and mma.sync, with the layouts of the PTX ISA (which tests/csrc/test_emulator.py
// holds to plain loops).

#include <cstdint>

#include "block.h"

namespace emu {

// One 8 x 8 matrix of 16-bit elements for each of the kCount registers; lane 8 m + i gives the address of row i of
// matrix m. Register m of a lane holds two neighbours of row lane / 4, or of column lane / 4 if transposed.
template <int kCount>
void ldmatrix(uint32_t (&out)[kCount], const void* row, bool transposed, const Where& where);

enum class HalfKind { f16, bf16 };

// d (16 x 8) += a (16 x 16) b (16 x 8), 16-bit factors, float32 sums.
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, HalfKind kind, const Where& where);

// d (16 x 8) += a (16 x 8) b (8 x 8) of float32 whose last 13 bits are not read.
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Where& where);

}  // namespace emu
