#pragma once
// wgmma of sm_90: asynchronous products of a warpgroup, 128 threads. b is read from shared memory, a from there or from
// registers, and d (64 x kColumns, float32) is in registers:
//
//   wgmma_fence(d, a);                    // after d or a in registers were written by anything else, and at first
//   wgmma<T, kColumns, kRowsAreK>(...);   // any number: d += a (64 x 16) b (16 x kColumns)
//   wgmma_commit();                       // ends a group
//   wgmma_wait<n>(d);                     // at most n groups are still running; d of the others may be read
//
// Fence and wait name the arrays of registers that they are about, for the compiler: it then moves nothing that writes
// or reads them to the other side.
//
// Thread t of the warpgroup holds, with row = 16 * (t / 32) + t % 32 / 4 and pair = 2 * (t % 4),
//
//   d[i] = element (row + 8 * (i / 2 % 2), pair + 8 * (i / 4) + i % 2)
//   a[i] = elements (row + 8 * (i % 2), pair + 8 * (i / 2)) and the next column
//
// Tiles in shared memory are boxes of TMA (tma.cuh): rows of 64 elements under the 128-byte swizzle, eight rows after
// eight. The next 16 of k stand 32 bytes further in a tile with rows of k, and 16 rows (2048 bytes) in one with columns
// of k (kRowsAreK). Where such a b has more than 64 columns, leading_bytes is how far its next 64 are.

#include "launch.cuh"

#ifdef FT_EMULATED
#include <emulated_hopper.h>
#else

#include "dtype.cuh"

namespace fused::cuda {

// A tile that begins at `shared`, as wgmma takes it.
FT_DEVICE uint64_t wgmma_tile(const void* shared, int leading_bytes = 16) {
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = uint64_t(1) << 62;
  return uint64_t(shared_address(shared) & 0x3ffff) >> 4 | uint64_t(leading_bytes >> 4) << 16 | kEightRows << 32 |
         kSwizzle128;
}

// All that touches these registers stands before this in the program, or behind it.
template <int kCount>
FT_DEVICE void hold(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
FT_DEVICE void hold(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}
template <int kRows, int kCount>
FT_DEVICE void hold(uint32_t (&registers)[kRows][kCount]) {
#pragma unroll
  for (int row = 0; row < kRows; ++row) hold(registers[row]);
}

template <class... Registers>
FT_DEVICE void wgmma_fence(Registers&... registers) {
  (hold(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
FT_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kGroupsLeft>
FT_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
}
template <int kGroupsLeft, class Registers>
FT_DEVICE void wgmma_wait(Registers& registers) {
  wgmma_wait<kGroupsLeft>();
  hold(registers);
}

// How many registers a thread of this warpgroup may use from here on: the ones give, the others take.
template <int kRegisters>
FT_DEVICE void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FT_DEVICE void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Operand lists. After d come a (a descriptor, or four registers), b, whether to add to d, and how b is stored.

#define FT_D_32                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31 "

#define FT_D_64                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63 "

#define FT_D_128                                                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127 "

#define FT_BIND_8(i)                                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])

#define FT_BIND_32(i) FT_BIND_8(i), FT_BIND_8(i + 8), FT_BIND_8(i + 16), FT_BIND_8(i + 24)
#define FT_BIND_64(i) FT_BIND_32(i), FT_BIND_32(i + 32)
#define FT_BIND_128(i) FT_BIND_64(i), FT_BIND_64(i + 64)

// %n ... are the operands after the `count` of d.
#define FT_WGMMA_TILES(columns, count, types, o0, o1, o2, o3)                                 \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " o2                                     \
               ", 0;\n"                                                                       \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." types " {" FT_D_##count \
               "}, " o0 ", " o1 ", add, 1, 1, 0, " o3 ";\n}\n"                                \
               : FT_BIND_##count(0)                                                           \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kRowsAreK)))
#define FT_WGMMA_REGISTERS(columns, count, types, o0, o1, o2, o3, o4, o5, o6)                 \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " o5                                     \
               ", 0;\n"                                                                       \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." types " {" FT_D_##count \
               "}, {" o0 ", " o1 ", " o2 ", " o3 "}, " o4 ", add, 1, 1, " o6 ";\n}\n"         \
               : FT_BIND_##count(0)                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kRowsAreK)))

#define FT_WGMMA_TILES_64(types) FT_WGMMA_TILES("64", 32, types, "%32", "%33", "%34", "%35")
#define FT_WGMMA_TILES_128(types) FT_WGMMA_TILES("128", 64, types, "%64", "%65", "%66", "%67")
#define FT_WGMMA_TILES_256(types) FT_WGMMA_TILES("256", 128, types, "%128", "%129", "%130", "%131")
#define FT_WGMMA_REGISTERS_64(types) \
  FT_WGMMA_REGISTERS("64", 32, types, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
#define FT_WGMMA_REGISTERS_128(types) \
  FT_WGMMA_REGISTERS("128", 64, types, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
#define FT_WGMMA_REGISTERS_256(types) \
  FT_WGMMA_REGISTERS("256", 128, types, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
#define FT_WGMMA_ANY(kind)                                                        \
  static_assert(kColumns == 64 || kColumns == 128 || kColumns == 256, "columns"); \
  constexpr bool kIsHalf = std::is_same_v<T, __half>;                             \
  if constexpr (kColumns == 64 && kIsHalf) kind##_64("f16.f16");                  \
  if constexpr (kColumns == 64 && !kIsHalf) kind##_64("bf16.bf16");               \
  if constexpr (kColumns == 128 && kIsHalf) kind##_128("f16.f16");                \
  if constexpr (kColumns == 128 && !kIsHalf) kind##_128("bf16.bf16");             \
  if constexpr (kColumns == 256 && kIsHalf) kind##_256("f16.f16");                \
  if constexpr (kColumns == 256 && !kIsHalf) kind##_256("bf16.bf16")

// d = a b, added to d if `accumulate`. T is __half or __nv_bfloat16, kColumns 64, 128 or 256; b is stored as (16,
// kColumns) if kRowsAreK, else as (kColumns, 16). Here a is a tile, with rows of k.
template <class T, int kColumns, bool kRowsAreK>
FT_DEVICE void wgmma(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate) {
  FT_WGMMA_ANY(FT_WGMMA_TILES);
}

// The same with a in registers.
template <class T, int kColumns, bool kRowsAreK>
FT_DEVICE void wgmma(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  FT_WGMMA_ANY(FT_WGMMA_REGISTERS);
}

#undef FT_WGMMA_ANY
#undef FT_WGMMA_TILES
#undef FT_WGMMA_TILES_64
#undef FT_WGMMA_TILES_128
#undef FT_WGMMA_TILES_256
#undef FT_WGMMA_REGISTERS
#undef FT_WGMMA_REGISTERS_64
#undef FT_WGMMA_REGISTERS_128
#undef FT_WGMMA_REGISTERS_256
#undef FT_D_32
#undef FT_D_64
#undef FT_D_128
#undef FT_BIND_8
#undef FT_BIND_32
#undef FT_BIND_64
#undef FT_BIND_128

}  // namespace fused::cuda
#endif

namespace fused::cuda {

// The tile that begins `bytes` (a multiple of 16) further than `tile`, in the same shared memory.
FT_DEVICE uint64_t wgmma_tile_after(uint64_t tile, int bytes) { return tile + uint64_t(bytes >> 4); }

}  // namespace fused::cuda
