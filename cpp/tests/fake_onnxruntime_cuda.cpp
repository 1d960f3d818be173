// ONNX Runtime with a stand-in for its CUDA provider. All the work is done by the library at
// PYKD_TEST_REAL_ONNXRUNTIME, on the CPU; the device's memory is the host's. It writes down what pykd says to the
// provider, and, as the provider does, leaves the device of a session current on the thread.
#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <cstdint>
#include <cstdlib>
#include <string>

#define FAKE_API extern "C" __attribute__((visibility("default")))

namespace {

std::string provider, last_run;  // what was said to the last provider, and in the last run
const OrtApi* real = nullptr;

void note(std::string& log, const std::string& text) { log += (log.empty() ? "" : ", ") + text; }

// As cudaSetDevice() would: contexts 100, 101, …
void make_current(std::uintptr_t device) {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  if (driver == nullptr) return;
  const auto set = reinterpret_cast<int (*)(void*)>(dlsym(driver, "cuCtxSetCurrent"));
  if (set != nullptr) set(reinterpret_cast<void*>(100 + device));
}

int the_options = 0;

OrtStatus* ORT_API_CALL create_options(OrtCUDAProviderOptionsV2** options) noexcept {
  provider.clear();
  *options = reinterpret_cast<OrtCUDAProviderOptionsV2*>(&the_options);
  return nullptr;
}
void ORT_API_CALL release_options(OrtCUDAProviderOptionsV2*) noexcept {}

OrtStatus* ORT_API_CALL update_options(OrtCUDAProviderOptionsV2*, const char* const* keys, const char* const* values,
                                       std::size_t count) noexcept {
  for (std::size_t i = 0; i < count; ++i) note(provider, std::string(keys[i]) + "=" + values[i]);
  return nullptr;
}
OrtStatus* ORT_API_CALL update_option(OrtCUDAProviderOptionsV2*, const char* key, void* value) noexcept {
  note(provider, std::string(key) + "=" + std::to_string(reinterpret_cast<std::uintptr_t>(value)));
  return nullptr;
}
OrtStatus* ORT_API_CALL append_provider(OrtSessionOptions*, const OrtCUDAProviderOptionsV2*) noexcept {
  return nullptr;
}

OrtStatus* ORT_API_CALL create_memory_info(const char* name, OrtAllocatorType type, int id, OrtMemType mem_type,
                                           OrtMemoryInfo** info) noexcept {
  const bool cuda = std::string(name) == "Cuda";
  return real->CreateMemoryInfo(cuda ? "Cpu" : name, type, cuda ? 0 : id, mem_type, info);
}

// What ONNX Runtime says of memory that it does not get, where the test asks for it.
OrtStatus* lack_of_memory(const char* variable) {
  if (std::getenv(variable) == nullptr) return nullptr;
  return real->CreateStatus(ORT_RUNTIME_EXCEPTION, "Failed to allocate memory for requested buffer of size 4096");
}

OrtStatus* ORT_API_CALL create_session(const OrtEnv* env, const void* bytes, std::size_t size,
                                       const OrtSessionOptions* options, OrtSession** session) noexcept {
  make_current(1);
  if (OrtStatus* lack = lack_of_memory("PYKD_TEST_NO_MEMORY_TO_LOAD")) return lack;
  return real->CreateSessionFromArray(env, bytes, size, options, session);
}
void ORT_API_CALL release_session(OrtSession* session) noexcept {
  make_current(1);
  real->ReleaseSession(session);
}

OrtStatus* ORT_API_CALL run(OrtSession* session, const OrtRunOptions* options, const char* const* input_names,
                            const OrtValue* const* inputs, std::size_t num_inputs, const char* const* output_names,
                            std::size_t num_outputs, OrtValue** outputs) noexcept {
  last_run.clear();
  for (std::size_t i = 0; i < num_inputs; ++i) note(last_run, input_names[i]);
  note(last_run, options == nullptr ? "waits" : "does not wait");
  make_current(1);
  if (OrtStatus* lack = lack_of_memory("PYKD_TEST_NO_MEMORY_TO_RUN")) return lack;
  return real->Run(session, options, input_names, inputs, num_inputs, output_names, num_outputs, outputs);
}

const OrtApi* ORT_API_CALL get_api(std::uint32_t version) noexcept {
  static OrtApi changed;
  const auto base = reinterpret_cast<const OrtApiBase* (*)()>(
      dlsym(dlopen(std::getenv("PYKD_TEST_REAL_ONNXRUNTIME"), RTLD_NOW), "OrtGetApiBase"));
  if (base == nullptr || version > ORT_API_VERSION) return nullptr;
  real = base()->GetApi(ORT_API_VERSION);
  changed = *real;
  changed.CreateCUDAProviderOptions = create_options;
  changed.ReleaseCUDAProviderOptions = release_options;
  changed.UpdateCUDAProviderOptions = update_options;
  changed.UpdateCUDAProviderOptionsWithValue = update_option;
  changed.SessionOptionsAppendExecutionProvider_CUDA_V2 = append_provider;
  changed.CreateMemoryInfo = create_memory_info;
  changed.CreateSessionFromArray = create_session;
  changed.ReleaseSession = release_session;
  changed.Run = run;
  return &changed;
}

const char* ORT_API_CALL get_version() noexcept { return "1.21.0"; }

}  // namespace

FAKE_API const char* fake_provider() { return provider.c_str(); }
FAKE_API const char* fake_last_run() { return last_run.c_str(); }
FAKE_API const OrtApiBase* OrtGetApiBase() noexcept {
  static const OrtApiBase base = {get_api, get_version};
  return &base;
}
