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
// the gradient, and backward() multiplies that gradient by the upstream one (on the CPU not where that is
// 1 and the graph is freed: then the gradient flows on as it is).
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
//     options.cuda_stream = pykd::torch_stream();
//
// and the work is queued there. Where LibTorch's current stream is another one when the loss is
// called, the two wait for each other, and the host for neither. Without a stream ONNX Runtime has one
// of its own: each call then first waits until LibTorch's current stream is done, and returns when the
// result is.
//
// float16. A gradient that is rounded to float16 before the upstream one meets it would underflow,
// however the loss is scaled. So for float16 students forward computes the value alone, and backward()
// runs the loss again with the upstream gradient as its "grad_scale". On a GPU it waits for that
// number. bfloat16 has the range of float32: there the upstream gradient costs a second rounding, of
// one unit of the last place at most.
//
// The parameter {"grad_scale", s} makes the gradients that flow from the loss s times as large, in every
// dtype; the value of the loss is as before.
#ifndef PYKD_TORCH_HPP_
#define PYKD_TORCH_HPP_

#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "pykd/pykd.hpp"
#include "pykd/torch_host.hpp"
#include "pykd/torch_tensors.hpp"

namespace pykd {

// LibTorch's current stream on a CUDA device, for LoadOptions::cuda_stream. For the default stream that
// is cudaStreamLegacy, because 0 says there that no stream is given. Throws Error where LibTorch has
// no CUDA.
inline void* torch_stream(int device = 0) {
  void* stream = internal::current_cuda_stream(device);
  return stream == nullptr ? internal::default_cuda_stream() : stream;
}

// A loaded loss. Immutable; copies share the loss; many threads may call it at once.
class TorchLoss {
 public:
  // `path`: the folder that pykd.export() wrote, or one of its files. Throws Error.
  static TorchLoss load(const std::string& path, const LoadOptions& options = {}) {
    return TorchLoss(Loss::load(path, options), options.cuda_stream);
  }

  // The loss, a scalar of float32 (float64 for float64 inputs), with autograd. `tensors` holds every
  // input of the signature by name, `parameters` those that differ from their default. Throws Error.
  at::Tensor operator()(const TorchTensors& tensors, const Parameters& parameters = {}) const {
    return run_with_autograd(tensors, parameters, {"loss"}).at("loss");
  }

  // The same and, detached, the terms and the per-sample vectors, by name; "loss" has autograd.
  TorchTensors terms(const TorchTensors& tensors, const Parameters& parameters = {}) const {
    return run_with_autograd(tensors, parameters, state()->values);
  }

  // Everything by name and detached: what terms() has, and "grad_<input>" for each input that receives
  // a gradient. For loops that call backward() on the student's output themselves:
  //
  //     auto result = loss.value_and_gradient({{"student_logits", logits}, ...});
  //     logits.backward(result.at("grad_student_logits"));
  TorchTensors value_and_gradient(const TorchTensors& tensors, const Parameters& parameters = {}) const {
    state()->require_gradients();
    std::vector<std::string> names = state()->values;
    names.insert(names.end(), state()->gradients.begin(), state()->gradients.end());
    const at::NoGradGuard no_grad;
    return state()->run(tensors, parameters, names);
  }

  // The loss without LibTorch: its signature, metadata, engine.
  const Loss& loss() const { return state()->loss; }

 private:
  // What all copies of a TorchLoss share.
  struct State {
    State(Loss loaded, void* cuda_stream)
        : loss(std::move(loaded)), on_current_stream(loss.engine() == "torchscript"), stream(cuda_stream) {
      for (const pykd_tensor_info& output : loss.outputs()) {
        (output.has_gradient ? gradients : values).push_back(output.name);
      }
      for (const pykd_tensor_info& input : loss.inputs()) {
        if (input.has_gradient) students.push_back(input.name);
      }
    }

    void require_gradients() const {
      if (students.empty() && values.front() != "loss") internal::no_gradients(false);
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
        in.push_back(internal::torch_view_of(entry.first, entry.second));
        if (entry.second.is_cuda()) device = entry.second.device();
      }
      std::vector<pykd_parameter> settings;
      for (const auto& entry : parameters) settings.push_back({internal::c_text(entry.first), entry.second});

      TorchTensors results;
      for (const std::string& name : names) {
        std::int64_t shape[8];
        std::int32_t rank = 0;
        pykd_dtype dtype;
        internal::check(
            pykd_output_shape(loss.c(), in.data(), in.size(), internal::c_text(name), shape, &rank, &dtype));
        at::Tensor& result = results[name];
        result = internal::torch_new(at::IntArrayRef(shape, static_cast<std::size_t>(rank)), dtype, device);
        out.push_back(internal::torch_view_of(name, result));
      }
      const auto call = [&] {
        internal::check(
            pykd_run(loss.c(), in.data(), in.size(), settings.data(), settings.size(), out.data(), out.size()));
      };
      if (!device.is_cuda() || on_current_stream) {
        call();
      } else if (stream != nullptr) {
        internal::on_stream(device.index(), stream, call);
      } else {
        c10::impl::VirtualGuardImpl(device.type()).getStream(device).synchronize();
        call();
      }
      return results;
    }

