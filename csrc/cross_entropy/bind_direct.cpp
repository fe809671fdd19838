// Cross entropy as a direct call (common/bind_direct.h).

#include <utility>

#include "../common/bind_direct.h"
#include "cross_entropy.h"

namespace fused::direct {
namespace {

// Whether each target is in the vocabulary or ignored; `counted`: how many are not ignored.
template <class T>
bool within(const void* targets, const CrossEntropyForward& args, int64_t& counted) {
  const T* each = static_cast<const T*>(targets);
  counted = 0;
  for (int64_t i = 0; i < args.M; ++i) {
    if (each[i] == args.ignore_index) continue;
    if (each[i] < 0 || each[i] >= args.V) return false;
    ++counted;
  }
  return true;
}

bool is(PyObject* text, const char* name) { return PyUnicode_CompareWithASCIIString(text, name) == 0; }

// (label_smoothing, smoothing, z_loss, ignore_index): as kernels/cross_entropy has them.
template <class Args>
bool options(PyObject* const* arguments, Args& args) {
  double label_smoothing, z_loss;
  if (!number(arguments[0], label_smoothing) || !number(arguments[2], z_loss) ||
      !integer(arguments[3], args.ignore_index) || !PyUnicode_CheckExact(arguments[1]))
    return false;
  if (!(label_smoothing >= 0.0 && label_smoothing <= 1.0) || !(z_loss >= 0.0)) return false;
  if (!is(arguments[1], "uniform") && !(is(arguments[1], "others") && label_smoothing == 0.0)) return false;
  args.target_weight = float(1.0 - label_smoothing), args.every_weight = float(label_smoothing / double(args.V));
  args.z_loss = float(z_loss);
  return true;
}

// The two tensors' sizes and dtypes.
template <class Args>
bool sizes(const View& logits, const View& targets, Args& args) {
  if (!logits.floating() || logits.ndim < 1 || logits.count() == 0 || !logits.contiguous() || !targets.contiguous() ||
      (targets.element != Element::i32 && targets.element != Element::i64) || targets.ndim != logits.ndim - 1)
    return false;
  for (int axis = 0; axis < targets.ndim; ++axis)
    if (targets.shape[axis] != logits.shape[axis]) return false;
  args.V = logits.last(), args.M = logits.count() / args.V;
  args.logits = logits.data, args.logits_stride = args.V, args.targets = targets.data;
  args.wide_targets = targets.element == Element::i64;
  args.dtype = logits.dtype();
  return true;
}

// (logits, targets, options, reduction, Keep): as kernels/cross_entropy has them. Returns the loss; kept: (loss,
// top, log_sum, counted) for the backward pass: (M,) each, and by what a mean was divided.
PyObject* cross_entropy(PyObject* const* arguments) {
  View logits, targets;
  CrossEntropyForward args{};
  bool differentiated = false;
  if (!view(arguments[0], logits, &differentiated) || !view(arguments[1], targets) || !sizes(logits, targets, args) ||
      !options(arguments + 2, args) || !PyUnicode_CheckExact(arguments[6]))
    return nullptr;
  const bool mean = is(arguments[6], "mean"), reduced = mean || is(arguments[6], "sum");
  if (!reduced && !is(arguments[6], "none")) return nullptr;
  if (!together({&logits, &targets})) return nullptr;
  if (!logits.on_cpu() && reduced)
    return nullptr;  // the sum is torch's own, and so is the count of what is not ignored
  int64_t counted = 0;
  if (logits.on_cpu() && !(args.wide_targets ? within<int64_t>(targets.data, args, counted)
                                             : within<int32_t>(targets.data, args, counted)))
    return nullptr;
  if (!ready()) return nullptr;
  const Keep asked = direct::keep(arguments[7]);
  if (differentiated && asked != Keep::if_wanted) return Py_NewRef(Py_True);

  const bool keep = differentiated || asked == Keep::yes;
  const bool single = reduced && args.M == 1;  // which is its own sum
  Output losses = empty(arguments[0], targets.shape, single ? 0 : targets.ndim, Element::f32);
  args.losses = static_cast<float*>(losses.view.data);
  const Output top = keep ? empty(arguments[0], &args.M, 1, Element::f32) : no_output();
  const Output log_sum = keep ? empty(arguments[0], &args.M, 1, Element::f32) : no_output();
  const Output unkept = keep ? no_output() : working_memory(logits, arguments[0], 2 * args.M);
  args.top = static_cast<float*>(keep ? top.view.data : unkept.view.data);
  args.log_sum = keep ? static_cast<float*>(log_sum.view.data) : args.top + args.M;
  run(logits, args, &cpu::cross_entropy_forward, FT_CUDA_KERNEL(cross_entropy_forward));
  Output loss = single || !reduced ? std::move(losses) : sum(losses.tensor.get());
  // as a float32 tensor is divided by one of whole numbers
  if (mean) *static_cast<float*>(loss.view.data) /= float(counted);
  if (!keep) return loss.tensor.release();
  const Ref count(PyLong_FromLongLong(counted));
  if (count.get() == nullptr) throw PythonError{};
  return (differentiated ? list : tuple)({loss.tensor.get(), top.tensor.get(), log_sum.tensor.get(), count.get()});
}

// (dloss, logits, targets, top, log_sum, options, reduction, counted, into): what the forward pass kept; into: where
// the gradient goes, or None. Returns it.
PyObject* backward(PyObject* const* arguments) {
  View dloss, logits, targets, top, log_sum;
  Ref held(nullptr);
  CrossEntropyBackward args{};
  int64_t counted;
  if (!dense_view(arguments[0], dloss, held) || !view(arguments[1], logits) || !view(arguments[2], targets) ||
      !view(arguments[3], top) || !view(arguments[4], log_sum) || !sizes(logits, targets, args) ||
      !options(arguments + 5, args) || !PyUnicode_CheckExact(arguments[9]) || !integer(arguments[10], counted))
    return nullptr;
  const bool reduced = !is(arguments[9], "none");
  if (!top.is_dense(Element::f32, args.M) || !log_sum.is_dense(Element::f32, args.M)) return nullptr;
  if (dloss.element != Element::f32 || dloss.count() != (reduced ? 1 : args.M) || (reduced && !logits.on_cpu()) ||
      !together({&logits, &dloss, &targets, &top, &log_sum}) || !ready_for_backward())
    return nullptr;

  const bool fresh = arguments[11] == Py_None;
  Output dlogits = fresh ? empty_like(arguments[1], true) : given(arguments[11]);
  if (!dlogits.view.like(logits) || !dlogits.view.contiguous()) return nullptr;
  float of_each = 0.0f;
  args.dlosses = static_cast<const float*>(dloss.data), args.dlosses_stride = 1;
  if (reduced) {
    of_each = *args.dlosses / (is(arguments[9], "mean") ? float(counted) : 1.0f);
    args.dlosses = &of_each, args.dlosses_stride = 0;
  }
  args.top = static_cast<const float*>(top.data), args.log_sum = static_cast<const float*>(log_sum.data);
  args.dlogits = dlogits.view.data, args.dlogits_stride = args.V;
  run(logits, args, &cpu::cross_entropy_backward, FT_CUDA_KERNEL(cross_entropy_backward));
  return dlogits.tensor.release();
}

}  // namespace

void add_cross_entropy(PyObject* module) {
  add(module, "cross_entropy_direct", &cross_entropy, 8);
  add(module, "cross_entropy_backward_direct", &backward, 12);
}

}  // namespace fused::direct
