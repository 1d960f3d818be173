// The launcher of feature_distance on CUDA. What it computes: feature_distance.h; how: feature_distance_kernels.cuh; in
// which layout: feature_distance_plan.h.
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/interface.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/feature_distance/feature_distance_kernels.cuh"

namespace pykd::kernels::feature {
namespace {

template <class T>
const char* launch_on(const Problem& problem, int power, int index, cudaStream_t stream) {
  return gpu::launch(
      power == kL1   ? tokens_kernel<T, kL1>
      : power == kL2 ? tokens_kernel<T, kL2>
                     : tokens_kernel<T, kCosine>,
      problem, kMostThreads, index, stream,
      [&](const gpu::Device& device) {
        return make_plan(device, problem.batch, problem.tokens, problem.channels, T::kLanes);
      },
      [&](const Plan& plan) { return blocks_of(plan, problem.batch); });
}

const char* launch(const Call& call, int device, void* stream) {
  const Array& student = call.inputs[kStudent];
  if (student.length(2) > 0x7fffffff - 64) return "expected fewer channels: below 2^31 on CUDA";
  Problem problem;
  problem.student = student.data;
  problem.teacher = call.inputs[kTeacher].data;
  problem.weight = call.inputs[kWeight].as<const float>();
  problem.value = call.outputs[kValue].as<float>();
  problem.gradient = call.outputs[kGradStudent].data;
  problem.batch = student.length(0);
  problem.tokens = student.length(1);
  problem.channels = student.length(2);

  PYKD_CUDA_CHECK(cudaSetDevice(device));
  switch (call.dtype) {
    case PYKD_FLOAT32:
      return launch_on<gpu::Float32>(problem, call.choice(0), device, static_cast<cudaStream_t>(stream));
    case PYKD_FLOAT16:
      return launch_on<gpu::Float16>(problem, call.choice(0), device, static_cast<cudaStream_t>(stream));
    case PYKD_BFLOAT16:
      return launch_on<gpu::Bfloat16>(problem, call.choice(0), device, static_cast<cudaStream_t>(stream));
    default:
      return "expected float32, float16 or bfloat16";
  }
}

const bool registered = add_cuda({"feature_distance", launch});

}  // namespace
}  // namespace pykd::kernels::feature
