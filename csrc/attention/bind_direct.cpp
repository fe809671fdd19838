// Attention as a direct call (common/bind_direct.h). What `attention` in kernels/attention says of its arguments is
// checked here in the same words' meaning: what does not fit is left to the long way, which has the words.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../common/bind_direct.h"
#include "attention.h"
#ifdef FT_WITH_SM90
#include "attention_sm90.h"
#endif
#include "scratch.h"

namespace fused::direct {
namespace {

bool causal(PyObject* argument, Causal& out) {
  if (argument == Py_False) return true;
  if (!PyUnicode_CheckExact(argument)) return false;
  if (PyUnicode_CompareWithASCIIString(argument, "top_left") == 0) {
    out = Causal::top_left;
    return true;
  }
  if (PyUnicode_CompareWithASCIIString(argument, "bottom_right") == 0) {
    out = Causal::bottom_right;
    return true;
  }
  return false;
}

bool window(PyObject* argument, Attention& args) {
  if (argument == Py_None) return true;
  return PyTuple_CheckExact(argument) && PyTuple_GET_SIZE(argument) == 2 &&
         integer(PyTuple_GET_ITEM(argument, 0), args.window_left) &&
         integer(PyTuple_GET_ITEM(argument, 1), args.window_right) && args.window_left >= -1 && args.window_right >= -1;
}

// A mask that broadcasts to (B, H, L, S), aligned at its last axis.
bool scores(const View& x, const Attention& args, Scores& out) {
  if (x.ndim > 4) return false;
  const int64_t full[4] = {args.B, args.H, args.L, args.S};
  for (int axis = 4 - x.ndim; axis < 4; ++axis) {
    const int own = axis - (4 - x.ndim);
    if (x.shape[own] != 1 && x.shape[own] != full[axis]) return false;
    out.stride[axis] = x.shape[own] == 1 ? 0 : x.stride[own];
  }
  out.data = x.data;
  return true;
}

// (B,) lengths, none beyond `most`; on CUDA nobody looks, and the kernels take those that are for the nearest that
// fits.
bool lengths(const View& x, int64_t batch, int64_t most, const int64_t*& out) {
  if (x.element != Element::i64 || !x.is_vector(batch)) return false;
  out = static_cast<const int64_t*>(x.data);
  return !x.on_cpu() || std::all_of(out, out + batch, [&](int64_t length) { return length >= 0 && length <= most; });
}

// (B + 1,) offsets that cover all `tokens`; `longest`: of the sequences between them.
bool offsets(const View& x, int64_t tokens, const int64_t*& out, int64_t& longest) {
  if (x.element != Element::i64 || x.ndim != 1 || x.shape[0] < 2 || !x.dense_last()) return false;
  out = static_cast<const int64_t*>(x.data);
  longest = 0;
  for (int64_t i = 1; i < x.shape[0]; ++i) {
    if (out[i] < out[i - 1]) return false;
    longest = std::max(longest, out[i] - out[i - 1]);
  }
  return out[0] == 0 && out[x.shape[0] - 1] == tokens;
}

Rows rows(const View& x) {  // (B, H, L, D), or packed (T, H, D)
  if (x.ndim == 4) return {x.data, x.stride[0], x.stride[1], x.stride[2]};
  return {x.data, 0, x.stride[1], x.stride[0]};
}

// q, k, v and what the masks are measured against.
bool sizes(const View& q, const View& k, const View& v, const View& q_offsets, const View& k_offsets, Attention& args) {
  const bool packed = q_offsets.given();
  if (!q.floating() || k.element != q.element || v.element != q.element || q.ndim != (packed ? 3 : 4) ||
      k.ndim != q.ndim || !k.same_shape(v) || q.last() != k.last() || q.last() < 1 || q.last() > kMaxHeadWidth)
    return false;
  if (!q.dense_last() || !k.dense_last() || !v.dense_last() || q.count() == 0 || k.count() == 0) return false;
  args.H = q.shape[1], args.Hk = k.shape[1], args.D = q.last();
  args.dtype = q.dtype();
  args.q = rows(q), args.k = rows(k), args.v = rows(v);
  if (args.H % args.Hk != 0) return false;
  if (!packed) {
    args.B = q.shape[0], args.L = q.shape[2], args.S = k.shape[2];
    return k.shape[0] == args.B && !k_offsets.given();
  }
  args.B = q_offsets.ndim == 1 ? q_offsets.shape[0] - 1 : 0;
  const View& of_keys = k_offsets.given() ? k_offsets : q_offsets;
  return offsets(q_offsets, q.shape[0], args.q_offsets, args.L) && of_keys.same_shape(q_offsets) &&
         offsets(of_keys, k.shape[0], args.k_offsets, args.S);
}

// Whether tiles of this width fit the shared memory of the device; see kernels/attention/cuda.py.
bool fits(const Device& device, const Attention& args) {
  const bool little = (device.major == 8 && (device.minor == 6 || device.minor == 9)) || device.major == 12;
  return !little || args.D <= (args.dtype == DType::f32 ? 64 : 128);
}

// Whether Hopper's own kernel may be taken. Nobody knows until kernels/attention/cuda_sm90.py says so, which the first
// call on CUDA imports, by going the long way.
enum class Hopper { unknown, no, yes } hopper = Hopper::unknown;

// (bool): sets `hopper`.
PyObject* use_hopper(PyObject* const* arguments) {
  hopper = arguments[0] == Py_True ? Hopper::yes : Hopper::no;
  return Py_NewRef(Py_True);
}

void forward_on_cuda(const View& q, AttentionForward& args) {
#ifdef FUSED_WITH_CUDA
  void* stream = current_stream(q);
  const Device& device = device_of(q);
  args.multiprocessors = device.multiprocessors;
  const Released released;
#ifdef FT_WITH_SM90
  if (hopper == Hopper::yes && device.major == 9 && device.minor == 0 && cuda::why_not_sm90(args) == nullptr)
    return cuda::attention_forward_sm90(args, q.shape[0], args.B, stream);
#endif
  cuda::attention_forward(args, stream);
#else
  (void)q, (void)args;
#endif
}

// What forward and backward passes are called with, from q on.
struct Inputs {
  View q, k, v, keep, bias, k_lengths, q_offsets, k_offsets;
  Dropout drop;
  bool differentiated = false;

