#include "runtime/signature/signature.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.h"

namespace pykd::internal {
namespace {

using nlohmann::json;

constexpr pykd_dtype kDtypes[] = {PYKD_FLOAT16, PYKD_BFLOAT16, PYKD_FLOAT32, PYKD_FLOAT64, PYKD_INT64};
constexpr std::size_t kMaxMetadata = 1 << 20;

// ---- Reading the metadata ----------------------------------------------------------------------

[[noreturn]] void bad_metadata(const std::string& expected, const std::string& got) {
  fail(PYKD_BAD_ARTEFACT, expected + " in the artefact's metadata", got, "export the loss again with pykd.export");
}

// One object of the metadata and the path by which messages call it, such as "inputs[0]".
class Object {
 public:
  Object(const json& value, std::string path) : value_(value), path_(std::move(path)) {
    if (!value.is_object()) bad_metadata("an object at " + path_, value.type_name());
  }

  bool has(const char* key) const { return value_.contains(key); }
  std::string field(const char* key) const { return path_.empty() ? key : path_ + "." + key; }

  std::string text(const char* key) const {
    const json& value = get(key, "a string");
    if (!value.is_string()) wrong_type(key, "a string", value);
    return value.get<std::string>();
  }

  // A string that is handed out as const char* and printed in messages.
  std::string name(const char* key) const {
    std::string value = text(key);
    check_name(value, field(key));
    return value;
  }

  std::vector<std::string> names(const char* key) const {
    const json& value = list(key);
    std::vector<std::string> all;
    for (const json& item : value) {
      if (!item.is_string()) wrong_type(key, "a list of strings", item);
      all.push_back(item.get<std::string>());
      check_name(all.back(), field(key));
    }
    return all;
  }

  std::int64_t integer(const char* key) const {
    const json& value = get(key, "an integer");
    if (!value.is_number_integer()) wrong_type(key, "an integer", value);
    if (value.is_number_unsigned() && value.get<std::uint64_t>() > static_cast<std::uint64_t>(INT64_MAX)) {
      bad_metadata("a 64-bit integer as \"" + field(key) + "\"", value.dump());
    }
    return value.get<std::int64_t>();
  }

  double number(const char* key) const {
    const json& value = get(key, "a number");
    if (!value.is_number()) wrong_type(key, "a number", value);
    const double result = value.get<double>();
    if (!std::isfinite(result)) bad_metadata("a finite number as \"" + field(key) + "\"", "infinity");
    return result;
  }

  bool boolean(const char* key) const {
    const json& value = get(key, "true or false");
    if (!value.is_boolean()) wrong_type(key, "true or false", value);
    return value.get<bool>();
  }

  Object object(const char* key) const { return Object(get(key, "an object"), field(key)); }

  const json& list(const char* key) const {
    const json& value = get(key, "a list");
    if (!value.is_array()) wrong_type(key, "a list", value);
    return value;
  }

 private:
  const json& get(const char* key, const char* expected) const {
    auto found = value_.find(key);
    if (found == value_.end()) {
      bad_metadata(std::string(expected) + " as \"" + field(key) + "\"", "no such field");
    }
    return *found;
  }

  [[noreturn]] void wrong_type(const char* key, const char* expected, const json& value) const {
    bad_metadata(std::string(expected) + " as \"" + field(key) + "\"", std::string("type ") + value.type_name());
  }

  static void check_name(const std::string& name, const std::string& where) {
    const bool printable = std::all_of(name.begin(), name.end(), [](char c) {
      return static_cast<unsigned char>(c) > 0x20 && static_cast<unsigned char>(c) < 0x7F;
    });
    if (name.empty() || name.size() > 200 || !printable) {
      bad_metadata("a name of printable ASCII letters as \"" + where + "\"", in_quotes(name));
    }
  }

