#pragma once
// csrc/common/copy_async.cuh on the CPU.

#include "copies.h"

namespace fused::cuda {

template <int kBytes>
void copy_async(void* shared, const void* global, int valid_bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async takes");
  emu::issue_copy({shared, global, kBytes, valid_bytes});
}

inline void copy_async_commit() { emu::commit_copies(); }

template <int kGroupsLeft>
void copy_async_wait() {
  static_assert(kGroupsLeft >= 0, "what cp.async.wait_group takes");
  emu::wait_for_copies(kGroupsLeft);
}

}  // namespace fused::cuda
