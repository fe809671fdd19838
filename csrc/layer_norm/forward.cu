// Layer norm forward on CUDA. Up to 1024 columns one warp takes a row, above one block; either way the row's total
// is held in registers, 16 bytes a load, so that memory is passed over once. Rows above 8192 columns (above 256
// where something is not aligned to 16 bytes) are not held: each pass makes their total anew, out of the cache.
//
// Moves 2 (3 with residual, 4 with total kept) * M * N elements; bound by memory.

#include "../common/reduce.cuh"
#include "device_row.cuh"

namespace fused::cuda {
namespace {

constexpr int kWarpRows = 4;        // rows of a block where a warp takes a row
constexpr int kBlockThreads = 256;  // threads of a block that takes one row
constexpr int kWideThreads = 512;

// Mean, variance and output of one row, in three passes of `visit`, which calls f(col, total) for the columns of
// this thread. The variance is summed around the mean, and what the mean's own rounding left is taken off again.
template <class T, int kVec, int kThreads, class Visit>
FT_DEVICE void normalise(const LayerNormForward& args, int64_t row, bool is_first, float* shared, const Visit& visit) {
  float mean = 0.0f;
  if (!args.rms) {
    float sum[1] = {0.0f};
    visit([&](int64_t, const float (&total)[kVec]) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[0] += total[i];
    });
    row_sums<kThreads>(sum, shared);
    mean = sum[0] / float(args.N);
  }
  float rest_and_squares[2] = {0.0f, 0.0f};
  visit([&](int64_t, const float (&total)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float centred = total[i] - mean;
      rest_and_squares[0] += centred;
      rest_and_squares[1] += centred * centred;
    }
  });
  row_sums<kThreads>(rest_and_squares, shared);
  const float correction = args.rms ? 0.0f : rest_and_squares[0] / float(args.N);
  const float variance = rest_and_squares[1] / float(args.N) - correction * correction;
  const float rstd = 1.0f / sqrtf(variance + args.eps), shift = -correction * rstd;
  if (is_first && args.mean) args.mean[row] = mean + correction;
  if (is_first && args.rstd) args.rstd[row] = rstd;

  const bool is_float = args.param_dtype == DType::f32;
  visit([&](int64_t col, const float (&total)[kVec]) {
    float weight[kVec], y[kVec];
    load_parameter<T>(args.weight, is_float, col, 1.0f, weight);
    load_parameter<T>(args.bias, is_float, col, 0.0f, y);
#pragma unroll
    for (int i = 0; i < kVec; ++i) y[i] = ((total[i] - mean) * rstd + shift) * weight[i] + y[i];
    store(static_cast<T*>(args.y) + row * args.N + col, y);
  });
}

// ---------------------------------------------------------------- kernels

// grid (ceil(M / kRows)), block (kRows * kThreads): kThreads threads a row, kSteps * kVec columns a thread
template <class T, int kVec, int kSteps, int kThreads, int kRows>
__global__ void __launch_bounds__(kThreads* kRows) layer_norm_forward_kernel(const LayerNormForward args) {
  FT_SHARED(float, shared, [2 * kWarp]);
  const int thread = threadIdx.x % kThreads;
  const int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / kThreads;
  if (row >= args.M) return;  // a whole warp, or nobody: a block's barriers stay whole
  const uint64_t seed = args.seed ? uint64_t(*args.seed) : 0;

  float total[kSteps][kVec];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t col = int64_t(step * kThreads + thread) * kVec;
    if (col >= args.N) continue;
    load_total<T>(args, seed, row, col, total[step]);
    if (args.total) store(static_cast<T*>(args.total) + row * args.N + col, total[step]);
  }
  normalise<T, kVec, kThreads>(args, row, thread == 0, shared, [&](const auto& f) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int64_t col = int64_t(step * kThreads + thread) * kVec;
      if (col < args.N) f(col, total[step]);
    }
  });
}

// grid (M), block (kWideThreads): any number of columns
template <class T, int kVec>
__global__ void __launch_bounds__(kWideThreads) layer_norm_forward_wide_kernel(const LayerNormForward args) {
  FT_SHARED(float, shared, [2 * kWarp]);
  const int64_t row = blockIdx.x;
  const uint64_t seed = args.seed ? uint64_t(*args.seed) : 0;
  const auto visit = [&](const auto& f) {
    for (int64_t col = int64_t(threadIdx.x) * kVec; col < args.N; col += kWideThreads * kVec) {
      float total[kVec];
      load_total<T>(args, seed, row, col, total);
      f(col, total);
    }
  };
  if (args.total)
    visit([&](int64_t col, const float (&total)[kVec]) {
      store(static_cast<T*>(args.total) + row * args.N + col, total);
    });
  normalise<T, kVec, kWideThreads>(args, row, threadIdx.x == 0, shared, visit);
}

// ---------------------------------------------------------------- launchers

template <class T>
bool is_aligned(const LayerNormForward& args) {
  bool aligned = args.N % (kVectorBytes / int64_t(sizeof(T))) == 0;
  aligned = aligned && is_vector_aligned<T>(args.x, args.x_stride);
  aligned = aligned && is_vector_aligned<T>(args.residual, args.residual_stride);
  for (const void* p :
       {static_cast<const void*>(args.y), static_cast<const void*>(args.total), args.weight, args.bias, args.x_bias})
    aligned = aligned && is_vector_aligned<T>(p, 0);
  return aligned;
}

template <class T, int kVec, int kSteps>
void launch_warps(const LayerNormForward& args, void* stream) {
  launch(layer_norm_forward_kernel<T, kVec, kSteps, kWarp, kWarpRows>, (args.M + kWarpRows - 1) / kWarpRows,
         kWarp * kWarpRows, stream, args);
}

template <class T, int kVec>
void launch_columns(const LayerNormForward& args, void* stream) {
  constexpr int kWarpColumns = kWarp * 8, kBlockColumns = kBlockThreads * 16;
  if (args.N <= kWarpColumns) return launch_warps<T, kVec, 8 / kVec>(args, stream);
  if constexpr (kVec > 1) {
    if (args.N <= 2 * kWarpColumns) return launch_warps<T, kVec, 16 / kVec>(args, stream);
    if (args.N <= 4 * kWarpColumns) return launch_warps<T, kVec, 32 / kVec>(args, stream);
    if (args.N <= kBlockColumns)
      return launch(layer_norm_forward_kernel<T, kVec, 16 / kVec, kBlockThreads, 1>, args.M, kBlockThreads, stream,
                    args);
    if (args.N <= 2 * kBlockColumns)
      return launch(layer_norm_forward_kernel<T, kVec, 32 / kVec, kBlockThreads, 1>, args.M, kBlockThreads, stream,
                    args);
  }
  launch(layer_norm_forward_wide_kernel<T, kVec>, args.M, kWideThreads, stream, args);
}

}  // namespace

void layer_norm_forward(const LayerNormForward& args, void* stream) {
  check(args);
  if (args.M == 0) return;
  dispatch_on_device(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_vector_width<T>(is_aligned<T>(args),
                         [&](auto count) { launch_columns<T, decltype(count)::value>(args, stream); });
  });
}

}  // namespace fused::cuda