  const json& value_;
  std::string path_;
};

template <class Function>
void for_each_object(const Object& parent, const char* key, Function function) {
  constexpr std::size_t kMaxItems = 1000;  // far above any loss; bounds the work on a hostile file
  const std::size_t count = parent.list(key).size();
  if (count > kMaxItems) {
    bad_metadata("at most 1000 items in \"" + parent.field(key) + "\"", std::to_string(count));
  }
  std::size_t index = 0;
  for (const json& item : parent.list(key)) {
    function(Object(item, parent.field(key) + "[" + std::to_string(index++) + "]"));
  }
}

std::uint32_t parse_dtypes(const Object& object, ArtefactKind kind) {
  const std::string text = object.text("dtype");
  if (text == "float" && kind == ArtefactKind::kTorchScript) return kAnyFloat;
  for (pykd_dtype dtype : kDtypes) {
    if (text == dtype_name(dtype)) return dtype_bit(dtype);
  }
  bad_metadata("a dtype that pykd knows as \"" + object.field("dtype") + "\"", in_quotes(text));
}

void parse_tensor(const Object& object, ArtefactKind kind, TensorSpec& spec) {
  spec.name = object.name("name");
  spec.axes = object.names("axes");
  spec.dtypes = parse_dtypes(object, kind);
  if (spec.axes.size() > kMaxRank) {
    bad_metadata("at most 8 names in \"" + object.field("axes") + "\"", std::to_string(spec.axes.size()));
  }
}

std::size_t find_axis(const Signature& signature, const std::string& axis) {
  auto found = std::find(signature.axes.begin(), signature.axes.end(), axis);
  return found == signature.axes.end() ? kNone : static_cast<std::size_t>(found - signature.axes.begin());
}

template <class Specs>
std::size_t find_spec(const Specs& specs, std::string_view name) {
  for (std::size_t i = 0; i < specs.size(); ++i) {
    if (specs[i].name == name) return i;
  }
  return kNone;
}

void parse_inputs(const Object& root, Signature& signature) {
  std::vector<std::pair<std::string, std::string>> index_axes;  // of each input: field, axis name
  for_each_object(root, "inputs", [&](const Object& object) {
    InputSpec input;
    parse_tensor(object, signature.kind, input);
    input.has_gradient = object.boolean("gradient");  // anywhere; whether this file has it, its kind says
    for (const std::string& axis : input.axes) {
      std::size_t id = find_axis(signature, axis);
      if (id == kNone) {
        id = signature.axes.size();
        signature.axes.push_back(axis);
      }
      input.axis_ids.push_back(id);
    }
    index_axes.emplace_back();
    if (object.has("index_of")) {
      if (input.dtypes != dtype_bit(PYKD_INT64)) {
        bad_metadata("\"" + object.field("index_of") + "\" on an int64 input alone", input.name);
      }
      index_axes.back() = {object.field("index_of"), object.name("index_of")};
    }
    if (object.has("ignore_index")) input.ignore_index = object.integer("ignore_index");
    signature.inputs.push_back(std::move(input));
  });
  for (std::size_t i = 0; i < index_axes.size(); ++i) {
    const auto& [field, axis] = index_axes[i];
    if (axis.empty()) continue;
    signature.inputs[i].index_axis = find_axis(signature, axis);
    if (signature.inputs[i].index_axis == kNone) {
      bad_metadata("an axis of one of the inputs as \"" + field + "\"", in_quotes(axis));
    }
  }
}

void parse_parameters(const Object& root, Signature& signature) {
  for_each_object(root, "parameters", [&](const Object& object) {
    ParameterSpec parameter;
    parameter.name = object.name("name");
    parameter.default_value = object.number("default");
    if (object.has("minimum")) parameter.minimum = object.number("minimum");
    if (object.has("minimum_exclusive")) {
      parameter.minimum_exclusive = object.boolean("minimum_exclusive");
    }
    if (parameter.default_value < parameter.minimum ||
        (parameter.minimum_exclusive && parameter.default_value == parameter.minimum)) {
      bad_metadata("a default within its range as \"" + object.field("default") + "\"",
                   number_text(parameter.default_value));
    }
    signature.parameters.push_back(std::move(parameter));
  });
  if (signature.parameter_form == ParameterForm::kFixed) std::swap(signature.parameters, signature.fixed);
  signature.grad_scale = find_spec(signature.parameters, "grad_scale");
}

void connect_gradient(const Object& object, Signature& signature, OutputSpec& output) {
  const std::string name = object.name("gradient_of");
  output.gradient_of = find_spec(signature.inputs, name);
  const std::string field = "\"" + object.field("gradient_of") + "\"";
  if (output.gradient_of == kNone) bad_metadata("the name of an input as " + field, in_quotes(name));
  InputSpec& input = signature.inputs[output.gradient_of];
  if (output.name != "grad_" + name) {
    bad_metadata("the name grad_" + name + " where " + field + " is " + name, in_quotes(output.name));
  }
  if (input.axes != output.axes || input.dtypes != output.dtypes || !input.is_float()) {
    bad_metadata("the axes and the floating dtype of " + name + " for its gradient", "others");
  }
  input.gradient_output = signature.outputs.size();
}

void parse_outputs(const Object& root, Signature& signature) {
  for_each_object(root, "outputs", [&](const Object& object) {
    OutputSpec output;
    parse_tensor(object, signature.kind, output);
    for (const std::string& axis : output.axes) {
      output.axis_ids.push_back(find_axis(signature, axis));
      if (output.axis_ids.back() == kNone) {
        bad_metadata("axes that the inputs have in \"" + object.field("axes") + "\"", in_quotes(axis));
      }
    }
    const bool is_gradient = output.name.rfind("grad_", 0) == 0;
    if (object.has("gradient_of")) {
      connect_gradient(object, signature, output);
    } else if (is_gradient) {
      bad_metadata("the field \"" + object.field("gradient_of") + "\"", "no such field");
    }
    if (is_gradient && signature.kind == ArtefactKind::kValue) {
      bad_metadata("no gradients where \"kind\" is \"value\"", output.name);
    }
    signature.outputs.push_back(std::move(output));
  });
  for (const InputSpec& input : signature.inputs) {
    const bool expected = input.has_gradient && signature.kind != ArtefactKind::kValue;
    if (expected != (input.gradient_output != kNone)) {
      bad_metadata(std::string(expected ? "the" : "no") + " gradient of " + input.name + " among \"outputs\"",
                   expected ? "none" : "one");
    }
  }
  const std::size_t loss = find_spec(signature.outputs, "loss");
  if (loss == kNone || signature.outputs[loss].rank() != 0) {
    bad_metadata("a scalar \"loss\" among \"outputs\"", loss == kNone ? "none" : "an array");
  }
}

// An output named like an input is one that nobody computes.
void check_unique_names(const Signature& signature) {
  std::vector<std::string> names;
  for (const InputSpec& input : signature.inputs) names.push_back(input.name);
  for (const auto* parameters : {&signature.parameters, &signature.fixed}) {
    for (const ParameterSpec& parameter : *parameters) names.push_back(parameter.name);
  }
  for (const OutputSpec& output : signature.outputs) names.push_back(output.name);
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  if (twice != names.end()) {
    bad_metadata("every name once among inputs, parameters and outputs", in_quotes(*twice) + " twice");
  }
}

void check_format(const Object& root) {
  const std::string format = root.text("format");
  if (format != "pykd") bad_metadata("\"pykd\" as \"format\"", in_quotes(format));
  const std::int64_t version = root.integer("format_version");
  if (version > kFormatVersion) {
    fail(PYKD_BAD_ARTEFACT, "an artefact of format version " + std::to_string(kFormatVersion) + " or older",
         "format version " + std::to_string(version), "upgrade pykd or export the loss again");
  }
  if (version < 1) bad_metadata("at least 1 as \"format_version\"", std::to_string(version));
}

// Called while the document is parsed: json::dump() and comparison recurse, and must not run out of
// stack on a hostile file.
bool check_depth(int depth, json::parse_event_t, json&) {
  constexpr int kMaxDepth = 64;
  if (depth > kMaxDepth) bad_metadata("lists and objects nested at most 64 deep", "more");
  return true;
}

json parse_document(const std::string& text) {
  if (text.size() > kMaxMetadata) bad_metadata("at most 1 MiB", std::to_string(text.size()) + " bytes");
  json document = json::parse(text, check_depth, /*allow_exceptions=*/false);
  if (document.is_discarded()) bad_metadata("JSON", in_quotes(text));
  return document;
}

// What the metadata of both loss.onnx and loss.grad.onnx says: all but the gradients and their scale.
json common_facts(const std::string& metadata) {
  json facts = parse_document(metadata);
  facts.erase("kind");
  auto drop = [&](const char* list, auto condition) {
    json kept = json::array();
    for (const json& item : facts[list]) {
      if (!condition(item)) kept.push_back(item);
    }
    facts[list] = std::move(kept);
  };
  drop("outputs", [](const json& output) { return output.contains("gradient_of"); });
  drop("parameters", [](const json& parameter) { return parameter["name"] == "grad_scale"; });
  return facts;
}

ArtefactKind parse_kind(const Object& root) {
  const std::string kind = root.text("kind");
  if (kind == "value") return ArtefactKind::kValue;
  if (kind == "gradient") return ArtefactKind::kGradient;
  if (kind == "torchscript") return ArtefactKind::kTorchScript;
  bad_metadata("\"value\", \"gradient\" or \"torchscript\" as \"kind\"", in_quotes(kind));
}

ParameterForm parse_parameter_form(const Object& root) {
  if (!root.has("parameters_as")) return ParameterForm::kOverridable;
  const std::string form = root.text("parameters_as");
  if (form == "fixed") return ParameterForm::kFixed;
  if (form == "inputs") return ParameterForm::kInputs;
  bad_metadata("\"fixed\" or \"inputs\" as \"parameters_as\"", in_quotes(form));
}

// Pointers for the C interface. They point into heap buffers that a move of the signature keeps.
template <class Specs>
void fill_axis_names(Specs& specs) {
  for (auto& spec : specs) {
    spec.axis_names.clear();
    for (const std::string& axis : spec.axes) spec.axis_names.push_back(axis.c_str());
  }
}

// ---- Messages about a call ---------------------------------------------------------------------

template <class Specs>
std::vector<std::string> names_of(const Specs& specs) {
  std::vector<std::string> names;
  names.reserve(specs.size());
  for (const auto& spec : specs) names.push_back(spec.name);
  return names;
}

std::string axes_text(const TensorSpec& spec) {
  return spec.axes.empty() ? "no axes (a scalar)" : "axes (" + join(spec.axes) + ")";
}

template <class Specs>
[[noreturn]] void unknown_name(const char* what, const char* name, const Specs& specs) {
  internal::unknown_name(what, name, names_of(specs), "artefact");
}

[[noreturn]] void unknown_parameter(const Signature& signature, const pykd_parameter& given) {
  const std::size_t id = find_spec(signature.fixed, given.name);
  if (id == kNone) unknown_name("a parameter", given.name, signature.parameters);
  const ParameterSpec& spec = signature.fixed[id];
  fail(PYKD_INVALID_VALUE,
       "no value for the parameter " + spec.name + ", which is fixed at " + number_text(spec.default_value) + " here",
       number_text(given.value), "leave it out, or export the loss without parameters=\"fixed\"");
}

// Finds `name`, looking first at `guess`: callers give things in the signature's order more often
// than not, and then one comparison is enough.
template <class Specs>
std::size_t find_name(const Specs& specs, const char* name, std::size_t guess) {
  if (guess < specs.size() && specs[guess].name == name) return guess;
  return find_spec(specs, name);
}

// ---- Checks of one tensor ----------------------------------------------------------------------

void check_dtype(const TensorSpec& spec, const pykd_tensor& tensor) {
  if (!is_dtype(tensor.dtype) || (spec.dtypes & dtype_bit(tensor.dtype)) == 0) {
    fail(PYKD_INVALID_TYPE, spec.name + " of dtype " + dtypes_text(spec.dtypes), given_dtype(tensor),
         spec.is_float() && is_dtype(tensor.dtype) ? "cast it, or export the loss for that dtype" : "cast it");
  }
}

void check_device(const TensorSpec& spec, const pykd_tensor& tensor, Device device) {
  const bool same = raw(tensor.device) == device.kind && (device.kind == PYKD_CPU || tensor.device_id == device.id);
  if (!same) {
    fail(PYKD_INVALID_TYPE, spec.name + " on " + device_name(device) + ", where this loss was loaded",
         given_device(tensor), "move the tensor, or load the loss for that device");
  }
}

void check_rank(const TensorSpec& spec, const pykd_tensor& tensor) {
  check_axes_pointers(spec.name, tensor);
  const bool has_shape = tensor.shape != nullptr || tensor.rank == 0;
  if (tensor.rank == static_cast<std::int32_t>(spec.rank()) && has_shape) return;
  std::string got = "rank " + std::to_string(tensor.rank);
  if (!has_shape) {
    got += " with NULL for its shape";
  } else if (tensor.rank > static_cast<std::int32_t>(kMaxRank)) {
    got += ", and 8 is the most that any tensor has";
  } else if (tensor.rank > 0) {
    got += " with shape " + shape_text(tensor.shape, tensor.rank);
  }
  fail(PYKD_INVALID_VALUE, spec.name + " with " + axes_text(spec), got, "give it one length per axis");
}

// ---- Checks of the inputs ----------------------------------------------------------------------

[[noreturn]] void fail_length(const Signature& signature, const InputSpec& input, const pykd_tensor& tensor,
                              std::size_t axis, std::int64_t expected) {
  const std::size_t id = input.axis_ids[axis];
  const InputSpec* first = &input;
  for (const InputSpec& other : signature.inputs) {
    if (std::count(other.axis_ids.begin(), other.axis_ids.end(), id) != 0) {
      first = &other;
      break;
    }
  }
  const std::string owner = first == &input ? "as its other axis of that name has" : "as " + first->name + " has";
  fail(PYKD_INVALID_VALUE,
       input.name + " of length " + std::to_string(expected) + " along " + in_quotes(signature.axes[id]) + ", " + owner,
       std::to_string(tensor.shape[axis]) + " (shape " + shape_text(tensor.shape, tensor.rank) + ")",
       "axes of one name have one length: cut, pad or map one of the tensors");
}

void bind_axes(const Signature& signature, const InputSpec& input, const pykd_tensor& tensor,
               std::vector<std::int64_t>& lengths) {
  for (std::size_t axis = 0; axis < input.axis_ids.size(); ++axis) {
    const std::int64_t length = tensor.shape[axis];
    if (length < 1) {
      fail(PYKD_INVALID_VALUE, input.name + " of length at least 1 along " + in_quotes(input.axes[axis]),
           "shape " + shape_text(tensor.shape, tensor.rank),
           length == 0 ? "an empty batch has no loss: leave the call out" : "check the shape");
    }
    std::int64_t& bound = lengths[input.axis_ids[axis]];
    if (bound == 0) bound = length;
    if (bound != length) fail_length(signature, input, tensor, axis, bound);
  }
}

// Where element `index` lies, such as "[2, 0]".
std::string position_text(const pykd_tensor& tensor, std::int64_t index) {
  std::int64_t position[kMaxRank];
  for (std::int32_t axis = tensor.rank - 1; axis >= 0; --axis) {
    position[axis] = index % tensor.shape[axis];
    index /= tensor.shape[axis];
  }
  return shape_text(position, tensor.rank);
}

[[noreturn]] void fail_label(const Signature& signature, const InputSpec& input, const pykd_tensor& tensor,
                             std::int64_t index, std::int64_t length) {
  const std::int64_t value = static_cast<const std::int64_t*>(tensor.data)[index];
  std::string allowed = "from 0 to " + std::to_string(length - 1);
  if (input.ignore_index) allowed += " or " + std::to_string(*input.ignore_index) + " (ignored)";
  fail(PYKD_INVALID_VALUE,
       "every entry of " + input.name + " " + allowed + ", as " + in_quotes(signature.axes[input.index_axis]) +
           " has length " + std::to_string(length),
       std::to_string(value) + " at position " + position_text(tensor, index),
       input.ignore_index ? "correct it, or write the ignored value" : "correct it; this loss ignores no entry");
}

void check_labels(const Signature& signature, const InputSpec& input, const pykd_tensor& tensor, std::int64_t length) {
  const auto* labels = static_cast<const std::int64_t*>(tensor.data);
  const auto limit = static_cast<std::uint64_t>(length);
  const std::int64_t ignored = input.ignore_index.value_or(0);  // 0 is in range anyway
  std::int64_t count = 1;
  for (std::int32_t axis = 0; axis < tensor.rank; ++axis) count *= tensor.shape[axis];
  bool bad = false;  // no early exit: the loop vectorises
  for (std::int64_t i = 0; i < count; ++i) {
    bad |= (static_cast<std::uint64_t>(labels[i]) >= limit) & (labels[i] != ignored);
  }
  if (!bad) return;
  for (std::int64_t i = 0; i < count; ++i) {
    if (static_cast<std::uint64_t>(labels[i]) >= limit && labels[i] != ignored) {
      fail_label(signature, input, tensor, i, length);
    }
  }
}

// Puts the given tensors into the order of the signature.
void order_inputs(const Signature& signature, const pykd_tensor* inputs, std::size_t num_inputs,
                  std::vector<pykd_tensor>& ordered) {
  const std::size_t count = signature.inputs.size();
  check_list(inputs, num_inputs, "inputs");
  ordered.assign(count, pykd_tensor{});  // a NULL name marks what has not been given
  for (std::size_t i = 0; i < num_inputs; ++i) {
    const std::size_t id = find_name(signature.inputs, inputs[i].name, i);
    if (id == kNone) unknown_name("an input", inputs[i].name, signature.inputs);
    if (ordered[id].name != nullptr) given_twice(inputs[i].name);
    ordered[id] = inputs[i];
  }
  if (num_inputs == count) return;
  std::vector<std::string> missing;
  for (std::size_t id = 0; id < count; ++id) {
    if (ordered[id].name == nullptr) missing.push_back(signature.inputs[id].name);
  }
  fail(PYKD_INVALID_VALUE, "the inputs " + join(names_of(signature.inputs)), "no " + join(missing), "give every input");
}

void check_same_float(const Signature& signature, const InputSpec& input, const pykd_tensor& tensor,
                      const std::vector<pykd_tensor>& ordered, pykd_dtype float_dtype) {
  if (tensor.dtype == float_dtype) return;
  std::size_t first = 0;
  while (!signature.inputs[first].is_float()) ++first;
  fail(PYKD_INVALID_TYPE, input.name + " of dtype " + dtype_name(float_dtype) + ", as " + ordered[first].name + " has",
       dtype_name(tensor.dtype), "all floating tensors of one call have one dtype: cast one of them");
}

// ---- Checks of the outputs ---------------------------------------------------------------------

std::vector<std::int64_t> output_lengths(const OutputSpec& output, const Binding& binding) {
  std::vector<std::int64_t> shape;
  for (std::size_t id : output.axis_ids) shape.push_back(binding.lengths[id]);
  return shape;
}

void check_output_shape(const OutputSpec& output, const pykd_tensor& tensor, const Binding& binding) {
  check_rank(output, tensor);
  for (std::size_t axis = 0; axis < output.axis_ids.size(); ++axis) {
    if (tensor.shape[axis] == binding.lengths[output.axis_ids[axis]]) continue;
    const std::vector<std::int64_t> shape = output_lengths(output, binding);
    fail(PYKD_INVALID_VALUE, output.name + " with shape " + shape_text(shape.data(), tensor.rank) + " for these inputs",
         "shape " + shape_text(tensor.shape, tensor.rank), "give memory of that shape; pykd_output_shape() tells it");
  }
}

void check_no_overlap(const Signature& signature, const std::vector<pykd_tensor>& inputs, const OutputSpec& output,
                      const pykd_tensor* outputs, std::size_t index, const std::vector<std::size_t>& output_ids) {
  const Extent written = extent_of(output.name, outputs[index]);
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    check_no_overlap(written, extent_of(signature.inputs[i].name, inputs[i]));
  }
  for (std::size_t i = 0; i < index; ++i) {
    check_no_overlap(written, extent_of(signature.outputs[output_ids[i]].name, outputs[i]));
  }
}

}  // namespace

