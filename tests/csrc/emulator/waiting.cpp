// How threads wait for each other: a rendezvous, and the barriers of a block.

#include <algorithm>
#include <cstring>
#include <vector>

#include "schedule.h"
#include "thread.h"

namespace emu {
namespace {

constexpr int kNamedBarriers = 16;

std::vector<Rendezvous> barriers;  // 0 is that of __syncthreads
int votes_at_barrier[2];           // in barrier 0, of even and odd generations

// Whether two calls are one text of the kernel. Named barriers are there to be met from several.
bool same_place(const Call& a, const Call& b) {
  if (a.kind == Kind::barrier) return true;
  return a.where.line == b.where.line && std::strcmp(a.where.file, b.where.file) == 0;
}

void complete(Rendezvous& at) {
  at.arrived = 0;
  ++at.generation;
  wake(at);
}

Rendezvous& named(int barrier, int threads) {
  if (barrier < 0 || barrier >= kNamedBarriers) fail("there is no barrier %d", barrier);
  if (threads % kLanes != 0 || threads < kLanes) fail("a barrier for %d threads, which are no whole warps", threads);
  return barriers[size_t(barrier)];
}

}  // namespace

const char* name(Kind kind) {
  constexpr const char* kNames[] = {"running", "__syncthreads", "bar.sync", "__syncwarp", "__shfl_sync",
                                    "a vote",  "ldmatrix",      "mma.sync", "mbarrier",   "wgmma"};
  return kNames[int(kind)];
}

const char* file_name(const Where& where) {
  const char* slash = std::strrchr(where.file, '/');
  return slash ? slash + 1 : where.file;
}

void begin_barriers() {
  // New memory, not the old once more: a clock of TSan's that a block inherits would order it after the last one.
  barriers = std::vector<Rendezvous>(kNamedBarriers, Rendezvous{0, block.threads});
}

void sleep(const Rendezvous& at, const Call& call) {
  running().call = call;
  running().waits_at = &at;
  pause_thread();
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
  } else if (at.call.kind != call.kind || at.call.key != call.key || !same_place(at.call, call)) {
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
  if (was_last) complete(at);
  pause_thread();
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
  meet(named(barrier, threads), threads, {Kind::barrier, uint64_t(threads), where}, true);
}

void arrive_named(int barrier, int threads, const Where& where) {
  Rendezvous& at = named(barrier, threads);
  publish(at.clock[at.generation & 1]);
  const bool was_last = arrive(at, threads, {Kind::barrier, uint64_t(threads), where});
  running().waits_at = nullptr;
  if (was_last) complete(at);
}

}  // namespace emu
