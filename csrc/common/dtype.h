#pragma once
// The three float types that kernels store; all arithmetic is float32.

#include <cstdint>

#include "check.h"

namespace fused {

// The numbers are the contract with kernels/_native.py.
enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

// Storage only: a kernel converts on load and on store, and never computes in 16 bits.
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

template <class T>
struct Tag {
  using type = T;
};

// Calls f(Tag<T>{}) with the storage type of `dtype`.
template <class F>
void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(Tag<float>{});
    case DType::f16:
      return f(Tag<f16>{});
    case DType::bf16:
      return f(Tag<bf16>{});
  }
  FT_REQUIRE(false, "unknown dtype " << static_cast<int>(dtype));
}

}  // namespace fused
