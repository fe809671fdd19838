// The gradient of the bias on CUDA: d(scores), summed over the axes that the bias broadcasts.
//
// A block owns one tile of the bias and goes over the tiles of scores that it was added to: those of all batches,
// heads, queries or keys that it does not tell apart, in a fixed order. Scores and dP are computed once more for it.
// Where that gives too few blocks, `parts` of them share the tiles that go into one sum, each writes float32 sums of
// its own, and a second kernel adds up the parts, in order.

#include "device_backward.cuh"
#include "device_launch.cuh"

namespace fused::cuda {
namespace {

template <class T, int kCols>
struct Shape {
  static constexpr int kWarps = sizeof(T) == 2 ? 4 : 2, kThreads = kWarps * kWarp;
  static constexpr int kQueries = 16 * kWarps, kKeys = kQueries;
  using Bias = BiasTile<kQueries, kKeys>;
  static constexpr int kBias = Tile<T, kCols>::bytes(2 * kQueries + 2 * kKeys), kBytes = kBias + Bias::kBytes;
  static_assert(kBias >= kQueries * kKeys * int(sizeof(float)), "the tiles' memory holds the sums at the end");
};

// Tiles along the axes (batch, head, queries, keys): those with sums of their own, and those that go into one sum.
struct Plan {
  int own[4], summed[4];
  int parts;
};

// Which tile of each axis: the own-th of those told apart, the summed-th of the others.
FT_DEVICE void tile_of(const Plan& plan, int64_t own, int64_t summed, int (&tile)[4]) {
#pragma unroll
  for (int axis = 3; axis >= 0; --axis) {
    tile[axis] = int(own % plan.own[axis]) + int(summed % plan.summed[axis]);  // one of the two counts is 1
    own /= plan.own[axis], summed /= plan.summed[axis];
  }
}

// grid (tiles of the bias * parts), block (kThreads)
template <class T, int kCols>
__global__ void __launch_bounds__(Shape<T, kCols>::kThreads, 2)
    attention_backward_bias_kernel(const AttentionBackward args, const Plan plan) {
  using Mine = Shape<T, kCols>;
  constexpr int kQueries = Mine::kQueries, kKeys = Mine::kKeys, kThreads = Mine::kThreads, N = kKeys / 8;
  FT_SHARED(Sequence, sequences, [1]);
  const Sequence& s = sequences[0];
  const int warp_row = warp_id() * 16, part = int(blockIdx.x) % plan.parts;
  const int64_t own = blockIdx.x / plan.parts;
  const int64_t all = int64_t(plan.summed[0]) * plan.summed[1] * plan.summed[2] * plan.summed[3];

  char* const memory = dynamic_shared();
  const Tile<T, kCols> q{reinterpret_cast<T*>(memory)}, dout{q.data + kQueries * kCols},
      k{dout.data + kQueries * kCols}, v{k.data + kKeys * kCols};
  const typename Mine::Bias bias{memory + Mine::kBias};
  const Weights<T> weights(args);
  float sums[1][N][4];
  clear(sums);

  for (int64_t summed = all * part / plan.parts; summed < all * (part + 1) / plan.parts; ++summed) {
    int tile[4];
    tile_of(plan, own, summed, tile);
    __syncthreads();  // nobody reads the last tiles any more
    if (threadIdx.x == 0) sequences[0] = make_sequence(args, tile[0]);
    __syncthreads();
    const int head = tile[1], first = tile[2] * kQueries, key = tile[3] * kKeys, row = first + warp_row;
    if (!visible_keys(s, first, kQueries).touches(key, kKeys)) continue;
    const auto load_queries = [&](const Tile<T, kCols>& to, const Rows& x) {
      load_tile<kQueries, kThreads>(
          to, Source<T>{query_row<T>(args, x, s, head, first), x.row, s.L - first, int(args.D), args.vectors});
    };
    const auto load_keys = [&](const Tile<T, kCols>& to, const Rows& x) {
      load_tile<kKeys, kThreads>(to, Source<T>{key_row<T>(args, x, s, key_head(args, head), key), x.row, s.S - key,
                                               int(args.D), args.vectors});
    };
    load_queries(q, args.q);
    load_queries(dout, args.dout);
    load_keys(k, args.k);
    load_keys(v, args.v);
    bias.template load<kThreads>(args, s, head, first, key);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();

    const Seen seen =
        what_is_seen<16, kKeys, kThreads>(args, s, head, row, key, visible_keys(s, row, 16).cuts(key, kKeys));
    if (!seen.any) continue;
    float scores[1][N][4], dscores[1][N][4];
    clear(scores);
    product_nt(scores, q, warp_row, k);
    clear(dscores);
    product_nt(dscores, dout, warp_row, v);
    add_bias(args, bias, warp_row, args.scale, scores);
    if (!seen.all) mask_scores(seen, scores);
    uint32_t kept[1];
    const bool dropout = args.dropout_p > 0.0f;
    if (dropout) kept_rows<1, N>(Dropout(args, s, head), row, key, kept);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = row + half * 8 + group();
      Statistics statistics{INFINITY, 0.0f};
      if (query < s.L) statistics = *statistics_of(args, s, head, query);
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = half * 2; i < half * 2 + 2; ++i) {
          const float factor = !dropout ? 1.0f : (kept[0] >> (4 * n + i) & 1 ? args.dropout_scale : 0.0f);
          weights.differentiate(scores[0][n][i], dscores[0][n][i], statistics, factor);
          sums[0][n][i] += dscores[0][n][i];
        }
    }
  }

