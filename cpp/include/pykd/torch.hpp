// File: pykd/torch.hpp
//
// pykd for programs that train with LibTorch: a loss that takes and returns at::Tensor and takes part
// in autograd. A header over pykd/pykd.hpp; link pykd::pykd and LibTorch.
//
//     auto loss = pykd::TorchLoss::load("recipe");
//
//     at::Tensor value = loss({{"student_logits", student->forward(images)},
//                              {"teacher_logits", teacher_logits}},
//                             {{"soft_temperature", 4.0}});
//     value.backward();
//     optimizer.step();
//
// It works the same with both engines, TorchScript and ONNX Runtime: one call computes the value and
// the gradient, and backward() multiplies that gradient by the upstream one.
//
// Gradients. They flow to the inputs that the loss's signature gives a gradient (the student's); the
// others are constants, whatever their requires_grad says. Only first derivatives exist: backward()
// with create_graph = true throws. Where grad mode is off (at::NoGradGuard, c10::InferenceMode) or no
// such input requires a gradient, none is computed.
//
// Tensors. Dense and contiguous; all floating ones of a call of the same dtype; on the device that the
// loss was loaded for. Nothing is copied or converted behind your back: what does not fit is an Error
// that says what to do, such as calling .contiguous(). Results are on the device of the loss.
//
// Streams (CUDA). With engine "torchscript" all work is queued on LibTorch's current stream. With
// engine "onnxruntime" give the stream on which you train as LoadOptions::cuda_stream,
//
//     options.cuda_stream = at::cuda::getCurrentCUDAStream().stream();
//
// and the work is queued there. Without it ONNX Runtime has a stream of its own: each call then first
// waits until LibTorch's current stream is done, and returns when the result is.
//
// float16. The gradient of the loss is rounded to float16 before it meets the upstream gradient. To
// scale the loss against underflow, pass the parameter {"grad_scale", s}: the gradients that flow from
// the loss are then s times as large, and the value of the loss is as before.
#ifndef PYKD_TORCH_HPP_
#define PYKD_TORCH_HPP_

#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "pykd/pykd.hpp"

namespace pykd {

using TorchTensors = std::map<std::string, at::Tensor>;  // by input or output name

// A loaded loss. Immutable; copies share the loss; many threads may call it at once.
class TorchLoss {
 public:
  // `path`: the folder that pykd.export() wrote, or one of its files. Throws Error.
  static TorchLoss load(const std::string& path, const LoadOptions& options = {}) {
    return TorchLoss(Loss::load(path, options), options.cuda_stream != nullptr);
  }

  // The loss, a scalar of float32 (float64 for float64 inputs), with autograd. `tensors` holds every
  // input of the signature by name, `parameters` those that differ from their default. Throws Error.
  at::Tensor operator()(const TorchTensors& tensors, const Parameters& parameters = {}) const {
    return run_with_autograd(tensors, parameters, {"loss"}).at("loss");
  }

  // The same and, detached, the terms and the per-sample vectors, by name; "loss" has autograd.
  TorchTensors terms(const TorchTensors& tensors, const Parameters& parameters = {}) const {
    return run_with_autograd(tensors, parameters, state_->values);
  }

  // Everything by name and detached: what terms() has, and "grad_<input>" for each input that receives
  // a gradient. For loops that call backward() on the student's output themselves:
  //
  //     auto result = loss.value_and_gradient({{"student_logits", logits}, ...});
  //     logits.backward(result.at("grad_student_logits"));
  TorchTensors value_and_gradient(const TorchTensors& tensors, const Parameters& parameters = {}) const {
    state_->require_gradients();
    std::vector<std::string> names = state_->values;
    names.insert(names.end(), state_->gradients.begin(), state_->gradients.end());
    const at::NoGradGuard no_grad;
    return state_->run(tensors, parameters, names);
  }

  // The loss without LibTorch: its signature, metadata, engine.
  const Loss& loss() const { return state_->loss; }

