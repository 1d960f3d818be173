#include "kernels/cuda/context.h"

#include "base/shared_library.h"

namespace pykd::internal {
namespace {

// Two functions of the CUDA driver; both return 0 where all is well.
struct Driver {
  int (*get_current)(void** context) = nullptr;
  int (*set_current)(void* context) = nullptr;
};

const Driver& driver() {
  static const Driver found = [] {
    Driver driver;
    SharedLibrary library;
    if (!library.open("libcuda.so.1")) return driver;
    driver.get_current = reinterpret_cast<int (*)(void**)>(library.symbol("cuCtxGetCurrent"));
    driver.set_current = reinterpret_cast<int (*)(void*)>(library.symbol("cuCtxSetCurrent"));
    return driver;
  }();
  return found;
}

}  // namespace

KeptCudaContext::KeptCudaContext(const Device& device) {
  if (device.kind != PYKD_CUDA || driver().get_current == nullptr || driver().set_current == nullptr) return;
  known_ = true;
  if (driver().get_current(&context_) != 0) context_ = nullptr;  // the driver is not initialised yet: no context either
}

KeptCudaContext::~KeptCudaContext() {
  // NOLINTNEXTLINE(clang-analyzer-core.CallAndMessage): where known_ is true, it is there
  if (known_) driver().set_current(context_);
}

}  // namespace pykd::internal
