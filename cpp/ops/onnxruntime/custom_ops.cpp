#include "ops/onnxruntime/custom_ops.h"

#include <algorithm>
#include <climits>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string_view>
#include <thread>
#include <utility>

#include "base/error.h"
#include "base/fork.h"
#include "base/tensor.h"
#include "kernels/cuda/loader.h"
#include "kernels/kernel.h"

namespace pykd::internal {
namespace {

using kernels::Argument;
using kernels::Array;
using kernels::Attribute;
using kernels::Call;
using kernels::Kernel;
using kernels::Parallel;
using kernels::Role;

constexpr std::size_t kMaxArguments = 16;  // on either side; a test counts those of every kernel

ONNXTensorElementDataType element_type(Role role, pykd_dtype tensors) {
  switch (role) {
    case Role::kFloat32:
    case Role::kNumber:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case Role::kIndex:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    case Role::kTensor:
      break;
  }
  switch (tensors) {
    case PYKD_FLOAT16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case PYKD_BFLOAT16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    default:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
}

// ---- Talking to ONNX Runtime ---------------------------------------------------------------------------------------

// What it answered, for code that gives up where it failed.
struct OrtFailure {
  OrtStatus* status;
};

void require(OrtStatus* status) {
  if (status != nullptr) throw OrtFailure{status};
}

// Runs `body` where ONNX Runtime calls us: what it throws becomes a status with its text.
template <class Body>
OrtStatus* answering(const OrtApi& api, Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const OrtFailure& failure) {
    return failure.status;
  } catch (const Failure& failure) {
    return api.CreateStatus(failure.status() == PYKD_UNAVAILABLE ? ORT_NOT_IMPLEMENTED : ORT_INVALID_ARGUMENT,
                            failure.what());
  } catch (const std::bad_alloc&) {
    return api.CreateStatus(ORT_FAIL, "expected enough memory for this call, got none; use smaller tensors");
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_FAIL, error.what());
  }
}

bool succeeded(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return true;
  api.ReleaseStatus(status);
  return false;
}

// ---- An op: one kernel for one dtype on one device -----------------------------------------------------------------

struct Op : OrtCustomOp {
  // On CUDA where there is a `cuda_version`, else on the CPU.
  Op(const Kernel& of, pykd_dtype tensors, const std::string& suffix, const kernels::CudaKernel* cuda_version);

  const Kernel& kernel;
  pykd_dtype dtype;
  std::string name;
  const kernels::CudaKernel* cuda;

  // By output and axis: the required input, and the axis of it, that has the length.
  struct Source {
    std::size_t input;
    std::size_t axis;
  };
  std::vector<std::vector<Source>> sources;
  std::vector<std::int32_t> ranks;  // of the inputs, as the kernel describes them
};

std::vector<std::string_view> words(std::string_view text) {
  std::vector<std::string_view> all;
  while (!text.empty()) {
    const std::size_t length = std::min(text.find(' '), text.size());
    if (length > 0) all.push_back(text.substr(0, length));
    text.remove_prefix(std::min(length + 1, text.size()));
  }
  return all;
}

// ---- A node of a session -------------------------------------------------------------------------------------------

std::vector<double> read_attributes(const OrtApi& api, const OrtKernelInfo& info, const Op& op) {
  const auto text_of = [&](const char* name, std::string& text) {
    std::size_t size = 0;
    if (!succeeded(api, api.KernelInfoGetAttribute_string(&info, name, nullptr, &size))) return false;
    text.resize(size);
    if (!succeeded(api, api.KernelInfoGetAttribute_string(&info, name, text.data(), &size))) return false;
    text.resize(size - 1);  // without the zero at its end
    return true;
  };
  const auto number_of = [&](const char* name, double& value) {
    float number = 0;
    std::int64_t integer = 0;
    if (succeeded(api, api.KernelInfoGetAttribute_float(&info, name, &number))) {
      value = static_cast<double>(number);
    } else if (succeeded(api, api.KernelInfoGetAttribute_int64(&info, name, &integer))) {
      value = static_cast<double>(integer);
    } else {
      return false;
    }
    return true;
  };
  // Whether the node has it, of whatever type: a list, say. ONNX Runtime tells in words alone.
  const auto is_there = [&](const char* name) {
    float number = 0;
    OrtStatus* status = api.KernelInfoGetAttribute_float(&info, name, &number);
    if (status == nullptr) return true;
    const bool missing = std::strstr(api.GetErrorMessage(status), "No attribute with name") != nullptr;
    api.ReleaseStatus(status);
    return !missing;
  };
  std::vector<double> values;
  for (const Attribute& attribute : op.kernel.attributes) {
    const std::string what = std::string("the attribute ") + attribute.name + " of " + op.name;
    double value = attribute.default_value, number = 0;
    std::string text;
    const bool is_text = text_of(attribute.name, text), is_number = number_of(attribute.name, number);
    if (!is_text && !is_number && is_there(attribute.name)) {
      fail(PYKD_INVALID_VALUE, std::string(attribute.choices.empty() ? "a float" : "a string") + " as " + what,
           "a value of another type", "export the loss again");
    }
    if (attribute.choices.empty()) {
      if (is_text) fail(PYKD_INVALID_VALUE, "a float as " + what, in_quotes(text), "export the loss again");
      if (is_number) value = number;
    } else if (is_text || is_number) {
      const std::vector<std::string> choices(attribute.choices.begin(), attribute.choices.end());
      const auto found = std::find(choices.begin(), choices.end(), text);
      if (!is_text || found == choices.end()) {
        fail(PYKD_INVALID_VALUE, "one of " + join(choices) + " as " + what, is_text ? in_quotes(text) : "a number",
             "export the loss again, or use the pykd that it was exported with");
      }
      value = static_cast<double>(found - choices.begin());
    }
    values.push_back(value);
  }
  return values;
}

// ONNX Runtime's threads, for the length of one call. How many they are it does not tell; where it has fewer than there
// are cores, some of them take more than one of the tasks.
struct SessionThreads {
  const OrtApi& api;
  OrtKernelContext* context;

