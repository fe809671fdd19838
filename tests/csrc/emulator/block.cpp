#include "block.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "hopper.h"
#include "shared.h"
#include "thread.h"
#include "warp.h"

namespace emu {

Block block;
Position* position = nullptr;

namespace {

constexpr int kNamedBarriers = 16;

// In the order of Kind.
constexpr const char* kNames[] = {"running", "__syncthreads", "bar.sync", "__syncwarp", "__shfl_sync",
                                  "a vote",  "ldmatrix",      "mma.sync", "mbarrier",   "wgmma"};

const char* name(Kind kind) { return kNames[int(kind)]; }

const char* file_name(const Where& where) {
  const char* slash = std::strrchr(where.file, '/');
  return slash ? slash + 1 : where.file;
}

// Thrown into the threads that still wait when another has failed, so that their stacks unwind.
struct Cancelled {};

// ---------------------------------------------------------------- order

enum class Order { forward, backward, shuffled };

Order order;
bool last_first;  // who became ready last runs next
uint64_t random_state;

void read_order() {
  const char* text = std::getenv("EMU_ORDER");
  const std::string asked = text && *text ? text : "fwd";
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
  const char* async = std::getenv("EMU_ASYNC");
  const std::string when = async && *async ? async : "lazy";
  if (when != "lazy" && when != "eager") throw Error("EMU_ASYNC must be lazy or eager, got " + when);
  block.lazy = when == "lazy";
}

// Threads that can run, in the order in which they will.
class Ready {
 public:
  void clear() { first_ = count_ = 0; }
  bool empty() const { return count_ == 0; }

  void push(int linear) {
    int at = (first_ + count_) % kMaxThreads;
    if (last_first) at = first_ = (first_ + kMaxThreads - 1) % kMaxThreads;
    queue_[at] = linear;
    ++count_;
    if (order == Order::shuffled) std::swap(queue_[at], queue_[(first_ + int(draw(unsigned(count_)))) % kMaxThreads]);
  }

  int pop() {
    const int linear = queue_[first_];
    first_ = (first_ + 1) % kMaxThreads;
    --count_;
    return linear;
  }

 private:
  int queue_[kMaxThreads];
  int first_ = 0, count_ = 0;
};

Ready ready;

// f(i) for 0 ... count - 1, backwards if that is the order.
template <class F>
void in_order(int count, const F& f) {
  for (int i = 0; i < count; ++i) f(order == Order::backward ? count - 1 - i : i);
}

// ---------------------------------------------------------------- threads

// Blocks take the sets in turn. TSan sees a thread of one set as one thread all along, so races between blocks that
// are as many apart as there are sets would escape it; with one set none between blocks were found.
#if defined(EMU_TSAN)
constexpr int kSets = 3;
#else
constexpr int kSets = 1;
#endif

std::vector<std::unique_ptr<Thread>> sets[kSets];
std::vector<std::unique_ptr<Thread>>* threads = &sets[0];

void (*kernel_body)(void*);
void* kernel_argument;
std::string error;  // the first of this launch
bool cancelling;
Rendezvous barriers[kNamedBarriers];  // 0 is that of __syncthreads
int votes_at_barrier[2];              // in barrier 0, of even and odd generations
Clock launched, ended;                // what the host did before the launch, what the threads did before it ended

void record(const std::string& what) {
  if (error.empty()) error = what;
}

std::string here() {
  char text[128];
  if (position == nullptr) {
    std::snprintf(text, sizeof text, "block (%u, %u, %u): ", block.index.x, block.index.y, block.index.z);
  } else {
    std::snprintf(text, sizeof text, "block (%u, %u, %u) thread (%u, %u, %u): ", block.index.x, block.index.y,
                  block.index.z, position->index.x, position->index.y, position->index.z);
  }
  return text;
}

// What every fiber does: one thread of a kernel after another.
void live() {
  for (;;) {
    observe(launched);
    try {
      if (!cancelling) kernel_body(kernel_argument);
      if (running().copies.pending()) record(here() + "ended with copies (cp.async) that it did not wait for");
    } catch (const Cancelled&) {
    } catch (const std::exception& failure) {
      record(failure.what());
    }
    publish(ended);
    running().done = true;
    Fiber::pause();
  }
}

void pause() {
  Fiber::pause();
  if (cancelling) throw Cancelled();
}

void resume(Thread& next) {
  position = &next;
  next.fiber.resume();
  position = nullptr;
}

// ---------------------------------------------------------------- blocks

void describe_deadlock(int alive) {
  for (int i = 0; i < block.threads; ++i) {
    const Thread& waiting = thread_of_block(i);
    if (waiting.done) continue;
    char text[256];
    std::snprintf(text, sizeof text, "deadlock, %d of %d threads have not ended; thread %d waits in %s at %s:%d", alive,
                  block.threads, i, name(waiting.call.kind), file_name(waiting.call.where), waiting.call.where.line);
    return record(here() + text);
  }
}

int start_threads() {
  ready.clear();
  for (int i = 0; i < block.threads; ++i) {
    Thread& t = thread_of_block(i);
    t.linear = i;
    t.lane = i % kLanes;
    t.warp = i / kLanes;
    t.index = {i % block.size.x, i / block.size.x % block.size.y, i / (block.size.x * block.size.y)};
    t.done = false;
    t.waits_at = nullptr;
    t.copies.clear();
  }
  in_order(block.threads, [](int i) { ready.push(i); });
  return block.threads;
}

void run_block(size_t shared_bytes) {
  for (Rendezvous& barrier : barriers) barrier = {0, block.threads};
  begin_shared(shared_bytes);
  begin_warps();
  begin_hopper();
  int alive = start_threads();
  while (error.empty() && alive > 0) {
    if (ready.empty() && !progress_hopper()) break;
    if (ready.empty()) continue;
    Thread& next = thread_of_block(ready.pop());
    resume(next);
    alive -= next.done;
  }
  if (error.empty() && alive > 0) describe_deadlock(alive);
  cancelling = true;
  for (int i = 0; i < block.threads; ++i)
    if (!thread_of_block(i).done) resume(thread_of_block(i));
  cancelling = false;
  end_shared();
}

void check_launch(dim3 grid, dim3 size, size_t shared_bytes) {
  const uint64_t count = uint64_t(size.x) * size.y * size.z;
  if (count < 1 || count > kMaxThreads) throw Error("a block has 1 to 1024 threads, not " + std::to_string(count));
  if (grid.x < 1 || grid.y < 1 || grid.z < 1) throw Error("a grid has at least one block");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) throw Error("the grid is larger than CUDA takes");
  if (shared_bytes > kMaxSharedBytes)
    throw Error("a block has at most 227 KiB of shared memory, not " + std::to_string(shared_bytes) + " bytes");
}

}  // namespace

