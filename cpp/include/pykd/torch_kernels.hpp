// File: pykd/torch_kernels.hpp
//
// The fused kernels for programs that train with LibTorch: a loss over at::Tensor with autograd, in
// one pass over memory. Link pykd::pykd and LibTorch (2.10 or newer). pykd/kernels.h describes
// which kernels there are and what they take; the rules of pykd/torch.hpp hold (gradients, tensors,
// errors).
//
//     at::Tensor weight = at::full({batch}, 1.0 / batch);  // a mean: each row weighs 1 / batch
//     at::Tensor loss = pykd::fused_loss("soft_target",
//                                        {{"student", student->forward(images)},
//                                         {"teacher", teacher_logits},
//                                         {"temperature", at::scalar_tensor(4.0)},
//                                         {"soft_weight", weight}},
//                                        {{"form", "kl"}});
//     loss.backward();
//
// The loss is the sum of weight · value over the rows and over the kernel's values for which a
// weight is among the inputs, a float32 scalar; rows of weight 0 count as 0 whatever their value
// is. The kernel computes the gradient together with the value, already weighted. backward()
// multiplies it by the upstream gradient, and on the CPU leaves that out where it is 1 and the
// graph is not kept. For float16 students the kernel runs once more in backward(), with the upstream
// gradient in its weights: a gradient rounded before that would underflow, however the loss is scaled.
//
// The kernels use ATen's threads (at::set_num_threads()) and LibTorch's current CUDA stream.
#ifndef PYKD_TORCH_KERNELS_HPP_
#define PYKD_TORCH_KERNELS_HPP_

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "pykd/kernels.hpp"
#include "pykd/torch_host.hpp"
#include "pykd/torch_tensors.hpp"

namespace pykd {

// A setting of a kernel: a number, or the word of a choice.
class KernelSetting {
 public:
  // NOLINTBEGIN(google-explicit-constructor): so that {{"form", "kl"}} is a KernelSettings.
  template <class Number, class = std::enable_if_t<std::is_arithmetic<Number>::value>>
  KernelSetting(Number number) : number_(static_cast<double>(number)) {}
  KernelSetting(std::string word) : is_word_(true), word_(std::move(word)) {}
  KernelSetting(const char* word) : KernelSetting(std::string(word)) {}
  // NOLINTEND(google-explicit-constructor)

  void give(const std::string& name, KernelCall& call) const {
    if (is_word_) {
      call.attribute(name, word_);
    } else {
      call.attribute(name, number_);
    }
  }

 private:
  bool is_word_ = false;
  double number_ = 0.0;
  std::string word_;
};
using KernelSettings = std::map<std::string, KernelSetting>;

// Runs a kernel and returns the outputs `outputs`, detached, in new tensors on the device of the
// inputs. Throws Error.
inline TorchTensors fused_call(const std::string& kernel_name, const TorchTensors& inputs,
                               const KernelSettings& settings, const std::vector<std::string>& outputs) {
  KernelCall call(kernel(kernel_name));
  at::Device device = at::kCPU;
  for (const auto& entry : inputs) {
    call.input(entry.first, internal::torch_view_of(entry.first, entry.second));
    const KernelArgument* argument = call.description().input(entry.first);
    if (argument != nullptr && argument->role != "number") device = entry.second.device();
  }
  for (const auto& entry : settings) entry.second.give(entry.first, call);

  const at::NoGradGuard no_grad;
  TorchTensors results;
  for (const std::string& output : outputs) {
    const at::Tensor result = internal::torch_new(call.shape_of(output), call.dtype_of(output), device);
    call.output(output, internal::torch_view_of(output, result));
    results[output] = result;
  }
  call.run(internal::torch_host(device.is_cuda() ? device.index() : -1));
  return results;
}

namespace internal {

// One fused_loss() on its way through autograd. It lives as long as the forward pass.
struct FusedLoss {
  const std::string& kernel;
  const TorchTensors& inputs;
  const KernelSettings& settings;
  std::vector<std::pair<std::string, std::string>>
      weighted;                        // values that count, and the inputs that are their weights
  std::vector<std::string> gradients;  // needed, in the order of the differentiable tensors
  bool halves = false;                 // one of which is float16

