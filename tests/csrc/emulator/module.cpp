// The extension module of one op whose CUDA half is emulated: csrc/<op>/bind.cpp as it is, under a name of its own.

#include <pybind11/pybind11.h>

namespace fused {
void FT_REGISTER(pybind11::module_& m);
}

PYBIND11_MODULE(_emulated, m) { fused::FT_REGISTER(m); }
