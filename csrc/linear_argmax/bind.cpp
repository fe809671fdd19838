// Python's door to linear_argmax. ScreenedLinear keeps alive what the address of the bias is of.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../common/bind.h"
#include "linear_argmax.h"

namespace py = pybind11;

namespace fused {

void register_linear_argmax(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<cpu::Screen>(m, "Screen", "A float32 weight and its int8 form, which bounds the results of the former.")
      .def(py::init([](const cpu::PackedWeight& weight, const cpu::PackedWeight& rounded, uintptr_t bias) {
             return cpu::make_screen(weight, rounded, at(bias));
           }),
           release())
      .def_property_readonly("bytes", &cpu::Screen::bytes)
      .def_property_readonly("most_rows", &cpu::Screen::most_rows);
  m.def(
      "linear_argmax",
      [](const cpu::Screen& screen, int64_t M, const std::array<int64_t, 2>& x, uintptr_t values, uintptr_t places,
         int levels) {
        cpu::LinearArgmax args;
        args.screen = &screen;
        args.M = M, args.levels = levels;
        args.x = at(uintptr_t(x[0])), args.x_stride = x[1];
        args.values = at(values), args.places = at(places);
        return cpu::linear_argmax(args);
      },
      py::arg("screen"), py::arg("M"), py::arg("x"), py::arg("values"), py::arg("places"), py::arg("levels") = 0,
      release());
}

}  // namespace fused
