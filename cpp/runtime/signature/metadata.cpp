#include "runtime/signature/metadata.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.h"

namespace pykd::internal {
namespace {

using nlohmann::json;

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
    if (object.has("maximum")) parameter.maximum = object.number("maximum");
    if (parameter.is_low(parameter.default_value) || parameter.is_high(parameter.default_value)) {
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

// A file of scores: whatever goes in or comes out has the samples along its first axis.
void check_rows(const Signature& signature) {
  const std::size_t scores = find_spec(signature.outputs, "loss_per_sample");
  if (scores == kNone || signature.outputs[scores].rank() == 0) {
    bad_metadata("a vector \"loss_per_sample\" among \"outputs\"", scores == kNone ? "none" : "a scalar");
  }
  const std::string& samples = signature.outputs[scores].axes[0];
  auto check = [&](const TensorSpec& spec) {
    if (spec.rank() == 0 || spec.axes[0] != samples) {
      bad_metadata("the first axis " + samples + " of every input and output where \"kind\" is \"score\"", spec.name);
    }
  };
  for (const InputSpec& input : signature.inputs) check(input);
  for (const OutputSpec& output : signature.outputs) check(output);
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
    if (is_gradient && !gives_gradients(signature.kind)) {
      bad_metadata("no gradients where \"kind\" is " + in_quotes(root.text("kind")), output.name);
    }
    signature.outputs.push_back(std::move(output));
  });
  for (const InputSpec& input : signature.inputs) {
    const bool expected = input.has_gradient && gives_gradients(signature.kind);
    if (expected != (input.gradient_output != kNone)) {
      bad_metadata(std::string(expected ? "the" : "no") + " gradient of " + input.name + " among \"outputs\"",
                   expected ? "none" : "one");
    }
  }
  if (signature.kind == ArtefactKind::kScore) return check_rows(signature);
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
  if (kind == "score") return ArtefactKind::kScore;
  bad_metadata("\"value\", \"gradient\", \"torchscript\" or \"score\" as \"kind\"", in_quotes(kind));
}

ParameterForm parse_parameter_form(const Object& root) {
  if (!root.has("parameters_as")) return ParameterForm::kOverridable;
  const std::string form = root.text("parameters_as");
  if (form == "fixed") return ParameterForm::kFixed;
  if (form == "inputs") return ParameterForm::kInputs;
  bad_metadata("\"fixed\" or \"inputs\" as \"parameters_as\"", in_quotes(form));
}

// The least length of every axis of the signature; 1 where the file says nothing.
std::vector<std::int64_t> parse_least_lengths(const Object& root, const json& document, const Signature& signature) {
  std::vector<std::int64_t> least(signature.axes.size(), 1);
  if (!root.has("least_lengths")) return least;
  const Object lengths = root.object("least_lengths");
  for (const auto& [axis, length] : document["least_lengths"].items()) {
    const std::size_t id = find_axis(signature, axis);
    if (id == kNone) bad_metadata("axes that the inputs have in \"least_lengths\"", in_quotes(axis));
    least[id] = lengths.integer(axis.c_str());
    if (least[id] < 1) {
      bad_metadata("at least 1 as \"" + lengths.field(axis.c_str()) + "\"", std::to_string(least[id]));
    }
  }
  return least;
}

void point_at_axes(TensorSpec& spec) {
  spec.axis_names.clear();
  for (const std::string& axis : spec.axes) spec.axis_names.push_back(axis.c_str());
}

}  // namespace

Signature Signature::copy() const {
  Signature made(*this);
  for (InputSpec& input : made.inputs) point_at_axes(input);
  for (OutputSpec& output : made.outputs) point_at_axes(output);
  return made;
}

void show_axes(Signature& signature, const std::vector<std::int64_t>& least) {
  auto show = [&](TensorSpec& spec) {
    point_at_axes(spec);
    for (const std::size_t id : spec.axis_ids) {
      const std::int64_t fixed = signature.fixed_lengths.empty() ? 0 : signature.fixed_lengths[id];
      spec.least_lengths.push_back(fixed != 0 ? fixed : least.empty() ? 1 : least[id]);
      spec.lengths.push_back(fixed);
    }
  };
  for (InputSpec& input : signature.inputs) show(input);
  for (OutputSpec& output : signature.outputs) show(output);
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
  for (const InputSpec& input : signature.inputs) {
    if (input.dtypes == dtype_bit(PYKD_FLOAT64)) signature.parameter_dtype = PYKD_FLOAT64;
  }
  parse_parameters(root, signature);
  parse_outputs(root, signature);
  check_unique_names(signature);
  show_axes(signature, parse_least_lengths(root, document, signature));
  signature.metadata = std::move(text);
  return signature;
}

ScorerMetadata parse_scorer(const std::string& text) {
  constexpr std::int64_t kScorerVersion = 1;
  const json document = parse_document(text);
  const Object root(document, "");
  const std::int64_t version = root.integer("format_version");
  if (version != kScorerVersion) {
    fail(PYKD_BAD_ARTEFACT, "a merged scorer of format version " + std::to_string(kScorerVersion),
         "format version " + std::to_string(version), "upgrade pykd, or merge the models again");
  }
  root.object("loss");
  ScorerMetadata scorer;
  scorer.loss = parse_signature(document["loss"].dump());
  if (root.has("lengths")) {
    const Object lengths = root.object("lengths");
    for (const auto& [axis, length] : document["lengths"].items()) {
      scorer.lengths[axis] = lengths.integer(axis.c_str());
      if (scorer.lengths[axis] < 1) {
        bad_metadata("at least 1 as \"" + lengths.field(axis.c_str()) + "\"", std::to_string(scorer.lengths[axis]));
      }
    }
  }
  for (const json& name : root.list("outputs")) {
    if (!name.is_string()) bad_metadata("a list of strings as \"outputs\"", std::string("type ") + name.type_name());
    scorer.outputs.push_back(name.get<std::string>());
  }
  return scorer;
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

}  // namespace pykd::internal
