#include "runtime/loss.h"

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <new>
#include <set>
#include <system_error>

#include "base/error.h"
#include "base/fork.h"
#include "base/shared_library.h"
#include "base/struct_size.h"
#include "ops/onnxruntime/custom_ops.h"
#include "runtime/artefact/checksum.h"
#include "runtime/artefact/merged_scan.h"
#include "runtime/artefact/onnx_scan.h"
#include "runtime/engines/engines.h"
#include "runtime/signature/metadata.h"

namespace pykd::internal {
namespace {

// ---- Options -----------------------------------------------------------------------------------

Device parse_device(const std::string& text) {
  if (text == "cpu") return {PYKD_CPU, 0};
  if (text == "cuda") return {PYKD_CUDA, 0};
  const std::string digits = text.rfind("cuda:", 0) == 0 ? text.substr(5) : "";
  const bool is_number = !digits.empty() && digits.size() <= 4 &&
                         std::all_of(digits.begin(), digits.end(), [](char c) { return c >= '0' && c <= '9'; });
  if (!is_number) {
    fail(PYKD_INVALID_VALUE, "\"cpu\", \"cuda\" or \"cuda:<id>\" as the device", in_quotes(text),
         "correct the load options");
  }
  return {PYKD_CUDA, std::stoi(digits)};
}

void check_engine_name(const std::string& engine) {
  if (engine.empty() || engine == "onnxruntime" || engine == "torchscript") return;
  fail(PYKD_INVALID_VALUE, "\"onnxruntime\" or \"torchscript\" as the engine", in_quotes(engine),
       "correct the load options, or leave the engine out to take whichever is there");
}

// The engine that the options ask for, by its name or by that of its library; empty where either will do.
std::string wanted_engine(const LoadOptions& options) {
  if (!options.engine.empty()) return options.engine;
  const bool onnxruntime = !options.onnxruntime_library.empty(), torch = !options.torch_library.empty();
  if (onnxruntime == torch) return "";
  return onnxruntime ? "onnxruntime" : "torchscript";
}

pykd_load_options copy_options(const pykd_load_options& given) {
  const pykd_load_options defaults = PYKD_LOAD_OPTIONS_INIT;
  pykd_load_options copy =
      copy_sized(given, defaults, offsetof(pykd_load_options, trust_merged), "load options", "PYKD_LOAD_OPTIONS_INIT");
  if (copy.abi_version != PYKD_ABI_VERSION) {
    fail(PYKD_UNAVAILABLE,
         "a program built for version " + std::to_string(PYKD_ABI_VERSION) + " of libpykd's interface",
         "load options of version " + std::to_string(copy.abi_version),
         "build it with the headers of this library, and start from PYKD_LOAD_OPTIONS_INIT");
  }
  return copy;
}

KernelUse parse_kernels(const std::string& text) {
  if (text == "auto") return KernelUse::kAuto;
  if (text == "on") return KernelUse::kOn;
  if (text == "off") return KernelUse::kOff;
  fail(PYKD_INVALID_VALUE, "\"auto\", \"on\" or \"off\" for kernels", in_quotes(text), "correct the load options");
}

std::string text_or(const char* text, const char* otherwise) { return text == nullptr ? otherwise : text; }

// ---- Engines -----------------------------------------------------------------------------------

// What an engine throws while it opens a file; its own words reach the user.
template <class Body>
auto opening(const std::string& label, Body&& body) -> decltype(body()) {
  try {
    return body();
  } catch (const Failure& failure) {
    throw Failure(failure.status(), label + ": " + failure.what());
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& error) {
    fail(PYKD_BAD_ARTEFACT, "a file that its engine can open at " + label, error.what(), "export the loss again");
  }
}

void run_session(const Session& session, const Request& request) {
  try {
    session.run(request);
  } catch (const Failure&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& error) {
    throw Failure(PYKD_ENGINE_FAILURE, error.what());
  } catch (...) {
    throw Failure(PYKD_ENGINE_FAILURE, "the engine threw an exception of unknown type");
  }
}

void check_integrity(const ArtefactFile& file, const LoadOptions& options) {
  if (!options.skip_integrity_check) check_integrity(file);
}

void check_kind(const ArtefactFile& file, const Signature& signature, ArtefactKind expected) {
  if (signature.kind != expected) {
    fail(PYKD_BAD_ARTEFACT, "the kind of " + file.label + " to be that of its name", "another kind",
         "export the loss again");
  }
}

// A file that was copied into the folder of another export passes every check of its own.
void check_membership(const Artefact& artefact, const ArtefactFile& file, const Signature& signature) {
  if (artefact.folder.empty()) return;
  const std::string id = parse_manifest(artefact.manifest).export_id;
  if (signature.export_id == id) return;
  fail(PYKD_BAD_ARTEFACT, file.label + " of the export " + in_quotes(id) + ", as manifest.json beside it says",
       "one of " + in_quotes(signature.export_id), "copy the whole folder, or export the loss again");
}

template <class Specs>
std::size_t index_of(const Specs& specs, const std::string& name) {
  for (std::size_t i = 0; i < specs.size(); ++i) {
    if (specs[i].name == name) return i;
  }
  return kNone;
}

// ---- Kernels -----------------------------------------------------------------------------------

[[noreturn]] void no_kernels(const std::string& expected, const std::string& got) {
  fail(PYKD_UNAVAILABLE, expected + ", as kernels \"on\" asks for", got, "load it with kernels \"auto\" or \"off\"");
}

// The ops that a session on that device can have: none, and the reason in `passed_over`, where its library cannot be
// had. That is an error to those who ask for kernels, or name the library.
std::set<std::string> available_ops(const LoadOptions& options, std::string& passed_over) {
  if (options.kernels == KernelUse::kOff) return {};
  try {
    const std::vector<std::string>& ops = kernel_ops(options.engine_options.device);
    return {ops.begin(), ops.end()};
  } catch (const Failure& failure) {
    const bool asked_for = options.kernels == KernelUse::kOn || !environment("PYKD_CUDA_LIBRARY").empty();
    if (asked_for || failure.status() != PYKD_UNAVAILABLE) throw;
    passed_over = std::string("kernels: ") + failure.what();
    return {};
  }
}

std::string join_with_spaces(const std::set<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : " ") + word;
  return text;
}

// Those that the file uses.
std::set<std::string> choose_ops(const std::string& label, const PykdNodes& nodes,
                                 const std::set<std::string>& available, const LoadOptions& options) {
  if (options.kernels == KernelUse::kOn) {
    if (nodes.in_graph.empty()) {
      no_kernels("a node that a kernel computes in " + label,
                 "a file of standard operators alone, as float64 and an export with kernels=\"off\" make them");
    }
    for (const std::string& node : nodes.in_graph) {
      if (available.count(node) == 0) {
        no_kernels("a kernel for every node of domain \"pykd\" in " + label,
                   "none for " + in_quotes(node) + " on " + device_name(options.engine_options.device));
      }
    }
  }
  return nodes.that_run(available);
}

}  // namespace

