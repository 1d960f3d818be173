// File: runtime/engines/onnxruntime_library.h
//
// Finds and opens ONNX Runtime, in the order that pykd_load() promises. It is opened with dlopen and
// spoken to through its C interface of version 21, so that libpykd links no ONNX Runtime and runs
// with every release from 1.21.
#ifndef PYKD_RUNTIME_ENGINES_ONNXRUNTIME_LIBRARY_H_
#define PYKD_RUNTIME_ENGINES_ONNXRUNTIME_LIBRARY_H_

#include <onnxruntime_c_api.h>

#include <string>

#include "base/shared_library.h"

namespace pykd::internal {

// One ONNX Runtime, opened once per process and never closed.
struct OnnxRuntime {
  SharedLibrary library;
  std::string path;
  std::string version;
  const OrtApi* api = nullptr;
  OrtEnv* env = nullptr;
};

// `named` is the path in the load options, or empty. Throws Failure(PYKD_UNAVAILABLE) where there is
// none that can be used, or where the process uses another one than the one that is named.
const OnnxRuntime& open_onnxruntime(const std::string& named);

// The text of a status, which it releases.
std::string take_message(const OrtApi& api, OrtStatus* status);

}  // namespace pykd::internal

#endif  // PYKD_RUNTIME_ENGINES_ONNXRUNTIME_LIBRARY_H_
