#pragma once
// csrc/common/barrier.cuh, tma.cuh and wgmma.cuh on the CPU.

#include <type_traits>

#include "float_types.h"
#include "hopper.h"

namespace fused::cuda {

inline void barrier_sync(int barrier, int threads, EMU_HERE) { emu::sync_named(barrier, threads, where); }
inline void barrier_arrive(int barrier, int threads, EMU_HERE) { emu::arrive_named(barrier, threads, where); }

inline void async_proxy_fence() {}

inline void mbarrier_init(uint64_t* barrier, int arrivals) { emu::init_mbarrier(barrier, arrivals); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* barrier) { emu::arrive_mbarrier(barrier, 0); }
inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) { emu::arrive_mbarrier(barrier, bytes); }
inline void mbarrier_wait(uint64_t* barrier, int parity, EMU_HERE) { emu::wait_mbarrier(barrier, parity, where); }

using TensorMap = emu::TensorMap;

inline void tma_load(void* shared, const TensorMap& map, uint64_t* barrier, int col, int row, int axis2, int axis3) {
  emu::load_box(shared, map, barrier, {col, row, axis2, axis3});
}

template <class T>
TensorMap tensor_map(const void* base, const int64_t (&sizes)[4], const int64_t (&strides)[3], int box_rows) {
  static_assert(sizeof(T) == 2, "elements of 16 bits");
  TensorMap map{static_cast<const char*>(base), {}, {}, box_rows};
  for (int i = 0; i < 4; ++i) map.sizes[i] = sizes[i];
  for (int i = 0; i < 3; ++i) map.strides[i] = strides[i] * 2;
  return map;
}

inline uint64_t wgmma_tile(const void* shared, int leading_bytes = 16) {
  return emu::describe_tile(shared, leading_bytes);
}
template <class... Registers>
void wgmma_fence(Registers&...) {
  emu::fence_products();
}
inline void wgmma_commit(EMU_HERE) { emu::commit_products(where); }
template <int kGroupsLeft>
void wgmma_wait(EMU_HERE) {
  emu::wait_for_products(kGroupsLeft, where);
}
template <int kGroupsLeft, class Registers>
void wgmma_wait(Registers&, EMU_HERE) {
  emu::wait_for_products(kGroupsLeft, where);
}

template <class T>
constexpr auto kWideKind = std::is_same_v<T, __half> ? emu::WideKind::f16 : emu::WideKind::bf16;

template <class T, int kColumns, bool kRowsAreK>
void wgmma(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate, EMU_HERE) {
  emu::issue_product({d, nullptr, a, b, kColumns, kRowsAreK, accumulate, kWideKind<T>}, where);
}
template <class T, int kColumns, bool kRowsAreK>
void wgmma(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate, EMU_HERE) {
  emu::issue_product({d, a, 0, b, kColumns, kRowsAreK, accumulate, kWideKind<T>}, where);
}

template <int kRegisters>
void registers_increase() {}
template <int kRegisters>
void registers_decrease() {}

}  // namespace fused::cuda
