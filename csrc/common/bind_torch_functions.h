#pragma once
// What torch's own C++ does for the direct calls in place of its Python functions, of which each costs 0.3 to 1 us
// more. It crosses between two modules as the address of this table, in a capsule; csrc/with_torch alone sees torch's
// headers.

#include <Python.h>

#include <cstdint>

namespace fused {

constexpr const char* kTorchFunctions = "fused_transformer.torch_functions";

// Tensors are of torch's own class or torch.nn.Parameter. Results are new references; nullptr: a Python error is set.
struct TorchFunctions {
  enum class Type { same, f32, i64 };  // same: the dtype of `like`

  bool (*is_profiled)();
  bool (*wants_gradient)(PyObject* tensor);               // requires_grad where gradients are recorded
  PyObject* (*empty_like)(PyObject* x, bool contiguous);  // else with the strides of torch.empty_like
  PyObject* (*empty)(PyObject* like, const int64_t* shape, int ndim, Type type);
};

}  // namespace fused