LoadOptions read_options(const pykd_load_options* options) {
  LoadOptions result;
  if (options == nullptr) return result;
  const pykd_load_options given = copy_options(*options);
  result.engine = text_or(given.engine, "");
  result.device = text_or(given.device, "cpu");
  result.onnxruntime_library = text_or(given.onnxruntime_library, "");
  result.torch_library = text_or(given.torch_library, "");
  result.skip_integrity_check = given.skip_integrity_check != 0;
  result.trust_merged = given.trust_merged != 0;
  result.engine_options.device = parse_device(result.device);
  result.engine_options.threads = given.threads;
  result.engine_options.cuda_stream = given.cuda_stream;
  result.kernels = parse_kernels(text_or(given.kernels, "auto"));
  check_engine_name(result.engine);
  check_threads(given.threads);
  return result;
}

Loss::Loss(const LoadOptions& options, std::string engine)
    : device_(options.engine_options.device),
      generation_(fork_generation()),
      has_threads_(device_.kind != PYKD_CPU || (engine == "onnxruntime" && options.engine_options.threads != 1)),
      engine_(std::move(engine)),
      device_name_(options.device) {}

bool Loss::of_this_process() const { return generation_ == fork_generation(); }

void Loss::check_process() const {
  if (!has_threads_ || of_this_process()) return;
  fail(PYKD_UNAVAILABLE, "a loss that this process has loaded",
       "one from before fork(), whose threads and devices stayed with the parent",
       "load it in the child, or with threads = 1 for the CPU, or start processes by spawn or forkserver");
}

