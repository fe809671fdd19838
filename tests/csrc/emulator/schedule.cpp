#include "schedule.h"

#include <cstdlib>
#include <string>
#include <utility>

namespace emu {

ReadyThreads ready;

namespace {

enum class Order { forward, backward, shuffled };

Order order;
bool last_first;  // who became ready last runs next
uint64_t random_state;

std::string environment(const char* name, const char* otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? text : otherwise;
}

}  // namespace

void read_schedule() {
  const std::string asked = environment("EMU_ORDER", "fwd");
  order = Order::forward;
  last_first = asked == "lifo" || asked == "revlifo";
  if (asked.rfind("rand:", 0) == 0) {
    order = Order::shuffled;
    random_state = std::strtoull(asked.c_str() + 5, nullptr, 10) * 2 + 1;
  } else if (asked == "rev" || asked == "revlifo") {
    order = Order::backward;
  } else if (asked != "fwd" && asked != "lifo") {
    throw Error("EMU_ORDER must be fwd, rev, rand:SEED, lifo or revlifo, got " + asked);
  }
  const std::string when = environment("EMU_ASYNC", "lazy");
  if (when != "lazy" && when != "eager") throw Error("EMU_ASYNC must be lazy or eager, got " + when);
  block.lazy = when == "lazy";
}

bool is_backward() { return order == Order::backward; }
bool is_shuffled() { return order == Order::shuffled; }

unsigned draw(unsigned bound) {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return unsigned(random_state >> 33) % bound;
}

void ReadyThreads::push(int linear) {
  int at = (first_ + count_) % kMaxThreads;
  if (last_first) at = first_ = (first_ + kMaxThreads - 1) % kMaxThreads;
  queue_[at] = linear;
  ++count_;
  if (is_shuffled()) std::swap(queue_[at], queue_[(first_ + int(draw(unsigned(count_)))) % kMaxThreads]);
}

int ReadyThreads::pop() {
  const int linear = queue_[first_];
  first_ = (first_ + 1) % kMaxThreads;
  --count_;
  return linear;
}

}  // namespace emu
