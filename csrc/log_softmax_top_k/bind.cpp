// Python's door to log-softmax and top-k. kernels/log_softmax_top_k passes the fields of LogSoftmaxTopK in groups.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../common/bind.h"
#include "advance_beams.h"
#include "log_softmax_top_k.h"

namespace py = pybind11;

namespace fused {
namespace {

LogSoftmaxTopK arguments(const std::array<int64_t, 4>& sizes, int dtype, const std::array<int64_t, 2>& x,
                         uintptr_t addend, const std::array<uintptr_t, 2>& results,
                         const std::array<uintptr_t, 2>& working) {
  LogSoftmaxTopK args;
  args.M = sizes[0], args.V = sizes[1], args.beams = sizes[2], args.k = sizes[3];
  args.dtype = static_cast<DType>(dtype);
  args.x = reinterpret_cast<const void*>(x[0]), args.x_stride = x[1];
  args.addend = reinterpret_cast<const float*>(addend);
  args.values = reinterpret_cast<float*>(results[0]), args.places = reinterpret_cast<int64_t*>(results[1]);
  args.kept = reinterpret_cast<int32_t*>(working[0]), args.sums = reinterpret_cast<float*>(working[1]);
  return args;
}

}  // namespace

void register_log_softmax_top_k(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "log_softmax_top_k",
      [](const std::array<int64_t, 4>& sizes, int dtype, const std::array<int64_t, 2>& x, uintptr_t addend,
         const std::array<uintptr_t, 2>& results, const std::array<uintptr_t, 2>& working) {
        cpu::log_softmax_top_k(arguments(sizes, dtype, x, addend, results, working));
      },
      release());
  m.def(
      "advance_beams",
      [](const std::array<int64_t, 6>& sizes, const std::array<uintptr_t, 6>& alive,
         const std::array<uintptr_t, 5>& next) {
        cpu::AdvanceBeams args;
        args.B = sizes[0], args.k = sizes[1], args.m = sizes[2], args.T = sizes[3], args.V = sizes[4],
        args.eos = sizes[5];
        args.near = at(alive[0]), args.places = at(alive[1]), args.scores = at(alive[2]), args.behind = at(alive[3]);
        args.tokens = at(alive[4]), args.log_probs = at(alive[5]);
        args.next_scores = at(next[0]), args.next_behind = at(next[1]), args.next_tokens = at(next[2]);
        args.next_log_probs = at(next[3]), args.parents = at(next[4]);
        const cpu::Advanced found = cpu::advance_beams(args);
        return std::make_tuple(found.nan, found.ended, found.hopeless);
      },
      "sizes: B, k, m, T, V, eos. alive: near, places, scores, behind, tokens, log_probs. next: scores, behind, "
      "tokens, log_probs, parents. Returns whether there is NaN, something ended, and a sentence is hopeless.");
#ifdef FUSED_WITH_CUDA
  m.def("log_softmax_top_k_parts_cuda", &cuda::log_softmax_top_k_parts, "Into how many parts a row of V is cut.");
  m.def(
      "log_softmax_top_k_cuda",
      [](const std::array<int64_t, 4>& sizes, int dtype, const std::array<int64_t, 2>& x, uintptr_t addend,
         const std::array<uintptr_t, 2>& results, const std::array<uintptr_t, 2>& working, uintptr_t stream) {
        cuda::log_softmax_top_k(arguments(sizes, dtype, x, addend, results, working), reinterpret_cast<void*>(stream));
      },
      release());
#endif
}

}  // namespace fused
