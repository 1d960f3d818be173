// File: pykd/pykd.hpp
//
// pykd for C++17: a header over the C interface in pykd/pykd.h. Link pykd::pykd.
//
//     auto loss = pykd::Loss::load("recipe");
//     std::vector<float> student = {1, 2, 3, 3, 2, 1}, teacher = {0, 2, 4, 4, 2, 0};
//
//     pykd::Result result = loss.value_and_gradient({{"student_logits", pykd::view(student, {2, 3})},
//                                                    {"teacher_logits", pykd::view(teacher, {2, 3})}},
//                                                   {{"soft_temperature", 4.0}});
//     double value = result.value("loss");
//     const float* gradient = result.data<float>("grad_student_logits");
//
// Tensors are views of your memory: contiguous, never copied, never kept; a view of const memory is for
// inputs alone. A Loss is immutable and may be shared by many threads; it moves but does not copy, and
// what was moved from says so when it is used. Whatever goes wrong is thrown as a pykd::Error that says
// what was expected, what came, and what to do; programs without exceptions use pykd/pykd.h.
//
// To write gradients into memory of your own (a training loop's buffers, device memory), use run().
#ifndef PYKD_PYKD_HPP_
#define PYKD_PYKD_HPP_

#if !defined(__cpp_exceptions) && !defined(__EXCEPTIONS) && !defined(_CPPUNWIND)
#error \
    "pykd/pykd.hpp reports errors by exceptions, and this file is compiled without: use pykd/pykd.h, which returns a status"
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "pykd/pykd.h"

namespace pykd {

// The one exception of this library. status() tells its kind.
class Error : public std::runtime_error {
 public:
  Error(pykd_status status, const std::string& what) : std::runtime_error(what), status_(status) {}
  pykd_status status() const noexcept { return status_; }

