// File: runtime/signature/signature.h
//
// The signature of a loss: the inputs, parameters and outputs that an artefact's metadata declares
// (docs/artefacts.md), and the checks of a call against it. Every check happens before an engine
// runs, so that an engine may rely on names, ranks, lengths, dtypes, devices and labels.
#ifndef PYKD_RUNTIME_SIGNATURE_SIGNATURE_H_
#define PYKD_RUNTIME_SIGNATURE_SIGNATURE_H_

#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "base/device.h"
#include "base/tensor.h"
#include "pykd/pykd.h"

namespace pykd::internal {

constexpr int kFormatVersion = 2;  // the newest metadata that this library understands
constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();  // "no such index"

// What inputs and outputs have in common.
struct TensorSpec {
  std::string name;
  std::vector<std::string> axes;      // their names, in order
  std::vector<std::size_t> axis_ids;  // the same as indices into Signature::axes
  std::uint32_t dtypes = 0;           // one bit, or kAnyFloat for "float" in TorchScript files

  std::size_t rank() const { return axes.size(); }
  bool is_float() const { return (dtypes & kAnyFloat) != 0; }
  bool is_any_float() const { return dtypes == kAnyFloat; }

  std::vector<const char*> axis_names;  // `axes` as the C interface shows them
};

struct InputSpec : TensorSpec {
  std::size_t gradient_output = kNone;       // index of "grad_<name>" among the outputs
  bool has_gradient = false;                 // in files that are not for the value alone
  std::size_t index_axis = kNone;            // entries index this axis (into Signature::axes)
  std::optional<std::int64_t> ignore_index;  // the one entry outside that axis that is allowed
};

struct OutputSpec : TensorSpec {
  std::size_t gradient_of = kNone;  // index of the input whose gradient this is
};

struct ParameterSpec {
  std::string name;
  double default_value = 0.0;
  double minimum = -std::numeric_limits<double>::infinity();
  bool minimum_exclusive = false;
};

enum class ArtefactKind { kValue, kGradient, kTorchScript };

// How an ONNX file holds its parameters: initialisers that are inputs, too; constants; or inputs.
enum class ParameterForm { kOverridable, kFixed, kInputs };

struct Signature {
  Signature() = default;
  Signature(Signature&&) = default;
  Signature& operator=(Signature&&) = default;

  std::string metadata;  // the JSON it was read from
  ArtefactKind kind = ArtefactKind::kValue;
  std::string name;
  std::string recipe;
  std::string export_id;          // the same in every file of an export; empty: written before there was one
  std::vector<std::string> axes;  // every axis name, once
  std::vector<InputSpec> inputs;
  std::vector<ParameterSpec> parameters;  // those that a call may set
  std::vector<ParameterSpec> fixed;       // those that it may not
  ParameterForm parameter_form = ParameterForm::kOverridable;
  std::vector<OutputSpec> outputs;
  std::size_t grad_scale = kNone;  // index of the parameter of that name
};

// Reads the metadata of one artefact. Throws Failure(PYKD_BAD_ARTEFACT) that names the field which
// is missing, has the wrong type or contradicts another one.
Signature parse_signature(std::string json);

// Throws Failure(PYKD_BAD_ARTEFACT) where loss.onnx and loss.grad.onnx are not of one export: all that
// both say is the same, so that the gradient's file has every input, parameter and output of the other.
void check_one_export(const Signature& value, const Signature& gradient);

// What manifest.json says of one file.
struct ManifestEntry {
  std::string name;
  std::uint64_t bytes = 0;
  std::string sha256;
};

struct Manifest {
  std::string export_id;  // empty: written before there was one
  std::vector<ManifestEntry> files;
};

// Reads manifest.json. Throws Failure(PYKD_BAD_ARTEFACT).
Manifest parse_manifest(const std::string& text);

// What the inputs of a call determine.
struct Binding {
  std::vector<std::int64_t> lengths;      // by Signature::axes
  pykd_dtype float_dtype = PYKD_FLOAT32;  // of the first floating input
};

// Each of these throws Failure(PYKD_INVALID_VALUE or PYKD_INVALID_TYPE) with a message that names
// the argument. `ordered` is filled in the order of the signature.
Binding check_inputs(const Signature& signature, Device device, const pykd_tensor* inputs, std::size_t num_inputs,
                     std::vector<pykd_tensor>& ordered);
void check_parameters(const Signature& signature, const Binding& binding, const pykd_parameter* parameters,
                      std::size_t num_parameters, std::vector<double>& ordered);
void check_outputs(const Signature& signature, Device device, const Binding& binding,
                   const std::vector<pykd_tensor>& inputs, const pykd_tensor* outputs, std::size_t num_outputs,
                   std::vector<std::size_t>& output_ids);

// The index of the output `name`; throws Failure(PYKD_INVALID_VALUE) where there is none.
std::size_t find_output(const Signature& signature, const char* name);
// The dtype that an output has in a call with these inputs.
pykd_dtype output_dtype(const OutputSpec& output, pykd_dtype float_dtype);

}  // namespace pykd::internal

#endif  // PYKD_RUNTIME_SIGNATURE_SIGNATURE_H_
