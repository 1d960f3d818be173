// The engine that runs ONNX files.
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "kernels/cuda/context.h"
#include "ops/onnxruntime/custom_ops.h"
#include "runtime/artefact/onnx_scan.h"
#include "runtime/engines/engines.h"
#include "runtime/engines/onnxruntime_library.h"
#include "runtime/signature/signature.h"

namespace pykd::internal {
namespace {

// ---- Owners of ONNX Runtime's objects ----------------------------------------------------------

template <class T>
struct Release {
  void (*release)(T*) = nullptr;
  void operator()(T* object) const { release(object); }
};
template <class T>
using Owner = std::unique_ptr<T, Release<T>>;

// Calls create(&object) and owns the result.
template <class T, class Create, class Check>
Owner<T> make_owner(void (*release)(T*), Create create, Check check) {
  T* object = nullptr;
  check(create(&object));
  return Owner<T>(object, Release<T>{release});
}

// ---- The session -------------------------------------------------------------------------------

ONNXTensorElementDataType element_type(pykd_dtype dtype) {
  switch (dtype) {
    case PYKD_FLOAT16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case PYKD_BFLOAT16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case PYKD_FLOAT32:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case PYKD_FLOAT64:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE;
    case PYKD_INT64:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    case PYKD_INT8:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    case PYKD_UINT8:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    case PYKD_INT16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16;
    case PYKD_UINT16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16;
    case PYKD_INT32:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    case PYKD_UINT32:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32;
    case PYKD_UINT64:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64;
    case PYKD_BOOL:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
  }
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

class OnnxRuntimeSession : public Session {
 public:
  OnnxRuntimeSession(const OnnxRuntime& runtime, const void* bytes, std::size_t size, const Signature& signature,
                     const EngineOptions& options)
      : api_(*runtime.api), options_(options) {
    for (const InputSpec& input : signature.inputs) {
      input_names_.push_back(input.name.c_str());
    }
    double_parameters_ = signature.parameter_dtype == PYKD_FLOAT64;
    for (const ParameterSpec& parameter : signature.parameters) {
      parameters_.push_back({parameter.name.c_str(), in_dtype_of_file(parameter.default_value)});
    }
    defaults_in_file_ = signature.parameter_form == ParameterForm::kOverridable;
    for (const OutputSpec& output : signature.outputs) output_names_.push_back(output.name.c_str());
    const KeptCudaContext kept(options_.device);
    make_memory_infos();
    make_run_options();
    make_session(runtime, bytes, size);
  }

  ~OnnxRuntimeSession() override {
    const KeptCudaContext kept(options_.device);  // ONNX Runtime makes its device the thread's own
    session_.reset();
  }

  void run(const Request& request) const override {
    // The file has its own copy of every default, on the device. What is given here is copied there in each run, and
    // may come from anywhere but a CUDA graph: so it is those parameters that differ.
    std::vector<const char*> input_names = input_names_;
    std::vector<double> scalars;
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      const double value = in_dtype_of_file(request.parameters[i]);
      // NOLINTNEXTLINE(bugprone-suspicious-memory-comparison): −0 is not 0
      const bool differs = std::memcmp(&value, &parameters_[i].default_value, sizeof value) != 0;
      if (!differs && defaults_in_file_) continue;
      input_names.push_back(parameters_[i].name);
      scalars.push_back(value);
    }
    Values values(api_, input_names.size() + request.outputs.size());
    for (const pykd_tensor& tensor : request.inputs) values.push(wrap(tensor));
    for (double& scalar : scalars) values.push(wrap_parameter(scalar));
    bool cpu_output = false;
    std::vector<const char*> names;
    names.reserve(request.outputs.size());
    for (std::size_t i = 0; i < request.outputs.size(); ++i) {
      names.push_back(output_names_[request.output_ids[i]]);
      values.push(wrap(request.outputs[i]));
      cpu_output |= request.outputs[i].device == PYKD_CPU;
    }
    // Work on the caller's stream is left running, unless the caller is about to read from the CPU.
    const OrtRunOptions* run_options = options_.cuda_stream != nullptr && !cpu_output ? no_wait_.get() : nullptr;
    const KeptCudaContext kept(options_.device);
    check_run(api_.Run(session_.get(), run_options, input_names.data(), values.data(), input_names.size(), names.data(),
                       names.size(), values.data() + input_names.size()));
  }

 private:
  // The tensors of one call: views that ONNX Runtime made for us.
  class Values {
   public:
    Values(const OrtApi& api, std::size_t count) : api_(api) { values_.reserve(count); }
    Values(const Values&) = delete;
    Values& operator=(const Values&) = delete;
    ~Values() {
      for (OrtValue* value : values_) api_.ReleaseValue(value);
    }
    void push(OrtValue* value) { values_.push_back(value); }  // within the reserved count
    OrtValue** data() { return values_.data(); }

   private:
    const OrtApi& api_;
    std::vector<OrtValue*> values_;
  };

  void check_run(OrtStatus* status) const {
    if (status == nullptr) return;
    const std::string message = take_message(api_, status);
    if (tells_of_memory(message)) throw std::bad_alloc();
    throw Failure(PYKD_ENGINE_FAILURE, "ONNX Runtime reported: " + message);
  }

  OrtValue* wrap(const pykd_tensor& tensor) const {
    OrtValue* value = nullptr;
    const OrtMemoryInfo* memory = tensor.device == PYKD_CPU ? cpu_.get() : cuda_.get();
    std::size_t bytes = dtype_size(tensor.dtype);
    for (std::int32_t axis = 0; axis < tensor.rank; ++axis) {
      bytes *= static_cast<std::size_t>(tensor.shape[axis]);
    }
    check_run(api_.CreateTensorWithDataAsOrtValue(memory, tensor.data, bytes, tensor.shape,
                                                  static_cast<std::size_t>(tensor.rank), element_type(tensor.dtype),
                                                  &value));
    return value;
  }

  // A parameter, rounded as the file has it.
  double in_dtype_of_file(double parameter) const {
    return double_parameters_ ? parameter : static_cast<double>(static_cast<float>(parameter));
  }

  // The number lives in `scalar`, in the dtype that the file declares.
  OrtValue* wrap_parameter(double& scalar) const {
    pykd_tensor tensor = {nullptr, &scalar, PYKD_FLOAT64, 0, nullptr, nullptr, PYKD_CPU, 0, nullptr};
    if (!double_parameters_) {
      const auto narrow = static_cast<float>(scalar);
      std::memcpy(&scalar, &narrow, sizeof narrow);
      tensor.dtype = PYKD_FLOAT32;
    }
    return wrap(tensor);
  }

  void make_memory_infos() {
    auto check = [this](OrtStatus* status) { check_run(status); };
    cpu_ = make_owner<OrtMemoryInfo>(
        api_.ReleaseMemoryInfo,
        [&](OrtMemoryInfo** info) { return api_.CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, info); },
        check);
    if (options_.device.kind == PYKD_CPU) return;
    cuda_ = make_owner<OrtMemoryInfo>(
        api_.ReleaseMemoryInfo,
        [&](OrtMemoryInfo** info) {
          return api_.CreateMemoryInfo("Cuda", OrtDeviceAllocator, options_.device.id, OrtMemTypeDefault, info);
        },
        check);
  }

