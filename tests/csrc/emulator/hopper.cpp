#include "hopper.h"

#include <list>
#include <memory>

#include "memory.h"
#include "schedule.h"
#include "shared.h"
#include "thread.h"
#include "wide_products.h"

namespace emu {
namespace {

// A phase ends when all arrivals have come and all bytes; then the next begins.
struct Mbarrier {
  const void* address;
  int arrivals, missing;  // of a phase; that have not come in this one
  int64_t bytes;          // expected, less those that landed
  unsigned phase;
  Rendezvous sleepers;
  Clock clock[2];  // of even and odd phases
};

// One copy of TMA on its way.
struct BoxCopy {
  char* to;
  TensorMap map;
  int at[4];
  Mbarrier* barrier;
  Agent agent;
  Clock issued;

  BoxCopy(char* to, const TensorMap& map, const int (&at)[4], Mbarrier* barrier)
      : to(to), map(map), at{at[0], at[1], at[2], at[3]}, barrier(barrier) {}
};

std::list<Mbarrier> mbarriers;
std::list<BoxCopy> on_their_way;

Mbarrier& mbarrier(const void* address) {
  for (Mbarrier& barrier : mbarriers)
    if (barrier.address == address) return barrier;
  fail("an mbarrier is used before mbarrier.init");
}

void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.missing = barrier.arrivals;
  wake(barrier.sleepers);
}

void copy_box(const BoxCopy& copy) {
  const uint32_t offset = uint32_t(copy.to - dynamic_memory());
  const TensorMap& map = copy.map;
  const auto inside = [&](int axis, int64_t index) { return index >= 0 && index < map.sizes[axis]; };
  for (int row = 0; row < map.box_rows; ++row) {
    const int64_t y = copy.at[1] + row;
    const bool has_row = inside(1, y) && inside(2, copy.at[2]) && inside(3, copy.at[3]);
    for (int chunk = 0; chunk < kBoxColumns / 8; ++chunk) {  // 16 bytes each
      char* const to = dynamic_memory() + swizzled(offset + uint32_t(row * 128 + chunk * 16));
      const int64_t x = copy.at[0] + chunk * 8, valid = has_row && x >= 0 ? map.sizes[0] - x : 0;
      const char* from =
          map.base + x * 2 + y * map.strides[0] + copy.at[2] * map.strides[1] + copy.at[3] * map.strides[2];
      copy_with_zeros(to, from, 16, int(valid <= 0 ? 0 : (valid < 8 ? valid : 8) * 2));
    }
  }
}

void land(BoxCopy& copy) {
  Mbarrier& barrier = *copy.barrier;
  copy.agent.act([&] {
    observe(copy.issued);
    copy_box(copy);
    publish(barrier.clock[barrier.phase & 1]);
  });
  barrier.bytes -= int64_t(copy.map.box_rows) * 128;
  end_phase_if_complete(barrier);
}

}  // namespace

void begin_hopper() {
  on_their_way.clear();
  mbarriers.clear();
  begin_products();
}

bool progress_hopper() {
  if (on_their_way.empty()) return false;
  auto next = on_their_way.begin();
  if (is_shuffled()) std::advance(next, long(draw(unsigned(on_their_way.size()))));
  land(*next);
  on_their_way.erase(next);
  return true;
}

void init_mbarrier(const void* address, int arrivals) {
  if (reinterpret_cast<uintptr_t>(address) % 8 != 0) fail("mbarrier.init at an address that is no multiple of 8");
  if (arrivals < 1) fail("mbarrier.init for %d arrivals", arrivals);
  for (const Mbarrier& barrier : mbarriers)
    if (barrier.address == address) fail("mbarrier.init of an mbarrier that is in use");
  mbarriers.push_back({address, arrivals, arrivals, 0, 0, {0, block.threads}, {}});
}

void arrive_mbarrier(const void* address, int expected_bytes) {
  Mbarrier& barrier = mbarrier(address);
  publish(barrier.clock[barrier.phase & 1]);
  if (barrier.missing == 0) fail("more arrivals at an mbarrier than it was made for, in one phase");
  barrier.bytes += expected_bytes;
  --barrier.missing;
  end_phase_if_complete(barrier);
}

void wait_mbarrier(const void* address, int parity, const Where& where) {
  Mbarrier& barrier = mbarrier(address);
  while ((barrier.phase & 1) == unsigned(parity)) sleep(barrier.sleepers, {Kind::mbarrier, uint64_t(parity), where});
  observe(barrier.clock[parity & 1]);
}

void load_box(void* shared, const TensorMap& map, const void* barrier, const int (&at)[4]) {
  const uint64_t offset = uint64_t(static_cast<char*>(shared) - dynamic_memory());
  if (offset % 1024 != 0) fail("TMA: a tile with the 128-byte swizzle must begin at a multiple of 1024 bytes");
  if (offset + uint64_t(map.box_rows) * 128 > dynamic_bytes()) fail("TMA: a box beyond the end of shared memory");
  on_their_way.emplace_back(static_cast<char*>(shared), map, at, &mbarrier(barrier));
  publish(on_their_way.back().issued);
  if (block.lazy) return;
  land(on_their_way.back());
  on_their_way.pop_back();
}

}  // namespace emu