 private:
  pykd_status status_;
};

namespace internal {
inline void check(pykd_status status) {
  if (status != PYKD_OK) throw Error(status, pykd_last_error());
}
// The library must be of the version that this header describes.
inline void check_version() {
  static const std::uint32_t running = pykd_abi_version();
  if (running == PYKD_ABI_VERSION) return;
  throw Error(PYKD_UNAVAILABLE, "expected a libpykd of interface version " + std::to_string(PYKD_ABI_VERSION) +
                                    ", got one of version " + std::to_string(running) +
                                    "; build this program with the headers of the library that it finds");
}
template <class T>
struct dtype_of {
  static_assert(
      sizeof(T) == 0,
      "pykd has no such element type: it knows float, double, bool and the integers of <cstdint>, of which losses "
      "take std::int64_t alone; for 16-bit floats name the dtype: pykd::Tensor(data, PYKD_FLOAT16, shape); "
      "convert other types first");
  static constexpr pykd_dtype value = PYKD_FLOAT32;
};
template <>
struct dtype_of<float> : std::integral_constant<pykd_dtype, PYKD_FLOAT32> {};
template <>
struct dtype_of<double> : std::integral_constant<pykd_dtype, PYKD_FLOAT64> {};
template <>
struct dtype_of<std::int64_t> : std::integral_constant<pykd_dtype, PYKD_INT64> {};
template <>
struct dtype_of<std::int8_t> : std::integral_constant<pykd_dtype, PYKD_INT8> {};
template <>
struct dtype_of<std::uint8_t> : std::integral_constant<pykd_dtype, PYKD_UINT8> {};
template <>
struct dtype_of<std::int16_t> : std::integral_constant<pykd_dtype, PYKD_INT16> {};
template <>
struct dtype_of<std::uint16_t> : std::integral_constant<pykd_dtype, PYKD_UINT16> {};
template <>
struct dtype_of<std::int32_t> : std::integral_constant<pykd_dtype, PYKD_INT32> {};
template <>
struct dtype_of<std::uint32_t> : std::integral_constant<pykd_dtype, PYKD_UINT32> {};
template <>
struct dtype_of<std::uint64_t> : std::integral_constant<pykd_dtype, PYKD_UINT64> {};
template <>
struct dtype_of<bool> : std::integral_constant<pykd_dtype, PYKD_BOOL> {};
inline std::size_t size_of(pykd_dtype dtype) {
  switch (dtype) {
    case PYKD_INT8:
    case PYKD_UINT8:
    case PYKD_BOOL:
      return 1;
    case PYKD_FLOAT16:
    case PYKD_BFLOAT16:
    case PYKD_INT16:
    case PYKD_UINT16:
      return 2;
    case PYKD_FLOAT32:
    case PYKD_INT32:
    case PYKD_UINT32:
      return 4;
    case PYKD_FLOAT64:
    case PYKD_INT64:
    case PYKD_UINT64:
      return 8;
  }
  throw Error(PYKD_INVALID_TYPE, "expected one of the values of pykd_dtype, got " +
                                     std::to_string(static_cast<int>(dtype)) + "; set the dtype of the tensor");
}
// As messages and metadata call it.
inline std::string name_of(pykd_dtype dtype) {
  constexpr const char* kNames[] = {"float16", "bfloat16", "float32", "float64", "int64",  "int8", "uint8",
                                    "int16",   "uint16",   "int32",   "uint32",  "uint64", "bool"};
  return dtype < PYKD_FLOAT16 || dtype > PYKD_BOOL ? std::to_string(static_cast<int>(dtype))
                                                   : kNames[static_cast<int>(dtype) - PYKD_FLOAT16];
}
// For C, to which a NUL is the end of a text.
inline const char* c_text(const std::string& text) {
  if (text.find('\0') == std::string::npos) return text.c_str();
  throw Error(PYKD_INVALID_VALUE, "expected a name or path without NUL, got \"" + text.substr(0, text.find('\0')) +
                                      "\", a NUL and more; correct it");
}
inline std::size_t bytes_of(pykd_dtype dtype, const std::int64_t* shape, std::size_t rank) {
  std::size_t bytes = size_of(dtype);
  for (std::size_t axis = 0; axis < rank; ++axis) bytes *= static_cast<std::size_t>(shape[axis]);
  return bytes;
}
// Why a loss without gradients has none.
[[noreturn]] inline void no_gradients(bool has_value) {
  throw Error(PYKD_INVALID_VALUE,
              has_value
                  ? "expected an artefact with gradients, got one that holds the value alone; load "
                    "loss.grad.onnx, loss.pt or their folder"
                  : "expected an artefact with gradients, got scores of samples (kind \"score\"), which have none; "
                    "call value(), or export the loss with kind \"loss\"");
}
// Memory that is worth keeping from step to step, for a tensor that frees it with pykd_deallocate(); nullptr: another
// allocator will do.
inline void* kept_memory(std::size_t bytes) { return bytes >= PYKD_KEPT_FROM ? pykd_allocate(bytes) : nullptr; }
inline std::shared_ptr<void> allocate(std::size_t bytes) {
  void* memory = pykd_allocate(bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return std::shared_ptr<void>(memory, &pykd_deallocate);
}
}  // namespace internal

// Bytes of one element.
inline std::size_t size_of(pykd_dtype dtype) { return internal::size_of(dtype); }

// The dtype that an input or output of one dtype alone has; throws Error where it may have several (TorchScript files).
inline pykd_dtype dtype_of(const pykd_tensor_info& info) {
  for (int dtype = PYKD_FLOAT16; dtype <= PYKD_BOOL; ++dtype) {
    if (info.dtypes == 1u << dtype) return static_cast<pykd_dtype>(dtype);
  }
  throw Error(PYKD_INVALID_TYPE, std::string("expected a tensor of one dtype, got ") + info.name +
                                     ", which takes several; choose one yourself");
}

// A view of somebody's tensor: it owns its shape and nothing else.
class Tensor {
 public:
  Tensor() = default;
  // `data` holds the product of `shape` elements of `dtype`, last axis fastest; or say how they lie
  // with `strides` (one for each axis, in elements), and get an error where that is not contiguous.
  Tensor(void* data, pykd_dtype dtype, std::vector<std::int64_t> shape, pykd_device device = PYKD_CPU,
         int device_id = 0, std::vector<std::int64_t> strides = {})
      : data_(data),
        dtype_(dtype),
        shape_(std::move(shape)),
        strides_(std::move(strides)),
        device_(device),
        device_id_(device_id) {}
  // The same for memory that may only be read: an input.
  static Tensor of_const(const void* data, pykd_dtype dtype, std::vector<std::int64_t> shape,
                         pykd_device device = PYKD_CPU, int device_id = 0, std::vector<std::int64_t> strides = {}) {
    Tensor tensor(const_cast<void*>(data), dtype, std::move(shape), device, device_id, std::move(strides));
    tensor.read_only_ = true;
    return tensor;
  }

