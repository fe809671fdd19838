// Layer norm as a direct call (common/bind_direct.h).

#include "../common/bind_direct.h"
#include "layer_norm.h"

namespace fused::direct {
namespace {

// (x, residual, x_bias, weight, bias, eps, rms, wants_total): as kernels/layer_norm has them. Returns y, or (y, total).
PyObject* layer_norm(PyObject* const* arguments) {
  View x, residual, x_bias, weight, bias;
  double eps;
  if (!view(arguments[0], x) || !view_or_absent(arguments[1], residual) || !view_or_absent(arguments[2], x_bias) ||
      !view_or_absent(arguments[3], weight) || !view_or_absent(arguments[4], bias) || !number(arguments[5], eps))
    return nullptr;
  if (!together({&x, &residual, &x_bias, &weight, &bias})) return nullptr;
  if (!x.floating() || x.ndim < 1 || x.count() == 0 || !x.contiguous() || !(eps >= 0.0)) return nullptr;
  const bool wants_total = arguments[7] == Py_True;
  if (wants_total && !residual.given()) return nullptr;
  if (residual.given() && (residual.element != x.element || !residual.same_shape(x) || !residual.contiguous()))
    return nullptr;
  const int64_t N = x.last();
  Element parameters = Element::other;
  for (const View* p : {&x_bias, &weight, &bias}) {
    if (!p->given()) continue;
    if (!p->floating() || !p->is_vector(N) || (parameters != Element::other && p->element != parameters))
      return nullptr;
    parameters = p->element;
  }
  if (parameters == Element::other) parameters = x.element;
  if (parameters != x.element && parameters != Element::f32) return nullptr;
  if (!ready()) return nullptr;

  Output y = empty_like(arguments[0], true);
  Output total = wants_total ? empty_like(arguments[0], true) : Output{Ref(nullptr), View{}};
  LayerNormForward args{};
  args.x = x.data, args.residual = residual.data, args.x_stride = args.residual_stride = N;
  args.x_bias = x_bias.data, args.weight = weight.data, args.bias = bias.data;
  args.y = y.view.data, args.total = total.view.data;
  args.M = x.count() / N, args.N = N;
  args.eps = float(eps), args.dropout_scale = 1.0f, args.rms = arguments[6] == Py_True;
  args.dtype = x.dtype(), args.param_dtype = static_cast<DType>(parameters);
  run(x, args, &cpu::layer_norm_forward, FT_CUDA_KERNEL(layer_norm_forward));
  if (!wants_total) return y.tensor.release();
  return pair(y, total);
}

}  // namespace

void add_layer_norm(PyObject* module) { add(module, "layer_norm_direct", &layer_norm, 8); }

}  // namespace fused::direct
