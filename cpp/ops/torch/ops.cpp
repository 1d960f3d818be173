// File: ops/torch/ops.cpp
//
// libpykd_torch_ops.so: the fused kernels as torch ops, for Python, TorchScript and LibTorch.
//
//     torch.ops.load_library("libpykd_torch_ops.so")  # C++: dlopen() it before torch::jit::load()
//
//     loss = torch.ops.pykd.loss("soft_target", [student, teacher, temperature, weight],
//                                "student teacher temperature soft_weight", "form=kl")
//     loss.backward()
//
//     soft, = torch.ops.pykd.kernel("soft_target", [student, teacher, temperature],
//                                   "student teacher temperature", "form=kl", "soft")
//
// Which kernels there are, and what they take, is read from libpykd: nothing here names one. Inputs
// come as a list of tensors and their names in the same order; attributes as name=value; outputs as
// names. Words are separated by spaces, because lists of strings and dictionaries cost more than
// the rest of a call, and dictionaries cannot cross torch's stable interface at all.
//
// pykd::loss is the sum of weight · value over the rows and over the kernel's values for which a
// weight is among the inputs, a float32 scalar; rows of weight 0 count as 0 whatever their value
// is. Its gradient flows to the inputs for which the kernel has one (the student); all others are
// constants, whatever their requires_grad says. It is computed together with the value, and only
// where grad mode is on and such an input requires one.
//
//  - First derivatives only: differentiating twice raises (torch then says that the derivative of
//    _cdist_backward is not implemented; see pass_on_once()).
//  - Backward mode alone: an input with a tangent (torch.func.jvp, dual tensors), or a batch of inputs (vmap), raises.
//  - For float16 students the kernel computes in float32 copies, for a gradient that were rounded before the upstream
//    one meets it would underflow, however the loss is scaled. For bfloat16, which has the range of float32, the
//    upstream gradient is rounded to bfloat16 before it meets the kernel's: one unit of the last place at most.
//  - It makes one more pass over the student forward, and one over the gradient backward, than the
//    kernel needs. pykd/torch_kernels.hpp (C++) and pykd.torch_kernels (Python) do without, because
//    they may define nodes of autograd, for which the stable interface has no way.
//  - float32 and float16 students have up to 2³¹ − 1 elements.
//
// pykd::kernel returns the outputs asked for. No gradient flows through it: an input that requires
// one, in grad mode, is an error, because autograd would otherwise say that the result has a
// gradient and then leave it out.
//
// pykd::value_and_gradient returns the same loss, and its gradients with respect to the inputs
// `of`, for who continues with student.backward(gradient). None flows through it, either.
//
// pykd::kernels returns what there is: a list of the descriptions of pykd/kernels.h, as JSON.
//
// Only torch's stable interface is used (torch/csrc/stable): one build runs with LibTorch 2.10 and
// newer, for the CPU and for CUDA alike.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "pykd/kernels.hpp"
#include "pykd/torch_host.hpp"

// A tensor over memory that is there, with what frees it. LibTorch has it from 2.11 on; in an older one the address is
// null.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t rank, const int64_t* shape, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* tensor, int32_t layout, const uint8_t* metadata,
    int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace {

using pykd::internal::check_torch;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] void fail(const std::string& text) { throw std::runtime_error(text); }

std::vector<std::string> words_of(std::string_view text) {
  std::vector<std::string> words;
  for (std::size_t start = 0; start < text.size();) {
    const std::size_t end = std::min(text.find(' ', start), text.size());
    if (end > start) words.emplace_back(text.substr(start, end - start));
    start = end + 1;
  }
  return words;
}

std::string joined(const std::vector<std::string>& words, const char* separator) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : separator) + word;
  return text;
}

// ---- Torch, through its stable interface --------------------------------------------------------

using torch::stable::detail::from;
using torch::stable::detail::to;

// Calls an operator of torch that returns one value.
template <class Result, class... Arguments>
Result call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{from(arguments)...};
  check_torch(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION), name);
  return to<Result>(stack[0]);
}

Tensor detach(const Tensor& tensor) { return call<Tensor>("aten::detach", "", tensor); }

// The stable interface cannot tell whether a tensor requires a gradient. An alias that is made in
// grad mode can: it is a leaf of the graph if, and only if, it does not.
bool needs_gradient(const Tensor& tensor) {
  return !call<bool>("aten::is_leaf", "", call<Tensor>("aten::alias", "", tensor));
}

