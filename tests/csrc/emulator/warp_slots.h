#pragma once
// How the lanes of a warp exchange values, for the emulator's own files: each puts what it gives into its slot, the
// last to come replaces what is there by what each lane gets, and each takes that.

#include <cstring>

#include "thread.h"

namespace emu {

constexpr int kSlotBytes = 64;

struct Slots {
  unsigned char (*slot)[kSlotBytes];
  uint32_t lanes;  // that take part

  bool has(int lane) const { return lanes >> lane & 1; }

  template <class T>
  T get(int lane) const {
    T v;
    std::memcpy(&v, slot[lane], sizeof v);
    return v;
  }
  template <class T>
  void put(int lane, const T& v) const {
    static_assert(sizeof(T) <= kSlotBytes, "a slot is too small");
    std::memcpy(slot[lane], &v, sizeof v);
  }
};

// Where the lanes of `mask`, those that exist, meet. The running lane must be one of them.
struct WarpGroup {
  Rendezvous& rendezvous;
  Slots slots;
};

WarpGroup group_of(uint32_t mask);

// `replace(slots)` runs once, when all lanes of `mask` have come. Nobody reads another lane's slot after that: a lane
// that is slow to take its value may find others in their next exchange.
template <class Taken, class Given, class F>
Taken exchange(uint32_t mask, Kind kind, const Given& given, const Where& where, const F& replace) {
  const WarpGroup group = group_of(mask);
  const Slots& slots = group.slots;
  slots.put(position->lane, given);
  meet(group.rendezvous, __builtin_popcount(slots.lanes), {kind, mask, where}, false, [&] { replace(slots); });
  return slots.get<Taken>(position->lane);
}

}  // namespace emu
