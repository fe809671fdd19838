// How Python connects the direct calls with torch, tells them of devices, and finds them in the module.

#include <stdexcept>

#include "bind_direct_torch.h"

namespace fused::direct {

Torch torch;
Names names;
Device devices[kMostDevices];

namespace {

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
  if (!PyArg_ParseTuple(arguments, "OOOOOOOOOOOOOOOOOOOOO", &table, &t.tensor, &t.parameter, &t.device, &t.modes,
                        &t.transforms, &t.tracing, &t.autocast, &t.grad_enabled, &t.autocast_lowers, &t.forced,
                        &t.dispatch, &t.forward_ad, &t.empty_like, &t.large_like, &t.large, &t.contiguous_format,
                        &t.float32, &t.int64, &t.raw_stream, &t.current_device))
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
  t.functions = torch.functions;
  torch = t;
  Py_RETURN_TRUE;
}

PyMethodDef connect_definition = {"connect", connect, METH_VARARGS,
                                  "Tells the direct calls where torch is; false if this torch has not what they need."};

// (TorchFunctions): from now on torch's own C++ does what its Python functions did; (None): these again.
PyObject* use_functions(PyObject* const* arguments) {
  if (arguments[0] == Py_None) {
    torch.functions = nullptr;
    return Py_NewRef(Py_True);
  }
  if (!PyCapsule_IsValid(arguments[0], kTorchFunctions)) return nullptr;
  torch.functions = static_cast<const TorchFunctions*>(PyCapsule_GetPointer(arguments[0], kTorchFunctions));
  return Py_NewRef(Py_True);
}

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
  add(module, "direct_use_functions", &use_functions, 1);
}

}  // namespace fused::direct
