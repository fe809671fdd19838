#include "block.h"

#include <cstdarg>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "hopper.h"
#include "schedule.h"
#include "shared.h"
#include "thread.h"
#include "warp.h"

namespace emu {

Block block;
Position* position = nullptr;

namespace {

// Thrown into the threads that still wait when another has failed, so that their stacks unwind.
struct Cancelled {};

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
Clock launched, ended;  // what the host did before the launch, what the threads did before it ended

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
  begin_barriers();
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

void pause_thread() {
  Fiber::pause();
  if (cancelling) throw Cancelled();
}

void run_grid(dim3 grid, dim3 size, size_t shared_bytes, void (*body)(void*), void* argument) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  check_launch(grid, size, shared_bytes);
  read_schedule();
  kernel_body = body;
  kernel_argument = argument;
  error.clear();
  block.grid = grid;
  block.size = size;
  block.threads = int(size.x * size.y * size.z);
  publish(launched);
  const uint64_t count = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < count && error.empty(); ++i) {
    const uint64_t at = is_backward() ? count - 1 - i : i;
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