  Tensor(const Tensor&) = default;
  Tensor& operator=(const Tensor&) = default;
  // What was moved from views nothing: using it is an error.
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    data_ = std::exchange(other.data_, nullptr);
    dtype_ = other.dtype_;
    shape_ = std::move(other.shape_);
    strides_ = std::move(other.strides_);
    device_ = other.device_;
    device_id_ = other.device_id_;
    read_only_ = other.read_only_;
    return *this;
  }
  ~Tensor() = default;

  const std::vector<std::int64_t>& shape() const { return shape_; }
  pykd_dtype dtype() const { return dtype_; }
  void* data() const { return data_; }
  bool read_only() const { return read_only_; }

  // The view as the C interface wants it. It lives as long as this Tensor and `name` do. Throws Error.
  pykd_tensor c(const char* name) const {
    if (!strides_.empty() && strides_.size() != shape_.size()) {
      throw Error(PYKD_INVALID_VALUE, "expected " + std::to_string(shape_.size()) + " strides for " + name +
                                          ", one for each axis, got " + std::to_string(strides_.size()) +
                                          "; give them all, or none where it is contiguous");
    }
    return {name,          data_,
            dtype_,        static_cast<std::int32_t>(shape_.size()),
            shape_.data(), strides_.empty() ? nullptr : strides_.data(),
            device_,       device_id_,
            nullptr};
  }

