// What a direct call returns, the memory it works in, and where its kernel is launched.

#include <cstdlib>
#include <memory>

#include "bind_direct_torch.h"

namespace fused::direct {
namespace {

// From here on malloc has a result from the system, page by page: kernels/memory.py has it instead, which leaves to
// torch what it need not have.
constexpr int64_t kLargeBytes = int64_t(1) << 22, kMostBytes = 8;  // of an element

int64_t bytes_of(Element element) {
  switch (element) {
    case Element::f16:
    case Element::bf16:
      return 2;
    case Element::i64:
      return 8;
    case Element::boolean:
      return 1;
    default:
      return 4;
  }
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

}  // namespace

PyObject* numbers(const int64_t* values, int count) {
  PyObject* tuple = PyTuple_New(count);
  if (tuple == nullptr) throw PythonError{};
  for (int i = 0; i < count; ++i) PyTuple_SET_ITEM(tuple, i, PyLong_FromLongLong(values[i]));
  return tuple;
}

Output given(PyObject* tensor) { return taken(Py_NewRef(tensor)); }

Output empty_like(PyObject* tensor, bool contiguous) {
  View x;
  if (memory_of(tensor, x) && x.on_cpu() && x.count() * bytes_of(x.element) >= kLargeBytes) {
    PyObject* arguments[3] = {nullptr, tensor, contiguous ? Py_True : Py_False};
    return taken(PyObject_Vectorcall(torch.large_like, arguments + 1, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
  }
  if (torch.functions != nullptr) return taken(torch.functions->empty_like(tensor, contiguous));
  PyObject* arguments[3] = {nullptr, tensor, torch.contiguous_format};
  constexpr size_t one = 1 | PY_VECTORCALL_ARGUMENTS_OFFSET;
  PyObject* keywords = contiguous ? names.with_format : nullptr;
  return taken(PyObject_Vectorcall(torch.empty_like, arguments + 1, one, keywords));
}

Output empty(PyObject* like, const int64_t* shape, int ndim, Element element) {
  int64_t count = 1;
  for (int i = 0; i < ndim; ++i) count *= shape[i];
  View x;
  if (count >= kLargeBytes / kMostBytes && memory_of(like, x) && x.on_cpu()) {
    const Ref sizes(numbers(shape, ndim));
    PyObject* const dtype = element == Element::f32 ? torch.float32 : element == Element::i64 ? torch.int64 : Py_None;
    PyObject* arguments[4] = {nullptr, like, sizes.get(), dtype};
    return taken(PyObject_Vectorcall(torch.large, arguments + 1, 3 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
  }
  if (torch.functions != nullptr) {
    using Type = TorchFunctions::Type;
    const Type type = element == Element::f32 ? Type::f32 : element == Element::i64 ? Type::i64 : Type::same;
    return taken(torch.functions->empty(like, shape, ndim, type));
  }
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

PyObject* list(std::initializer_list<PyObject*> items) {
  PyObject* all = PyList_New(Py_ssize_t(items.size()));
  if (all == nullptr) throw PythonError{};
  Py_ssize_t i = 0;
  for (PyObject* item : items) PyList_SET_ITEM(all, i++, Py_NewRef(item == nullptr ? Py_None : item));
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

}  // namespace fused::direct