  bool packed() const { return q_offsets.given(); }
};
constexpr int kInputs = 13;

// (q, k, v, keep, bias, causal, window, k_lengths, q_offsets, k_offsets, scale, dropout_p, seed): as
// attention_with_lse has them. What `args` holds afterwards is what all directions share, but for the scratch memory.
bool parse(PyObject* const* arguments, Inputs& in, Attention& args) {
  bool* wanted = &in.differentiated;
  if (!view(arguments[0], in.q, wanted) || !view(arguments[1], in.k, wanted) || !view(arguments[2], in.v, wanted) ||
      !view_or_absent(arguments[3], in.keep) || !view_or_absent(arguments[4], in.bias, wanted) ||
      !view_or_absent(arguments[7], in.k_lengths) || !view_or_absent(arguments[8], in.q_offsets) ||
      !view_or_absent(arguments[9], in.k_offsets) || !dropout(arguments[11], arguments[12], in.drop))
    return false;
  const auto& [q, k, v, keep, bias, k_lengths, q_offsets, k_offsets, drop, differentiated] = in;
  if (!together({&q, &k, &v, &keep, &bias, &k_lengths, &q_offsets, &k_offsets, &drop.seed})) return false;
  // on CUDA a mask's bits want memory, and the longest sequence of a packed batch is not known to the host
  if (!q.on_cpu() && (keep.given() || q_offsets.given() || hopper == Hopper::unknown)) return false;
  if (!sizes(q, k, v, q_offsets, k_offsets, args)) return false;
  if (!q.on_cpu() && !fits(device_of(q), args)) return false;
  // masks of packed batches may be larger than the longest sequence
  if (in.packed() && (keep.given() || bias.given())) return false;
  if (keep.given() && (keep.element != Element::boolean || !scores(keep, args, args.keep))) return false;
  // of the imaginary part of a conjugate, the one tensor whose sign is not in its memory, no stride is 1
  if (bias.given() && (!bias.floating() || bias.ndim == 0 || bias.stride[bias.ndim - 1] != 1)) return false;
  if (bias.given() && !scores(bias, args, args.bias)) return false;
  if (bias.given()) args.bias_dtype = bias.dtype();
  if (!causal(arguments[5], args.causal) || !window(arguments[6], args)) return false;
  if (k_lengths.given() && !lengths(k_lengths, args.B, args.S, args.k_lengths)) return false;
  double scale = 1.0 / std::sqrt(double(args.D));
  if (arguments[10] != Py_None && !number(arguments[10], scale)) return false;
  args.scale = float(scale);
  args.dropout_p = float(drop.p), args.dropout_threshold = drop.threshold(), args.dropout_scale = drop.scale();
  if (drop.data() != nullptr && q.on_cpu()) args.seed = uint64_t(*drop.data());
  if (!q.on_cpu()) args.seed_data = reinterpret_cast<const uint64_t*>(drop.data());
  return true;
}

Rows statistics(const Attention& args, bool packed, float* data, int64_t each = 1) {  // (B, H, L), or packed (T, H)
  if (packed) return {data, 0, each, args.H * each};
  return {data, args.H * args.L * each, args.L * each, each};
}

// (..., wants_lse, Keep), after what `parse` takes. Returns out, or (out, lse), which is what the backward pass asks
// for too.
PyObject* attention(PyObject* const* arguments) {
  Inputs in;
  AttentionForward args;
  if (!parse(arguments, in, args) || !ready() || !autocast_keeps(arguments[0])) return nullptr;
  const Keep asked = direct::keep(arguments[kInputs + 1]);
  if (in.differentiated && (asked != Keep::if_wanted || in.drop.lacks_seed())) return Py_NewRef(Py_True);
  if (in.drop.lacks_seed()) return nullptr;

  const View& q = in.q;
  const bool wants_lse = in.differentiated || asked == Keep::yes || arguments[kInputs] == Py_True;
  Output out = empty_like(arguments[0], false);
  const Output lse = wants_lse ? empty(arguments[0], q.shape, q.ndim - 1, Element::f32) : no_output();
  if (!out.view.dense_last()) return nullptr;  // q overlaps itself
  args.out = rows(out.view);
  const int64_t unkept = wants_lse ? 0 : q.count() / args.D;
  const int64_t floats = q.on_cpu() ? cpu::forward_scratch(args.D) * omp_get_max_threads() : 0;
  const Output working = floats + unkept > 0 ? working_memory(q, arguments[0], floats + unkept) : no_output();
  args.scratch = static_cast<float*>(working.view.data);
  args.lse = statistics(args, in.packed(), wants_lse ? static_cast<float*>(lse.view.data) : args.scratch + floats);
  if (q.on_cpu()) {
    const Released released;
    cpu::attention_forward(args);
  } else {
    forward_on_cuda(q, args);
  }
  if (in.differentiated) return list({out.tensor.get(), lse.tensor.get()});
  return wants_lse ? tuple({out.tensor.get(), lse.tensor.get()}) : out.tensor.release();
}

void backward_on_cuda(const View& q, AttentionBackward& args) {
#ifdef FUSED_WITH_CUDA
  void* stream = current_stream(q);
  args.multiprocessors = device_of(q).multiprocessors;
  const Released released;
  cuda::attention_backward(args, stream);
#else
  (void)q, (void)args;
#endif
}

// (..., dout, out, lse), after what `parse` takes. Returns (dq, dk, dv). A bias has no gradient here; and on a CPU the
// kernel sums dk and dv in float32 and in whole vectors, so that other k and v go the long way.
PyObject* backward(PyObject* const* arguments) {
  Inputs in;
  AttentionBackward args;
  View dout, out, lse;
  PyObject* const* saved = arguments + kInputs;
  if (!parse(arguments, in, args) || !view(saved[0], dout) || !view(saved[1], out) || !view(saved[2], lse))
    return nullptr;
  const View& q = in.q;
  if (!dout.like(q) || !dout.dense_last() || !out.like(q) || !out.dense_last() ||
      !lse.is_dense(Element::f32, q.count() / args.D) || !together({&q, &dout, &out, &lse}))
    return nullptr;
  if (q.on_cpu() && (args.dtype != DType::f32 || args.D % 16 != 0)) return nullptr;
  if (in.drop.lacks_seed()) return nullptr;
  if (!ready_for_backward()) return nullptr;

  const Output dq = empty_like(arguments[0], false), dk = empty_like(arguments[1], false);
  const Output dv = empty_like(arguments[2], false);
  if (!dq.view.dense_last() || !dk.view.dense_last() || !dv.view.dense_last()) return nullptr;
  args.dq = rows(dq.view), args.dk = rows(dk.view), args.dv = rows(dv.view);
  args.out = rows(out), args.dout = rows(dout);
  args.lse = statistics(args, in.packed(), static_cast<float*>(lse.data));
  const int64_t floats = q.on_cpu() ? cpu::backward_scratch(args.D) * omp_get_max_threads() : 2 * (q.count() / args.D);
  const Output working = working_memory(q, arguments[0], floats);
  args.scratch = static_cast<float*>(working.view.data);
  if (q.on_cpu()) {
    const Released released;
    cpu::attention_backward(args);
  } else {
    args.statistics = statistics(args, false, args.scratch, 2);
    backward_on_cuda(q, args);
  }
  return tuple({dq.tensor.get(), dk.tensor.get(), dv.tensor.get()});
}

}  // namespace

void add_attention(PyObject* module) {
  add(module, "attention_direct", &attention, kInputs + 2);
  add(module, "attention_backward_direct", &backward, kInputs + 3);
  add(module, "attention_direct_hopper", &use_hopper, 1);
}

}  // namespace fused::direct
