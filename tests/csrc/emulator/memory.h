#pragma once
// What the emulated instructions read and write in a kernel's memory. memory.cpp alone of the emulator is compiled with
// the sanitizers' instrumentation: these accesses count as the kernel's own.

#include <cstdint>

namespace emu {

// `bytes` bytes, of which those beyond valid_bytes are zeros and not read.
void copy_with_zeros(void* to, const void* from, int bytes, int valid_bytes);

uint16_t read_half(const void* from);

}  // namespace emu