std::unique_ptr<Loss> Loss::load(Artefact& artefact, const LoadOptions& options) {
  if (artefact.merged) return load_merged(*artefact.merged, options);
  if (!options.skip_integrity_check) check_sizes(artefact);
  const std::string engine = wanted_engine(options);
  const bool may_onnx = engine != "torchscript" && artefact.has_onnx();
  const bool may_torchscript = engine != "onnxruntime" && artefact.torchscript.has_value();
  if (!may_onnx && !may_torchscript) {
    fail(PYKD_NOT_FOUND, "a file for the engine " + in_quotes(engine),
         artefact.has_onnx() ? "ONNX alone" : "TorchScript alone",
         "choose the other engine, or export the loss in that format, too");
  }
  if (!may_onnx) return load_torchscript(artefact, options);
  if (!may_torchscript) return load_onnx(artefact, options);
  std::string onnx_problem;
  try {
    return load_onnx(artefact, options);
  } catch (const Failure& failure) {
    const bool named = !options.onnxruntime_library.empty() || !environment("PYKD_ONNXRUNTIME_LIBRARY").empty();
    if (named || failure.status() != PYKD_UNAVAILABLE) throw;
    onnx_problem = failure.what();
  }
  try {
    std::unique_ptr<Loss> loss = load_torchscript(artefact, options);
    loss->passed_over_ = "onnxruntime: " + onnx_problem;
    return loss;
  } catch (const Failure& failure) {
    if (failure.status() != PYKD_UNAVAILABLE) throw;
    fail(PYKD_UNAVAILABLE, "one of the two engines",
         "neither. onnxruntime: " + onnx_problem + ". torchscript: " + failure.what(), "make one of them available");
  }
}

std::unique_ptr<Loss> Loss::load_onnx(Artefact& artefact, const LoadOptions& options) {
  // Every check that needs no engine comes first: a bad file is a bad file wherever it is loaded.
  struct Checked {
    const ArtefactFile* file;
    Signature signature;
    PykdNodes nodes;
  };
  std::vector<Checked> files;
  for (std::optional<ArtefactFile>* file : {&artefact.value, &artefact.gradient, &artefact.score}) {
    if (!file->has_value()) continue;
    read_contents(**file);
    check_integrity(**file, options);
    Checked& checked = files.emplace_back();
    checked.file = &**file;
    checked.signature = scan_onnx(**file, &checked.nodes);
    check_membership(artefact, **file, checked.signature);
  }
  std::unique_ptr<Loss> loss(new Loss(options, "onnxruntime"));
  if (files.size() == 2) {
    check_kind(*files[0].file, files[0].signature, ArtefactKind::kValue);
    check_kind(*files[1].file, files[1].signature, ArtefactKind::kGradient);
    check_one_export(files[0].signature, files[1].signature);
  }
  if (artefact.score) check_kind(*files[0].file, files[0].signature, ArtefactKind::kScore);
  loss->signature_ = parse_signature(files.back().signature.metadata);
  EngineOptions engine_options = options.engine_options;
  engine_options.library = options.onnxruntime_library;
  Engine& engine = onnxruntime_engine(engine_options.library);
  const std::set<std::string> available = available_ops(options, loss->passed_over_);
  std::set<std::string> in_use;
  for (Checked& checked : files) {
    const std::set<std::string> ops = choose_ops(checked.file->label, checked.nodes, available, options);
    in_use.insert(ops.begin(), ops.end());
    engine_options.kernels = !ops.empty();
    loss->add_part(engine, checked.file->label, checked.file->bytes, std::move(checked.signature), engine_options);
  }
  loss->kernels_ = join_with_spaces(in_use);
  loss->connect_parts();
  return loss;
}

std::unique_ptr<Loss> Loss::load_torchscript(Artefact& artefact, const LoadOptions& options) {
  ArtefactFile& file = *artefact.torchscript;
  if (options.kernels == KernelUse::kOn) {
    no_kernels("an ONNX file for the engine \"onnxruntime\"", "the TorchScript file " + file.label);
  }
  read_contents(file);
  check_integrity(file, options);
  EngineOptions engine_options = options.engine_options;
  engine_options.library = options.torch_library;
  Engine& engine = torchscript_engine(engine_options.library);
  Signature signature =
      opening(file.label, [&] { return parse_signature(engine.metadata(file.bytes.data(), file.bytes.size())); });
  check_kind(file, signature, ArtefactKind::kTorchScript);
  check_membership(artefact, file, signature);
  std::unique_ptr<Loss> loss(new Loss(options, "torchscript"));
  loss->signature_ = parse_signature(signature.metadata);
  loss->add_part(engine, file.label, file.bytes, std::move(signature), engine_options);
  loss->connect_parts();
  return loss;
}