void overwrite(const Tensor& tensor, const Tensor& value) {
  call<Tensor>("aten::copy_", "", detach(tensor), value, false);
}

// ---- Tensors as pykd sees them ------------------------------------------------------------------

pykd_dtype dtype_of(const std::string& name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return PYKD_FLOAT16;
    case ScalarType::BFloat16:
      return PYKD_BFLOAT16;
    case ScalarType::Float:
      return PYKD_FLOAT32;
    case ScalarType::Double:
      return PYKD_FLOAT64;
    case ScalarType::Long:
      return PYKD_INT64;
    default:
      fail("expected float16, bfloat16, float32, float64 or int64 for " + name + ", got " +
           torch::headeronly::toString(tensor.scalar_type()) + "; cast it with .to() first");
  }
}

ScalarType scalar_type(pykd_dtype dtype) {
  switch (dtype) {
    case PYKD_FLOAT16:
      return ScalarType::Half;
    case PYKD_BFLOAT16:
      return ScalarType::BFloat16;
    default:  // gradients have the dtype of an input that a kernel took; all else is float32
      return ScalarType::Float;
  }
}

pykd_tensor view_of(const std::string& name, const Tensor& tensor) {
  const bool cuda = tensor.is_cuda();
  if (!cuda && !tensor.is_cpu()) {
    fail("expected " + name + " on the CPU or a CUDA device, got a tensor that lies elsewhere; copy it over first");
  }
  alignas(8) static char nothing;  // stands for the elements of an empty tensor; the library refuses those
  // Inputs are only read, and outputs are our own.
  void* data = const_cast<void*>(tensor.const_data_ptr());
  return {nullptr,
          data == nullptr && tensor.numel() == 0 ? &nothing : data,
          dtype_of(name, tensor),
          static_cast<std::int32_t>(tensor.dim()),
          tensor.sizes().data(),
          tensor.strides().data(),
          cuda ? PYKD_CUDA : PYKD_CPU,
          cuda ? tensor.get_device_index() : 0};
}

// ---- pykd::_kernel, for CPU and CUDA ------------------------------------------------------------

// A call, and the inputs by name.
struct Request {
  Request(const std::string& name, const std::vector<Tensor>& tensors, const std::string& names)
      : description(pykd::kernel(name)), input_names(words_of(names)), inputs(tensors) {
    if (input_names.size() != tensors.size()) {
      fail("expected one name for each of the " + std::to_string(tensors.size()) + " inputs of " + name + ", got " +
           std::to_string(input_names.size()) + " names: \"" + names + "\"; separate them with spaces");
    }
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      if (!tensors[i].defined()) {
        fail("expected a tensor for " + input_names[i] + ", got an undefined one; pass one with data");
      }
      if (tensors[i].layout() != torch::headeronly::Layout::Strided) {
        fail("expected a dense tensor for " + input_names[i] + ", got a sparse one; call .to_dense() first");
      }
    }
  }

  const pykd::KernelDescription& description;
  const std::vector<std::string> input_names;
  const std::vector<Tensor>& inputs;
};

void set_attributes(pykd::KernelCall& run, const std::string& attributes) {
  for (const std::string& word : words_of(attributes)) {
    const std::size_t equals = word.find('=');
    if (equals == std::string::npos) {
      fail("expected attributes as name=value, separated by spaces, got \"" + word + "\"; correct it");
    }
    run.attribute(word.substr(0, equals), word.substr(equals + 1));
  }
}

// A new tensor for a result, not cleared. A large one on the CPU lies in memory that pykd keeps from step to step,
// where torch has torch_from_blob().
Tensor new_tensor(const std::vector<std::int64_t>& shape, pykd_dtype dtype,
                  const std::optional<torch::stable::Device>& device) {
  void* memory = nullptr;
  if (torch_from_blob != nullptr && device && device->is_cpu()) {
    memory = pykd::internal::kept_memory(pykd::internal::bytes_of(dtype, shape.data(), shape.size()));
  }
  if (memory == nullptr) return torch::stable::empty(shape, scalar_type(dtype), std::nullopt, device);
  std::vector<std::int64_t> strides(shape.size(), 1);
  for (std::size_t axis = shape.size(); axis-- > 1;) strides[axis - 1] = strides[axis] * shape[axis];
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error = torch_from_blob(
      memory, static_cast<std::int64_t>(shape.size()), shape.data(), strides.data(), 0,
      torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(scalar_type(dtype))),
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void* data, void*) { pykd_deallocate(data); }, nullptr);
  if (error != AOTI_TORCH_SUCCESS) pykd_deallocate(memory);
  pykd::internal::check_torch(error, "torch_from_blob");
  return Tensor(handle);
}

