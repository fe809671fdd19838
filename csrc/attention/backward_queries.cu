// dQ on CUDA. A block owns 64 R queries of one head, whose Q and dO stay in shared memory, and goes over the keys that
// they see, in order, 32 at a time:
//
//   dP = dO V^T,  S = Q K^T,  P,  dS,    dQ += scale dS K
//
// K and V have one buffer each: values come under the last product and the softmax, keys under dP. R as in forward.cu.

#include "../common/vote.cuh"
#include "device_backward.cuh"
#include "device_launch.cuh"

namespace fused::cuda {
namespace {

template <class T, int kCols, int R>
struct Shape {
  static constexpr bool kPlain = R > 1;
  static constexpr int kWarps = sizeof(T) == 4 && kCols > 128 ? 2 : 4, kThreads = kWarps * kWarp;
  static constexpr int kQueries = 16 * R * kWarps, kKeys = 32;
  static constexpr int kScratch = scratch_floats<T, R, kKeys / 8>();
  using Bias = BiasTile<kQueries, kKeys>;

  // Offsets in shared memory.
  static constexpr int kScratchAt = Tile<T, kCols>::bytes(2 * kQueries + 2 * kKeys);
  static constexpr int kBias = kScratchAt + kWarps * kScratch * int(sizeof(float));
  static constexpr int bytes(bool biased) { return kBias + (biased ? Bias::kBytes : 0); }
};

// What all threads of a block know: in shared memory, to be read where it is needed instead of held in registers.
struct Task {
  Sequence s;
  int head;
  KeyRange range, of_warp[4];
  const void *keys, *values;  // the first of them
};

// grid (tiles of queries * B * H), block (kThreads): the last tiles first, which see most under a causal mask
template <class T, int kCols, int R>
__global__ void __launch_bounds__(Shape<T, kCols, R>::kThreads, 2)
    attention_backward_queries_kernel(const AttentionBackward args, const int tiles) {
  using Mine = Shape<T, kCols, R>;
  constexpr int kKeys = Mine::kKeys, kThreads = Mine::kThreads, N = kKeys / 8, M = kCols / 8;
  FT_SHARED(Task, tasks, [1]);
  const Task& task = tasks[0];
  const Sequence& s = task.s;
  const int warp = warp_id(), warp_row = warp * 16 * R;
  const int first = (tiles - 1 - int(blockIdx.x) % tiles) * Mine::kQueries, row = first + warp_row;
  if (threadIdx.x == 0) {
    const int head = int(blockIdx.x) / tiles;
    tasks[0].s = make_sequence(args, head / int(args.H));
    tasks[0].head = head % int(args.H);
    tasks[0].range = visible_keys(s, first, Mine::kQueries);
    for (int w = 0; w < Mine::kWarps; ++w) tasks[0].of_warp[w] = visible_keys(s, first + w * 16 * R, 16 * R);
    tasks[0].keys = key_row<T>(args, args.k, s, key_head(args, task.head), 0);
    tasks[0].values = key_row<T>(args, args.v, s, key_head(args, task.head), 0);
  }
  __syncthreads();
  const KeyRange &range = task.range, &of_warp = task.of_warp[warp];
  if (first >= s.L) return;

  char* const memory = dynamic_shared();
  const Tile<T, kCols> q{reinterpret_cast<T*>(memory)}, dout{q.data + Mine::kQueries * kCols},
      k{dout.data + Mine::kQueries * kCols}, v{k.data + kKeys * kCols};
  float* const scratch = reinterpret_cast<float*>(memory + Mine::kScratchAt) + warp * Mine::kScratch;
  const typename Mine::Bias bias{memory + Mine::kBias};
  const Weights<T, Mine::kPlain> weights(args);
  const auto load_queries = [&](const Tile<T, kCols>& tile, const Rows& x) {
    load_tile<Mine::kQueries, kThreads>(
        tile, Source<T>{query_row<T>(args, x, s, task.head, first), x.row, s.L - first, int(args.D), args.vectors});
  };
  const auto load = [&](const Tile<T, kCols>& tile, const void* rows, int64_t stride, int key) {
    load_tile<kKeys, kThreads>(
        tile, Source<T>{static_cast<const T*>(rows) + key * stride, stride, s.S - key, int(args.D), args.vectors});
    copy_async_commit();
  };

  FT_SHARED(Statistics, statistics, [Mine::kQueries]);
  for (int i = int(threadIdx.x); i < Mine::kQueries; i += kThreads)
    statistics[i] = first + i < s.L ? *statistics_of(args, s, task.head, first + i) : Statistics{INFINITY, 0.0f};
  float dq[R][M][4];
  clear(dq);

  const int begin = range.low / kKeys * kKeys;
  if (begin < range.high) {
    load_queries(q, args.q);
    load_queries(dout, args.dout);
    load(v, task.values, args.v.row, begin);
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
    if (active && weights.dropout) kept_rows<R, N>(Dropout(args, s, task.head), row, key, kept);
    copy_async_wait<0>();
    __syncthreads();  // values are there, and nobody reads the last keys and bias any more
    if (weights.biased) bias.template load<kThreads>(args, s, task.head, first, key);
    load(k, task.keys, args.k.row, key);

    float scores[R][N][4], dscores[R][N][4];
    if (active) {
      clear(dscores);
      product_nt(dscores, dout, warp_row, v);
    }
    copy_async_wait<0>();
    bool bad = false;
    if (holes || range.cuts(key, kKeys))
      bad = syncthreads_or(!own_chunks_are_finite<kKeys, kThreads>(k));
    else
      __syncthreads();
    // keys and bias are there, and nobody reads the values any more
    if (key + kKeys < range.high) load(v, task.values, args.v.row, key + kKeys);

    if (active) {
      clear(scores);
      product_nt(scores, q, warp_row, k);
    }
    if (bad) {  // a NaN in a key that is seen is in the scores, and must not meet a dS of 0
      __syncthreads();
      clean_own_chunks<kKeys, kThreads>(k, [](int) { return true; });
      __syncthreads();
    }
    if (active) {
      if (weights.biased)
        add_bias(args, bias, warp_row, args.scale, scores);
      else if (weights.scaled)
        scale_scores(args.scale, scores);
      if (!seen.all) mask_scores(seen, scores);
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Statistics of_query = statistics[warp_row + r * 16 + half * 8 + group()];
#pragma unroll
          for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = half * 2; i < half * 2 + 2; ++i) {
              const float factor = !weights.dropout ? 1.0f : (kept[r] >> (4 * n + i) & 1 ? args.dropout_scale : 0.0f);
              weights.differentiate(scores[r][n][i], dscores[r][n][i], of_query, factor);
            }
        }
      product_nn(dq, dscores, k, 0, scratch);
    }
  }
  if (row >= s.L) return;
  float factor[R][2];
#pragma unroll
  for (int r = 0; r < R; ++r) factor[r][0] = factor[r][1] = args.scale;
  store_rows<R, M>(q, warp_row, 0, dq, factor, query_row<T>(args, args.dq, s, task.head, row), args.dq.row, s.L - row,
                   int(args.D), args.vectors);
}

template <class T, int kCols, int R>
void launch_queries(const AttentionBackward& args, void* stream) {
  using Mine = Shape<T, kCols, R>;
  const int64_t tiles = (args.L + Mine::kQueries - 1) / Mine::kQueries;
  launch(attention_backward_queries_kernel<T, kCols, R>, Grid{tiles * args.B * args.H}, Mine::kThreads,
         Mine::bytes(args.bias.data != nullptr), stream, args, int(tiles));
}

}  // namespace

void attention_backward_queries(const AttentionBackward& args, void* stream) {
  dispatch_on_device(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_columns<T>(args.D, [&](auto columns) {
      constexpr int kCols = decltype(columns)::value;
      if constexpr (sizeof(T) == 2 && kCols <= 128)
        if (is_plain(args) && (args.L + 127) / 128 * args.B * args.H >= args.multiprocessors)
          return launch_queries<T, kCols, 2>(args, stream);
      launch_queries<T, kCols, 1>(args, stream);
    });
  });
}

}  // namespace fused::cuda
