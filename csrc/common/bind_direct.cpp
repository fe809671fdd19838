#include "bind_direct.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <stdexcept>

namespace fused::direct {
namespace {

// DLPack's exchange API, version 1: the layout that dlpack.h fixes.
struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
constexpr int32_t kCpu = 1, kCuda = 2;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6;

struct Exchange {
  uint32_t major, minor;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, DlTensor* out);
  void* current_stream;
};

// Owned references to what torch and this package say about the state of the process; set once, by `connect`.
struct Torch {
  const Exchange* exchange = nullptr;
  PyObject *tensor, *parameter, *device;  // classes, and torch.device("cpu")
  PyObject *modes, *transforms, *tracing, *autocast, *grad_enabled;
  PyObject* autocast_lowers;        // of a tensor: whether autocast takes it in another dtype in products
  PyObject* forced;                 // a ContextVar
  PyObject *dispatch, *forward_ad;  // the dictionaries of two modules
  PyObject* empty_like;
  PyObject *contiguous_format, *float32, *int64;
  // Torch's words, since another copy of the CUDA runtime may remember another device. None where torch has no CUDA.
  PyObject* raw_stream;      // of a device's number: the address of its current stream
  PyObject* current_device;  // the number of the current device
} torch;

constexpr int kMostDevices = 64;
Device devices[kMostDevices];

struct {
  PyObject *memory_format, *dtype, *requires_grad, *new_empty, *sum, *contiguous, *observer, *level;
  PyObject *with_format, *with_dtype;  // tuples of keywords
} names;

bool truth(PyObject* function) {  // what a function without arguments returns; what is no number counts as true
  const Ref result(PyObject_CallNoArgs(function));
  if (result.get() == nullptr) throw PythonError{};
  if (result.get() == Py_True) return true;
  if (result.get() == Py_False || result.get() == Py_None) return false;
  const int64_t number = PyLong_AsLongLong(result.get());
  if (PyErr_Occurred()) PyErr_Clear();
  return number != 0;
}

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

Output taken(PyObject* tensor) {
  Output out{Ref(tensor), View{}};
  if (tensor == nullptr) throw PythonError{};
  if (!memory_of(tensor, out.view)) {
    PyErr_SetString(PyExc_RuntimeError, "the memory of a result lies on another device than its inputs");
    throw PythonError{};
  }
  return out;
}

struct Method {
  PyMethodDef definition;
  Call call;
  int count;
};

// The Method travels as the function's `self`, in a capsule.
PyObject* guarded(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  const auto* method = static_cast<const Method*>(PyCapsule_GetPointer(self, nullptr));
  if (count != method->count) {
    PyErr_Format(PyExc_TypeError, "%s takes %d arguments, got %zd", method->definition.ml_name, method->count, count);
    return nullptr;
  }
  if (torch.exchange == nullptr) Py_RETURN_NONE;
  try {
    PyObject* result = method->call(arguments);
    if (result != nullptr) return result;
    Py_RETURN_NONE;
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// (exchange table, then the fields of `torch` in their order). Called once, while the module is imported.
PyObject* connect(PyObject*, PyObject* arguments) {
  PyObject* table;
  Torch t;
  if (!PyArg_ParseTuple(arguments, "OOOOOOOOOOOOOOOOOOO", &table, &t.tensor, &t.parameter, &t.device, &t.modes,
                        &t.transforms, &t.tracing, &t.autocast, &t.grad_enabled, &t.autocast_lowers, &t.forced,
                        &t.dispatch, &t.forward_ad, &t.empty_like, &t.contiguous_format, &t.float32, &t.int64,
                        &t.raw_stream, &t.current_device))
    return nullptr;
  constexpr const char* name = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(table, name)) Py_RETURN_FALSE;
  const auto* exchange = static_cast<const Exchange*>(PyCapsule_GetPointer(table, name));
  if (exchange->major != 1 || exchange->tensor_from_object == nullptr) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments); ++i) Py_INCREF(PyTuple_GET_ITEM(arguments, i));
  names.memory_format = PyUnicode_InternFromString("memory_format");
  names.dtype = PyUnicode_InternFromString("dtype");
  names.requires_grad = PyUnicode_InternFromString("requires_grad");
  names.new_empty = PyUnicode_InternFromString("new_empty");
  names.sum = PyUnicode_InternFromString("sum");
  names.contiguous = PyUnicode_InternFromString("contiguous");
  names.observer = PyUnicode_InternFromString("_observer");
  names.level = PyUnicode_InternFromString("_current_level");
  names.with_format = PyTuple_Pack(1, names.memory_format);
  names.with_dtype = PyTuple_Pack(1, names.dtype);
  if (PyErr_Occurred()) return nullptr;
  t.exchange = exchange;
  torch = t;
  Py_RETURN_TRUE;
}

PyMethodDef connect_definition = {"connect", connect, METH_VARARGS,
                                  "Tells the direct calls where torch is; false if this torch has not what they need."};

// (number, torch.device, multiprocessors, compute capability): from now on calls on this device may be direct.
PyObject* add_device(PyObject* const* arguments) {
  int64_t number, told[3];
  for (int i = 0; i < 3; ++i)
    if (!integer(arguments[2 + i], told[i])) return nullptr;
  if (!integer(arguments[0], number) || number < 0 || number >= kMostDevices || torch.raw_stream == Py_None ||
      torch.current_device == Py_None)
    return nullptr;
#ifdef FUSED_WITH_CUDA
  devices[number] = {Py_NewRef(arguments[1]), int(told[0]), int(told[1]), int(told[2])};
  return Py_NewRef(Py_True);
#else
  return nullptr;
#endif
}