  // The value, and the gradients where they are wanted.
  at::Tensor run(std::vector<at::Tensor>* computed) const {
    std::vector<std::string> names = computed == nullptr ? std::vector<std::string>() : gradients;
    for (const auto& entry : weighted) names.push_back(entry.first);
    TorchTensors results = fused_call(kernel, inputs, settings, names);
    const at::NoGradGuard no_grad;
    at::Tensor total;
    for (const auto& entry : weighted) {
      const at::Tensor& weight = inputs.at(entry.second);
      const at::Tensor term = (weight * results.at(entry.first)).masked_fill_(weight == 0, 0).sum();
      total = total.defined() ? total + term : term;
    }
    if (computed != nullptr) {
      for (const std::string& name : gradients) computed->push_back(results.at(name));
    }
    return total;
  }
};

// The same for float16 students, on its way to backward().
struct FusedLossOfHalves {
  std::string kernel;
  KernelSettings settings;
  std::vector<std::string> inputs, weights, gradients;

  torch::autograd::variable_list run(const torch::autograd::variable_list& tensors, const at::Tensor& upstream) const {
    const bool plain = torch_is_plain(upstream);
    const KernelDescription& description = pykd::kernel(kernel);
    TorchTensors given;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const bool tensor = description.input(inputs[i])->role == "tensor";
      // Several upstream gradients at once: the gradient in float32 serves them all.
      given[inputs[i]] = tensor && !plain ? tensors[i].to(at::kFloat) : tensors[i];
    }
    for (const std::string& name : weights) {
      if (plain) given[name] = given[name] * upstream;
    }
    const TorchTensors results = fused_call(kernel, given, settings, gradients);
    torch::autograd::variable_list scaled;
    for (const std::string& name : gradients) {
      const at::Tensor& result = results.at(name);
      scaled.push_back(plain ? result : (result * upstream).to(at::kHalf));
    }
    return scaled;
  }
};

class FusedLossFunction : public torch::autograd::Function<FusedLossFunction> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, at::TensorList, const FusedLoss* loss) {
    torch::autograd::variable_list saved;
    if (!loss->halves) {
      at::Tensor total = loss->run(&saved);
      context->save_for_backward(std::move(saved));
      return total;
    }
    FusedLossOfHalves later{loss->kernel, loss->settings, {}, {}, loss->gradients};
    for (const auto& entry : loss->weighted) later.weights.push_back(entry.second);
    for (const auto& entry : loss->inputs) {
      later.inputs.push_back(entry.first);
      saved.push_back(entry.second);
    }
    context->save_for_backward(std::move(saved));
    TorchKept<FusedLossOfHalves>::keep(context, std::move(later));
    return loss->run(nullptr);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& upstream) {
    torch_require_first_derivative();
    torch::autograd::variable_list result = context->get_saved_variables();
    c10::intrusive_ptr<torch::CustomClassHolder> holder;
    if (const FusedLossOfHalves* later = TorchKept<FusedLossOfHalves>::find(context, &holder)) {
      result = later->run(result, upstream[0]);
    } else {
      for (at::Tensor& gradient : result) gradient = torch_scaled(std::move(gradient), upstream[0]);
    }
    result.emplace_back();  // for the argument `loss`
    return result;
  }
};

}  // namespace internal

// The loss, with autograd: see above. Throws Error.
inline at::Tensor fused_loss(const std::string& kernel_name, const TorchTensors& inputs,
                             const KernelSettings& settings = {}) {
  const KernelDescription& description = kernel(kernel_name);
  internal::FusedLoss loss{kernel_name, inputs, settings, {}, {}, false};
  std::string possible;
  for (const KernelArgument& output : description.outputs) {
    const KernelArgument* weight = description.weight_of(output.name);
    if (weight == nullptr) continue;
    possible += (possible.empty() ? "" : ", ") + weight->name;
    const auto found = inputs.find(weight->name);
    if (found != inputs.end()) loss.weighted.emplace_back(output.name, weight->name);
  }
  if (loss.weighted.empty()) {
    throw Error(PYKD_INVALID_VALUE, "expected a weight among the inputs of " + kernel_name + " (" + possible +
                                        "), for the loss is the sum of weight · value, got none; give one for each "
                                        "value that counts");
  }
  std::vector<at::Tensor> differentiable;
  for (const auto& entry : inputs) {
    if (!at::GradMode::is_enabled() || !entry.second.defined() || !entry.second.requires_grad()) continue;
    const KernelArgument* gradient = description.gradient_of(entry.first);
    if (gradient == nullptr) continue;  // a constant
    differentiable.push_back(entry.second);
    loss.gradients.push_back(gradient->name);
    loss.halves = loss.halves || entry.second.scalar_type() == at::kHalf;
  }
  if (differentiable.empty()) return loss.run(nullptr);
  return internal::FusedLossFunction::apply(at::TensorList(differentiable), &loss);
}

}  // namespace pykd

#endif  // PYKD_TORCH_KERNELS_HPP_
