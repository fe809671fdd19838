// Attention backward on the CPU: weights are recomputed from lse, block by block.
//
//   P = exp(S - lse),  dV = P^T dO,  dP = dO V^T,  dS = P (dP - delta),  dQ = scale dS K,  dK = scale dS^T Q
//   delta = sum over d of dO * out
//
// Five products per tile and block, 10 D operations per score: bound by the FMA units (outcome of both passes together,
// as forward.simd.cpp counts: 83 and 62 % with lengths up to 512, 50 and 42 % up to 128). Chunks of queries (see
// tiles.h) meet blocks of keys in a fixed order, and every gradient element is a sum of tiles' sums in that order; so
// the result has the same bits however the work is spread over threads. If there are heads enough, a task is a key head
// and computes all three gradients at once. If not, dK and dV are computed by tasks over ranges of keys and dQ by tasks
// over chunks, recomputing S and dP once more. A wanted bias gradient is a pass of its own over those bias elements
// that it sums into.

#include <omp.h>

#include "../common/parallel.h"
#include "product.h"
#include "scores.h"

namespace fused::cpu::FT_ISA {
namespace {

struct State {
  Tile tile;
  float *q, *dout;                 // panels [D][lanes], lane = query
  float *q_rows, *dout_rows, *dq;  // [lanes][ld]
  float *lse, *delta;              // [lanes]
  bool started;                    // whether dq holds anything yet
};

struct Scratch {
  KeyBlock block;
  float *spare_k, *spare_v;
  float *weights, *dscores;  // [kKeys][lanes]
  float* rows;               // [lanes][kKeys], to turn a tile back to rows
  MaskTile* masks;
  float* states;
};

Scratch make_scratch(float* memory, int64_t D) {
  Scratch scratch;
  scratch.block = make_block(memory, D, scratch.spare_k, scratch.spare_v);
  scratch.weights = memory + block_floats(D);
  scratch.dscores = scratch.weights + kTileFloats;
  scratch.rows = scratch.dscores + kTileFloats;
  scratch.masks = reinterpret_cast<MaskTile*>(scratch.rows + kTileFloats);
  scratch.states = scratch.rows + kTileFloats + kMaskTileFloats;
  return scratch;
}

enum Gradients : int { kQuery = 1, kKey = 2, kBias = 4 };

// Adds a tile of d(scores) to the bias gradient, over the axes that the bias broadcasts.
void add_to_dbias(const AttentionBackward& args, const Sequence& s, const Tile& t, int64_t j0, int count,
                  const float* dscores, float* rows) {
  const int64_t* stride = args.dbias_stride;
  float* base = args.dbias_data + s.b * stride[0] + s.h * stride[1] + t.first * stride[2] + j0 * stride[3];
  panel_to_rows(dscores, t.vecs * kWidth, count, t.rows, rows, kKeys);
  for (int i = 0; i < t.rows; ++i) {
    float* out = base + i * stride[2];
    for (int j = 0; j < count; ++j) out[j * stride[3]] += rows[i * kKeys + j];
  }
}

template <int NV>
void step(const AttentionBackward& args, const Sequence& s, State& state, const Scratch& scratch, int wanted) {
  constexpr int lanes = NV * kWidth;
  const Tile& t = state.tile;
  const KeyBlock& block = scratch.block;
  const int D = int(args.D), available = int(smaller(block.count, t.high - block.j0));
  MaskTile& masks = *scratch.masks;
  float *weights = scratch.weights, *dscores = scratch.dscores;
  const int count = load_keep(args, s, t, block.j0, available, masks);
  if (count == 0) return;
  product<NV, true>(count, D, block.k, block.ld, state.q, lanes, weights, lanes, false);
  mask_scores<NV>(args, s, t, block.j0, count, masks, weights);
  product<NV, true>(count, D, block.v, block.ld, state.dout, lanes, dscores, lanes, false);

  const bool dropout = args.dropout_p > 0.0f;
  const Vec dropout_scale = splat(args.dropout_scale);
  if (dropout) {
    for_each_dropout<NV>(args, s, t, block.j0, count, [&](int j, int v, IVec kept) {
      float* dweight = dscores + j * lanes + v * kWidth;
      store(dweight, kept ? load(dweight) * dropout_scale : Vec{});
    });
  }
  for (int v = 0; v < NV; ++v) {
    const Vec lse = load(state.lse + v * kWidth), delta = load(state.delta + v * kWidth);
    for (int j = 0; j < count; ++j) {
      const int at = j * lanes + v * kWidth;
      const Vec score = load(weights + at), weight = exp(score - lse);
      // a masked score's dP may be NaN, from a garbage value row: it must not meet its weight of 0
      const Vec dscore = weight * (load(dscores + at) - delta);
      store(dscores + at, score == splat(-kInf) ? Vec{} : dscore);
      store(weights + at, weight);
    }
  }
  const int vectors = int(block.ld / kWidth);
  if (wanted & kKey) {
    const int64_t dk_row = args.dk.row, dv_row = args.dv.row;
    float* dk = row_of<float>(args, args.dk, s, s.hk, s.k0, block.j0);
    float* dv = row_of<float>(args, args.dv, s, s.hk, s.k0, block.j0);
    product_wide<true>(count, t.rows, dscores, lanes, state.q_rows, block.ld, dk, dk_row, vectors, true);
    if (dropout) {
      for_each_dropout<NV>(args, s, t, block.j0, count, [&](int j, int v, IVec kept) {
        float* weight = weights + j * lanes + v * kWidth;
        store(weight, kept ? load(weight) * dropout_scale : Vec{});
      });
    }
    product_wide<true>(count, t.rows, weights, lanes, state.dout_rows, block.ld, dv, dv_row, vectors, true);
  }
  if (wanted & kQuery) {
    product_wide<false>(t.rows, count, dscores, lanes, block.k_safe, block.ld, state.dq, block.ld, vectors,
                        state.started);
    state.started = true;
  }
  if (wanted & kBias) add_to_dbias(args, s, t, block.j0, count, dscores, scratch.rows);
}

// Loads q (times scale) and dout both ways round, delta, and lse with +inf where a row must give no gradient.
void begin(const AttentionBackward& args, const Sequence& s, State& state, float* rows) {
  const Tile& t = state.tile;
  const int D = int(args.D), lanes = t.vecs * kWidth;
  const int64_t ld = row_floats(D);
  with_storage(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto rows_of = [&](const Rows& x) { return row_of<T>(args, x, s, s.h, s.q0, t.first); };
    load_rows(rows_of(args.q), args.q.row, t.rows, D, args.scale, state.q_rows, ld);
    load_rows(rows_of(args.dout), args.dout.row, t.rows, D, 1.0f, state.dout_rows, ld);
    load_rows(rows_of(args.out), args.out.row, t.rows, D, 1.0f, rows, ld);
  });
  const float* lse = row_of<float>(args, args.lse, s, s.h, s.q0, t.first);
  for (int i = 0; i < lanes; ++i) {
    const bool alive = i < t.rows && lse[i * args.lse.row] != -kInf;
    state.lse[i] = alive ? lse[i * args.lse.row] : kInf;
    if (alive) continue;  // nothing that a dead row holds may meet a weight of 0
    for (float* dead : {state.q_rows, state.dout_rows, rows}) std::memset(dead + i * ld, 0, sizeof(float) * ld);
  }
  rows_to_panel(state.q_rows, ld, D, t.vecs, state.q, lanes);
  rows_to_panel(state.dout_rows, ld, D, t.vecs, state.dout, lanes);
  rows_to_panel(rows, ld, D, t.vecs, state.dq, lanes);
  // One chain over d, as in the product that gives dP: where a row sees a single key, the two are equal to the last bit
  // and its dS is exactly 0.
  with_vecs(t.vecs, [&](auto n) {
    constexpr int NV = decltype(n)::value;
    Vec delta[NV]{};
    for (int d = 0; d < D; ++d)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        delta[v] += load(state.dq + d * lanes + v * kWidth) * load(state.dout + d * lanes + v * kWidth);
    for (int v = 0; v < NV; ++v) store(state.delta + v * kWidth, delta[v]);
  });
  state.started = false;
}

void finish(const AttentionBackward& args, const Sequence& s, const State& state) {
  const Tile& t = state.tile;
  const int D = int(args.D);
  const int64_t ld = row_floats(D);
  if (!state.started) std::memset(state.dq, 0, sizeof(float) * t.rows * ld);
  with_storage(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* dq = row_of<T>(args, args.dq, s, s.h, s.q0, t.first);
    for (int i = 0; i < t.rows; ++i)
      for (int d = 0; d < D; d += kWidth)
        store(dq + i * args.dq.row + d, load(state.dq + i * ld + d) * splat(args.scale), int(smaller(kWidth, D - d)));
  });
}

