// File: engine_torchscript.cpp
//
// The TorchScript engine: libpykd_torch.so, which libpykd opens on demand. The library exports the
// two functions of engine.h and nothing else.
//
// What is promised here and how it is kept:
//
//  - The same numbers on every call. TorchScript's profiling executor rewrites the graph on its
//    second and third call, and has given wrong gradients from then on when shapes changed
//    (pytorch#108670, #65480). Each run therefore switches it off for its own thread, and the graph is
//    interpreted operator by operator, with the autograd of eager PyTorch.
//  - The caller's thread is left as it was: grad mode, inference mode, autocast, current device and
//    executor mode are set for the run and restored after it. Autocast is off in a run: the dtype of
//    the computation follows from the dtype of the inputs alone.
//  - Inputs are views of the caller's memory. Outputs are computed first and copied to the caller's
//    memory at the end, when nothing can fail any more: one copy of each output.
//  - CUDA work is queued on LibTorch's current stream of the device. Nothing here waits for it; a copy
//    of a scalar to the CPU does, as any such copy.
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/jit/frontend/error_report.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/cuda.h>
#include <torch/script.h>
#include <torch/version.h>

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <caffe2/serialize/in_memory_adapter.h>
#include <caffe2/serialize/inline_container.h>

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <new>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/error.h"
#include "pykd/torch_tensors.hpp"
#include "runtime/engines/engine.h"
#include "runtime/signature/signature.h"

// A LibTorch older than this function lacks it; then the address is null.
extern "C" __attribute__((weak)) uint64_t aoti_torch_abi_version();

namespace pykd::internal {
namespace {

constexpr char kMetadataFile[] = "pykd.json";

// ---- Versions ------------------------------------------------------------------------------------

std::string version_text(std::uint64_t abi_version, int parts) {
  std::string text;
  for (int part = 0; part < parts; ++part) {
    if (part > 0) text += '.';
    text += std::to_string((abi_version >> (56 - 8 * part)) & 0xff);
  }
  return text;
}

std::uint64_t running_version() { return aoti_torch_abi_version == nullptr ? 0 : aoti_torch_abi_version(); }

// ---- Exceptions of LibTorch ----------------------------------------------------------------------

// What has been written into a report. Its what() adds the place in the source, which it reads from the file as late as
// then: in a damaged one that throws, out of a function that must not, and the process ends.
struct ReportText {
  std::string* text;
};
std::ostream& operator<<(std::ostream& report, const ReportText& wanted) {
  if (const auto* stream = dynamic_cast<std::stringstream*>(&report)) *wanted.text = stream->str();
  return report;
}
std::string text_of(const torch::jit::ErrorReport& report) {
  std::string text;
  report << ReportText{&text};
  return text;
}

// Whether this is a child of fork() in which nothing has run yet.
std::atomic<bool> forked{false};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

// Calls `body`; hands what LibTorch throws to `refuse(text)`, which throws a Failure. No exception of LibTorch's own
// may reach libpykd, which would ask for its what().
template <class Body, class Refuse>
auto in_torch(const Body& body, const Refuse& refuse) -> decltype(body()) {
  std::string text;
  // A child of fork() has none of LibTorch's threads, and would wait for them: it computes alone.
  if (forked.exchange(false, std::memory_order_relaxed)) at::set_num_threads(1);
  try {
    return body();
  } catch (const Failure&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const torch::jit::ErrorReport& report) {
    text = text_of(report);
  } catch (const c10::Error& error) {
    text = error.what_without_backtrace();
  } catch (const std::exception& error) {
    text = error.what();
  } catch (...) {
    text = "an exception of unknown type";
  }
  if (tells_of_memory(text)) throw std::bad_alloc();
  refuse(text);
  __builtin_unreachable();
}

// ---- Thread state --------------------------------------------------------------------------------

class AutocastOff {
 public:
  explicit AutocastOff(at::DeviceType type) : type_(type), was_(at::autocast::is_autocast_enabled(type)) {
    if (was_) at::autocast::set_autocast_enabled(type_, false);
  }
  ~AutocastOff() {
    if (was_) at::autocast::set_autocast_enabled(type_, true);
  }
  AutocastOff(const AutocastOff&) = delete;
  AutocastOff& operator=(const AutocastOff&) = delete;

