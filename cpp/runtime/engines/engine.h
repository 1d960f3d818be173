// File: runtime/engines/engine.h
//
// What libpykd asks of an engine. An engine opens the bytes of one artefact and runs it on tensors
// that have been checked against the signature already. ONNX Runtime's engine lives in libpykd
// (runtime/engines/onnxruntime.cpp); TorchScript's lives in libpykd_torch, which is opened on demand and
// hands over its Engine through the two functions at the end of this file.
#ifndef PYKD_RUNTIME_ENGINES_ENGINE_H_
#define PYKD_RUNTIME_ENGINES_ENGINE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/device.h"
#include "pykd/pykd.h"

namespace pykd::internal {

struct Signature;  // runtime/signature/signature.h

// What an engine needs to know of pykd_load_options.
struct EngineOptions {
  Device device;
  int threads = 0;
  void* cuda_stream = nullptr;
  std::string library;   // of the engine, where the user named one
  bool kernels = false;  // ONNX files: register the ops of pykd's kernels
  // Merged scorers: the file to open in place of bytes, beside which weights may lie; and that they are models, which
  // an engine may prepare as it likes.
  std::string model_path;
  bool whole_models = false;
};

// One call. Inputs and parameters follow the order of the signature; all have passed the checks.
struct Request {
  std::vector<pykd_tensor> inputs;
  std::vector<double> parameters;       // defaults filled in
  std::vector<pykd_tensor> outputs;     // those asked for, any order
  std::vector<std::size_t> output_ids;  // their indices among the signature's outputs
};

// An opened artefact. run() may be called from many threads at once. It throws
// pykd::internal::Failure (base/error.h) or any std::exception, whose text then reaches the user as
// PYKD_ENGINE_FAILURE.
class Session {
 public:
  Session() = default;
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  virtual ~Session() = default;
  virtual void run(const Request& request) const = 0;
};

class Engine {
 public:
  Engine() = default;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  virtual ~Engine() = default;

  // Such as "1.32.0" or "2.13.0".
  virtual std::string version() const = 0;

  // The pykd metadata inside the artefact: JSON. Throws Failure(PYKD_BAD_ARTEFACT) where there is
  // none.
  virtual std::string metadata(const void* bytes, std::size_t size) = 0;

  // `signature` is that metadata, parsed; it outlives the session. Where the options have a path, there are no bytes.
  virtual std::unique_ptr<Session> open(const void* bytes, std::size_t size, const Signature& signature,
                                        const EngineOptions& options) = 0;
};

}  // namespace pykd::internal

// The handshake with libpykd_torch. The number grows with every change of this file; libpykd opens
// the library, compares, and only then asks for the engine, which lives until the process ends.
#define PYKD_ENGINE_INTERFACE_VERSION 4u
extern "C" {
PYKD_API std::uint32_t pykd_torch_interface_version(void);
// Throws nothing; nullptr with a message in `error` (at most `size` characters) where torch cannot
// be used.
PYKD_API pykd::internal::Engine* pykd_torch_engine(char* error, std::size_t size);
}

#endif  // PYKD_RUNTIME_ENGINES_ENGINE_H_
