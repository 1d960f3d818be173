// The launcher of mk_mmd on CUDA. What it computes: mk_mmd.h; how: mk_mmd_kernels.cuh.
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/interface.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/mk_mmd/mk_mmd_kernels.cuh"

namespace pykd::kernels::mmd {
namespace {

const char* launch_all(const Problem& p, cudaStream_t stream) {
  const auto blocks = [](std::int64_t count) { return static_cast<unsigned>(count); };
  means_kernel<<<blocks(gpu::divide_up(p.d, gpu::kWarp)), kThreads, 2 * kThreads * sizeof(double), stream>>>(p);
  centre_kernel<<<blocks(gpu::divide_up(2 * p.padded_n, kThreads / gpu::kWarp)), kThreads, 0, stream>>>(p);
  widths_kernel<<<1, kThreads, kThreads / gpu::kWarp * sizeof(double), stream>>>(p);
  const int sides = p.value == nullptr ? 1 : 2;
  tiles_kernel<<<blocks(static_cast<std::int64_t>(sides) * p.tiles * p.shares), kThreads, kSharedBytes, stream>>>(p);
  finish_kernel<<<blocks(p.gradient == nullptr ? 1 : p.n), kThreads, 0, stream>>>(p);
  PYKD_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

const char* launch(const Call& call, int device, void* stream_of_call) {
  const Array& student = call.inputs[kStudent];
  Problem p;
  p.x.rows = student.as<const float>();
  p.y.rows = call.inputs[kTeacher].as<const float>();
  p.weight = call.inputs[kWeight].as<const float>();
  p.value = call.outputs[kValue].as<float>();
  p.gradient = call.outputs[kGradStudent].as<float>();
  p.n = student.length(0);
  p.d = student.length(1);
  p.bandwidth = call.choice(0);
  if (p.value == nullptr && p.gradient == nullptr) return nullptr;
  if (p.n > 1 << 24) return "expected fewer samples: at most 2^24 on CUDA";

  PYKD_CUDA_CHECK(cudaSetDevice(device));
  const auto stream = static_cast<cudaStream_t>(stream_of_call);
  int multiprocessors = 0;
  PYKD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const auto tiles = static_cast<int>(gpu::divide_up(p.n, kTile));
  p.shares = shares_of(multiprocessors, tiles, 2 * tiles);
  gpu::Scratch scratch(stream);
  if (const char* error = scratch.take(device, lay_out(p, nullptr))) return error;
  lay_out(p, scratch.memory());
  return launch_all(p, stream);
}

const bool registered = add_cuda({"mk_mmd", launch});

}  // namespace
}  // namespace pykd::kernels::mmd
