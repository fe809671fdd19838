// A product of matrices on sm_90's asynchronous hardware, for tests/csrc/test_hopper.py: one thread of a producer
// warpgroup feeds two stages of shared memory through TMA, and a consumer warpgroup multiplies them with wgmma. Right,
// and wrong in the ways that such a kernel can be. The C functions return nullptr, or what the launch threw.

#include <string>

#include "common/barrier.cuh"
#include "common/mma.cuh"
#include "common/tma.cuh"
#include "common/wgmma.cuh"

using namespace fused;
using namespace fused::cuda;

namespace {

constexpr int kStages = 2, kRows = 64, kDepth = 64;  // of a tile of a; kDepth is the width of a box of TMA

enum Wrong {
  kNothing,
  kProducerDoesNotWait,
  kTooFewBytesExpected,
  kConsumerDoesNotWait,
  kNoWaitForTheProduct,
  kNoFence,
  kReleasedBeforeTheWait,
  kOneArrivalTooFew,
  kPhaseNeverFlips,
  kNoBarrierAfterInit,
  kWrongStep,
  kArrivesTwice,
};

template <class T, int kColumns>
struct Shared {
  T a[kStages][kRows * kDepth];
  T b[kStages][kDepth * kColumns];
  uint64_t full[kStages], empty[kStages];
};

// grid (ceil(M / 64)), block (256). out (M, kColumns) = a (M, K) b, where b is (K, kColumns) if kRowsAreK, else
// (kColumns, K). a comes through shared memory, or, if kFromRegisters, from a_rows.
template <class T, int kColumns, bool kRowsAreK, bool kFromRegisters, Wrong kWrong>
__global__ void __launch_bounds__(256, 1)
    product_kernel(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map, const T* a_rows,
                   float* out, int M, int K) {
  auto& shared = *reinterpret_cast<Shared<T, kColumns>*>(dynamic_shared());
  const int thread = int(threadIdx.x) % 128, row0 = int(blockIdx.x) * kRows, tiles = (K + kDepth - 1) / kDepth;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&shared.full[stage], 1);
      mbarrier_init(&shared.empty[stage], kWrong == kOneArrivalTooFew ? 3 : 4);
    }
    mbarrier_init_fence();
  }
  if constexpr (kWrong != kNoBarrierAfterInit) __syncthreads();

  if (threadIdx.x < 128) {
    registers_decrease<40>();
    if (thread != 0) return;
    for (int tile = 0; tile < tiles; ++tile) {
      const int stage = tile % kStages, round = tile / kStages;
      uint64_t* full = &shared.full[stage];
      if constexpr (kWrong != kProducerDoesNotWait) mbarrier_wait(&shared.empty[stage], (round + 1) & 1);
      const int bytes = int(sizeof shared.a[0] + sizeof shared.b[0]);
      mbarrier_arrive_expect(full, kWrong == kTooFewBytesExpected ? bytes / 2 : bytes);
      tma_load(shared.a[stage], a_map, full, tile * kDepth, row0, 0, 0);
      if constexpr (kRowsAreK)
        for (int col = 0; col < kColumns; col += 64)
          tma_load(shared.b[stage] + col * kDepth, b_map, full, col, tile * kDepth, 0, 0);
      else
        tma_load(shared.b[stage], b_map, full, tile * kDepth, 0, 0, 0);
    }
    return;
  }

  registers_increase<200>();
  float d[kColumns / 2];
  const int row = row0 + thread / 32 * 16 + thread % 32 / 4, pair = thread % 4 * 2;
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages, round = kWrong == kPhaseNeverFlips ? 0 : tile / kStages;
    if constexpr (kWrong != kConsumerDoesNotWait) mbarrier_wait(&shared.full[stage], round & 1);
    uint32_t a[kDepth / 16][4];
    if constexpr (kFromRegisters)
#pragma unroll
      for (int i = 0; i < kDepth / 4; ++i) {
        const int r = row + i % 2 * 8, c = tile * kDepth + i / 4 * 16 + pair + i / 2 % 2 * 8;
        float low = 0.0f, high = 0.0f;
        if (r < M && c < K) low = to_float(a_rows[r * K + c]);
        if (r < M && c + 1 < K) high = to_float(a_rows[r * K + c + 1]);
        a[i / 4][i % 4] = pack<T>(low, high);
      }
    if constexpr (kWrong != kNoFence) wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      const int step = kRowsAreK ? k * 64 : k;  // to the next 16 of k
      const uint64_t b = wgmma_tile(shared.b[stage] + (kWrong == kWrongStep ? k / 2 * 16 : step), 64 * kDepth * 2);
      const bool accumulate = tile > 0 || k > 0;
      if constexpr (kFromRegisters)
        wgmma<T, kColumns, kRowsAreK>(d, a[k / 16], b, accumulate);
      else
        wgmma<T, kColumns, kRowsAreK>(d, wgmma_tile(shared.a[stage] + k), b, accumulate);
    }
    wgmma_commit();
    const bool arrives = thread % 32 == 0;  // one thread a warp: four arrivals
    if (kWrong == kReleasedBeforeTheWait && arrives) mbarrier_arrive(&shared.empty[stage]);
    if constexpr (kWrong != kNoWaitForTheProduct) wgmma_wait<0>();
    if (kWrong != kReleasedBeforeTheWait && arrives) mbarrier_arrive(&shared.empty[stage]);
    if (kWrong == kArrivesTwice && arrives) mbarrier_arrive(&shared.empty[stage]);
  }
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) {
    const int r = row + i / 2 % 2 * 8;
    if (r < M) out[r * kColumns + pair + i / 4 * 8 + i % 2] = d[i];
  }
}