 private:
  void* data_ = nullptr;
  pykd_dtype dtype_ = PYKD_FLOAT32;
  std::vector<std::int64_t> shape_;
  std::vector<std::int64_t> strides_;
  pykd_device device_ = PYKD_CPU;
  int device_id_ = 0;
  bool read_only_ = false;
};

// A view of memory of a known type on the CPU: of const memory, for an input alone.
template <class T>
Tensor view(T* data, std::vector<std::int64_t> shape) {
  constexpr pykd_dtype dtype = internal::dtype_of<std::remove_cv_t<T>>::value;
  if constexpr (std::is_const_v<T>) {
    return Tensor::of_const(data, dtype, std::move(shape));
  } else {
    return Tensor(data, dtype, std::move(shape));
  }
}

// The same for a container such as std::vector, whose size must be the product of `shape`. It must outlive the view: a
// temporary one is refused.
template <class Container>
auto view(Container& values, std::vector<std::int64_t> shape) -> decltype(values.data(), values.size(), Tensor()) {
  std::size_t count = 1;
  for (std::int64_t length : shape) count *= static_cast<std::size_t>(length);
  if (count != values.size()) {
    throw Error(PYKD_INVALID_VALUE, "expected a container of " + std::to_string(count) +
                                        " elements for this shape, got " + std::to_string(values.size()) +
                                        "; pass the shape that the data has");
  }
  return view(values.data(), std::move(shape));
}
template <class Container>
auto view(const Container&& values, std::vector<std::int64_t> shape)
    -> decltype(values.data(), values.size(), Tensor()) = delete;

// A view of a DLTensor (dlpack.h is the caller's; any struct with its members will do).
template <class DLTensor>
Tensor from_dlpack(const DLTensor& tensor) {
  const int code = static_cast<int>(tensor.dtype.code), bits = tensor.dtype.bits;
  pykd_dtype dtype;
  if (code == 2 && bits == 32) {
    dtype = PYKD_FLOAT32;
  } else if (code == 2 && bits == 64) {
    dtype = PYKD_FLOAT64;
  } else if (code == 2 && bits == 16) {
    dtype = PYKD_FLOAT16;
  } else if (code == 4 && bits == 16) {
    dtype = PYKD_BFLOAT16;
  } else if (code == 0 && bits == 64) {
    dtype = PYKD_INT64;
  } else if (code <= 1 && (bits == 8 || bits == 16 || bits == 32)) {
    dtype = bits == 8    ? (code == 0 ? PYKD_INT8 : PYKD_UINT8)
            : bits == 16 ? (code == 0 ? PYKD_INT16 : PYKD_UINT16)
                         : (code == 0 ? PYKD_INT32 : PYKD_UINT32);
  } else if (code == 1 && bits == 64) {
    dtype = PYKD_UINT64;
  } else if (code == 6 && bits == 8) {
    dtype = PYKD_BOOL;
  } else {
    throw Error(PYKD_INVALID_TYPE,
                "expected float16, bfloat16, float32, float64, int64, another integer or bool, got "
                "DLPack type code " +
                    std::to_string(code) + " with " + std::to_string(bits) + " bits; cast the tensor first");
  }
  const int device = static_cast<int>(tensor.device.device_type);
  if (device != 1 && device != 2 && device != 3) {
    throw Error(PYKD_INVALID_TYPE, "expected a tensor on the CPU or a CUDA device, got DLPack device type " +
                                       std::to_string(device) + "; copy it over first");
  }
  std::vector<std::int64_t> shape(tensor.shape, tensor.shape + tensor.ndim), strides;
  if (tensor.strides != nullptr) strides.assign(tensor.strides, tensor.strides + tensor.ndim);
  return Tensor(static_cast<char*>(tensor.data) + tensor.byte_offset, dtype, std::move(shape),
                device == 2 ? PYKD_CUDA : PYKD_CPU, tensor.device.device_id, std::move(strides));
}

using Tensors = std::map<std::string, Tensor>;     // by input or output name
using Parameters = std::map<std::string, double>;  // by parameter name

// What a run returned, in memory of its own on the CPU.
class Result {
 public:
  // A scalar: "loss" or a term.
  double value(const std::string& name) const {
    const Array& array = find(name);
    if (!array.shape.empty()) {
      throw Error(PYKD_INVALID_VALUE, "expected the name of a scalar, got \"" + name + "\", which has " +
                                          std::to_string(array.shape.size()) + " axes; use data()");
    }
    return array.dtype == PYKD_FLOAT64 ? *static_cast<const double*>(array.memory.get())
                                       : *static_cast<const float*>(array.memory.get());
  }

  // An array: "grad_student_logits", "loss_per_sample". It lives as long as this Result.
  template <class T>
  const T* data(const std::string& name) const {
    const Array& array = find(name);
    if (internal::dtype_of<T>::value != array.dtype) {
      throw Error(PYKD_INVALID_TYPE, "expected data() with the element type of \"" + name + "\", which is of dtype " +
                                         internal::name_of(array.dtype) + ", got " +
                                         internal::name_of(internal::dtype_of<T>::value) +
                                         "; use that type, or raw() for 16-bit floats");
    }
    return static_cast<const T*>(array.memory.get());
  }
  const void* raw(const std::string& name) const { return find(name).memory.get(); }
  const std::vector<std::int64_t>& shape(const std::string& name) const { return find(name).shape; }
  pykd_dtype dtype(const std::string& name) const { return find(name).dtype; }
  bool has(const std::string& name) const { return arrays_.count(name) != 0; }
  std::vector<std::string> names() const {
    std::vector<std::string> all;
    for (const auto& entry : arrays_) all.push_back(entry.first);
    return all;
  }

