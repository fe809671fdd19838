#pragma once
// What the direct calls know of torch: what the bind_direct_*.cpp files share, and no op sees.

#include "bind_direct.h"
#include "bind_torch_functions.h"

namespace fused::direct {

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
  const TorchFunctions* functions = nullptr;  // nullptr: not compiled for this torch
  PyObject *tensor, *parameter, *device;      // classes, and torch.device("cpu")
  PyObject *modes, *transforms, *tracing, *autocast, *grad_enabled;
  PyObject* autocast_lowers;        // of a tensor: whether autocast takes it in another dtype in products
  PyObject* forced;                 // a ContextVar
  PyObject *dispatch, *forward_ad;  // the dictionaries of two modules
  PyObject* empty_like;
  PyObject *large_like, *large;  // (tensor, contiguous) and (like, shape, dtype): kernels/memory.py's empty results
  PyObject *contiguous_format, *float32, *int64;
  // Torch's words, since another copy of the CUDA runtime may remember another device. None where torch has no CUDA.
  PyObject* raw_stream;      // of a device's number: the address of its current stream
  PyObject* current_device;  // the number of the current device
};
extern Torch torch;

constexpr int kMostDevices = 64;
extern Device devices[kMostDevices];  // by their numbers

// Names of attributes and keywords.
struct Names {
  PyObject *memory_format, *dtype, *requires_grad, *new_empty, *sum, *contiguous, *observer, *level;
  PyObject *with_format, *with_dtype;  // tuples of keywords
};
extern Names names;

bool truth(PyObject* function);  // what a function without arguments returns; what is no number counts as true

// A tensor's memory; false if it is not described so, or not where a kernel is.
bool memory_of(PyObject* tensor, View& out);

PyObject* numbers(const int64_t* values, int count);  // as a tuple

}  // namespace fused::direct
