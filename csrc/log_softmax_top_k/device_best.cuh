#pragma once
// The best of what a warp is offered, sorted, in its registers.

#include <climits>

#include "../common/reduce.cuh"

namespace fused::cuda {

// Candidates: a number, and a place that tells equal ones apart.
struct Candidate {
  float value = -INFINITY;
  int place = INT_MAX;  // both so until there is one: whatever is real comes before it

  FT_DEVICE bool before(const Candidate& other) const {
    return value > other.value || (value == other.value && place < other.place);
  }
};

FT_DEVICE Candidate shuffle(const Candidate& x, int lane) {
  return {__shfl_sync(kWholeWarp, x.value, lane), __shfl_sync(kWholeWarp, x.place, lane)};
}

// The best kSlots * 32 of all that was offered, of which the first k count; rank r lies in slot r / 32 of lane r % 32.
// An insertion costs some ten instructions of the whole warp, so offers that can't be among the k best are dropped
// first: of n numbers in random order about k log(n / k) are inserted, of n rising ones all.
template <int kSlots>
struct Best {
  Candidate kept[kSlots], last;  // last: rank k - 1, in every lane

  // Each lane offers one; all lanes of the warp call it. NaN is never taken.
  FT_DEVICE void offer(const Candidate& mine, int k) {
    unsigned waiting = __ballot_sync(kWholeWarp, mine.before(last));
    while (waiting) {
      insert(shuffle(mine, __ffs(int(waiting)) - 1), k);
      waiting &= waiting - 1;
      waiting &= __ballot_sync(kWholeWarp, mine.before(last));
    }
  }

 private:
  FT_DEVICE void insert(const Candidate& x, int k) {
    const int lane = threadIdx.x % kWarp;
    int rank = 0;  // how many come before x
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) rank += __popc(__ballot_sync(kWholeWarp, kept[slot].before(x)));
#pragma unroll
    for (int slot = kSlots - 1; slot >= 0; --slot) {
      Candidate previous = shuffle(kept[slot], (lane + kWarp - 1) % kWarp);
      if (slot > 0) {
        const Candidate carried = shuffle(kept[slot > 0 ? slot - 1 : 0], kWarp - 1);
        if (lane == 0) previous = carried;
      }
      const int own = slot * kWarp + lane;
      if (own > rank) kept[slot] = previous;
      if (own == rank) kept[slot] = x;
    }
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const Candidate at_end = shuffle(kept[slot], (k - 1) % kWarp);
      if (slot == (k - 1) / kWarp) last = at_end;
    }
  }
};

}  // namespace fused::cuda
