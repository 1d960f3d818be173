// File: runtime/signature/signature.h
//
// The signature of a loss: the inputs, parameters and outputs that an artefact's metadata declares
// (docs/artefacts.md). metadata.h reads it, call.h checks calls against it.
#ifndef PYKD_RUNTIME_SIGNATURE_SIGNATURE_H_
#define PYKD_RUNTIME_SIGNATURE_SIGNATURE_H_

#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/tensor.h"

namespace pykd::internal {

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

  std::vector<const char*> axis_names;      // `axes` as the C interface shows them
  std::vector<std::int64_t> least_lengths;  // along each of them, at least 1
  std::vector<std::int64_t> lengths;        // the one that the axis may have; 0: any
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
  double maximum = std::numeric_limits<double>::infinity();

  bool is_low(double value) const { return value < minimum || (minimum_exclusive && value == minimum); }
  bool is_high(double value) const { return value > maximum; }
};

enum class ArtefactKind { kValue, kGradient, kTorchScript, kScore };

// Whether a file of that kind computes the gradients of its inputs.
inline bool gives_gradients(ArtefactKind kind) {
  return kind == ArtefactKind::kGradient || kind == ArtefactKind::kTorchScript;
}

// How an ONNX file holds its parameters: initialisers that are inputs, too; constants; or inputs.
enum class ParameterForm { kOverridable, kFixed, kInputs };

struct Signature {
  Signature() = default;
  Signature(Signature&&) = default;
  Signature& operator=(Signature&&) = default;
  Signature copy() const;

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
  pykd_dtype parameter_dtype = PYKD_FLOAT32;  // as an ONNX file has them
  std::vector<OutputSpec> outputs;
  std::size_t grad_scale = kNone;  // index of the parameter of that name

  // Of merged scorers alone.
  bool merged = false;
  std::vector<std::int64_t> fixed_lengths;  // by axis; 0 where it is free
  std::vector<std::string> shapeless;       // outputs that are left out, since a run alone tells their lengths

 private:
  Signature(const Signature&) = default;  // whose axis_names would point into the other
};

// Fills in what the C interface shows of the axes. Its pointers point into heap buffers that a move of the signature
// keeps. `least` has the least length of each axis; empty: 1.
void show_axes(Signature& signature, const std::vector<std::int64_t>& least);

// The index of the one of that name; kNone where there is none.
template <class Specs>
std::size_t find_spec(const Specs& specs, std::string_view name) {
  for (std::size_t i = 0; i < specs.size(); ++i) {
    if (specs[i].name == name) return i;
  }
  return kNone;
}

}  // namespace pykd::internal

#endif  // PYKD_RUNTIME_SIGNATURE_SIGNATURE_H_