  static void run(void* pool, std::int64_t count, void (*task)(void*, std::int64_t), void* state) {
    struct Work {
      void (*task)(void*, std::int64_t);
      void* state;
    } work{task, state};
    const auto& self = *static_cast<const SessionThreads*>(pool);
    OrtStatus* status = self.api.KernelContext_ParallelFor(
        self.context,
        [](void* data, std::size_t index) {
          const Work& todo = *static_cast<const Work*>(data);
          todo.task(todo.state, static_cast<std::int64_t>(index));
        },
        static_cast<std::size_t>(count), 0, &work);
    require(status);
  }
};

int cores() {
  static const int count = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return count;
}

class Node {
 public:
  Node(const OrtApi& api, const Op& op, const OrtKernelInfo& info)
      : api_(api), op_(op), attributes_(read_attributes(api, info, op)) {}

  OrtStatus* compute(OrtKernelContext* context) const noexcept {
    return answering(api_, [&] { run(context); });
  }

 private:
  // An array and room for its lengths.
  struct Slot {
    std::int64_t shape[kMaxRank];
    const OrtValue* value = nullptr;
  };

  void run(OrtKernelContext* context) const {
    Array inputs[kMaxArguments], outputs[kMaxArguments];
    Slot slots[2 * kMaxArguments];
    bool described = true;  // whether the inputs have the axes that they should have
    std::size_t given = 0;
    require(api_.KernelContext_GetInputCount(context, &given));
    for (std::size_t i = 0; i < std::min(given, op_.kernel.inputs.size()); ++i) {
      read_input(context, i, inputs[i], slots[i]);
      described &= !inputs[i].given() || inputs[i].rank == op_.ranks[i];
    }
    require(api_.KernelContext_GetOutputCount(context, &given));
    for (std::size_t i = 0; described && i < std::min(given, op_.kernel.outputs.size()); ++i) {
      make_output(context, i, inputs, outputs[i], slots[kMaxArguments + i]);
    }
    Call call;
    call.inputs = inputs;
    call.outputs = outputs;
    call.attributes = attributes_.data();
    call.dtype = op_.dtype;
    kernels::check(op_.kernel, call);
    if (op_.cuda == nullptr) {
      run_on_cpu(context, call);
    } else {
      run_on_cuda(context, call, *slots[first_tensor()].value);
    }
  }

  void run_on_cpu(OrtKernelContext* context, Call& call) const {
    SessionThreads threads{api_, context};
    const Parallel parallel{cores(), &SessionThreads::run, &threads};
    call.parallel = &parallel;
    op_.kernel.cpu(call);
  }

  // Which every call has, in the memory of the device.
  std::size_t first_tensor() const {
    std::size_t index = 0;
    while (op_.kernel.inputs[index].role != Role::kTensor) ++index;
    return index;
  }

