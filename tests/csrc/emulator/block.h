#pragma once
// A grid on the CPU: its blocks one after another, each thread of a block a fiber. A thread runs until it has to wait
// for others; then the next that can run is taken, in an order that the environment chooses (read at every launch):
//
//   EMU_ORDER=fwd|rev|rand:SEED|lifo|revlifo   by number, backwards, shuffled; lifo: a warp runs as far ahead of the
//                                              others as barriers let it; the blocks go the same way
//   EMU_ASYNC=lazy|eager                       when asynchronous work is done: at the wait, or where it is issued
//
// A kernel that is right gives the same bits under each.

#include <cstdint>
#include <stdexcept>

#include "copies.h"
#include "fiber.h"
#include "sanitizers.h"
#include "vector_types.h"

namespace emu {

constexpr int kMaxThreads = 1024;
constexpr int kLanes = 32;
constexpr int kNamedBarriers = 16;  // 0 is that of __syncthreads

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

enum class Kind { none, syncthreads, barrier, syncwarp, shuffle, vote, ldmatrix, mma, mbarrier, wgmma };

// What all who meet must agree on.
struct Call {
  Kind kind;
  uint64_t key;  // the mask of a warp's collective, the count of a named barrier ...
  Where where;
};

// A place where a group of threads wait for each other, again and again.
struct Rendezvous {
  int first = 0, count = 0;  // the threads that may come here
  int arrived = 0;
  unsigned generation = 0;
  Call call{};  // of the first that arrived
  // One clock for even and one for odd generations: a thread that leaves late must not learn what others did before
  // they arrived for the next.
  Clock clock[2]{};
};

struct Thread {
  Thread();

  Fiber fiber;
  uint3 index{};
  int linear = 0, lane = 0, warp = 0;
  bool done = true;
  const Rendezvous* waits_at = nullptr;
  Call call{};    // what it waits in
  Copies copies;  // asynchronous ones on their way
};

// The block that runs now.
struct Block {
  uint3 index{};
  dim3 size, grid;
  int threads = 0;
  bool lazy = true;  // EMU_ASYNC
  Rendezvous barrier[kNamedBarriers];
  int votes[2];  // in barrier 0, of even and odd generations
};

extern Block block;
extern Thread* thread;  // the one that runs now

Thread& thread_of_block(int linear);

// Ends the launch with an Error that names the thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Returns once `expected` threads have come. arrive() says whether this one was the last of them; what has to happen
// once goes between the two.
bool arrive(Rendezvous& at, int expected, const Call& call);
void leave(Rendezvous& at, bool was_last, bool orders_memory);

template <class F>
void meet(Rendezvous& at, int expected, const Call& call, bool orders_memory, const F& once) {
  if (orders_memory) publish(at.clock[at.generation & 1]);
  const bool was_last = arrive(at, expected, call);
  if (was_last) once();
  leave(at, was_last, orders_memory);
}

inline void meet(Rendezvous& at, int expected, const Call& call, bool orders_memory) {
  meet(at, expected, call, orders_memory, [] {});
}

// __syncthreads that also counts the threads whose vote is true.
int count_votes(bool vote, const Where& where);

// For what waits otherwise: the running thread goes to sleep at a place, and all who sleep there are woken.
void sleep(const Rendezvous& at, const Call& call);
void wake(const Rendezvous& at);

// A number below `bound`, from EMU_ORDER's seed.
unsigned draw(unsigned bound);
bool is_shuffled();

void run_grid(dim3 grid, dim3 size, size_t shared_bytes, void (*body)(void*), void* argument);

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 size, size_t shared_bytes, const A&... args) {
  const auto body = [&] { kernel(args...); };
  run_grid(
      grid, size, shared_bytes, [](void* p) { (*static_cast<decltype(body)*>(p))(); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace emu
