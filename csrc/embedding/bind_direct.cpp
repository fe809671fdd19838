// The embedding as a direct call (common/bind_direct.h).

#include <cmath>
#include <vector>

#include "../common/bind_direct.h"
#include "embedding.h"

namespace fused::direct {
namespace {

// The cached table of positions 0, 1, ... of this layout and width, if it has `rows` rows; see `cached_table` in
// kernels/embedding/positions.py, whose dictionary `tables` is. Held, since another thread may put a larger one there.
Ref positions(PyObject* layout, PyObject* tables, const View& table, int64_t rows, View& out) {
  if (!PyUnicode_CheckExact(layout)) return Ref(nullptr);
  const Ref key(Py_BuildValue("(OLO)", layout, static_cast<long long>(table.shape[1]), device_object(table)));
  PyObject* found = key.get() == nullptr ? nullptr : PyDict_GetItemWithError(tables, key.get());
  PyErr_Clear();
  Py_XINCREF(found);
  Ref held(found);
  if (found == nullptr || !view(found, out) || out.shape[0] < rows || out.device != table.device) return Ref(nullptr);
  return held;
}

// (tokens, table, layout or None, tables, scale, start, padding_idx): as kernels/embedding has them.
PyObject* embedding(PyObject* const* arguments) {
  View tokens, table, rows;
  EmbeddingForward args{};
  if (!view(arguments[0], tokens) || !view(arguments[1], table) || !integer(arguments[5], args.start)) return nullptr;
  if (!together({&table, &tokens})) return nullptr;
  if ((tokens.element != Element::i32 && tokens.element != Element::i64) || tokens.ndim < 1 || tokens.count() == 0 ||
      !tokens.contiguous() || !table.floating() || table.ndim != 2 || table.count() == 0 || !table.dense_last())
    return nullptr;
  args.N = tokens.count(), args.L = tokens.last(), args.V = table.shape[0], args.E = table.shape[1];
  double scale = std::sqrt(double(args.E));
  if (arguments[4] != Py_None && !number(arguments[4], scale)) return nullptr;
  args.scale = float(scale);
  args.padding_idx = -1;
  if (arguments[6] != Py_None) {
    if (!integer(arguments[6], args.padding_idx) || args.padding_idx < -args.V || args.padding_idx >= args.V)
      return nullptr;
    if (args.padding_idx < 0) args.padding_idx += args.V;
  }
  if (args.start < 0 || args.start > int64_t(1) << 40) return nullptr;
  const bool placed = arguments[2] != Py_None;
  const Ref held = placed ? positions(arguments[2], arguments[3], table, args.start + args.L, rows) : Ref(nullptr);
  if (placed ? held.get() == nullptr : args.start != 0) return nullptr;
  if (!ready()) return nullptr;

  std::vector<int64_t> shape(tokens.shape, tokens.shape + tokens.ndim);
  shape.push_back(args.E);
  Output out = empty(arguments[1], shape.data(), int(shape.size()), Element::other);
  int64_t first_bad = -1;
  args.tokens = tokens.data, args.table = table.data, args.table_stride = table.stride[0];
  args.positions = static_cast<const float*>(rows.data);
  args.out = out.view.data, args.first_bad = &first_bad;
  args.dropout = {nullptr, 0, 1.0f};
  args.wide_tokens = tokens.element == Element::i64;
  args.dtype = table.dtype();
  run(table, args, &cpu::embedding_forward, FT_CUDA_KERNEL(embedding_forward));
  return first_bad < 0 ? out.tensor.release() : nullptr;  // the long way says which token is outside the vocabulary
}

}  // namespace

void add_embedding(PyObject* module) { add(module, "embedding_direct", &embedding, 7); }

}  // namespace fused::direct
