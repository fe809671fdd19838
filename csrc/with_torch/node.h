#pragma once
// A node of autograd's graph whose gradients a backward direct call computes (common/bind_direct.h).
//
// A torch.autograd.Function costs a call more than a small kernel does: on a Zen 3 some 10 us forward and as many
// backward, where layer norm of a token takes 1. This node is torch's own C++ class: forward it is one object, and
// backward it hands what was saved to the op's direct call, with Python only where that refuses, and where a second
// derivative is asked for.

#include <Python.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace fused::with_torch {

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using NodePointer = std::decay_t<decltype(std::declval<Node&>().getptr())>;  // torch 2.13 has one of its own

// What Python has raised, taken along to the thread that called backward().
[[noreturn]] inline void throw_python_error() {
  python_error error;
  error.persist();
  throw std::move(error);
}

// An owned reference, to be used with the interpreter's lock.
class Object {
 public:
  explicit Object(PyObject* object) : object_(object) {
    if (object == nullptr) throw_python_error();
  }
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  ~Object() { Py_DECREF(object_); }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

struct Locked {  // the interpreter
  PyGILState_STATE state = PyGILState_Ensure();
  ~Locked() { PyGILState_Release(state); }
};

inline PyObject* wrapped(const Tensor& x) { return x.defined() ? THPVariable_Wrap(x) : Py_NewRef(Py_None); }

inline PyObject* wrapped(const variable_list& tensors) {
  PyObject* all = PyTuple_New(Py_ssize_t(tensors.size()));
  for (size_t i = 0; all != nullptr && i < tensors.size(); ++i) {
    PyObject* one = wrapped(tensors[i]);
    if (one == nullptr)
      Py_CLEAR(all);
    else
      PyTuple_SET_ITEM(all, Py_ssize_t(i), one);
  }
  return all;
}

// A tuple of tensors and None.
inline variable_list unwrapped(PyObject* tuple, size_t count) {
  TORCH_CHECK_TYPE(PyTuple_Check(tuple) && size_t(PyTuple_GET_SIZE(tuple)) >= count, "a tuple of ", count,
                   " tensors is needed");
  variable_list tensors(count);
  for (size_t i = 0; i < count; ++i) {
    PyObject* one = PyTuple_GET_ITEM(tuple, Py_ssize_t(i));
    if (one == Py_None) continue;
    TORCH_CHECK_TYPE(THPVariable_Check(one), "tensors or None are needed, got ", Py_TYPE(one)->tp_name);
    tensors[i] = THPVariable_Unpack(one);
  }
  return tensors;
}

inline variable_list unwrapped(PyObject* tuple) {
  return unwrapped(tuple, PyTuple_Check(tuple) ? PyTuple_GET_SIZE(tuple) : 0);
}

// Where an argument of the backward direct call comes from: the numbered gradient, saved tensor or constant; or the
// tuple that says of each input whether its gradient is needed.
struct Source {
  char from;  // 'g', 's', 'c', 'n'
  int number;
};

// As long as the process lives.
struct Plan {
  std::string name;
  PyObject* direct;  // the backward direct call, with arguments from `sources`: a tensor or a tuple, or None where it
                     // refuses; None itself: there is none
  PyObject* otherwise;  // Python's way, which also knows of second derivatives: (saved, needed, constants, *gradients)
  std::vector<Source> sources;
};

// A tuple, owned by whoever computes gradients with it: a node, and a graph of compiled autograd, which must not keep
// the node itself and with it all that lies behind.
struct Constants {
  PyObject* tuple;
  explicit Constants(PyObject* given) : tuple(Py_NewRef(given)) {}
  Constants(const Constants&) = delete;
  Constants& operator=(const Constants&) = delete;
  ~Constants() {
    if (!Py_IsInitialized()) return;
    const Locked locked;
    Py_DECREF(tuple);
  }
};

class KernelNode : public Node {
 public:
  KernelNode(const Plan* plan, PyObject* constants)
      : plan_(plan), constants_(std::make_shared<const Constants>(constants)) {}

  void save(PyObject* saved, const variable_list& outputs) {
    for (const Tensor& x : unwrapped(saved)) {
      bool is_output = false;
      for (const Tensor& y : outputs) is_output |= x.defined() && x.is_same(y);
      saved_.emplace_back(x, is_output);
    }
  }

  std::string name() const override { return plan_->name; }

