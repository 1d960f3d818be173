#include "runtime/engines/onnxruntime_library.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/fork.h"
#include "kernels/host/hooks.h"
#include "ops/onnxruntime/custom_ops.h"

namespace pykd::internal {
namespace {

constexpr char kInstall[] =
    "install ONNX Runtime 1.21 or newer (pip install onnxruntime, in the environment in which pykd lies), or set "
    "PYKD_ONNXRUNTIME_LIBRARY, or onnxruntime_library in the load options, to its libonnxruntime.so";

[[noreturn]] void unavailable(const std::string& got) {
  fail(PYKD_UNAVAILABLE, "libonnxruntime.so for the engine \"onnxruntime\"", got, kInstall);
}

// A library prints nothing: what ONNX Runtime has to say comes with its status, and reaches hosts with a log.
void ORT_API_CALL forward_log(void*, OrtLoggingLevel severity, const char*, const char*, const char*,
                              const char* message) {
  const pykd_log_level level = severity >= ORT_LOGGING_LEVEL_ERROR     ? PYKD_LOG_ERROR
                               : severity >= ORT_LOGGING_LEVEL_WARNING ? PYKD_LOG_WARNING
                                                                       : PYKD_LOG_INFO;
  kernels::log(level, std::string("onnxruntime: ") + message);
}

// Whether it is an ONNX Runtime that can be used.
OnnxRuntime start(SharedLibrary library, const std::string& name) {
  OnnxRuntime runtime;
  runtime.library = std::move(library);
  const auto get_base = reinterpret_cast<const OrtApiBase*(ORT_API_CALL*)()>(runtime.library.symbol("OrtGetApiBase"));
  if (get_base == nullptr) unavailable(name + ", which has no function OrtGetApiBase");
  const OrtApiBase* base = get_base();
  runtime.path = library_path_of(base);
  runtime.version = base->GetVersionString();
  if (is_new_enough(runtime.version)) runtime.api = base->GetApi(kOrtApiVersion);
  if (runtime.api == nullptr) {
    fail(PYKD_UNAVAILABLE, "ONNX Runtime 1.21 or newer", "ONNX Runtime " + runtime.version + " at " + runtime.path,
         kInstall);
  }
  const OrtLoggingLevel level = kernels::hooks().log == nullptr ? ORT_LOGGING_LEVEL_FATAL : ORT_LOGGING_LEVEL_WARNING;
  // Telemetry is a thread that sends usage home, in builds that have it: none of a library's business. Nor does a child
  // of fork() get past it at its end. Who sets the variable decides.
  ::setenv("ORT_DISABLE_TELEMETRY", "1", /*overwrite=*/0);
  OrtStatus* status = runtime.api->CreateEnvWithCustomLogger(forward_log, nullptr, level, "pykd", &runtime.env);
  if (status != nullptr) unavailable(take_message(*runtime.api, status));
  return runtime;
}

// ---- A library that somebody named -------------------------------------------------------------

struct Name {
  std::string path;
  const char* who = "";
};

Name name_of(const std::string& in_options) {
  if (!in_options.empty()) return {in_options, "the load options"};
  return {environment("PYKD_ONNXRUNTIME_LIBRARY"), "PYKD_ONNXRUNTIME_LIBRARY"};
}

OnnxRuntime open_named(const Name& name) {
  SharedLibrary library;
  if (!library.open(name.path)) unavailable(library.error() + " (named by " + name.who + ")");
  return start(library, name.path);
}

// ---- The search --------------------------------------------------------------------------------

// The numbers in "libonnxruntime.so.1.32.0".
std::vector<long> version_in(const std::string& file) {
  std::vector<long> numbers;
  for (std::size_t i = 0; i < file.size(); ++i) {
    if (file[i] == '.') numbers.push_back(0);
    if (file[i] >= '0' && file[i] <= '9' && !numbers.empty()) {
      numbers.back() = std::min(numbers.back() * 10 + (file[i] - '0'), 1000000L);
    }
  }
  return numbers;
}

// The newest libonnxruntime.so* in a folder; empty where there is none.
std::string newest_in(const std::filesystem::path& folder) {
  std::error_code error;
  std::string newest;
  for (std::filesystem::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    const std::string file = entry->path().filename().string();
    const std::string_view prefix = "libonnxruntime.so";
    if (file.compare(0, prefix.size(), prefix) != 0) continue;
    if (file.size() > prefix.size() && file[prefix.size()] != '.') continue;
    if (newest.empty() || version_in(newest) < version_in(file)) newest = file;
  }
  return newest.empty() ? "" : (folder / newest).string();
}

// Where a library may lie, in the order of pykd_load(): the first that can be used is the one, and what was passed over
// is told where none can.
OnnxRuntime search() {
  std::string passed_over;
  const auto reject = [&](const std::string& reason) { passed_over += (passed_over.empty() ? "" : "; ") + reason; };
  const auto try_to_start = [&](const SharedLibrary& library, const std::string& path, OnnxRuntime& runtime) {
    try {
      runtime = start(library, path);
      return true;
    } catch (const Failure& failure) {
      reject(failure.what());
      return false;
    }
  };
  OnnxRuntime runtime;
  SharedLibrary library;

  const std::string loaded = find_loaded_library("libonnxruntime.so");
  if (loaded.empty()) {
    reject("this process has loaded none");
  } else if (library.open_loaded(loaded) && try_to_start(library, loaded, runtime)) {
    return runtime;
  }

  // The address of a hidden function: that of an exported one may lie in the program that links us.
  const std::filesystem::path self =
      std::filesystem::absolute(library_path_of(reinterpret_cast<const void*>(&open_onnxruntime))).lexically_normal();
  const std::filesystem::path here = self.parent_path();
  const std::filesystem::path wheel = here.parent_path().parent_path() / "onnxruntime" / "capi";  // by pykd/lib
  for (const std::filesystem::path& folder : {here, wheel}) {
    const std::string path = newest_in(folder);
    if (path.empty()) {
      reject("none lies in " + folder.string());
    } else if (!library.open(path)) {
      reject(library.error());
    } else if (try_to_start(library, path, runtime)) {
      return runtime;
    }
  }

  for (const char* name : {"libonnxruntime.so", "libonnxruntime.so.1"}) {
    if (!library.open(name)) {
      reject("the dynamic linker says: " + library.error());
    } else if (try_to_start(library, name, runtime)) {
      return runtime;
    }
  }
  unavailable("none: the load options and PYKD_ONNXRUNTIME_LIBRARY name none; " + passed_over);
}

}  // namespace

const OnnxRuntime& open_onnxruntime(const std::string& named) {
  static StaticMutex& mutex = *new StaticMutex;
  static const OnnxRuntime* opened = nullptr;  // never freed: sessions may outlive static destructors
  const std::lock_guard<StaticMutex> lock(mutex);
  const Name name = name_of(named);
  if (opened == nullptr) {
    opened = new OnnxRuntime(name.path.empty() ? search() : open_named(name));
  } else if (!name.path.empty()) {
    SharedLibrary wanted;
    if (!wanted.open_loaded(name.path) || !(wanted == opened->library)) {
      fail(PYKD_UNAVAILABLE, name.path + ", which " + name.who + " name" + (named.empty() ? "s" : ""),
           opened->path + ", which this process uses already", "name one ONNX Runtime per process");
    }
  }
  return *opened;
}

std::string take_message(const OrtApi& api, OrtStatus* status) {
  std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  return message;
}

}  // namespace pykd::internal