std::vector<Tensor> run_kernel(const std::string& name, const std::vector<Tensor>& inputs,
                               const std::string& input_names, const std::string& attributes,
                               const std::string& outputs) {
  const Request request(name, inputs, input_names);
  pykd::KernelCall run(request.description);
  std::optional<torch::stable::Device> device;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const std::string& input = request.input_names[i];
    run.input(input, view_of(input, inputs[i]));
    const pykd::KernelArgument* argument = request.description.input(input);
    if (!device && argument != nullptr && argument->role != "number") device = inputs[i].device();
  }
  set_attributes(run, attributes);

  std::vector<Tensor> results;
  for (const std::string& output : words_of(outputs)) {
    results.push_back(new_tensor(run.shape_of(output), run.dtype_of(output), device));
    run.output(output, view_of(output, results.back()));
  }
  run.run(pykd::internal::torch_host(device && device->is_cuda() ? device->index() : -1));
  return results;
}

// ---- pykd::_kernel, for tensors without data ----------------------------------------------------

// A tensor like one of the inputs, less the axes that the output does not have. The lengths, which
// are symbols where torch.export or torch.compile traces for all of them, are never looked at.
Tensor shaped(const Request& request, const pykd::KernelArgument& output) {
  std::optional<Tensor> result;
  for (std::size_t i = 0; i < request.inputs.size() && !result; ++i) {
    const pykd::KernelArgument* input = request.description.input(request.input_names[i]);
    if (input == nullptr || input->role == "number") continue;
    if (static_cast<std::size_t>(request.inputs[i].dim()) != input->axes.size()) continue;
    result = request.inputs[i];
    std::size_t kept = output.axes.size();
    for (std::size_t axis = input->axes.size(); axis-- > 0;) {
      if (kept > 0 && input->axes[axis] == output.axes[kept - 1]) {
        --kept;
      } else {
        result = torch::stable::select(*result, static_cast<std::int64_t>(axis), 0);
      }
    }
    if (kept > 0) result.reset();
  }
  if (!result) {
    fail("expected inputs of " + request.description.name + " with the axes " + joined(output.axes, ", ") +
         " of its output " + output.name + ", got " +
         (request.input_names.empty() ? "none" : joined(request.input_names, ", ")) +
         "; give every input that is not optional, with all its axes");
  }
  return *result;
}

// A tensor's axis as a tensor of its own, so that lengths can be compared that are symbols.
Tensor line(const Tensor& tensor, std::size_t axis) {
  Tensor result = tensor;
  for (std::size_t other = static_cast<std::size_t>(tensor.dim()); other-- > 0;) {
    if (other != axis) result = torch::stable::select(result, static_cast<std::int64_t>(other), 0);
  }
  return result;
}

// What the library would refuse, as far as it can be told without data and without lengths in numbers.
void check_without_data(const Request& request, ScalarType tensors) {
  struct Seen {
    std::string axis, input;
    Tensor line;
  };
  std::vector<Seen> seen;
  for (std::size_t i = 0; i < request.inputs.size(); ++i) {
    const std::string& name = request.input_names[i];
    const Tensor& tensor = request.inputs[i];
    const pykd::KernelArgument* input = request.description.input(name);
    if (input == nullptr) {
      std::vector<std::string> known;
      for (const pykd::KernelArgument& each : request.description.inputs) known.push_back(each.name);
      fail("expected an input of the kernel " + request.description.name + " (" + joined(known, ", ") + "), got \"" +
           name + "\"; correct it");
    }
    const ScalarType wanted = input->role == "tensor"  ? tensors
                              : input->role == "index" ? ScalarType::Long
                                                       : ScalarType::Float;
    if (tensor.scalar_type() != wanted) {
      fail("expected " + name + " of dtype " + torch::headeronly::toString(wanted) + ", got " +
           torch::headeronly::toString(tensor.scalar_type()) + "; cast it with .to() first");
    }
    if (static_cast<std::size_t>(tensor.dim()) != input->axes.size()) {
      fail("expected " + name + " with the axes (" + joined(input->axes, ", ") + "), got rank " +
           std::to_string(tensor.dim()) + "; give it one length per axis");
    }
    for (std::size_t axis = 0; axis < input->axes.size(); ++axis) {
      const Tensor own = line(tensor, axis);
      const auto first =
          std::find_if(seen.begin(), seen.end(), [&](const Seen& other) { return other.axis == input->axes[axis]; });
      if (first == seen.end()) {
        seen.push_back({input->axes[axis], name, own});
      } else if (!call<bool>("aten::is_same_size", "", own, first->line)) {
        fail("expected " + name + " as long as " + first->input + " along \"" + first->axis +
             "\", got another length; axes of one name have one length: cut, pad or map one of the tensors");
      }
    }
  }
}