  void release_variables() override {
    const std::lock_guard<std::mutex> alone(mutex_);
    for (SavedVariable& x : saved_) x.reset_data();
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override;
  variable_list apply_with_saved(const variable_list& inputs,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override;

 protected:
  variable_list apply(variable_list&& gradients) override {
    if (are_none(gradients)) return variable_list(num_outputs());
    bool hooked = false;
    for (const SavedVariable& x : saved_) hooked |= x.has_hooks();
    std::unique_lock<std::mutex> alone(mutex_, std::defer_lock);
    if (!hooked) alone.lock();  // a hook is Python, which may come here again, or wait for a thread that does
    const variable_list saved = unpacked();
    if (!hooked) alone.unlock();
    return run(*plan_, constants_->tuple, gradients, saved, needed(), at::GradMode::is_enabled());
  }

 private:
  const Plan* plan_;
  std::shared_ptr<const Constants> constants_;
  std::vector<SavedVariable> saved_;

  // As of torch's own nodes: where no gradient comes, none goes on.
  static bool are_none(const variable_list& gradients) {
    bool any = false;
    for (const Tensor& gradient : gradients) any |= gradient.defined();
    return !any;
  }

  variable_list unpacked() {
    variable_list tensors;
    tensors.reserve(saved_.size());
    for (SavedVariable& x : saved_) tensors.push_back(x.unpack(getptr()));
    return tensors;
  }

  std::vector<bool> needed() const {
    std::vector<bool> wanted(num_outputs());
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = task_should_compute_output(i);
    return wanted;
  }

  static variable_list run(const Plan& plan, PyObject* constants, const variable_list& gradients,
                           const variable_list& saved, const std::vector<bool>& wanted, bool twice) {
    if (are_none(gradients)) return variable_list(wanted.size());
    const Locked locked;
    const Object given(wrapped(gradients)), kept(wrapped(saved)), needed(PyTuple_New(Py_ssize_t(wanted.size())));
    for (size_t i = 0; i < wanted.size(); ++i)
      PyTuple_SET_ITEM(needed.get(), Py_ssize_t(i), Py_NewRef(wanted[i] ? Py_True : Py_False));
    if (!twice && plan.direct != Py_None) {
      std::vector<PyObject*> arguments;
      arguments.reserve(plan.sources.size());
      for (const Source& source : plan.sources) {
        PyObject* const tuple = source.from == 'g' ? given.get() : source.from == 's' ? kept.get() : constants;
        arguments.push_back(source.from == 'n' ? needed.get() : PyTuple_GET_ITEM(tuple, source.number));
      }
      const Object results(PyObject_Vectorcall(plan.direct, arguments.data(), arguments.size(), nullptr));
      if (results.get() != Py_None) return outputs(results.get(), wanted.size());
    }
    std::vector<PyObject*> arguments{kept.get(), needed.get(), constants};
    for (size_t i = 0; i < gradients.size(); ++i) arguments.push_back(PyTuple_GET_ITEM(given.get(), Py_ssize_t(i)));
    const Object results(PyObject_Vectorcall(plan.otherwise, arguments.data(), arguments.size(), nullptr));
    return outputs(results.get(), wanted.size());
  }

  // Of what is beyond `count` nobody asked for a gradient; where results are fewer, the last have none.
  static variable_list outputs(PyObject* results, size_t count) {
    if (!PyTuple_Check(results)) {
      const Object one(PyTuple_Pack(1, results));
      return outputs(one.get(), count);
    }
    variable_list tensors = unwrapped(results);
    tensors.resize(count);
    return tensors;
  }
};

// Compiled autograd makes a graph of the nodes, in which this one is a call that is not looked into. What the graph
// depends on, beside tensors, is the plan, the constants and which gradients are needed.
inline void KernelNode::compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const {
  const Locked locked;
  const Object text(PyObject_Repr(constants_->tuple));
  const char* const constants = PyUnicode_AsUTF8(text.get());
  if (constants == nullptr) throw_python_error();
  args.collect(plan_->name + constants);
  args.collect(saved_, true);
}

inline variable_list KernelNode::apply_with_saved(const variable_list& inputs,
                                                  torch::dynamo::autograd::SwapSavedVariables& swap) {
  using torch::dynamo::autograd::IValuePacker;
  swap.before(saved_);
  std::vector<c10::IValue> arguments;
  std::vector<at::TypePtr> types;
  for (const Tensor& x : unpacked()) arguments.emplace_back(x), types.push_back(at::TensorType::get());
  const auto call = [plan = plan_, constants = constants_, wanted = needed()](const variable_list& gradients,
                                                                              const std::vector<c10::IValue>& packed) {
    variable_list saved;
    for (const c10::IValue& x : packed) saved.push_back(x.toTensor());
    return run(*plan, constants->tuple, gradients, saved, wanted, at::GradMode::is_enabled());
  };
  const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
  const std::string name =
      compiler->bind_function(swap.get_py_compiler(), plan_->name, call, types, /*is_custom_function=*/true,
                              /*is_traceable=*/false);
  const auto metadata = IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
      torch::dynamo::autograd::get_input_metadata(next_edges()));
  variable_list results =
      compiler->call_function(swap.get_py_compiler(), "apply_functional", name, inputs, arguments, metadata);
  swap.after(saved_);
  return results;
}

template <class Pointer>
Pointer make_node(const Plan* plan, PyObject* constants, KernelNode*& out) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    out = new KernelNode(plan, constants);
    return Pointer(out, [](auto* node) { deleteNode(node); });  // torch's: no recursion through a long graph
  } else {
    auto node = c10::make_intrusive<KernelNode>(plan, constants);
    out = node.get();
    return node;
  }
}

}  // namespace fused::with_torch
