// File: kernels/cuda/interface.h
//
// The handshake with libpykd_cuda, which holds the CUDA versions of the kernels. libpykd opens it on demand, compares
// the number, and then asks for the table, which lives until the process ends. The library needs the CUDA driver
// alone: the CUDA runtime is linked into it.
#ifndef PYKD_KERNELS_CUDA_INTERFACE_H_
#define PYKD_KERNELS_CUDA_INTERFACE_H_

#include <cstddef>
#include <cstdint>

#include "kernels/kernel.h"

namespace pykd::kernels {

// The CUDA version of the kernel of the same name. Tensors, values, weights and labels lie on the device; numbers in
// the CPU's memory. The work is queued on `stream` (a cudaStream_t) of the device `device`, and nothing waits for it.
// That device is the thread's current one afterwards: callers that mind keep theirs (context.h). Scratch memory, where
// a kernel needs some, comes from a memory pool of the library's own, which keeps up to 64 MiB for the next call. A
// stream that is being captured will do, from the first call on.
struct CudaKernel {
  const char* name;
  // nullptr, or what went wrong, in words that outlive the call.
  const char* (*launch)(const Call& call, int device, void* stream);
};

// Makes a kernel known: in a .cu beside the kernel's description, const bool registered = add_cuda({"name", launch});
// Called while libpykd_cuda is loaded.
bool add_cuda(CudaKernel kernel);

struct CudaInterface {
  const CudaKernel* kernels;
  std::size_t count;
  // nullptr where a device can be used here; else why not ("the CUDA driver is older than 13.0").
  const char* (*unusable)();
};

// It grows with every change of this file or of kernel.h.
constexpr std::uint32_t kCudaInterfaceVersion = 1;

}  // namespace pykd::kernels

extern "C" {
PYKD_API std::uint32_t pykd_cuda_interface_version(void);
PYKD_API const pykd::kernels::CudaInterface* pykd_cuda_interface(void);
}

#endif  // PYKD_KERNELS_CUDA_INTERFACE_H_