std::vector<Tensor> shape_kernel(const std::string& name, const std::vector<Tensor>& inputs,
                                 const std::string& input_names, const std::string& attributes,
                                 const std::string& outputs) {
  const Request request(name, inputs, input_names);
  std::optional<ScalarType> tensors;
  for (std::size_t i = 0; i < inputs.size() && !tensors; ++i) {
    const pykd::KernelArgument* input = request.description.input(request.input_names[i]);
    if (input != nullptr && input->role == "tensor") tensors = inputs[i].scalar_type();
  }
  check_without_data(request, tensors.value_or(ScalarType::Float));
  std::vector<Tensor> results;
  for (const std::string& output : words_of(outputs)) {
    const pykd::KernelArgument* argument = request.description.output(output);
    if (argument == nullptr) {
      fail(std::string("expected an output of the kernel ").append(name).append(", got \"").append(output) +
           "\"; correct it");
    }
    const std::optional<ScalarType> dtype = argument->role == "tensor" && tensors ? *tensors : ScalarType::Float;
    const std::optional<torch::headeronly::Layout> layout;
    const std::optional<torch::stable::Device> device;
    const std::optional<bool> pinned;
    const std::optional<torch::headeronly::MemoryFormat> format = torch::headeronly::MemoryFormat::Contiguous;
    results.push_back(
        call<Tensor>("aten::empty_like", "", shaped(request, *argument), dtype, layout, device, pinned, format));
  }
  return results;
}

// ---- From the public ops to pykd::_kernel, by torch's dispatcher --------------------------------

// The words of a call, as pykd::_kernel takes them: eight characters a number, after their count.
// Strings would be never freed: neither those that an op gets nor those that it gives, because
// torch (2.10 to 2.13) forgets the copies that it makes in between. string_of() helps the former.
std::vector<std::int64_t> packed(const std::string& name, const std::string& input_names, const std::string& attributes,
                                 const std::string& outputs) {
  std::string text;
  for (const std::string* words : {&name, &input_names, &attributes, &outputs}) text += *words + '\0';
  std::vector<std::int64_t> numbers(1 + (text.size() + 7) / 8);
  numbers[0] = static_cast<std::int64_t>(text.size());
  std::memcpy(numbers.data() + 1, text.data(), text.size());
  return numbers;
}

std::array<std::string, 4> unpacked(const std::vector<std::int64_t>& numbers) {
  const std::size_t size = numbers.empty() ? 0 : static_cast<std::size_t>(numbers[0]);
  std::array<std::string, 4> words;
  std::size_t count = 0;
  if (size <= 8 * (numbers.size() - 1)) {
    const std::string_view text(reinterpret_cast<const char*>(numbers.data() + 1), size);
    for (const char c : text) {
      if (c == '\0') {
        ++count;
      } else if (count < words.size()) {
        words[count] += c;
      }
    }
  }
  if (count != words.size()) {
    fail("expected a call that another op of pykd has packed, got other numbers; use pykd::kernel");
  }
  return words;
}

// Exceptions do not pass the dispatcher's stable interface, either: they become a number. So the
// caller says that it listens, and then the text comes here.
thread_local std::string* listener = nullptr;

class Listening {
 public:
  explicit Listening(std::string* text) : before_(listener) { listener = text; }
  ~Listening() { listener = before_; }
  Listening(const Listening&) = delete;
  Listening& operator=(const Listening&) = delete;

