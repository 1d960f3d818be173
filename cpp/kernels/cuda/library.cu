// What libpykd_cuda exports: the table of its kernels, and whether they can run here.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "kernels/cuda/interface.h"

namespace pykd::kernels {

namespace {

// In a function: kernels register themselves before the variables of this file are there.
std::vector<CudaKernel>& kernels() {
  static std::vector<CudaKernel> all;
  return all;
}

// The driver is opened by the CUDA runtime when the first question is asked, so this library loads without one.
const char* unusable() {
  static thread_local char text[160];
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no CUDA driver";
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  cudaGetLastError();
  if (error == cudaErrorInsufficientDriver) {
    std::snprintf(text, sizeof text, "the CUDA driver is for CUDA %d.%d, older than the %d.%d that the library needs",
                  driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    return text;
  }
  if (error == cudaErrorNoDevice || (error == cudaSuccess && devices == 0)) return "the CUDA driver sees no device";
  if (error != cudaSuccess) {
    std::snprintf(text, sizeof text, "the CUDA driver says: %s", cudaGetErrorString(error));
    return text;
  }
  for (int device = 0; device < devices; ++device) {
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
        10 * major + minor >= PYKD_CUDA_OLDEST) {
      return nullptr;
    }
  }
  cudaGetLastError();
  std::snprintf(text, sizeof text, "no device has compute capability %d.%d or later", PYKD_CUDA_OLDEST / 10,
                PYKD_CUDA_OLDEST % 10);
  return text;
}

}  // namespace

bool add_cuda(CudaKernel kernel) {
  kernels().push_back(kernel);
  return true;
}

}  // namespace pykd::kernels

std::uint32_t pykd_cuda_interface_version(void) { return pykd::kernels::kCudaInterfaceVersion; }

const pykd::kernels::CudaInterface* pykd_cuda_interface(void) {
  using namespace pykd::kernels;
  static const CudaInterface interface = [] {
    std::vector<CudaKernel>& all = kernels();
    std::sort(all.begin(), all.end(),
              [](const CudaKernel& a, const CudaKernel& b) { return std::strcmp(a.name, b.name) < 0; });
    return CudaInterface{all.data(), all.size(), &unusable};
  }();
  return &interface;
}
