// Python's door to the attention kernels. A call's arguments travel as one tuple, in the order of `problem` in
// kernels/attention/native.py, because pybind11 takes longer over thirty arguments than over one.

#include <omp.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <string>

#include "../common/check.h"
#include "attention.h"
#include "scratch.h"
#ifdef FT_WITH_SM90
#include "attention_sm90.h"
#endif

namespace py = pybind11;

namespace fused {
namespace {

using Address = uintptr_t;

// A tuple of N integers. A cast to std::array does the same in three times the time, which short calls would notice.
template <size_t N>
std::array<int64_t, N> integers(const py::handle& item) {
  if (!PyTuple_Check(item.ptr()) || PyTuple_GET_SIZE(item.ptr()) != static_cast<Py_ssize_t>(N))
    throw py::type_error("expected a tuple of " + std::to_string(N) + " integers");
  std::array<int64_t, N> values;
  for (size_t i = 0; i < N; ++i) values[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(item.ptr(), i));
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  return values;
}

Rows rows(const py::handle& item) {  // (address, batch stride, head stride, row stride)
  const auto v = integers<4>(item);
  return {reinterpret_cast<void*>(v[0]), v[1], v[2], v[3]};
}

Scores scores(const py::handle& item) {  // (address, four strides)
  const auto v = integers<5>(item);
  return {reinterpret_cast<const void*>(v[0]), {v[1], v[2], v[3], v[4]}};
}

// All but the seed, which lies where the kernel runs.
void fill(Attention& args, const py::tuple& problem) {
  const auto sizes = integers<6>(problem[0]);
  args.B = sizes[0], args.H = sizes[1], args.Hk = sizes[2], args.L = sizes[3], args.S = sizes[4], args.D = sizes[5];
  args.dtype = static_cast<DType>(problem[1].cast<int>());
  args.q = rows(problem[2]), args.k = rows(problem[3]), args.v = rows(problem[4]);
  args.scale = problem[5].cast<float>();
  args.keep = scores(problem[6]);
  args.bias = scores(problem[7]);
  args.bias_dtype = static_cast<DType>(problem[8].cast<int>());
  args.causal = static_cast<Causal>(problem[9].cast<int>());
  const auto window = integers<2>(problem[10]);
  args.window_left = window[0], args.window_right = window[1];
  const auto lengths = integers<3>(problem[11]);
  args.k_lengths = reinterpret_cast<const int64_t*>(lengths[0]);
  args.q_offsets = reinterpret_cast<const int64_t*>(lengths[1]);
  args.k_offsets = reinterpret_cast<const int64_t*>(lengths[2]);
  args.dropout_p = problem[12].cast<float>();
  args.dropout_threshold = problem[13].cast<uint32_t>();
  args.dropout_scale = problem[14].cast<float>();
}

void fill_for_cpu(Attention& args, const py::tuple& problem, Address scratch) {
  fill(args, problem);
  const auto seed = reinterpret_cast<const uint64_t*>(problem[15].cast<Address>());
  args.seed = seed == nullptr ? 0 : *seed;
  args.scratch = reinterpret_cast<float*>(scratch);
}

// q, k and v side by side in the rows of one contiguous tensor; no mask but causal. In the order of `problem` in
// kernels/attention/together.py.
struct OfQkv {
  int64_t third, batch, row;  // bytes from q to k; strides of qkv

  OfQkv(Attention& args, Address qkv, const py::tuple& problem, const py::tuple& dropout, Address scratch) {
    const auto sizes = integers<6>(problem[0]);  // B, H, L, D, is the batch the first axis, causal
    args.B = sizes[0], args.H = args.Hk = sizes[1], args.L = args.S = sizes[2], args.D = sizes[3];
    args.dtype = static_cast<DType>(problem[1].cast<int>());
    const int64_t width = args.H * args.D;
    third = width * (args.dtype == DType::f32 ? 4 : 2);
    batch = 3 * width * (sizes[4] ? args.L : 1), row = 3 * width * (sizes[4] ? 1 : args.B);
    args.q = part(args, qkv, 0), args.k = part(args, qkv, 1), args.v = part(args, qkv, 2);
    args.causal = static_cast<Causal>(sizes[5]);
    args.scale = problem[2].cast<float>();
    args.dropout_p = dropout[0].cast<float>();
    args.dropout_threshold = dropout[1].cast<uint32_t>();
    args.dropout_scale = dropout[2].cast<float>();
    const auto seed = reinterpret_cast<const uint64_t*>(dropout[3].cast<Address>());
    args.seed = seed == nullptr ? 0 : *seed;
    args.scratch = reinterpret_cast<float*>(scratch);
  }

