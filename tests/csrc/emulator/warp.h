#pragma once
// Collectives of a warp: shuffles, votes, __syncwarp.

#include <cstdint>
#include <cstring>

#include "block.h"

namespace emu {

void begin_warps();

// The bits that lane `source` gives. All lanes of `mask` must call it at one place, and source must be one of them.
uint64_t shuffle(uint32_t mask, uint64_t bits, int source, const Where& where);
uint32_t ballot(uint32_t mask, bool vote, const Where& where);
void sync_warp(uint32_t mask, const Where& where);

template <class T>
T shuffle_value(uint32_t mask, T v, int source, const Where& where) {
  static_assert(sizeof(T) <= 8, "__shfl_sync takes 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  bits = shuffle(mask, bits, source, where);
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

}  // namespace emu
