// The attention probabilities on CUDA, computed again from lse: weights = dropout(exp(scale q k^T + bias - lse)), for
// whoever wants to see them. A block computes 64 queries by 64 keys of one head. Bound by writing (B, H, L, S).

#include "device_backward.cuh"
#include "device_launch.cuh"

namespace fused::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp, kQueries = 16 * kWarps, kKeys = 64, N = kKeys / 8;
constexpr int kStride = kKeys + 4;  // of a row on its way out; the 4 spread the banks

using Bias = BiasTile<kQueries, kKeys>;

template <class T, int kCols>
struct Shape {
  static constexpr int kStage = Tile<T, kCols>::bytes(kQueries + kKeys);
  static constexpr int kBias = kStage + kQueries * kStride * int(sizeof(T));
  static constexpr int bytes(bool biased) { return kBias + (biased ? Bias::kBytes : 0); }
};

// A warp's 16 queries: scores become weights.
template <class T>
FT_DEVICE void weights_of_scores(const AttentionWeights& args, const Sequence& s, int head, int row, int key,
                                 const Seen& seen, float (&scores)[1][N][4]) {
  const Weights<T> weights(args);
  uint32_t kept[1] = {~0u};
  const bool dropout = args.dropout_p > 0.0f;
  if (dropout) kept_rows<1, N>(Dropout(args, s, head), row, key, kept);
  if (!seen.all) mask_scores(seen, scores);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = row + half * 8 + group();
    float lse = -INFINITY;
    if (query < s.L) lse = *query_row<float>(args, args.lse, s, head, query);
    lse = lse == -INFINITY ? INFINITY : (sizeof(T) == 4 ? lse : lse * kLog2E);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = half * 2; i < half * 2 + 2; ++i) {
        float& score = scores[0][n][i];
        score = score == -INFINITY ? 0.0f : weights(score, lse);
        if (dropout) score = kept[0] >> (4 * n + i) & 1 ? score * args.dropout_scale : 0.0f;
      }
  }
}

// grid (tiles of keys * tiles of queries * B * H), block (kThreads); padded batches alone
template <class T, int kCols>
__global__ void __launch_bounds__(kThreads, 4)
    attention_weights_kernel(const AttentionWeights args, const int query_tiles, const int key_tiles) {
  const int key = int(blockIdx.x) % key_tiles * kKeys, rest = int(blockIdx.x) / key_tiles;
  const int first = rest % query_tiles * kQueries, head = rest / query_tiles % int(args.H);
  const Sequence s = make_sequence(args, rest / query_tiles / int(args.H));
  const int warp_row = warp_id() * 16, row = first + warp_row;

  char* const memory = dynamic_shared();
  const Tile<T, kCols> q{reinterpret_cast<T*>(memory)}, k{q.data + kQueries * kCols};
  T* const stage = reinterpret_cast<T*>(memory + Shape<T, kCols>::kStage) + warp_row * kStride;
  const Bias bias{memory + Shape<T, kCols>::kBias};
  float scores[1][N][4];
  clear(scores);

  if (visible_keys(s, first, kQueries).touches(key, kKeys)) {
    load_tile<kQueries, kThreads>(
        q, Source<T>{query_row<T>(args, args.q, s, head, first), args.q.row, s.L - first, int(args.D), args.vectors});
    load_tile<kKeys, kThreads>(k, Source<T>{key_row<T>(args, args.k, s, key_head(args, head), key), args.k.row,
                                            s.S - key, int(args.D), args.vectors});
    if (args.bias.data != nullptr) bias.load<kThreads>(args, s, head, first, key);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    const Seen seen =
        what_is_seen<16, kKeys, kThreads>(args, s, head, row, key, visible_keys(s, row, 16).cuts(key, kKeys));
    if (seen.any) {
      product_nt(scores, q, warp_row, k);
      if (args.bias.data != nullptr)
        add_bias(args, bias, warp_row, args.scale, scores);
      else if (sizeof(T) == 4)
        scale_scores(args.scale, scores);
      weights_of_scores<T>(args, s, head, row, key, seen, scores);
    }
  }
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      store_pair(stage + (half * 8 + group()) * kStride + n * 8 + pair(), scores[0][n][half * 2],
                 scores[0][n][half * 2 + 1]);
  __syncwarp();
  T* const out = static_cast<T*>(args.weights) + (int64_t(rest / query_tiles) * args.L + row) * args.S + key;
  for (int i = 0; i < 16 && row + i < args.L; ++i)
    for (int col = lane_id(); col < kKeys && key + col < args.S; col += kWarp)
      out[i * args.S + col] = stage[i * kStride + col];
}

}  // namespace

void attention_weights(const AttentionWeights& given, void* stream) {
  if (given.B == 0 || given.H == 0 || given.L == 0 || given.S == 0) return;
  check(given);
  FT_REQUIRE(given.q_offsets == nullptr, "weights are for padded batches");
  AttentionWeights args = given;
  prepare(args, stream);
  dispatch_on_device(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_columns<T>(args.D, [&](auto columns) {
      constexpr int kCols = decltype(columns)::value;
      const int64_t query_tiles = (args.L + kQueries - 1) / kQueries, key_tiles = (args.S + kKeys - 1) / kKeys;
      launch(attention_weights_kernel<T, kCols>, Grid{query_tiles * key_tiles * args.B * args.H}, kThreads,
             Shape<T, kCols>::bytes(args.bias.data != nullptr), stream, args, int(query_tiles), int(key_tiles));
    });
  });
}

}  // namespace fused::cuda
