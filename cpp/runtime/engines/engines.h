// File: runtime/engines/engines.h
//
// The engines, opened on demand. Each is opened once per process and stays open; a failure to open
// one is not remembered, so that the next load tries again.
#ifndef PYKD_RUNTIME_ENGINES_ENGINES_H_
#define PYKD_RUNTIME_ENGINES_ENGINES_H_

#include <string>

#include "runtime/engines/engine.h"

namespace pykd::internal {

// `library` is the path that the user named, or empty for the search that pykd.h describes. Throws
// Failure(PYKD_UNAVAILABLE) where the engine cannot be had, or where the process uses another
// library for it already.
Engine& onnxruntime_engine(const std::string& library);  // onnxruntime.cpp
Engine& torchscript_engine(const std::string& library);  // torch_library.cpp

}  // namespace pykd::internal

#endif  // PYKD_RUNTIME_ENGINES_ENGINES_H_
