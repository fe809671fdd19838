// Attention forward on the CPU: online softmax over blocks of 64 keys, no (L, S) matrix.
//
// A task is one chunk (up to 192 queries, in tiles) of one head. Each block of keys it can see is read once (16-bit
// numbers and rows that lie apart as float32 into 2 x 16 KB), and for each tile: scores = K Q^T, mask, running maximum
// and sum, then out += weights V. Per score that is 2 D multiply-adds and one exp_shifted(), at D = 64 and 512 keys an
// eighth of the time: the kernel is bound by the FMA units. Memory moved: q, k, v and out once per chunk.
//
// Outcome, as a share of multiply-adds alone in the same run, one thread of a Zen 3: beside another guest on its core
// 38 queries and keys 40 %, 64 51, 128 53, 512 63 %; left alone, and with an exponential of two multiply-adds less, 54,
// 65, 72 and 75 %. Of a large product's rate (2 threads of a Zen 5, a Xeon with AMX; before exp_shifted and reading in
// place): causal, 512 keys 61 and 49 %, lengths of 26 to 128 48 and 41 %. What is missing at such lengths are lanes of
// a tile beyond the last query (7 %), what a task does once, and the beginnings and ends of short products.

#include <omp.h>

#include "../common/parallel.h"
#include "ahead.h"
#include "product.h"
#include "scores.h"