// Zeros dK and dV of keys [begin, end) of one key head, just ahead of their first use, while they fit the cache.
void clear(const AttentionBackward& args, const Sequence& s, int64_t begin, int64_t end) {
  for (const Rows* x : {&args.dk, &args.dv})
    for (int64_t j = begin; j < end; ++j)
      std::memset(row_of<float>(args, *x, s, s.hk, s.k0, j), 0, sizeof(float) * row_floats(args.D));
}

// The keys that a sequence owns: those beyond k_lengths get gradient 0 too.
int64_t own_keys(const AttentionBackward& args, int64_t b) {
  return args.k_offsets == nullptr ? args.S : args.k_offsets[b + 1] - args.k_offsets[b];
}

// One chunk of queries against the keys in [begin_key, end_key), which start on a block.
void chunk(const AttentionBackward& args, const Sequence& s, int64_t index, int64_t begin_key, int64_t end_key,
           int wanted, float* memory) {
  const Tiling tiling(s.L);
  const int64_t first = index * kTiles, tiles = smaller(kTiles, tiling.tiles - first);
  if (tiles <= 0) return;
  Scratch scratch = make_scratch(memory, args.D);
  State states[kTiles];
  int64_t low = s.S, high = 0;
  for (int i = 0; i < tiles; ++i) {
    states[i].tile = make_tile(args, s, tiling, first + i);
    low = smaller(low, states[i].tile.low);
    high = larger(high, states[i].tile.high);
  }
  low = larger(low / kKeys * kKeys, begin_key);
  high = smaller(high, end_key);
  if (low >= high && !(wanted & kQuery)) return;
  float* next = scratch.states;
  for (int i = 0; i < tiles; ++i) {
    State& state = states[i];
    float** const panels[5] = {&state.q, &state.dout, &state.dq, &state.q_rows, &state.dout_rows};
    for (float** panel : panels) {
      *panel = next;
      next += row_floats(args.D) * kLanes;
    }
    state.lse = next;
    state.delta = next + kLanes;
    next += 2 * kLanes;
    begin(args, s, state, scratch.block.k_rows);
  }
  for (int64_t j0 = low; j0 < high; j0 += kKeys) {
    const int count = int(smaller(kKeys, high - j0));
    load_block(args, s, j0, count, j0 + kKeys < high, scratch.spare_k, scratch.spare_v, true, scratch.block);
    for (int i = 0; i < tiles; ++i) {
      const Tile& t = states[i].tile;
      if (j0 >= t.high || j0 + count <= t.low) continue;
      with_vecs(t.vecs, [&](auto n) { step<decltype(n)::value>(args, s, states[i], scratch, wanted); });
    }
  }
  if (wanted & kQuery)
    for (int i = 0; i < tiles; ++i) finish(args, s, states[i]);
}

}  // namespace

