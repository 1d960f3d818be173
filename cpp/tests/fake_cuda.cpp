// Stand-ins for libpykd_cuda, so that opening it, its version check and a call through its table are tested without
// CUDA. FAKE says which one this is.
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>

#include "kernels/cuda/interface.h"

#define FAKE_GOOD 1
#define FAKE_OTHER_VERSION 2
#define FAKE_REFUSING 3
#define FAKE_EMPTY 4
#define FAKE_HALF 5

#if FAKE != FAKE_EMPTY && FAKE != FAKE_HALF
namespace pykd::kernels {
namespace {

// Of the last launch, to be looked at from outside.
struct Record {
  int device;
  void* stream;
} record = {-1, nullptr};

// As cudaSetDevice() would: contexts 100, 101, …, where a test has the driver's stand-in (fake_libcuda.c) loaded.
void make_current(int device) {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  if (driver == nullptr) return;
  const auto set = reinterpret_cast<int (*)(void*)>(dlsym(driver, "cuCtxSetCurrent"));
  if (set != nullptr) set(reinterpret_cast<void*>(static_cast<std::uintptr_t>(100 + device)));
}

// values[0][b] = number * sum of row b of inputs[0]; the "device" is the host.
const char* launch_row_sums(const Call& call, int device, void* stream) {
  record = {device, stream};
  make_current(device);
  if (call.dtype != PYKD_FLOAT32) return "the fake kernel takes float32 alone";
  const Array& x = call.inputs[0];
  for (std::int64_t b = 0; b < x.length(0); ++b) {
    float sum = 0.0f;
    for (std::int64_t j = 0; j < x.length(1); ++j) sum += x.as<const float>()[b * x.length(1) + j];
    call.outputs[0].as<float>()[b] = call.number(1) * sum;
  }
  return nullptr;
}

const char* launch_other(const Call&, int, void*) { return "not this one"; }

// Refuses as long as the environment says so: what is unusable now may be usable at the next call.
const char* unusable() {
  if (FAKE != FAKE_REFUSING) return nullptr;
  return std::getenv("FAKE_CUDA_AWAKE") == nullptr ? "the fake device is asleep" : nullptr;
}

}  // namespace
}  // namespace pykd::kernels

extern "C" PYKD_API pykd::kernels::Record* fake_cuda_record(void) { return &pykd::kernels::record; }
#endif

#if FAKE != FAKE_EMPTY
std::uint32_t pykd_cuda_interface_version(void) {
  return pykd::kernels::kCudaInterfaceVersion + (FAKE == FAKE_OTHER_VERSION ? 41 : 0);
}
#endif

#if FAKE != FAKE_EMPTY && FAKE != FAKE_HALF
const pykd::kernels::CudaInterface* pykd_cuda_interface(void) {
  using namespace pykd::kernels;
  if (FAKE == FAKE_OTHER_VERSION) std::abort();  // whatever it returns, another version means something else by it
  static const CudaKernel kernels[] = {{"other", launch_other}, {"row_sums", launch_row_sums}};
  static const CudaInterface interface = {kernels, 2, &unusable};
  return &interface;
}
#endif
