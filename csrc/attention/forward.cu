// Attention forward on CUDA: online softmax over tiles of keys (FlashAttention-2, Dao 2023), no (L, S) matrix.
//
// A block of four warps takes 64 R queries of one head, a warp 16 R of them. Q stays in shared memory; keys and values
// come by cp.async, a tile of one while the other is worked at: values arrive under Q K^T, the next keys under the
// softmax and P V. Per score 4 D multiply-adds on the tensor cores and one exp: bound by the tensor cores from D = 64
// on. Memory moved: q and out once, k and v once per 64 R queries, mostly out of the L2 cache.
//
// With R = 2 every fragment of K and V that a warp reads from shared memory serves two products, and shared memory
// keeps up with the tensor cores; it takes all registers. R = 1 is for problems that would fill too few
// multiprocessors, and for those with a bias or dropout, which have other work to do than products.

#include "../common/vote.cuh"
#include "device_bias.cuh"
#include "device_launch.cuh"
#include "device_output.cuh"

namespace fused::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;

template <class T, int kCols, int R>
struct Shape {
  static constexpr int kQueries = 16 * R * kWarps;
  static constexpr int kKeys = sizeof(T) == 4 && kCols > 128 ? 32 : 64;
  static constexpr int kScratch = scratch_floats<T, R, kKeys / 8>();  // of a warp
  static constexpr int kBytes =                                       // without the bias
      Tile<T, kCols>::bytes(kQueries + 2 * kKeys) + kWarps * kScratch * int(sizeof(float));
  static constexpr bool kPlain = R > 1;  // no bias, no dropout, scale > 0
  using Bias = BiasTile<kQueries, kKeys>;
  static constexpr int kBlocksAtOnce = R == 1 && kCols <= 64 && sizeof(T) == 2 ? 3 : 2;  // registers for as many
};

// What all threads of a block know: in shared memory, to be read where it is needed instead of held in registers.
struct Task {
  Sequence s;
  int head;
  KeyRange range, of_warp[kWarps];
  const void *keys, *values;  // the first of them
};

