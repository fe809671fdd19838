// Kernels for tests/csrc/test_emulator.py: what the emulator computes, and what it must find wrong. Each C function
// returns nullptr, or what the launch threw.

#include <string>

#include "common/copy_async.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"

using namespace fused;
using namespace fused::cuda;

namespace {

std::string thrown;

template <class F>
const char* caught(const F& f) {
  try {
    f();
  } catch (const std::exception& error) {
    thrown = error.what();
    return thrown.c_str();
  }
  return nullptr;
}

// ---------------------------------------------------------------- right kernels

// out[block * n + i] = in[block * n + n - 1 - i], through shared memory; `has_barrier` false leaves the race in.
__global__ void reverse_kernel(const float* in, float* out, bool has_barrier) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  const int n = int(blockDim.x), i = int(threadIdx.x);
  shared[i] = in[int(blockIdx.x) * n + i];
  if (has_barrier) __syncthreads();
  out[int(blockIdx.x) * n + i] = shared[n - 1 - i];
}

// One tile's product with each way to load it. a (16, 16) and b (16, 8), row-major; out (4, 16, 8).
template <class T>
__global__ void product_kernel(const T* a, const T* b, float* out) {
  FT_SHARED(uint4, memory, [16 * 2 + 16 * 1 + 8 * 2]);
  T* sa = reinterpret_cast<T*>(memory);  // (16, 16)
  T* sb = sa + 16 * 16;                  // (16, 8)
  T* st = sb + 16 * 8;                   // (8, 16), b transposed
  const int lane = int(threadIdx.x);
  for (int i = lane; i < 16 * 16; i += kWarp) sa[i] = a[i];
  for (int i = lane; i < 16 * 8; i += kWarp) {
    sb[i] = b[i];
    st[i % 8 * 16 + i / 8] = b[i];
  }
  __syncwarp();

  uint32_t fa[4], fb[4][2], one[1];
  ldmatrix_x4(fa, sa + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix_x2_trans(fb[0], sb + lane % 16 * 8);
  ldmatrix_x2(fb[1], st + lane % 8 * 16 + lane / 8 % 2 * 8);
  for (int half = 0; half < 2; ++half) {
    ldmatrix_x1_trans(one, sb + (half * 8 + lane % 8) * 8);
    fb[2][half] = one[0];
    ldmatrix_x1(one, st + lane % 8 * 16 + half * 8);
    fb[3][half] = one[0];
  }
  for (int way = 0; way < 4; ++way) {
    float d[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    mma_m16n8k16<T>(d, fa, fb[way][0], fb[way][1]);
    for (int i = 0; i < 4; ++i) out[way * 128 + (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
  }
}

// a (16, 8), b (8, 8): plain tf32, and three products of the split numbers. out (2, 16, 8)
__global__ void tf32_product_kernel(const float* a, const float* b, float* out) {
  const int lane = int(threadIdx.x), group = lane / 4, col = lane % 4;
  uint32_t big_a[4], small_a[4], big_b[2], small_b[2];
  for (int i = 0; i < 4; ++i) split_tf32(a[(group + i % 2 * 8) * 8 + col + i / 2 * 4], big_a[i], small_a[i]);
  for (int i = 0; i < 2; ++i) split_tf32(b[(col + i * 4) * 8 + group], big_b[i], small_b[i]);
  float plain[4] = {}, split[4] = {};
  mma_m16n8k8_tf32(plain, big_a, big_b[0], big_b[1]);
  mma_m16n8k8_tf32(split, small_a, big_b[0], big_b[1]);
  mma_m16n8k8_tf32(split, big_a, small_b[0], small_b[1]);
  mma_m16n8k8_tf32(split, big_a, big_b[0], big_b[1]);
  for (int i = 0; i < 4; ++i) {
    const int at = (group + i / 2 * 8) * 8 + col * 2 + i % 2;
    out[at] = plain[i];
    out[128 + at] = split[i];
  }
}

// out (8, 32): the collectives of a warp, of values in (32).
__global__ void warp_kernel(const float* in, float* out, int width) {
  const int lane = int(threadIdx.x);
  const float v = in[lane];
  out[0 * 32 + lane] = __shfl_sync(kWholeWarp, v, lane * 7 + 3, width);
  out[1 * 32 + lane] = __shfl_xor_sync(kWholeWarp, v, 5, width);
  out[2 * 32 + lane] = __shfl_down_sync(kWholeWarp, v, 3, width);
  out[3 * 32 + lane] = __shfl_up_sync(kWholeWarp, v, 3, width);
  const unsigned votes = __ballot_sync(kWholeWarp, v > 0.0f);
  out[4 * 32 + lane] = float(votes >> lane & 1);
  out[5 * 32 + lane] = float(__popc(votes));
  out[6 * 32 + lane] = float(__any_sync(kWholeWarp, lane == 9) + 2 * __all_sync(kWholeWarp, lane == 9));
  const unsigned mine = lane < 8 ? 0xffu : ~0xffu;  // two groups at once
  out[7 * 32 + lane] = __shfl_sync(mine, v, lane < 8 ? 2 : 20);
}

// Two stages of copies of kWarp floats, of which `valid` bytes are read each; out (tiles, kWarp)
__global__ void pipeline_kernel(const float* in, float* out, int tiles, int valid, int fewer_waits) {
  FT_SHARED(float, stage, [2][kWarp]);
  const int lane = int(threadIdx.x);
  const auto fetch = [&](int tile) {
    if (tile < tiles) copy_async<4>(&stage[tile % 2][lane], in + tile * kWarp + lane, lane * 4 < valid ? 4 : 0);
    copy_async_commit();
  };
  fetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    fetch(tile + 1);
    if (fewer_waits)
      copy_async_wait<2>();
    else
      copy_async_wait<1>();
    __syncwarp();
    out[tile * kWarp + lane] = stage[tile % 2][kWarp - 1 - lane];
    __syncwarp();
  }
  copy_async_wait<0>();
}

// out[i] = how many of the block's threads have in[...] > 0, at three barriers in a row
__global__ void count_kernel(const float* in, float* out) {
  const int i = int(threadIdx.x);
  const int positive = __syncthreads_count(in[i] > 0.0f), any = __syncthreads_or(in[i] > 1e9f);
  __syncthreads();
  out[i] = float(positive + 1000 * any + 10000 * __syncthreads_and(in[i] < 1e9f));
}

// ---------------------------------------------------------------- wrong kernels

enum Wrong {
  kSomeThreadsAtABarrier,
  kTwoBarriersAtOnce,
  kLaneOutsideItsMask,
  kShuffleFromAnAbsentLane,
  kTwoMasks,
  kHalfAWarpInMma,
  kMisalignedCopy,
  kMisalignedMatrixRow,
  kCopyNotWaitedFor,
  kMoreBytesThanTheCopy,
  kNoDynamicMemory,
  kMisalignedVector,
  kSharedMemoryIsNan,
};

__global__ void wrong_kernel(int wrong, float* out) {
  FT_SHARED(float, shared, [64]);
  const int i = int(threadIdx.x);
  float d[4] = {};
  uint32_t r[4] = {};
  switch (wrong) {
    case kSomeThreadsAtABarrier:
      if (i < 32) __syncthreads();
      break;
    case kTwoBarriersAtOnce:
      if (i < 32)
        __syncthreads();
      else
        __syncthreads();
      break;
    case kLaneOutsideItsMask:
      out[i] = __shfl_sync(0xffff0000u, out[i], 20);
      break;
    case kShuffleFromAnAbsentLane:
      if (i % 32 < 8) out[i] = __shfl_sync(0xffu, out[i], 9);
      break;
    case kTwoMasks:
      out[i] = __shfl_sync(i % 2 ? 0xffffffffu : 0xfffffffdu, out[i], 0);
      break;
    case kHalfAWarpInMma:
      if (i % 32 < 16) mma_m16n8k16<__half>(d, r, 0u, 0u);
      break;
    case kMisalignedCopy:
      copy_async<16>(shared + 1, out, 16);
      break;
    case kMisalignedMatrixRow:
      ldmatrix_x4(r, reinterpret_cast<char*>(shared) + 8);
      break;
    case kCopyNotWaitedFor:
      copy_async<4>(shared + i, out + i, 4);
      copy_async_commit();
      break;
    case kMoreBytesThanTheCopy:
      copy_async<4>(shared + i, out + i, 8);
      break;
    case kNoDynamicMemory:
      out[i] = *dynamic_shared();
      break;
    case kMisalignedVector:
      out[i] = float(__ldg(reinterpret_cast<const uint4*>(out + 1)).x);
      break;
    case kSharedMemoryIsNan:
      if (shared[i] == shared[i]) out[i] = 0.0f;  // NaN alone differs from itself
      shared[i] = 0.0f;
      break;
  }
}

template <class From, class To>
void convert(const From* in, To* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) from_float(to_float(in[i]), out[i]);
}

}  // namespace

extern "C" {

const char* probe_reverse(const float* in, float* out, int64_t blocks, int64_t threads, int64_t has_barrier) {
  return caught(
      [&] { launch(reverse_kernel, Grid{blocks}, int(threads), threads * 4, nullptr, in, out, has_barrier != 0); });
}

const char* probe_product_f16(const __half* a, const __half* b, float* out) {
  return caught([&] { launch(product_kernel<__half>, 1, kWarp, nullptr, a, b, out); });
}
const char* probe_product_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* out) {
  return caught([&] { launch(product_kernel<__nv_bfloat16>, 1, kWarp, nullptr, a, b, out); });
}
const char* probe_product_tf32(const float* a, const float* b, float* out) {
  return caught([&] { launch(tf32_product_kernel, 1, kWarp, nullptr, a, b, out); });
}

const char* probe_warp(const float* in, float* out, int64_t width) {
  return caught([&] { launch(warp_kernel, 1, kWarp, nullptr, in, out, int(width)); });
}
const char* probe_pipeline(const float* in, float* out, int64_t tiles, int64_t valid, int64_t fewer_waits) {
  return caught([&] { launch(pipeline_kernel, 1, kWarp, nullptr, in, out, int(tiles), int(valid), int(fewer_waits)); });
}
const char* probe_count(const float* in, float* out, int64_t threads) {
  return caught([&] { launch(count_kernel, 1, int(threads), nullptr, in, out); });
}

const char* probe_wrong(float* out, int64_t wrong, int64_t threads, int64_t shared_bytes, int64_t blocks) {
  return caught([&] {
    launch(wrong_kernel, Grid{blocks}, int(threads), wrong == kNoDynamicMemory ? 0 : shared_bytes, nullptr, int(wrong),
           out);
  });
}

void probe_f16_to_f32(const __half* in, float* out, int64_t count) { convert(in, out, count); }
void probe_bf16_to_f32(const __nv_bfloat16* in, float* out, int64_t count) { convert(in, out, count); }
void probe_f32_to_f16(const float* in, __half* out, int64_t count) { convert(in, out, count); }
void probe_f32_to_bf16(const float* in, __nv_bfloat16* out, int64_t count) { convert(in, out, count); }
}