  void make_run_options() {
    auto check = [this](OrtStatus* status) { check_run(status); };
    no_wait_ = make_owner<OrtRunOptions>(
        api_.ReleaseRunOptions, [&](OrtRunOptions** run_options) { return api_.CreateRunOptions(run_options); }, check);
    check_run(api_.AddRunConfigEntry(no_wait_.get(), "disable_synchronize_execution_providers", "1"));
  }

  void make_session(const OnnxRuntime& runtime, const void* bytes, std::size_t size) {
    auto check = [this](OrtStatus* status) { check_run(status); };
    const Owner<OrtSessionOptions> session_options = make_owner<OrtSessionOptions>(
        api_.ReleaseSessionOptions, [&](OrtSessionOptions** made) { return api_.CreateSessionOptions(made); }, check);
    OrtSessionOptions* settings = session_options.get();
    // A count of our own, because ONNX Runtime pins the threads of its default to cores. Threads
    // that spin between two small graphs would take the cores of the training loop around us.
    const unsigned cores = std::max(1u, std::thread::hardware_concurrency());
    check(api_.SetIntraOpNumThreads(settings, options_.threads > 0 ? options_.threads : static_cast<int>(cores)));
    check(api_.SetInterOpNumThreads(settings, 1));
    check(api_.AddSessionConfigEntry(settings, "session.intra_op.allow_spinning", "0"));
    check(api_.SetSessionGraphOptimizationLevel(settings, ORT_ENABLE_ALL));
    // Of what depends on constants alone; the scan has refused what it can see of it. Older releases do not look at it.
    // Models have large weights to prepare.
    if (!options_.whole_models) {
      check(api_.AddSessionConfigEntry(settings, "optimization.constant_folding_max_output_size_in_bytes", "1048576"));
    }
    // A plan is kept for every new shape, without end, where batches change their size; on graphs
    // of this kind it gains nothing.
    check(api_.DisableMemPattern(settings));
    if (options_.device.kind == PYKD_CUDA) append_cuda(runtime, settings);
    if (options_.kernels) register_kernels(api_, settings, options_.device);
    session_ = make_owner<OrtSession>(
        api_.ReleaseSession,
        [&](OrtSession** session) {
          if (options_.model_path.empty()) {
            return api_.CreateSessionFromArray(runtime.env, bytes, size, settings, session);
          }
          return api_.CreateSession(runtime.env, std::filesystem::path(options_.model_path).c_str(), settings, session);
        },
        [&](OrtStatus* status) { check_open(runtime, status); });
  }

