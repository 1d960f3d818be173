// A stand-in for libtorch_cuda and the CUDA runtime behind it, as far as pykd's headers speak to them: torch's current
// stream, and events between streams. It writes down what is asked of it.
#include <cstdint>
#include <string>

#define FAKE_API extern "C" __attribute__((visibility("default")))

namespace {

std::string calls;
void* current_stream = nullptr;
int current_device = 0, created = 0, destroyed = 0, failing = 0;

void note(const std::string& text) { calls += (calls.empty() ? "" : ", ") + text; }
std::string name_of(const void* stream) { return std::to_string(reinterpret_cast<std::uintptr_t>(stream)); }

}  // namespace

// ---- For tests ----------------------------------------------------------------------------------------

FAKE_API const char* fake_calls() { return calls.c_str(); }
FAKE_API void fake_note(const char* text) { note(text); }
FAKE_API void fake_reset(void* stream, int device, int failing_call) {
  calls.clear();
  current_stream = stream;
  current_device = device;
  created = destroyed = 0;
  failing = failing_call;
}
FAKE_API int fake_leaked_events() { return created - destroyed; }
FAKE_API int fake_current_device() { return current_device; }

// ---- What the headers ask for -------------------------------------------------------------------------

FAKE_API std::int32_t aoti_torch_get_current_cuda_stream(std::int32_t, void** stream) {
  *stream = current_stream;
  return 0;
}
FAKE_API int cudaGetDevice(int* device) {
  *device = current_device;
  return 0;
}
FAKE_API int cudaSetDevice(int device) {
  current_device = device;
  return 0;
}
FAKE_API int cudaEventCreateWithFlags(void** event, unsigned flags) {
  if (flags != 2) return 1;  // cudaEventDisableTiming
  ++created;
  *event = &created;
  return 0;
}
FAKE_API int cudaEventRecord(void*, void* stream) {
  note("record " + name_of(stream) + " on cuda:" + std::to_string(current_device));
  return failing == 1 ? 700 : 0;
}
FAKE_API int cudaStreamWaitEvent(void* stream, void*, unsigned) {
  note("wait " + name_of(stream));
  return 0;
}
FAKE_API int cudaEventDestroy(void*) {
  ++destroyed;
  return 0;
}