    Loss loss;
    bool on_current_stream;              // of LibTorch: the engine sees to that
    void* stream;                        // the one that was given; nullptr: the engine's own, for which it waits
    std::vector<std::string> values;     // outputs that are no gradients, "loss" first where it has one
    std::vector<std::string> gradients;  // "grad_<input>", in the order of `students`
    std::vector<std::string> students;   // the inputs that receive a gradient
  };

  // One call on its way through autograd. It lives as long as the forward pass.
  struct Call {
    const std::shared_ptr<const State>& state;
    const TorchTensors& tensors;
    const Parameters& parameters;
    std::vector<std::string> values;     // asked for
    std::vector<std::string> gradients;  // needed, in the order of the differentiable tensors
    bool halves;                         // one of which is float16
    TorchTensors results;
  };

  // A call with a float16 student on its way to backward().
  struct Later {
    std::shared_ptr<const State> state;
    std::vector<std::string> inputs, gradients;
    Parameters parameters;

    torch::autograd::variable_list run(const torch::autograd::variable_list& tensors,
                                       const at::Tensor& upstream) const {
      if (!internal::torch_is_plain(upstream)) {
        throw Error(PYKD_INVALID_VALUE,
                    "expected one upstream gradient at a time for a float16 student, got a batch of them "
                    "(is_grads_batched, vmap); take them one by one, or give the student as float32");
      }
      TorchTensors given;
      for (std::size_t i = 0; i < inputs.size(); ++i) given[inputs[i]] = tensors[i];
      Parameters scaled = parameters;
      const double factor = upstream.item<double>();
      double& scale = scaled.emplace("grad_scale", 1.0).first->second;
      const bool finite = std::isfinite(factor);  // as every parameter must be
      if (finite) scale *= factor;
      const TorchTensors results = state->run(given, scaled, gradients);
      torch::autograd::variable_list result;
      for (const std::string& name : gradients) {
        result.push_back(finite ? results.at(name) : results.at(name) * upstream);
      }
      return result;
    }
  };

  class Function : public torch::autograd::Function<Function> {
   public:
    static at::Tensor forward(torch::autograd::AutogradContext* context, at::TensorList, Call* call) {
      std::vector<std::string> names = call->values;
      if (!call->halves) names.insert(names.end(), call->gradients.begin(), call->gradients.end());
      call->results = call->state->run(call->tensors, call->parameters, names);
      torch::autograd::variable_list saved;
      if (call->halves) {
        Later later{call->state, {}, call->gradients, call->parameters};
        for (const auto& entry : call->tensors) {
          later.inputs.push_back(entry.first);
          saved.push_back(entry.second);
        }
        internal::TorchKept<Later>::keep(context, std::move(later));
      } else {
        for (const std::string& name : call->gradients) {
          saved.push_back(call->results.at(name));
          call->results.erase(name);
        }
      }
      context->save_for_backward(std::move(saved));
      return call->results.at("loss");
    }

    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                   const torch::autograd::variable_list& upstream) {
      internal::torch_require_first_derivative();
      torch::autograd::variable_list result = context->get_saved_variables();
      c10::intrusive_ptr<torch::CustomClassHolder> holder;
      if (const Later* later = internal::TorchKept<Later>::find(context, &holder)) {
        result = later->run(result, upstream[0]);
      } else {
        for (at::Tensor& gradient : result) gradient = internal::torch_scaled(std::move(gradient), upstream[0]);
      }
      result.emplace_back();  // for the argument `call`
      return result;
    }
  };

  TorchLoss(Loss loss, void* cuda_stream) : state_(std::make_shared<const State>(std::move(loss), cuda_stream)) {}

  TorchTensors run_with_autograd(const TorchTensors& tensors, const Parameters& parameters,
                                 const std::vector<std::string>& values) const {
    Call call{state(), tensors, parameters, values, {}, false, {}};
    std::vector<at::Tensor> differentiable;
    if (at::GradMode::is_enabled()) {
      bool wanted = false;
      for (const auto& entry : tensors) wanted = wanted || (entry.second.defined() && entry.second.requires_grad());
      if (wanted) state()->require_gradients();
      for (std::size_t i = 0; i < state()->students.size(); ++i) {
        const auto found = tensors.find(state()->students[i]);
        if (found == tensors.end() || !found->second.defined() || !found->second.requires_grad()) continue;
        differentiable.push_back(found->second);
        call.gradients.push_back("grad_" + state()->students[i]);
        call.halves = call.halves || found->second.scalar_type() == at::kHalf;
      }
    }
    if (differentiable.empty()) return state()->run(tensors, parameters, values);
    const at::Tensor loss = Function::apply(at::TensorList(differentiable), &call);
    call.results["loss"] = loss;
    return std::move(call.results);
  }

  const std::shared_ptr<const State>& state() const {
    if (state_ == nullptr) {
      throw Error(PYKD_INVALID_VALUE, "expected a loaded loss, got one that was moved from; use the one it moved to");
    }
    return state_;
  }

  std::shared_ptr<const State> state_;
};

}  // namespace pykd

#endif  // PYKD_TORCH_HPP_
