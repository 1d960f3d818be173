// scan_onnx(): an ONNX file without ONNX Runtime. What comes through is data of bounded cost: operators that are known,
// in an order in which each has what it needs, small constants, and the names, dtypes and axes of the metadata.
#include "runtime/artefact/onnx_scan.h"

#include <algorithm>
#include <protozero/exception.hpp>
#include <unordered_map>
#include <unordered_set>

#include "base/error.h"
#include "runtime/artefact/onnx_contents.h"
#include "runtime/artefact/onnx_operators.h"

namespace pykd::internal {

using namespace onnx;

namespace {

// ---- Operators ---------------------------------------------------------------------------------

const OnnxOperator& operator_of(const Node& node) {
  for (const OnnxOperator& known : kOnnxOperators) {
    if (known.name == node.op) return known;
  }
  fail(PYKD_BAD_ARTEFACT, "operators that pykd's loader knows in the ONNX file", in_quotes(node.op),
       "load a file that pykd.export wrote; to add an operator see cpp/runtime/artefact/onnx_operators.h");
}

// The letter of the type that an operator's attribute has; 0 where it has no such attribute.
char type_of_attribute(std::string_view attributes, std::string_view name) {
  while (!attributes.empty()) {
    const std::size_t end = std::min(attributes.find(' '), attributes.size());
    const std::string_view item = attributes.substr(0, end);
    if (item.substr(0, item.size() - 2) == name) return item.back();
    attributes.remove_prefix(std::min(end + 1, attributes.size()));
  }
  return 0;
}

void check_attributes_once(const Node& node) {
  for (std::size_t i = 0; i < node.attributes.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      if (node.attributes[i].name == node.attributes[j].name) {
        refuse("every attribute of " + in_quotes(node.op) + " once", in_quotes(node.attributes[i].name) + " twice");
      }
    }
  }
}

void check_operator(const Node& node, const OnnxOperator& known) {
  if (node.inputs.size() > known.max_inputs || node.outputs.empty() || node.outputs.size() > known.max_outputs) {
    refuse("as many inputs and outputs of " + in_quotes(node.op) + " as it has", "others");
  }
  check_attributes_once(node);
  for (const Attribute& attribute : node.attributes) {
    const char letter = type_of_attribute(known.attributes, attribute.name);
    if (letter == 0 || letter != letter_of(attribute.type)) {
      refuse("attributes that " + in_quotes(node.op) + " has, of their types", in_quotes(attribute.name));
    }
    if (node.op == "Cast") bytes_of_element(attribute.integer);  // refuses strings
  }
  if (node.op == "Constant" && node.attributes.empty()) refuse("a value for every constant", "none");
}

// A kernel takes its settings from the node, and the function's body has them built in.
void check_call(const Node& node, const Function& function) {
  if (node.inputs.size() > function.inputs.size() || node.outputs.empty() ||
      node.outputs.size() > function.outputs.size()) {
    refuse("as many inputs and outputs of " + in_quotes(node.op) + " as its function has", "others");
  }
  check_attributes_once(node);
  for (const Attribute& attribute : node.attributes) {
    const auto& names = function.attributes;
    if (std::find(names.begin(), names.end(), attribute.name) == names.end()) {
      refuse("the attributes of its function for " + in_quotes(node.op), in_quotes(attribute.name));
    }
    if (attribute.type != 1 && attribute.type != 3) {
      refuse("a float or a string as the attribute " + in_quotes(attribute.name) + " of " + in_quotes(node.op),
             "ONNX type " + std::to_string(attribute.type));
    }
  }
  if (node.attributes.size() != function.attributes.size()) {
    refuse(
        std::to_string(function.attributes.size()) + " attributes of " + in_quotes(node.op) + ", as its function has,",
        std::to_string(node.attributes.size()));
  }
}

// ---- Bodies: of the graph and of functions -----------------------------------------------------

// Engines replace calls by bodies. A function that calls itself would keep them busy for ever, and
// a few that call each other ten times over would fill the memory: so they come in order, callees
// first, and what they expand to is bounded. A call without a body would tie the file to engines
// that have an op of that name.
class Bodies {
 public:
  explicit Bodies(const OnnxContents& contents) : scan_(contents) {
    for (std::size_t i = 0; i < contents.functions.size(); ++i) {
      if (!indices_.emplace(contents.functions[i].name, i).second) {
        refuse("every function once", in_quotes(contents.functions[i].name) + " twice");
      }
    }
  }