  void run_on_cuda(OrtKernelContext* context, const Call& call, const OrtValue& tensor) const {
    const OrtMemoryInfo* memory = nullptr;
    int device = 0;
    void* stream = nullptr;
    require(api_.GetTensorMemoryInfo(&tensor, &memory));
    require(api_.MemoryInfoGetId(memory, &device));
    require(api_.KernelContext_GetGPUComputeStream(context, &stream));
    const char* error = op_.cuda->launch(call, device, stream);
    if (error != nullptr) require(api_.CreateStatus(ORT_FAIL, error));
  }

  void read_input(OrtKernelContext* context, std::size_t index, Array& array, Slot& slot) const {
    require(api_.KernelContext_GetInput(context, index, &slot.value));
    if (slot.value == nullptr) return;  // left out
    OrtTensorTypeAndShapeInfo* info = nullptr;
    require(api_.GetTensorTypeAndShape(slot.value, &info));
    std::size_t rank = 0;
    OrtStatus* status = api_.GetDimensionsCount(info, &rank);
    if (status == nullptr) status = api_.GetDimensions(info, slot.shape, std::min(rank, kMaxRank));
    api_.ReleaseTensorTypeAndShapeInfo(info);
    require(status);
    void* data = nullptr;
    require(api_.GetTensorMutableData(const_cast<OrtValue*>(slot.value), &data));
    // A tensor without elements may have no memory; it is given all the same, and check() says what is wrong with it.
    alignas(8) static char nothing;
    array = {data == nullptr ? &nothing : data, dtype_of(op_.kernel.inputs[index].role, op_.dtype),
             static_cast<std::int32_t>(rank), slot.shape};
  }

  void make_output(OrtKernelContext* context, std::size_t index, const Array* inputs, Array& array, Slot& slot) const {
    const std::vector<Op::Source>& sources = op_.sources[index];
    for (std::size_t axis = 0; axis < sources.size(); ++axis) {
      const Array& input = inputs[sources[axis].input];
      if (!input.given()) return;  // check() says so
      slot.shape[axis] = input.shape[sources[axis].axis];
    }
    OrtValue* value = nullptr;
    require(api_.KernelContext_GetOutput(context, index, slot.shape, sources.size(), &value));
    if (value == nullptr) return;  // not wanted
    void* data = nullptr;
    require(api_.GetTensorMutableData(value, &data));
    array = {data, dtype_of(op_.kernel.outputs[index].role, op_.dtype), static_cast<std::int32_t>(sources.size()),
             slot.shape};
  }

  const OrtApi& api_;
  const Op& op_;
  const std::vector<double> attributes_;
};

// ---- The table of functions ----------------------------------------------------------------------------------------

const Op& op_of(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

Op::Op(const Kernel& of, pykd_dtype tensors, const std::string& suffix, const kernels::CudaKernel* cuda_version)
    : OrtCustomOp{},
      kernel(of),
      dtype(tensors),
      name(std::string(of.name) + "_" + dtype_name(tensors) + suffix),
      cuda(cuda_version) {
  for (const Argument& input : kernel.inputs) {
    ranks.push_back(static_cast<std::int32_t>(words(input.axes).size()));
  }
  for (const Argument& output : kernel.outputs) {
    std::vector<Source>& found = sources.emplace_back();
    for (const std::string_view axis : words(output.axes)) {
      for (std::size_t i = 0; i < kernel.inputs.size(); ++i) {
        const std::vector<std::string_view> axes = words(kernel.inputs[i].axes);
        const auto place = std::find(axes.begin(), axes.end(), axis);
        if (kernel.inputs[i].optional || place == axes.end()) continue;
        found.push_back({i, static_cast<std::size_t>(place - axes.begin())});
        break;
      }
    }
  }

  version = kOrtApiVersion;
  GetName = [](const OrtCustomOp* op) { return op_of(op).name.c_str(); };
  GetExecutionProviderType = [](const OrtCustomOp* op) {
    return op_of(op).cuda == nullptr ? "CPUExecutionProvider" : "CUDAExecutionProvider";
  };
  GetInputTypeCount = [](const OrtCustomOp* op) { return op_of(op).kernel.inputs.size(); };
  GetInputType = [](const OrtCustomOp* op, std::size_t index) {
    return element_type(op_of(op).kernel.inputs[index].role, op_of(op).dtype);
  };
  GetOutputTypeCount = [](const OrtCustomOp* op) { return op_of(op).kernel.outputs.size(); };
  GetOutputType = [](const OrtCustomOp* op, std::size_t index) {
    return element_type(op_of(op).kernel.outputs[index].role, op_of(op).dtype);
  };
  GetInputCharacteristic = [](const OrtCustomOp* op, std::size_t index) {
    return op_of(op).kernel.inputs[index].optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  };
  GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) { return INPUT_OUTPUT_OPTIONAL; };
  GetInputMemoryType = [](const OrtCustomOp* op, std::size_t index) {
    return op_of(op).kernel.inputs[index].role == Role::kNumber ? OrtMemTypeCPUInput : OrtMemTypeDefault;
  };
  GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  GetStartVersion = [](const OrtCustomOp*) { return 1; };
  GetEndVersion = [](const OrtCustomOp*) { return INT_MAX; };
  CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** node) {
    return answering(*api, [&] { *node = new Node(*api, op_of(op), *info); });
  };
  KernelComputeV2 = [](void* node, OrtKernelContext* context) {
    return static_cast<const Node*>(node)->compute(context);
  };
  KernelDestroy = [](void* node) { delete static_cast<Node*>(node); };
}