 private:
  at::DeviceType type_;
  bool was_;
};

// ---- Tensors ------------------------------------------------------------------------------------

c10::Device torch_device(pykd_device kind, int id) {
  return kind == PYKD_CUDA ? c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(id)) : c10::Device(c10::kCPU);
}

at::Tensor view_of(const pykd_tensor& tensor) {
  const c10::Device device = torch_device(tensor.device, tensor.device_id);
  return at::for_blob(tensor.data, at::IntArrayRef(tensor.shape, static_cast<std::size_t>(tensor.rank)))
      .options(at::TensorOptions().dtype(torch_scalar_type(tensor.dtype)).device(device))
      .target_device(device)
      .make_tensor();
}

std::string text_of(const at::Tensor& tensor) {
  std::string text = std::string(c10::toString(tensor.scalar_type())) + " [";
  for (std::int64_t axis = 0; axis < tensor.dim(); ++axis) {
    text += (axis == 0 ? "" : ", ") + std::to_string(tensor.size(axis));
  }
  return text + "]";
}

// ---- Session -------------------------------------------------------------------------------------

using Values = c10::Dict<std::string, at::Tensor>;

class TorchScriptSession final : public Session {
 public:
  TorchScriptSession(const torch::jit::Module& module, const Signature& signature, Device device)
      : signature_(signature), device_(torch_device(device.kind, device.id)), forward_(module.get_method("forward")) {
    bind_arguments();
  }

  void run(const Request& request) const override {
    in_torch([&] { run_unwrapped(request); },
             [](const std::string& text) { throw Failure(PYKD_ENGINE_FAILURE, "TorchScript: " + text); });
  }

 private:
  enum class ArgumentKind { kInput, kParameter, kFixed };
  struct Argument {
    ArgumentKind kind;
    std::size_t index;  // in the signature's list of that kind
  };

  // Finds out, once, which input or parameter each argument of the module is.
  void bind_arguments() {
    const auto& declared = forward_.function().getSchema().arguments();
    for (std::size_t i = 1; i < declared.size(); ++i) {  // the first is the module itself
      const std::string& name = declared[i].name();
      const auto type = declared[i].type();
      const std::size_t input = index_of(signature_.inputs, name);
      const std::size_t parameter = index_of(signature_.parameters, name);
      const std::size_t fixed = index_of(signature_.fixed, name);
      if (input != kNone && type->kind() == c10::TypeKind::TensorType) {
        arguments_.push_back({ArgumentKind::kInput, input});
      } else if (parameter != kNone && type->kind() == c10::TypeKind::FloatType) {
        arguments_.push_back({ArgumentKind::kParameter, parameter});
      } else if (fixed != kNone && type->kind() == c10::TypeKind::FloatType) {
        arguments_.push_back({ArgumentKind::kFixed, fixed});
      } else {
        fail(PYKD_BAD_ARTEFACT,
             "a module whose arguments are the inputs (Tensor) and parameters (float) of its metadata",
             "the argument " + in_quotes(name) + " of type " + type->str(), "export the loss again");
      }
    }
    const bool has_scale = signature_.grad_scale != kNone || index_of(signature_.fixed, "grad_scale") != kNone;
    const std::size_t expected =
        signature_.inputs.size() + signature_.parameters.size() + signature_.fixed.size() - (has_scale ? 1 : 0);
    if (arguments_.size() != expected) {
      fail(PYKD_BAD_ARTEFACT, "a module with the " + std::to_string(expected) + " arguments of its metadata",
           std::to_string(arguments_.size()), "export the loss again");
    }
  }

  template <class Spec>
  static std::size_t index_of(const std::vector<Spec>& specs, const std::string& name) {
    for (std::size_t i = 0; i < specs.size(); ++i) {
      if (specs[i].name == name) return i;
    }
    return kNone;
  }

