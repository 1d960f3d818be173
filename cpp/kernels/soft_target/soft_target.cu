// The launcher of soft_target on CUDA. What it computes: soft_target.h; how: soft_target_kernels.cuh; in which layout:
// soft_target_plan.h.
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "kernels/cuda/interface.h"
#include "kernels/soft_target/soft_target_kernels.cuh"

namespace pykd::kernels::soft_target {
namespace {

// The first thing that goes wrong ends a launch: CHECK(cudaSomething(…));
// It is taken back, lest a later look at "the last error" finds it.
#define CHECK(call)                      \
  do {                                   \
    const cudaError_t error_ = (call);   \
    if (error_ != cudaSuccess) {         \
      cudaGetLastError();                \
      return cudaGetErrorString(error_); \
    }                                    \
  } while (false)

// While this lives, the thread may do what could disturb a capture under way, such as loading a kernel's code: none of
// it is work on a stream.
class OutsideCaptures {
 public:
  OutsideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideCaptures(const OutsideCaptures&) = delete;
  OutsideCaptures& operator=(const OutsideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

cudaLaunchConfig_t row_launch(unsigned blocks, const Plan& plan, cudaLaunchAttribute* attribute, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(plan.shared_bytes);
  config.stream = stream;
  if (plan.parts > 1) {
    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim = {static_cast<unsigned>(plan.parts), 1, 1};
    config.attrs = attribute;
    config.numAttrs = 1;
  }
  return config;
}

using RowsKernel = void (*)(Problem, Plan);

// Lets a kernel have all of a device's shared memory, and finds the largest cluster in which it then still runs.
const char* prepare_kernel(RowsKernel kernel, Device* device) {
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device->shared_of_block));
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  if (device->largest_cluster > kPortableParts) {
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  for (; device->largest_cluster > 1; device->largest_cluster /= 2) {
    Plan plan;
    plan.parts = device->largest_cluster;
    plan.threads = kMostThreads;
    plan.shared_bytes = device->shared_of_block;
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = row_launch(static_cast<unsigned>(plan.parts), plan, &attribute, nullptr);
    int clusters = 0;
    // A size that a device does not know is an error of the question.
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0) break;
    cudaGetLastError();
  }
  return nullptr;
}

// What is to be known of the device `index`, which is the current one, for a kernel; looked up once.
const char* look_up(RowsKernel kernel, int index, Device* result) {
  static std::mutex mutex;
  static std::map<std::pair<RowsKernel, int>, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({kernel, index});
  if (found == known.end()) {
    const OutsideCaptures outside;
    Device device;
    int capability = 0;
    CHECK(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index));
    CHECK(cudaDeviceGetAttribute(&device.shared_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    CHECK(cudaDeviceGetAttribute(&device.shared_of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index));
    CHECK(cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, index));
    device.largest_cluster = capability >= 9 ? kMostParts : 1;
    if (const char* error = prepare_kernel(kernel, &device)) return error;
    known[{kernel, index}] = device;
    *result = device;
  } else {
    *result = found->second;
  }
  return nullptr;
}

template <class T>
const char* launch_on(const Problem& problem, int index, cudaStream_t stream) {
  return with_kernel<T>(problem, [&](RowsKernel kernel) -> const char* {
    Device device;
    if (const char* error = look_up(kernel, index, &device)) return error;
    const Plan plan = make_plan(device, problem.batch, problem.classes, T::kLanes, problem.teacher == nullptr ? 1 : 2);
    const std::int64_t blocks = blocks_of(plan, problem.batch);
    if (blocks > 0x7fffffff) return "expected fewer rows: the grid of a CUDA launch is full";
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = row_launch(static_cast<unsigned>(blocks), plan, &attribute, stream);
    CHECK(cudaLaunchKernelEx(&config, kernel, problem, plan));
    return nullptr;
  });
}

const char* launch(const Call& call, int device, void* stream) {
  const Array& student = call.inputs[kStudent];
  const bool soft = call.inputs[kTeacher].given();
  const bool hard = call.inputs[kLabels].given() || call.inputs[kLabelProbs].given();
  const float temperature = soft ? call.number(kTemperature) : 1.0f;
  if (!(temperature > 0.0f)) return "expected a temperature above 0";
  if (student.length(1) > 0x7fffffff - kMostThreads * 16) return "expected fewer classes: below 2^31 on CUDA";

  Problem problem;
  problem.setting = make_setting(static_cast<Form>(call.choice(kForm)), soft, hard, temperature,
                                 call.attributes[kSoftenStudent] != 0.0, static_cast<float>(call.attributes[kBeta]));
  problem.student = student.data;
  problem.teacher = call.inputs[kTeacher].data;
  problem.label_probs = call.inputs[kLabelProbs].data;
  problem.labels = call.inputs[kLabels].as<const std::int64_t>();
  problem.soft_weight = call.inputs[kSoftWeight].as<const float>();
  problem.hard_weight = call.inputs[kHardWeight].as<const float>();
  problem.soft = call.outputs[kSoft].as<float>();
  problem.hard = call.outputs[kHard].as<float>();
  problem.gradient = call.outputs[kGradStudent].data;
  problem.batch = student.length(0);
  problem.classes = static_cast<std::int32_t>(student.length(1));

  CHECK(cudaSetDevice(device));
  switch (call.dtype) {
    case PYKD_FLOAT32:
      return launch_on<gpu::Float32>(problem, device, static_cast<cudaStream_t>(stream));
    case PYKD_FLOAT16:
      return launch_on<gpu::Float16>(problem, device, static_cast<cudaStream_t>(stream));
    case PYKD_BFLOAT16:
      return launch_on<gpu::Bfloat16>(problem, device, static_cast<cudaStream_t>(stream));
    default:
      return "expected float32, float16 or bfloat16";
  }
}

}  // namespace

extern const CudaKernel cuda_kernel;
const CudaKernel cuda_kernel = {"soft_target", launch};

}  // namespace pykd::kernels::soft_target
