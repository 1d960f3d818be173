// The launcher of soft_target on CUDA. What it computes: soft_target.h; how: soft_target_kernels.cuh; in which layout:
// soft_target_plan.h.
#include <cuda_runtime.h>

#include <mutex>

#include "cuda.h"
#include "soft_target/soft_target_kernels.cuh"

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

// Makes `device` the thread's current one as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      moved_ = error_ == cudaSuccess;
    }
  }
  ~OnDevice() {
    if (moved_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool moved_ = false;
  cudaError_t error_ = cudaSuccess;
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

// Lets rows_kernel have all of a device's shared memory, and finds the largest cluster that then still runs.
template <class T>
const char* prepare_kernel(Device* device) {
  CHECK(cudaFuncSetAttribute(rows_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, device->shared_of_block));
  CHECK(cudaFuncSetAttribute(rows_kernel<T>, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared));
  for (; device->largest_cluster > 1; device->largest_cluster /= 2) {
    Plan plan;
    plan.parts = device->largest_cluster;
    plan.threads = kMostThreads;
    plan.shared_bytes = device->shared_of_block;
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = row_launch(static_cast<unsigned>(plan.parts), plan, &attribute, nullptr);
    int clusters = 0;
    CHECK(cudaOccupancyMaxActiveClusters(&clusters, rows_kernel<T>, &config));
    if (clusters > 0) break;
  }
  return nullptr;
}

// What is to be known of the current device, `index`; looked up once.
const char* look_up(int index, Device* result) {
  constexpr int kDevices = 64;
  static std::mutex mutex;
  static Device known[kDevices];
  static bool looked_up[kDevices];
  if (index < 0 || index >= kDevices) return "expected a CUDA device below 64";
  const std::lock_guard<std::mutex> lock(mutex);
  if (!looked_up[index]) {
    Device device;
    int capability = 0;
    CHECK(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index));
    CHECK(cudaDeviceGetAttribute(&device.shared_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    CHECK(cudaDeviceGetAttribute(&device.shared_of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index));
    CHECK(cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, index));
    device.largest_cluster = capability >= 9 ? 8 : 1;
    if (const char* error = prepare_kernel<gpu::Float32>(&device)) return error;
    if (const char* error = prepare_kernel<gpu::Float16>(&device)) return error;
    if (const char* error = prepare_kernel<gpu::Bfloat16>(&device)) return error;
    known[index] = device;
    looked_up[index] = true;
  }
  *result = known[index];
  return nullptr;
}

template <class T>
const char* launch_rows(const Problem& problem, const Plan& plan, cudaStream_t stream) {
  cudaLaunchAttribute attribute;
  const auto blocks = static_cast<unsigned>(problem.batch * plan.parts);
  const cudaLaunchConfig_t config = row_launch(blocks, plan, &attribute, stream);
  CHECK(cudaLaunchKernelEx(&config, rows_kernel<T>, problem, plan));
  return nullptr;
}

template <class T>
const char* launch_parts(const Problem& problem, const Plan& plan, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(problem.batch * plan.parts);
  const auto threads = static_cast<unsigned>(plan.threads);
  const bool sums_first = problem.gradient != nullptr && slope_needs_sums(problem.setting);
  unsigned char* memory = nullptr;
  CHECK(cudaMallocAsync(&memory, blocks * (sizeof(Statistics) + sizeof(Sums)), stream));
  const Scratch scratch{reinterpret_cast<Statistics*>(memory),
                        reinterpret_cast<Sums*>(memory + blocks * sizeof(Statistics))};
  parts_statistics_kernel<T><<<blocks, threads, kExchangeBytes, stream>>>(problem, plan, scratch);
  parts_sums_kernel<T><<<blocks, threads, kExchangeBytes, stream>>>(problem, plan, scratch);
  parts_results_kernel<T>
      <<<sums_first ? blocks : static_cast<unsigned>(problem.batch), threads, kExchangeBytes, stream>>>(problem, plan,
                                                                                                        scratch);
  const cudaError_t launched = cudaGetLastError();
  const cudaError_t freed = cudaFreeAsync(memory, stream);
  CHECK(launched);
  CHECK(freed);
  return nullptr;
}

template <class T>
const char* launch_on(const Problem& problem, int device, cudaStream_t stream) {
  Device facts;
  if (const char* error = look_up(device, &facts)) return error;
  const Plan plan = make_plan(facts, problem.batch, problem.classes, T::kLanes, problem.teacher == nullptr ? 1 : 2);
  if (problem.batch > 0x7fffffff / plan.parts) return "expected fewer rows: the grid of a CUDA launch is full";
  return plan.apart ? launch_parts<T>(problem, plan, stream) : launch_rows<T>(problem, plan, stream);
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

  const OnDevice current(device);
  CHECK(current.error());
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
