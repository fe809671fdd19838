#pragma once
// Calls that go from Python's tensors straight to a kernel.
//
// One row of layer norm is 0.1 us of work, and the checks, choices and allocations around it are 8 us in Python. A
// direct call does them here, 1 to 4 us in all, for the usual case: tensors on the CPU that nobody differentiates or
// traces, in shapes and dtypes that the kernel takes as they lie. In any other case it returns None, and the caller
// goes the long way round as if nothing had been tried: that knows all cases and says what is wrong with an argument.
// So there is one source of errors, and a direct call may refuse whatever would be tedious to look at here.
//
// Tensors are read through the table of C functions that torch exports for this (DLPack's exchange API, torch 2.10 and
// later): a few tens of ns for a tensor, no header and no library of torch's. Without it no call is direct.

#include <Python.h>

#include <cstdint>
#include <initializer_list>

#include "dtype.h"

namespace fused::direct {

enum class Element { f32, f16, bf16, i64, i32, boolean, other };

// A tensor's memory; shape and strides are the tensor's own. Strides are in elements.
struct View {
  void* data = nullptr;
  const int64_t* shape = nullptr;
  const int64_t* stride = nullptr;
  int ndim = 0;
  Element element = Element::other;

  bool given() const { return shape != nullptr; }
  int64_t count(int axes) const;  // elements of the first `axes` axes
  int64_t count() const { return count(ndim); }
  int64_t last() const { return shape[ndim - 1]; }
  bool floating() const { return element <= Element::bf16; }
  bool contiguous() const;
  bool dense_last() const { return last() <= 1 || stride[ndim - 1] == 1; }
  bool is_vector(int64_t size) const { return ndim == 1 && shape[0] == size && dense_last(); }
  bool same_shape(const View& other) const;
  DType dtype() const { return static_cast<DType>(element); }  // if floating
};

// Whether calls may be direct here and now: nothing traces, transforms, observes or forces a backend.
bool ready();

// The tensor's memory in `out`; false if it is no plain CPU tensor, or a gradient with respect to it is wanted. May
// run Python (a torch function mode sees that requires_grad is asked for), so what is only borrowed must be held first.
// `or_absent`: None is fine too, and leaves `out` as it was.
bool view(PyObject* tensor, View& out);
bool view_or_absent(PyObject* tensor, View& out);

// A number that Python holds as int or float.
bool number(PyObject* object, double& out);
bool integer(PyObject* object, int64_t& out);  // int alone, and not bool

// An owned reference.
class Ref {
 public:
  explicit Ref(PyObject* object) : object_(object) {}
  Ref(Ref&& other) noexcept : object_(other.release()) {}
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  ~Ref() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_;
};

// What a call throws once a Python error is set, which then goes on to Python.
struct PythonError {};

// A result: memory that torch allocated. Throws PythonError where it could not.
struct Output {
  Ref tensor;
  View view;
};
Output empty_like(PyObject* tensor, bool contiguous);       // else with its strides, as torch.empty_like
PyObject* pair(const Output& first, const Output& second);  // a tuple of both
Output sum(PyObject* tensor);                               // torch's own, whose rounding the long way has too
Output empty(PyObject* like, const int64_t* shape, int ndim,
             Element element);  // f32 or i64; other: the dtype of `like`

// Working memory of the calling thread, kept for its next call. 64-byte aligned.
float* scratch(int64_t floats);

// The interpreter runs on while a kernel does.
class Released {
 public:
  Released() : state_(PyEval_SaveThread()) {}
  ~Released() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

PyObject* cpu_device();  // torch.device("cpu"), borrowed

using Call = PyObject* (*)(PyObject* const* arguments);  // nullptr: not direct
// Adds `call`, which takes `count` positional arguments, to the module as a function of that name.
void add(PyObject* module, const char* name, Call call, int count);

// Adds what Python connects torch with (kernels/_direct.py).
void add_connect(PyObject* module);

}  // namespace fused::direct
