#pragma once
// csrc/common/copy_async.cuh on the CPU.

#include "block.h"

namespace fused::cuda {

template <int kBytes>
void copy_async(void* shared, const void* global, int valid_bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async takes");
  if (valid_bytes < 0 || valid_bytes > kBytes) emu::fail("cp.async of %d bytes out of %d", valid_bytes, kBytes);
  emu::thread->copies.issue({shared, global, kBytes, valid_bytes});
}

inline void copy_async_commit() { emu::thread->copies.commit(); }

template <int kGroupsLeft>
void copy_async_wait() {
  emu::thread->copies.wait(kGroupsLeft);
}

}  // namespace fused::cuda
