#pragma once
// What the sanitizers must be told. The emulator itself is compiled without instrumentation (all but memory.cpp), with
// EMU_ASAN or EMU_TSAN saying what the kernels beside it were compiled with.
//
// ASan knows one stack a thread, so each switch to a fiber is announced. TSan gets one "fiber" a CUDA thread, with a
// clock of its own that a switch does not advance: memory is ordered between two CUDA threads only where the emulator
// says so, with publish() by the one and observe() by the other. A barrier that is missing in a kernel is therefore a
// data race, whatever order the threads happened to run in.

#include <cstddef>

#if defined(EMU_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(EMU_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace emu {

// An address that stands for a clock of TSan; what it holds does not matter.
struct Clock {
  char here;
};

inline void publish([[maybe_unused]] Clock& clock) {
#if defined(EMU_TSAN)
  __tsan_release(&clock);
#endif
}

inline void observe([[maybe_unused]] Clock& clock) {
#if defined(EMU_TSAN)
  __tsan_acquire(&clock);
#endif
}

// Memory that no kernel may touch; ASan alone looks at it.
inline void forbid([[maybe_unused]] void* from, [[maybe_unused]] size_t bytes) {
#if defined(EMU_ASAN)
  __asan_poison_memory_region(from, bytes);
#endif
}

inline void permit([[maybe_unused]] void* from, [[maybe_unused]] size_t bytes) {
#if defined(EMU_ASAN)
  __asan_unpoison_memory_region(from, bytes);
#endif
}

}  // namespace emu
