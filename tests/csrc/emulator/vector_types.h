#pragma once
// CUDA's small structs, with the alignment that makes a load of one a single instruction on the device.

#include <cstdint>

#define EMU_VECTOR2(name, T, bytes) \
  struct alignas(bytes) name {      \
    T x, y;                         \
  };                                \
  constexpr name make_##name(T x, T y) { return {x, y}; }
#define EMU_VECTOR4(name, T, bytes) \
  struct alignas(bytes) name {      \
    T x, y, z, w;                   \
  };                                \
  constexpr name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }

EMU_VECTOR2(short2, int16_t, 4)
EMU_VECTOR2(ushort2, uint16_t, 4)
EMU_VECTOR2(int2, int32_t, 8)
EMU_VECTOR2(uint2, uint32_t, 8)
EMU_VECTOR2(float2, float, 8)
EMU_VECTOR2(double2, double, 16)
EMU_VECTOR4(short4, int16_t, 8)
EMU_VECTOR4(ushort4, uint16_t, 8)
EMU_VECTOR4(int4, int32_t, 16)
EMU_VECTOR4(uint4, uint32_t, 16)
EMU_VECTOR4(float4, float, 16)

#undef EMU_VECTOR2
#undef EMU_VECTOR4

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