namespace fused::cpu::FT_ISA {
namespace {

// One tile's running state.
struct State {
  Tile tile;
  float* q;              // panel [D][lanes], lane = query
  float* out;            // [lanes][ld]
  float *maximum, *sum;  // [lanes]
  bool started;          // whether out holds anything yet
};

// Folds one block of keys into the tile's running softmax.
template <int NV>
void step(const AttentionForward& args, const Sequence& s, State& state, const KeyBlock& block, float* scores,
          MaskTile& masks, Ahead& ahead) {
  constexpr int lanes = NV * kWidth;
  const Tile& t = state.tile;
  const int D = int(args.D), available = int(smaller(block.count, t.high - block.j0));
  const int count = load_keep(args, s, t, block.j0, available, masks);
  if (count == 0) return;
  const auto between = [&] { ahead.ask(); };
  product<NV, true>(count, D, block.k, block.ld, state.q, lanes, scores, lanes, false, between);
  mask_scores<NV>(args, s, t, block.j0, count, masks, scores);

  // All vectors of a key side by side: each is a chain of dependent maxima and additions, and three hide the latency.
  Vec before[NV], maximum[NV], shift[NV], sum[NV];
  for (int v = 0; v < NV; ++v) maximum[v] = before[v] = load(state.maximum + v * kWidth);
  for (int j = 0; j < count; ++j)
    for (int v = 0; v < NV; ++v) maximum[v] = vmax(load(scores + j * lanes + v * kWidth), maximum[v]);
  for (int v = 0; v < NV; ++v) {
    // While a row has seen only masked keys its maximum is -inf: shift by 0, so that exp gives 0 and not NaN.
    shift[v] = maximum[v] == splat(-kInf) ? Vec{} : maximum[v];
    sum[v] = Vec{};
  }
  for (int j = 0; j < count; ++j) {
    for (int v = 0; v < NV; ++v) {
      float* score = scores + j * lanes + v * kWidth;
      const Vec weight = exp_shifted(load(score) - shift[v]);
      store(score, weight);
      sum[v] += weight;
    }
  }
  float decay[kLanes];
  for (int v = 0; v < NV; ++v) {
    const Vec factor = exp_shifted(before[v] - shift[v]);
    store(decay + v * kWidth, factor);
    store(state.maximum + v * kWidth, maximum[v]);
    store(state.sum + v * kWidth, load(state.sum + v * kWidth) * factor + sum[v]);
  }
  if (state.started) {
    for (int i = 0; i < t.rows; ++i) {
      if (decay[i] == 1.0f) continue;  // its maximum has not moved
      float* out = state.out + i * block.ld;
      for (int d = 0; d < block.ld; d += kWidth) store(out + d, load(out + d) * splat(decay[i]));
    }
  }
  if (args.dropout_p > 0.0f) {
    for_each_dropout<NV>(args, s, t, block.j0, count, [&](int j, int v, IVec kept) {
      float* weight = scores + j * lanes + v * kWidth;
      store(weight, kept ? load(weight) : Vec{});
    });
  }
  const int vectors = int(block.ld / kWidth);
  product_wide<false>(t.rows, count, scores, lanes, block.v_safe, block.ld, state.out, block.ld, vectors, state.started,
                      between);
  state.started = true;
  if (block.v_safe != block.v) {  // NaN and Inf of values that are attended to: the product above took them as 0
    for (int j = 0; j < count; ++j) {
      for (int d = 0; d < D; ++d) {
        const float value = block.v[j * block.ld + d];
        if (value == block.v_safe[j * block.ld + d]) continue;
        for (int i = 0; i < t.rows; ++i) {
          const float weight = scores[j * lanes + i];
          if (weight != 0.0f) state.out[i * block.ld + d] += weight * value;
        }
      }
    }
  }
}

void begin(const AttentionForward& args, const Sequence& s, State& state) {
  const Tile& t = state.tile;
  const int lanes = t.vecs * kWidth;
  with_storage(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    scaled_rows_to_panel(row_of<const T>(args, args.q, s, s.h, s.q0, t.first), args.q.row, t.rows, int(args.D),
                         args.scale, t.vecs, state.q);
  });
  state.started = false;
  for (int i = 0; i < lanes; ++i) {
    state.maximum[i] = -kInf;
    state.sum[i] = 0.0f;
  }
}

void finish(const AttentionForward& args, const Sequence& s, const State& state) {
  const Tile& t = state.tile;
  const int D = int(args.D);
  const int64_t ld = row_floats(D);
  if (!state.started) std::memset(state.out, 0, sizeof(float) * t.rows * ld);
  float factors[kLanes];
  for (int v = 0; v < t.vecs; ++v) {
    const Vec sum = load(state.sum + v * kWidth);
    store(factors + v * kWidth, sum == Vec{} ? Vec{} : splat(args.dropout_scale) / sum);
  }
  with_storage(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* out = row_of<T>(args, args.out, s, s.h, s.q0, t.first);
    const float* from = state.out;
    for (int i = 0; i < t.rows; ++i, out += args.out.row, from += ld) {
      const Vec factor = splat(factors[i]);
      int d = 0;
#pragma GCC unroll 4
      for (; d + kWidth <= D; d += kWidth) store(out + d, load(from + d) * factor);
      if (d < D) store(out + d, load(from + d) * factor, D - d);
    }
  });
  float* lse = row_of<float>(args, args.lse, s, s.h, s.q0, t.first);
  for (int i = 0; i < t.rows; ++i) {
    const float sum = state.sum[i];
    lse[i * args.lse.row] = sum == 0.0f ? -kInf : state.maximum[i] + __builtin_logf(sum);
  }
}

// Groups of rows that the products of a tile are, about.
int64_t groups_of(int vecs, int64_t keys, int64_t rows, int64_t D) {
  constexpr int64_t kColumns = (kRegisters == 32 ? 4 : 2) * kWidth,
                    kRows = rows_in_registers<kRegisters == 32 ? 4 : 2>();
  if (keys <= 0) return 0;
  int64_t scores = keys;
  with_vecs(vecs, [&](auto n) { scores = keys / rows_in_registers<decltype(n)::value>() + 1; });
  const int64_t out = (D + kColumns - 1) / kColumns * ((rows + kRows - 1) / kRows);
  return scores + out * ((keys + kKeys - 1) / kKeys);
}

// The longest sequence's tiles in chunks: as large as they may be, if all threads have some then.
struct Chunks {
  int64_t tiles, count;

  explicit Chunks(const AttentionForward& args) : tiles(kTiles) {
    const int64_t all = Tiling(args.L).tiles;
    const auto update = [&] { count = (all + tiles - 1) / tiles; };
    for (update(); tiles > 1 && args.B * args.H * count < 4 * omp_get_max_threads(); update()) tiles /= 2;
  }
};

// One of them, of one head.
struct Task {
  Sequence s;
  Tiling tiling;
  int64_t first, tiles;  // none: there are fewer queries

