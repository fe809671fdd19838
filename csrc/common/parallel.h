#pragma once
// Loops over OpenMP threads. The pool is torch's own (both link libgomp), so torch.set_num_threads governs it.

#include <omp.h>

#include <cstdint>

namespace fused::cpu {

// Below this much work (in elements touched or multiply-adds) a second thread costs more than it saves.
constexpr int64_t kParallelWork = 1 << 15;

// Whether a loop of so many tasks is for more than one thread. If not, OpenMP is not asked: a parallel region of one
// thread takes 0.2 us, in which a row of layer norm is done. Within a task of another loop it never is.
inline bool shared(int64_t count, int64_t work) {
  return count > 1 && work >= kParallelWork && omp_get_max_threads() > 1 && !omp_in_parallel();
}

// The one place where a loop's body is compiled, for whoever calls it.
template <class F>
[[gnu::noinline]] void run_tasks(const F& f, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) f(i);
}

// f(i) for i in [0, count), in equal contiguous parts that threads take as they come to them: halves beforehand end
// with the slower of two threads, and on a machine with others at work one often is. Serial if `work` in all is small.
template <class F>
void parallel_for(int64_t count, int64_t work, const F& f) {
  if (!shared(count, work)) return run_tasks(f, 0, count);
  const int64_t most = 8 * omp_get_max_threads(), parts = count < most ? count : most;
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < parts; ++i) run_tasks(f, count * i / parts, count * (i + 1) / parts);
}

// The same for tasks of unequal cost, handed out one by one in order.
template <class F>
void parallel_tasks(int64_t count, int64_t work, const F& f) {
  if (!shared(count, work)) return run_tasks(f, 0, count);
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) run_tasks(f, i, i + 1);
}

template <class F>
[[gnu::noinline]] void run_range(const F& f, int64_t begin, int64_t end) {
  if (begin < end) f(begin, end);
}

// f(begin, end) for runs of neighbours, handed out one by one in order: for tasks that prepare the one after them.
template <class F>
void parallel_runs(int64_t count, int64_t work, const F& f) {
  if (!shared(count, work)) return run_range(f, 0, count);
  const int64_t equal = count / (8 * omp_get_max_threads()), run = equal < 1 ? 1 : equal > 32 ? 32 : equal;
  const int64_t runs = (count + run - 1) / run;
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < runs; ++i) run_range(f, i * run, i * run + run < count ? i * run + run : count);
}

}  // namespace fused::cpu
