#pragma once
// cp.async of sm_80 and later: copies from global to shared memory that a thread does not wait for. The thread that
// issued a copy sees it after its copy_async_wait, other threads after a barrier that follows.

#include "launch.cuh"

#ifdef FT_EMULATED
#include <emulated_copy.h>
#else

namespace fused::cuda {

// kBytes (4, 8 or 16) bytes, both addresses multiples of it. Only the first valid_bytes are read; the others become 0.
// `global` need not be an address of anything where valid_bytes is 0. 16 bytes go past the L1 cache.
template <int kBytes>
FT_DEVICE void copy_async(void* shared, const void* global, int valid_bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async takes");
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(valid_bytes)
                 : "memory");
}

// Ends a group: the copies issued since the last one.
FT_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kGroupsLeft groups of this thread are on their way; the oldest land first.
template <int kGroupsLeft>
FT_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

}  // namespace fused::cuda
#endif