pykd_dtype output_dtype(const OutputSpec& output, pykd_dtype float_dtype) {
  if (!output.is_any_float()) {
    for (pykd_dtype dtype : kDtypes) {
      if (output.dtypes == dtype_bit(dtype)) return dtype;
    }
  }
  if (output.gradient_of != kNone) return float_dtype;
  return float_dtype == PYKD_FLOAT64 ? PYKD_FLOAT64 : PYKD_FLOAT32;
}

Signature parse_signature(std::string text) {
  const json document = parse_document(text);
  const Object root(document, "");
  check_format(root);
  Signature signature;
  signature.kind = parse_kind(root);
  signature.name = root.text("name");
  // Opaque here: it is compared between the two files of a folder, and read in Python.
  if (document.contains("recipe")) signature.recipe = document["recipe"].dump();
  if (root.has("export_id")) signature.export_id = root.name("export_id");
  signature.parameter_form = parse_parameter_form(root);
  parse_inputs(root, signature);
  parse_parameters(root, signature);
  parse_outputs(root, signature);
  check_unique_names(signature);
  fill_axis_names(signature.inputs);
  fill_axis_names(signature.outputs);
  signature.metadata = std::move(text);
  return signature;
}

void check_one_export(const Signature& value, const Signature& gradient) {
  const json first = common_facts(value.metadata), second = common_facts(gradient.metadata);
  if (first == second) return;
  std::vector<std::string> differing;
  for (const json* facts : {&first, &second}) {
    for (const auto& [key, fact] : facts->items()) {
      const bool same = first.contains(key) && second.contains(key) && first[key] == second[key];
      const std::string quoted = in_quotes(key);
      if (!same && std::find(differing.begin(), differing.end(), quoted) == differing.end())
        differing.push_back(quoted);
    }
  }
  fail(PYKD_BAD_ARTEFACT, "loss.onnx and loss.grad.onnx of one export", "files that differ in " + join(differing),
       "copy the whole folder, or export the loss again");
}

