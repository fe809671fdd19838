// Layer norm backward on CUDA. As in forward.cu a warp (up to 1024 columns) or a block takes a row and holds it in
// registers. A block goes from row to row, so that each thread meets the same columns again and sums its part of
// dweight, dbias and dx_bias in registers too; at the end the block writes one row of partial sums, and a second,
// small kernel adds up those rows. No atomics: the same bits on every run. The number of blocks, `parts`, is the
// caller's: few, since each costs N floats of traffic a sum, but enough to fill the device.
//
// Moves 3 (4 with dropout or with a gradient of total) * M * N elements; bound by memory.

#include "../common/reduce.cuh"
#include "device_row.cuh"

namespace fused::cuda {
namespace {

constexpr int kWarpRows = 8;  // rows of a block at a time where a warp takes a row
constexpr int kWideThreads = 512;
constexpr int kSlices = 16;  // threads that share a column in the sums over parts

// dweight, dbias and dx_bias at kVec columns.
template <int kVec>
struct Sums {
  float dweight[kVec], dbias[kVec], dx_bias[kVec];
};

// What the second pass over a row needs of the first: dy * weight and the normalised total.
template <int kVec>
struct Held {
  float g[kVec], normal[kVec];
};

template <class T, int kVec>
FT_DEVICE void first_pass(const LayerNormBackward& args, int64_t row, int64_t col, float mean, float rstd,
                          Held<kVec>& held, float (&over_row)[2], Sums<kVec>& sums) {
  float dy[kVec], weight[kVec];
  load(static_cast<const T*>(args.dy) + row * args.dy_stride + col, dy);
  load(static_cast<const T*>(args.total) + row * args.total_stride + col, held.normal);
  load_parameter<T>(args.weight, args.param_dtype == DType::f32, col, 1.0f, weight);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    held.normal[i] = (held.normal[i] - mean) * rstd;
    held.g[i] = dy[i] * weight[i];
    over_row[0] += held.g[i];
    over_row[1] += held.g[i] * held.normal[i];
    sums.dweight[i] += dy[i] * held.normal[i];
    sums.dbias[i] += dy[i];
  }
}

// The sums over a row become means; RMS norm has no mean to differentiate.
FT_DEVICE void as_means(const LayerNormBackward& args, float (&over_row)[2]) {
  over_row[0] = args.rms ? 0.0f : over_row[0] / float(args.N);
  over_row[1] /= float(args.N);
}

template <class T, int kVec>
FT_DEVICE void second_pass(const LayerNormBackward& args, uint64_t seed, int64_t row, int64_t col,
                           const Held<kVec>& held, const float (&mean_over_row)[2], float rstd, Sums<kVec>& sums) {
  float d[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) d[i] = ((held.g[i] - mean_over_row[0]) - held.normal[i] * mean_over_row[1]) * rstd;
  if (args.dtotal) {
    float dtotal[kVec];
    load(static_cast<const T*>(args.dtotal) + row * args.dtotal_stride + col, dtotal);
#pragma unroll
    for (int i = 0; i < kVec; ++i) d[i] += dtotal[i];
  }
  if (args.dresidual) store(static_cast<T*>(args.dresidual) + row * args.N + col, d);
  if (args.seed) drop(seed, args.dropout_threshold, args.dropout_scale, row, col, d);
  if (args.dx) store(static_cast<T*>(args.dx) + row * args.N + col, d);
#pragma unroll
  for (int i = 0; i < kVec; ++i) sums.dx_bias[i] += d[i];
}

// The block's row of one partial buffer, out of its kRows warps, which hold the same columns each.
template <int kVec, int kSteps, int kRows, class Pick>
FT_DEVICE void write_warps(float* partial, const Sums<kVec> (&sums)[kSteps], const Pick& pick, float* shared,
                           int64_t N) {
  constexpr int kColumns = kSteps * kVec * kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  __syncthreads();  // the last buffer's sums have been read
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int i = 0; i < kVec; ++i) shared[warp * kColumns + (step * kWarp + lane) * kVec + i] = pick(sums[step])[i];
  __syncthreads();
  for (int64_t col = threadIdx.x; col < N; col += kRows * kWarp) {
    float sum = 0.0f;
#pragma unroll
    for (int row = 0; row < kRows; ++row) sum += shared[row * kColumns + col];
    partial[blockIdx.x * N + col] = sum;
  }
}

// The same where every thread has columns of its own.
template <int kVec, int kSteps, int kThreads, class Pick>
FT_DEVICE void write_columns(float* partial, const Sums<kVec> (&sums)[kSteps], const Pick& pick, int64_t N) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t col = int64_t(step * kThreads + threadIdx.x) * kVec;
    if (col >= N) continue;
