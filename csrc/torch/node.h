// Nodes of the autograd graph. Not torch::autograd::Function, whose context of maps, sets and boxed
// values costs a small call more than its kernel does: these hold what the nodes of torch's own
// operations hold, and answer what those are asked.
#pragma once

#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

namespace neuron_ext {

/// What gradients are computed from.
struct BackwardPass {
  const torch::autograd::variable_list& grads;  // by result; undefined where none came
  const torch::autograd::variable_list& saved;  // in the order in which they were saved
  const std::vector<bool>& wanted;              // by input
  const std::vector<c10::SymInt>& sizes;        // the node's
  const torch::autograd::edge_list& inputs;     // their places in the graph; none in a compiler
};

/// `Operation` has a name, kName, and gradients(const BackwardPass&): one for each input, undefined
/// where none is wanted.
///
/// Made by make_node, then add_input for each, save_if, set_results, save_result_if and finish, in
/// this order. Undefined tensors may be given everywhere and keep their numbers.
template <class Operation>
class OperationNode final : public torch::autograd::Node {
 public:
  using Variables = torch::autograd::variable_list;

  std::vector<c10::SymInt> sizes;  // what the gradients depend on beside tensors

  /// No operation saves many more tensors than it has inputs.
  explicit OperationNode(size_t inputs) {
    next_edges_.reserve(inputs);
    saved_.reserve(inputs);
  }

  void add_input(const at::Tensor& t) {
    add_next_edge(t.defined() ? torch::autograd::impl::gradient_edge(t) : torch::autograd::Edge());
  }

  /// Keeps t, or an undefined tensor in its place.
  void save_if(bool condition, const at::Tensor& t) { save(condition, t, /*is_output=*/false); }

  /// New tensors, which nothing else knows yet.
  template <class... Tensors>
  void set_results(const Tensors&... results) {
    const auto self = getptr();
    (torch::autograd::set_history(results, self), ...);
  }

  void save_result_if(bool condition, const at::Tensor& t) {
    save(condition, t, /*is_output=*/true);
  }

  void finish() { tell_creation_hooks(getptr()); }

  std::string name() const override { return Operation::kName; }

  void release_variables() override {
    const std::lock_guard lock(mutex_);
    for (auto& saved : saved_) saved.reset_data();
  }

  // Compiled autograd asks for what tells this node from others, and for its work as a function of
  // packed arguments.

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(c10::ArrayRef<torch::autograd::SavedVariable>(saved_), /*is_output=*/true);
    args.collect(sizes);
  }

  Variables apply_with_saved(const Variables& grads,
                             torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using Metadata = std::vector<std::optional<torch::autograd::InputMetadata>>;
    swap.before(saved_);
    swap.before(sizes);
    torch::dynamo::autograd::PackedArgs packed;
    packed.pack(unpack());
    packed.pack(wanted());
    packed.pack(sizes);
    std::vector<at::TypePtr> types;
    for (const at::IValue& argument : packed.vec()) types.push_back(argument.type());
    const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
    const std::string function =
        compiler->bind_function(swap.get_py_compiler(), name(), apply_packed, types,
                                /*is_custom_function=*/true, /*is_traceable=*/true);
    Variables result = compiler->call_function(
        swap.get_py_compiler(), "apply_functional", function, grads, packed.vec(),
        torch::dynamo::autograd::IValuePacker<Metadata>::pack(
            torch::dynamo::autograd::get_input_metadata(next_edges())));
    swap.after(saved_);
    swap.after(sizes);
    return result;
  }

 private:
  void save(bool condition, const at::Tensor& t, bool is_output) {
    if (condition) {
      saved_.emplace_back(t, is_output);
    } else {
      saved_.emplace_back();
    }
  }

  Variables apply(Variables&& grads) override {
    const std::lock_guard lock(mutex_);
    return Operation::gradients({grads, unpack(), wanted(), sizes, next_edges()});
  }

  static Variables apply_packed(const Variables& grads, const std::vector<at::IValue>& arguments) {
    torch::dynamo::autograd::PackedArgs packed(arguments);
    const auto saved = packed.unpack<Variables>();
    const auto wanted = packed.unpack<std::vector<bool>>();
    const auto sizes = packed.unpack<std::vector<c10::SymInt>>();
    return Operation::gradients({grads, saved, wanted, sizes, {}});
  }

  Variables unpack() {
    Variables tensors;
    tensors.reserve(saved_.size());
    for (const auto& saved : saved_) tensors.push_back(saved.unpack(getptr()));
    return tensors;
  }

  std::vector<bool> wanted() const {
    std::vector<bool> wanted(num_outputs());
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = task_should_compute_output(i);
    return wanted;
  }

  /// torch has these hooks since 2.14.
  template <class Owner>
  static void tell_creation_hooks(const Owner& node) {
    if constexpr (requires { fire_node_creation_hooks(node); }) fire_node_creation_hooks(node);
  }

  c10::SmallVector<torch::autograd::SavedVariable, 4> saved_;
};

/// `inputs`: how many there will be. (torch 2.13 changed how nodes are owned.)
template <class Operation>
auto make_node(size_t inputs) {
  using Node = OperationNode<Operation>;
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Node>) {
    return c10::make_intrusive<Node>(inputs);
  } else {
    return std::shared_ptr<Node>(new Node(inputs), [](auto* node) { deleteNode(node); });
  }
}

}  // namespace neuron_ext
