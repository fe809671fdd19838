// Python's door to the embedding: addresses become pointers, and the interpreter runs on meanwhile. kernels/embedding's
// cpu.py and cuda.py pass the arguments.

#include "../common/bind.h"
#include "embedding.h"

namespace py = pybind11;

namespace fused {
namespace {

EmbeddingForward forward_args(uintptr_t tokens, bool wide_tokens, uintptr_t table, int64_t table_stride,
                              uintptr_t positions, uintptr_t waves, uintptr_t position_ids, uintptr_t starts,
                              int64_t start, uintptr_t out, int64_t N, int64_t L, int64_t V, int64_t E,
                              int64_t padding_idx, float scale, uintptr_t seed, uint32_t threshold, float keep_scale,
                              int dtype) {
  EmbeddingForward a{};
  a.tokens = at(tokens), a.table = at(table), a.out = at(out);
  a.positions = at(positions), a.waves = at(waves);
  a.position_ids = at(position_ids), a.starts = at(starts), a.start = start;
  a.N = N, a.L = L, a.V = V, a.E = E, a.table_stride = table_stride;
  a.padding_idx = padding_idx;
  a.scale = scale;
  a.dropout = {at(seed), threshold, keep_scale};
  a.wide_tokens = wide_tokens;
  a.dtype = DType(dtype);
  return a;
}

// Returns the number of the first token outside the vocabulary, or -1.
int64_t forward_on_cpu(uintptr_t tokens, bool wide_tokens, uintptr_t table, int64_t table_stride, uintptr_t positions,
                       uintptr_t position_ids, uintptr_t starts, int64_t start, uintptr_t out, int64_t N, int64_t L,
                       int64_t V, int64_t E, int64_t padding_idx, float scale, uintptr_t seed, uint32_t threshold,
                       float keep_scale, int dtype) {
  int64_t first_bad = -1;
  EmbeddingForward a = forward_args(tokens, wide_tokens, table, table_stride, positions, 0, position_ids, starts, start,
                                    out, N, L, V, E, padding_idx, scale, seed, threshold, keep_scale, dtype);
  a.first_bad = &first_bad;
  cpu::embedding_forward(a);
  return first_bad;
}

void backward_on_cpu(uintptr_t dout, int64_t dout_stride, uintptr_t tokens, bool wide_tokens, uintptr_t order,
                     uintptr_t ends, uintptr_t dtable, int64_t N, int64_t V, int64_t E, int64_t padding_idx,
                     float scale, uintptr_t seed, uint32_t threshold, float keep_scale, int dtype) {
  EmbeddingBackward a{};
  a.dout = at(dout), a.tokens = at(tokens), a.dtable = at(dtable);
  a.order = at(order), a.ends = at(ends);
  a.N = N, a.V = V, a.E = E, a.dout_stride = dout_stride;
  a.padding_idx = padding_idx;
  a.scale = scale;
  a.dropout = {at(seed), threshold, keep_scale};
  a.wide_tokens = wide_tokens;
  a.dtype = DType(dtype);
  cpu::embedding_backward(a);
}

#ifdef FUSED_WITH_CUDA
EmbeddingBackwardSorted sorted_args(uintptr_t dout, int64_t dout_stride, uintptr_t tokens, bool wide_tokens,
                                    uintptr_t order, uintptr_t dtable, uintptr_t partial, int64_t N, int64_t V,
                                    int64_t E, int64_t chunk, int64_t padding_idx, float scale, uintptr_t seed,
                                    uint32_t threshold, float keep_scale, int dtype) {
  EmbeddingBackwardSorted a{};
  a.dout = at(dout), a.tokens = at(tokens), a.dtable = at(dtable);
  a.order = at(order), a.partial = at(partial);
  a.N = N, a.V = V, a.E = E, a.chunk = chunk, a.dout_stride = dout_stride;
  a.padding_idx = padding_idx;
  a.scale = scale;
  a.dropout = {at(seed), threshold, keep_scale};
  a.wide_tokens = wide_tokens;
  a.dtype = DType(dtype);
  return a;
}
#endif

}  // namespace

void register_embedding(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("embedding_forward", &forward_on_cpu, release());
  m.def("embedding_backward", &backward_on_cpu, release());
#ifdef FUSED_WITH_CUDA
  m.def("embedding_forward_cuda", on_cuda(&forward_args, &cuda::embedding_forward), release());
  m.def("embedding_backward_cuda", on_cuda(&sorted_args, &cuda::embedding_backward), release());
#endif
}

}  // namespace fused