  void check_open(const OnnxRuntime& runtime, OrtStatus* status) const {
    if (status == nullptr) return;
    const bool not_here = options_.device.kind == PYKD_CUDA || api_.GetErrorCode(status) == ORT_NOT_IMPLEMENTED;
    const std::string message = take_message(api_, status);
    if (tells_of_memory(message)) throw std::bad_alloc();
    fail(not_here ? PYKD_UNAVAILABLE : PYKD_BAD_ARTEFACT,
         "an ONNX file that ONNX Runtime " + runtime.version + " can run on " + device_name(options_.device),
         "its error \"" + message + "\"",
         "use a newer ONNX Runtime, another dtype or device, or export the loss again");
  }

  void append_cuda(const OnnxRuntime& runtime, OrtSessionOptions* settings) {
    auto check = [&](OrtStatus* status) {
      if (status == nullptr) return;
      fail(PYKD_UNAVAILABLE, "ONNX Runtime with its CUDA provider for the device " + device_name(options_.device),
           "ONNX Runtime " + runtime.version + " at " + runtime.path + ", which says \"" + take_message(api_, status) +
               "\"",
           "install onnxruntime-gpu with the CUDA and cuDNN it wants, and set "
           "PYKD_ONNXRUNTIME_LIBRARY to its libonnxruntime.so, or load the loss on the CPU");
    };
    const Owner<OrtCUDAProviderOptionsV2> cuda = make_owner<OrtCUDAProviderOptionsV2>(
        api_.ReleaseCUDAProviderOptions,
        [&](OrtCUDAProviderOptionsV2** made) { return api_.CreateCUDAProviderOptions(made); }, check);
    const std::string id = std::to_string(options_.device.id);
    const char* key = "device_id";
    const char* value = id.c_str();
    check(api_.UpdateCUDAProviderOptions(cuda.get(), &key, &value, 1));
    if (options_.cuda_stream != nullptr) {
      check(api_.UpdateCUDAProviderOptionsWithValue(cuda.get(), "user_compute_stream", options_.cuda_stream));
    }
    check(api_.SessionOptionsAppendExecutionProvider_CUDA_V2(settings, cuda.get()));
  }

  const OrtApi& api_;
  const EngineOptions options_;
  struct Parameter {
    const char* name;
    double default_value;
  };
  std::vector<const char*> input_names_;
  std::vector<Parameter> parameters_;
  std::vector<const char*> output_names_;
  bool double_parameters_ = false;
  bool defaults_in_file_ = true;
  Owner<OrtMemoryInfo> cpu_, cuda_;
  Owner<OrtRunOptions> no_wait_;
  Owner<OrtSession> session_;
};

class OnnxRuntimeEngine : public Engine {
 public:
  explicit OnnxRuntimeEngine(const OnnxRuntime& runtime) : runtime_(runtime) {}

  std::string version() const override { return runtime_.version; }

  std::string metadata(const void* bytes, std::size_t size) override {
    ArtefactFile file;
    file.label = "the ONNX file";
    file.bytes.assign(static_cast<const char*>(bytes), size);
    return scan_onnx(file).metadata;
  }

  std::unique_ptr<Session> open(const void* bytes, std::size_t size, const Signature& signature,
                                const EngineOptions& options) override {
    return std::make_unique<OnnxRuntimeSession>(runtime_, bytes, size, signature, options);
  }

 private:
  const OnnxRuntime& runtime_;
};

}  // namespace

Engine& onnxruntime_engine(const std::string& library) {
  const OnnxRuntime& runtime = open_onnxruntime(library);  // one per process, hence one engine
  static OnnxRuntimeEngine engine(runtime);
  return engine;
}

}  // namespace pykd::internal
