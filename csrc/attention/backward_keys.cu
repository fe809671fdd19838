// dK and dV on CUDA. A block owns some keys of one key head, which stay in shared memory, and goes over the queries of
// all heads that read them, in order, 32 at a time; Q and dO of the next 32 come by cp.async meanwhile.
//
//   S^T = K Q^T,  P^T,  dP^T = V dO^T,  dS^T,    dV += P^T dO,  dK += scale dS^T Q
//
// Scores are computed with keys as rows: then P^T and dS^T are already where the tensor cores want the left factor of
// the last two products, and never leave the registers. A warp owns 16 R keys. Beyond 128 columns the sums of a row
// take too many registers for one warp, and kSplit warps share its columns, each computing the scores for itself.
//
// With R = 2 every fragment of Q and dO that a warp reads from shared memory serves two products. That takes all
// registers, and leaves none for a bias or dropout.

#include "device_backward.cuh"
#include "device_launch.cuh"

namespace fused::cuda {
namespace {

constexpr int kQueries = 32;

template <class T, int kCols, int R>
struct Shape {
  static constexpr bool kPlain = R > 1, kWide = kCols > 128;
  static constexpr int kKeyWarps = sizeof(T) == 4 && kWide ? 2 : 4, kSplit = kWide ? 2 : 1;
  static constexpr int kWarps = kKeyWarps * kSplit, kThreads = kWarps * kWarp;
  static constexpr int kKeys = 16 * R * kKeyWarps;
  static constexpr int kStages = sizeof(T) == 4 && kWide ? 1 : 2;  // as many as shared memory has room for
  static constexpr int kScratch = scratch_floats<T, R, kQueries / 8>();
  using Bias = BiasTile<kQueries, kKeys>;

