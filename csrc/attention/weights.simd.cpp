// The attention probabilities, recomputed from lse: weights = exp(scale q k^T + bias - lse), for whoever wants to see
// them. A task is one tile of queries of one head. Bound by writing (B, H, L, S).

#include <omp.h>

#include "../common/parallel.h"
#include "product.h"
#include "scores.h"

namespace fused::cpu::FT_ISA {
namespace {

// The weights of one block, key by key; returns how many of its keys may be seen.
template <int NV>
int tile_weights(const AttentionWeights& args, const Sequence& s, const Tile& t, const KeyBlock& block, const float* q,
                 const float* lse, float* weights, MaskTile& masks) {
  constexpr int lanes = NV * kWidth;
  const int count = load_keep(args, s, t, block.j0, block.count, masks);
  if (count == 0) return 0;
  product<NV, true>(count, int(args.D), block.k, block.ld, q, lanes, weights, lanes, false);
  mask_scores<NV>(args, s, t, block.j0, count, masks, weights);
  for (int v = 0; v < NV; ++v) {
    const Vec shift = load(lse + v * kWidth);
    for (int j = 0; j < count; ++j) {
      float* weight = weights + j * lanes + v * kWidth;
      store(weight, exp(load(weight) - shift));
    }
  }
  if (args.dropout_p > 0.0f) {
    const Vec scale = splat(args.dropout_scale);
    for_each_dropout<NV>(args, s, t, block.j0, count, [&](int j, int v, IVec kept) {
      float* weight = weights + j * lanes + v * kWidth;
      store(weight, kept ? load(weight) * scale : Vec{});
    });
  }
  return count;
}

template <class T>
void tile_rows(const AttentionWeights& args, const Sequence& s, int64_t index, float* scratch) {
  const Tile t = make_tile(args, s, Tiling(s.L), index);
  const int D = int(args.D), lanes = t.vecs * kWidth;
  const int64_t ld = row_floats(D);
  float *spare_k, *spare_v;
  KeyBlock block = make_block(scratch, D, spare_k, spare_v);
  float* weights = scratch + block_floats(D);
  MaskTile& masks = *reinterpret_cast<MaskTile*>(weights + kTileFloats);
  float* q = weights + kTileFloats + kMaskTileFloats;
  float *rows = q + panel_floats(D), *lse = rows + panel_floats(D);

  load_rows(row_of<T>(args, args.q, s, s.h, s.q0, t.first), args.q.row, t.rows, D, args.scale, rows, ld);
  std::memset(rows + t.rows * ld, 0, sizeof(float) * (lanes - t.rows) * ld);
  rows_to_panel(rows, ld, D, t.vecs, q, lanes);
  const float* saved = row_of<float>(args, args.lse, s, s.h, s.q0, t.first);
  for (int i = 0; i < lanes; ++i) {
    const bool alive = i < t.rows && saved[i * args.lse.row] != -kInf;
    lse[i] = alive ? saved[i * args.lse.row] : kInf;
  }
  T* out = static_cast<T*>(args.weights) + ((s.b * args.H + s.h) * args.L + t.first) * args.S;
  std::memset(static_cast<void*>(out), 0, sizeof(T) * t.rows * args.S);
  for (int64_t j0 = t.low / kKeys * kKeys; j0 < t.high; j0 += kKeys) {
    const int count = int(smaller(kKeys, t.high - j0));
    load_block(args, s, j0, count, j0 + kKeys < t.high, spare_k, spare_v, false, block);
    with_vecs(t.vecs, [&](auto n) {
      const int visible = tile_weights<decltype(n)::value>(args, s, t, block, q, lse, weights, masks);
      panel_to_rows(weights, lanes, visible, t.rows, out + j0, args.S);
    });
  }
}

// One query's mean over the heads. Summed in their order, in float32.
template <class T>
void mean_row(const AttentionWeights& args, int64_t row) {
  const int64_t b = row / args.L, i = row % args.L, head = args.L * args.S;
  const T* weights = static_cast<const T*>(args.weights) + b * args.H * head + i * args.S;
  T* out = static_cast<T*>(args.mean) + row * args.S;
  for (int64_t j = 0; j < args.S; j += kWidth) {
    const int count = int(smaller(kWidth, args.S - j));
    Vec sum{};
    for (int64_t h = 0; h < args.H; ++h) sum += load(weights + h * head + j, count);
    store(out + j, sum / splat(float(args.H)), count);
  }
}

}  // namespace

void attention_weights(const AttentionWeights& args) {
  const int64_t tiles = Tiling(args.L).tiles, heads = args.B * args.H, size = weights_scratch(args.D);
  parallel_tasks(tiles * heads, heads * args.L * args.S * args.D, [&](int64_t task) {
    const int64_t head = task / tiles;
    const Sequence s = sequence(args, head / args.H, head % args.H);
    with_storage(args.dtype, [&](auto tag) {
      tile_rows<typename decltype(tag)::type>(args, s, task % tiles, args.scratch + omp_get_thread_num() * size);
    });
  });
  if (args.mean == nullptr) return;
  with_storage(args.dtype, [&](auto tag) {
    parallel_for(args.B * args.L, heads * args.L * args.S,
                 [&](int64_t row) { mean_row<typename decltype(tag)::type>(args, row); });
  });
}

}  // namespace fused::cpu::FT_ISA
