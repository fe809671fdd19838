#pragma once
// csrc/common/mma.cuh on the CPU.

#include <cmath>
#include <type_traits>

#include "float_types.h"
#include "matrix.h"

namespace fused::cuda {

inline void ldmatrix_x1(uint32_t (&r)[1], const void* row, EMU_HERE) { emu::ldmatrix(r, row, false, where); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, EMU_HERE) { emu::ldmatrix(r, row, false, where); }
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, EMU_HERE) { emu::ldmatrix(r, row, false, where); }
inline void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row, EMU_HERE) { emu::ldmatrix(r, row, true, where); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, EMU_HERE) { emu::ldmatrix(r, row, true, where); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, EMU_HERE) { emu::ldmatrix(r, row, true, where); }

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMU_HERE) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, "16-bit factors");
  constexpr auto kind = std::is_same_v<T, __half> ? emu::HalfKind::f16 : emu::HalfKind::bf16;
  emu::mma_m16n8k16(d, a, b0, b1, kind, where);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMU_HERE) {
  emu::mma_m16n8k8_tf32(d, a, b0, b1, where);
}

inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fffffffu;
  return (bits + 0x1000u) & ~0x1fffu;  // to nearest, ties away from zero
}

}  // namespace fused::cuda
