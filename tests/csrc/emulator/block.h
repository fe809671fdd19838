#pragma once
// A grid on the CPU: its blocks one after another, each thread of a block a fiber. A thread runs until it has to wait
// for others; then the next that can run is taken, in an order that the environment chooses (read at every launch):
//
//   EMU_ORDER=fwd|rev|rand:SEED|lifo|revlifo   by number, backwards, shuffled; lifo: a warp runs as far ahead of the
//                                              others as barriers let it; the blocks go the same way
//   EMU_ASYNC=lazy|eager                       when asynchronous work is done: at the wait, or where it is issued
//
// A kernel that is right gives the same bits under each.
//
// This is what kernels see. Their translation units may be instrumented by a sanitizer, so what works on the emulator's
// own state stands in .cpp files, which are not.

#include <cstdint>
#include <stdexcept>

#include "vector_types.h"

namespace emu {

constexpr int kMaxThreads = 1024;
constexpr int kLanes = 32;

// What a kernel did wrong, as the exception that its launch throws.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A place in a kernel's source, for messages and to tell one call from another.
struct Where {
  const char* file;
  int line;

  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

#define EMU_HERE ::emu::Where where = ::emu::Where::here()

// Who a thread is.
struct Position {
  uint3 index{};
  int linear = 0, lane = 0, warp = 0;
};

// The block that runs now.
struct Block {
  uint3 index{};
  dim3 size, grid;
  int threads = 0;
  bool lazy = true;  // EMU_ASYNC
};

extern Block block;
extern Position* position;  // of the thread that runs now

// Ends the launch with an Error that names the thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// __syncthreads, and the one that also counts the threads whose vote is true.
void sync_block(const Where& where);
int count_votes(bool vote, const Where& where);

// bar.sync and bar.arrive: `threads` threads of the block come to one of 16 barriers, of which 0 is that of sync_block;
// those that only arrive do not wait.
void sync_named(int barrier, int threads, const Where& where);
void arrive_named(int barrier, int threads, const Where& where);

void run_grid(dim3 grid, dim3 size, size_t shared_bytes, void (*body)(void*), void* argument);

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 size, size_t shared_bytes, const A&... args) {
  const auto body = [&] { kernel(args...); };
  run_grid(
      grid, size, shared_bytes, [](void* p) { (*static_cast<decltype(body)*>(p))(); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace emu