  // Into shared memory, there over the tile's queries and keys where the bias broadcasts them, and out.
  float* const tile_sums = reinterpret_cast<float*>(memory);
  const int64_t* stride = args.dbias_stride;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      tile_sums[(warp_row + i / 2 * 8 + group()) * kKeys + n * 8 + pair() + i % 2] = sums[0][n][i];
  __syncthreads();
  int rows = kQueries, cols = kKeys;
  if (stride[2] == 0) {
    if (int(threadIdx.x) < cols)
      for (int row = 1; row < rows; ++row) tile_sums[threadIdx.x] += tile_sums[row * kKeys + threadIdx.x];
    rows = 1;
    __syncthreads();
  }
  if (stride[3] == 0) {
    if (int(threadIdx.x) < rows)
      for (int col = 1; col < cols; ++col) tile_sums[threadIdx.x * kKeys] += tile_sums[threadIdx.x * kKeys + col];
    cols = 1;
    __syncthreads();
  }
  int tile[4];
  tile_of(plan, own, 0, tile);
  const int first = tile[2] * kQueries, key = tile[3] * kKeys;
  float* const to = args.dbias_data + part * args.dbias_count + tile[0] * stride[0] + tile[1] * stride[1];
  for (int id = int(threadIdx.x); id < rows * cols; id += kThreads) {
    const int row = id / cols, col = id % cols;
    if (first + row < args.L && key + col < args.S)
      to[(first + row) * stride[2] + (key + col) * stride[3]] = tile_sums[row * kKeys + col];
  }
}

constexpr int kSumThreads = 256;

// grid (elements of the bias / kSumThreads), block (kSumThreads)
template <class B>
__global__ void __launch_bounds__(kSumThreads)
    attention_backward_bias_sums_kernel(const float* __restrict__ partial, const int parts, const int64_t count,
                                        B* __restrict__ out) {
  const int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= count) return;
  float sum = 0.0f;
  for (int part = 0; part < parts; ++part) sum += partial[part * count + i];
  from_float(sum, out[i]);
}

}  // namespace

void attention_backward_bias(const AttentionBackward& args, void* stream) {
  if (args.dbias_data == nullptr) return;
  FT_REQUIRE(args.dbias_parts >= 1 && args.dbias_out != nullptr, "where the bias gradient goes is missing");
  dispatch_on_device(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_columns<T>(args.D, [&](auto columns) {
      using Mine = Shape<T, decltype(columns)::value>;
      const int64_t tiles[4] = {args.B, args.H, (args.L + Mine::kQueries - 1) / Mine::kQueries,
                                (args.S + Mine::kKeys - 1) / Mine::kKeys};
      Plan plan;
      plan.parts = args.dbias_parts;
      int64_t blocks = plan.parts;
      for (int axis = 0; axis < 4; ++axis) {
        const bool told_apart = args.dbias_stride[axis] != 0;
        plan.own[axis] = told_apart ? int(tiles[axis]) : 1;
        plan.summed[axis] = told_apart ? 1 : int(tiles[axis]);
        blocks *= plan.own[axis];
      }
      launch(attention_backward_bias_kernel<T, decltype(columns)::value>, Grid{blocks}, Mine::kThreads, Mine::kBytes,
             stream, args, plan);
    });
  });
  dispatch_on_device(args.bias_dtype, [&](auto tag) {
    using B = typename decltype(tag)::type;
    launch(attention_backward_bias_sums_kernel<B>, Grid{(args.dbias_count + kSumThreads - 1) / kSumThreads},
           kSumThreads, 0, stream, args.dbias_data, args.dbias_parts, args.dbias_count,
           static_cast<B*>(args.dbias_out));
  });
}

}  // namespace fused::cuda
