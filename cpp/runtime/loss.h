// File: runtime/loss.h
//
// A loaded loss: the thing behind pykd_loss. It joins the files of an artefact, the engine that
// runs them and the checks of a call.
#ifndef PYKD_RUNTIME_LOSS_H_
#define PYKD_RUNTIME_LOSS_H_

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/artefact/files.h"
#include "runtime/engines/engine.h"
#include "runtime/signature/call.h"
#include "runtime/signature/signature.h"

namespace pykd::internal {

enum class KernelUse { kAuto, kOn, kOff };

// pykd_load_options, checked.
struct LoadOptions {
  std::string engine;          // empty: whichever is there
  std::string device = "cpu";  // as it was asked for
  std::string onnxruntime_library;
  std::string torch_library;
  bool skip_integrity_check = false;
  bool trust_merged = false;
  KernelUse kernels = KernelUse::kAuto;
  EngineOptions engine_options;
};

// Throws Failure(PYKD_INVALID_VALUE) for settings that make no sense. `options` may be nullptr.
LoadOptions read_options(const pykd_load_options* options);

class Loss {
 public:
  // Chooses the engine as pykd_load() documents, reads its files and opens them with it.
  static std::unique_ptr<Loss> load(Artefact& artefact, const LoadOptions& options);

  const Signature& signature() const { return signature_; }
  const std::string& engine() const { return engine_; }
  const std::string& engine_version() const { return engine_version_; }
  const std::string& device_name() const { return device_name_; }
  const std::string& kernels() const { return kernels_; }
  const std::string& passed_over() const { return passed_over_; }
  // False in a child of fork(), where its threads are not: it must not be destroyed there.
  bool of_this_process() const;

  const Device& device() const { return device_; }
  Binding check_inputs(const pykd_tensor* inputs, std::size_t num_inputs, std::vector<pykd_tensor>& ordered,
                       LabelCheck labels = LabelCheck::kRange) const;
  void run(const pykd_tensor* inputs, std::size_t num_inputs, const pykd_parameter* parameters,
           std::size_t num_parameters, const pykd_tensor* outputs, std::size_t num_outputs) const;

 private:
  // One opened file. The maps translate this loss's parameters and outputs into the file's, whose
  // signature may have fewer of them.
  struct Part {
    Signature signature;
    std::unique_ptr<Session> session;
    std::vector<std::size_t> parameters;  // by the file's parameter: the loss's
    std::vector<std::size_t> outputs;     // by the loss's output: the file's, or kNone
  };

  Loss(const LoadOptions& options, std::string engine);
  static std::unique_ptr<Loss> load_onnx(Artefact& artefact, const LoadOptions& options);
  static std::unique_ptr<Loss> load_torchscript(Artefact& artefact, const LoadOptions& options);
  static std::unique_ptr<Loss> load_merged(MergedFile& file, const LoadOptions& options);

  // `bytes` of an artefact that messages call `label`; none where the options have a path.
  void add_part(Engine& engine, const std::string& label, std::string_view bytes, Signature signature,
                const EngineOptions& options);
  void connect_parts();
  void check_process() const;
  bool wants_gradient(const Request& request) const;
  void run_part(const Part& part, const Request& request) const;

  Signature signature_;
  Device device_;
  unsigned generation_;  // fork_generation() when it was loaded
  bool has_threads_;     // of its own, or work on a device, which a child of fork() does not inherit
  std::string engine_, engine_version_, device_name_, kernels_, passed_over_;
  // One part; or two, of which the first has the values alone. The last has all of signature_.
  std::vector<std::unique_ptr<Part>> parts_;
};

}  // namespace pykd::internal

#endif  // PYKD_RUNTIME_LOSS_H_
