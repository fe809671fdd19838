// The Python module fused_transformer.kernels._C: one register_<op>() per op, nothing else.

#include <omp.h>
#include <pybind11/pybind11.h>

#include <memory>

#include "common/bind_direct.h"
#include "common/isa.h"
#include "common/pages.h"
#include "common/row_parts.h"

namespace py = pybind11;

// One line for each csrc/<op>/bind.cpp, and one in the module below.
namespace fused {
void register_attention(py::module_& m);
void register_bias_act(py::module_& m);
void register_cross_entropy(py::module_& m);
void register_decode_attention(py::module_& m);
void register_decoder_step(py::module_& m);
void register_embedding(py::module_& m);
void register_layer_norm(py::module_& m);
void register_linear(py::module_& m);
void register_linear_argmax(py::module_& m);
void register_log_softmax_top_k(py::module_& m);
namespace direct {
void add_attention(PyObject* module);
void add_bias_act(PyObject* module);
void add_cross_entropy(PyObject* module);
void add_embedding(PyObject* module);
void add_layer_norm(PyObject* module);
void add_log_softmax_top_k(PyObject* module);
}  // namespace direct
}  // namespace fused

namespace {

// Memory that a tensor is laid over, by the buffer protocol.
struct Pages {
  std::shared_ptr<void> memory;
  int64_t bytes;
};

}  // namespace

#ifndef FT_CUDA_ARCHS
#define FT_CUDA_ARCHS ""
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of fused_transformer. Tensors are addresses, sizes and strides; see csrc/<op>/<op>.h.";
  m.attr("cuda_archs") = FT_CUDA_ARCHS;  // "" where this build has no CUDA
  m.def("isa", &fused::cpu::isa_name, "The instruction set the CPU kernels run with.");
  m.def("row_parts", &fused::cpu::row_parts, "Into how many groups the CPU kernels cut rows that they sum over.");
  m.def("cpu_threads", &omp_get_max_threads, "The number of OpenMP threads a kernel may use.");
  py::class_<Pages>(m, "Pages", py::buffer_protocol(), "Memory on large pages that others have used before.")
      .def(py::init([](int64_t bytes) { return Pages{fused::cpu::reused_pages(size_t(bytes)), bytes}; }))
      .def_buffer([](Pages& pages) {
        return py::buffer_info(static_cast<uint8_t*>(pages.memory.get()), py::ssize_t(pages.bytes));
      });
  fused::register_attention(m);
  fused::register_bias_act(m);
  fused::register_cross_entropy(m);
  fused::register_decode_attention(m);
  fused::register_decoder_step(m);
  fused::register_embedding(m);
  fused::register_layer_norm(m);
  fused::register_linear(m);
  fused::register_linear_argmax(m);
  fused::register_log_softmax_top_k(m);
  try {
    fused::direct::add_connect(m.ptr());
    fused::direct::add_attention(m.ptr());
    fused::direct::add_bias_act(m.ptr());
    fused::direct::add_cross_entropy(m.ptr());
    fused::direct::add_embedding(m.ptr());
    fused::direct::add_layer_norm(m.ptr());
    fused::direct::add_log_softmax_top_k(m.ptr());
  } catch (const fused::direct::PythonError&) {
    throw py::error_already_set();
  }
}
