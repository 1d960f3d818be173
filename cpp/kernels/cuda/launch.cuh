// File: kernels/cuda/launch.cuh
//
// What the launchers of all kernels do: look at the device, launch, hand on what CUDA says.
//
//     return launch_rows(kernel, device, stream, [&](const gpu::Device& facts) { return make_plan(facts, …); }, …);
#ifndef PYKD_KERNELS_CUDA_LAUNCH_CUH_
#define PYKD_KERNELS_CUDA_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "kernels/cuda/device_facts.h"

namespace pykd::kernels::gpu {

// The first thing that goes wrong ends a launch: PYKD_CUDA_CHECK(cudaSomething(…));
// It is taken back, lest a later look at "the last error" finds it.
#define PYKD_CUDA_CHECK(call)            \
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

inline cudaLaunchConfig_t configuration(std::int64_t blocks, int cluster, int threads, int shared_bytes,
                                        cudaLaunchAttribute* attribute, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = stream;
  if (cluster > 1) {
    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config.attrs = attribute;
    config.numAttrs = 1;
  }
  return config;
}

// Lets a kernel have all of a device's shared memory, and finds the largest cluster in which it then still runs.
inline const char* prepare_kernel(const void* kernel, int threads, Device* device) {
  PYKD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device->shared_of_block));
  PYKD_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  if (device->largest_cluster > kPortableParts) {
    PYKD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  for (; device->largest_cluster > 1; device->largest_cluster /= 2) {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = configuration(device->largest_cluster, device->largest_cluster, threads,
                                                    device->shared_of_block, &attribute, nullptr);
    int clusters = 0;
    // A size that a device does not know is an error of the question.
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0) break;
    cudaGetLastError();
  }
  return nullptr;
}

// What is to be known of the device `index`, which is the current one, for a kernel; looked up once.
inline const char* look_up(const void* kernel, int threads, int index, Device* result) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({kernel, index});
  if (found != known.end()) {
    *result = found->second;
    return nullptr;
  }
  const OutsideCaptures outside;
  Device device;
  int capability = 0;
  PYKD_CUDA_CHECK(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index));
  PYKD_CUDA_CHECK(cudaDeviceGetAttribute(&device.shared_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  PYKD_CUDA_CHECK(
      cudaDeviceGetAttribute(&device.shared_of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index));
  PYKD_CUDA_CHECK(cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, index));
  device.largest_cluster = capability >= 9 ? kMostParts : 1;
  if (const char* error = prepare_kernel(kernel, threads, &device)) return error;
  known[{kernel, index}] = device;
  *result = device;
  return nullptr;
}

// Launches kernel(problem, plan) on the current device, `index`, with the plan that make_plan(device) chooses: its grid
// is blocks_of(plan), its clusters have plan.parts blocks.
template <class Problem, class Plan, class MakePlan, class BlocksOf>
const char* launch(void (*kernel)(Problem, Plan), const Problem& problem, int most_threads, int index,
                   cudaStream_t stream, const MakePlan& make_plan, const BlocksOf& blocks_of) {
  Device device;
  if (const char* error = look_up(reinterpret_cast<const void*>(kernel), most_threads, index, &device)) return error;
  const Plan plan = make_plan(device);
  const std::int64_t blocks = blocks_of(plan);
  if (blocks > 0x7fffffff) return "expected fewer rows: the grid of a CUDA launch is full";
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config =
      configuration(blocks, plan.parts, plan.threads, plan.shared_bytes, &attribute, stream);
  PYKD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, problem, plan));
  return nullptr;
}

// The memory pool of this library on a device: the default one gives its memory back at every synchronisation, and
// shares its settings with everyone in the process.
inline const char* pool_of(int device, cudaMemPool_t* pool) {
  constexpr std::uint64_t kKeptBytes = 1 << 26;  // from call to call
  static std::mutex mutex;
  static std::map<int, cudaMemPool_t> pools;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = pools.find(device);
  if (found != pools.end()) {
    *pool = found->second;
    return nullptr;
  }
  const OutsideCaptures outside;
  cudaMemPoolProps properties = {};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = device;
  PYKD_CUDA_CHECK(cudaMemPoolCreate(pool, &properties));
  std::uint64_t kept = kKeptBytes;
  PYKD_CUDA_CHECK(cudaMemPoolSetAttribute(*pool, cudaMemPoolAttrReleaseThreshold, &kept));
  pools[device] = *pool;
  return nullptr;
}

// Memory for the work that is queued on a stream while this lives.
class Scratch {
 public:
  explicit Scratch(cudaStream_t stream) : stream_(stream) {}
  ~Scratch() {
    if (memory_ != nullptr && cudaFreeAsync(memory_, stream_) != cudaSuccess) cudaGetLastError();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  const char* take(int device, std::size_t bytes) {
    cudaMemPool_t pool = nullptr;
    if (const char* error = pool_of(device, &pool)) return error;
    void* memory = nullptr;
    PYKD_CUDA_CHECK(cudaMallocFromPoolAsync(&memory, bytes, pool, stream_));
    memory_ = static_cast<unsigned char*>(memory);
    return nullptr;
  }
  unsigned char* memory() const { return memory_; }

 private:
  cudaStream_t stream_;
  unsigned char* memory_ = nullptr;
};

}  // namespace pykd::kernels::gpu

#endif  // PYKD_KERNELS_CUDA_LAUNCH_CUH_
