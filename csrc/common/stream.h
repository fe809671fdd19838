#pragma once
// Stores that go past the caches, for outputs too large to be found there again: the line that a store goes to is
// not read first (a quarter less traffic where two tensors are read and one is written), and what lies in the
// caches stays. Such stores are not ordered with others: stream_fence() before a thread's part of the loop ends.
//
// Included only by *.simd.cpp files.

#include "simd.h"

namespace fused::cpu::FT_ISA {

// Outputs of at least this many bytes are streamed; of lesser ones the next reader finds most in a cache.
// Measured with add_layer_norm, 512 float32 columns, one thread: 13 % faster where y takes 8 MiB.
constexpr int64_t kStreamBytes = 4 << 20;

template <class T>
FT_INLINE void stream(T* p, Vec v) {  // p aligned to a whole vector
#if defined(__x86_64__)
  alignas(64) T packed[kWidth];
  store(packed, v);
  if constexpr (sizeof packed == 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), load_raw<__m512i>(packed));
  else if constexpr (sizeof packed == 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), load_raw<__m256i>(packed));
  else if constexpr (sizeof packed == 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), load_raw<__m128i>(packed));
  else
    _mm_stream_si64(reinterpret_cast<long long*>(p), load_raw<long long>(packed));
#else
  store(p, v);
#endif
}

FT_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// A dense output of `cols` columns, streamed if that pays. data may be nullptr: an output that nobody asked for.
template <class T>
struct Output {
  T* data;
  int64_t cols;
  bool streamed;

  Output(void* p, int64_t rows, int64_t cols) : data(static_cast<T*>(p)), cols(cols) {
    constexpr int64_t vector = kWidth * sizeof(T);
    const int64_t row_bytes = cols * int64_t(sizeof(T));
    streamed =
        rows * row_bytes >= kStreamBytes && row_bytes % vector == 0 && reinterpret_cast<uintptr_t>(p) % vector == 0;
  }

  struct Row {
    T* data;  // nullptr: nobody asked for it
    bool streamed;

    FT_INLINE void put(int64_t col, Vec v, int count) const {
      if (streamed)
        stream(data + col, v);  // rows are whole vectors then: count is kWidth
      else
        store(data + col, v, count);
    }
  };

  FT_INLINE Row row(int64_t index) const { return {data ? data + index * cols : nullptr, streamed}; }
};

}  // namespace fused::cpu::FT_ISA
