#pragma once
// Loops over OpenMP threads. The pool is torch's own (both link libgomp), so torch.set_num_threads governs it.

#include <omp.h>

#include <cstdint>

namespace fused::cpu {

// Below this much work (in elements touched or multiply-adds) a second thread costs more than it saves.
constexpr int64_t kParallelWork = 1 << 15;

// f(i) for i in [0, count), split in equal contiguous parts; serial if `work` in all is small.
template <class F>
void parallel_for(int64_t count, int64_t work, const F& f) {
#pragma omp parallel for schedule(static) if (count > 1 && work >= kParallelWork)
  for (int64_t i = 0; i < count; ++i) f(i);
}

// The same for tasks of unequal cost, handed out one by one in order.
template <class F>
void parallel_tasks(int64_t count, int64_t work, const F& f) {
#pragma omp parallel for schedule(dynamic, 1) if (count > 1 && work >= kParallelWork)
  for (int64_t i = 0; i < count; ++i) f(i);
}

// f(begin, end) for runs of neighbours, handed out one by one in order: for tasks that prepare the one after them.
template <class F>
void parallel_runs(int64_t count, int64_t work, const F& f) {
  const bool shared = count > 1 && work >= kParallelWork && omp_get_max_threads() > 1;
  const int64_t equal = count / (8 * omp_get_max_threads()), run = !shared      ? count
                                                                   : equal < 1  ? 1
                                                                   : equal > 32 ? 32
                                                                                : equal;
  const int64_t runs = run == 0 ? 0 : (count + run - 1) / run;
#pragma omp parallel for schedule(dynamic, 1) if (shared)
  for (int64_t i = 0; i < runs; ++i) f(i * run, i * run + run < count ? i * run + run : count);
}

}  // namespace fused::cpu
