// File: pykd/torch_tensors.hpp
//
// at::Tensor as pykd sees it: what pykd/torch.hpp and pykd/torch_kernels.hpp have in common. There
// is nothing here for users but TorchTensors.
#ifndef PYKD_TORCH_TENSORS_HPP_
#define PYKD_TORCH_TENSORS_HPP_

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/custom_class.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "pykd/pykd.hpp"

namespace pykd {

using TorchTensors = std::map<std::string, at::Tensor>;  // by input or output name

namespace internal {

inline pykd_dtype torch_dtype_of(const std::string& name, at::ScalarType type) {
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
      throw Error(PYKD_INVALID_TYPE, "expected float16, bfloat16, float32, float64 or int64 for " + name + ", got " +
                                         c10::toString(type) + "; cast it with .to() first");
  }
}

inline at::ScalarType torch_scalar_type(pykd_dtype dtype) {
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
    default:
      break;
  }
  throw Error(PYKD_INTERNAL, "expected one of the values of pykd_dtype, got " +
                                 std::to_string(static_cast<int>(dtype)) +
                                 "; this is a mistake in pykd, please report it");
}

inline std::string lengths_text(at::IntArrayRef lengths) {  // in the same words whatever the locale says
  std::string text;
  for (const std::int64_t length : lengths) text += (text.empty() ? "[" : ", ") + std::to_string(length);
  return text.empty() ? "[]" : text + "]";
}

// A view under the name `name`, which must outlive it. Throws Error for what pykd does not take.
inline pykd_tensor torch_view_of(const std::string& name, const at::Tensor& tensor) {
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
                                        lengths_text(tensor.strides()) + " with shape " + lengths_text(tensor.sizes()) +
                                        "; call .contiguous() first");
  }
  if (!tensor.is_cpu() && !tensor.is_cuda()) {
    throw Error(PYKD_INVALID_TYPE, "expected a tensor on the CPU or a CUDA device for " + name + ", got " +
                                       tensor.device().str() + "; copy it over first");
  }
  alignas(8) static char nothing;  // stands for the elements of an empty tensor; the library refuses those
  return {c_text(name),
          tensor.numel() == 0 ? &nothing : tensor.data_ptr(),
          torch_dtype_of(name, tensor.scalar_type()),
          static_cast<std::int32_t>(tensor.dim()),
          tensor.sizes().data(),
          tensor.strides().data(),
          tensor.is_cuda() ? PYKD_CUDA : PYKD_CPU,
          tensor.is_cuda() ? static_cast<std::int32_t>(tensor.device().index()) : 0,
          nullptr};
}

// A new tensor for a result, not cleared. A large one on the CPU lies in memory that pykd keeps from step to step
// (pykd_allocate()), as torch does on a GPU.
inline at::Tensor torch_new(at::IntArrayRef shape, pykd_dtype dtype, at::Device device) {
  const at::TensorOptions options = at::TensorOptions().dtype(torch_scalar_type(dtype)).device(device);
  void* memory = device.is_cpu() ? kept_memory(bytes_of(dtype, shape.data(), shape.size())) : nullptr;
  if (memory == nullptr) return at::empty(shape, options);
  return at::from_blob(
      memory, shape, [](void* given) { pykd_deallocate(given); }, options);
}

inline void torch_require_first_derivative() {
  if (at::GradMode::is_enabled()) {
    throw Error(PYKD_INVALID_VALUE,
                "expected backward() with create_graph = false, got true; pykd has first "
                "derivatives only: leave this loss out of what you differentiate twice");
  }
}

// Whether it is one tensor, and not several at once (vmap) or a tensor's stand-in.
inline bool torch_is_plain(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet kOthers(
      {c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Python});
  return !tensor.key_set().has_any(kOthers);
}

// What a node of autograd keeps for its backward() besides the tensors that it saves.
template <class T>
struct TorchKept : torch::CustomClassHolder {
  explicit TorchKept(T kept) : value(std::move(kept)) {}

  static void keep(torch::autograd::AutogradContext* context, T value) {
    context->saved_data["kept"] = c10::IValue::make_capsule(c10::make_intrusive<TorchKept>(std::move(value)));
  }
  // nullptr where nothing was kept. Valid as long as `holder`.
  static const T* find(torch::autograd::AutogradContext* context,
                       c10::intrusive_ptr<torch::CustomClassHolder>* holder) {
    const auto found = context->saved_data.find("kept");
    if (found == context->saved_data.end()) return nullptr;
    *holder = found->second.toCapsule();
    return &static_cast<const TorchKept*>(holder->get())->value;
  }

  T value;
};

// saved · upstream, for the backward() of a node that saved a gradient nobody else holds.
//
// Where this backward pass frees its graph, the saved tensor is in use for the last time, and is
// scaled in place, or handed out as it is where the upstream gradient is known to be 1: no memory,
// and for 1 no pass. Where the graph is kept, backward() may come again, and whoever got the saved
// tensor might have written to it by then (it may have become a parameter's .grad): that takes a
// product each time.
inline at::Tensor torch_scaled(at::Tensor saved, const at::Tensor& upstream) {
  if (!torch_is_plain(upstream) || torch::autograd::get_current_graph_task_keep_graph()) {
    return saved * upstream;
  }
  // On a GPU looking at the value would wait for it.
  if (upstream.is_cpu() && upstream.item<double>() == 1.0) return saved;
  return saved.mul_(upstream);
}

}  // namespace internal
}  // namespace pykd

#endif  // PYKD_TORCH_TENSORS_HPP_
