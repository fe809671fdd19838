// Embedding forward on CUDA. A warp gathers one token's row of the table, 512 columns of it: 16 bytes a load, all loads
// of the row under way before the first is used. The token and its position are the same for the whole warp.
//
// Moves 2 * N * E elements; the positions' rows (4 E bytes) come out of the cache. Bound by memory, except where
// positions are computed: that is about 25 float64 operations an element, cheap on data-centre GPUs alone.

#include "../common/integers.cuh"
#include "../common/reduce.cuh"
#include "../common/row_dropout.cuh"
#include "../common/vector_width.cuh"
#include "device_sine.cuh"
#include "embedding.h"

namespace fused::cuda {
namespace {

constexpr int kRows = 4;      // warps of a block, each with a row
constexpr int kColumns = 16;  // of a thread: two loads of 16 bytes in 16 bits, four in float32
constexpr unsigned kNan = 0x7fc00000u;

FT_DEVICE int64_t position_of(const EmbeddingForward& args, int64_t n) {
  if (args.position_ids) return args.position_ids[n];
  return (args.starts ? args.starts[n / args.L] : args.start) + n % args.L;
}

// The row of the table at columns col ..., times scale; NaN for a token outside the vocabulary, of which nothing is
// read.
template <class T, int kVec>
FT_DEVICE void load_row(const EmbeddingForward& args, int64_t token, int64_t col, float (&x)[kVec]) {
  if (token >= 0 && token < args.V) {
    load(static_cast<const T*>(args.table) + token * args.table_stride + col, x);
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] *= args.scale;
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] = __uint_as_float(kNan);
  }
}

template <int kVec, bool kComputed>
FT_DEVICE void add_position(const EmbeddingForward& args, int64_t position, int64_t col, float (&x)[kVec]) {
  if constexpr (kComputed) {
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      x[i] += float(sine(double(position) * args.waves[col + i], int(args.waves[args.E + col + i])));
  } else if (args.positions) {
    float row[kVec];
    load(args.positions + position * args.E + col, row);
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] += row[i];
  }
}

// grid (ceil(N / kRows), ceil(E / (kWarp * kColumns))), block (kRows * kWarp)
template <class T, int kVec, bool kComputed>
__global__ void __launch_bounds__(kRows* kWarp) embedding_forward_kernel(const EmbeddingForward args) {
  constexpr int kSteps = kColumns / kVec;
  const int64_t n = int64_t(blockIdx.x) * kRows + threadIdx.x / kWarp;
  if (n >= args.N) return;
  const int64_t first = int64_t(blockIdx.y) * (kWarp * kColumns) + threadIdx.x % kWarp * kVec;
  const int64_t token = integer_at(args.tokens, args.wide_tokens, n);
  const bool is_padding = token >= 0 && token == args.padding_idx;
  const uint64_t seed = args.dropout.seed ? uint64_t(*args.dropout.seed) : 0;
  const int64_t position = kComputed || args.positions ? position_of(args, n) : 0;

  float x[kSteps][kVec] = {};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t col = first + step * kWarp * kVec;
    if (col < args.E && !is_padding) load_row<T>(args, token, col, x[step]);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t col = first + step * kWarp * kVec;
    if (col >= args.E) continue;
    if (!is_padding) {
      add_position<kVec, kComputed>(args, position, col, x[step]);
      if (args.dropout.seed) drop(seed, args.dropout.threshold, args.dropout.keep_scale, n, col, x[step]);
    }
    store(static_cast<T*>(args.out) + n * args.E + col, x[step]);
  }
}

template <class T>
bool is_aligned(const EmbeddingForward& args) {
  return is_whole_vectors<T>(args.E) && is_vector_aligned<T>(args.table, args.table_stride) &&
         is_vector_aligned<T>(args.positions, 0) && is_vector_aligned<T>(args.out, 0);
}

}  // namespace

void embedding_forward(const EmbeddingForward& args, void* stream) {
  FT_REQUIRE(args.N >= 0 && args.V >= 0 && args.E >= 0 && args.L >= 1, "sizes must not be negative");
  FT_REQUIRE(!args.positions || !args.waves, "positions are looked up or computed, not both");
  if (args.N == 0 || args.E == 0) return;
  constexpr int64_t kStrip = kWarp * kColumns;
  const Grid grid{(args.N + kRows - 1) / kRows, (args.E + kStrip - 1) / kStrip};
  dispatch_on_device(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_vector_width<T>(is_aligned<T>(args), [&](auto count) {
      constexpr int kVec = decltype(count)::value;
      const auto kernel =
          args.waves ? embedding_forward_kernel<T, kVec, true> : embedding_forward_kernel<T, kVec, false>;
      launch(kernel, grid, kRows * kWarp, 0, stream, args);
    });
  });
}

}  // namespace fused::cuda