  // q, k or v, or a gradient, in a tensor like qkv
  Rows part(const Attention& args, Address qkv, int which) const {
    return {reinterpret_cast<void*>(qkv + which * third), batch, args.D, row};
  }

  // the heads' outputs side by side: a third as wide
  Rows merged(const Attention& args, Address out) const {
    return {reinterpret_cast<void*>(out), batch / 3, args.D, row / 3};
  }

  static Rows statistics(const Attention& args, Address lse) {
    return {reinterpret_cast<void*>(lse), args.H * args.L, args.L, 1};
  }
};

void fill_backward(AttentionBackward& args, const py::tuple& saved, const py::tuple& gradients,
                   const py::tuple& dbias) {
  args.out = rows(saved[0]), args.dout = rows(saved[1]), args.lse = rows(saved[2]);
  args.dq = rows(gradients[0]), args.dk = rows(gradients[1]), args.dv = rows(gradients[2]);
  const Scores target = scores(dbias);
  args.dbias_data = static_cast<float*>(const_cast<void*>(target.data));
  for (int axis = 0; axis < 4; ++axis) args.dbias_stride[axis] = target.stride[axis];
}

#ifdef FUSED_WITH_CUDA
// device: (address of the memory for keep's bits, multiprocessors of the device)
void fill_for_cuda(Attention& args, const py::tuple& problem, const py::tuple& device) {
  fill(args, problem);
  args.seed_data = reinterpret_cast<const uint64_t*>(problem[15].cast<Address>());
  args.keep_bits = reinterpret_cast<uint64_t*>(device[0].cast<Address>());
  args.multiprocessors = device[1].cast<int>();
}

void register_on_cuda(py::module_& m) {
  m.def("attention_forward_cuda", [](const py::tuple& problem, const py::tuple& device, const py::tuple& out,
                                     const py::tuple& lse, Address stream) {
    AttentionForward args;
    fill_for_cuda(args, problem, device);
    args.out = rows(out);
    args.lse = rows(lse);
    py::gil_scoped_release nogil;
    cuda::attention_forward(args, reinterpret_cast<void*>(stream));
  });
  // dbias: (partial sums as a mask, their parts, elements of the bias, address of the gradient)
  m.def("attention_backward_cuda",
        [](const py::tuple& problem, const py::tuple& device, const py::tuple& saved, const py::tuple& gradients,
           const py::tuple& statistics, const py::tuple& dbias, Address stream) {
          AttentionBackward args;
          fill_for_cuda(args, problem, device);
          fill_backward(args, saved, gradients, dbias[0].cast<py::tuple>());
          args.statistics = rows(statistics);
          args.dbias_parts = dbias[1].cast<int>();
          args.dbias_count = dbias[2].cast<int64_t>();
          args.dbias_out = reinterpret_cast<void*>(dbias[3].cast<Address>());
          py::gil_scoped_release nogil;
          cuda::attention_backward(args, reinterpret_cast<void*>(stream));
        });
  m.def("attention_weights_cuda",
        [](const py::tuple& problem, const py::tuple& device, const py::tuple& lse, Address weights, Address stream) {
          AttentionWeights args;
          fill_for_cuda(args, problem, device);
          args.lse = rows(lse);
          args.weights = reinterpret_cast<void*>(weights);
          py::gil_scoped_release nogil;
          cuda::attention_weights(args, reinterpret_cast<void*>(stream));
        });
#ifdef FT_WITH_SM90
  m.def("attention_why_not_sm90_cuda", [](const py::tuple& problem) -> py::object {
    AttentionForward args;
    fill(args, problem);
    const char* why = cuda::why_not_sm90(args);
    return why == nullptr ? py::object(py::none()) : py::str(why);
  });
  // tokens: of packed q and k, how many there are in all
  m.def("attention_forward_sm90_cuda", [](const py::tuple& problem, const py::tuple& tokens, const py::tuple& out,
                                          const py::tuple& lse, Address stream) {
    AttentionForward args;
    fill(args, problem);
    args.out = rows(out);
    args.lse = rows(lse);
    const auto count = integers<2>(tokens);
    py::gil_scoped_release nogil;
    cuda::attention_forward_sm90(args, count[0], count[1], reinterpret_cast<void*>(stream));
  });
#endif
}
#endif

// out, dout, dqkv: contiguous, out and dout a third as wide as qkv. weights, mean: 0 if they are not
// wanted; the mean is made of the weights.
void register_of_qkv(py::module_& m) {
  m.def("attention_of_qkv", [](const py::tuple& problem, const py::tuple& dropout, Address qkv, Address out,
                               Address lse, Address weights, Address mean, Address scratch) {
    AttentionForward args;
    const OfQkv layout(args, qkv, problem, dropout, scratch);
    args.out = layout.merged(args, out);
    args.lse = OfQkv::statistics(args, lse);
    AttentionWeights probabilities;
    static_cast<Attention&>(probabilities) = args;
    probabilities.lse = args.lse;
    probabilities.weights = reinterpret_cast<void*>(weights);
    probabilities.mean = reinterpret_cast<void*>(mean);
    py::gil_scoped_release nogil;
    cpu::attention_forward(args);
    if (weights != 0) cpu::attention_weights(probabilities);
  });
  // float32, and D a multiple of 16: then the gradients of k and v are written where they belong
  m.def("attention_of_qkv_backward", [](const py::tuple& problem, const py::tuple& dropout, Address qkv, Address out,
                                        Address lse, Address dout, Address dqkv, Address scratch) {
    AttentionBackward args;
    const OfQkv layout(args, qkv, problem, dropout, scratch);
    FT_REQUIRE(args.dtype == DType::f32 && args.D % 16 == 0, "attention_of_qkv_backward: float32, D a multiple of 16");
    args.out = layout.merged(args, out), args.dout = layout.merged(args, dout);
    args.lse = OfQkv::statistics(args, lse);
    args.dq = layout.part(args, dqkv, 0), args.dk = layout.part(args, dqkv, 1), args.dv = layout.part(args, dqkv, 2);
    py::gil_scoped_release nogil;
    cpu::attention_backward(args);
  });
}

}  // namespace

void register_attention(py::module_& m) {
  m.def(
      "attention_scratch",
      [](const std::string& direction, int64_t D) {
        const int64_t floats = direction == "forward"    ? cpu::forward_scratch(D)
                               : direction == "backward" ? cpu::backward_scratch(D)
                                                         : cpu::weights_scratch(D);
        return floats * omp_get_max_threads();
      },
      "Floats of scratch memory for \"forward\", \"backward\" or \"weights\" at head width D.");
  m.def("attention_forward", [](const py::tuple& problem, const py::tuple& out, const py::tuple& lse, Address scratch) {
    AttentionForward args;
    fill_for_cpu(args, problem, scratch);
    args.out = rows(out);
    args.lse = rows(lse);
    py::gil_scoped_release nogil;
    cpu::attention_forward(args);
  });
  m.def("attention_backward", [](const py::tuple& problem, const py::tuple& saved, const py::tuple& gradients,
                                 const py::tuple& dbias, Address scratch) {
    AttentionBackward args;
    fill_for_cpu(args, problem, scratch);
    fill_backward(args, saved, gradients, dbias);
    py::gil_scoped_release nogil;
    cpu::attention_backward(args);
  });
  m.def("attention_weights", [](const py::tuple& problem, const py::tuple& lse, Address weights, Address scratch) {
    AttentionWeights args;
    fill_for_cpu(args, problem, scratch);
    args.lse = rows(lse);
    args.weights = reinterpret_cast<void*>(weights);
    py::gil_scoped_release nogil;
    cpu::attention_weights(args);
  });
  register_of_qkv(m);
#ifdef FUSED_WITH_CUDA
  register_on_cuda(m);
#endif
}

}  // namespace fused
