#pragma once
// Threads and how they wait for each other, for the emulator's own files.

#include "block.h"
#include "copies.h"
#include "fiber.h"
#include "sanitizers.h"

namespace emu {

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

struct Thread : Position {
  Thread();

  Fiber fiber;
  bool done = true;
  const Rendezvous* waits_at = nullptr;
  Call call{};    // what it waits in
  Copies copies;  // asynchronous ones on their way
};

Thread& thread_of_block(int linear);
inline Thread& running() { return static_cast<Thread&>(*position); }

// meet() returns when `expected` threads have come; the last one calls `once` before any of them goes on. It is two
// steps: arrive() says whether this thread was the last, and leave() waits for the others.
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

// For what waits otherwise: the running thread goes to sleep at a place, and all who sleep there are woken.
void sleep(const Rendezvous& at, const Call& call);
void wake(const Rendezvous& at);

// Back to the scheduler; who goes on after another thread has failed throws, so that its stack unwinds.
void pause_thread();

void begin_barriers();  // of a block

const char* name(Kind kind);
const char* file_name(const Where& where);

}  // namespace emu