 private:
  std::string* before_;
};

std::vector<Tensor> dispatch(const std::string& name, const std::vector<Tensor>& inputs, const std::string& input_names,
                             const std::string& attributes, const std::string& outputs) {
  if (inputs.empty()) {  // the dispatcher would not know where to go
    return run_kernel(name, inputs, input_names, attributes, outputs);
  }
  std::string error;
  std::vector<Tensor> results;
  {
    const Listening listening(&error);
    results = call<std::vector<Tensor>>("pykd::_kernel", "", packed(name, input_names, attributes, outputs), inputs);
  }
  if (!error.empty()) fail(error);
  return results;
}

using Kernel = std::vector<Tensor>(const std::string& name, const std::vector<Tensor>& inputs,
                                   const std::string& input_names, const std::string& attributes,
                                   const std::string& outputs);

template <Kernel* kFunction>
void boxed_kernel(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const auto numbers = to<std::vector<std::int64_t>>(stack[0]);
  const auto inputs = to<std::vector<Tensor>>(stack[1]);
  std::vector<Tensor> results;
  try {
    const auto [name, input_names, attributes, outputs] = unpacked(numbers);
    results = kFunction(name, inputs, input_names, attributes, outputs);
  } catch (const std::exception& error) {
    if (listener == nullptr) throw;
    *listener = error.what();
  }
  stack[0] = from(results);
}

// ---- pykd::kernel -------------------------------------------------------------------------------

// |x|, for x of shape [1, 1], by an operator of torch that has a first derivative backward, and no other.
Tensor distance_from_0(const Tensor& x) {
  const Tensor origin = torch::stable::new_zeros(detach(x), {1, 1});
  const std::optional<std::int64_t> mode;
  std::array<StableIValue, 4> stack{from(x), from(origin), from(1.0), from(mode)};
  if (torch_call_dispatcher("aten::_cdist_forward", "", stack.data(), TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) {
    fail(
        "expected inputs without tangents for a fused kernel, which has backward() alone, got forward-mode AD "
        "(torch.func.jvp, jacfwd, hessian, a dual tensor); compute the loss by its formula there");
  }
  return to<Tensor>(stack[0]);
}

// Throws where forward-mode AD goes through the tensor: it would find a constant, without a word. One entry tells.
void refuse_tangent(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Long || !(tensor.is_cpu() || tensor.is_cuda())) return;
  Tensor entry = tensor;
  while (entry.dim() > 0) {
    std::array<StableIValue, 3> stack{from(entry), from(std::int64_t{0}), from(std::int64_t{0})};
    if (torch_call_dispatcher("aten::select", "int", stack.data(), TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) {
      return;  // an empty one, which the library refuses
    }
    entry = to<Tensor>(stack[0]);
  }
  distance_from_0(torch::stable::reshape(torch::stable::to(entry, ScalarType::Float), {1, 1}));
}

// Throws where autograd would believe that a gradient flows through `op`, and then leave it out.
void refuse_gradients(const Request& request, const char* op) {
  for (const Tensor& tensor : request.inputs) refuse_tangent(tensor);
  if (!aoti_torch_grad_mode_is_enabled()) return;
  for (std::size_t i = 0; i < request.inputs.size(); ++i) {
    if (!needs_gradient(request.inputs[i])) continue;
    fail(std::string("expected inputs of ") + op + " that require no gradient, for none flows through it, got " +
         request.input_names[i] + " that does; call pykd::loss, or detach it");
  }
}

std::vector<Tensor> kernel(const std::string& name, const std::vector<Tensor>& inputs, const std::string& input_names,
                           const std::string& attributes, const std::string& outputs) {
  refuse_gradients(Request(name, inputs, input_names), "pykd::kernel");
  return dispatch(name, inputs, input_names, attributes, outputs);
}

// ---- pykd::value_and_gradient -------------------------------------------------------------------

// Σ weight · value, without the rows of weight 0.
Tensor weighted_sum(const Tensor& weight, const Tensor& value) {
  const Tensor product = call<Tensor>("aten::mul", "Tensor", weight, value);
  const Tensor unweighted = call<Tensor>("aten::logical_not", "", weight);
  const Tensor zero = torch::stable::full({}, 0.0, ScalarType::Float);
  return torch::stable::sum(call<Tensor>("aten::masked_fill", "Tensor", product, unweighted, zero));
}

Tensor sum_of(const std::optional<Tensor>& sum, const Tensor& term) {
  return sum ? torch::stable::subtract(*sum, term, -1.0) : term;
}

// The loss, and its gradient with respect to each of the inputs `differentiable`. `inputs` has no
// business with autograd.
std::vector<Tensor> compute(const Request& request, const std::vector<Tensor>& inputs, const std::string& input_names,
                            const std::string& attributes, const std::vector<std::string>& differentiable) {
  const pykd::KernelDescription& description = request.description;
  std::vector<std::size_t> weights;
  std::vector<std::string> outputs, possible;
  for (const pykd::KernelArgument& output : description.outputs) {
    const pykd::KernelArgument* weight = description.weight_of(output.name);
    if (weight == nullptr) continue;
    possible.push_back(weight->name);
    const auto found = std::find(request.input_names.begin(), request.input_names.end(), weight->name);
    if (found == request.input_names.end()) continue;
    weights.push_back(static_cast<std::size_t>(found - request.input_names.begin()));
    outputs.push_back(output.name);
  }
  if (weights.empty()) {
    fail("expected a weight among the inputs of " + description.name + " (" + joined(possible, ", ") +
         "), for the loss is the sum of weight · value, got none; give one for each value that "
         "counts");
  }
  for (const std::string& input : differentiable) outputs.push_back("grad_" + input);

  std::vector<Tensor> results = dispatch(description.name, inputs, input_names, attributes, joined(outputs, " "));
  std::optional<Tensor> total;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    total = sum_of(total, weighted_sum(inputs[weights[i]], results[i]));
  }
  results.erase(results.begin(), results.begin() + static_cast<std::ptrdiff_t>(weights.size()));
  results.insert(results.begin(), *total);
  return results;
}