// ---- All of them ---------------------------------------------------------------------------------------------------

// The ops of one device, and the domains that hold them: one for each ONNX Runtime, of which a process may have two
// (the one inside the Python module, and a library).
struct Ops {
  std::vector<std::unique_ptr<const Op>> ops;
  std::vector<std::string> names;
  std::map<const OrtApi*, OrtCustomOpDomain*> domains;
};

StaticMutex& ops_mutex = *new StaticMutex;

// A function has one body, so a file that needs a kernel with several bodies counts its names on. The exporter
// (SLOTS in export/kernel_nodes.py) stops where this does.
constexpr const char* kSuffixes[] = {"", "_2", "_3", "_4"};

void add_op(Ops& ops, const Kernel& kernel, const kernels::CudaKernel* cuda) {
  for (const pykd_dtype dtype : kDtypes) {
    if ((kernel.dtypes & dtype_bit(dtype)) == 0) continue;
    for (const char* suffix : kSuffixes) {
      ops.ops.push_back(std::make_unique<Op>(kernel, dtype, suffix, cuda));
      ops.names.push_back(ops.ops.back()->name);
    }
  }
}

Ops& cpu_ops() {
  static Ops* const all = [] {
    auto* made = new Ops;
    for (const Kernel& kernel : kernels::all()) add_op(*made, kernel, nullptr);
    return made;
  }();
  return *all;
}

// Those that libpykd_cuda has. Nothing is kept where it cannot be used: it may be there the next time.
Ops& cuda_ops() {
  static Ops* const all = [] {
    auto made = std::make_unique<Ops>();
    const bool usable = kernels::cuda_status() == "usable";
    for (const Kernel& kernel : kernels::all()) {
      try {
        add_op(*made, kernel, kernels::find_cuda_kernel(kernel.name));
      } catch (const Failure&) {
        if (!usable) throw;  // the reason, which holds for every kernel; else it is this one that is missing
      }
    }
    return made.release();
  }();
  return *all;
}

Ops& ops_for(Device device) { return device.kind == PYKD_CPU ? cpu_ops() : cuda_ops(); }

void add_to(const OrtApi& api, OrtSessionOptions* options, Ops& ops) {
  const std::lock_guard<StaticMutex> lock(ops_mutex);
  OrtCustomOpDomain*& domain = ops.domains[&api];
  if (domain == nullptr) {
    OrtCustomOpDomain* made = nullptr;
    require(api.CreateCustomOpDomain("pykd", &made));
    for (const std::unique_ptr<const Op>& op : ops.ops) require(api.CustomOpDomain_Add(made, op.get()));
    domain = made;
  }
  require(api.AddCustomOpDomain(options, domain));
}

}  // namespace

const std::vector<std::string>& kernel_ops(Device device) { return ops_for(device).names; }

void register_kernels(const OrtApi& api, OrtSessionOptions* options, Device device) {
  try {
    add_to(api, options, ops_for(device));
  } catch (const OrtFailure& failure) {
    const std::string text = api.GetErrorMessage(failure.status);
    api.ReleaseStatus(failure.status);
    fail(PYKD_UNAVAILABLE, "to register the kernels with ONNX Runtime", "its error \"" + text + "\"",
         "load the loss without kernels");
  }
}

}  // namespace pykd::internal

OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace pykd::internal;
  const std::string version = base->GetVersionString();
  if (!is_new_enough(version)) {
    const std::string text =
        "expected ONNX Runtime 1.21 or newer for the ops of pykd, got " + version + "; install a newer one";
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, text.c_str());
  }
  const OrtApi& api = *base->GetApi(kOrtApiVersion);
  return answering(api, [&] { add_to(api, options, cpu_ops()); });
}
