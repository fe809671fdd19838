// Cross entropy forward on CUDA. A block takes a row (a warp up to 1024 columns), and passes over it once, however long
// it is: each thread keeps the maximum of what it has seen and sums relative to that, which it carries over when the
// maximum moves (Milakov and Gimelshein 2018, arXiv:1805.02867); then the threads' sums are brought to the row's
// maximum and added. Loads are 16 bytes each, four under way, where V is a multiple of so many elements, as matrix
// products like it anyway; else an element each.
//
// Moves M * V elements; bound by memory.

#include <cmath>

#include "device_target.cuh"

namespace fused::cuda {
namespace {

constexpr int kSteps = 4;  // vectors of a thread at a time

// Sums over the columns that a thread has seen, relative to `shift`: their maximum, or 0 while that is -inf.
struct Running {
  float top = -kInfinity;
  float exps = 0.0f;   // sum of exp(x - shift)
  float gaps = 0.0f;   // sum of shift - x
  float count = 0.0f;  // columns

  FT_DEVICE float shift() const { return top == -kInfinity ? 0.0f : top; }

  // Takes the sums to another maximum, which is at least `top`.
  FT_DEVICE void move_to(float new_top) {
    const float old_shift = shift(), old_top = top;
    top = new_top;
    exps *= expf(old_top - shift());  // exp(-inf) while there was nothing but -inf
    gaps += count * (shift() - old_shift);
  }
};

// The columns of a row from col on, as many as there are; `left` of them, which may be none.
template <class T, int kVec, bool kAligned>
FT_DEVICE void load_columns(const T* p, int64_t left, float (&x)[kVec]) {
  if constexpr (kAligned) {
    if (left > 0) load(p, x);
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (i < left) x[i] = to_float(p[i]);
  }
}

template <int kThreads>
FT_DEVICE float row_max(float v, float* shared) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(kWholeWarp, v, offset));
  if constexpr (kThreads > kWarp) {
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = v;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kThreads / kWarp; ++warp) v = fmaxf(v, shared[warp]);
  }
  return v;
}

// grid (ceil(M / kRows)), block (kRows * kThreads): kThreads threads a row
template <class T, bool kAligned, int kThreads, int kRows>
__global__ void __launch_bounds__(kThreads* kRows) cross_entropy_forward_kernel(const CrossEntropyForward args) {
  constexpr int kVec = kVectorBytes / int(sizeof(T)), kAtOnce = kThreads * kVec;
  FT_SHARED(float, shared, [2 * kWarp]);
  const int thread = threadIdx.x % kThreads;
  const int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / kThreads;
  if (row >= args.M) return;  // a whole warp, or nobody: a block's barriers stay whole
  const Target target = target_of(args, row);
  const T* logits = static_cast<const T*>(args.logits) + row * args.logits_stride;

  Running running;
  const int64_t end = target.counts ? args.V : 0;
  for (int64_t first = thread * kVec; first < end; first += kSteps * kAtOnce) {
    const auto left = [&](int step) { return end - first - step * kAtOnce; };
    const auto is_there = [&](int step, int i) { return (kAligned ? 0 : i) < left(step); };
    float x[kSteps][kVec];
    float top = running.top;
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      load_columns<T, kVec, kAligned>(logits + first + step * kAtOnce, left(step), x[step]);
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int i = 0; i < kVec; ++i)
        if (is_there(step, i)) top = fmaxf(top, x[step][i]);
    running.move_to(top);
    const float shift = running.shift();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (!is_there(step, i)) continue;
        running.exps += expf(x[step][i] - shift);
        running.gaps += shift - x[step][i];
      }
      running.count += float(max(int64_t(0), min(left(step), int64_t(kVec))));
    }
  }

  running.move_to(row_max<kThreads>(running.top, shared));
  float sums[2] = {running.exps, running.gaps};
  row_sums<kThreads>(sums, shared);
  if (thread != 0) return;
  const float top = running.top, log_sum = logf(sums[0]), lse = top + log_sum;
  float loss = log_sum + lse * (args.z_loss * lse);
  if (args.target_weight != 0.0f && target.inside) {
    float at_target[1];
    load(logits + target.word, at_target);
    loss += args.target_weight * (top - at_target[0]);
  }
  if (args.every_weight > 0.0f) loss += args.every_weight * sums[1];
  args.losses[row] = target.inside ? loss : (target.counts ? __uint_as_float(kNan) : 0.0f);
  args.top[row] = top;
  args.log_sum[row] = log_sum;
}

template <class T, bool kAligned>
void launch_rows(const CrossEntropyForward& args, void* stream) {
  if (args.V <= kWarpColumns)
    launch(cross_entropy_forward_kernel<T, kAligned, kWarp, kWarpRows>, (args.M + kWarpRows - 1) / kWarpRows,
           kWarp * kWarpRows, stream, args);
  else
    launch(cross_entropy_forward_kernel<T, kAligned, kBlockThreads, 1>, args.M, kBlockThreads, stream, args);
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& args, void* stream) {
  FT_REQUIRE(args.M >= 0 && args.V >= 1, "M must not be negative, and V at least 1");
  if (args.M == 0) return;
  dispatch_on_device(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool aligned = is_whole_vectors<T>(args.V) && is_vector_aligned<T>(args.logits, args.logits_stride);
    aligned ? launch_rows<T, true>(args, stream) : launch_rows<T, false>(args, stream);
  });
}

}  // namespace fused::cuda
