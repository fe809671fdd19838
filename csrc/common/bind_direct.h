#pragma once
// Calls that go from Python's tensors straight to a kernel.
//
// One row of layer norm is 0.1 us of work, and the checks, choices and allocations around it are 8 us in Python. A
// direct call does them here, 1 to 4 us in all, for the usual case: tensors that nobody traces, in shapes and dtypes
// that the kernel takes as they lie, on the CPU or on the current CUDA device. In any other case it returns None, and
// the caller goes the long way round as if nothing had been tried: that knows all cases and says what is wrong with an
// argument. So there is one source of errors, and a direct call may refuse whatever would be tedious to look at here.
//
// Where a gradient is wanted autograd must see the call. Either it returns at once what the backward pass will ask for
// too, and Python hangs a node of torch's C++ on its results (with_torch/); or it returns True, and the op's
// autograd.Function makes it again, keeping that. The backward pass is a direct call as well (<op>_backward_direct).
//
// Tensors are read through the table of C functions that torch exports for this (DLPack's exchange API, torch 2.10 and
// later): a few tens of ns for a tensor, no header and no library of torch's. Without it no call is direct. What was
// compiled with torch's headers is used where it is there, and is quicker (bind_torch_functions.h).

#include <Python.h>

#include <cstdint>
#include <initializer_list>
#include <utility>

#include "dtype.h"

namespace fused::direct {

enum class Element { f32, f16, bf16, i64, i32, boolean, other };

constexpr int kCpuDevice = -1;

// A tensor's memory; shape and strides are the tensor's own. Strides are in elements.
struct View {
  void* data = nullptr;
  const int64_t* shape = nullptr;
  const int64_t* stride = nullptr;
  int ndim = 0;
  Element element = Element::other;
  int device = kCpuDevice;  // or the number of a CUDA device

