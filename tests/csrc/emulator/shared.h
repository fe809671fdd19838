#pragma once
// Shared memory: new for every block, as large as was asked for and not a byte more, and filled with NaN.

#include <cstddef>

namespace emu {

constexpr size_t kMaxSharedBytes = 227 << 10;  // what sm_90 lets a block have

void begin_shared(size_t dynamic_bytes);
void end_shared();  // of a block
void end_grid();

char* dynamic_memory();

// The running block's memory of a __shared__ variable, which `key` stands for. It is aligned to `alignment` and to no
// more, as on the device.
void* shared_variable(const void* key, size_t bytes, size_t alignment);

// Where dynamic shared memory ends, for checks; and an address as the device counts it.
size_t dynamic_bytes();

}  // namespace emu

#define EMU_SHARED(Type, name, extent) \
  static char name##_key;              \
  using name##_type = Type extent;     \
  name##_type& name =                  \
      *reinterpret_cast<name##_type*>(::emu::shared_variable(&name##_key, sizeof(name##_type), alignof(name##_type)))
