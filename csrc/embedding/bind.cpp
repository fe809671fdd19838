#include <pybind11/pybind11.h>

#include "embedding.h"

namespace py = pybind11;

namespace fused {

namespace {

EmbeddingDropout dropout_of(uintptr_t seed, uint32_t threshold, float keep_scale) {
  if (seed == 0) return {false, 0, 0, 1.0f};
  return {true, uint64_t(*reinterpret_cast<const int64_t*>(seed)), threshold, keep_scale};
}

}  // namespace

void register_embedding(py::module_& m) {
  m.def(
      "embedding_forward",
      [](uintptr_t tokens, bool wide_tokens, uintptr_t table, int64_t table_stride, uintptr_t positions,
         uintptr_t position_ids, uintptr_t starts, int64_t start, uintptr_t out, int64_t N, int64_t L, int64_t V,
         int64_t E, int64_t padding_idx, float scale, uintptr_t seed, uint32_t threshold, float keep_scale, int dtype) {
        int64_t first_bad = -1;
        EmbeddingForward a{};
        a.tokens = reinterpret_cast<const void*>(tokens);
        a.table = reinterpret_cast<const void*>(table);
        a.positions = reinterpret_cast<const float*>(positions);
        a.position_ids = reinterpret_cast<const int64_t*>(position_ids);
        a.starts = reinterpret_cast<const int64_t*>(starts);
        a.start = start;
        a.out = reinterpret_cast<void*>(out);
        a.first_bad = &first_bad;
        a.N = N, a.L = L, a.V = V, a.E = E;
        a.table_stride = table_stride;
        a.padding_idx = padding_idx;
        a.scale = scale;
        a.dropout = dropout_of(seed, threshold, keep_scale);
        a.wide_tokens = wide_tokens;
        a.dtype = static_cast<DType>(dtype);
        py::gil_scoped_release release;
        cpu::embedding_forward(a);
        return first_bad;
      },
      "Returns the number of the first token outside the vocabulary, or -1. See csrc/embedding/embedding.h.");

  m.def(
      "embedding_backward",
      [](uintptr_t dout, int64_t dout_stride, uintptr_t tokens, bool wide_tokens, uintptr_t order, uintptr_t ends,
         uintptr_t dtable, int64_t N, int64_t V, int64_t E, int64_t padding_idx, float scale, uintptr_t seed,
         uint32_t threshold, float keep_scale, int dtype) {
        EmbeddingBackward a{};
        a.dout = reinterpret_cast<const void*>(dout);
        a.tokens = reinterpret_cast<const void*>(tokens);
        a.order = reinterpret_cast<int64_t*>(order);
        a.ends = reinterpret_cast<int64_t*>(ends);
        a.dtable = reinterpret_cast<void*>(dtable);
        a.N = N, a.V = V, a.E = E;
        a.dout_stride = dout_stride;
        a.padding_idx = padding_idx;
        a.scale = scale;
        a.dropout = dropout_of(seed, threshold, keep_scale);
        a.wide_tokens = wide_tokens;
        a.dtype = static_cast<DType>(dtype);
        py::gil_scoped_release release;
        cpu::embedding_backward(a);
      },
      "See csrc/embedding/embedding.h.");
}

}  // namespace fused
