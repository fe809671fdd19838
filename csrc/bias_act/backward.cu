// Bias, activation and dropout on CUDA, backward. As in forward.cu a block takes a strip of columns, but goes from row
// to row in it, so that each thread meets the same columns again and sums its part of dbias in registers; at the end
// the block writes one row of partial sums, and a second, small kernel adds up those rows. No atomics: the same bits on
// every run. The number of groups of rows, `parts`, is the caller's: few, since each costs N floats of traffic, but
// enough to fill the device.
//
// Moves 3 * M * N elements; bound by memory.

#include "../common/reduce.cuh"
#include "device_activation.cuh"

namespace fused::cuda {
namespace {

constexpr int kSteps = 2;    // rows of a thread at a time: four loads under way
constexpr int kSlices = 16;  // threads that share a column in the sums over parts

// dx at columns col ... of a row, from dy and what was saved.
template <class T, int kVec>
FT_DEVICE void differentiate(const BiasActBackward& args, uint64_t seed, int64_t row, int64_t col,
                             const float (&bias)[kVec], float (&saved)[kVec], float (&d)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) saved[i] += bias[i];
  times_derivative(args.activation, saved, d);
  if (args.seed) {
    drop(seed, args.dropout_threshold, args.dropout_scale, row, col, d);
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) d[i] *= args.dropout_scale;
  }
  if (args.dx) store(static_cast<T*>(args.dx) + row * args.N + col, d);
}

// grid (parts * strips), block (kThreads)
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) bias_act_backward_kernel(const BiasActBackward args, const Cut cut) {
  FT_SHARED(float, shared, [kThreads * kVec]);
  const int lane = threadIdx.x & ((1 << cut.lane_bits) - 1), rows_at_once = kThreads >> cut.lane_bits;
  const int64_t part = blockIdx.x / cut.strips, strip = blockIdx.x % cut.strips;
  const int64_t begin = (strip << cut.lane_bits) * kVec, col = begin + lane * kVec;
  const int64_t rows_at_a_time = rows_at_once * kSteps;
  const uint64_t seed = args.seed ? uint64_t(*args.seed) : 0;

  float sum[kVec] = {};
  if (col < args.N) {
    float bias[kVec];
    load_bias<T>(args.bias, args.bias_dtype == DType::f32, col, bias);
    for (int64_t first = part * rows_at_a_time + (threadIdx.x >> cut.lane_bits); first < args.M;
         first += args.parts * rows_at_a_time) {
      float d[kSteps][kVec], saved[kSteps][kVec];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int64_t row = first + step * rows_at_once;
        if (row >= args.M) break;
        load(static_cast<const T*>(args.dy) + row * args.dy_stride + col, d[step]);
        load(static_cast<const T*>(args.saved) + row * args.saved_stride + col, saved[step]);
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int64_t row = first + step * rows_at_once;
        if (row >= args.M) break;
        differentiate<T>(args, seed, row, col, bias, saved[step], d[step]);
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[i] += d[step][i];
      }
    }
  }
  if (args.partial == nullptr) return;

  // Threads that have the same columns lie `width` floats apart.
  const int width = kVec << cut.lane_bits;
#pragma unroll
  for (int i = 0; i < kVec; ++i) shared[threadIdx.x * kVec + i] = sum[i];
  __syncthreads();
  for (int i = threadIdx.x; i < width && begin + i < args.N; i += kThreads) {
    float total = 0.0f;
    for (int row = 0; row < rows_at_once; ++row) total += shared[row * width + i];
    args.partial[part * args.N + begin + i] = total;
  }
}

// grid (ceil(N / kWarp)), block (kWarp * kSlices): slice s of the threads adds parts s, s + kSlices ... of 32 columns,
// and then one warp the slices, in order.
__global__ void __launch_bounds__(kWarp* kSlices) bias_act_backward_sums_kernel(const BiasActBackward args) {
  FT_SHARED(float, shared, [kSlices * kWarp]);
  const int lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp;
  const int64_t col = int64_t(blockIdx.x) * kWarp + lane;
  float sum = 0.0f;
  if (col < args.N)
#pragma unroll 4
    for (int64_t part = slice; part < args.parts; part += kSlices) sum += args.partial[part * args.N + col];
  shared[slice * kWarp + lane] = sum;
  __syncthreads();
  if (slice > 0 || col >= args.N) return;
#pragma unroll
  for (int other = 1; other < kSlices; ++other) sum += shared[other * kWarp + lane];
  args.dbias[col] = sum;
}

template <class T>
bool is_aligned(const BiasActBackward& args) {
  return is_whole_vectors<T>(args.N) && is_vector_aligned<T>(args.dy, args.dy_stride) &&
         is_vector_aligned<T>(args.saved, args.saved_stride) && is_vector_aligned<T>(args.bias, 0) &&
         is_vector_aligned<T>(args.dx, 0);
}

}  // namespace

void bias_act_backward(const BiasActBackward& args, void* stream) {
  FT_REQUIRE(args.M >= 0 && args.N >= 1 && args.parts >= 1, "M must not be negative, and N and parts at least 1");
  FT_REQUIRE(args.bias_dtype == args.dtype || args.bias_dtype == DType::f32, "bias is of dtype or float32");
  FT_REQUIRE(!args.dbias == !args.partial, "dbias and its partial sums go together");
  if (args.M == 0 && !args.dbias) return;
  dispatch_on_device(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_vector_width<T>(is_aligned<T>(args), [&](auto count) {
      constexpr int kVec = decltype(count)::value;
      const Cut cut = cut_columns<kVec>(args.N);
      launch(bias_act_backward_kernel<T, kVec>, args.parts * cut.strips, kThreads, stream, args, cut);
    });
  });
  if (args.dbias) launch(bias_act_backward_sums_kernel, (args.N + kWarp - 1) / kWarp, kWarp * kSlices, stream, args);
}

}  // namespace fused::cuda
