// What a direct call is called with: tensors' memory, numbers, and the state of the process around them.

#include <algorithm>

#include "bind_direct_torch.h"

namespace fused::direct {
namespace {

Element element_of(const DlTensor& x) {
  if (x.lanes != 1) return Element::other;
  switch (x.code) {
    case kFloat:
      return x.bits == 32 ? Element::f32 : x.bits == 16 ? Element::f16 : Element::other;
    case kBfloat:
      return x.bits == 16 ? Element::bf16 : Element::other;
    case kInt:
      return x.bits == 64 ? Element::i64 : x.bits == 32 ? Element::i32 : Element::other;
    case kBool:
      return x.bits == 8 ? Element::boolean : Element::other;
    default:
      return Element::other;
  }
}

bool traced() { return truth(torch.modes) || truth(torch.transforms) || truth(torch.tracing); }

bool in_forward_mode() {
  PyObject* level = PyDict_GetItemWithError(torch.forward_ad, names.level);  // -1 outside of forward-mode derivatives
  return level == nullptr || PyLong_AsLong(level) >= 0;
}

}  // namespace

bool truth(PyObject* function) {
  const Ref result(PyObject_CallNoArgs(function));
  if (result.get() == nullptr) throw PythonError{};
  if (result.get() == Py_True) return true;
  if (result.get() == Py_False || result.get() == Py_None) return false;
  const int64_t number = PyLong_AsLongLong(result.get());
  if (PyErr_Occurred()) PyErr_Clear();
  return number != 0;
}

bool memory_of(PyObject* tensor, View& out) {
  DlTensor x;
  if (torch.exchange->tensor_from_object(tensor, &x) != 0) {  // sparse, quantized: not described so
    PyErr_Clear();
    return false;
  }
  if (x.strides == nullptr && x.ndim > 0) return false;
#ifdef FT_EMULATED  // the device of tests/csrc/emulator, whose memory is the CPU's
  if (devices[0].object != nullptr && x.device_type == kCpu) x.device_type = kCuda, x.device_id = 0;
#endif
  if (x.device_type == kCuda) {
    if (x.device_id < 0 || x.device_id >= kMostDevices || devices[x.device_id].object == nullptr) return false;
    out.device = x.device_id;
  } else if (x.device_type != kCpu) {
    return false;
  }
  out.data = static_cast<char*>(x.data) + x.byte_offset;
  out.shape = x.shape, out.stride = x.strides, out.ndim = x.ndim;
  out.element = element_of(x);
  return true;
}

int64_t View::count(int axes) const {
  int64_t elements = 1;
  for (int axis = 0; axis < axes; ++axis) elements *= shape[axis];
  return elements;
}

bool View::contiguous() const {
  int64_t expected = 1;
  for (int axis = ndim - 1; axis >= 0; --axis) {
    if (shape[axis] != 1 && stride[axis] != expected) return false;
    expected *= shape[axis];
  }
  return true;
}

bool View::same_shape(const View& other) const {
  if (ndim != other.ndim) return false;
  for (int axis = 0; axis < ndim; ++axis)
    if (shape[axis] != other.shape[axis]) return false;
  return true;
}

bool ready_for_backward() { return !traced() && !in_forward_mode(); }

bool no_autocast() { return !truth(torch.autocast); }

bool autocast_keeps(PyObject* tensor) {
  if (no_autocast()) return true;
  const Ref lowers(PyObject_CallOneArg(torch.autocast_lowers, tensor));
  if (lowers.get() == nullptr) throw PythonError{};
  return lowers.get() == Py_False;
}

bool ready() {
  if (traced()) return false;
  PyObject* forced = nullptr;
  if (PyContextVar_Get(torch.forced, nullptr, &forced) != 0) {
    PyErr_Clear();
    return false;
  }
  const Ref held(forced);
  if (forced != nullptr && forced != Py_None) return false;
  return PyDict_GetItemWithError(torch.dispatch, names.observer) == Py_None && !in_forward_mode();
}

bool view(PyObject* tensor, View& out, bool* wanted) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  if (type != torch.tensor && type != torch.parameter) return false;
  if (!memory_of(tensor, out)) return false;
  if (out.element > Element::bf16) return true;  // no gradient
  if (torch.functions != nullptr) {
    if (!torch.functions->wants_gradient(tensor)) return true;
    if (wanted != nullptr) *wanted = true;
    return wanted != nullptr;
  }
  if (!truth(torch.grad_enabled)) return true;
  const Ref required(PyObject_GetAttr(tensor, names.requires_grad));
  if (required.get() == nullptr) throw PythonError{};  // a Ctrl-C, say
  if (required.get() == Py_False) return true;
  if (wanted != nullptr) *wanted = true;
  return wanted != nullptr;
}

bool view_or_absent(PyObject* tensor, View& out, bool* wanted) {
  return tensor == Py_None || view(tensor, out, wanted);
}

bool dense_view(PyObject* tensor, View& out, Ref& held) {
  if (!view(tensor, out)) return false;
  if (out.contiguous()) return true;
  PyObject* arguments[2] = {nullptr, tensor};
  constexpr size_t one = 1 | PY_VECTORCALL_ARGUMENTS_OFFSET;
  held = Ref(PyObject_VectorcallMethod(names.contiguous, arguments + 1, one, nullptr));
  if (held.get() == nullptr) throw PythonError{};
  return view(held.get(), out);
}

bool dropout(PyObject* p, PyObject* seed, Dropout& out) {
  if (!number(p, out.p) || !(out.p >= 0.0 && out.p <= 1.0) || !view_or_absent(seed, out.seed)) return false;
  return !out.seed.given() || (out.seed.element == Element::i64 && out.seed.count() == 1);
}

uint32_t Dropout::threshold() const {
  return p > 0.0 ? uint32_t(std::min<uint64_t>(uint64_t(p * 4294967296.0), 4294967295u)) : 0;
}

float Dropout::scale() const { return p >= 1.0 ? 0.0f : float(1.0 / (1.0 - p)); }

bool together(std::initializer_list<const View*> views) {
  const int device = (*views.begin())->device;
  for (const View* x : views)
    if (x->given() && x->device != device) return false;
  if (device == kCpuDevice) return true;
  const Ref number(PyObject_CallNoArgs(torch.current_device));
  if (number.get() == nullptr) throw PythonError{};
  const long current = PyLong_AsLong(number.get());
  if (PyErr_Occurred()) throw PythonError{};
  return current == device;
}

Keep keep(PyObject* argument) {
  if (argument == Py_True) return Keep::yes;
  // a profile should name the op, as the autograd.Function does
  if (argument == Py_None && !(torch.functions != nullptr && torch.functions->is_profiled())) return Keep::if_wanted;
  return Keep::no;
}

bool number(PyObject* object, double& out) {
  if (PyFloat_CheckExact(object)) {
    out = PyFloat_AS_DOUBLE(object);
    return true;
  }
  int64_t whole;
  if (!integer(object, whole)) return false;
  out = double(whole);
  return true;
}

bool integer(PyObject* object, int64_t& out) {
  if (!PyLong_CheckExact(object)) return false;
  out = PyLong_AsLongLong(object);
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

}  // namespace fused::direct
