#pragma once
// Which thread runs next, as EMU_ORDER and EMU_ASYNC (block.h) have it.

#include "block.h"

namespace emu {

void read_schedule();  // from the environment; an Error if it makes no sense

bool is_backward();
bool is_shuffled();
unsigned draw(unsigned bound);  // a number below it, from EMU_ORDER's seed

// f(i) for 0 ... count - 1, backwards if that is the order.
template <class F>
void in_order(int count, const F& f) {
  for (int i = 0; i < count; ++i) f(is_backward() ? count - 1 - i : i);
}

// Threads that can run, in the order in which they will.
class ReadyThreads {
 public:
  void clear() { first_ = count_ = 0; }
  bool empty() const { return count_ == 0; }
  void push(int linear);
  int pop();

 private:
  int queue_[kMaxThreads];
  int first_ = 0, count_ = 0;
};

extern ReadyThreads ready;

}  // namespace emu
