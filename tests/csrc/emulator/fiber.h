#pragma once
// A fiber: a stack of its own and a place where it goes on. All fibers share one thread of the operating system.

#include <cstddef>

#if !defined(__x86_64__) || defined(EMU_UCONTEXT)
#define EMU_USES_UCONTEXT
#include <ucontext.h>
#endif

namespace emu {

class Fiber {
 public:
  // `body` begins at the first resume() and must never return.
  explicit Fiber(void (*body)());
  Fiber(const Fiber&) = delete;
  ~Fiber();

  void resume();        // runs it until it pauses; called from outside any fiber
  static void pause();  // called by the fiber that runs: resume() returns

  // Runs f with what it touches counted as the host's doing, not this fiber's.
  template <class F>
  static void as_host(const F& f);

 private:
  static void begin();
  static void count_as_host(bool host);

  void (*body_)();
  char* stack_;
#if defined(EMU_USES_UCONTEXT)
  ucontext_t context_;
#else
  void* stack_pointer_;
#endif
  void* asan_stack_ = nullptr;
  void* tsan_fiber_ = nullptr;
};

// Hardware that works beside the threads of a block. What it touches inside act() is its own doing to TSan, ordered
// with what threads do by publish() and observe() alone.
class Agent {
 public:
  Agent();
  Agent(const Agent&) = delete;
  ~Agent();

  template <class F>
  void act(const F& f) {
    begin();
    f();
    end();
  }

 private:
  void begin();
  void end();

  void* tsan_fiber_ = nullptr;
  void* interrupted_ = nullptr;
};

template <class F>
void Fiber::as_host(const F& f) {
  count_as_host(true);
  f();
  count_as_host(false);
}

}  // namespace emu