#pragma unroll
    for (int i = 0; i < kVec; ++i) partial[blockIdx.x * N + col + i] = pick(sums[step])[i];
  }
}

// ---------------------------------------------------------------- kernels

// Registers for 16 columns a thread (five numbers each) leave room for two blocks of 256 threads, those for 32 for one.
constexpr int blocks_at_once(int threads, int columns) { return threads <= 256 && columns <= 16 ? 2 : 1; }

// grid (parts), block (kRows * kThreads): kThreads threads a row, kSteps * kVec columns a thread
template <class T, int kVec, int kSteps, int kThreads, int kRows>
__global__ void __launch_bounds__(kThreads* kRows, blocks_at_once(kThreads* kRows, kSteps* kVec))
    layer_norm_backward_kernel(const LayerNormBackward args) {
  constexpr bool kWarpARow = kThreads == kWarp;
  FT_SHARED(float, shared, [kWarpARow ? kRows * kSteps * kVec * kWarp : 2 * kWarp]);
  const int thread = threadIdx.x % kThreads;
  const uint64_t seed = args.seed ? uint64_t(*args.seed) : 0;

  Sums<kVec> sums[kSteps] = {};
  for (int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / kThreads; row < args.M;
       row += int64_t(gridDim.x) * kRows) {
    const float mean = args.rms ? 0.0f : args.mean[row], rstd = args.rstd[row];
    Held<kVec> held[kSteps] = {};
    float over_row[2] = {0.0f, 0.0f};
    if (args.dy) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int64_t col = int64_t(step * kThreads + thread) * kVec;
        if (col < args.N) first_pass<T>(args, row, col, mean, rstd, held[step], over_row, sums[step]);
      }
      row_sums<kThreads>(over_row, shared);
      as_means(args, over_row);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int64_t col = int64_t(step * kThreads + thread) * kVec;
      if (col < args.N) second_pass<T>(args, seed, row, col, held[step], over_row, rstd, sums[step]);
    }
  }

  const auto write = [&](float* partial, const auto& pick) {
    if (partial == nullptr) return;
    if constexpr (kWarpARow)
      write_warps<kVec, kSteps, kRows>(partial, sums, pick, shared, args.N);
    else
      write_columns<kVec, kSteps, kThreads>(partial, sums, pick, args.N);
  };
  write(args.partial_dweight, [](const Sums<kVec>& s) { return s.dweight; });
  write(args.partial_dbias, [](const Sums<kVec>& s) { return s.dbias; });
  write(args.partial_dx_bias, [](const Sums<kVec>& s) { return s.dx_bias; });
}

// grid (parts), block (kWideThreads): any number of columns. The row is read twice, and the sums are kept in the
// block's rows of the partial buffers, where each thread comes back to columns that no other touches.
template <class T, int kVec>
__global__ void __launch_bounds__(kWideThreads, 2) layer_norm_backward_wide_kernel(const LayerNormBackward args) {
  FT_SHARED(float, shared, [2 * kWarp]);
  const uint64_t seed = args.seed ? uint64_t(*args.seed) : 0;
  const int64_t begin = int64_t(threadIdx.x) * kVec, step = int64_t(kWideThreads) * kVec;
  const auto add = [&](float* partial, int64_t col, const float (&terms)[kVec]) {
    if (partial == nullptr) return;
#pragma unroll
    for (int i = 0; i < kVec; ++i) partial[blockIdx.x * args.N + col + i] += terms[i];
  };
  for (float* partial : {args.partial_dweight, args.partial_dbias, args.partial_dx_bias})
    for (int64_t col = begin; partial && col < args.N; col += step)
#pragma unroll
      for (int i = 0; i < kVec; ++i) partial[blockIdx.x * args.N + col + i] = 0.0f;

  for (int64_t row = blockIdx.x; row < args.M; row += gridDim.x) {
    const float mean = args.rms ? 0.0f : args.mean[row], rstd = args.rstd[row];
    float over_row[2] = {0.0f, 0.0f};
    if (args.dy) {
      for (int64_t col = begin; col < args.N; col += step) {
        Held<kVec> held;
        Sums<kVec> sums = {};
        first_pass<T>(args, row, col, mean, rstd, held, over_row, sums);
        add(args.partial_dweight, col, sums.dweight);
        add(args.partial_dbias, col, sums.dbias);
      }
      row_sums<kWideThreads>(over_row, shared);
      as_means(args, over_row);
    }
    for (int64_t col = begin; col < args.N; col += step) {
      Held<kVec> held = {};
      Sums<kVec> sums = {};
      float again[2] = {0.0f, 0.0f};
      if (args.dy) first_pass<T>(args, row, col, mean, rstd, held, again, sums);
      second_pass<T>(args, seed, row, col, held, over_row, rstd, sums);
      add(args.partial_dx_bias, col, sums.dx_bias);
    }
  }
}