Manifest parse_manifest(const std::string& text) {
  const json document = parse_document(text);
  const Object root(document, "");
  check_format(root);
  Manifest manifest;
  if (root.has("export_id")) manifest.export_id = root.name("export_id");
  const Object files = root.object("files");
  for (const auto& [name, described] : document["files"].items()) {
    const Object entry(described, files.field(name.c_str()));
    const std::int64_t bytes = entry.integer("bytes");
    if (bytes < 0) bad_metadata("a size as \"" + entry.field("bytes") + "\"", std::to_string(bytes));
    manifest.files.push_back({name, static_cast<std::uint64_t>(bytes), entry.text("sha256")});
  }
  return manifest;
}

Binding check_inputs(const Signature& signature, Device device, const pykd_tensor* inputs, std::size_t num_inputs,
                     std::vector<pykd_tensor>& ordered) {
  order_inputs(signature, inputs, num_inputs, ordered);
  Binding binding;
  binding.lengths.assign(signature.axes.size(), 0);
  bool float_seen = false;
  for (std::size_t id = 0; id < ordered.size(); ++id) {
    const InputSpec& input = signature.inputs[id];
    const pykd_tensor& tensor = ordered[id];
    check_rank(input, tensor);
    check_dtype(input, tensor);
    check_device(input, tensor, device);
    bind_axes(signature, input, tensor, binding.lengths);
    check_size(input.name, tensor);
    check_strides(input.name, tensor);
    check_data(input.name, tensor);
    if (!input.is_float()) continue;
    if (!float_seen) binding.float_dtype = tensor.dtype;
    float_seen = true;
    if (input.is_any_float()) {
      check_same_float(signature, input, tensor, ordered, binding.float_dtype);
    }
  }
  for (std::size_t id = 0; id < ordered.size(); ++id) {
    const InputSpec& input = signature.inputs[id];
    if (input.index_axis == kNone || ordered[id].device != PYKD_CPU) continue;
    check_labels(signature, input, ordered[id], binding.lengths[input.index_axis]);
  }
  return binding;
}

