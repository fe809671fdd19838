#pragma once
// The tensor cores of sm_80 and later: PTX's ldmatrix and mma.sync, each a function of the whole warp.
//
// How a warp holds a tile, with group = lane / 4 and pair = 2 * (lane % 4):
//
//   a of m16n8k16, 16 x 16:  a[i] = elements (group + 8 (i % 2), pair + 8 (i / 2)) and the next column
//   b of m16n8k16, 16 x 8:   b_i  = elements (pair + 8 i, group) and the next row
//   a of m16n8k8, 16 x 8:    a[i] = element (group + 8 (i % 2), lane % 4 + 4 (i / 2))
//   b of m16n8k8, 8 x 8:     b_i  = element (lane % 4 + 4 i, group)
//   d of either, 16 x 8:     d[i] = element (group + 8 (i / 2), pair + i % 2)
//
// ldmatrix reads 8 x 8 matrices of 16-bit elements from shared memory: lane 8 m + i gives the address of row i of
// matrix m (16 bytes, aligned to 16), and r[m] becomes elements (group, pair) and the next column of it: an a fragment
// of a row-major tile, a b fragment of one that is stored transposed. _trans: elements (pair, group) and the next row:
// a b fragment of a row-major tile.
//
// See also copy_async.cuh (cp.async), and launch.cuh for dynamic shared memory.

#include "dtype.cuh"
#include "launch.cuh"

#ifdef FT_EMULATED
#include <emulated_mma.h>
#else

namespace fused::cuda {

#define FT_LDMATRIX_1(name, kind)                                               \
  FT_DEVICE void name(uint32_t (&r)[1], const void* row) {                      \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" kind ".shared.b16 {%0}, [%1];" \
                 : "=r"(r[0])                                                   \
                 : "r"(shared_address(row))                                     \
                 : "memory");                                                   \
  }
#define FT_LDMATRIX_2(name, kind)                                                   \
  FT_DEVICE void name(uint32_t (&r)[2], const void* row) {                          \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" kind ".shared.b16 {%0, %1}, [%2];" \
                 : "=r"(r[0]), "=r"(r[1])                                           \
                 : "r"(shared_address(row))                                         \
                 : "memory");                                                       \
  }
#define FT_LDMATRIX_4(name, kind)                                                           \
  FT_DEVICE void name(uint32_t (&r)[4], const void* row) {                                  \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" kind ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                           \
                 : "r"(shared_address(row))                                                 \
                 : "memory");                                                               \
  }

FT_LDMATRIX_1(ldmatrix_x1, "")
FT_LDMATRIX_2(ldmatrix_x2, "")
FT_LDMATRIX_4(ldmatrix_x4, "")
FT_LDMATRIX_1(ldmatrix_x1_trans, ".trans")
FT_LDMATRIX_2(ldmatrix_x2_trans, ".trans")
FT_LDMATRIX_4(ldmatrix_x4_trans, ".trans")

#undef FT_LDMATRIX_1
#undef FT_LDMATRIX_2
#undef FT_LDMATRIX_4

#define FT_MMA(shape, types)                            \
  asm("mma.sync.aligned." shape ".row.col." types       \
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
      "{%0, %1, %2, %3};"                               \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// d (16 x 8, float32) += a (16 x 16) b (16 x 8); T is __half or __nv_bfloat16.
template <class T>
FT_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
FT_DEVICE void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  FT_MMA("m16n8k16", "f32.f16.f16.f32");
}
template <>
FT_DEVICE void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  FT_MMA("m16n8k16", "f32.bf16.bf16.f32");
}

// d (16 x 8, float32) += a (16 x 8) b (8 x 8), both tf32: float32 of which the last 13 bits are not read. What to_tf32
// gives is rounded; a float32's own bits are cut off.
FT_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  FT_MMA("m16n8k8", "f32.tf32.tf32.f32");
}

#undef FT_MMA

// x rounded to tf32 (ten bits of mantissa), ties away from zero.
FT_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

}  // namespace fused::cuda
#endif

namespace fused::cuda {

// Two numbers rounded to T, the first in the low half: a register of a fragment.
template <class T>
FT_DEVICE uint32_t pack(float low, float high);

template <>
FT_DEVICE uint32_t pack<__half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &both, sizeof bits);
  return bits;
}
template <>
FT_DEVICE uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &both, sizeof bits);
  return bits;
}

// x = big + small, each tf32, to about 21 bits: a product of two such is big big + big small + small big, three
// m16n8k8 with an error near float32's own.
FT_DEVICE void split_tf32(float x, uint32_t& big, uint32_t& small) {
  big = to_tf32(x);
  small = to_tf32(x - __uint_as_float(big));
}

}  // namespace fused::cuda
