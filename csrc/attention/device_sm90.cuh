#pragma once
// A block of attention's forward kernel on Hopper (forward_sm90.cu): what its threads share, and its producer.

#include "../common/barrier.cuh"
#include "../common/tma.cuh"
#include "../common/wgmma.cuh"
#include "device_sequence.cuh"
#include "device_tile.cuh"

namespace fused::cuda::sm90 {

constexpr int kConsumers = 2, kGroupThreads = 128, kConsumerThreads = kConsumers * kGroupThreads;
constexpr int kThreads = kGroupThreads + kConsumerThreads;
constexpr int kConsumerWarps = kConsumerThreads / kWarp;
constexpr int kGroupQueries = 64, kQueries = kConsumers * kGroupQueries, kKeys = 128, kStages = 2;
constexpr int kBoxCols = 64;                                      // what a box of TMA is wide
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;  // 3 * 168, what 384 threads get, shared out anew

enum Barrier { kTurn = 1, kChecked = kTurn + kConsumers, kGroupDone };  // named ones; two of kTurn and of kGroupDone

// What all threads of a block know.
struct Task {
  Sequence s;
  int head, first, begin, tiles;  // query; key; tiles of keys
  KeyRange range, of_group[kConsumers];
};

// Rows lie in boxes of 64 columns, one box after another.
template <class T, int D>
struct Shared {
  T q[kConsumers][kGroupQueries * D];
  T k[kStages][kKeys * D], v[kStages][kKeys * D];
  uint64_t q_full, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  Task task;
  uint32_t bad[2][kConsumerWarps];
};

// The tile after next uses the stage again; its mbarriers are then in a phase of the other parity.
FT_DEVICE int stage_of(int tile) { return tile % kStages; }
FT_DEVICE int parity_of(int tile) { return tile / kStages % 2; }

// ---------------------------------------------------------------- the producer

// Starts to copy kRows rows of one head.
template <int kRows, int D, class T>
FT_DEVICE void load_rows(T* to, const TensorMap& map, uint64_t* full, int row, int head, int batch) {
  mbarrier_arrive_expect(full, kRows * D * int(sizeof(T)));
#pragma unroll
  for (int col = 0; col < D; col += kBoxCols) tma_load(to + col * kRows, map, full, col, row, head, batch);
}

template <class T, int D>
FT_DEVICE void produce(const Attention& args, const TensorMap& q_map, const TensorMap& k_map, const TensorMap& v_map,
                       Shared<T, D>& shared) {
  const Task& task = shared.task;
  const int batch = args.q_offsets == nullptr ? task.s.b : 0, head = key_head(args, task.head);
  const int query = int(task.s.q0) + task.first, key = int(task.s.k0) + task.begin;
  mbarrier_arrive_expect(&shared.q_full, int(sizeof shared.q));
#pragma unroll
  for (int consumer = 0; consumer < kConsumers; ++consumer)
#pragma unroll
    for (int col = 0; col < D; col += kBoxCols)
      tma_load(shared.q[consumer] + col * kGroupQueries, q_map, &shared.q_full, col, query + consumer * kGroupQueries,
               task.head, batch);
  // in the order in which they are needed: the next keys before these values
  for (int tile = 0; tile <= task.tiles; ++tile) {
    if (tile < task.tiles) {
      const int stage = stage_of(tile);
      mbarrier_wait(&shared.k_empty[stage], parity_of(tile) ^ 1);
      load_rows<kKeys, D>(shared.k[stage], k_map, &shared.k_full[stage], key + tile * kKeys, head, batch);
    }
    if (tile > 0) {
      const int stage = stage_of(tile - 1);
      mbarrier_wait(&shared.v_empty[stage], parity_of(tile - 1) ^ 1);
      load_rows<kKeys, D>(shared.v[stage], v_map, &shared.v_full[stage], key + (tile - 1) * kKeys, head, batch);
    }
  }
}

}  // namespace fused::cuda::sm90
