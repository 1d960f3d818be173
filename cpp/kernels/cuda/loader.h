// File: kernels/cuda/loader.h
//
// Finds the CUDA versions of the kernels: opens libpykd_cuda when the first is asked for. The library is the one that
// the environment variable PYKD_CUDA_LIBRARY names, else libpykd_cuda.so beside libpykd. Who never asks never notices
// whether it is there. What could not be opened is tried again by the next call.
//
//     const CudaKernel* kernel = find_cuda_kernel("soft_target");
//     if (const char* error = kernel->launch(call, device, stream)) …
#ifndef PYKD_KERNELS_CUDA_LOADER_H_
#define PYKD_KERNELS_CUDA_LOADER_H_

#include <string>

#include "kernels/cuda/interface.h"

namespace pykd::kernels {

// Throws pykd::internal::Failure with PYKD_UNAVAILABLE where the library is absent, cannot be opened, is of another
// version, finds no usable device, or has no kernel of that name; the message says which. Never nullptr. Any thread.
const CudaKernel* find_cuda_kernel(const std::string& name);

// "usable", or the message that find_cuda_kernel() would throw for every kernel.
std::string cuda_status();

}  // namespace pykd::kernels

#endif  // PYKD_KERNELS_CUDA_LOADER_H_
