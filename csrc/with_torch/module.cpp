// What is compiled with torch's headers, a module of its own: autograd's nodes for direct calls, and torch's functions
// without Python between. It is good for the release of torch that it was compiled with and for no other, which
// kernels/_node.py looks at before it uses any of it; without it all works by way of Python.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/record_function.h>

#include "../common/bind_torch_functions.h"
#include "node.h"

namespace {

using namespace fused::with_torch;
using fused::TorchFunctions;

bool is_profiled() { return at::hasCallbacks(); }

bool wants_gradient(PyObject* tensor) {
  return at::GradMode::is_enabled() && THPVariable_Unpack(tensor).requires_grad();
}

// A GPU's memory may have to be waited for, and meanwhile the interpreter runs on.
template <class Make>
PyObject* made(const Tensor& like, const Make& make) {
  HANDLE_TH_ERRORS
  if (like.is_cpu()) return THPVariable_Wrap(make());
  Tensor result;
  {
    const pybind11::gil_scoped_release released;
    result = make();
  }
  return THPVariable_Wrap(result);
  END_HANDLE_TH_ERRORS
}

PyObject* empty_like(PyObject* tensor, bool contiguous) {
  const Tensor& x = THPVariable_Unpack(tensor);
  return made(
      x, [&] { return at::empty_like(x, contiguous ? at::MemoryFormat::Contiguous : at::MemoryFormat::Preserve); });
}

PyObject* empty(PyObject* like, const int64_t* shape, int ndim, TorchFunctions::Type type) {
  const Tensor& x = THPVariable_Unpack(like);
  return made(x, [&] {
    auto options = x.options();
    if (type != TorchFunctions::Type::same)
      options = options.dtype(type == TorchFunctions::Type::f32 ? at::kFloat : at::kLong);
    return at::empty(at::IntArrayRef(shape, size_t(ndim)), options);
  });
}

constexpr TorchFunctions functions{is_profiled, wants_gradient, empty_like, empty};

constexpr const char* kPlan = "fused_transformer.plan";

bool parse(const char* text, std::vector<Source>& sources) {
  while (*text != '\0') {
    Source source{*text++, 0};
    if (source.from != 'g' && source.from != 's' && source.from != 'c' && source.from != 'n') return false;
    while (*text >= '0' && *text <= '9') source.number = source.number * 10 + (*text++ - '0');
    while (*text == ' ') ++text;
    sources.push_back(source);
  }
  return true;
}

// (name, direct, otherwise, sources as "g0 s0 s1 c0 n")
PyObject* make_plan(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  const char *name, *sources;
  PyObject *direct, *otherwise;
  if (!PyArg_ParseTuple(arguments, "sOOs", &name, &direct, &otherwise, &sources)) return nullptr;
  auto plan = std::make_unique<Plan>();
  TORCH_CHECK_VALUE(parse(sources, plan->sources), "no plan: ", sources);
  plan->name = name;
  plan->direct = Py_NewRef(direct), plan->otherwise = Py_NewRef(otherwise);
  return PyCapsule_New(plan.release(), kPlan, nullptr);
  END_HANDLE_TH_ERRORS
}

// (plan, outputs, inputs, saved, constants): tuples. From now on each output's gradient goes through a node of this
// plan to the inputs; an output may be among what is saved.
PyObject* attach(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 5 && PyTuple_Check(arguments[4]), "attach takes a plan and four tuples");
  const auto* plan = static_cast<const Plan*>(PyCapsule_GetPointer(arguments[0], kPlan));
  if (plan == nullptr) return nullptr;
  const variable_list outputs = unwrapped(arguments[1]);
  for (const Source& source : plan->sources) {
    const int64_t most = source.from == 'n' ? 1
                                            : PyTuple_GET_SIZE(arguments[source.from == 'g'   ? 1
                                                                         : source.from == 's' ? 3
                                                                                              : 4]);
    TORCH_CHECK_VALUE(source.number < most, plan->name, " has no ", std::string(1, source.from), source.number);
  }
  KernelNode* kernel;
  const NodePointer node = make_node<NodePointer>(plan, arguments[4], kernel);
  node->set_next_edges(torch::autograd::collect_next_edges(unwrapped(arguments[2])));
  for (const Tensor& y : outputs) torch::autograd::set_history(y, node);
  kernel->save(arguments[3], outputs);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

template <class Function>
PyCFunction as_method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"make_plan", make_plan, METH_VARARGS, nullptr},
    {"attach", as_method(attach), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_torch", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__torch() {
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  PyObject* table = PyCapsule_New(const_cast<TorchFunctions*>(&functions), fused::kTorchFunctions, nullptr);
  const bool added = PyModule_AddStringConstant(module, "torch_version", FT_TORCH_VERSION) == 0 &&
                     PyModule_AddObjectRef(module, "functions", table) == 0;
  Py_XDECREF(table);
  if (!added) Py_CLEAR(module);
  return module;
}