  // Last chunks first: under a causal mask they are the longest.
  Task(const AttentionForward& args, const Chunks& chunks, int64_t number)
      : s(sequence(args, number % (args.B * args.H) / args.H, number % args.H)), tiling(s.L) {
    first = (chunks.count - 1 - number / (args.B * args.H)) * chunks.tiles;
    tiles = larger(0, smaller(chunks.tiles, tiling.tiles - first));
  }
};

// All of the task's queries and outputs, and its first block of keys and values. asks: how often there is time for it.
Ahead ahead_of(const AttentionForward& args, const Task& task, int64_t asks) {
  Ahead ahead;
  if (task.tiles == 0) return ahead;
  const Sequence& s = task.s;
  const Tile last = make_tile(args, s, task.tiling, task.first + task.tiles - 1);
  const int64_t low = make_tile(args, s, task.tiling, task.first).low / kKeys * kKeys;
  const int64_t start = task.tiling.first_vector(task.first) * kWidth, rows = last.first + last.rows - start;
  const int64_t keys = smaller(kKeys, s.S - low);
  ahead.add(args, args.q, s, s.h, s.q0, start, rows);
  ahead.add(args, args.k, s, s.hk, s.k0, low, keys);
  ahead.add(args, args.v, s, s.hk, s.k0, low, keys);
  ahead.add(args, args.out, s, s.h, s.q0, start, rows);
  ahead.spread(asks);
  return ahead;
}

// after: the task that comes next, or nullptr.
void run(const AttentionForward& args, const Task& task, const Task* after, float* scratch) {
  if (task.tiles == 0) return;
  const Sequence& s = task.s;
  const int64_t D = args.D;
  float *spare_k, *spare_v;
  KeyBlock block = make_block(scratch, D, spare_k, spare_v);
  float* scores = scratch + block_floats(D);
  MaskTile& masks = *reinterpret_cast<MaskTile*>(scores + kTileFloats);
  float* next = scores + kTileFloats + kMaskTileFloats;

  const int64_t panel = row_floats(D) * kLanes;
  State states[kTiles];
  int64_t low = s.S, high = 0, groups = 0;
  for (int i = 0; i < task.tiles; ++i) {
    State& state = states[i];
    state.tile = make_tile(args, s, task.tiling, task.first + i);
    state.q = next;
    state.out = state.q + panel;
    state.maximum = state.out + panel;
    state.sum = state.maximum + kLanes;
    next = state.sum + kLanes;
    begin(args, s, state);
    low = smaller(low, state.tile.low);
    high = larger(high, state.tile.high);
    groups += groups_of(state.tile.vecs, state.tile.high - state.tile.low, state.tile.rows, D);
  }
  Ahead ahead;
  if (after != nullptr) ahead = ahead_of(args, *after, groups);
  for (int64_t j0 = low / kKeys * kKeys; j0 < high; j0 += kKeys) {
    load_block(args, s, j0, int(smaller(kKeys, high - j0)), j0 + kKeys < high, spare_k, spare_v, true, block);
    for (int i = 0; i < task.tiles; ++i) {
      const Tile& t = states[i].tile;
      if (j0 >= t.high || j0 + block.count <= t.low) continue;
      with_vecs(t.vecs, [&](auto n) { step<decltype(n)::value>(args, s, states[i], block, scores, masks, ahead); });
    }
  }
  for (int i = 0; i < task.tiles; ++i) finish(args, s, states[i]);
}

}  // namespace

void attention_forward(const AttentionForward& args) {
  const Chunks chunks(args);
  const int64_t heads = args.B * args.H, size = forward_scratch(args.D);
  parallel_runs(chunks.count * heads, heads * args.L * args.S * args.D, [&](int64_t begin, int64_t end) {
    float* const scratch = args.scratch + omp_get_thread_num() * size;
    Task task(args, chunks, begin);
    for (int64_t number = begin; number < end; ++number) {
      const Task after(args, chunks, number + 1 < end ? number + 1 : number);
      run(args, task, number + 1 < end ? &after : nullptr, scratch);
      task = after;
    }
  });
}

}  // namespace fused::cpu::FT_ISA
