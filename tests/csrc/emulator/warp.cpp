#include "warp.h"

#include <vector>

#include "warp_slots.h"

namespace emu {
namespace {

// Groups of a warp that work apart are told from each other by their lowest lane.
struct Warp {
  Rendezvous rendezvous[kLanes];
  alignas(16) unsigned char slots[kLanes][kSlotBytes];
};

std::vector<Warp> warps;

struct Shuffled {
  uint64_t bits;
  int source;
  bool found;
};

}  // namespace

void begin_warps() {
  warps = std::vector<Warp>(size_t((block.threads + kLanes - 1) / kLanes));  // new memory: see run_block
  for (size_t w = 0; w < warps.size(); ++w)
    for (Rendezvous& at : warps[w].rendezvous) at = {int(w) * kLanes, kLanes};
}

WarpGroup group_of(uint32_t mask) {
  if (!(mask >> position->lane & 1)) fail("lane %d is not in its own mask %08x", position->lane, mask);
  const int existing = block.threads - position->warp * kLanes;
  const uint32_t lanes = existing >= kLanes ? mask : mask & ((1u << existing) - 1);
  Warp& warp = warps[size_t(position->warp)];
  return {warp.rendezvous[__builtin_ctz(lanes)], {warp.slots, lanes}};
}

uint64_t shuffle(uint32_t mask, uint64_t bits, int source, const Where& where) {
  const Shuffled given{bits, source, true};
  const Shuffled taken = exchange<Shuffled>(mask, Kind::shuffle, given, where, [](const Slots& slots) {
    uint64_t all[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) all[lane] = slots.get<Shuffled>(lane).bits;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!slots.has(lane)) continue;
      const int from = slots.get<Shuffled>(lane).source;
      slots.put(lane, Shuffled{all[from], from, slots.has(from)});
    }
  });
  if (!taken.found) fail("__shfl_sync reads lane %d, which takes no part in it", source);
  return taken.bits;
}

uint32_t ballot(uint32_t mask, bool vote, const Where& where) {
  return exchange<uint32_t>(mask, Kind::vote, uint32_t(vote), where, [](const Slots& slots) {
    uint32_t votes = 0;
    for (int lane = 0; lane < kLanes; ++lane)
      if (slots.has(lane)) votes |= slots.get<uint32_t>(lane) << lane;
    for (int lane = 0; lane < kLanes; ++lane) slots.put(lane, votes);
  });
}

void sync_warp(uint32_t mask, const Where& where) {
  const WarpGroup group = group_of(mask);
  meet(group.rendezvous, __builtin_popcount(group.slots.lanes), {Kind::syncwarp, mask, where}, true);
}

}  // namespace emu