std::vector<Tensor> value_and_gradient(const std::string& name, const std::vector<Tensor>& inputs,
                                       const std::string& input_names, const std::string& attributes,
                                       const std::string& differentiable) {
  const Request request(name, inputs, input_names);
  refuse_gradients(request, "pykd::value_and_gradient");
  return compute(request, inputs, input_names, attributes, words_of(differentiable));
}

// ---- pykd::loss ---------------------------------------------------------------------------------

// Something that is a scalar and has the derivative `gradient` with respect to `input`. What its
// value is does not matter (and it may be infinite or NaN): it is overwritten.
Tensor with_derivative(const Tensor& input, const Tensor& gradient) {
  if (input.scalar_type() == ScalarType::BFloat16) {  // where dot is slow
    return torch::stable::sum(call<Tensor>("aten::mul", "Tensor", input, gradient));
  }
  return call<Tensor>("aten::dot", "", torch::stable::flatten(input), torch::stable::flatten(gradient));
}

// A scalar of shape [1, 1] that passes the upstream gradient on to `scalar` unchanged, and refuses
// to be differentiated twice. Products, from which `scalar` comes, can be: their second derivative
// would leave the loss out without a word, because the kernel's gradient is a constant to autograd.
// So the way leads through an operator whose backward has no derivative: the distance |x − 0|, at
// x = 1.
Tensor pass_on_once(const Tensor& scalar) {
  const Tensor x = torch::stable::reshape(torch::stable::to(scalar, ScalarType::Float), {1, 1});
  torch::stable::fill_(detach(x), 1.0);
  return distance_from_0(x);
}

Tensor loss(const std::string& name, const std::vector<Tensor>& inputs, const std::string& input_names,
            const std::string& attributes) {
  const Request request(name, inputs, input_names);
  std::vector<std::size_t> students;
  std::vector<std::string> differentiable;
  bool halves = false;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const std::string& input = request.input_names[i];
    if (request.description.gradient_of(input) == nullptr) continue;
    if (!aoti_torch_grad_mode_is_enabled() || !needs_gradient(inputs[i])) {
      refuse_tangent(inputs[i]);  // of the others the operator through which their gradient flows does (pass_on_once)
      continue;
    }
    students.push_back(i);
    differentiable.push_back(input);
    halves = halves || inputs[i].scalar_type() == ScalarType::Half;
  }
  std::vector<Tensor> given = inputs;
  for (std::size_t i = 0; halves && i < inputs.size(); ++i) {
    const pykd::KernelArgument* argument = request.description.input(request.input_names[i]);
    if (argument != nullptr && argument->role == "tensor") given[i] = torch::stable::to(inputs[i], ScalarType::Float);
  }
  std::vector<Tensor> constants = given;
  for (Tensor& constant : constants) {
    if (aoti_torch_grad_mode_is_enabled() && needs_gradient(constant)) constant = detach(constant);
  }
  const std::vector<Tensor> results = compute(request, constants, input_names, attributes, differentiable);
  std::optional<Tensor> flow;
  for (std::size_t i = 0; i < students.size(); ++i) {
    flow = sum_of(flow, with_derivative(given[students[i]], results[i + 1]));
  }
  if (!flow) return results[0];
  Tensor value = torch::stable::clone(torch::stable::reshape(pass_on_once(*flow), {}));
  overwrite(value, results[0]);
  return value;
}