 private:
  friend class Loss;
  friend class Scorer;
  struct Array {
    pykd_dtype dtype;
    std::vector<std::int64_t> shape;
    std::shared_ptr<void> memory;  // written once, before anybody sees it: copies of the Result share it
  };
  const Array& find(const std::string& name) const {
    auto found = arrays_.find(name);
    if (found == arrays_.end()) {
      std::string known;
      for (const auto& entry : arrays_) known += (known.empty() ? "" : ", ") + entry.first;
      throw Error(PYKD_INVALID_VALUE,
                  arrays_.empty()
                      ? "expected the result of a run, got one that is empty or was moved from; use that of a "
                        "call, or the one it moved to"
                      : "expected one of the outputs " + known + ", got \"" + name +
                            "\"; use one of these (gradients come from value_and_gradient())");
    }
    return found->second;
  }
  std::map<std::string, Array> arrays_;
};

// How to load; the fields are those of pykd_load_options.
struct LoadOptions {
  std::string engine;               // "onnxruntime", "torchscript"; empty: that of the library named here, or any
  std::string device = "cpu";       // "cpu", "cuda", "cuda:1"
  std::string onnxruntime_library;  // path of libonnxruntime.so; empty: looked for, as pykd_load() says
  std::string torch_library;        // path of libpykd_torch.so; empty: beside libpykd
  int threads = 0;                  // of one ONNX Runtime session; 0: one per core
  bool skip_integrity_check = false;
  void* cuda_stream = nullptr;   // a cudaStream_t for ONNX Runtime; the default stream: cudaStreamLegacy
  std::string kernels = "auto";  // fused kernels: "auto" where there are some, "on" or an error, "off"
  bool trust_merged = false;     // load merged scorers, too, from a source you trust: see pykd.h
};

// A loaded loss.
class Loss {
 public:
  // `path`: the folder that pykd.export() wrote, or one of its files. Throws Error.
  static Loss load(const std::string& path, const LoadOptions& options = {}) {
    internal::check_version();
    pykd_loss* loss = nullptr;
    const pykd_load_options c = c_options(options);
    internal::check(pykd_load(internal::c_text(path), &c, &loss));
    return Loss(loss);
  }
  // One file that is in memory already.
  static Loss load_bytes(const void* bytes, std::size_t size, const LoadOptions& options = {}) {
    internal::check_version();
    pykd_loss* loss = nullptr;
    const pykd_load_options c = c_options(options);
    internal::check(pykd_load_bytes(bytes, size, &c, &loss));
    return Loss(loss);
  }

  // The loss, its terms and, where they were exported, the per-sample vectors; these alone of an export of kind
  // "score".
  Result value(const Tensors& inputs, const Parameters& parameters = {}) const {
    return allocate_and_run(inputs, parameters, false);
  }

  // The same and "grad_<input>" for every input that receives a gradient.
  Result value_and_gradient(const Tensors& inputs, const Parameters& parameters = {}) const {
    return allocate_and_run(inputs, parameters, true);
  }

  // Writes the outputs named in `outputs` into the memory behind them; nothing is allocated for them.
  void run(const Tensors& inputs, const Tensors& outputs, const Parameters& parameters = {}) const {
    for (const auto& entry : outputs) {
      if (!entry.second.read_only()) continue;
      throw Error(PYKD_INVALID_VALUE, "expected memory to write to for the output \"" + entry.first +
                                          "\", got a view of const memory; make a view of a buffer that is not const");
    }
    const std::vector<pykd_tensor> in = c_tensors(inputs), out = c_tensors(outputs);
    const std::vector<pykd_parameter> settings = c_parameters(parameters);
    internal::check(pykd_run(c(), in.data(), in.size(), settings.data(), settings.size(), out.data(), out.size()));
  }

  // What the artefact says of itself, as JSON; the engine that runs it and that engine's version.
  std::string metadata() const { return pykd_metadata(c()); }
  std::string engine() const { return pykd_engine(c()); }
  std::string engine_version() const { return pykd_engine_version(c()); }
  std::string device() const { return pykd_device_name(c()); }
  // The fused kernels that run it ("soft_target_float32"), separated by spaces; empty: none.
  std::string kernels_in_use() const { return pykd_kernels_in_use(c()); }
  // Why it is that engine, or no kernels, where the choice was free; empty where nothing was passed over.
  std::string passed_over() const { return pykd_passed_over(c()); }