  bool given() const { return shape != nullptr; }
  bool on_cpu() const { return device == kCpuDevice; }
  int64_t count(int axes) const;  // elements of the first `axes` axes
  int64_t count() const { return count(ndim); }
  int64_t last() const { return shape[ndim - 1]; }
  bool floating() const { return element <= Element::bf16; }
  bool contiguous() const;
  bool dense_last() const { return last() <= 1 || stride[ndim - 1] == 1; }
  bool is_dense(Element type, int64_t size) const { return element == type && contiguous() && count() == size; }
  bool is_vector(int64_t size) const { return ndim == 1 && shape[0] == size && dense_last(); }
  bool same_shape(const View& other) const;
  bool like(const View& other) const { return element == other.element && same_shape(other); }
  DType dtype() const { return static_cast<DType>(element); }  // if floating
};

// Whether calls may be direct here and now: nothing traces, transforms, observes or forces a backend.
bool ready();
bool ready_for_backward();  // whose backend is that of the forward pass

// Whether torch.autocast would leave a product's tensor as it is; and whether there is no autocast.
bool autocast_keeps(PyObject* tensor);
bool no_autocast();

// The tensor's memory in `out`; false if it is no plain tensor on the CPU or on a CUDA device that `add_device` was
// told of, or a gradient with respect to it is wanted. May run Python (a torch function mode sees that requires_grad is
// asked for), so what is only borrowed must be held first. `or_absent`: None is fine too, and leaves `out` as it was.
// `wanted`: a gradient may be wanted, and that is said there.
bool view(PyObject* tensor, View& out, bool* wanted = nullptr);
bool view_or_absent(PyObject* tensor, View& out, bool* wanted = nullptr);

// Whether all that are given are where the first is; and if that is a CUDA device, whether it is the current one.
bool together(std::initializer_list<const View*> views);

// What is asked of a call beside its results: nothing; what the backward pass will ask for; or the latter if a gradient
// is wanted, and then in a list.
enum class Keep { no, yes, if_wanted };
Keep keep(PyObject* argument);  // False, True, None; under a profiler None is False

// A number that Python holds as int or float.
bool number(PyObject* object, double& out);
bool integer(PyObject* object, int64_t& out);  // int alone, and not bool

// An owned reference.
class Ref {
 public:
  explicit Ref(PyObject* object) : object_(object) {}
  Ref(Ref&& other) noexcept : object_(other.release()) {}
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
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
inline Output no_output() { return {Ref(nullptr), View{}}; }
Output given(PyObject* tensor);                           // what an argument is, to be written into
Output empty_like(PyObject* tensor, bool contiguous);     // else with its strides, as torch.empty_like
PyObject* tuple(std::initializer_list<PyObject*> items);  // of borrowed references; nullptr stands for None
PyObject* list(std::initializer_list<PyObject*> items);
Output sum(PyObject* tensor);  // torch's own, whose rounding the long way has too
Output empty(PyObject* like, const int64_t* shape, int ndim,
             Element element);  // f32 or i64; other: the dtype of `like`

// A tensor that came from autograd, as rows that lie dense: itself, or a copy in `held`. False as view().
bool dense_view(PyObject* tensor, View& out, Ref& held);

// What a dropout probability and a seed, or None, mean to a kernel.
struct Dropout {
  double p = 0.0;
  View seed;  // given where p > 0, except in a forward pass that will be made again with one
  bool lacks_seed() const { return p > 0.0 && !seed.given(); }
  const int64_t* data() const { return p > 0.0 ? static_cast<const int64_t*>(seed.data) : nullptr; }
  uint32_t threshold() const;  // see kernels/_philox.py
  float scale() const;
};
bool dropout(PyObject* p, PyObject* seed, Dropout& out);

// Working memory of the calling thread on the CPU, kept for its next call. 64-byte aligned. To be asked for after all
// else that may run Python: any allocation by torch may collect garbage, and a finaliser may call an op, which takes
// the same memory or frees it for more.
float* scratch(int64_t floats);

// Working memory where x is, in `view`: on the CPU scratch(floats), or where that is more than a thread should keep,
// and on CUDA, a tensor made by `like`, which is x's.
Output working_memory(const View& x, PyObject* like, int64_t floats, int64_t most_kept = INT64_MAX);
constexpr int64_t kFewFloats = int64_t(1) << 20;  // 4 MB

// The interpreter runs on while a kernel does.
class Released {
 public:
  Released() : state_(PyEval_SaveThread()) {}
  ~Released() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

// What Python has told of a CUDA device.
struct Device {
  PyObject* object = nullptr;  // torch.device; nullptr: nothing has been told
  int multiprocessors = 0, major = 0, minor = 0;
};
const Device& device_of(const View& x);  // of a view on CUDA
PyObject* device_object(const View& x);  // torch.device, borrowed
void* current_stream(const View& x);     // torch's own, of a view on CUDA

template <class T>
struct Plain {
  using type = T;
};

// Runs the kernel of the device that `x` is on. Without CUDA no view is on another than the CPU: FT_CUDA_KERNEL.
template <class Args>
void run(const View& x, const Args& args, typename Plain<void (*)(const Args&)>::type on_cpu,
         typename Plain<void (*)(const Args&, void*)>::type on_cuda) {
  void* stream = x.on_cpu() ? nullptr : current_stream(x);
  const Released released;
  x.on_cpu() ? on_cpu(args) : on_cuda(args, stream);
}

#ifdef FUSED_WITH_CUDA
#define FT_CUDA_KERNEL(function) &cuda::function
#else
#define FT_CUDA_KERNEL(function) nullptr
#endif

// Returns nullptr where the call is not for it, and a new reference to True where a gradient is wanted.
using Call = PyObject* (*)(PyObject* const* arguments);
// Adds `call`, which takes `count` positional arguments, to the module as a function of that name.
void add(PyObject* module, const char* name, Call call, int count);

// Adds what Python connects torch with (kernels/_direct.py).
void add_connect(PyObject* module);

}  // namespace fused::direct
