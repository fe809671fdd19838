// log-softmax and top-k on CUDA: one kernel passes over the logits once, a second merges what it keeps.
//
// A row is cut in parts of kPartColumns, one a block, so that the few rows of one sentence fill a GPU too. A warp holds
// the k best of what it has seen (device_best.cuh), each lane the maximum and the sum of exp of its own columns; the
// warps' lists meet in shared memory. The second kernel has a block a sentence: a warp merges the parts of one row
// after another and makes log-probabilities of its k best, and the first warp takes the best of all rows.
//
// Reads M * V elements; the parts' k logits and tokens are 1 % of that for k = 8, 16 bits. Bound by memory.

#include "../common/exp2.cuh"
#include "../common/vector_width.cuh"
#include "device_best.cuh"
#include "log_softmax_top_k.h"

namespace fused::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kPartColumns = 4096;  // 8 parts for 32,000 tokens: with 4 beams, 32 blocks for one sentence
constexpr int kMergeThreads = 128, kMergeWarps = kMergeThreads / kWarp;

// Memory for a part's k best: logits (as bits), then tokens.
FT_DEVICE int32_t* kept_of(const LogSoftmaxTopK& args, int64_t part) { return args.kept + part * 2 * args.k; }

// A maximum, and the sum of exp(x - maximum) over some numbers. The sum is NaN where one is NaN or +inf, and 0 where
// all are -inf.
struct Sum {
  float maximum = -INFINITY, total = 0.0f;

  static FT_DEVICE float shift(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

  FT_DEVICE void add(const Sum& other) {
    const float top = fmaxf(maximum, other.maximum);
    total = total * exp2_fast((maximum - shift(top)) * kLog2E) +
            other.total * exp2_fast((other.maximum - shift(top)) * kLog2E);
    maximum = top;
  }
};

// The sum over a warp, in every lane.
FT_DEVICE Sum warp_sum(Sum sum) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    sum.add({__shfl_xor_sync(kWholeWarp, sum.maximum, offset), __shfl_xor_sync(kWholeWarp, sum.total, offset)});
  return sum;
}

// ---------------------------------------------------------------- kernels

// grid (M * parts), block (kThreads)
template <class T, int kVec, int kSlots>
__global__ void __launch_bounds__(kThreads) log_softmax_top_k_rows_kernel(const LogSoftmaxTopK args, const int parts) {
  FT_SHARED(float, values, [kWarps][kSlots * kWarp]);
  FT_SHARED(int, tokens, [kWarps][kSlots * kWarp]);
  FT_SHARED(float, sums, [kWarps][2]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, k = int(args.k);
  const int64_t row = blockIdx.x / parts, first = blockIdx.x % parts * int64_t(kPartColumns);
  const int64_t stop = first + kPartColumns < args.V ? first + kPartColumns : args.V;
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;

  Best<kSlots> best;
  Sum sum;
  for (int64_t start = first + warp * kWarp * kVec; start < stop; start += kThreads * kVec) {
    const int64_t col = start + lane * kVec;
    const bool present = col < stop;  // V is a multiple of kVec
    float logits[kVec];
    if (present) load(x + col, logits);
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (!present) logits[i] = -INFINITY;
      top = fmaxf(top, logits[i]);
    }
    const float maximum = fmaxf(sum.maximum, top), shift = Sum::shift(maximum);
    sum.total *= exp2_fast((sum.maximum - shift) * kLog2E);
    sum.maximum = maximum;
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum.total += exp2_fast((logits[i] - shift) * kLog2E);
    if (!__any_sync(kWholeWarp, top >= best.last.value)) continue;
#pragma unroll
    for (int i = 0; i < kVec; ++i) best.offer({logits[i], present ? int(col) + i : INT_MAX}, k);
  }

#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    values[warp][slot * kWarp + lane] = best.kept[slot].value;
    tokens[warp][slot * kWarp + lane] = best.kept[slot].place;
  }
  sum = warp_sum(sum);
  if (lane == 0) sums[warp][0] = sum.maximum, sums[warp][1] = sum.total;
  __syncthreads();
  if (warp > 0) return;
  sum = warp_sum(lane < kWarps ? Sum{sums[lane][0], sums[lane][1]} : Sum{});
  for (int other = 1; other < kWarps; ++other) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      best.offer({values[other][slot * kWarp + lane], tokens[other][slot * kWarp + lane]}, k);
  }
  int32_t* kept = kept_of(args, blockIdx.x);
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int rank = slot * kWarp + lane;
    if (rank >= k) continue;
    kept[rank] = __float_as_int(best.kept[slot].value);
    kept[k + rank] = best.kept[slot].place;
  }
  if (lane == 0) args.sums[2 * int64_t(blockIdx.x)] = sum.maximum, args.sums[2 * int64_t(blockIdx.x) + 1] = sum.total;
}