  // The signature. See pykd_tensor_info; its pointers live as long as the Loss.
  std::vector<pykd_tensor_info> inputs() const {
    std::vector<pykd_tensor_info> all(pykd_num_inputs(c()), PYKD_TENSOR_INFO_INIT);
    for (std::size_t i = 0; i < all.size(); ++i) internal::check(pykd_input_info(c(), i, &all[i]));
    return all;
  }
  std::vector<pykd_tensor_info> outputs() const {
    std::vector<pykd_tensor_info> all(pykd_num_outputs(c()), PYKD_TENSOR_INFO_INIT);
    for (std::size_t i = 0; i < all.size(); ++i) internal::check(pykd_output_info(c(), i, &all[i]));
    return all;
  }
  std::vector<pykd_parameter_info> parameters() const {
    std::vector<pykd_parameter_info> all(pykd_num_parameters(c()), PYKD_PARAMETER_INFO_INIT);
    for (std::size_t i = 0; i < all.size(); ++i) internal::check(pykd_get_parameter_info(c(), i, &all[i]));
    return all;
  }

  // The C handle; it stays with this Loss. Throws Error where that was moved from.
  const pykd_loss* c() const {
    if (loss_ == nullptr) {
      throw Error(PYKD_INVALID_VALUE, "expected a loaded loss, got one that was moved from; use the one it moved to");
    }
    return loss_.get();
  }

 private:
  explicit Loss(pykd_loss* loss) : loss_(loss, &pykd_free) {}

  static pykd_load_options c_options(const LoadOptions& options) {
    auto text = [](const std::string& value) { return value.empty() ? nullptr : internal::c_text(value); };
    pykd_load_options c = PYKD_LOAD_OPTIONS_INIT;
    c.engine = text(options.engine);
    c.device = text(options.device);
    c.onnxruntime_library = text(options.onnxruntime_library);
    c.torch_library = text(options.torch_library);
    c.threads = options.threads;
    c.skip_integrity_check = options.skip_integrity_check ? 1 : 0;
    c.cuda_stream = options.cuda_stream;
    c.kernels = text(options.kernels);
    c.trust_merged = options.trust_merged ? 1 : 0;
    return c;
  }
  static std::vector<pykd_tensor> c_tensors(const Tensors& tensors) {
    std::vector<pykd_tensor> all;
    all.reserve(tensors.size());
    for (const auto& entry : tensors) all.push_back(entry.second.c(internal::c_text(entry.first)));
    return all;
  }
  static std::vector<pykd_parameter> c_parameters(const Parameters& parameters) {
    std::vector<pykd_parameter> all;
    for (const auto& entry : parameters) all.push_back({internal::c_text(entry.first), entry.second});
    return all;
  }

  Result allocate_and_run(const Tensors& inputs, const Parameters& parameters, bool gradient) const {
    const std::vector<pykd_tensor> in = c_tensors(inputs);
    const std::vector<pykd_parameter> settings = c_parameters(parameters);
    Result result;
    std::vector<pykd_tensor> out;
    for (const pykd_tensor_info& info : outputs()) {
      if (info.has_gradient && !gradient) continue;
      Result::Array& array = result.arrays_[info.name];
      std::int64_t shape[8];
      std::int32_t rank = 0;
      internal::check(pykd_output_shape(c(), in.data(), in.size(), info.name, shape, &rank, &array.dtype));
      array.shape.assign(shape, shape + rank);
      array.memory = internal::allocate(internal::bytes_of(array.dtype, shape, array.shape.size()));
      out.push_back(
          {info.name, array.memory.get(), array.dtype, rank, array.shape.data(), nullptr, PYKD_CPU, 0, nullptr});
    }
    if (gradient && !any_gradient(out)) internal::no_gradients(result.has("loss"));
    internal::check(pykd_run(c(), in.data(), in.size(), settings.data(), settings.size(), out.data(), out.size()));
    return result;
  }
  static bool any_gradient(const std::vector<pykd_tensor>& outputs) {
    for (const pykd_tensor& output : outputs) {
      if (std::string(output.name).rfind("grad_", 0) == 0) return true;
    }
    return false;
  }

