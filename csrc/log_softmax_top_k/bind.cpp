// Python's door to log-softmax and top-k. kernels/log_softmax_top_k passes the fields of LogSoftmaxTopK in groups.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "log_softmax_top_k.h"

namespace py = pybind11;

namespace fused {
namespace {

LogSoftmaxTopK arguments(const std::array<int64_t, 4>& sizes, int dtype, const std::array<int64_t, 2>& x,
                         uintptr_t addend, const std::array<uintptr_t, 2>& results,
                         const std::array<uintptr_t, 2>& working) {
  LogSoftmaxTopK args;
  args.M = sizes[0], args.V = sizes[1], args.beams = sizes[2], args.k = sizes[3];
  args.dtype = static_cast<DType>(dtype);
  args.x = reinterpret_cast<const void*>(x[0]), args.x_stride = x[1];
  args.addend = reinterpret_cast<const float*>(addend);
  args.values = reinterpret_cast<float*>(results[0]), args.places = reinterpret_cast<int64_t*>(results[1]);
  args.kept = reinterpret_cast<int32_t*>(working[0]), args.sums = reinterpret_cast<float*>(working[1]);
  return args;
}

}  // namespace

void register_log_softmax_top_k(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "log_softmax_top_k",
      [](const std::array<int64_t, 4>& sizes, int dtype, const std::array<int64_t, 2>& x, uintptr_t addend,
         const std::array<uintptr_t, 2>& results, const std::array<uintptr_t, 2>& working) {
        cpu::log_softmax_top_k(arguments(sizes, dtype, x, addend, results, working));
      },
      release());
#ifdef FUSED_WITH_CUDA
  m.def("log_softmax_top_k_parts_cuda", &cuda::log_softmax_top_k_parts, "Into how many parts a row of V is cut.");
  m.def(
      "log_softmax_top_k_cuda",
      [](const std::array<int64_t, 4>& sizes, int dtype, const std::array<int64_t, 2>& x, uintptr_t addend,
         const std::array<uintptr_t, 2>& results, const std::array<uintptr_t, 2>& working, uintptr_t stream) {
        cuda::log_softmax_top_k(arguments(sizes, dtype, x, addend, results, working), reinterpret_cast<void*>(stream));
      },
      release());
#endif
}

}  // namespace fused
