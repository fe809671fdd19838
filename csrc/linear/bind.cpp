// Python's door to linear: packed weights are an object, all else addresses, sizes and strides.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../common/bind.h"
#include "linear.h"
#include "matmul.h"

namespace py = pybind11;

namespace fused {
namespace {

using cpu::Linear;
using cpu::PackedWeight;
using Rows = std::array<int64_t, 2>;    // address and stride
using Matrix = std::array<int64_t, 3>;  // address, and strides of rows and columns

Linear arguments(const PackedWeight& weight, int64_t M, const Rows& x, uintptr_t bias, const Rows& residual,
                 const Rows& y, int activation, int multiplier, uintptr_t scratch) {
  Linear args;
  args.weight = &weight;
  args.M = M;
  args.x = at(uintptr_t(x[0])), args.x_stride = x[1];
  args.bias = at(bias);
  args.residual = at(uintptr_t(residual[0])), args.residual_stride = residual[1];
  args.y = at(uintptr_t(y[0])), args.y_stride = y[1];
  args.activation = static_cast<Activation>(activation);
  args.multiplier = static_cast<Multiplier>(multiplier);
  args.scratch = at(scratch);
  return args;
}

}  // namespace

void register_linear(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<PackedWeight>(m, "PackedWeight", "The weights of a linear layer, packed for the CPU's kernels.")
      .def_readonly("N", &PackedWeight::N)
      .def_readonly("K", &PackedWeight::K)
      .def_readonly("finite", &PackedWeight::finite)
      .def_property_readonly("bytes", &PackedWeight::bytes);
  m.def(
      "pack_weight",
      [](uintptr_t weight, int64_t stride, int64_t N, int64_t K, int form) {
        return cpu::pack_weight(at(weight), stride, N, K, static_cast<WeightForm>(form));
      },
      release());
  m.def(
      "unpack_weight", [](const PackedWeight& weight, uintptr_t out) { cpu::unpack_weight(weight, at(out)); },
      release());
  m.def("linear_scratch", &cpu::linear_scratch, "Bytes of working memory for M rows.");
  m.def("linear_has_multiplier", [](int form, int multiplier) {
    return cpu::has_multiplier(static_cast<WeightForm>(form), static_cast<Multiplier>(multiplier));
  });
  m.def(
      "linear",
      [](const PackedWeight& weight, int64_t M, const Rows& x, uintptr_t bias, const Rows& residual, const Rows& y,
         int activation, int multiplier, uintptr_t scratch) {
        cpu::linear(arguments(weight, M, x, bias, residual, y, activation, multiplier, scratch));
      },
      release());
  m.def("matmul_is_quicker", &cpu::matmul_is_quicker, "Whether matmul is quicker than torch's float32 product here.");
  m.def("matmul_is_quicker_for_few_rows", &cpu::matmul_is_quicker_for_few_rows, "Likewise; of few rows, many weights.");
  m.def(
      "matmul",
      [](const std::array<int64_t, 3>& sizes, int dtype, const Matrix& x, const Matrix& w, uintptr_t bias,
         const Rows& addend, int y_dtype, const Rows& y) {
        cpu::Matmul args;
        args.M = sizes[0], args.N = sizes[1], args.K = sizes[2];
        args.dtype = static_cast<DType>(dtype), args.y_dtype = static_cast<DType>(y_dtype);
        args.x = {at(uintptr_t(x[0])), x[1], x[2]};
        args.w = {at(uintptr_t(w[0])), w[1], w[2]};
        args.bias = at(bias);
        args.addend = at(uintptr_t(addend[0])), args.addend_stride = addend[1];
        args.y = at(uintptr_t(y[0])), args.y_stride = y[1];
        cpu::matmul(args);
      },
      release());
}

}  // namespace fused