 private:
  // What all copies of a TorchLoss share.
  struct State {
    State(Loss loaded, bool on_users_stream) : loss(std::move(loaded)) {
      wait_for_inputs = loss.engine() == "onnxruntime" && !on_users_stream;
      for (const pykd_tensor_info& output : loss.outputs()) {
        (output.has_gradient ? gradients : values).push_back(output.name);
      }
      for (const pykd_tensor_info& input : loss.inputs()) {
        if (input.has_gradient) students.push_back(input.name);
      }
    }

    void require_gradients() const {
      if (students.empty()) {
        throw Error(PYKD_INVALID_VALUE,
                    "expected an artefact with gradients, got one that holds the value alone; load "
                    "loss.grad.onnx, loss.pt or their folder, or call it under at::NoGradGuard");
      }
    }

    // Runs the loss and returns the outputs `names` in new tensors on the device of the inputs.
    TorchTensors run(const TorchTensors& tensors, const Parameters& parameters,
                     const std::vector<std::string>& names) const {
      at::Device device = at::kCPU;
      std::vector<pykd_tensor> in, out;
      in.reserve(tensors.size());
      out.reserve(names.size());
      for (const auto& entry : tensors) {
        in.push_back(view_of(entry.first, entry.second));
        if (entry.second.is_cuda()) device = entry.second.device();
      }
      std::vector<pykd_parameter> settings;
      for (const auto& entry : parameters) settings.push_back({entry.first.c_str(), entry.second});

      TorchTensors results;
      for (const std::string& name : names) {
        std::int64_t shape[8];
        std::int32_t rank = 0;
        pykd_dtype dtype;
        internal::check(pykd_output_shape(loss.c(), in.data(), in.size(), name.c_str(), shape, &rank,
                                          &dtype));
        at::Tensor& result = results[name];
        result = at::empty(at::IntArrayRef(shape, static_cast<std::size_t>(rank)),
                           at::TensorOptions().dtype(scalar_type(dtype)).device(device));
        out.push_back(view_of(name, result));
      }
      if (wait_for_inputs && device.is_cuda()) {
        c10::impl::VirtualGuardImpl(device.type()).getStream(device).synchronize();
      }
      internal::check(pykd_run(loss.c(), in.data(), in.size(), settings.data(), settings.size(),
                               out.data(), out.size()));
      return results;
    }

    Loss loss;
    bool wait_for_inputs = false;
    std::vector<std::string> values;     // outputs that are no gradients, "loss" first
    std::vector<std::string> gradients;  // "grad_<input>", in the order of `students`
    std::vector<std::string> students;   // the inputs that receive a gradient
  };

  // One call on its way through autograd. It lives as long as the forward pass.
  struct Call {
    const State& state;
    const TorchTensors& tensors;
    const Parameters& parameters;
    std::vector<std::string> values;     // asked for
    std::vector<std::string> gradients;  // needed, in the order of the differentiable tensors
    TorchTensors results;
  };

  class Function : public torch::autograd::Function<Function> {
   public:
    static at::Tensor forward(torch::autograd::AutogradContext* context, at::TensorList differentiable,
                              Call* call) {
      std::vector<std::string> names = call->values;
      names.insert(names.end(), call->gradients.begin(), call->gradients.end());
      call->results = call->state.run(call->tensors, call->parameters, names);
      torch::autograd::variable_list gradients;
      for (const std::string& name : call->gradients) {
        gradients.push_back(call->results.at(name));
        call->results.erase(name);
      }
      context->save_for_backward(std::move(gradients));
      return call->results.at("loss");
    }

    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                   const torch::autograd::variable_list& upstream) {
      if (at::GradMode::is_enabled()) {
        throw Error(PYKD_INVALID_VALUE,
                    "expected backward() with create_graph = false, got true; pykd has first "
                    "derivatives only: leave this loss out of what you differentiate twice");
      }
      torch::autograd::variable_list result;
      for (const at::Tensor& gradient : context->get_saved_variables()) {
        result.push_back(gradient * upstream[0]);
      }
      result.emplace_back();  // for the argument `call`
      return result;
    }
  };

  TorchLoss(Loss loss, bool on_users_stream)
      : state_(std::make_shared<const State>(std::move(loss), on_users_stream)) {}

