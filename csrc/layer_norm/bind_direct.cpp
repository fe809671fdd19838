// Layer norm as a direct call (common/bind_direct.h).

#include "../common/bind_direct.h"
#include "../common/row_parts.h"
#include "layer_norm.h"

namespace fused::direct {
namespace {

bool is_parameter(const View& p, const View& x) { return p.floating() && p.is_vector(x.last()); }

// (x, residual, x_bias, weight, bias, seed, eps, dropout_p, rms, wants_total, Keep): as kernels/layer_norm has them.
// Returns y, or (y, total) where the total is wanted. Kept: (y, total, mean, rstd) for the backward pass, None for a
// total that is x itself and for RMS norm's mean.
PyObject* layer_norm(PyObject* const* arguments) {
  View x, residual, x_bias, weight, bias;
  Dropout drop;
  double eps;
  bool differentiated = false;
  if (!view(arguments[0], x, &differentiated) || !view_or_absent(arguments[1], residual, &differentiated) ||
      !view_or_absent(arguments[2], x_bias, &differentiated) ||
      !view_or_absent(arguments[3], weight, &differentiated) || !view_or_absent(arguments[4], bias, &differentiated) ||
      !dropout(arguments[7], arguments[5], drop) || !number(arguments[6], eps))
    return nullptr;
  if (!together({&x, &residual, &x_bias, &weight, &bias, &drop.seed})) return nullptr;
  if (!x.floating() || x.ndim < 1 || x.count() == 0 || !x.contiguous() || !(eps >= 0.0)) return nullptr;
  const bool wants_total = arguments[9] == Py_True;
  if (wants_total && !residual.given()) return nullptr;
  if (residual.given() && (!residual.like(x) || !residual.contiguous())) return nullptr;
  Element parameters = Element::other;
  for (const View* p : {&x_bias, &weight, &bias}) {
    if (!p->given()) continue;
    if (!is_parameter(*p, x) || (parameters != Element::other && p->element != parameters)) return nullptr;
    parameters = p->element;
  }
  if (parameters == Element::other) parameters = x.element;
  if (parameters != x.element && parameters != Element::f32) return nullptr;
  // on a GPU autocast takes 16-bit tensors as float32
  const bool wide = x.element == Element::f32 && parameters == Element::f32;
  if (!ready() || !(wide || x.on_cpu() || no_autocast())) return nullptr;
  const Keep asked = direct::keep(arguments[10]);
  if (differentiated && (asked != Keep::if_wanted || drop.lacks_seed())) return Py_NewRef(Py_True);
  if (drop.lacks_seed()) return nullptr;

  const bool keep = differentiated || asked == Keep::yes;
  const bool rms = arguments[8] == Py_True;
  const bool is_sum = residual.given() || x_bias.given() || drop.p > 0.0;
  const Output y = empty_like(arguments[0], true);
  Output total = no_output(), mean = no_output(), rstd = no_output();
  if (wants_total || (keep && is_sum)) total = empty_like(arguments[0], true);
  if (keep && !rms) mean = empty(arguments[0], x.shape, x.ndim - 1, Element::f32);
  if (keep) rstd = empty(arguments[0], x.shape, x.ndim - 1, Element::f32);
  LayerNormForward args{};
  args.x = x.data, args.residual = residual.data, args.x_stride = args.residual_stride = x.last();
  args.x_bias = x_bias.data, args.weight = weight.data, args.bias = bias.data, args.seed = drop.data();
  args.y = y.view.data, args.total = total.view.data;
  args.mean = static_cast<float*>(mean.view.data), args.rstd = static_cast<float*>(rstd.view.data);
  args.M = x.count() / x.last(), args.N = x.last();
  args.eps = float(eps), args.dropout_threshold = drop.threshold(), args.dropout_scale = drop.scale(), args.rms = rms;
  args.dtype = x.dtype(), args.param_dtype = static_cast<DType>(parameters);
  run(x, args, &cpu::layer_norm_forward, FT_CUDA_KERNEL(layer_norm_forward));
  if (keep)
    return (differentiated ? list : tuple)({y.tensor.get(), total.tensor.get(), mean.tensor.get(), rstd.tensor.get()});
  return wants_total ? tuple({y.tensor.get(), total.tensor.get()}) : Py_NewRef(y.tensor.get());
}

// (dy, dtotal, total, weight, mean, rstd, seed, dropout_p, rms, wide, wanted): what the forward pass kept; `wide`,
// whether its parameters are float32; and which of (dx, dresidual, dx_bias, dweight, dbias) are wanted. Returns those
// five, None where one is not wanted, or has no cause.
PyObject* backward(PyObject* const* arguments) {
  View dy, dtotal, total, weight, mean, rstd;
  Dropout drop;
  Ref dy_held(nullptr), dtotal_held(nullptr);
  if (!view(arguments[2], total) || !view_or_absent(arguments[3], weight) || !view_or_absent(arguments[4], mean) ||
      !view(arguments[5], rstd) || !dropout(arguments[7], arguments[6], drop))
    return nullptr;
  if (arguments[0] != Py_None && (!dense_view(arguments[0], dy, dy_held) || !dy.like(total))) return nullptr;
  if (arguments[1] != Py_None && (!dense_view(arguments[1], dtotal, dtotal_held) || !dtotal.like(total)))
    return nullptr;
  if (!together({&total, &dy, &dtotal, &weight, &mean, &rstd, &drop.seed}) || !total.contiguous()) return nullptr;
  if (!PyTuple_CheckExact(arguments[10]) || PyTuple_GET_SIZE(arguments[10]) < 5) return nullptr;
  bool wanted[5];
  for (int i = 0; i < 5; ++i) wanted[i] = PyTuple_GET_ITEM(arguments[10], i) == Py_True;
  if (!dy.given()) wanted[3] = wanted[4] = false;
  const Element parameters = arguments[9] == Py_True ? Element::f32 : total.element;
  if (weight.given() && (!is_parameter(weight, total) || weight.element != parameters)) return nullptr;
  const int64_t N = total.last(), M = total.count() / N;
  const bool rms = arguments[8] == Py_True;
  if (!rstd.is_dense(Element::f32, M) || (rms ? mean.given() : !mean.is_dense(Element::f32, M))) return nullptr;
  if (!ready_for_backward()) return nullptr;

  LayerNormBackward args{};
  args.dy = dy.data, args.dtotal = dtotal.data, args.total = total.data;
  args.dy_stride = args.dtotal_stride = args.total_stride = N;
  args.weight = weight.data, args.seed = drop.data();
  args.rms = rms;
  args.mean = static_cast<const float*>(mean.data), args.rstd = static_cast<const float*>(rstd.data);
  Output dx = no_output(), dresidual = no_output();
  Output sums[3] = {no_output(), no_output(), no_output()};
  if (wanted[0]) dx = empty_like(arguments[2], true);
  // where nothing was dropped the two gradients are one tensor
  const bool one = wanted[0] && wanted[1] && drop.p == 0.0;
  if (wanted[1] && !one) dresidual = empty_like(arguments[2], true);
  args.dx = dx.view.data, args.dresidual = dresidual.view.data;
  args.parts =
      total.on_cpu() ? cpu::row_parts(M) : cuda::layer_norm_backward_parts(M, N, device_of(total).multiprocessors);
  void** const results[3] = {&args.dx_bias, &args.dweight, &args.dbias};
  float** const partials[3] = {&args.partial_dx_bias, &args.partial_dweight, &args.partial_dbias};
  int count = 0;
  for (int i = 0; i < 3; ++i) {
    if (!wanted[2 + i]) continue;
    ++count;
    sums[i] = weight.given() ? empty_like(arguments[3], true)  // in half the time
                             : empty(arguments[2], &N, 1, parameters == total.element ? Element::other : Element::f32);
    *results[i] = sums[i].view.data;
  }
  const Output memory =
      count > 0 ? working_memory(total, arguments[2], count * args.parts * N, kFewFloats) : no_output();
  float* next = static_cast<float*>(memory.view.data);
  for (int i = 0; i < 3; ++i)
    if (wanted[2 + i]) *partials[i] = next, next += args.parts * N;
  args.M = M, args.N = N;
  args.dropout_threshold = drop.threshold(), args.dropout_scale = drop.scale();
  args.dtype = total.dtype(), args.param_dtype = static_cast<DType>(parameters);
  run(total, args, &cpu::layer_norm_backward, FT_CUDA_KERNEL(layer_norm_backward));
  PyObject* of_residual = one ? dx.tensor.get() : dresidual.tensor.get();
  return tuple({dx.tensor.get(), of_residual, sums[0].tensor.get(), sums[1].tensor.get(), sums[2].tensor.get()});
}

}  // namespace

void add_layer_norm(PyObject* module) {
  add(module, "layer_norm_direct", &layer_norm, 11);
  add(module, "layer_norm_backward_direct", &backward, 11);
}

}  // namespace fused::direct
