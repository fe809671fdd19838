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

bool is_tokens(const View& x) {
  return (x.element == Element::i32 || x.element == Element::i64) && x.ndim >= 1 && x.count() > 0 && x.contiguous();
}

// (tokens, table, layout or None, tables, scale, start, padding_idx, dropout_p, seed, Keep): as kernels/embedding has
// them; the result is all that is kept.
PyObject* embedding(PyObject* const* arguments) {
  View tokens, table, rows;
  Dropout drop;
  bool differentiated = false;
  EmbeddingForward args{};
  if (!view(arguments[0], tokens) || !view(arguments[1], table, &differentiated) ||
      !integer(arguments[5], args.start) || !dropout(arguments[7], arguments[8], drop))
    return nullptr;
  if (!together({&table, &tokens, &drop.seed})) return nullptr;
  if (!is_tokens(tokens) || !table.floating() || table.ndim != 2 || table.count() == 0 || !table.dense_last())
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
  if (differentiated && (keep(arguments[9]) != Keep::if_wanted || drop.lacks_seed())) return Py_NewRef(Py_True);
  if (drop.lacks_seed()) return nullptr;

  std::vector<int64_t> shape(tokens.shape, tokens.shape + tokens.ndim);
  shape.push_back(args.E);
  Output out = empty(arguments[1], shape.data(), int(shape.size()), Element::other);
  int64_t first_bad = -1;
  args.tokens = tokens.data, args.table = table.data, args.table_stride = table.stride[0];
  args.positions = static_cast<const float*>(rows.data);
  args.out = out.view.data, args.first_bad = &first_bad;
  args.dropout = {drop.data(), drop.threshold(), drop.scale()};
  args.wide_tokens = tokens.element == Element::i64;
  args.dtype = table.dtype();
  run(table, args, &cpu::embedding_forward, FT_CUDA_KERNEL(embedding_forward));
  if (first_bad >= 0) return nullptr;  // the long way says which token is outside the vocabulary
  return differentiated ? list({out.tensor.get()}) : out.tensor.release();
}

// (dout, tokens, vocabulary, scale, padding_idx, dropout_p, seed): tokens have been in the vocabulary in the forward
// pass. Returns dtable. Not on CUDA, where tokens must be sorted first.
PyObject* backward(PyObject* const* arguments) {
  View dout, tokens;
  Dropout drop;
  Ref held(nullptr);
  EmbeddingBackward args{};
  double scale;
  if (!dense_view(arguments[0], dout, held) || !view(arguments[1], tokens) || !integer(arguments[2], args.V) ||
      !number(arguments[3], scale) || !dropout(arguments[5], arguments[6], drop))
    return nullptr;
  args.padding_idx = -1;
  if (arguments[4] != Py_None && !integer(arguments[4], args.padding_idx)) return nullptr;
  if (!dout.on_cpu() || !together({&dout, &tokens, &drop.seed}) || !dout.floating() || !is_tokens(tokens) ||
      dout.ndim != tokens.ndim + 1 || dout.count(tokens.ndim) != tokens.count() || !ready_for_backward())
    return nullptr;

  args.N = tokens.count(), args.E = dout.last();
  const int64_t shape[2] = {args.V, args.E}, numbers = args.N + args.V + 1;
  Output dtable = empty(arguments[0], shape, 2, Element::other);
  const Output order = working_memory(dout, arguments[0], 2 * numbers, kFewFloats);
  args.dout = dout.data, args.dout_stride = args.E, args.tokens = tokens.data;
  args.order = static_cast<int64_t*>(order.view.data), args.ends = args.order + args.N;
  args.dtable = dtable.view.data;
  args.scale = float(scale);
  args.dropout = {drop.data(), drop.threshold(), drop.scale()};
  args.wide_tokens = tokens.element == Element::i64;
  args.dtype = dout.dtype();
  {
    const Released released;
    cpu::embedding_backward(args);
  }
  return dtable.tensor.release();
}

}  // namespace

void add_embedding(PyObject* module) {
  add(module, "embedding_direct", &embedding, 10);
  add(module, "embedding_backward_direct", &backward, 7);
}

}  // namespace fused::direct