PyObject* numbers(const int64_t* values, int count) {
  PyObject* tuple = PyTuple_New(count);
  if (tuple == nullptr) throw PythonError{};
  for (int i = 0; i < count; ++i) PyTuple_SET_ITEM(tuple, i, PyLong_FromLongLong(values[i]));
  return tuple;
}

// (address, Element, shape, strides) of a tensor that a direct call would take.
PyObject* described(PyObject* const* arguments) {
  View x;
  if (!view(arguments[0], x)) return nullptr;
  const Ref shape(numbers(x.shape, x.ndim)), stride(numbers(x.stride, x.ndim));
  const auto address = static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(x.data));
  PyObject* all = Py_BuildValue("(KiOO)", address, static_cast<int>(x.element), shape.get(), stride.get());
  if (all == nullptr) throw PythonError{};
  return all;
}

PyObject* is_ready(PyObject* const*) { return no_autocast() && ready() ? Py_NewRef(Py_True) : nullptr; }

void add_object(PyObject* module, const char* name, PyObject* function) {
  if (function == nullptr || PyModule_AddObject(module, name, function) != 0) throw PythonError{};
}

}  // namespace

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

namespace {

bool traced() { return truth(torch.modes) || truth(torch.transforms) || truth(torch.tracing); }

bool in_forward_mode() {
  PyObject* level = PyDict_GetItemWithError(torch.forward_ad, names.level);  // -1 outside of forward-mode derivatives
  return level == nullptr || PyLong_AsLong(level) >= 0;
}

}  // namespace

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

Output working_memory(const View& x, PyObject* like, int64_t floats, int64_t most_kept) {
  if (!x.on_cpu() || floats > most_kept) return empty(like, &floats, 1, Element::f32);
  Output memory = no_output();
  memory.view.data = scratch(floats);
  return memory;
}

const Device& device_of(const View& x) { return devices[x.device]; }

PyObject* device_object(const View& x) { return x.on_cpu() ? torch.device : devices[x.device].object; }

void* current_stream(const View& x) {
  const Ref number(PyLong_FromLong(x.device));
  const Ref address(number.get() == nullptr ? nullptr : PyObject_CallOneArg(torch.raw_stream, number.get()));
  if (address.get() == nullptr) throw PythonError{};
  void* stream = PyLong_AsVoidPtr(address.get());
  if (PyErr_Occurred()) throw PythonError{};
  return stream;
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

Output given(PyObject* tensor) { return taken(Py_NewRef(tensor)); }

Output empty_like(PyObject* tensor, bool contiguous) {
  PyObject* arguments[3] = {nullptr, tensor, torch.contiguous_format};
  constexpr size_t one = 1 | PY_VECTORCALL_ARGUMENTS_OFFSET;
  PyObject* keywords = contiguous ? names.with_format : nullptr;
  return taken(PyObject_Vectorcall(torch.empty_like, arguments + 1, one, keywords));
}

Output empty(PyObject* like, const int64_t* shape, int ndim, Element element) {
  const Ref sizes(numbers(shape, ndim));
  PyObject* keywords = element == Element::f32 || element == Element::i64 ? names.with_dtype : nullptr;
  PyObject* arguments[4] = {nullptr, like, sizes.get(), element == Element::i64 ? torch.int64 : torch.float32};
  constexpr size_t two = 2 | PY_VECTORCALL_ARGUMENTS_OFFSET;
  return taken(PyObject_VectorcallMethod(names.new_empty, arguments + 1, two, keywords));
}

Output sum(PyObject* tensor) {
  PyObject* arguments[2] = {nullptr, tensor};
  constexpr size_t one = 1 | PY_VECTORCALL_ARGUMENTS_OFFSET;
  return taken(PyObject_VectorcallMethod(names.sum, arguments + 1, one, nullptr));
}

PyObject* tuple(std::initializer_list<PyObject*> items) {
  PyObject* all = PyTuple_New(Py_ssize_t(items.size()));
  if (all == nullptr) throw PythonError{};
  Py_ssize_t i = 0;
  for (PyObject* item : items) PyTuple_SET_ITEM(all, i++, Py_NewRef(item == nullptr ? Py_None : item));
  return all;
}

float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<float[], Free> memory;
  thread_local int64_t held = 0;
  if (floats > held) {
    memory.reset();
    held = 0;
    const size_t bytes = (size_t(floats) * sizeof(float) + 63) / 64 * 64;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!memory) throw std::bad_alloc();
    held = floats;
  }
  return memory.get();
}

void add(PyObject* module, const char* name, Call call, int count) {
  auto* method = new Method{{name, nullptr, METH_FASTCALL, nullptr}, call, count};  // as long as the process
  method->definition.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&guarded));
  const Ref self(PyCapsule_New(method, nullptr, nullptr));
  if (self.get() == nullptr) throw PythonError{};
  add_object(module, name, PyCFunction_New(&method->definition, self.get()));
}

void add_connect(PyObject* module) {
  add_object(module, "connect", PyCFunction_New(&connect_definition, nullptr));
  add(module, "direct_is_ready", &is_ready, 0);
  add(module, "direct_view", &described, 1);
  add(module, "direct_device", &add_device, 5);
}

}  // namespace fused::direct