  TorchTensors run_with_autograd(const TorchTensors& tensors, const Parameters& parameters,
                                 const std::vector<std::string>& values) const {
    Call call{*state_, tensors, parameters, values, {}, {}};
    std::vector<at::Tensor> differentiable;
    if (at::GradMode::is_enabled()) {
      bool wanted = false;
      for (const auto& entry : tensors) wanted = wanted || (entry.second.defined() && entry.second.requires_grad());
      if (wanted) state_->require_gradients();
      for (std::size_t i = 0; i < state_->students.size(); ++i) {
        const auto found = tensors.find(state_->students[i]);
        if (found == tensors.end() || !found->second.defined() || !found->second.requires_grad()) continue;
        differentiable.push_back(found->second);
        call.gradients.push_back("grad_" + state_->students[i]);
      }
    }
    if (differentiable.empty()) return state_->run(tensors, parameters, values);
    const at::Tensor loss = Function::apply(at::TensorList(differentiable), &call);
    call.results["loss"] = loss;
    return std::move(call.results);
  }

  static pykd_tensor view_of(const std::string& name, const at::Tensor& tensor) {
    if (!tensor.defined()) {
      throw Error(PYKD_INVALID_VALUE,
                  "expected a tensor for " + name + ", got an undefined at::Tensor; pass one with data");
    }
    if (tensor.layout() != at::kStrided || tensor.is_neg() || tensor.is_conj()) {
      throw Error(PYKD_INVALID_TYPE, "expected a dense tensor for " + name +
                                         ", got a sparse or lazily negated one; call .to_dense() or "
                                         ".resolve_neg() first");
    }
    if (!tensor.is_contiguous()) {
      throw Error(PYKD_INVALID_VALUE, "expected " + name + " contiguous in memory, got strides " +
                                          c10::str(tensor.strides()) + " with shape " +
                                          c10::str(tensor.sizes()) + "; call .contiguous() first");
    }
    if (!tensor.is_cpu() && !tensor.is_cuda()) {
      throw Error(PYKD_INVALID_TYPE, "expected a tensor on the CPU or a CUDA device for " + name + ", got " +
                                         tensor.device().str() + "; copy it over first");
    }
    return {name.c_str(),
            tensor.data_ptr(),
            dtype_of(name, tensor.scalar_type()),
            static_cast<std::int32_t>(tensor.dim()),
            tensor.sizes().data(),
            tensor.strides().data(),
            tensor.is_cuda() ? PYKD_CUDA : PYKD_CPU,
            tensor.is_cuda() ? static_cast<std::int32_t>(tensor.device().index()) : 0};
  }

  static pykd_dtype dtype_of(const std::string& name, at::ScalarType type) {
    switch (type) {
      case at::kHalf:
        return PYKD_FLOAT16;
      case at::kBFloat16:
        return PYKD_BFLOAT16;
      case at::kFloat:
        return PYKD_FLOAT32;
      case at::kDouble:
        return PYKD_FLOAT64;
      case at::kLong:
        return PYKD_INT64;
      default:
        throw Error(PYKD_INVALID_TYPE, "expected float16, bfloat16, float32, float64 or int64 for " + name +
                                           ", got " + c10::toString(type) + "; cast it with .to() first");
    }
  }

  static at::ScalarType scalar_type(pykd_dtype dtype) {
    switch (dtype) {
      case PYKD_FLOAT16:
        return at::kHalf;
      case PYKD_BFLOAT16:
        return at::kBFloat16;
      case PYKD_FLOAT32:
        return at::kFloat;
      case PYKD_FLOAT64:
        return at::kDouble;
      case PYKD_INT64:
        return at::kLong;
    }
    throw Error(PYKD_INTERNAL, "expected one of the values of pykd_dtype, got " +
                                   std::to_string(static_cast<int>(dtype)) +
                                   "; this is a mistake in pykd, please report it");
  }

  std::shared_ptr<const State> state_;
};

}  // namespace pykd

#endif  // PYKD_TORCH_HPP_