// grid (3 * ceil(N / 32)), block (32 * kSlices): a block takes 32 columns of one of the three sums. Slice s of the
// threads adds parts s, s + kSlices ..., and then one warp the slices, in order.
template <class P>
__global__ void __launch_bounds__(kWarp* kSlices) layer_norm_backward_sums_kernel(const LayerNormBackward args) {
  FT_SHARED(float, shared, [kSlices * kWarp]);
  const int64_t groups = (args.N + kWarp - 1) / kWarp;
  const int which = int(blockIdx.x / groups), lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp;
  const float* partial = which == 0 ? args.partial_dweight : (which == 1 ? args.partial_dbias : args.partial_dx_bias);
  void* out = which == 0 ? args.dweight : (which == 1 ? args.dbias : args.dx_bias);
  if (out == nullptr) return;
  const int64_t col = blockIdx.x % groups * kWarp + lane;

  float sum = 0.0f;
  if (col < args.N)
#pragma unroll 4
    for (int64_t part = slice; part < args.parts; part += kSlices) sum += partial[part * args.N + col];
  shared[slice * kWarp + lane] = sum;
  __syncthreads();
  if (slice > 0 || col >= args.N) return;
#pragma unroll
  for (int other = 1; other < kSlices; ++other) sum += shared[other * kWarp + lane];
  from_float(sum, static_cast<P*>(out)[col]);
}

// ---------------------------------------------------------------- launchers

template <class T>
bool is_aligned(const LayerNormBackward& args) {
  bool aligned = args.N % (kVectorBytes / int64_t(sizeof(T))) == 0;
  aligned = aligned && is_vector_aligned<T>(args.dy, args.dy_stride);
  aligned = aligned && is_vector_aligned<T>(args.dtotal, args.dtotal_stride);
  aligned = aligned && is_vector_aligned<T>(args.total, args.total_stride);
  for (const void* p : {static_cast<const void*>(args.dx), static_cast<const void*>(args.dresidual), args.weight})
    aligned = aligned && is_vector_aligned<T>(p, 0);
  return aligned;
}

template <class T, int kVec, int kColumns>
void launch_warps(const LayerNormBackward& args, void* stream) {
  launch(layer_norm_backward_kernel<T, kVec, kColumns / kVec, kWarp, kWarpRows>, args.parts, kWarp * kWarpRows, stream,
         args);
}

template <class T, int kVec, int kColumns, int kThreads>
void launch_block(const LayerNormBackward& args, void* stream) {
  launch(layer_norm_backward_kernel<T, kVec, kColumns / kVec, kThreads, 1>, args.parts, kThreads, stream, args);
}

template <class T, int kVec>
void launch_columns(const LayerNormBackward& args, void* stream) {
  if (args.N <= 8 * kWarp) return launch_warps<T, kVec, 8>(args, stream);
  if constexpr (kVec > 1) {
    if (args.N <= 16 * kWarp) return launch_warps<T, kVec, 16>(args, stream);
    if (args.N <= 32 * kWarp) return launch_warps<T, kVec, 32>(args, stream);
    if (args.N <= 16 * 256) return launch_block<T, kVec, 16, 256>(args, stream);
    if (args.N <= 16 * 512) return launch_block<T, kVec, 16, 512>(args, stream);
  }
  launch(layer_norm_backward_wide_kernel<T, kVec>, args.parts, kWideThreads, stream, args);
}

}  // namespace

void layer_norm_backward(const LayerNormBackward& args, void* stream) {
  check(args);
  const bool has_sums = args.dweight || args.dbias || args.dx_bias;
  if (args.M == 0 && !has_sums) return;
  dispatch_on_device(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_vector_width<T>(is_aligned<T>(args),
                         [&](auto count) { launch_columns<T, decltype(count)::value>(args, stream); });
  });
  if (!has_sums) return;
  dispatch_on_device(args.param_dtype, [&](auto tag) {
    using P = typename decltype(tag)::type;
    launch(layer_norm_backward_sums_kernel<P>, 3 * ((args.N + kWarp - 1) / kWarp), kWarp * kSlices, stream, args);
  });
}

}  // namespace fused::cuda