  void check() {
    for (const Function& function : scan_.functions) {
      Values values;
      for (const std::string_view input : function.inputs) add(values, input, {});
      sizes_.push_back(run(function.nodes, values));
      for (const std::string_view output : function.outputs) check_computed(values, output, "function");
    }
    Values values;
    for (const ValueInfo& input : scan_.inputs) add(values, input.name, {});
    for (const auto& [name, constant] : scan_.initializers) {
      // One that is an input, too, is the default of a parameter.
      if (values.count(name) == 0) add(values, name, {&constant, std::max<std::size_t>(constant.elements, 1), false});
    }
    run(scan_.nodes, values);
    for (const ValueInfo& output : scan_.outputs) check_computed(values, output.name, "graph");
  }

 private:
  struct Value {
    const Constant* constant = nullptr;  // as it stands in the file
    std::size_t elements = 0;            // of what depends on constants alone; 0: it depends on an input
    bool computed = false;
  };
  using Values = std::unordered_map<std::string_view, Value>;

  static void add(Values& values, std::string_view name, Value value) {
    if (name.empty() || !values.emplace(name, value).second) {
      refuse("a name of its own for every value", in_quotes(name) + (name.empty() ? "" : " twice"));
    }
  }

  // An output that no node computes would stay as the caller's memory is.
  static void check_computed(const Values& values, std::string_view name, const char* of) {
    const auto found = values.find(name);
    if (found == values.end() || !found->second.computed) {
      refuse(std::string("a node that computes the output ") + in_quotes(name) + " of a " + of, "none");
    }
  }

  // Returns how many nodes the body expands to.
  std::size_t run(const std::vector<Node>& nodes, Values& values) {
    std::size_t expanded = nodes.size();
    for (const Node& node : nodes) {
      Value result;
      if (node.is_call) {
        const auto found = indices_.find(node.op);
        if (found == indices_.end()) {
          refuse("a function for every operator of domain \"pykd\"", "none for " + in_quotes(node.op));
        }
        if (found->second >= sizes_.size()) {
          refuse("functions that call earlier ones alone", "a call of " + in_quotes(node.op) + " before it");
        }
        expanded += sizes_[found->second];
        if (expanded > kMaxNodes) {
          refuse("at most " + std::to_string(kMaxNodes) + " nodes with functions expanded", "more");
        }
        check_call(node, scan_.functions[found->second]);
        if (depends_on_constants(node, values, nullptr)) {
          refuse("inputs of " + in_quotes(node.op) + " that depend on the graph's", "constants");
        }
      } else {
        result = evaluate(node, values);
      }
      result.computed = true;
      for (const std::string_view output : node.outputs) {
        if (!(node.is_call && output.empty())) add(values, output, result);
      }
    }
    return expanded;
  }

  // Whether every input is a constant; `largest` then becomes the elements that they broadcast to.
  static bool depends_on_constants(const Node& node, const Values& values, std::size_t* largest) {
    bool constant = true;
    std::size_t elements = 1;
    for (const std::string_view input : node.inputs) {
      if (input.empty()) continue;  // left out
      const auto found = values.find(input);
      if (found == values.end()) {
        refuse("values that an earlier node computes as inputs of " + in_quotes(node.op), in_quotes(input));
      }
      constant &= found->second.elements != 0;
      elements *= std::max<std::size_t>(found->second.elements, 1);
      if (constant && elements > kMaxElements) elements = kMaxElements + 1;
    }
    if (largest != nullptr) *largest = elements;
    return constant;
  }