void check_parameters(const Signature& signature, const Binding& binding, const pykd_parameter* parameters,
                      std::size_t num_parameters, std::vector<double>& ordered) {
  check_list(parameters, num_parameters, "parameters");
  ordered.resize(signature.parameters.size());
  for (std::size_t id = 0; id < ordered.size(); ++id) {
    ordered[id] = signature.parameters[id].default_value;
  }
  for (std::size_t i = 0; i < num_parameters; ++i) {
    const pykd_parameter& given = parameters[i];
    const std::size_t id = find_name(signature.parameters, given.name, i);
    if (id == kNone) unknown_parameter(signature, given);
    for (std::size_t j = 0; j < i; ++j) {
      if (std::strcmp(parameters[j].name, given.name) == 0) given_twice(given.name);
    }
    const ParameterSpec& spec = signature.parameters[id];
    const double value = given.value;
    check_number("the parameter " + spec.name, value, binding.float_dtype);
    if (value < spec.minimum || (spec.minimum_exclusive && value == spec.minimum)) {
      fail(PYKD_INVALID_VALUE,
           "the parameter " + spec.name + (spec.minimum_exclusive ? " greater than " : " at least ") +
               number_text(spec.minimum),
           number_text(given.value), "give a larger value");
    }
    ordered[id] = given.value;
  }
}

