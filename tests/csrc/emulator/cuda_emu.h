#pragma once
// CUDA's own names for g++: a .cu that includes this (through csrc/common/launch.cuh) is C++ that runs on the CPU. What
// a kernel uses and this does not know is an error of the compiler, never a guess; add it here.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "block.h"
#include "float_types.h"
#include "shared.h"
#include "vector_types.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::emu::position->index)
#define blockIdx (::emu::block.index)
#define blockDim (::emu::block.size)
#define gridDim (::emu::block.grid)

// ---------------------------------------------------------------- barriers and collectives

inline void __syncthreads(EMU_HERE) { emu::sync_block(where); }
inline int __syncthreads_count(int vote, EMU_HERE) { return emu::count_votes(vote != 0, where); }
inline int __syncthreads_or(int vote, EMU_HERE) { return emu::count_votes(vote != 0, where) != 0; }
inline int __syncthreads_and(int vote, EMU_HERE) { return emu::count_votes(vote == 0, where) == 0; }
inline void __syncwarp(uint32_t mask = ~0u, EMU_HERE) { emu::sync_warp(mask, where); }

// Shuffles work in segments of `width` lanes; a lane that would read outside gets its own value (but xor may read an
// earlier segment).
template <class T>
T __shfl_sync(uint32_t mask, T v, int source, int width = 32, EMU_HERE) {
  const int first = emu::position->lane / width * width;
  return emu::shuffle_value(mask, v, first + (source & (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T v, int bits, int width = 32, EMU_HERE) {
  const int lane = emu::position->lane, wanted = lane ^ bits;
  return emu::shuffle_value(mask, v, wanted / width > lane / width ? lane : wanted, where);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T v, unsigned delta, int width = 32, EMU_HERE) {
  const int lane = emu::position->lane, wanted = lane + int(delta);
  return emu::shuffle_value(mask, v, wanted / width > lane / width ? lane : wanted, where);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T v, unsigned delta, int width = 32, EMU_HERE) {
  const int lane = emu::position->lane, wanted = lane - int(delta);
  return emu::shuffle_value(mask, v, wanted < lane / width * width ? lane : wanted, where);
}
inline unsigned __ballot_sync(uint32_t mask, int vote, EMU_HERE) { return emu::ballot(mask, vote != 0, where); }
inline int __any_sync(uint32_t mask, int vote, EMU_HERE) { return emu::ballot(mask, vote != 0, where) != 0; }
inline int __all_sync(uint32_t mask, int vote, EMU_HERE) { return emu::ballot(mask, vote == 0, where) == 0; }

// ---------------------------------------------------------------- memory

template <class T>
T __ldg(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T) != 0) emu::fail("__ldg from an address that is not aligned");
  return *p;
}

// Atomics order nothing but themselves, as on the device.
template <class T>
T atomicAdd(T* p, T v) {
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
template <class T>
T atomicCAS(T* p, T expected, T desired) {
  __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
template <class T>
T atomicMax(T* p, T v) {
  T seen = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (seen < v && !__atomic_compare_exchange_n(p, &seen, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}

// ---------------------------------------------------------------- arithmetic

using std::max;
using std::min;

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }

namespace emu {
template <class To, class From>
To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "bits of one size");
  To out;
  std::memcpy(&out, &x, sizeof out);
  return out;
}
}  // namespace emu
inline unsigned __float_as_uint(float x) { return emu::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return emu::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return emu::bits_as<float>(x); }
inline float __int_as_float(int x) { return emu::bits_as<float>(x); }
