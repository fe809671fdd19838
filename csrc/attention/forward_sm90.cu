// Attention forward on Hopper (sm_90a): TMA brings the tiles, wgmma multiplies them, and the softmax of one tile runs
// beside the products of others (after FlashAttention-3, Shah et al. 2024). attention_sm90.h says what it takes.
//
// A block takes 128 queries of one head and tiles of 128 keys, and has three groups of four warps:
//
//   a producer      one thread of it asks TMA for tiles, up to two of keys and two of values ahead
//   two consumers   64 queries each, and most of the registers: scores = Q K^T, softmax, out += P V
//
// A tile's Q K^T is issued together with the P V of the tile before, and its softmax runs while that P V still does.
// Consumers take turns at issuing products, so that one's softmax falls under the other's products. Each tile in shared
// memory has two mbarriers: `full`, which TMA completes, and `empty`, at which each consumer warp says that it has read
// the tile.
//
// Memory moved and bounds are those of forward.cu: tensor cores, and the exponentials at D = 64.

#include "attention_sm90.h"
#include "device_launch.cuh"
#include "device_output.cuh"
#include "device_sm90_values.cuh"

namespace fused::cuda {
namespace {

using namespace sm90;

constexpr int N = kKeys / 8;

// As the products see a thread's registers, and as softmax and masks do.
template <int kCount>
FT_DEVICE auto as_tiles(float (&registers)[kCount]) -> float (&)[1][kCount / 4][4] {
  return reinterpret_cast<float (&)[1][kCount / 4][4]>(registers);
}

// scores = q k^T
template <int D, class T>
FT_DEVICE void multiply_keys(float (&scores)[kKeys / 2], const T* q, const T* k) {
  const uint64_t a = wgmma_tile(q), b = wgmma_tile(k);
#pragma unroll
  for (int col = 0; col < D; col += 16) {
    const int box = col / kBoxCols, bytes = col % kBoxCols * 2;
    wgmma<T, kKeys, false>(scores, wgmma_tile_after(a, box * kGroupQueries * 128 + bytes),
                           wgmma_tile_after(b, box * kKeys * 128 + bytes), col > 0);
  }
}

// out += weights v
template <int D, class T>
FT_DEVICE void multiply_values(float (&out)[D / 2], const uint32_t (&weights)[kKeys / 16][4], const T* v) {
  const uint64_t b = wgmma_tile(v, kKeys * 128);
#pragma unroll
  for (int key = 0; key < kKeys; key += 16)
    wgmma<T, D, true>(out, weights[key / 16], wgmma_tile_after(b, key * 128), true);
}

// For all lanes of the warp: its part of a stage has been read.
FT_DEVICE void release(uint64_t* empty) {
  if (lane_id() == 0) mbarrier_arrive(empty);
}

// Scores of the keys that a query of the warp does not see become -inf. `row`: its first query.
FT_DEVICE void mask_scores(const Sequence& s, int row, int key, float (&scores)[1][N][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const KeyRange seen = visible_keys(s, row + half * 8 + group(), 1);
    const int low = seen.low - key - pair(), high = seen.high - key - pair();
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (n * 8 + e < low || n * 8 + e >= high) scores[0][n][half * 2 + e] = -INFINITY;
  }
}

template <class T, int D>
FT_DEVICE void consume(const AttentionForward& args, Shared<T, D>& shared) {
  const Task& task = shared.task;
  const Sequence& s = task.s;
  const int consumer = warp_id() / (kGroupThreads / kWarp) - 1, warp = warp_id() % (kGroupThreads / kWarp);
  const int row = task.first + consumer * kGroupQueries + warp * 16, tiles = task.tiles;
  const float unit = args.scale * kLog2E;

  float scores[kKeys / 2], out[D / 2];
  uint32_t weights[kKeys / 16][4];  // in T, two a register
  Softmax<1> softmax;
  float decay[2];
  clear(as_tiles(out));

  const auto key_of = [&](int tile) { return task.begin + tile * kKeys; };
  // When the values of a tile are there, whether some were taken away.
  const auto values_arrive = [&](int tile) {
    mbarrier_wait(&shared.v_full[stage_of(tile)], parity_of(tile));
    return task.range.cuts(key_of(tile), kKeys) && clean_values(shared, tile);
  };
  const auto take_turn = [&] { barrier_sync(kTurn + consumer, kConsumerThreads); };
  const auto give_turn = [&](int tile) {
    if (consumer == 0 || tile + 1 < tiles) barrier_arrive(kTurn + 1 - consumer, kConsumerThreads);
  };
  const auto weigh = [&](int tile) {
    const int key = key_of(tile);
    if (task.of_group[consumer].cuts(key, kKeys)) mask_scores(s, row, key, as_tiles(scores));
#pragma unroll
    for (int half = 0; half < 2; ++half) decay[half] = softmax.template weigh<T>(0, half, as_tiles(scores), unit);
  };
  const auto round_weights = [&] {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) weights[i / 4][i % 4] = pack<T>(scores[2 * i], scores[2 * i + 1]);
  };