std::size_t find_output(const Signature& signature, const char* name) {
  const std::size_t id = find_spec(signature.outputs, name);
  if (id != kNone) return id;
  if (std::strncmp(name, "grad_", 5) == 0 && signature.kind == ArtefactKind::kValue) {
    fail(PYKD_INVALID_VALUE, "an artefact with gradients for " + in_quotes(name), "one that holds the value alone",
         "load loss.grad.onnx, loss.pt or their folder");
  }
  unknown_name("an output", name, signature.outputs);
}

void check_outputs(const Signature& signature, Device device, const Binding& binding,
                   const std::vector<pykd_tensor>& inputs, const pykd_tensor* outputs, std::size_t num_outputs,
                   std::vector<std::size_t>& output_ids) {
  check_list(outputs, num_outputs, "outputs");
  if (num_outputs == 0) {
    fail(PYKD_INVALID_VALUE, "at least one output", "none", "ask for some of " + join(names_of(signature.outputs)));
  }
  output_ids.clear();
  output_ids.reserve(num_outputs);
  for (std::size_t i = 0; i < num_outputs; ++i) {
    const pykd_tensor& tensor = outputs[i];
    const std::size_t id = find_output(signature, tensor.name);
    if (std::find(output_ids.begin(), output_ids.end(), id) != output_ids.end()) {
      given_twice(tensor.name);
    }
    const OutputSpec& output = signature.outputs[id];
    output_ids.push_back(id);
    check_output_shape(output, tensor, binding);
    const pykd_dtype expected = output_dtype(output, binding.float_dtype);
    if (raw(tensor.dtype) != expected) {
      fail(PYKD_INVALID_TYPE, output.name + " of dtype " + dtype_name(expected), given_dtype(tensor),
           "give memory of that dtype; pykd_output_shape() tells it");
    }
    const bool scalar_on_cpu = output.rank() == 0 && raw(tensor.device) == PYKD_CPU;
    if (!scalar_on_cpu) check_device(output, tensor, device);
    check_strides(output.name, tensor);
    check_data(output.name, tensor);
    check_no_overlap(signature, inputs, output, outputs, i, output_ids);
  }
}

}  // namespace pykd::internal