  friend class Scorer;
  std::unique_ptr<pykd_loss, decltype(&pykd_free)> loss_;
};

// Scores rows in blocks: pykd_score() with its summary. A Scorer is for one thread; any number of them may share a
// Loss, which must outlive them.
//
//     pykd::Scorer scorer(loss);
//     while (reader.next(rows)) {
//       const pykd::Result block = scorer.score({{"student_logits", ...}, {"teacher_logits", ...}});
//       write(block.data<float>("loss_per_sample"), scorer.status());
//     }
//     scorer.summary().mean;
//
// Of a merged scorer (LoadOptions::trust_merged) the rows are the models' inputs; Loss::inputs() tells what they are.
class Scorer {
 public:
  explicit Scorer(const Loss& loss, Parameters parameters = {}) : loss_(&loss), parameters_(std::move(parameters)) {}

  // The scores of one block, by name: "loss_per_sample" and the vectors of the terms; NaN where a row is bad.
  Result score(const Tensors& rows) {
    const std::vector<pykd_tensor> in = Loss::c_tensors(rows);
    const std::vector<pykd_parameter> settings = Loss::c_parameters(parameters_);
    std::vector<pykd_tensor> out;
    Result result;
    const std::string samples = axis_of_scores();
    for (const pykd_tensor_info& info : loss_->outputs()) {
      if (info.rank != 1 || info.has_gradient || info.axes[0] != samples || !is_score(info)) continue;
      Result::Array& array = result.arrays_[info.name];
      array.dtype = dtype_of(info, rows);
      array.shape = {count(info.axes[0], rows)};
      array.memory = internal::allocate(internal::bytes_of(array.dtype, array.shape.data(), 1) + 1);  // or none of it
      out.push_back({info.name, array.memory.get(), array.dtype, 1, array.shape.data(), nullptr, PYKD_CPU, 0, nullptr});
    }
    std::vector<std::uint8_t> status(out.empty() ? 0 : static_cast<std::size_t>(out[0].shape[0]));
    internal::check(pykd_score(loss_->c(), in.data(), in.size(), settings.data(), settings.size(), out.data(),
                               out.size(), status.data(), &summary_));
    status_ = std::move(status);
    return result;
  }

  // A pykd_row_status for each row of the last block.
  const std::vector<std::uint8_t>& status() const { return status_; }
  // What has been scored so far.
  const pykd_score_summary& summary() const { return summary_; }

 private:
  // Empty where there is none, which pykd_score() tells.
  std::string axis_of_scores() const {
    for (const pykd_tensor_info& info : loss_->outputs()) {
      if (info.rank == 1 && std::string(info.name) == "loss_per_sample") return info.axes[0];
    }
    return "";
  }
  static bool is_score(const pykd_tensor_info& output) {
    return (output.dtypes & (1u << PYKD_FLOAT32 | 1u << PYKD_FLOAT64)) != 0;
  }
  // Not pykd_output_shape(), to which a bad label is an error. What is wrong here is told by pykd_score().
  std::int64_t count(const std::string& axis, const Tensors& rows) const {
    for (const pykd_tensor_info& input : loss_->inputs()) {
      const auto given = rows.find(input.name);
      if (input.rank > 0 && input.axes[0] == axis && given != rows.end() && !given->second.shape().empty()) {
        return std::max<std::int64_t>(given->second.shape()[0], 0);
      }
    }
    return 0;
  }
  static pykd_dtype dtype_of(const pykd_tensor_info& output, const Tensors& rows) {
    if (output.dtypes == 1u << PYKD_FLOAT64) return PYKD_FLOAT64;
    if (output.dtypes == 1u << PYKD_FLOAT32) return PYKD_FLOAT32;
    for (const auto& entry : rows) {  // a TorchScript file
      if (entry.second.dtype() == PYKD_FLOAT64) return PYKD_FLOAT64;
    }
    return PYKD_FLOAT32;
  }

  const Loss* loss_;
  Parameters parameters_;
  std::vector<std::uint8_t> status_;
  pykd_score_summary summary_ = PYKD_SCORE_SUMMARY_INIT;
};

}  // namespace pykd

#endif  // PYKD_PYKD_HPP_