namespace {

// What changes with a file; nothing of one in memory.
struct FileState {
  explicit FileState(const std::string& path) {
    std::error_code error;
    if (path.empty()) return;
    written = std::filesystem::last_write_time(path, error);
    size = std::filesystem::file_size(path, error);
  }
  bool operator==(const FileState& other) const { return written == other.written && size == other.size; }

  std::filesystem::file_time_type written;
  std::uintmax_t size = 0;
};

}  // namespace

std::unique_ptr<Loss> Loss::load_merged(MergedFile& file, const LoadOptions& options) {
  const std::string& label = file.source->label();
  if (!options.trust_merged) refuse_merged(file);
  if (wanted_engine(options) == "torchscript") {
    fail(PYKD_NOT_FOUND, "a file for the engine \"torchscript\"", "a merged scorer, which is ONNX",
         "leave the engine out");
  }
  const FileState before(file.path);
  if (!options.skip_integrity_check) check_integrity(*file.source);
  const std::filesystem::path folder = file.path.empty() ? "" : std::filesystem::absolute(file.path).parent_path();
  PykdNodes nodes;
  Signature signature = scan_merged(*file.source, folder.string(), nodes);

  std::unique_ptr<Loss> loss(new Loss(options, "onnxruntime"));
  loss->signature_ = signature.copy();
  EngineOptions engine_options = options.engine_options;
  engine_options.library = options.onnxruntime_library;
  engine_options.model_path = file.path;
  engine_options.whole_models = true;
  Engine& engine = onnxruntime_engine(engine_options.library);
  const std::set<std::string> available = available_ops(options, loss->passed_over_);
  const std::set<std::string> ops = choose_ops(label, nodes, available, options);
  engine_options.kernels = !ops.empty();
  loss->add_part(engine, label, file.bytes, std::move(signature), engine_options);
  if (!(FileState(file.path) == before)) {
    fail(PYKD_BAD_ARTEFACT, label + " to stay as it is while it is loaded", "another file in its place",
         "load it again");
  }
  loss->kernels_ = join_with_spaces(ops);
  loss->connect_parts();
  return loss;
}

void Loss::add_part(Engine& engine, const std::string& label, std::string_view bytes, Signature signature,
                    const EngineOptions& options) {
  engine_version_ = engine.version();
  auto part = std::make_unique<Part>();
  part->signature = std::move(signature);
  part->session = opening(label, [&] { return engine.open(bytes.data(), bytes.size(), part->signature, options); });
  parts_.push_back(std::move(part));
}

void Loss::connect_parts() {
  for (const std::unique_ptr<Part>& part : parts_) {
    for (const ParameterSpec& parameter : part->signature.parameters) {
      part->parameters.push_back(index_of(signature_.parameters, parameter.name));
    }
    for (const OutputSpec& output : signature_.outputs) {
      part->outputs.push_back(index_of(part->signature.outputs, output.name));
    }
  }
}

Binding Loss::check_inputs(const pykd_tensor* inputs, std::size_t num_inputs, std::vector<pykd_tensor>& ordered,
                           LabelCheck labels) const {
  return internal::check_inputs(signature_, device_, inputs, num_inputs, ordered, labels);
}

void Loss::run(const pykd_tensor* inputs, std::size_t num_inputs, const pykd_parameter* parameters,
               std::size_t num_parameters, const pykd_tensor* outputs, std::size_t num_outputs) const {
  check_process();
  Request request;
  const Binding binding = check_inputs(inputs, num_inputs, request.inputs);
  check_parameters(signature_, binding, parameters, num_parameters, request.parameters);
  check_outputs(signature_, device_, binding, request.inputs, outputs, num_outputs, request.output_ids);
  request.outputs.assign(outputs, outputs + num_outputs);
  if (parts_.size() == 1 || wants_gradient(request)) return run_session(*parts_.back()->session, request);
  run_part(*parts_[0], request);
}

bool Loss::wants_gradient(const Request& request) const {
  return std::any_of(request.output_ids.begin(), request.output_ids.end(),
                     [&](std::size_t id) { return signature_.outputs[id].gradient_of != kNone; });
}

// Runs a part that has all outputs of the request, in its own numbering.
void Loss::run_part(const Part& part, const Request& request) const {
  Request own;
  own.inputs = request.inputs;
  own.outputs = request.outputs;
  own.parameters.reserve(part.parameters.size());
  for (std::size_t id : part.parameters) own.parameters.push_back(request.parameters[id]);
  own.output_ids.reserve(request.outputs.size());
  for (std::size_t id : request.output_ids) own.output_ids.push_back(part.outputs[id]);
  run_session(*part.session, own);
}

}  // namespace pykd::internal