  // Engines compute what depends on constants alone when they open a file, whatever its size.
  static Value evaluate(const Node& node, const Values& values) {
    const OnnxOperator& known = operator_of(node);
    check_operator(node, known);
    if (node.op == "Constant") {
      const Constant& constant = *node.attributes[0].constant;
      return {&constant, std::max<std::size_t>(constant.elements, 1), false};
    }
    // The shape that an Expand takes from the file, where it stands there.
    Value result;
    const bool constant = depends_on_constants(node, values, &result.elements);
    const auto given = node.op == "Expand" && node.inputs.size() == 2 ? values.find(node.inputs[1]) : values.end();
    const Constant* shape = given == values.end() ? nullptr : given->second.constant;
    if (shape != nullptr && (shape->asked_for > kMaxElements || shape->elements > kMaxRank)) {
      refuse("shapes of at most " + std::to_string(kMaxElements) + " elements", "a larger one");
    }
    if (!constant) return {};
    if (shape != nullptr) result.elements *= std::max<std::size_t>(shape->asked_for, 1);
    if ((known.may_grow && shape == nullptr) || result.elements > kMaxElements) {
      refuse("inputs of " + in_quotes(node.op) + " that depend on the graph's", "constants");
    }
    return result;
  }

  const OnnxContents& scan_;
  std::unordered_map<std::string_view, std::size_t> indices_;  // of the functions
  std::vector<std::size_t> sizes_;                             // in nodes, of those functions that have been checked
};

PykdNodes pykd_nodes(const OnnxContents& contents) {
  PykdNodes nodes;
  for (const Node& node : contents.nodes) {
    if (node.is_call) nodes.in_graph.emplace(node.op);
  }
  for (const Function& function : contents.functions) {
    std::set<std::string>& names = nodes.in_functions[std::string(function.name)];
    for (const Node& node : function.nodes) {
      if (node.is_call) names.emplace(node.op);
    }
  }
  return nodes;
}

void check_opsets(const OnnxContents& contents) {
  bool calls = false;
  for (const Node& node : contents.nodes) calls |= node.is_call;
  if (contents.opsets.count("") == 0 || (calls && contents.opsets.count("pykd") == 0)) {
    refuse("the operator sets of its nodes", "one missing");
  }
}

// ---- The graph against the metadata ------------------------------------------------------------

const ValueInfo& find_value(const std::vector<ValueInfo>& values, const std::string& name, const char* what) {
  const ValueInfo* found = nullptr;
  for (const ValueInfo& value : values) {
    if (value.name != name) continue;
    if (found != nullptr) refuse(std::string(what) + " " + name + " once", "it twice");
    found = &value;
  }
  if (found == nullptr) {
    refuse(std::string(what) + " " + name + ", as its metadata says,", "none of that name");
  }
  return *found;
}

void check_value(const std::vector<ValueInfo>& values, const std::string& name, const char* what, pykd_dtype dtype,
                 const std::vector<std::string>& axes) {
  const ValueInfo& value = find_value(values, name, what);
  if (value.dtype != onnx_dtype(dtype) || value.axes.size() != axes.size()) {
    refuse(std::string(what) + " " + name + " of " + dtype_name(dtype) + " and rank " + std::to_string(axes.size()) +
               ", as its metadata says,",
           "ONNX type " + std::to_string(value.dtype) + " and rank " + std::to_string(value.axes.size()));
  }
  for (std::size_t i = 0; i < axes.size(); ++i) {
    if (value.axes[i] != axes[i]) {
      refuse("the free axis " + axes[i] + " of " + name + ", as its metadata says,",
             value.axes[i].empty() ? "one without a name" : in_quotes(value.axes[i]));
    }
  }
}

void check_no_default(const OnnxContents& contents, const std::string& name) {
  if (contents.initializers.count(name) != 0) refuse("no default for the input " + name, "one");
}

// Engines are given the parameters that differ from their default alone: so the default that the metadata says is the
// one that the graph has, to the last bit.
void check_default(const OnnxContents& contents, const ParameterSpec& parameter, pykd_dtype dtype) {
  const auto found = contents.initializers.find(parameter.name);
  if (found == contents.initializers.end()) refuse("a default for the parameter " + parameter.name, "none");
  const double value = parameter.default_value;
  const double expected = dtype == PYKD_FLOAT32 ? static_cast<double>(static_cast<float>(value)) : value;
  const std::optional<double>& got = found->second.number;
  // NOLINTNEXTLINE(bugprone-suspicious-memory-comparison): −0 is not 0
  if (got && std::memcmp(&*got, &expected, sizeof expected) == 0) return;
  refuse("the default " + number_text(expected) + " for the parameter " + parameter.name + ", as the metadata says,",
         got ? number_text(*got) : "a tensor that is no number of " + std::string(dtype_name(dtype)));
}

// "float" is for TorchScript files, so that every dtype here is a single one.
pykd_dtype single_dtype(std::uint32_t dtypes) {
  for (const pykd_dtype dtype : kDtypes) {
    if (dtypes == dtype_bit(dtype)) return dtype;
  }
  return PYKD_FLOAT32;
}

void check_counts(const OnnxContents& contents, const Signature& signature) {
  const std::size_t arguments = signature.inputs.size() + signature.parameters.size();
  if (contents.inputs.size() != arguments) {
    refuse(std::to_string(arguments) + " inputs, as its metadata says,", std::to_string(contents.inputs.size()));
  }
  if (contents.outputs.size() != signature.outputs.size()) {
    refuse(std::to_string(signature.outputs.size()) + " outputs, as its metadata says,",
           std::to_string(contents.outputs.size()));
  }
}

void check_graph(const OnnxContents& contents, const Signature& signature) {
  check_counts(contents, signature);
  const pykd_dtype parameter_dtype = signature.parameter_dtype;
  for (const InputSpec& input : signature.inputs) {
    check_value(contents.inputs, input.name, "an input", single_dtype(input.dtypes), input.axes);
    check_no_default(contents, input.name);
  }
  for (const ParameterSpec& parameter : signature.parameters) {
    check_value(contents.inputs, parameter.name, "an input", parameter_dtype, {});
    if (signature.parameter_form == ParameterForm::kInputs) {
      check_no_default(contents, parameter.name);
    } else {
      check_default(contents, parameter, parameter_dtype);
    }
  }
  for (const ParameterSpec& parameter : signature.fixed) check_default(contents, parameter, parameter_dtype);
  for (const OutputSpec& output : signature.outputs) {
    check_value(contents.outputs, output.name, "an output", single_dtype(output.dtypes), output.axes);
  }
}

}  // namespace

