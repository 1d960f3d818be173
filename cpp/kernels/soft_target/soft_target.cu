// The launcher of soft_target on CUDA. What it computes: soft_target.h; how: soft_target_kernels.cuh; in which layout:
// soft_target_plan.h.
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/interface.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/soft_target/soft_target_kernels.cuh"

namespace pykd::kernels::soft_target {
namespace {

template <class T>
const char* launch_on(const Problem& problem, int index, cudaStream_t stream) {
  return with_kernel<T>(problem, [&](auto kernel) {
    return gpu::launch(
        kernel, problem, kMostThreads, index, stream,
        [&](const gpu::Device& device) {
          return make_plan(device, problem.batch, problem.classes, T::kLanes, problem.teacher == nullptr ? 1 : 2);
        },
        [&](const Plan& plan) { return blocks_of(plan, problem.batch); });
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

  PYKD_CUDA_CHECK(cudaSetDevice(device));
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

const bool registered = add_cuda({"soft_target", launch});

}  // namespace

}  // namespace pykd::kernels::soft_target
