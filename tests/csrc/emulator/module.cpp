// The extension module of one op whose CUDA half is emulated: csrc/<op>/bind.cpp as it is, under a name of its own, and
// the op's direct calls, for which the emulator is a device like any other once they are told of it.

#include <pybind11/pybind11.h>

#include "common/bind_direct.h"

namespace fused {
void FT_REGISTER(pybind11::module_& m);
#ifdef FT_DIRECT
namespace direct {
void FT_DIRECT(PyObject* module);
}
#endif
}  // namespace fused

PYBIND11_MODULE(_emulated, m) {
  fused::FT_REGISTER(m);
#ifdef FT_DIRECT
  fused::direct::add_connect(m.ptr());
  fused::direct::FT_DIRECT(m.ptr());
#endif
}
