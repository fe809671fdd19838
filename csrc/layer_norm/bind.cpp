// Python's door to layer norm: addresses become pointers, and the interpreter runs on meanwhile. The arguments are
// the fields of LayerNormForward and LayerNormBackward, in their order; kernels/layer_norm/native.py passes them.

#include "../common/bind.h"
#include "layer_norm.h"

namespace py = pybind11;

namespace fused {
namespace {

LayerNormForward forward_args(uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride,
                              uintptr_t x_bias, uintptr_t weight, uintptr_t bias, uintptr_t seed, uintptr_t y,
                              uintptr_t total, uintptr_t mean, uintptr_t rstd, int64_t M, int64_t N, float eps,
                              uint32_t dropout_threshold, float dropout_scale, bool rms, int dtype, int param_dtype) {
  return {
      at(x),         x_stride,  at(residual), residual_stride,   at(x_bias), at(weight), at(bias), at(seed),
      at(y),         at(total), at(mean),     at(rstd),          M,          N,          eps,      dropout_threshold,
      dropout_scale, rms,       DType(dtype), DType(param_dtype)};
}

LayerNormBackward backward_args(uintptr_t dy, int64_t dy_stride, uintptr_t dtotal, int64_t dtotal_stride,
                                uintptr_t total, int64_t total_stride, uintptr_t weight, uintptr_t mean, uintptr_t rstd,
                                uintptr_t seed, uintptr_t dx, uintptr_t dresidual, uintptr_t dweight, uintptr_t dbias,
                                uintptr_t dx_bias, uintptr_t partial_dweight, uintptr_t partial_dbias,
                                uintptr_t partial_dx_bias, int64_t parts, int64_t M, int64_t N,
                                uint32_t dropout_threshold, float dropout_scale, bool rms, int dtype, int param_dtype) {
  return {at(dy),
          dy_stride,
          at(dtotal),
          dtotal_stride,
          at(total),
          total_stride,
          at(weight),
          at(mean),
          at(rstd),
          at(seed),
          at(dx),
          at(dresidual),
          at(dweight),
          at(dbias),
          at(dx_bias),
          at(partial_dweight),
          at(partial_dbias),
          at(partial_dx_bias),
          parts,
          M,
          N,
          dropout_threshold,
          dropout_scale,
          rms,
          DType(dtype),
          DType(param_dtype)};
}

}  // namespace

void register_layer_norm(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("layer_norm_forward", on_cpu(&forward_args, &cpu::layer_norm_forward), release());
  m.def("layer_norm_backward", on_cpu(&backward_args, &cpu::layer_norm_backward), release());
#ifdef FUSED_WITH_CUDA
  m.def("layer_norm_forward_cuda", on_cuda(&forward_args, &cuda::layer_norm_forward), release());
  m.def("layer_norm_backward_cuda", on_cuda(&backward_args, &cuda::layer_norm_backward), release());
  m.def("layer_norm_backward_parts_cuda", &cuda::layer_norm_backward_parts);
#endif
}

}  // namespace fused
