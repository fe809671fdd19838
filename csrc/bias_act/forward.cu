// Bias, activation and dropout on CUDA, forward. A block takes a strip of columns of a few rows: a thread reads its
// columns' bias once, and has the loads of kSteps rows under way at a time, 16 bytes each.
//
// Moves 2 * M * N elements; bound by memory.

#include "device_activation.cuh"

namespace fused::cuda {
namespace {

constexpr int kSteps = 4;  // rows of a thread

// grid (tiles of rows * strips), block (kThreads)
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) bias_act_forward_kernel(const BiasActForward args, const Cut cut) {
  const int lane = threadIdx.x & ((1 << cut.lane_bits) - 1), rows_at_once = kThreads >> cut.lane_bits;
  const int64_t tile = blockIdx.x / cut.strips, strip = blockIdx.x % cut.strips;
  const int64_t col = ((strip << cut.lane_bits) + lane) * kVec;
  if (col >= args.N) return;
  const int64_t first = tile * (rows_at_once * kSteps) + (threadIdx.x >> cut.lane_bits);
  const uint64_t seed = args.seed ? uint64_t(*args.seed) : 0;
  float bias[kVec], h[kSteps][kVec];
  load_bias<T>(args.bias, args.bias_dtype == DType::f32, col, bias);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t row = first + step * rows_at_once;
    if (row < args.M) load(static_cast<const T*>(args.x) + row * args.x_stride + col, h[step]);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t row = first + step * rows_at_once;
    if (row >= args.M) break;
#pragma unroll
    for (int i = 0; i < kVec; ++i) h[step][i] += bias[i];
    activate(args.activation, h[step]);
    if (args.seed) drop(seed, args.dropout_threshold, args.dropout_scale, row, col, h[step]);
    store(static_cast<T*>(args.y) + row * args.N + col, h[step]);
  }
}

template <class T>
bool is_aligned(const BiasActForward& args) {
  return is_whole_vectors<T>(args.N) && is_vector_aligned<T>(args.x, args.x_stride) &&
         is_vector_aligned<T>(args.bias, 0) && is_vector_aligned<T>(args.y, 0);
}

}  // namespace

void bias_act_forward(const BiasActForward& args, void* stream) {
  FT_REQUIRE(args.M >= 0 && args.N >= 1, "M must not be negative, and N at least 1");
  FT_REQUIRE(args.bias_dtype == args.dtype || args.bias_dtype == DType::f32, "bias is of dtype or float32");
  if (args.M == 0) return;
  dispatch_on_device(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_vector_width<T>(is_aligned<T>(args), [&](auto count) {
      constexpr int kVec = decltype(count)::value;
      const Cut cut = cut_columns<kVec>(args.N);
      const int64_t rows = (kThreads >> cut.lane_bits) * kSteps, tiles = (args.M + rows - 1) / rows;
      launch(bias_act_forward_kernel<T, kVec>, tiles * cut.strips, kThreads, stream, args, cut);
    });
  });
}

}  // namespace fused::cuda
