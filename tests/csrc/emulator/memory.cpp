#include "memory.h"

#include <cstring>

namespace emu {

void copy_with_zeros(void* to, const void* from, int bytes, int valid_bytes) {
  char* const target = static_cast<char*>(to);
  if (valid_bytes > 0) std::memcpy(target, from, size_t(valid_bytes));
  if (valid_bytes < bytes) std::memset(target + valid_bytes, 0, size_t(bytes - valid_bytes));
}

uint16_t read_half(const void* from) { return *static_cast<const uint16_t*>(from); }

void write_zeros(void* to, int bytes) { std::memset(to, 0, size_t(bytes)); }

}  // namespace emu