  void run_unwrapped(const Request& request) const {
    std::vector<std::size_t> differentiable;  // the inputs whose gradients are asked for
    for (std::size_t id : request.output_ids) {
      const std::size_t input = signature_.outputs[id].gradient_of;
      if (input != kNone) differentiable.push_back(input);
    }

    const torch::jit::GraphOptimizerEnabledGuard interpret(false);
    const c10::InferenceMode no_inference_mode(false);
    const at::AutoGradMode grad_mode(!differentiable.empty());
    const AutocastOff no_autocast(device_.type());
    const c10::OptionalDeviceGuard on_device(device_.is_cuda() ? std::optional<c10::Device>(device_) : std::nullopt);

    std::vector<at::Tensor> inputs;
    inputs.reserve(request.inputs.size());
    for (const pykd_tensor& input : request.inputs) inputs.push_back(view_of(input));
    for (std::size_t input : differentiable) inputs[input].requires_grad_(true);

    std::vector<c10::IValue> arguments;
    arguments.reserve(arguments_.size() + 1);
    for (const Argument& argument : arguments_) {
      switch (argument.kind) {
        case ArgumentKind::kInput:
          arguments.emplace_back(inputs[argument.index]);
          break;
        case ArgumentKind::kParameter:
          arguments.emplace_back(request.parameters[argument.index]);
          break;
        case ArgumentKind::kFixed:
          arguments.emplace_back(signature_.fixed[argument.index].default_value);
          break;
      }
    }
    const c10::IValue returned = forward_(std::move(arguments));
    const auto values = c10::impl::toTypedDict<std::string, at::Tensor>(returned.toGenericDict());

    std::vector<at::Tensor> gradients;
    if (!differentiable.empty()) {
      gradients = differentiate(value_of(values, "loss"), inputs, differentiable, request.parameters);
    }

    // Everything is computed. Check all of it against the memory it goes to, then write.
    std::vector<std::pair<at::Tensor, at::Tensor>> copies;  // to, from
    copies.reserve(request.outputs.size());
    std::size_t next_gradient = 0;
    for (std::size_t i = 0; i < request.outputs.size(); ++i) {
      const OutputSpec& output = signature_.outputs[request.output_ids[i]];
      const at::Tensor from =
          output.gradient_of == kNone ? value_of(values, output.name).detach() : gradients[next_gradient++];
      at::Tensor to = view_of(request.outputs[i]);
      if (from.sizes() != to.sizes() || from.scalar_type() != to.scalar_type()) {
        fail(PYKD_BAD_ARTEFACT, text_of(to) + " for the output " + in_quotes(output.name) + ", as the metadata says",
             text_of(from) + " from the module", "export the loss again");
      }
      copies.emplace_back(std::move(to), from);
    }
    const at::NoGradGuard no_grad;
    for (auto& copy : copies) copy.first.copy_(copy.second);
  }

  static at::Tensor value_of(const Values& values, const std::string& name) {
    const auto found = values.find(name);
    if (found == values.end()) {
      fail(PYKD_BAD_ARTEFACT, "a module that returns " + in_quotes(name) + ", as its metadata says",
           "a dict without it", "export the loss again");
    }
    return found->value();
  }

  // d(loss)/d(input) for each of `differentiable`. An input that is declared to receive a gradient is
  // one that the loss depends on: where autograd finds no way from one to the other, zeros would train
  // nothing without a word, so that is an error.
  std::vector<at::Tensor> differentiate(const at::Tensor& loss, const std::vector<at::Tensor>& inputs,
                                        const std::vector<std::size_t>& differentiable,
                                        const std::vector<double>& parameters) const {
    std::vector<at::Tensor> with_respect_to, upstream;  // no upstream gradient: one
    for (std::size_t input : differentiable) with_respect_to.push_back(inputs[input]);
    if (signature_.grad_scale != kNone && parameters[signature_.grad_scale] != 1.0) {
      upstream.push_back(at::full({}, parameters[signature_.grad_scale], loss.options()));
    }
    std::vector<at::Tensor> gradients(with_respect_to.size());
    if (loss.requires_grad()) {
      gradients = torch::autograd::grad({loss}, with_respect_to, upstream, /*retain_graph=*/false,
                                        /*create_graph=*/false, /*allow_unused=*/true);
    }
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      if (gradients[i].defined()) continue;
      fail(PYKD_INTERNAL, "a loss that depends on " + in_quotes(signature_.inputs[differentiable[i]].name),
           "a module in which autograd finds no way from one to the other",
           "this is a mistake of the exporter, please report it");
    }
    return gradients;
  }

  const Signature& signature_;
  c10::Device device_;
  torch::jit::Method forward_;
  std::vector<Argument> arguments_;
};

// ---- Engine --------------------------------------------------------------------------------------

std::string running_torch() { return "LibTorch " + version_text(running_version(), 3); }

[[noreturn]] void fail_unreadable(const std::string& reason) {
  fail(PYKD_BAD_ARTEFACT, "a TorchScript file that " + running_torch() + " can load", reason,
       "export the loss again, or use the LibTorch that it was made with");
}

