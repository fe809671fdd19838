#pragma once
// What the bind.cpp files share: Python passes addresses, and a kernel takes one struct of its arguments.

#include <pybind11/pybind11.h>

#include <cstdint>

namespace fused {

// An address as Python holds it; becomes a pointer of the type of the field that it goes to.
struct Address {
  uintptr_t value;

  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

inline Address at(uintptr_t value) { return {value}; }

// The function that Python calls: packs its arguments with `pack` and hands them to the kernel.
template <class Args, class... P>
auto on_cpu(Args (*pack)(P...), void (*launch)(const Args&)) {
  return [=](P... args) { launch(pack(args...)); };
}

// The same with the stream, an address, as one more argument at the end.
template <class Args, class... P>
auto on_cuda(Args (*pack)(P...), void (*launch)(const Args&, void*)) {
  return [=](P... args, uintptr_t stream) { launch(pack(args...), at(stream)); };
}

}  // namespace fused
