#include "kernels/cuda/loader.h"

#include <filesystem>
#include <mutex>

#include "base/error.h"
#include "base/shared_library.h"

namespace pykd::kernels {
namespace {

using internal::environment;
using internal::fail;
using internal::in_quotes;
using internal::library_path_of;
using internal::SharedLibrary;

struct CudaLibrary {
  std::string path;
  const CudaInterface* interface = nullptr;
  bool usable = false;  // found out once; "unusable" is asked again, because the user may have changed something
};

std::string default_path() {
  // The address of a hidden function: that of an exported one may lie in the program that links us.
  const std::filesystem::path self = library_path_of(reinterpret_cast<const void*>(&find_cuda_kernel));
  return (self.parent_path() / "libpykd_cuda.so").string();
}

[[noreturn]] void unavailable(const std::string& expected, const std::string& got, const std::string& remedy) {
  fail(PYKD_UNAVAILABLE, expected + " for kernels on CUDA", got, remedy);
}

// Absent, not loadable, not ours, of another version: four things a user does different things about.
CudaLibrary open_cuda_library() {
  CudaLibrary result;
  const std::string named = environment("PYKD_CUDA_LIBRARY");
  result.path = named.empty() ? default_path() : named;
  std::error_code error;
  const bool is_path = result.path.find('/') != std::string::npos;
  if (is_path && !std::filesystem::exists(result.path, error)) {
    unavailable("the library libpykd_cuda.so", "no file at " + result.path,
                "build pykd where nvcc is (PYKD_CUDA=ON), or name the library in the environment variable "
                "PYKD_CUDA_LIBRARY");
  }
  SharedLibrary library;
  if (!library.open(result.path)) {
    unavailable("to open " + result.path, library.error(), "build libpykd_cuda on this kind of machine");
  }
  const auto interface_version =
      reinterpret_cast<decltype(&pykd_cuda_interface_version)>(library.symbol("pykd_cuda_interface_version"));
  if (interface_version == nullptr) {
    unavailable("a libpykd_cuda at " + result.path, "a library without the function pykd_cuda_interface_version",
                "name another in the environment variable PYKD_CUDA_LIBRARY");
  }
  const std::uint32_t version = interface_version();
  if (version != kCudaInterfaceVersion) {
    unavailable("interface version " + std::to_string(kCudaInterfaceVersion) + " of " + result.path,
                "version " + std::to_string(version), "use libpykd and libpykd_cuda of one build");
  }
  const auto interface = reinterpret_cast<decltype(&pykd_cuda_interface)>(library.symbol("pykd_cuda_interface"));
  result.interface = interface == nullptr ? nullptr : interface();
  if (result.interface == nullptr) {
    unavailable("a whole libpykd_cuda at " + result.path, "a library without the function pykd_cuda_interface",
                "use libpykd and libpykd_cuda of one build");
  }
  return result;
}

const CudaLibrary& usable_cuda_library() {
  static std::mutex mutex;
  static CudaLibrary* opened = nullptr;  // never freed: its kernels live until the process ends
  const std::lock_guard<std::mutex> lock(mutex);
  if (opened == nullptr) opened = new CudaLibrary(open_cuda_library());
  if (!opened->usable) {
    if (const char* reason = opened->interface->unusable()) {
      unavailable("a CUDA device", reason, "run on the CPU, or make a device and its driver visible to this process");
    }
    opened->usable = true;
  }
  return *opened;
}

}  // namespace

const CudaKernel* find_cuda_kernel(const std::string& name) {
  const CudaLibrary& library = usable_cuda_library();
  std::string names;
  for (std::size_t i = 0; i < library.interface->count; ++i) {
    const CudaKernel& kernel = library.interface->kernels[i];
    if (name == kernel.name) return &kernel;
    names += (i == 0 ? "" : ", ") + std::string(kernel.name);
  }
  unavailable("the kernel " + in_quotes(name), library.path + " with " + (names.empty() ? "none" : names),
              "run it on the CPU");
}

std::string cuda_status() {
  try {
    usable_cuda_library();
    return "usable";
  } catch (const internal::Failure& failure) {
    return failure.what();
  }
}

}  // namespace pykd::kernels