void require_cuda(int id) {
  const std::string device = "cuda:" + std::to_string(id);
  if (!c10::impl::hasDeviceGuardImpl(c10::kCUDA)) {
    fail(PYKD_UNAVAILABLE, "a LibTorch with CUDA for the device " + device, running_torch() + " built without CUDA",
         "install a CUDA build of torch " + version_text(running_version(), 2) + ", or load with device \"cpu\"");
  }
  const c10::DeviceIndex count = torch::cuda::device_count();
  if (id >= count) {
    fail(PYKD_UNAVAILABLE, "the device " + device,
         running_torch() + ", which sees " + std::to_string(count) + " CUDA devices",
         "see nvidia-smi and CUDA_VISIBLE_DEVICES, or load with device \"cpu\"");
  }
}

// A TorchScript file without the records that tell where in its author's sources a line of the program was. LibTorch
// follows their indices unchecked, where an error has to be told: those of a damaged file lead out of bounds. Nobody
// who only runs the program misses them. A record is found by its name, so the names read otherwise here.
class WithoutPlaces final : public caffe2::serialize::ReadAdapterInterface {
 public:
  WithoutPlaces(const void* bytes, std::size_t size) : bytes_(static_cast<const char*>(bytes), size) {
    constexpr std::string_view kEnding = ".debug_pkl";
    for (std::size_t at = 0; (at = bytes_.find(kEnding, at)) != std::string_view::npos; at += kEnding.size()) {
      ends_.push_back(at + kEnding.size() - 1);
    }
  }

  std::size_t size() const override { return bytes_.size(); }

  std::size_t read(std::uint64_t position, void* buffer, std::size_t count, const char* /*what*/) const override {
    if (position >= bytes_.size()) return 0;
    const std::size_t read = bytes_.copy(static_cast<char*>(buffer), count, position);
    for (auto end = std::lower_bound(ends_.begin(), ends_.end(), position); end != ends_.end(); ++end) {
      if (*end >= position + read) break;
      static_cast<char*>(buffer)[*end - position] = '_';
    }
    return read;
  }

 private:
  std::string_view bytes_;
  std::vector<std::size_t> ends_;  // the last letters of their names, in order
};

class TorchScriptEngine final : public Engine {
 public:
  std::string version() const override { return version_text(running_version(), 3); }

  std::string metadata(const void* bytes, std::size_t size) override {
    return in_torch(
        [&]() -> std::string {
          caffe2::serialize::PyTorchStreamReader reader(
              std::make_shared<caffe2::serialize::MemoryReadAdapter>(bytes, static_cast<off_t>(size)));
          const std::string record = std::string("extra/") + kMetadataFile;
          if (!reader.hasRecord(record)) {
            fail(PYKD_BAD_ARTEFACT, std::string("a TorchScript file with the extra file ") + kMetadataFile,
                 "one without", "write it with pykd.export()");
          }
          const auto data = reader.getRecord(record);
          return {static_cast<const char*>(std::get<0>(data).get()), std::get<1>(data)};
        },
        fail_unreadable);
  }

  std::unique_ptr<Session> open(const void* bytes, std::size_t size, const Signature& signature,
                                const EngineOptions& options) override {
    if (options.device.kind == PYKD_CUDA) require_cuda(options.device.id);
    return in_torch(
        [&]() -> std::unique_ptr<Session> {
          const c10::InferenceMode no_inference_mode(false);
          torch::jit::Module module = torch::jit::load(std::make_shared<WithoutPlaces>(bytes, size),
                                                       torch_device(options.device.kind, options.device.id));
          module.eval();
          return std::make_unique<TorchScriptSession>(module, signature, options.device);
        },
        fail_unreadable);
  }
};

}  // namespace
}  // namespace pykd::internal

std::uint32_t pykd_torch_interface_version(void) { return PYKD_ENGINE_INTERFACE_VERSION; }

pykd::internal::Engine* pykd_torch_engine(char* error, std::size_t size) {
  using pykd::internal::running_version;
  using pykd::internal::version_text;
  try {
    const std::uint64_t built = TORCH_ABI_VERSION, running = running_version();
    if (built >> 48 != running >> 48) {
      const std::string got = running == 0 ? "an older one" : "LibTorch " + version_text(running, 3);
      std::snprintf(error, size,
                    "expected LibTorch %s, with which this libpykd_torch was built, got %s in this "
                    "process; build pykd with that LibTorch, or run with the other",
                    version_text(built, 2).c_str(), got.c_str());
      return nullptr;
    }
    static auto* engine = new pykd::internal::TorchScriptEngine;  // lives until the process ends
    return engine;
  } catch (const std::exception& failure) {
    std::snprintf(error, size, "%s", failure.what());
    return nullptr;
  }
}
