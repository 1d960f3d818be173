// The launcher of soft_target on CUDA. What it computes: soft_target.h; how: soft_target_kernels.cuh; in which layout:
// soft_target_plan.h.
#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>

#include "kernels/cuda/interface.h"
#include "kernels/soft_target/soft_target_kernels.cuh"

namespace pykd::kernels::soft_target {
namespace {

constexpr std::uint64_t kKeptScratchBytes = 1 << 25;  // of a device, from call to call; one call takes some KB

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

// Where scratch memory comes from. The default pool gives its memory back at every synchronisation, and shares its
// settings with everyone in the process.
const char* make_pool(int device, cudaMemPool_t* pool) {
  cudaMemPoolProps properties = {};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = device;
  CHECK(cudaMemPoolCreate(pool, &properties));
  std::uint64_t kept = kKeptScratchBytes;
  CHECK(cudaMemPoolSetAttribute(*pool, cudaMemPoolAttrReleaseThreshold, &kept));
  return nullptr;
}

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
const char* look_up(int index, Device* result, cudaMemPool_t* pool) {
  constexpr int kDevices = 64;
  static std::mutex mutex;
  static Device known[kDevices];
  static cudaMemPool_t pools[kDevices];
  static bool looked_up[kDevices];
  if (index < 0 || index >= kDevices) return "expected a CUDA device below 64";
  const std::lock_guard<std::mutex> lock(mutex);
  if (!looked_up[index]) {
    const OutsideCaptures outside;
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
    if (pools[index] == nullptr) {
      if (const char* error = make_pool(index, &pools[index])) return error;
    }
    known[index] = device;
    looked_up[index] = true;
  }
  *result = known[index];
  *pool = pools[index];
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
const char* launch_parts(const Problem& problem, const Plan& plan, cudaMemPool_t pool, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(problem.batch * plan.parts);
  const auto threads = static_cast<unsigned>(plan.threads);
  const bool sums_first = problem.gradient != nullptr && slope_needs_sums(problem.setting);
  unsigned char* memory = nullptr;
  CHECK(cudaMallocFromPoolAsync(&memory, blocks * (sizeof(Statistics) + sizeof(Sums)), pool, stream));
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
  cudaMemPool_t pool = nullptr;
  if (const char* error = look_up(device, &facts, &pool)) return error;
  const Plan plan = make_plan(facts, problem.batch, problem.classes, T::kLanes, problem.teacher == nullptr ? 1 : 2);
  if (problem.batch > 0x7fffffff / plan.parts) return "expected fewer rows: the grid of a CUDA launch is full";
  return plan.apart ? launch_parts<T>(problem, plan, pool, stream) : launch_rows<T>(problem, plan, stream);
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
