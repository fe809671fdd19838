// Embedding backward on CUDA: the gradient of each row of the table is the sum of its tokens' rows of dout.
//
// The tokens come sorted, so that equal ones are a run, and each run is summed in an order that the tokens alone
// decide: no atomics. Runs are cut at every `chunk` sorted tokens, so that a token that fills half the batch is summed
// by many warps at once; what of a run lies in one chunk is summed by the warp of its first token there, the other
// warps end. A run within one chunk goes straight into the table's gradient. The others leave partial sums, which a
// second kernel adds up, one block a run.
//
// Moves N * E elements in and one row out for each token that occurs, and 8 bytes for each element of the partial sums,
// at most two rows a chunk; bound by memory, or by the longest run.

#include "../common/integers.cuh"
#include "../common/reduce.cuh"
#include "../common/row_dropout.cuh"
#include "../common/vector_width.cuh"
#include "embedding.h"

namespace fused::cuda {
namespace {

constexpr int kWarps = 4;   // of a block that sums runs, each with a sorted token
constexpr int kSlices = 8;  // warps that share a run where partial sums are added

FT_DEVICE int64_t token_at(const EmbeddingBackwardSorted& args, int64_t index) {
  return integer_at(args.tokens, args.wide_tokens, index);
}

FT_DEVICE bool has_gradient(const EmbeddingBackwardSorted& args, int64_t token) {
  return token >= 0 && token < args.V && token != args.padding_idx;
}

FT_DEVICE int64_t chunks_of(const EmbeddingBackwardSorted& args) { return (args.N + args.chunk - 1) / args.chunk; }

// A whole warp: the sum over the tokens from `first` on that are `token`, up to `end`, at columns col ...; their rows
// of dout are found 32 at a time, and read one after another.
template <class T, int kVec>
FT_DEVICE void sum_run(const EmbeddingBackwardSorted& args, int64_t token, int64_t first, int64_t end, int64_t col,
                       float (&sum)[kVec]) {
  const uint64_t seed = args.dropout.seed ? uint64_t(*args.dropout.seed) : 0;
  int count = kWarp;
  for (int64_t begin = first; begin < end && count == kWarp; begin += kWarp) {
    const int64_t mine = begin + threadIdx.x % kWarp;
    const bool is_same = mine < end && token_at(args, mine) == token;
    const int64_t row = is_same ? args.order[mine] : 0;
    count = __popc(__ballot_sync(kWholeWarp, is_same));  // sorted: the first lanes' are the same
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const int64_t n = __shfl_sync(kWholeWarp, row, i);
      if (col >= args.E) continue;
      float dout[kVec];
      load(static_cast<const T*>(args.dout) + n * args.dout_stride + col, dout);
      if (args.dropout.seed) drop(seed, args.dropout.threshold, args.dropout.keep_scale, n, col, dout);
#pragma unroll
      for (int k = 0; k < kVec; ++k) sum[k] += dout[k];
    }
  }
}

// grid (ceil(N / kWarps), ceil(E / (kWarp * kVec))), block (kWarps * kWarp), eight at once: up to 64 registers a thread
template <class T, int kVec>
__global__ void __launch_bounds__(kWarps* kWarp, 8) embedding_backward_kernel(const EmbeddingBackwardSorted args) {
  const int64_t first = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (first >= args.N) return;
  const int64_t token = token_at(args, first);
  const bool began_before = first > 0 && token_at(args, first - 1) == token;
  if ((began_before && first % args.chunk != 0) || !has_gradient(args, token)) return;
  const int64_t number = first / args.chunk, end = min((number + 1) * args.chunk, args.N);
  const int64_t col = (int64_t(blockIdx.y) * kWarp + threadIdx.x % kWarp) * kVec;
  float sum[kVec] = {};
  sum_run<T>(args, token, first, end, col, sum);
  if (col >= args.E) return;

  const bool goes_on = end < args.N && token_at(args, end) == token;
  if (began_before || goes_on) {
    float* partial = args.partial + (number + (began_before ? 0 : chunks_of(args))) * args.E + col;
#pragma unroll
    for (int i = 0; i < kVec; ++i) partial[i] = sum[i];
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum[i] *= args.scale;
    store(static_cast<T*>(args.dtable) + token * args.E + col, sum);
  }
}

// grid (chunks - 1, ceil(E / kWarp)), block (kSlices * kWarp): the block of the chunk in which a run begins that goes
// on beyond it; others end. Slice s of its warps adds the run's partial sums s, s + kSlices ..., and then the first
// warp the slices, in order.
template <class T>
__global__ void __launch_bounds__(kSlices* kWarp) embedding_backward_merge_kernel(const EmbeddingBackwardSorted args) {
  FT_SHARED(float, shared, [kSlices * kWarp]);
  const int64_t number = blockIdx.x, chunks = chunks_of(args);
  const int64_t begin = number * args.chunk, end = begin + args.chunk;
  const int64_t token = token_at(args, end);
  const bool goes_on = token_at(args, end - 1) == token;
  const bool began_before = begin > 0 && token_at(args, begin - 1) == token;
  if (!goes_on || began_before || !has_gradient(args, token)) return;

  const int lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp;
  const int64_t col = int64_t(blockIdx.y) * kWarp + lane;
  float sum = 0.0f;
  if (col < args.E)
    for (int64_t other = number + 1 + slice; other < chunks; other += kSlices) {
      if (token_at(args, other * args.chunk) != token) break;
      sum += args.partial[other * args.E + col];
    }
  shared[slice * kWarp + lane] = sum;
  __syncthreads();
  if (slice > 0 || col >= args.E) return;
  sum = args.partial[(chunks + number) * args.E + col];
#pragma unroll
  for (int other = 0; other < kSlices; ++other) sum += shared[other * kWarp + lane];
  from_float(sum * args.scale, static_cast<T*>(args.dtable)[token * args.E + col]);
}

template <class T>
bool is_aligned(const EmbeddingBackwardSorted& args) {
  return is_whole_vectors<T>(args.E) && is_vector_aligned<T>(args.dout, args.dout_stride) &&
         is_vector_aligned<T>(args.dtable, 0);
}

}  // namespace

void embedding_backward(const EmbeddingBackwardSorted& args, void* stream) {
  FT_REQUIRE(args.N >= 0 && args.V >= 0 && args.E >= 0, "sizes must not be negative");
  FT_REQUIRE(args.chunk >= 1, "a chunk must have a token");
  if (args.N == 0 || args.V == 0 || args.E == 0) return;
  const int64_t chunks = (args.N + args.chunk - 1) / args.chunk;
  FT_REQUIRE(chunks == 1 || args.partial, "more than one chunk needs partial sums");
  dispatch_on_device(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_vector_width<T>(is_aligned<T>(args), [&](auto count) {
      constexpr int64_t kVec = decltype(count)::value, kStrip = kWarp * kVec;
      launch(embedding_backward_kernel<T, kVec>, Grid{(args.N + kWarps - 1) / kWarps, (args.E + kStrip - 1) / kStrip},
             kWarps * kWarp, 0, stream, args);
    });
    if (chunks > 1)
      launch(embedding_backward_merge_kernel<T>, Grid{chunks - 1, (args.E + kWarp - 1) / kWarp}, kSlices * kWarp, 0,
             stream, args);
  });
}

}  // namespace fused::cuda
