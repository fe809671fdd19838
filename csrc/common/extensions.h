#pragma once
// What some processors with AVX-512 multiply beyond it. Files that use it are named *.dots.cpp and *.tiles.cpp; the
// build defines FT_WITH_DOTS and FT_WITH_TILES where the compiler knew how.

namespace fused::cpu {

// All false unless isa() is avx512 (FUSED_TRANSFORMER_ISA=avx2 turns these off too).
struct Extensions {
  bool bf16_dots = false;  // AVX512-BF16
  bool int8_dots = false;  // AVX512-VNNI
  bool tiles = false;      // AMX with bfloat16 and int8, allowed by the operating system
};

const Extensions& extensions();

}  // namespace fused::cpu
