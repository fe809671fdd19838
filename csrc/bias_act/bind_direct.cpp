// Bias and activation as a direct call (common/bind_direct.h).

#include "../common/bind_direct.h"
#include "../common/row_parts.h"
#include "bias_act.h"

namespace fused::direct {
namespace {

bool activation(PyObject* argument, Activation& out) {
  if (!PyUnicode_CheckExact(argument)) return false;
  const char* names[] = {"relu", "gelu", "gelu_tanh"};  // in the order of Activation
  for (int i = 0; i < 3; ++i) {
    if (PyUnicode_CompareWithASCIIString(argument, names[i]) != 0) continue;
    out = static_cast<Activation>(i);
    return true;
  }
  return false;
}

bool fits(const View& bias, const View& x) {
  return bias.is_vector(x.last()) && (bias.element == x.element || bias.element == Element::f32);
}

bool is_rows(const View& x) { return x.floating() && x.ndim >= 1 && x.count() > 0 && x.contiguous(); }

// (x, bias, seed, activation, dropout_p, Keep): as kernels/bias_act has them; y is all that is kept.
PyObject* bias_act(PyObject* const* arguments) {
  View x, bias;
  Dropout drop;
  bool differentiated = false;
  BiasActForward args{};
  if (!view(arguments[0], x, &differentiated) || !view_or_absent(arguments[1], bias, &differentiated) ||
      !activation(arguments[3], args.activation) || !dropout(arguments[4], arguments[2], drop))
    return nullptr;
  if (!together({&x, &bias, &drop.seed}) || !is_rows(x) || (bias.given() && !fits(bias, x)) || !ready()) return nullptr;
  if (differentiated && (keep(arguments[5]) != Keep::if_wanted || drop.lacks_seed())) return Py_NewRef(Py_True);
  if (drop.lacks_seed()) return nullptr;

  Output y = empty_like(arguments[0], true);
  args.N = x.last(), args.M = x.count() / args.N;
  args.x = x.data, args.x_stride = args.N, args.bias = bias.data, args.seed = drop.data(), args.y = y.view.data;
  args.dropout_threshold = drop.threshold(), args.dropout_scale = drop.scale();
  args.dtype = x.dtype(), args.bias_dtype = bias.given() ? bias.dtype() : args.dtype;
  run(x, args, &cpu::bias_act_forward, FT_CUDA_KERNEL(bias_act_forward));
  return differentiated ? list({y.tensor.get()}) : y.tensor.release();
}

// (dy, saved, bias, seed, activation, dropout_p, wanted): what the forward pass saved, y of ReLU and else x; and
// whether (dx, dbias) are wanted. Returns both, None for what is not; dbias is float32.
PyObject* backward(PyObject* const* arguments) {
  View dy, saved, bias;
  Dropout drop;
  Ref held(nullptr);
  BiasActBackward args{};
  if (!dense_view(arguments[0], dy, held) || !view(arguments[1], saved) || !view_or_absent(arguments[2], bias) ||
      !activation(arguments[4], args.activation) || !dropout(arguments[5], arguments[3], drop))
    return nullptr;
  if (!together({&saved, &dy, &bias, &drop.seed}) || !is_rows(saved) || !dy.like(saved) ||
      (bias.given() && !fits(bias, saved)) || !PyTuple_CheckExact(arguments[6]) || PyTuple_GET_SIZE(arguments[6]) < 2 ||
      !ready_for_backward())
    return nullptr;

  const int64_t N = saved.last(), M = saved.count() / N;
  Output dx = no_output(), dbias = no_output(), partial = no_output();
  if (PyTuple_GET_ITEM(arguments[6], 0) == Py_True) dx = empty_like(arguments[1], true);
  args.parts = saved.on_cpu() ? cpu::row_parts(M)
                              : cuda::bias_act_backward_parts(M, N, saved.element == Element::f32 ? 4 : 2,
                                                              device_of(saved).multiprocessors);
  if (PyTuple_GET_ITEM(arguments[6], 1) == Py_True) {
    dbias = empty(arguments[1], &N, 1, Element::f32);
    partial = working_memory(saved, arguments[1], args.parts * N, kFewFloats);
  }
  args.dy = dy.data, args.saved = saved.data, args.dy_stride = args.saved_stride = N;
  args.bias = bias.data, args.seed = drop.data();
  args.dx = dx.view.data, args.dbias = static_cast<float*>(dbias.view.data);
  args.partial = static_cast<float*>(partial.view.data);
  args.M = M, args.N = N;
  // ReLU's mask is in y, its scale is not
  args.dropout_threshold = args.seed == nullptr ? 0 : drop.threshold(), args.dropout_scale = drop.scale();
  args.dtype = saved.dtype(), args.bias_dtype = bias.given() ? bias.dtype() : args.dtype;
  run(saved, args, &cpu::bias_act_backward, FT_CUDA_KERNEL(bias_act_backward));
  return tuple({dx.tensor.get(), dbias.tensor.get()});
}

}  // namespace

void add_bias_act(PyObject* module) {
  add(module, "bias_act_direct", &bias_act, 6);
  add(module, "bias_act_backward_direct", &backward, 7);
}

}  // namespace fused::direct
