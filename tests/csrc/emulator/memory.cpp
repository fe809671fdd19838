#include "memory.h"

namespace emu {

// Word by word, and volatile so that it stays so: memcpy is a function of the sanitizer's, and what it touches would
// not count, since what libraries do among themselves must not (tests/csrc/sanitized.py).
void copy_with_zeros(void* to, const void* from, int bytes, int valid_bytes) {
  int done = 0;
  for (; done + 4 <= valid_bytes; done += 4)
    *reinterpret_cast<volatile uint32_t*>(static_cast<char*>(to) + done) =
        *reinterpret_cast<const volatile uint32_t*>(static_cast<const char*>(from) + done);
  for (; done < valid_bytes; ++done)
    static_cast<volatile char*>(to)[done] = static_cast<const volatile char*>(from)[done];
  for (; done < bytes; ++done) static_cast<volatile char*>(to)[done] = 0;
}

uint16_t read_half(const void* from) { return *static_cast<const volatile uint16_t*>(from); }

}  // namespace emu