// The k best of one row as values and tokens, from its parts; `hopeless` if it has none. By one warp.
template <int kSlots>
FT_DEVICE void merge_parts(const LogSoftmaxTopK& args, int64_t row, int parts, float* values, int* tokens,
                           bool& hopeless) {
  const int lane = threadIdx.x % kWarp, k = int(args.k);
  Best<kSlots> best;
  Sum sum;
  for (int part = lane; part < parts; part += kWarp) {
    const float* from = args.sums + 2 * (row * parts + part);
    sum.add({from[0], from[1]});
  }
  sum = warp_sum(sum);
  for (int part = 0; part < parts; ++part) {
    const int32_t* from = kept_of(args, row * parts + part);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int rank = slot * kWarp + lane;
      best.offer(rank < k ? Candidate{__int_as_float(from[rank]), from[k + rank]} : Candidate{}, k);
    }
  }
  const float addend = args.addend ? args.addend[row] : 0.0f, shift = Sum::shift(sum.maximum),
              log_sum = logf(sum.total);
  hopeless = sum.total != sum.total || !(addend < INFINITY);
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int rank = slot * kWarp + lane;
    const float x = best.kept[slot].value;
    if (rank >= k) continue;
    values[rank] = (x == -INFINITY ? x : (x - shift) - log_sum) + addend;
    tokens[rank] = best.kept[slot].place;
  }
}

// grid (M / beams), block (kMergeThreads), dynamic shared memory: (2 k + 1) * beams numbers of 4 bytes
template <int kSlots>
__global__ void __launch_bounds__(kMergeThreads)
    log_softmax_top_k_merge_kernel(const LogSoftmaxTopK args, const int parts) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, k = int(args.k), beams = int(args.beams);
  float* values = reinterpret_cast<float*>(dynamic_shared());
  int* tokens = reinterpret_cast<int*>(values + k * beams);
  int* hopeless = tokens + k * beams;
  for (int beam = warp; beam < beams; beam += kMergeWarps) {
    bool is_hopeless = false;
    merge_parts<kSlots>(args, int64_t(blockIdx.x) * beams + beam, parts, values + beam * k, tokens + beam * k,
                        is_hopeless);
    if (lane == 0) hopeless[beam] = is_hopeless;
  }
  __syncthreads();
  if (warp > 0) return;

  bool mine = false;
  for (int beam = lane; beam < beams; beam += kWarp) mine |= hopeless[beam] != 0;
  const bool none = __any_sync(kWholeWarp, mine);
  Best<kSlots> best;
  for (int start = 0; start < beams * k; start += kWarp) {
    const int id = start + lane;  // beam by beam, best first: what comes first of equal values
    const bool real = id < beams * k && tokens[id] != INT_MAX;
    best.offer(real ? Candidate{values[id], id} : Candidate{}, k);
  }
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int rank = slot * kWarp + lane, id = best.kept[slot].place;
    if (rank >= k) continue;
    const int64_t to = int64_t(blockIdx.x) * k + rank;
    args.values[to] = none ? NAN : best.kept[slot].value;
    args.places[to] = none ? rank : id / k * args.V + tokens[id];
  }
}

// ---------------------------------------------------------------- launchers

template <int kSlots>
void launch_all(const LogSoftmaxTopK& args, void* stream) {
  const int64_t parts = log_softmax_top_k_parts(args.V);
  dispatch_on_device(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool aligned = is_whole_vectors<T>(args.V) && is_vector_aligned<T>(args.x, args.M > 1 ? args.x_stride : 0);
    with_vector_width<T>(aligned, [&](auto count) {
      launch(log_softmax_top_k_rows_kernel<T, decltype(count)::value, kSlots>, args.M * parts, kThreads, stream, args,
             int(parts));
    });
  });
  launch(log_softmax_top_k_merge_kernel<kSlots>, Grid{args.M / args.beams}, kMergeThreads,
         (2 * args.k + 1) * args.beams * 4, stream, args, int(parts));
}

}  // namespace

int64_t log_softmax_top_k_parts(int64_t V) { return (V + kPartColumns - 1) / kPartColumns; }

void log_softmax_top_k(const LogSoftmaxTopK& args, void* stream) {
  if (args.M == 0) return;
  check(args);
  if (args.k <= kWarp) return launch_all<1>(args, stream);
  launch_all<kMostKept / kWarp>(args, stream);
}

}  // namespace fused::cuda
