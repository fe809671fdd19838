// Bias and activation as a direct call (common/bind_direct.h).

#include "../common/bind_direct.h"
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

// (x, bias, activation): as kernels/bias_act has them.
PyObject* bias_act(PyObject* const* arguments) {
  View x, bias;
  BiasActForward args{};
  if (!view(arguments[0], x) || !view_or_absent(arguments[1], bias) || !activation(arguments[2], args.activation))
    return nullptr;
  if (!together({&x, &bias})) return nullptr;
  if (!x.floating() || x.ndim < 1 || x.count() == 0 || !x.contiguous()) return nullptr;
  args.N = x.last(), args.M = x.count() / args.N;
  if (bias.given() && (!bias.is_vector(args.N) || (bias.element != x.element && bias.element != Element::f32)))
    return nullptr;
  if (!ready()) return nullptr;

  Output y = empty_like(arguments[0], true);
  args.x = x.data, args.x_stride = args.N, args.bias = bias.data, args.y = y.view.data;
  args.dropout_scale = 1.0f;
  args.dtype = x.dtype(), args.bias_dtype = bias.given() ? bias.dtype() : args.dtype;
  run(x, args, &cpu::bias_act_forward, FT_CUDA_KERNEL(bias_act_forward));
  return y.tensor.release();
}

}  // namespace

void add_bias_act(PyObject* module) { add(module, "bias_act_direct", &bias_act, 3); }

}  // namespace fused::direct