Thread::Thread() : fiber(&live) {}

Thread& thread_of_block(int linear) { return *(*threads)[size_t(linear)]; }

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Error(here() + text);
}

unsigned draw(unsigned bound) {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return unsigned(random_state >> 33) % bound;
}

bool is_shuffled() { return order == Order::shuffled; }

void sleep(const Rendezvous& at, const Call& call) {
  running().call = call;
  running().waits_at = &at;
  pause();
}

void wake(const Rendezvous& at) {
  const int count = std::min(at.count, block.threads - at.first);
  in_order(count, [&](int i) {
    Thread& t = thread_of_block(at.first + i);
    if (t.waits_at != &at) return;
    t.waits_at = nullptr;
    ready.push(t.linear);
  });
}

bool arrive(Rendezvous& at, int expected, const Call& call) {
  if (at.arrived == 0) {
    at.call = call;
  } else if (at.call.kind != call.kind || at.call.key != call.key || at.call.where.line != call.where.line ||
             std::strcmp(at.call.where.file, call.where.file) != 0) {
    fail("divergent: it is in %s at %s:%d, and others of its group in %s at %s:%d (keys %llx and %llx)",
         name(call.kind), file_name(call.where), call.where.line, name(at.call.kind), file_name(at.call.where),
         at.call.where.line, static_cast<unsigned long long>(call.key), static_cast<unsigned long long>(at.call.key));
  }
  running().call = call;
  running().waits_at = &at;
  return ++at.arrived == expected;
}

void leave(Rendezvous& at, bool was_last, bool orders_memory) {
  Clock& clock = at.clock[at.generation & 1];
  if (was_last) {
    at.arrived = 0;
    ++at.generation;
    wake(at);
  }
  pause();
  if (orders_memory) observe(clock);
}

void sync_block(const Where& where) { meet(barriers[0], block.threads, {Kind::syncthreads, 0, where}, true); }

int count_votes(bool vote, const Where& where) {
  Rendezvous& at = barriers[0];
  int& votes = votes_at_barrier[at.generation & 1];  // nobody is left who might read those of two generations ago
  if (at.arrived == 0) votes = 0;
  votes += vote;
  meet(at, block.threads, {Kind::syncthreads, 1, where}, true);
  return votes;
}

void sync_named(int barrier, int threads, const Where& where) {
  if (barrier < 0 || barrier >= kNamedBarriers) fail("there is no barrier %d", barrier);
  if (threads % kLanes != 0 || threads < kLanes) fail("bar.sync for %d threads, which are no whole warps", threads);
  meet(barriers[barrier], threads, {Kind::barrier, uint64_t(threads), where}, true);
}

void run_grid(dim3 grid, dim3 size, size_t shared_bytes, void (*body)(void*), void* argument) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  check_launch(grid, size, shared_bytes);
  read_order();
  kernel_body = body;
  kernel_argument = argument;
  error.clear();
  block.grid = grid;
  block.size = size;
  block.threads = int(size.x * size.y * size.z);
  publish(launched);
  const uint64_t count = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < count && error.empty(); ++i) {
    const uint64_t at = order == Order::backward ? count - 1 - i : i;
    block.index = {unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y)};
    threads = &sets[i % kSets];
    while (threads->size() < size_t(block.threads)) threads->push_back(std::make_unique<Thread>());
    run_block(shared_bytes);
  }
  observe(ended);
  end_grid();
  if (!error.empty()) throw Error(error);
}

}  // namespace emu
