#pragma once
// Barriers beyond __syncthreads(): named ones among some warps of a block, and mbarrier of sm_90, which counts the
// bytes of asynchronous copies too.

#include "launch.cuh"

#ifdef FT_EMULATED
#include <emulated_hopper.h>
#else

namespace fused::cuda {

// `threads` threads, a multiple of 32, come to barrier 1 ... 15 (0 is that of __syncthreads). barrier_sync waits for
// all of them; barrier_arrive counts as one and does not wait.
FT_DEVICE void barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
FT_DEVICE void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Between stores to shared memory and TMA or wgmma that work on what was stored: those go another way to it.
FT_DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// An mbarrier is 8 bytes of shared memory. A phase of it ends when `arrivals` arrivals and all the bytes they expect
// have come; phases have parity 0, 1, 0 ... One thread makes it; mbarrier_init_fence() and a barrier of the block go
// before its first use.
FT_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
FT_DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

FT_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and says that `bytes` bytes of copies are to come in this phase.
FT_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Returns when the phase of this parity has ended. A new mbarrier counts as if a phase of parity 1 had.
FT_DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra.uni done;\n"
      "bra.uni again;\n"
      "done:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

}  // namespace fused::cuda
#endif
