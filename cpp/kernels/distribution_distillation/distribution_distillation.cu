// The launcher of distribution_distillation on CUDA. What it computes: distribution_distillation.h; how:
// distribution_distillation_kernels.cuh.
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/interface.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/distribution_distillation/distribution_distillation_kernels.cuh"

namespace pykd::kernels::ddl {
namespace {

const char* launch(const Call& call, int device, void* stream_of_call) {
  const Array& student = call.inputs[kStudent];
  Problem p(Grid(static_cast<std::size_t>(call.attributes[kBins]), call.attributes[kWidth]));
  p.rows[kOfStudent] = student.as<const float>();
  p.rows[kOfTeacher] = call.inputs[kTeacher].as<const float>();
  p.labels = call.inputs[kLabels].as<const std::int64_t>();
  bool wanted = false;
  for (int value = 0; value <= kSorts; ++value) {
    p.weights[value] = call.inputs[kPositiveWeight + value].as<const float>();
    p.values[value] = call.outputs[kPositive + value].as<float>();
    wanted |= p.values[value] != nullptr;
  }
  p.gradient = call.outputs[kGradStudent].as<float>();
  p.n = student.length(0);
  p.d = student.length(1);
  p.mining = call.choice(kNegatives);
  if (!wanted && p.gradient == nullptr) return nullptr;
  if (p.n > kMostSamples) return "expected fewer samples: at most 2^17 on CUDA";

  PYKD_CUDA_CHECK(cudaSetDevice(device));
  const auto stream = static_cast<cudaStream_t>(stream_of_call);
  int multiprocessors = 0;
  PYKD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const auto tiles = static_cast<int>(gpu::divide_up(p.n, kTile));
  p.shares = shares_of(multiprocessors, tiles, tiles);
  gpu::Scratch scratch(stream);
  if (const char* error = scratch.take(device, lay_out(p, nullptr))) return error;
  lay_out(p, scratch.memory());
  launch_all(p, [&](void (*kernel)(Problem), std::int64_t blocks, int shared_bytes, const Problem& problem) {
    kernel<<<static_cast<unsigned>(blocks), kThreads, shared_bytes, stream>>>(problem);
  });
  PYKD_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

const bool registered = add_cuda({"distribution_distillation", launch});

}  // namespace
}  // namespace pykd::kernels::ddl
