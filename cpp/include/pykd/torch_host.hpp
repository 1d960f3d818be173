// File: pykd/torch_host.hpp
//
// Where torch runs its own work, for pykd_kernel_host: its threads on the CPU, and the stream on
// which it queues CUDA work. Only torch's stable C interface is used (LibTorch 2.10 or newer), so
// that both pykd/torch_kernels.hpp and the torch ops, which see no more of torch than that, can
// include it.
#ifndef PYKD_TORCH_HOST_HPP_
#define PYKD_TORCH_HOST_HPP_

#include <dlfcn.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <string>

#include "pykd/kernels.h"
#include "pykd/pykd.hpp"

// Tells what went wrong in a torch function. LibTorch has it from 2.13 on; in an older one the
// address is null.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace pykd {
namespace internal {

// Throws Error where a function of torch's C interface failed to do `what`.
inline void check_torch(AOTITorchError code, const char* what) {
  if (code == AOTI_TORCH_SUCCESS) return;
  std::string text = std::string("expected torch to run ") + what + ", got an error";
  if (torch_exception_get_what_without_backtrace != nullptr) {
    text += std::string(": ") + torch_exception_get_what_without_backtrace();
  } else {
    text += ", which it has printed";
  }
  throw Error(PYKD_ENGINE_FAILURE, text);
}

inline void run_on_torchs_threads(void*, std::int64_t count, void (*task)(void*, std::int64_t), void* state) {
  struct Work {
    void (*task)(void*, std::int64_t);
    void* state;
  } work{task, state};
  check_torch(torch_parallel_for(
                  0, count, 1,
                  [](std::int64_t begin, std::int64_t end, void* context) {
                    const Work& all = *static_cast<const Work*>(context);
                    for (std::int64_t i = begin; i < end; ++i) all.task(all.state, i);
                  },
                  &work),
              "a kernel on its threads");
}

// The stream that torch queues its work on. The function lies in libtorch_cuda, which a CPU build
// of torch lacks: it is looked up at the first CUDA tensor, so that nothing need be linked.
inline void* current_cuda_stream(int device) {
  using Function = AOTITorchError (*)(std::int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<Function>(
        dlsym(library == nullptr ? RTLD_DEFAULT : library, "aoti_torch_get_current_cuda_stream"));
  }();
  if (function == nullptr) {
    throw Error(PYKD_UNAVAILABLE,
                "expected a libtorch_cuda with aoti_torch_get_current_cuda_stream for tensors on "
                "CUDA, got none in "
                "this process; use a CUDA build of torch 2.10 or newer");
  }
  void* stream = nullptr;
  check_torch(function(device, &stream), "aoti_torch_get_current_cuda_stream");
  return stream;
}

// `cuda_device`: the number of the device, or -1 for the CPU.
inline pykd_kernel_host torch_host(int cuda_device) {
  pykd_kernel_host host = PYKD_KERNEL_HOST_INIT;
  if (cuda_device >= 0) {
    host.cuda_stream = current_cuda_stream(cuda_device);
    return host;
  }
  std::uint32_t threads = 0;
  check_torch(torch_get_num_threads(&threads), "torch_get_num_threads");
  host.threads = static_cast<std::int32_t>(threads);
  host.parallel = run_on_torchs_threads;
  return host;
}

}  // namespace internal
}  // namespace pykd

#endif  // PYKD_TORCH_HOST_HPP_