// ---- Registration -------------------------------------------------------------------------------

// What TORCH_BOX would use, but for a copy that it never frees.
std::string string_of(StableIValue value) {
  const auto handle = to<StringHandle>(value);
  std::size_t length = 0;
  const char* data = nullptr;
  check_torch(torch_string_length(handle, &length), "a string");
  check_torch(torch_string_c_str(handle, &data), "a string");
  std::string text(data, length);
  check_torch(torch_delete_string(handle), "a string");
  return text;
}

struct Stack {
  explicit Stack(const StableIValue* stack)
      : name(string_of(stack[0])),
        inputs(to<std::vector<Tensor>>(stack[1])),
        input_names(string_of(stack[2])),
        attributes(string_of(stack[3])) {}

  std::string name;
  std::vector<Tensor> inputs;
  std::string input_names;
  std::string attributes;
};

template <Kernel* kFunction>
void boxed(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const Stack arguments(stack);
  const std::string outputs = string_of(stack[4]);
  stack[0] = from(kFunction(arguments.name, arguments.inputs, arguments.input_names, arguments.attributes, outputs));
}

void boxed_loss(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const Stack arguments(stack);
  stack[0] = from(loss(arguments.name, arguments.inputs, arguments.input_names, arguments.attributes));
}

void boxed_refusal(StableIValue*, std::uint64_t, std::uint64_t) {
  fail(
      "expected one loss at a time from a fused kernel, got a batch of them (torch.vmap, torch.func); call it in a "
      "loop, or compute the loss by its formula there");
}

void boxed_kernels(StableIValue* stack, std::uint64_t, std::uint64_t) {
  std::string text = "[";  // of which torch forgets a copy, as above: ask once
  for (std::size_t i = 0; i < pykd_num_kernels(); ++i) {
    text += (i == 0 ? "" : ", ") + std::string(pykd_kernel_description(i));
  }
  stack[0] = from(text + "]");
}

}  // namespace

STABLE_TORCH_LIBRARY(pykd, m) {
  m.def("kernels() -> str");
  const std::string inputs = "(str name, Tensor[] inputs, str input_names, str attributes, ";
  m.def("_kernel(int[] call, Tensor[] inputs) -> Tensor[]");
  m.def(("kernel" + inputs + "str outputs) -> Tensor[]").c_str());
  m.def(("value_and_gradient" + inputs + "str of) -> Tensor[]").c_str());
  m.def("loss(str name, Tensor[] inputs, str input_names, str attributes=\"\") -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(pykd, CPU, m) { m.impl("_kernel", boxed_kernel<run_kernel>); }
STABLE_TORCH_LIBRARY_IMPL(pykd, CUDA, m) { m.impl("_kernel", boxed_kernel<run_kernel>); }
STABLE_TORCH_LIBRARY_IMPL(pykd, Meta, m) { m.impl("_kernel", boxed_kernel<shape_kernel>); }
STABLE_TORCH_LIBRARY_IMPL(pykd, CompositeImplicitAutograd, m) {
  m.impl("kernels", boxed_kernels);
  m.impl("kernel", boxed<kernel>);
  m.impl("value_and_gradient", boxed<value_and_gradient>);
  m.impl("loss", boxed_loss);
}
STABLE_TORCH_LIBRARY_IMPL(pykd, FuncTorchBatched, m) {
  m.impl("kernel", boxed_refusal);
  m.impl("value_and_gradient", boxed_refusal);
  m.impl("loss", boxed_refusal);
}
