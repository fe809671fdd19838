// Python's door to bias_act: addresses become pointers, and the interpreter runs on meanwhile. The arguments are the
// fields of BiasActForward and BiasActBackward, in their order; kernels/bias_act/native.py passes them.

#include "../common/bind.h"
#include "bias_act.h"

namespace py = pybind11;

namespace fused {
namespace {

BiasActForward forward_args(uintptr_t x, int64_t x_stride, uintptr_t bias, uintptr_t seed, uintptr_t y, int64_t M,
                            int64_t N, uint32_t dropout_threshold, float dropout_scale, int activation, int dtype,
                            int bias_dtype) {
  return {at(x),
          x_stride,
          at(bias),
          at(seed),
          at(y),
          M,
          N,
          dropout_threshold,
          dropout_scale,
          Activation(activation),
          DType(dtype),
          DType(bias_dtype)};
}

BiasActBackward backward_args(uintptr_t dy, int64_t dy_stride, uintptr_t saved, int64_t saved_stride, uintptr_t bias,
                              uintptr_t seed, uintptr_t dx, uintptr_t dbias, uintptr_t partial, int64_t parts,
                              int64_t M, int64_t N, uint32_t dropout_threshold, float dropout_scale, int activation,
                              int dtype, int bias_dtype) {
  return {at(dy),
          dy_stride,
          at(saved),
          saved_stride,
          at(bias),
          at(seed),
          at(dx),
          at(dbias),
          at(partial),
          parts,
          M,
          N,
          dropout_threshold,
          dropout_scale,
          Activation(activation),
          DType(dtype),
          DType(bias_dtype)};
}

}  // namespace

void register_bias_act(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("bias_act_forward", on_cpu(&forward_args, &cpu::bias_act_forward), release());
  m.def("bias_act_backward", on_cpu(&backward_args, &cpu::bias_act_backward), release());
#ifdef FUSED_WITH_CUDA
  m.def("bias_act_forward_cuda", on_cuda(&forward_args, &cuda::bias_act_forward), release());
  m.def("bias_act_backward_cuda", on_cuda(&backward_args, &cuda::bias_act_backward), release());
  m.def("bias_act_backward_parts_cuda", &cuda::bias_act_backward_parts);
#endif
}

}  // namespace fused