  if (tiles > 0) {
    if (consumer == 1) barrier_arrive(kTurn, kConsumerThreads);  // the first turn is consumer 0's
    mbarrier_wait(&shared.q_full, 0);
    mbarrier_wait(&shared.k_full[0], 0);
    take_turn();
    wgmma_fence();
    multiply_keys<D>(scores, shared.q[consumer], shared.k[0]);
    wgmma_commit();
    give_turn(0);
    wgmma_wait<0>(scores);
    release(&shared.k_empty[0]);
    weigh(0);
    round_weights();
    for (int tile = 1; tile < tiles; ++tile) {
      const int last = tile - 1, stage = stage_of(tile);
      const bool bad = values_arrive(last);
      mbarrier_wait(&shared.k_full[stage], parity_of(tile));
      take_turn();
      wgmma_fence(scores, out, weights);
      multiply_keys<D>(scores, shared.q[consumer], shared.k[stage]);
      wgmma_commit();
      multiply_values<D>(out, weights, shared.v[stage_of(last)]);
      wgmma_commit();
      give_turn(tile);
      wgmma_wait<1>(scores);
      release(&shared.k_empty[stage]);
      weigh(tile);
      wgmma_wait<0>(out);
      release(&shared.v_empty[stage_of(last)]);
      if (bad) add_cleaned_values<D, T>(args, task, row, key_of(last), as_tiles(out));
#pragma unroll
      for (int i = 0; i < D / 2; ++i) out[i] *= decay[i / 2 % 2];
      round_weights();
    }
    const int last = tiles - 1;
    const bool bad = values_arrive(last);
    wgmma_fence(out, weights);
    multiply_values<D>(out, weights, shared.v[stage_of(last)]);
    wgmma_commit();
    wgmma_wait<0>(out);
    if (bad) add_cleaned_values<D, T>(args, task, row, key_of(last), as_tiles(out));
    barrier_sync(kGroupDone + consumer, kGroupThreads);  // nobody of this consumer reads its queries any more
  }
  const Tile<T, D> stage{shared.q[consumer]};
  store_output(args, s, task.head, row, stage, warp * 16, softmax, args.scale, as_tiles(out));
}

// grid (tiles of queries * B * H), block (kThreads): the last tiles first, which see most under a causal mask
template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    attention_forward_sm90_kernel(const AttentionForward args, const __grid_constant__ TensorMap q_map,
                                  const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
                                  const int tiles) {
  auto& shared = *reinterpret_cast<Shared<T, D>*>(dynamic_shared());
  if (threadIdx.x == 0) {
    Task& task = shared.task;
    const int head = int(blockIdx.x) / tiles;
    task.s = make_sequence(args, head / int(args.H));
    task.head = head % int(args.H);
    task.first = (tiles - 1 - int(blockIdx.x) % tiles) * kQueries;
    task.range = visible_keys(task.s, task.first, kQueries);
    task.begin = task.range.low / kKeys * kKeys;
    task.tiles = max(0, task.range.high - task.begin + kKeys - 1) / kKeys;
    for (int c = 0; c < kConsumers; ++c)
      task.of_group[c] = visible_keys(task.s, task.first + c * kGroupQueries, kGroupQueries);
    mbarrier_init(&shared.q_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&shared.k_full[stage], 1);
      mbarrier_init(&shared.v_full[stage], 1);
      mbarrier_init(&shared.k_empty[stage], kConsumerWarps);
      mbarrier_init(&shared.v_empty[stage], kConsumerWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (shared.task.first >= shared.task.s.L) return;
  if (warp_id() < kGroupThreads / kWarp) {
    registers_decrease<kProducerRegisters>();
    if (threadIdx.x == 0 && shared.task.tiles > 0) produce(args, q_map, k_map, v_map, shared);
  } else {
    registers_increase<kConsumerRegisters>();
    consume(args, shared);
  }
}

// ---------------------------------------------------------------- the host

// Packed tensors are one sequence of all tokens here. Axes of one element have no stride to speak of.
template <class T>
TensorMap map_of(const Attention& args, const Rows& x, int64_t rows, int64_t heads, int box_rows) {
  const int64_t batches = args.q_offsets == nullptr ? args.B : 1;
  const int64_t strides[3] = {rows > 1 ? x.row : args.D, heads > 1 ? x.head : args.D, batches > 1 ? x.batch : args.D};
  return tensor_map<T>(x.data, {args.D, rows, heads, batches}, strides, box_rows);
}

template <class T, int D>
void launch_forward(const AttentionForward& args, int64_t q_tokens, int64_t k_tokens, void* stream) {
  const bool packed = args.q_offsets != nullptr;
  const int64_t q_rows = packed ? q_tokens : args.L, k_rows = packed ? k_tokens : args.S;
  const TensorMap q_map = map_of<T>(args, args.q, q_rows, args.H, kGroupQueries);
  const TensorMap k_map = map_of<T>(args, args.k, k_rows, args.Hk, kKeys);
  const TensorMap v_map = map_of<T>(args, args.v, k_rows, args.Hk, kKeys);
  const int64_t tiles = (args.L + kQueries - 1) / kQueries;
  launch(attention_forward_sm90_kernel<T, D>, Grid{tiles * args.B * args.H}, kThreads, sizeof(Shared<T, D>), stream,
         args, q_map, k_map, v_map, int(tiles));
}

// Whether an axis is repeated without being there, of which TMA's documentation says nothing.
bool repeats(const Attention& args, const Rows& x, int64_t rows, int64_t heads) {
  const bool batches = args.B > 1 && args.q_offsets == nullptr;
  return (rows > 1 && x.row == 0) || (heads > 1 && x.head == 0) || (batches && x.batch == 0);
}

}  // namespace

const char* why_not_sm90(const Attention& args) {
  if (args.dtype == DType::f32) return "float32 does not go through wgmma";
  if (args.D != 64 && args.D != 128) return "the head width is neither 64 nor 128";
  if (args.keep.data != nullptr) return "keep masks are left to the other kernel";
  if (args.bias.data != nullptr) return "a bias is left to the other kernel";
  if (args.dropout_p > 0.0f) return "dropout is left to the other kernel";
  if (!(args.scale > 0.0f)) return "a scale that is not above 0 is left to the other kernel";
  const struct {
    const Rows& x;
    int64_t rows, heads;
  } all[] = {{args.q, args.L, args.H}, {args.k, args.S, args.Hk}, {args.v, args.S, args.Hk}};
  for (const auto& each : all) {
    if (!is_aligned(args, each.x, each.heads)) return "rows that do not begin at multiples of 16 bytes";
    if (repeats(args, each.x, each.rows, each.heads)) return "a tensor that is expanded along an axis";
  }
  return nullptr;
}

void attention_forward_sm90(const AttentionForward& given, int64_t q_tokens, int64_t k_tokens, void* stream) {
  if (given.B == 0 || given.H == 0 || given.L == 0 || given.S == 0) return;
  check(given);
  constexpr int64_t kMostTokens = int64_t(1) << 30;  // TMA counts in 32 bits
  const char* why = why_not_sm90(given);
  FT_REQUIRE(why == nullptr, why);
  FT_REQUIRE(q_tokens < kMostTokens && k_tokens < kMostTokens, "packed batches must be shorter than 2^30 tokens");
  AttentionForward args = given;
  args.vectors = is_aligned(args, args.out, args.H);
  const auto with_dtype = [&](auto type) {
    using T = decltype(type);
    if (args.D == 64) return launch_forward<T, 64>(args, q_tokens, k_tokens, stream);
    launch_forward<T, 128>(args, q_tokens, k_tokens, stream);
  };
  args.dtype == DType::f16 ? with_dtype(__half()) : with_dtype(__nv_bfloat16());
}

}  // namespace fused::cuda