template <class T, int kColumns, bool kRowsAreK, bool kFromRegisters, Wrong kWrong = kNothing>
void multiply(const T* a, const T* b, float* out, int64_t M, int64_t K) {
  const TensorMap a_map = tensor_map<T>(a, {K, M, 1, 1}, {K, M * K, M * K}, kRows);
  const TensorMap b_map = kRowsAreK ? tensor_map<T>(b, {kColumns, K, 1, 1}, {kColumns, K * kColumns, K * kColumns}, 64)
                                    : tensor_map<T>(b, {K, kColumns, 1, 1}, {K, K * kColumns, K * kColumns}, kColumns);
  launch(product_kernel<T, kColumns, kRowsAreK, kFromRegisters, kWrong>, Grid{(M + kRows - 1) / kRows}, 256,
         sizeof(Shared<T, kColumns>), nullptr, a_map, b_map, a, out, int(M), int(K));
}

template <class T, int kColumns>
void multiply_any(bool rows_are_k, bool from_registers, const T* a, const T* b, float* out, int64_t M, int64_t K) {
  if (rows_are_k && from_registers) return multiply<T, kColumns, true, true>(a, b, out, M, K);
  if (rows_are_k) return multiply<T, kColumns, true, false>(a, b, out, M, K);
  if (from_registers) return multiply<T, kColumns, false, true>(a, b, out, M, K);
  multiply<T, kColumns, false, false>(a, b, out, M, K);
}

template <Wrong kWrong>
void multiply_wrong(const __nv_bfloat16* a, const __nv_bfloat16* b, float* out, int64_t M, int64_t K) {
  multiply<__nv_bfloat16, 64, true, false, kWrong>(a, b, out, M, K);
}

// Two halves of a block hand a number back and forth through named barriers.
__global__ void ping_pong_kernel(float* out) {
  FT_SHARED(float, ball, [1]);
  const bool first = threadIdx.x < 64;
  if (threadIdx.x == 0) ball[0] = 0.0f;
  if (first) barrier_arrive(1, 128);
  for (int i = 0; i < 5; ++i) {
    barrier_sync(first ? 2 : 1, 128);
    if (threadIdx.x % 64 == 0) ball[0] = ball[0] * 2 + (first ? 1.0f : 0.0f);
    if (i < 4 || !first) barrier_arrive(first ? 1 : 2, 128);
  }
  if (threadIdx.x == 0) out[0] = ball[0];
}

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

}  // namespace

extern "C" {

const char* probe_multiply(int64_t is_half, int64_t rows_are_k, int64_t columns, const void* a, const void* b,
                           float* out, int64_t M, int64_t K, int64_t from_registers) {
  const auto as = [&](auto type) {
    using T = decltype(type);
    const T *first = static_cast<const T*>(a), *second = static_cast<const T*>(b);
    const bool rows = rows_are_k != 0, registers = from_registers != 0;
    if (columns == 64) return multiply_any<T, 64>(rows, registers, first, second, out, M, K);
    if (columns == 128) return multiply_any<T, 128>(rows, registers, first, second, out, M, K);
    multiply_any<T, 256>(rows, registers, first, second, out, M, K);
  };
  return caught([&] { is_half ? as(__half()) : as(__nv_bfloat16()); });
}

#ifdef FT_EMULATED
// a (M, K) b (K, 64), both bfloat16
const char* probe_wrong(int64_t wrong, const __nv_bfloat16* a, const __nv_bfloat16* b, float* out, int64_t M,
                        int64_t K) {
  using Function = void (*)(const __nv_bfloat16*, const __nv_bfloat16*, float*, int64_t, int64_t);
  constexpr Function kWrongOnes[] = {
      multiply_wrong<kNothing>,
      multiply_wrong<kProducerDoesNotWait>,
      multiply_wrong<kTooFewBytesExpected>,
      multiply_wrong<kConsumerDoesNotWait>,
      multiply_wrong<kNoWaitForTheProduct>,
      multiply_wrong<kNoFence>,
      multiply_wrong<kReleasedBeforeTheWait>,
      multiply_wrong<kOneArrivalTooFew>,
      multiply_wrong<kPhaseNeverFlips>,
      multiply_wrong<kNoBarrierAfterInit>,
      multiply_wrong<kWrongStep>,
      multiply_wrong<kArrivesTwice>,
  };
  return caught([&] { kWrongOnes[wrong](a, b, out, M, K); });
}
#endif

const char* probe_ping_pong(float* out) {
  return caught([&] { launch(ping_pong_kernel, 1, 128, nullptr, out); });
}
}
