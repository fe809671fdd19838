// Python's door to cross entropy: addresses become pointers, and the interpreter runs on meanwhile. The arguments are
// the fields of CrossEntropyForward and CrossEntropyBackward, in their order; kernels/cross_entropy/native.py
// passes them.

#include "../common/bind.h"
#include "cross_entropy.h"

namespace py = pybind11;

namespace fused {
namespace {

CrossEntropyForward forward_args(uintptr_t logits, int64_t logits_stride, uintptr_t targets, uintptr_t losses,
                                 uintptr_t top, uintptr_t log_sum, int64_t M, int64_t V, int64_t ignore_index,
                                 float target_weight, float every_weight, float z_loss, bool wide_targets, int dtype) {
  return {at(logits), logits_stride, at(targets),   at(losses),   at(top), at(log_sum),  M,
          V,          ignore_index,  target_weight, every_weight, z_loss,  wide_targets, DType(dtype)};
}

CrossEntropyBackward backward_args(uintptr_t dlosses, int64_t dlosses_stride, uintptr_t logits, int64_t logits_stride,
                                   uintptr_t targets, uintptr_t top, uintptr_t log_sum, uintptr_t dlogits,
                                   int64_t dlogits_stride, int64_t M, int64_t V, int64_t ignore_index,
                                   float target_weight, float every_weight, float z_loss, bool wide_targets,
                                   int dtype) {
  return {at(dlosses),
          dlosses_stride,
          at(logits),
          logits_stride,
          at(targets),
          at(top),
          at(log_sum),
          at(dlogits),
          dlogits_stride,
          M,
          V,
          ignore_index,
          target_weight,
          every_weight,
          z_loss,
          wide_targets,
          DType(dtype)};
}

}  // namespace

void register_cross_entropy(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("cross_entropy_forward", on_cpu(&forward_args, &cpu::cross_entropy_forward), release());
  m.def("cross_entropy_backward", on_cpu(&backward_args, &cpu::cross_entropy_backward), release());
#ifdef FUSED_WITH_CUDA
  m.def("cross_entropy_forward_cuda", on_cuda(&forward_args, &cuda::cross_entropy_forward), release());
  m.def("cross_entropy_backward_cuda", on_cuda(&backward_args, &cuda::cross_entropy_backward), release());
#endif
}

}  // namespace fused
