#pragma once
// kCount consecutive elements, moved by one instruction of up to 16 bytes and held as float32.

#include <cstring>

#include "dtype.cuh"

namespace fused::cuda {

constexpr int kVectorBytes = 16;  // the widest load and store there is

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T element[kCount];
};

// p is aligned to kCount elements, or to 16 bytes where they are more. What it points to must not change while
// the kernel runs: the load may go through the read-only cache.
template <int kCount, class T>
FT_DEVICE void load(const T* p, float (&out)[kCount]) {
  constexpr int kEach = sizeof(T) * kCount > kVectorBytes ? kVectorBytes / int(sizeof(T)) : kCount;
#pragma unroll
  for (int first = 0; first < kCount; first += kEach) {
    Pack<T, kEach> pack;
    if constexpr (sizeof pack == kVectorBytes) {
      const uint4 raw = __ldg(reinterpret_cast<const uint4*>(p + first));
      memcpy(&pack, &raw, sizeof pack);
    } else {
      pack = *reinterpret_cast<const Pack<T, kEach>*>(p + first);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) out[first + i] = to_float(pack.element[i]);
  }
}

template <int kCount, class T>
FT_DEVICE void store(T* p, const float (&values)[kCount]) {
  static_assert(sizeof(T) * kCount <= kVectorBytes, "one instruction");
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) from_float(values[i], pack.element[i]);
  *reinterpret_cast<Pack<T, kCount>*>(p) = pack;
}

// On the host: whether rows of `stride` elements of T from p on can be moved 16 bytes at a time.
template <class T>
bool is_vector_aligned(const void* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0 && stride * int64_t(sizeof(T)) % kVectorBytes == 0;
}

}  // namespace fused::cuda
