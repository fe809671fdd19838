// Python's door to decode attention. kernels/decode_attention/native.py passes the fields of DecodeAttention in groups.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "decode_attention.h"

namespace py = pybind11;

namespace fused {
namespace {

using Tensor = std::array<int64_t, 4>;    // address and three strides
using Integers = std::array<int64_t, 2>;  // address (0: absent), and whether they are int64

DecodeAttention::Tensor tensor(const Tensor& x) { return {reinterpret_cast<void*>(x[0]), {x[1], x[2], x[3]}}; }
DecodeAttention::Integers integers(const Integers& x) { return {reinterpret_cast<const void*>(x[0]), x[1] != 0}; }

DecodeAttention arguments(const std::array<int64_t, 7>& sizes, int dtype, const std::array<Tensor, 4>& tensors,
                          const Integers& lengths, const Integers& rows, const std::array<int64_t, 2>& rows_strides,
                          float scale, bool causal, uintptr_t lse, uintptr_t partial) {
  DecodeAttention args;
  args.B = sizes[0], args.H = sizes[1], args.Hk = sizes[2], args.L = sizes[3];
  args.D = sizes[4], args.R = sizes[5], args.C = sizes[6];
  args.dtype = static_cast<DType>(dtype);
  args.q = tensor(tensors[0]), args.k = tensor(tensors[1]), args.v = tensor(tensors[2]), args.out = tensor(tensors[3]);
  args.lengths = integers(lengths);
  args.rows = integers(rows);
  args.rows_batch = rows_strides[0], args.rows_position = rows_strides[1];
  args.scale = scale;
  args.causal = causal;
  args.lse = reinterpret_cast<float*>(lse);
  args.partial = reinterpret_cast<float*>(partial);
  return args;
}

}  // namespace

void register_decode_attention(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("decode_attention_partial", &cpu::decode_attention_partial,
        "Floats of working memory for sizes B, H, L, C and D.");
  m.def(
      "decode_attention",
      [](const std::array<int64_t, 7>& sizes, int dtype, const std::array<Tensor, 4>& tensors, const Integers& lengths,
         const Integers& rows, const std::array<int64_t, 2>& rows_strides, float scale, bool causal, uintptr_t lse,
         uintptr_t partial) {
        cpu::decode_attention(
            arguments(sizes, dtype, tensors, lengths, rows, rows_strides, scale, causal, lse, partial));
      },
      release());
#ifdef FUSED_WITH_CUDA
  m.def(
      "decode_attention_cuda",
      [](const std::array<int64_t, 7>& sizes, int dtype, const std::array<Tensor, 4>& tensors, const Integers& lengths,
         const Integers& rows, const std::array<int64_t, 2>& rows_strides, float scale, bool causal, uintptr_t lse,
         uintptr_t partial, int64_t split_keys, uintptr_t stream) {
        cuda::decode_attention(
            arguments(sizes, dtype, tensors, lengths, rows, rows_strides, scale, causal, lse, partial), split_keys,
            reinterpret_cast<void*>(stream));
      },
      release());
#endif
}

}  // namespace fused
