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

// (logits, targets, label_smoothing, smoothing, z_loss, ignore_index, reduction): as kernels/cross_entropy has them.
PyObject* cross_entropy(PyObject* const* arguments) {
  View logits, targets;
  CrossEntropyForward args{};
  double label_smoothing, z_loss;
  if (!view(arguments[0], logits) || !view(arguments[1], targets) || !number(arguments[2], label_smoothing) ||
      !number(arguments[4], z_loss) || !integer(arguments[5], args.ignore_index))
    return nullptr;
  if (!PyUnicode_CheckExact(arguments[3]) || !PyUnicode_CheckExact(arguments[6]) ||
      !(label_smoothing >= 0.0 && label_smoothing <= 1.0) || !(z_loss >= 0.0))
    return nullptr;
  if (!is(arguments[3], "uniform") && !(is(arguments[3], "others") && label_smoothing == 0.0)) return nullptr;
  const bool mean = is(arguments[6], "mean"), reduced = mean || is(arguments[6], "sum");
  if (!reduced && !is(arguments[6], "none")) return nullptr;
  if (!logits.floating() || logits.ndim < 1 || logits.count() == 0 || !logits.contiguous() || !targets.contiguous() ||
      (targets.element != Element::i32 && targets.element != Element::i64) || targets.ndim != logits.ndim - 1)
    return nullptr;
  for (int axis = 0; axis < targets.ndim; ++axis)
    if (targets.shape[axis] != logits.shape[axis]) return nullptr;
  args.V = logits.last(), args.M = logits.count() / args.V;
  args.target_weight = float(1.0 - label_smoothing), args.every_weight = float(label_smoothing / double(args.V));
  args.z_loss = float(z_loss);
  args.wide_targets = targets.element == Element::i64;
  if (!together({&logits, &targets})) return nullptr;
  int64_t counted = 0;
  if (!logits.on_cpu() && reduced)
    return nullptr;  // the sum is torch's own, and so is the count of what is not ignored
  if (logits.on_cpu() && !(args.wide_targets ? within<int64_t>(targets.data, args, counted)
                                             : within<int32_t>(targets.data, args, counted)))
    return nullptr;
  if (!ready()) return nullptr;

  const bool single = reduced && args.M == 1;  // which is its own sum
  Output losses = empty(arguments[0], targets.shape, single ? 0 : targets.ndim, Element::f32);
  args.logits = logits.data, args.logits_stride = args.V, args.targets = targets.data;
  args.losses = static_cast<float*>(losses.view.data);
  const int64_t statistics = 2 * args.M;
  const Output working = working_memory(logits, arguments[0], statistics);
  args.top = static_cast<float*>(working.view.data), args.log_sum = args.top + args.M;
  args.dtype = logits.dtype();
  run(logits, args, &cpu::cross_entropy_forward, FT_CUDA_KERNEL(cross_entropy_forward));
  if (!reduced) return losses.tensor.release();
  Output total = single ? std::move(losses) : sum(losses.tensor.get());
  // as a float32 tensor is divided by one of whole numbers
  if (mean) *static_cast<float*>(total.view.data) /= float(counted);
  return total.tensor.release();
}

}  // namespace

void add_cross_entropy(PyObject* module) { add(module, "cross_entropy_direct", &cross_entropy, 7); }

}  // namespace fused::direct
