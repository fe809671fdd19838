// Cross entropy backward on CUDA. A block takes a chunk of 4096 columns of a row (four warps 512 columns each of as
// many rows, up to 1024 columns); the row's statistics are known, so that nothing is carried from chunk to chunk. The
// gradient may be written where the logits were: a thread writes the elements that it has read, and nobody else's.
//
// Moves 2 * M * V elements, one read and one write; bound by memory.

#include <cmath>

#include "device_target.cuh"

namespace fused::cuda {
namespace {

constexpr int kColumns = 16;  // of a thread

// As load(), but not through the read-only cache: what is read here may be written later in the same kernel.
template <class T, int kVec>
FT_DEVICE void load_to_overwrite(const T* p, float (&out)[kVec]) {
  Pack<T, kVec> pack;
  if constexpr (sizeof pack == kVectorBytes) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    memcpy(&pack, &raw, sizeof pack);
  } else {
    pack = *reinterpret_cast<const Pack<T, kVec>*>(p);
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) out[i] = to_float(pack.element[i]);
}

// grid (ceil(M / kRows), ceil(V / (kThreads * kColumns))), block (kRows * kThreads): kThreads threads a row
template <class T, int kVec, int kThreads, int kRows>
__global__ void __launch_bounds__(kThreads* kRows) cross_entropy_backward_kernel(const CrossEntropyBackward args) {
  constexpr int kSteps = kColumns / kVec;
  const int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / kThreads;
  if (row >= args.M) return;
  const int64_t first = int64_t(blockIdx.y) * (kThreads * kColumns) + threadIdx.x % kThreads * kVec;
  const Target target = target_of(args, row);
  const T* logits = static_cast<const T*>(args.logits) + row * args.logits_stride;
  T* dlogits = static_cast<T*>(args.dlogits) + row * args.dlogits_stride;

  float x[kSteps][kVec] = {};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t col = first + step * kThreads * kVec;
    if (col < args.V && target.counts) load_to_overwrite(logits + col, x[step]);
  }
  const float top = args.top[row], log_sum = args.log_sum[row];
  const float dloss = target.inside ? args.dlosses[row * args.dlosses_stride] : __uint_as_float(kNan);
  const float slope = 1.0f + 2.0f * args.z_loss * (top + log_sum);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t col = first + step * kThreads * kVec;
    if (col >= args.V) break;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      float dx = expf((x[step][i] - top) - log_sum) * slope - args.every_weight;
      if (col + i == target.word) dx -= args.target_weight;
      x[step][i] = target.counts ? dloss * dx : 0.0f;
    }
    store(dlogits + col, x[step]);
  }
}

template <class T, int kVec, int kThreads, int kRows>
void launch_chunks(const CrossEntropyBackward& args, void* stream) {
  constexpr int64_t kChunk = kThreads * kColumns;
  launch(cross_entropy_backward_kernel<T, kVec, kThreads, kRows>,
         Grid{(args.M + kRows - 1) / kRows, (args.V + kChunk - 1) / kChunk}, kThreads * kRows, 0, stream, args);
}

template <class T>
bool is_aligned(const CrossEntropyBackward& args) {
  return is_whole_vectors<T>(args.V) && is_vector_aligned<T>(args.logits, args.logits_stride) &&
         is_vector_aligned<T>(args.dlogits, args.dlogits_stride);
}

}  // namespace

void cross_entropy_backward(const CrossEntropyBackward& args, void* stream) {
  FT_REQUIRE(args.M >= 0 && args.V >= 1, "M must not be negative, and V at least 1");
  FT_REQUIRE(args.dlogits != args.logits || args.dlogits_stride == args.logits_stride,
             "a gradient in place has the logits' stride");
  if (args.M == 0) return;
  dispatch_on_device(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_vector_width<T>(is_aligned<T>(args), [&](auto count) {
      constexpr int kVec = decltype(count)::value;
      if (args.V <= kWarpColumns)
        launch_chunks<T, kVec, kWarp, kWarpRows>(args, stream);
      else
        launch_chunks<T, kVec, kBlockThreads, 1>(args, stream);
    });
  });
}

}  // namespace fused::cuda
