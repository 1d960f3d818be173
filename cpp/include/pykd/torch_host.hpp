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

// A function of libtorch_cuda, or of the CUDA runtime that it brings along, by its name; null where
// this process has no such library. A CPU build of torch lacks them: looked up so, nothing need be
// linked, and no header of CUDA be there.
template <class Function>
Function cuda_function(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return reinterpret_cast<Function>(dlsym(library == nullptr ? RTLD_DEFAULT : library, name));
}

// The stream that torch queues its work on; null is CUDA's default stream.
inline void* current_cuda_stream(int device) {
  using Function = AOTITorchError (*)(std::int32_t, void**);
  static const auto function = cuda_function<Function>("aoti_torch_get_current_cuda_stream");
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

// CUDA's default stream has two names: 0, and the one that CUDA's headers call cudaStreamLegacy.
inline void* default_cuda_stream() { return reinterpret_cast<void*>(std::uintptr_t{1}); }
inline bool is_same_stream(void* a, void* b) {
  return (a == nullptr ? default_cuda_stream() : a) == (b == nullptr ? default_cuda_stream() : b);
}

// What is queued on `then` from now on waits for what is on `first`. The host waits for neither.
inline void put_in_order(int device, void* first, void* then) {
  static const auto get_device = cuda_function<int (*)(int*)>("cudaGetDevice");
  static const auto set_device = cuda_function<int (*)(int)>("cudaSetDevice");
  static const auto create = cuda_function<int (*)(void**, unsigned)>("cudaEventCreateWithFlags");
  static const auto record = cuda_function<int (*)(void*, void*)>("cudaEventRecord");
  static const auto wait = cuda_function<int (*)(void*, void*, unsigned)>("cudaStreamWaitEvent");
  static const auto destroy = cuda_function<int (*)(void*)>("cudaEventDestroy");
  if (get_device == nullptr || set_device == nullptr || create == nullptr || record == nullptr || wait == nullptr ||
      destroy == nullptr) {
    throw Error(PYKD_UNAVAILABLE,
                "expected the CUDA runtime of libtorch_cuda for work on a stream that is not torch's "
                "current one, got none in this process; load the loss without cuda_stream, or make that "
                "stream the current one");
  }
  constexpr unsigned kDisableTiming = 2;
  int before = device;
  void* event = nullptr;
  int error = get_device(&before);
  if (error == 0 && before != device) error = set_device(device);  // an event belongs to a device
  if (error == 0) error = create(&event, kDisableTiming);
  if (error == 0) error = record(event, first);
  if (error == 0) error = wait(then, event, 0);
  if (event != nullptr) destroy(event);  // as soon as it has come
  if (before != device) set_device(before);
  if (error == 0) return;
  throw Error(PYKD_ENGINE_FAILURE, "expected CUDA to put two streams in order, got its error " + std::to_string(error) +
                                       "; is cuda_stream a stream of cuda:" + std::to_string(device) +
                                       ", and still there?");
}

// Runs `body`, which queues work on `stream`: after what torch has queued on its current stream, and
// before what torch queues there from now on.
template <class Body>
void on_stream(int device, void* stream, const Body& body) {
  void* const current = current_cuda_stream(device);
  if (is_same_stream(stream, current)) return body();
  put_in_order(device, current, stream);
  body();
  put_in_order(device, stream, current);
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