void attention_backward(const AttentionBackward& args) {
  const int64_t chunks = (Tiling(args.L).tiles + kTiles - 1) / kTiles, group = args.H / args.Hk;
  const int64_t work = args.B * args.H * args.L * args.S * args.D, size = backward_scratch(args.D);
  const auto memory = [&] { return args.scratch + omp_get_thread_num() * size; };

  if (args.B * args.Hk >= 2 * omp_get_max_threads() || omp_get_max_threads() == 1) {
    parallel_tasks(args.B * args.Hk, work, [&](int64_t task) {
      const int64_t b = task / args.Hk, hk = task % args.Hk;
      clear(args, sequence(args, b, hk * group), 0, own_keys(args, b));
      for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
        const Sequence s = sequence(args, b, h);
        for (int64_t c = 0; c < chunks; ++c) chunk(args, s, c, 0, s.S, kQuery | kKey, memory());
      }
    });
  } else {
    constexpr int64_t kRange = 2 * kKeys;
    const int64_t ranges = (args.S + kRange - 1) / kRange;
    parallel_tasks(args.B * args.Hk * ranges, work, [&](int64_t task) {
      const int64_t range = task / (args.B * args.Hk), head = task % (args.B * args.Hk);
      const int64_t b = head / args.Hk, hk = head % args.Hk;
      clear(args, sequence(args, b, hk * group), smaller(range * kRange, own_keys(args, b)),
            smaller((range + 1) * kRange, own_keys(args, b)));
      for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
        const Sequence s = sequence(args, b, h);
        for (int64_t c = 0; c < chunks; ++c) chunk(args, s, c, range * kRange, (range + 1) * kRange, kKey, memory());
      }
    });
    parallel_tasks(args.B * args.H * chunks, work, [&](int64_t task) {
      const int64_t head = task % (args.B * args.H), c = chunks - 1 - task / (args.B * args.H);
      const Sequence s = sequence(args, head / args.H, head % args.H);
      chunk(args, s, c, 0, s.S, kQuery, memory());
    });
  }
  if (args.dbias_data != nullptr) {  // a task owns the bias elements it adds to, and visits them in a fixed order
    const int64_t* stride = args.dbias_stride;
    const int64_t bs = stride[0] ? args.B : 1, hs = stride[1] ? args.H : 1, cs = stride[2] ? chunks : 1;
    parallel_tasks(bs * hs * cs, work, [&](int64_t task) {
      const int64_t c0 = task % cs, h0 = task / cs % hs, b0 = task / cs / hs;
      for (int64_t b = b0; b < (stride[0] ? b0 + 1 : args.B); ++b)
        for (int64_t h = h0; h < (stride[1] ? h0 + 1 : args.H); ++h) {
          const Sequence s = sequence(args, b, h);
          for (int64_t c = c0; c < (stride[2] ? c0 + 1 : chunks); ++c) chunk(args, s, c, 0, s.S, kBias, memory());
        }
    });
  }
}

}  // namespace fused::cpu::FT_ISA