  // Offsets in shared memory.
  static constexpr int kStatistics = Tile<T, kCols>::bytes(2 * kKeys + kStages * 2 * kQueries);
  static constexpr int kScratchAt = kStatistics + kStages * kQueries * int(sizeof(Statistics));
  static constexpr int kBias = kScratchAt + kWarps * kScratch * int(sizeof(float));
  static constexpr int bytes(bool biased) { return kBias + (biased ? kStages * Bias::kBytes : 0); }
};

// What all threads of a block know: in shared memory, to be read where it is needed instead of held in registers.
struct Task {
  Sequence s;
  int key_head, own;   // keys of the block that are the sequence's: beyond k_lengths too, whose gradient is 0
  int head;            // the first that reads this key head
  int begin, batches;  // of 32 queries, the first beginning at `begin`
};

// grid (tiles of keys * B * Hk), block (kThreads)
template <class T, int kCols, int R>
__global__ void __launch_bounds__(Shape<T, kCols, R>::kThreads, 256 / Shape<T, kCols, R>::kThreads)
    attention_backward_keys_kernel(const AttentionBackward args, const int tiles) {
  using Mine = Shape<T, kCols, R>;
  constexpr int N = kQueries / 8, M = kCols / 8 / Mine::kSplit;
  FT_SHARED(Task, tasks, [1]);
  const Task& task = tasks[0];
  const Sequence& s = task.s;
  const int first = int(blockIdx.x) % tiles * Mine::kKeys, warp = warp_id();
  const int warp_key = warp % Mine::kKeyWarps * 16 * R, first_col = warp / Mine::kKeyWarps * M * 8;
  if (threadIdx.x == 0) {
    tasks[0].s = make_sequence(args, int(blockIdx.x) / tiles / int(args.Hk));
    tasks[0].key_head = int(blockIdx.x) / tiles % int(args.Hk);
    tasks[0].own = own_keys(args, s.b) - first;
    tasks[0].head = task.key_head * int(args.H / args.Hk);
    const QueryRange range = queries_that_see(s, first, Mine::kKeys);
    tasks[0].begin = range.low / kQueries * kQueries;
    tasks[0].batches = range.low < range.high ? (range.high - task.begin + kQueries - 1) / kQueries : 0;
  }
  __syncthreads();
  if (task.own <= 0) return;

  char* const memory = dynamic_shared();
  const Tile<T, kCols> k{reinterpret_cast<T*>(memory)}, v{k.data + Mine::kKeys * kCols};
  T* const staged = v.data + Mine::kKeys * kCols;
  const auto q_tile = [&](int stage) { return Tile<T, kCols>{staged + stage * 2 * kQueries * kCols}; };
  const auto dout_tile = [&](int stage) { return Tile<T, kCols>{staged + (stage * 2 + 1) * kQueries * kCols}; };
  const auto statistics = [&](int stage) {
    return reinterpret_cast<Statistics*>(memory + Mine::kStatistics) + stage * kQueries;
  };
  const auto bias = [&](int stage) { return typename Mine::Bias{memory + Mine::kBias + stage * Mine::Bias::kBytes}; };
  float* const scratch = reinterpret_cast<float*>(memory + Mine::kScratchAt) + warp * Mine::kScratch;
  const Weights<T, Mine::kPlain> weights(args);

  const auto load_keys = [&](const Tile<T, kCols>& tile, const Rows& x) {
    load_tile<Mine::kKeys, Mine::kThreads>(
        tile, Source<T>{key_row<T>(args, x, s, task.key_head, first), x.row, s.S - first, int(args.D), args.vectors});
  };
  const auto load_queries = [&](const Tile<T, kCols>& tile, const Rows& x, int head, int query) {
    load_tile<kQueries, Mine::kThreads>(
        tile, Source<T>{query_row<T>(args, x, s, head, query), x.row, s.L - query, int(args.D), args.vectors});
  };
  const auto load = [&](int stage, int batch) {
    const int head = task.head + batch / task.batches, query = task.begin + batch % task.batches * kQueries;
    load_queries(q_tile(stage), args.q, head, query);
    load_queries(dout_tile(stage), args.dout, head, query);
    if (threadIdx.x < kQueries) {
      const int row = query + int(threadIdx.x);
      copy_async<sizeof(Statistics)>(statistics(stage) + threadIdx.x, statistics_of(args, s, head, row < s.L ? row : 0),
                                     row < s.L ? int(sizeof(Statistics)) : 0);
    }
    if (weights.biased) bias(stage).template load<Mine::kThreads>(args, s, head, query, first);
    copy_async_commit();
  };

  float dk[R][M][4], dv[R][M][4];
  clear(dk);
  clear(dv);
  const int count = task.batches * int(args.H / args.Hk);
  if (count > 0) {
    load_keys(k, args.k);
    load_keys(v, args.v);
    load(0, 0);
  }
  for (int batch = 0; batch < count; ++batch) {
    const int stage = batch % Mine::kStages;
    const int head = task.head + batch / task.batches, query = task.begin + batch % task.batches * kQueries;
    const KeyRange range = visible_keys(s, query, kQueries);
    const int key = first + warp_key;
    bool active = __any_sync(kWholeWarp, range.touches(key, 16 * R));  // the same in all lanes, and known to be
    Seen seen;
    if (active && (has_holes(args) || range.cuts(key, 16 * R))) {
      seen = what_is_seen<kQueries, 16 * R, Mine::kThreads>(args, s, head, query, key, range.cuts(key, 16 * R));
      active = seen.any;
    }
    if (Mine::kStages > 1 && batch + 1 < count) {
      load((batch + 1) % Mine::kStages, batch + 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    if (has_holes(args) || range.cuts(first, Mine::kKeys)) {
      // Nothing that a query without keys holds may meet a weight of 0.
      const auto dead = [&](int row) { return statistics_of(args, s, head, query + row)->lse == INFINITY; };
      clean_own_chunks<kQueries, Mine::kThreads>(q_tile(stage), dead);
      clean_own_chunks<kQueries, Mine::kThreads>(dout_tile(stage), dead);
    }
    __syncthreads();  // the queries are there

    if (active) {
      float scores[R][N][4], dscores[R][N][4];
      clear(scores);
      product_nt(scores, k, warp_key, q_tile(stage));
      clear(dscores);
      product_nt(dscores, v, warp_key, dout_tile(stage));
      if (weights.biased)
        add_bias_columns(args, bias(stage), warp_key, args.scale, scores);
      else if (weights.scaled)
        scale_scores(args.scale, scores);
      // With a bias always: it may be what masks a garbage key, and has nothing to say of queries beyond the end.
      if (!seen.all || weights.biased) mask_columns(seen, scores);
      uint32_t kept[R];
      if (weights.dropout) kept_columns<R>(Dropout(args, s, head), key, query, kept);
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          Statistics of_query = statistics(stage)[n * 8 + pair() + e];
          if (query + n * 8 + pair() + e >= s.L) of_query = {INFINITY, 0.0f};
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int i = e; i < 4; i += 2) {
              const float factor = !weights.dropout ? 1.0f : (kept[r] >> (4 * n + i) & 1 ? args.dropout_scale : 0.0f);
              weights.differentiate(scores[r][n][i], dscores[r][n][i], of_query, factor);
            }
        }
      product_nn(dv, scores, dout_tile(stage), first_col, scratch);
      product_nn(dk, dscores, q_tile(stage), first_col, scratch);
    }
    __syncthreads();  // nobody reads these queries any more
    if (Mine::kStages == 1 && batch + 1 < count) load(0, batch + 1);
  }

  // The tiles of keys and values have served; each warp takes its rows and columns of them.
  float factor[R][2], one[R][2];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    factor[r][0] = factor[r][1] = args.scale;
    one[r][0] = one[r][1] = 1.0f;
  }
  const auto store = [&](const Rows& x, const Tile<T, kCols>& stage, const float (&sums)[R][M][4],
                         const float (&times)[R][2]) {
    T* const to = key_row<T>(args, x, s, task.key_head, first + warp_key);
    store_rows<R, M>(stage, warp_key, first_col, sums, times, to, x.row, task.own - warp_key, int(args.D),
                     args.vectors);
  };
  store(args.dk, k, dk, factor);
  store(args.dv, v, dv, one);
}

template <class T, int kCols, int R>
void launch_keys(const AttentionBackward& args, void* stream) {
  using Mine = Shape<T, kCols, R>;
  const int64_t tiles = (args.S + Mine::kKeys - 1) / Mine::kKeys;
  launch(attention_backward_keys_kernel<T, kCols, R>, Grid{tiles * args.B * args.Hk}, Mine::kThreads,
         Mine::bytes(args.bias.data != nullptr), stream, args, int(tiles));
}

}  // namespace

void attention_backward_keys(const AttentionBackward& args, void* stream) {
  dispatch_on_device(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_columns<T>(args.D, [&](auto columns) {
      constexpr int kCols = decltype(columns)::value;
      if constexpr (sizeof(T) == 2 && kCols <= 64)
        if (is_plain(args) && (args.S + 127) / 128 * args.B * args.Hk >= args.multiprocessors)
          return launch_keys<T, kCols, 2>(args, stream);
      launch_keys<T, kCols, 1>(args, stream);
    });
  });
}

}  // namespace fused::cuda
