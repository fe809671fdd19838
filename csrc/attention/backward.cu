// Attention backward on CUDA: passes each of which computes the weights it needs again from lse, and none of
// which adds to what another block adds to. So there are no atomics, and the same bits on every run.
//
//   statistics  delta = dO . out of each query                                                   (here)
//   keys        a block owns some keys and goes over the queries that see them: dK, dV           (backward_keys.cu)
//   queries     a block owns some queries and goes over the keys they see: dQ                    (backward_queries.cu)
//   bias        if it is wanted: a block owns a tile of the bias                                 (backward_bias.cu)
//
// Seven products of L S D multiply-adds where five are needed (scores and dP twice), against a sum of dQ over blocks.

#include "device_backward.cuh"
#include "device_launch.cuh"

namespace fused::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp, kRows = 16 * kWarps;

// grid (tiles of kRows queries * B * H), block (kThreads). delta is the diagonal of dO out^T, by the very product that
// gives dP: where a query sees a single key, whose value is its output, dP - delta is then exactly 0.
template <class T, int kCols>
__global__ void __launch_bounds__(kThreads, 4)
    attention_backward_statistics_kernel(const AttentionBackward args, const int tiles) {
  const int head = int(blockIdx.x) / tiles % int(args.H), first = int(blockIdx.x) % tiles * kRows;
  const Sequence s = make_sequence(args, int(blockIdx.x) / tiles / int(args.H));
  if (first >= s.L) return;
  const Tile<T, kCols> dout{reinterpret_cast<T*>(dynamic_shared())}, out{dout.data + kRows * kCols};
  const auto load = [&](const Tile<T, kCols>& tile, const Rows& x) {
    load_tile<kRows, kThreads>(
        tile, Source<T>{query_row<T>(args, x, s, head, first), x.row, s.L - first, int(args.D), args.vectors});
  };
  load(dout, args.dout);
  load(out, args.out);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();

  const int row = warp_id() * 16;
  float products[1][2][4];
  clear(products);
  product_nt(products, dout, row, Tile<T, kCols>{out.data + row * kCols});
  if (group() / 2 != pair() / 2) return;  // holds nothing of the diagonal
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = first + row + half * 8 + group();
    if (query >= s.L) continue;
    const float lse = *query_row<float>(args, args.lse, s, head, query);
    const bool dead = lse == -INFINITY;  // whatever it holds
    const float delta = group() % 2 == 0 ? products[0][half][half * 2] : products[0][half][half * 2 + 1];
    *statistics_of(args, s, head, query) = {dead ? INFINITY : (sizeof(T) == 4 ? lse : lse * kLog2E),
                                            dead ? 0.0f : delta};
  }
}

}  // namespace

void attention_backward_statistics(const AttentionBackward& args, void* stream) {
  dispatch_on_device(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_columns<T>(args.D, [&](auto columns) {
      constexpr int kCols = decltype(columns)::value;
      const int64_t tiles = (args.L + kRows - 1) / kRows;
      launch(attention_backward_statistics_kernel<T, kCols>, Grid{tiles * args.B * args.H}, kThreads,
             2 * Tile<T, kCols>::bytes(kRows), stream, args, int(tiles));
    });
  });
}

void attention_backward(const AttentionBackward& given, void* stream) {
  if (given.B == 0 || given.H == 0 || given.L == 0 || given.S == 0) return;
  check(given);
  AttentionBackward args = given;
  prepare(args, stream);
  for (const Rows* x : {&args.out, &args.dout, &args.dq}) args.vectors = args.vectors && is_aligned(args, *x, args.H);
  for (const Rows* x : {&args.dk, &args.dv}) args.vectors = args.vectors && is_aligned(args, *x, args.Hk);
  attention_backward_statistics(args, stream);
  attention_backward_keys(args, stream);
  attention_backward_queries(args, stream);
  attention_backward_bias(args, stream);
}

}  // namespace fused::cuda
