#pragma once
// NaN and infinite values in the tiles of forward_sm90.cu: device_tile.cuh and device_softmax.cuh have the same for the
// tiles of the other kernels.

#include "device_sm90.cuh"
#include "device_softmax.cuh"

namespace fused::cuda::sm90 {

// Calls f(chunk) for this consumer thread's share of a tile of values, 16 bytes each.
template <int D, class T, class F>
FT_DEVICE void for_own_chunks(T* v, F&& f) {
  constexpr int kChunk = kVectorBytes / int(sizeof(T));
#pragma unroll 1
  for (int i = int(threadIdx.x) - kGroupThreads; i < kKeys * D / kChunk; i += kConsumerThreads) f(v + i * kChunk);
}

// Of a tile that not all queries see whole, NaN and infinite values must not be multiplied by the weight 0: they become
// 0, and true says that there were any. Called by all consumers together.
template <class T, int D>
FT_DEVICE bool clean_values(Shared<T, D>& shared, int tile) {
  T* v = shared.v[stage_of(tile)];
  bool finite = true;
  for_own_chunks<D>(v, [&](T* chunk) { finite &= is_finite<T>(*reinterpret_cast<const uint4*>(chunk)); });
  uint32_t* bad = shared.bad[tile % 2];  // two, as some warps may be a tile ahead of those that still read
  const bool any = __any_sync(kWholeWarp, !finite);
  if (lane_id() == 0) bad[(int(threadIdx.x) - kGroupThreads) / kWarp] = any;
  barrier_sync(kChecked, kConsumerThreads);
  uint32_t all = 0;
#pragma unroll
  for (int warp = 0; warp < kConsumerWarps; ++warp) all |= bad[warp];
  if (all == 0) return false;
  for_own_chunks<D>(v, [](T* chunk) {
    if (is_finite<T>(*reinterpret_cast<const uint4*>(chunk))) return;
#pragma unroll 1
    for (int i = 0; i < kVectorBytes / int(sizeof(T)); ++i)
      if (!(fabsf(to_float(chunk[i])) < INFINITY)) from_float(0.0f, chunk[i]);
  });
  async_proxy_fence();  // wgmma reads what was stored
  barrier_sync(kChecked, kConsumerThreads);
  return true;
}

// Adds what clean_values took away to the queries that see it.
template <int D, class T>
FT_DEVICE void add_cleaned_values(const AttentionForward& args, const Task& task, int row, int key,
                                  float (&out)[1][D / 8][4]) {
  const Sequence& s = task.s;
  const T* values = key_row<T>(args, args.v, s, key_head(args, task.head), 0);
#pragma unroll 1
  for (int end = key + kKeys; key < end; key += kWordKeys) {
    const Source<T> from{values + key * args.v.row, args.v.row, s.S - key, D, false};
    const auto masks = [&](int i, int j) {
      const KeyRange seen = visible_keys(s, row + i, 1);
      return key + j < seen.low || key + j >= seen.high;
    };
    add_nonfinite_values(Seen(), from, kWordKeys, masks, out);
  }
}

}  // namespace fused::cuda::sm90