std::set<std::string> PykdNodes::that_run(const std::set<std::string>& ops) const {
  std::set<std::string> run, seen = in_graph;
  std::vector<std::string> open(in_graph.begin(), in_graph.end());
  while (!open.empty()) {
    const std::string name = std::move(open.back());
    open.pop_back();
    if (ops.count(name) != 0) {
      run.insert(name);
      continue;
    }
    const auto function = in_functions.find(name);
    if (function == in_functions.end()) continue;
    for (const std::string& inner : function->second) {
      if (seen.insert(inner).second) open.push_back(inner);
    }
  }
  return run;
}

Signature scan_onnx(const ArtefactFile& file, PykdNodes* nodes) {
  check_size(file.label, FileFormat::kOnnx, file.bytes.size());
  try {
    const OnnxContents contents = read_onnx(file.bytes);
    if (!contents.metadata) refuse("the metadata entry \"pykd\"", "none");
    Signature signature = parse_signature(std::string(*contents.metadata));
    if (signature.kind == ArtefactKind::kTorchScript) {
      refuse("\"value\", \"gradient\" or \"score\" as the kind", "\"torchscript\"");
    }
    check_graph(contents, signature);
    Bodies(contents).check();
    check_opsets(contents);
    if (nodes != nullptr) *nodes = pykd_nodes(contents);
    return signature;
  } catch (const protozero::exception& error) {
    fail(PYKD_BAD_ARTEFACT, "an ONNX file at " + file.label, std::string("bytes that are none (") + error.what() + ")",
         "load a file that pykd.export wrote");
  } catch (const Failure& failure) {
    throw Failure(failure.status(), file.label + ": " + failure.what());
  }
}

}  // namespace pykd::internal