// grid (tiles of queries * B * H), block (kThreads): the last tiles first, which see most under a causal mask
template <class T, int kCols, int R>
__global__ void __launch_bounds__(kThreads, Shape<T, kCols, R>::kBlocksAtOnce)
    attention_forward_kernel(const AttentionForward args, const int tiles) {
  using Mine = Shape<T, kCols, R>;
  constexpr int kKeys = Mine::kKeys, N = kKeys / 8, M = kCols / 8;
  FT_SHARED(Task, tasks, [1]);
  const Task& task = tasks[0];
  const int warp = warp_id();
  const int first = (tiles - 1 - int(blockIdx.x) % tiles) * Mine::kQueries, row = first + warp * 16 * R;
  if (threadIdx.x == 0) {
    const int head = int(blockIdx.x) / tiles;
    tasks[0].s = make_sequence(args, head / int(args.H));
    tasks[0].head = head % int(args.H);
    tasks[0].range = visible_keys(task.s, first, Mine::kQueries);
    tasks[0].keys = key_row<T>(args, args.k, task.s, key_head(args, task.head), 0);
    tasks[0].values = key_row<T>(args, args.v, task.s, key_head(args, task.head), 0);
    for (int w = 0; w < kWarps; ++w) tasks[0].of_warp[w] = visible_keys(task.s, first + w * 16 * R, 16 * R);
  }
  __syncthreads();
  const Sequence& s = task.s;
  const KeyRange &range = task.range, &of_warp = task.of_warp[warp];
  if (first >= s.L) return;

  const Tile<T, kCols> q{reinterpret_cast<T*>(dynamic_shared())}, k{q.data + Mine::kQueries * kCols},
      v{k.data + kKeys * kCols};
  const typename Mine::Bias bias{dynamic_shared() + Mine::kBytes};
  float* scratch = reinterpret_cast<float*>(v.data + kKeys * kCols) + warp * Mine::kScratch;
  const auto load = [&](const Tile<T, kCols>& tile, const void* rows, int64_t stride, int key) {
    load_tile<kKeys, kThreads>(
        tile, Source<T>{static_cast<const T*>(rows) + key * stride, stride, s.S - key, int(args.D), args.vectors});
    copy_async_commit();
  };

  const bool biased = !Mine::kPlain && args.bias.data != nullptr;
  const bool dropout = !Mine::kPlain && args.dropout_p > 0.0f;
  // Scores are kept as they come from Q K^T where that is possible, and are otherwise scaled, the bias added to them.
  const bool scaled = !Mine::kPlain && (sizeof(T) == 4 || biased || !(args.scale > 0.0f));
  const float unit = scaled ? kLog2E : args.scale * kLog2E;
  Softmax<R> softmax;
  float out[R][M][4];
  clear(out);

  const int begin = range.low / kKeys * kKeys;
  if (begin < range.high) {
    load_tile<Mine::kQueries, kThreads>(q, Source<T>{query_row<T>(args, args.q, s, task.head, first), args.q.row,
                                                     s.L - first, int(args.D), args.vectors});
    load(k, task.keys, args.k.row, begin);
  }
  for (int key = begin; key < range.high; key += kKeys) {
    const bool holes = has_holes(args), cut = of_warp.cuts(key, kKeys);
    bool active = __any_sync(kWholeWarp, of_warp.touches(key, kKeys));  // the same in all lanes, and known to be
    Seen seen;
    if (active && (holes || cut)) {
      seen = what_is_seen<16 * R, kKeys, kThreads>(args, s, task.head, row, key, cut);
      active = seen.any;
    }
    uint32_t kept[R];  // drawn here, where registers are free
    if (active && dropout) kept_rows<R, N>(Dropout(args, s, task.head), row, key, kept);
    copy_async_wait<0>();
    __syncthreads();  // keys are there, and nobody reads the last values and bias any more
    if (biased) bias.template load<kThreads>(args, s, task.head, first, key);
    load(v, task.values, args.v.row, key);

    float scores[R][N][4];
    if (active) {
      clear(scores);
      product_nt(scores, q, warp * 16 * R, k);
    }
    copy_async_wait<0>();
    bool bad = false;
    if (holes || range.cuts(key, kKeys))
      bad = syncthreads_or(!own_chunks_are_finite<kKeys, kThreads>(v));
    else
      __syncthreads();
    // values and bias are there, and nobody reads the keys any more
    if (key + kKeys < range.high) load(k, task.keys, args.k.row, key + kKeys);

    if (active) {
      if (biased)
        add_bias(args, bias, warp * 16 * R, args.scale, scores);
      else if (scaled)
        scale_scores(args.scale, scores);
      if (!seen.all) mask_scores(seen, scores);
    }
    if (bad) {
      clean_own_chunks<kKeys, kThreads>(v, [](int) { return true; });
      __syncthreads();
    }
    if (active) {
      softmax.template add<T>(scores, unit, out);
      if (dropout) drop(kept, scores);
      product_nn(out, scores, v, 0, scratch);
      if (bad) {
        const Source<T> from{static_cast<const T*>(task.values) + key * args.v.row, args.v.row, s.S - key, int(args.D),
                             false};
        const auto masks = [&](int i, int j) { return biased && bias.one(args, warp * 16 * R + i, j) == -INFINITY; };
        add_nonfinite_values(seen, from, kKeys, masks, out);
      }
    }
  }
  store_output(args, s, task.head, row, q, warp * 16 * R, softmax, scaled ? 1.0f : args.scale, out);
}

template <class T, int kCols, int R>
void launch_forward(const AttentionForward& args, void* stream) {
  using Mine = Shape<T, kCols, R>;
  const int64_t tiles = (args.L + Mine::kQueries - 1) / Mine::kQueries;
  const int bytes = Mine::kBytes + (args.bias.data != nullptr ? Mine::Bias::kBytes : 0);
  launch(attention_forward_kernel<T, kCols, R>, Grid{tiles * args.B * args.H}, kThreads, bytes, stream, args,
         int(tiles));
}

}  // namespace

void attention_forward(const AttentionForward& given, void* stream) {
  if (given.B == 0 || given.H == 0 || given.L == 0) return;
  check(given);
  AttentionForward args = given;
  prepare(args, stream);
  args.vectors = args.vectors && is_aligned(args, args.out, args.H);
  dispatch_on_device(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_columns<T>(args.D, [&](auto columns) {
      constexpr int kCols = decltype(columns)::value;
      if constexpr (sizeof(T) == 2 && kCols <= 128) {
        // Tiles of 128 queries, unless it takes those of 64 to give every multiprocessor something to do.
        const bool plain = args.bias.data == nullptr && !(args.dropout_p > 0.0f) && args.scale > 0.0f;
        if (plain && (args.L + 127) / 128 * args.B * args.H >= args.multiprocessors)
          return launch_forward<T, kCols, 2>(args, stream);
      }
      launch_forward<T, kCols, 1>(args, stream);
    });
  });
}

}  // namespace fused::cuda
