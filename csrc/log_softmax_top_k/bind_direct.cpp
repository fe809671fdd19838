// Log-softmax and top-k as a direct call (common/bind_direct.h).

#include "../common/bind_direct.h"
#include "log_softmax_top_k.h"

namespace fused::direct {
namespace {

int64_t parts(const View& logits, int64_t V) {
#ifdef FUSED_WITH_CUDA
  if (!logits.on_cpu()) return cuda::log_softmax_top_k_parts(V);
#endif
  (void)logits, (void)V;
  return 1;
}

// (logits, k, beams, addend): as kernels/log_softmax_top_k has them. Returns (values, places).
PyObject* log_softmax_top_k(PyObject* const* arguments) {
  View logits, addend;
  LogSoftmaxTopK args{};
  if (!view(arguments[0], logits) || !integer(arguments[1], args.k) || !integer(arguments[2], args.beams) ||
      !view_or_absent(arguments[3], addend))
    return nullptr;
  if (!logits.floating() || logits.ndim != 2 || logits.count() == 0 || !logits.dense_last()) return nullptr;
  args.M = logits.shape[0], args.V = logits.shape[1];
  if (args.beams < 1 || args.beams > kMostBeams || args.M % args.beams != 0 || args.k < 1 || args.k > kMostKept ||
      args.k > args.beams * args.V || args.V >= int64_t(1) << 31)
    return nullptr;
  if (!together({&logits, &addend})) return nullptr;
  if (addend.given() && (addend.element != Element::f32 || !addend.is_vector(args.M))) return nullptr;
  if (!ready()) return nullptr;

  const int64_t shape[2] = {args.M / args.beams, args.k};
  Output values = empty(arguments[0], shape, 2, Element::f32), places = empty(arguments[0], shape, 2, Element::i64);
  args.dtype = logits.dtype();
  args.x = logits.data, args.x_stride = logits.stride[0];
  args.addend = static_cast<const float*>(addend.data);
  args.values = static_cast<float*>(values.view.data), args.places = static_cast<int64_t*>(places.view.data);
  const int64_t rows = args.M * parts(logits, args.V);
  const Output working = working_memory(logits, arguments[0], rows * (2 + 2 * args.k));
  args.sums = static_cast<float*>(working.view.data);
  args.kept = reinterpret_cast<int32_t*>(args.sums + 2 * rows);
  run(logits, args, &cpu::log_softmax_top_k, FT_CUDA_KERNEL(log_softmax_top_k));
  return tuple({values.tensor.get(), places.tensor.get()});
}

}  // namespace

void add_log_softmax_top_k(PyObject* module) { add(module, "log_softmax_top_k_direct", &log_softmax_top_k, 4); }

}  // namespace fused::direct
