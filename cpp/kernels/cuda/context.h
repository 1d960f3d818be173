// File: kernels/cuda/context.h
//
// Which CUDA device is current belongs to the thread, and so to whoever called us: ONNX Runtime and our own launches
// change it. This puts it back.
//
//     const KeptCudaContext kept(device);  // on the CPU it does nothing
//     …                                    // may call cudaSetDevice()
#ifndef PYKD_KERNELS_CUDA_CONTEXT_H_
#define PYKD_KERNELS_CUDA_CONTEXT_H_

#include "base/device.h"

namespace pykd::internal {

// It asks the driver, because the CUDA runtimes in a process (torch's, ONNX Runtime's, that of libpykd_cuda) share
// nothing but that, and because cudaSetDevice() back to a device that nobody uses would make a context there, of some
// hundred MB. Where no driver can be opened there is nothing to keep.
class KeptCudaContext {
 public:
  explicit KeptCudaContext(const Device& device);
  ~KeptCudaContext();
  KeptCudaContext(const KeptCudaContext&) = delete;
  KeptCudaContext& operator=(const KeptCudaContext&) = delete;

 private:
  bool known_ = false;       // there is a driver
  void* context_ = nullptr;  // a CUcontext; NULL: the thread had none
};

}  // namespace pykd::internal

#endif  // PYKD_KERNELS_CUDA_CONTEXT_H_
