#pragma once
// The storage types on the device: f16 is __half, bf16 is __nv_bfloat16. As on the CPU, all arithmetic is float32.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dtype.h"
#include "launch.cuh"

namespace fused::cuda {

template <class T>
struct OnDevice {
  using type = T;
};
template <>
struct OnDevice<f16> {
  using type = __half;
};
template <>
struct OnDevice<bf16> {
  using type = __nv_bfloat16;
};

// Calls f(Tag<T>{}) with the device's storage type of `dtype`.
template <class F>
void dispatch_on_device(DType dtype, F&& f) {
  dispatch(dtype, [&](auto tag) { f(Tag<typename OnDevice<typename decltype(tag)::type>::type>{}); });
}

FT_DEVICE float to_float(float x) { return x; }
FT_DEVICE float to_float(__half x) { return __half2float(x); }
FT_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

FT_DEVICE void from_float(float x, float& out) { out = x; }
FT_DEVICE void from_float(float x, __half& out) { out = __float2half_rn(x); }
FT_DEVICE void from_float(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

// x as it is after being stored as T.
template <class T>
FT_DEVICE float rounded(float x) {
  T stored;
  from_float(x, stored);
  return to_float(stored);
}

}  // namespace fused::cuda
