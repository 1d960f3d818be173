// scan_onnx(): an ONNX file without ONNX Runtime. What comes through is data of bounded cost: operators that are known,
// in an order in which each has what it needs, small constants, and the names, dtypes and axes of the metadata.
#include <algorithm>
#include <cstring>
#include <protozero/pbf_reader.hpp>
#include <unordered_map>
#include <unordered_set>

#include "base/error.h"
#include "runtime/artefact/onnx_operators.h"
#include "runtime/artefact/onnx_scan.h"

namespace pykd::internal {
namespace {

// The largest files of pykd's losses have 400 nodes with functions expanded, and a composition has at most 100 losses.
constexpr std::size_t kMaxNodes = 60000;
constexpr std::size_t kMaxArguments = 4000;  // of the graph: inputs, outputs, initialisers with a default
constexpr std::size_t kMaxFunctions = 1000;
constexpr std::size_t kMaxElements = 1 << 20;  // of one constant, and of what a constant shape asks for

using protozero::pbf_reader;
using protozero::pbf_wire_type;
using protozero::tag_and_type;

// A field with the wire type that onnx.proto gives it. One with another wire type is, to every
// protobuf parser, an unknown field: it is skipped.
constexpr std::uint32_t message(protozero::pbf_tag_type tag) {
  return tag_and_type(tag, pbf_wire_type::length_delimited);
}
constexpr std::uint32_t number(protozero::pbf_tag_type tag) { return tag_and_type(tag, pbf_wire_type::varint); }
constexpr std::uint32_t fixed32(protozero::pbf_tag_type tag) { return tag_and_type(tag, pbf_wire_type::fixed32); }

[[noreturn]] void refuse(const std::string& expected, const std::string& got) {
  fail(PYKD_BAD_ARTEFACT, expected + " in the ONNX file", got, "load a file that pykd.export wrote");
}

// protobuf merges or overwrites a singular field that comes twice; parsers that disagree about it
// are how checks are passed by.
template <class T>
void set_once(std::optional<T>& field, T value, const char* name) {
  if (field) refuse(std::string(name) + " once", "it twice");
  field = std::move(value);
}

std::string_view view_of(const pbf_reader& reader) {
  const protozero::data_view bytes = const_cast<pbf_reader&>(reader).get_view();
  return {bytes.data(), bytes.size()};
}

bool is_standard(std::string_view domain) { return domain.empty() || domain == "ai.onnx"; }

void check_domain(std::string_view domain, const char* what) {
  if (!is_standard(domain) && domain != "pykd") {
    refuse(std::string(what) + " of the standard domain or of \"pykd\"", "domain " + in_quotes(domain));
  }
}

// ---- What the scan collects. All views point into the file -------------------------------------

// onnx.TensorProto.DataType
constexpr std::int64_t kOnnxFloat = 1, kOnnxInt32 = 6, kOnnxInt64 = 7, kOnnxBool = 9, kOnnxFloat16 = 10,
                       kOnnxDouble = 11, kOnnxBfloat16 = 16;

std::int64_t onnx_dtype(pykd_dtype dtype) {
  switch (dtype) {
    case PYKD_FLOAT16:
      return kOnnxFloat16;
    case PYKD_BFLOAT16:
      return kOnnxBfloat16;
    case PYKD_FLOAT32:
      return kOnnxFloat;
    case PYKD_FLOAT64:
      return kOnnxDouble;
    case PYKD_INT64:
      return kOnnxInt64;
  }
  return 0;
}

// A tensor that lies in the file.
struct Constant {
  std::string_view name;
  std::size_t elements = 1;
  std::size_t asked_for = 0;     // the product of its elements, where they may be a shape
  std::optional<double> number;  // its one element, of float32 or float64
};

struct Attribute {
  std::string_view name;
  std::int64_t type = 0;  // onnx.AttributeProto.AttributeType
  std::int64_t integer = 0;
  std::optional<Constant> constant;
};

// By onnx.AttributeProto.AttributeType, the letters of the operators' table and the field with the value.
struct AttributeType {
  std::int64_t type;
  char letter;
  std::uint32_t field;
};
constexpr AttributeType kAttributeTypes[] = {
    {1, 'f', fixed32(2)}, {2, 'i', number(3)},  {3, 's', message(4)},
    {4, 't', message(5)}, {6, 'F', message(7)}, {7, 'I', message(8)},
};

struct Node {
  std::string_view op;
  bool is_call = false;  // of a function of domain "pykd"
  std::vector<std::string_view> inputs, outputs;
  std::vector<Attribute> attributes;
};

struct Function {
  std::string_view name;
  std::vector<std::string_view> inputs, outputs, attributes;
  std::vector<Node> nodes;
};

struct ValueInfo {
  std::string_view name;
  std::int64_t dtype = 0;
  std::vector<std::string_view> axes;  // empty where one has no name
};

struct Scan {
  std::optional<std::string_view> metadata;
  std::vector<ValueInfo> inputs, outputs;
  std::unordered_map<std::string_view, Constant> initializers;
  std::vector<Node> nodes;
  std::vector<Function> functions;
  std::size_t num_nodes = 0;  // functions' included
  std::unordered_map<std::string_view, std::int64_t> opsets;
};

template <class Items>
void bound(const Items& items, std::size_t limit, const char* what) {
  if (items.size() >= limit) refuse("at most " + std::to_string(limit) + " " + what, "more");
}

// ---- Tensors and attributes --------------------------------------------------------------------

template <class T>
T element(std::string_view bytes, std::size_t index) {
  T value;
  std::memcpy(&value, bytes.data() + index * sizeof value, sizeof value);
  return value;
}

std::size_t bytes_of_element(std::int64_t dtype) {
  switch (dtype) {
    case kOnnxFloat:
    case kOnnxInt32:
      return 4;
    case kOnnxInt64:
    case kOnnxDouble:
      return 8;
    case kOnnxFloat16:
    case kOnnxBfloat16:
      return 2;
    case kOnnxBool:
      return 1;
    default:
      refuse("tensors of numbers", "one of ONNX type " + std::to_string(dtype));
  }
}

void add_dimension(Constant& constant, std::int64_t length) {
  if (length < 0 || length > static_cast<std::int64_t>(kMaxElements)) {
    refuse("constants of at most " + std::to_string(kMaxElements) + " elements",
           "a length of " + std::to_string(length));
  }
  constant.elements *= static_cast<std::size_t>(length);
  if (constant.elements > kMaxElements) {
    refuse("constants of at most " + std::to_string(kMaxElements) + " elements", "one of more");
  }
}

// The elements lie in one field: as raw bytes, or as packed numbers, which are the same bytes. Whatever else a tensor
// may hold could mean something else to an engine.
Constant scan_tensor(pbf_reader tensor) {
  Constant result;
  std::optional<std::int64_t> dtype;
  std::optional<std::string_view> name, elements;
  std::int64_t dtype_of_field = 0;
  while (tensor.next()) {
    switch (tensor.tag_and_type()) {
      case number(1):
        add_dimension(result, tensor.get_int64());
        break;
      case message(1):
        for (const std::int64_t length : tensor.get_packed_int64()) add_dimension(result, length);
        break;
      case number(2):
        set_once(dtype, static_cast<std::int64_t>(tensor.get_int64()), "the type of a tensor");
        break;
      case message(4):
        dtype_of_field = kOnnxFloat;
        set_once(elements, view_of(tensor), "the elements of a tensor");
        break;
      case message(8):
        set_once(name, view_of(tensor), "the name of a tensor");
        break;
      case message(9):
        set_once(elements, view_of(tensor), "the elements of a tensor");
        break;
      case message(10):
        dtype_of_field = kOnnxDouble;
        set_once(elements, view_of(tensor), "the elements of a tensor");
        break;
      case message(12):  // remarks
      case message(16):
        tensor.skip();
        break;
      case message(13):
        refuse("no external data", "a tensor with external_data");
      case number(14):
        if (tensor.get_uint64() != 0) refuse("no external data", "a tensor that lies elsewhere");
        break;
      default:
        refuse("tensors of raw bytes or of packed numbers", "field " + std::to_string(tensor.tag()) + " in one");
    }
  }
  result.name = name.value_or("");
  const std::string_view bytes = elements.value_or("");
  if (dtype_of_field != 0 && dtype != dtype_of_field) refuse("a tensor of the type of its elements", "another type");
  const std::size_t size = bytes_of_element(dtype.value_or(0));
  if (bytes.size() != result.elements * size) {
    refuse(std::to_string(result.elements * size) + " bytes for the elements of the tensor " + in_quotes(result.name),
           std::to_string(bytes.size()));
  }
  if (dtype == kOnnxFloat && result.elements == 1) result.number = static_cast<double>(element<float>(bytes, 0));
  if (dtype == kOnnxDouble && result.elements == 1) result.number = element<double>(bytes, 0);
  if (dtype == kOnnxInt64 && result.elements <= kMaxRank) {
    result.asked_for = 1;
    for (std::size_t i = 0; i < result.elements; ++i) {
      const auto length = element<std::int64_t>(bytes, i);  // −1 and 0 stand for a length of the input
      if (length <= 1) continue;
      const std::size_t limit = kMaxElements + 1;
      result.asked_for = std::min(limit, result.asked_for * std::min(limit, static_cast<std::size_t>(length)));
    }
  }
  return result;
}

// The value stands in the field of its type, once, and in no other.
Attribute scan_attribute(pbf_reader attribute) {
  Attribute result;
  std::optional<std::string_view> name;
  std::optional<std::int64_t> type;
  std::optional<std::uint32_t> field;
  while (attribute.next()) {
    const std::uint32_t here = attribute.tag_and_type();
    switch (here) {
      case message(1):
        set_once(name, view_of(attribute), "the name of an attribute");
        break;
      case number(20):
        set_once(type, static_cast<std::int64_t>(attribute.get_int64()), "the type of an attribute");
        break;
      case message(13):
        attribute.skip();  // a remark
        break;
      case number(3):
        set_once(field, here, "the value of an attribute");
        result.integer = attribute.get_int64();
        break;
      case message(5):
        set_once(field, here, "the value of an attribute");
        result.constant = scan_tensor(attribute.get_message());
        break;
      case fixed32(2):
      case message(4):
      case message(7):
      case message(8):
        set_once(field, here, "the value of an attribute");
        attribute.skip();
        break;
      case number(8):  // lists may be written number by number
      case fixed32(7):
        if (field && field != message(attribute.tag())) refuse("the value of an attribute once", "it twice");
        field = message(attribute.tag());
        attribute.skip();
        break;
      case message(6):
      case message(11):
        refuse("no subgraphs", "an attribute that holds a graph");
      case message(22):
      case message(23):
        refuse("no sparse tensors", "an attribute that holds one");
      default:
        refuse("attributes that are a number, a string, a list of numbers or a tensor",
               in_quotes(name.value_or("")) + " with field " + std::to_string(attribute.tag()));
    }
  }
  result.name = name.value_or("");
  result.type = type.value_or(0);
  for (const AttributeType& known : kAttributeTypes) {
    const bool empty_list = !field && (known.letter == 'F' || known.letter == 'I');
    if (known.type == result.type && (field == known.field || empty_list)) return result;
  }
  refuse("a value of its type for the attribute " + in_quotes(result.name), "another");
}

// ---- Nodes, functions and the graph ------------------------------------------------------------

Node scan_node(pbf_reader node, Scan& scan) {
  if (++scan.num_nodes > kMaxNodes) refuse("at most " + std::to_string(kMaxNodes) + " nodes", "more");
  Node result;
  std::optional<std::string_view> domain, op;
  while (node.next()) {
    switch (node.tag_and_type()) {
      case message(1):
        bound(result.inputs, kAnyNumber, "inputs of a node");
        result.inputs.push_back(view_of(node));
        break;
      case message(2):
        bound(result.outputs, kAnyNumber, "outputs of a node");
        result.outputs.push_back(view_of(node));
        break;
      case message(4):
        set_once(op, view_of(node), "the operator of a node");
        break;
      case message(5):
        bound(result.attributes, 32, "attributes of a node");
        result.attributes.push_back(scan_attribute(node.get_message()));
        break;
      case message(7):
        set_once(domain, view_of(node), "the domain of a node");
        break;
      case message(8):
        refuse("operators without overloads", "the overload " + in_quotes(view_of(node)));
      default:
        node.skip();
    }
  }
  check_domain(domain.value_or(""), "operators");
  result.op = op.value_or("");
  result.is_call = !is_standard(domain.value_or(""));
  return result;
}

// Engines give every operator the meaning that it has in the version of its domain.
void add_opset(pbf_reader opset, std::unordered_map<std::string_view, std::int64_t>& opsets) {
  std::optional<std::string_view> domain;
  std::optional<std::int64_t> version;
  while (opset.next()) {
    switch (opset.tag_and_type()) {
      case message(1):
        set_once(domain, view_of(opset), "the domain of an operator set");
        break;
      case number(2):
        set_once(version, static_cast<std::int64_t>(opset.get_int64()), "the version of an operator set");
        break;
      default:
        opset.skip();
    }
  }
  check_domain(domain.value_or(""), "operator sets");
  const std::string_view name = is_standard(domain.value_or("")) ? "" : *domain;
  const std::int64_t wanted = name.empty() ? kOnnxOpset : kPykdOpset;
  if (version.value_or(0) != wanted) {
    refuse("version " + std::to_string(wanted) + " of the operator set " + in_quotes(name),
           "version " + std::to_string(version.value_or(0)));
  }
  if (!opsets.emplace(name, *version).second) refuse("every operator set once", in_quotes(name) + " twice");
}

Function scan_function(pbf_reader function, Scan& scan) {
  Function result;
  std::optional<std::string_view> name, domain;
  std::unordered_map<std::string_view, std::int64_t> opsets;
  while (function.next()) {
    switch (function.tag_and_type()) {
      case message(1):
        set_once(name, view_of(function), "the name of a function");
        break;
      case message(4):
        bound(result.inputs, kAnyNumber, "inputs of a function");
        result.inputs.push_back(view_of(function));
        break;
      case message(5):
        bound(result.outputs, kAnyNumber, "outputs of a function");
        result.outputs.push_back(view_of(function));
        break;
      case message(6):
        bound(result.attributes, kAnyNumber, "attributes of a function");
        result.attributes.push_back(view_of(function));
        break;
      case message(7):
        result.nodes.push_back(scan_node(function.get_message(), scan));
        break;
      case message(9):
        add_opset(function.get_message(), opsets);
        break;
      case message(10):
        set_once(domain, view_of(function), "the domain of a function");
        break;
      case message(11):
        refuse("functions without defaults of attributes", "one with");
      case message(13):
        refuse("functions without overloads", "the overload " + in_quotes(view_of(function)));
      default:
        function.skip();
    }
  }
  if (domain.value_or("") != "pykd") {
    refuse("functions of domain \"pykd\"", "domain " + in_quotes(domain.value_or("")));
  }
  result.name = name.value_or("");
  const bool is_plain = std::all_of(result.name.begin(), result.name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
  });
  // Engines look functions up by their name and more, joined by colons.
  if (!is_plain || result.name.empty()) {
    refuse("letters, digits and underscores in names of functions", in_quotes(result.name));
  }
  return result;
}

void scan_shape(pbf_reader shape, ValueInfo& info) {
  while (shape.next()) {
    if (shape.tag_and_type() != message(1)) {
      shape.skip();
      continue;
    }
    bound(info.axes, kMaxRank + 1, "axes");
    std::string_view axis;
    pbf_reader dimension = shape.get_message();
    while (dimension.next()) {
      if (dimension.tag_and_type() == message(2)) {
        axis = view_of(dimension);
      } else {
        dimension.skip();
      }
    }
    info.axes.push_back(axis);
  }
}

void scan_tensor_type(pbf_reader type, ValueInfo& info, const std::string& name) {
  std::optional<std::int64_t> dtype;
  bool has_shape = false;
  while (type.next()) {
    switch (type.tag_and_type()) {
      case number(1):
        set_once(dtype, static_cast<std::int64_t>(type.get_int64()), "an element type");
        break;
      case message(2):
        if (has_shape) refuse("a shape once", "it twice");
        has_shape = true;
        scan_shape(type.get_message(), info);
        break;
      default:
        type.skip();
    }
  }
  if (!dtype || !has_shape) refuse("an element type and a shape for " + name, "none");
  info.dtype = *dtype;
}

ValueInfo scan_value_info(pbf_reader value) {
  std::optional<std::string_view> name, type, tensor;
  while (value.next()) {
    switch (value.tag_and_type()) {
      case message(1):
        set_once(name, view_of(value), "the name of an input or output");
        break;
      case message(2):
        set_once(type, view_of(value), "the type of an input or output");
        break;
      default:
        value.skip();
    }
  }
  ValueInfo info;
  info.name = name.value_or("");
  pbf_reader type_reader(protozero::data_view(type.value_or("").data(), type.value_or("").size()));
  while (type_reader.next()) {
    if (type_reader.tag_and_type() == message(1)) {
      set_once(tensor, view_of(type_reader), "a tensor type");
    } else if (type_reader.tag_and_type() == message(6)) {
      type_reader.skip();  // denotation: a remark
    } else {
      refuse("tensors as inputs and outputs", in_quotes(info.name) + " of another kind");
    }
  }
  const std::string_view bytes = tensor.value_or("");
  scan_tensor_type(pbf_reader(protozero::data_view(bytes.data(), bytes.size())), info, in_quotes(info.name));
  return info;
}

void scan_graph(pbf_reader graph, Scan& scan) {
  while (graph.next()) {
    switch (graph.tag_and_type()) {
      case message(1):
        scan.nodes.push_back(scan_node(graph.get_message(), scan));
        break;
      case message(5): {
        bound(scan.initializers, kMaxNodes, "initializers");
        const Constant constant = scan_tensor(graph.get_message());
        if (!scan.initializers.emplace(constant.name, constant).second) {
          refuse("every initializer once", in_quotes(constant.name) + " twice");
        }
        break;
      }
      case message(11):
        bound(scan.inputs, kMaxArguments, "inputs");
        scan.inputs.push_back(scan_value_info(graph.get_message()));
        break;
      case message(12):
        bound(scan.outputs, kMaxArguments, "outputs");
        scan.outputs.push_back(scan_value_info(graph.get_message()));
        break;
      case message(15):
        refuse("no sparse tensors", "a sparse initializer");
      default:
        graph.skip();
    }
  }
}

void scan_property(pbf_reader property, Scan& scan) {
  std::optional<std::string_view> key, value;
  while (property.next()) {
    switch (property.tag_and_type()) {
      case message(1):
        set_once(key, view_of(property), "the key of a metadata entry");
        break;
      case message(2):
        set_once(value, view_of(property), "the value of a metadata entry");
        break;
      default:
        property.skip();
    }
  }
  if (key.value_or("") == "pykd") set_once(scan.metadata, value.value_or(""), "the metadata \"pykd\"");
}

Scan scan_model(const std::string& bytes) {
  Scan scan;
  bool has_graph = false;
  pbf_reader model(bytes);
  while (model.next()) {
    switch (model.tag_and_type()) {
      case message(7):
        if (has_graph) refuse("one graph", "two");
        has_graph = true;
        scan_graph(model.get_message(), scan);
        break;
      case message(8):
        add_opset(model.get_message(), scan.opsets);
        break;
      case message(14):
        scan_property(model.get_message(), scan);
        break;
      case message(20):
        refuse("no training information", "some");
      case message(25):
        bound(scan.functions, kMaxFunctions, "functions");
        scan.functions.push_back(scan_function(model.get_message(), scan));
        break;
      default:
        model.skip();
    }
  }
  if (!has_graph) refuse("a graph", "none");
  return scan;
}

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
    const bool fits =
        std::any_of(std::begin(kAttributeTypes), std::end(kAttributeTypes),
                    [&](const AttributeType& type) { return type.letter == letter && type.type == attribute.type; });
    if (!fits) {
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
  explicit Bodies(const Scan& scan) : scan_(scan) {
    for (std::size_t i = 0; i < scan.functions.size(); ++i) {
      if (!indices_.emplace(scan.functions[i].name, i).second) {
        refuse("every function once", in_quotes(scan.functions[i].name) + " twice");
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

  const Scan& scan_;
  std::unordered_map<std::string_view, std::size_t> indices_;  // of the functions
  std::vector<std::size_t> sizes_;                             // in nodes, of those functions that have been checked
};

PykdNodes pykd_nodes(const Scan& scan) {
  PykdNodes nodes;
  for (const Node& node : scan.nodes) {
    if (node.is_call) nodes.in_graph.emplace(node.op);
  }
  for (const Function& function : scan.functions) {
    std::set<std::string>& names = nodes.in_functions[std::string(function.name)];
    for (const Node& node : function.nodes) {
      if (node.is_call) names.emplace(node.op);
    }
  }
  return nodes;
}

void check_opsets(const Scan& scan) {
  bool calls = false;
  for (const Node& node : scan.nodes) calls |= node.is_call;
  if (scan.opsets.count("") == 0 || (calls && scan.opsets.count("pykd") == 0)) {
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

void check_no_default(const Scan& scan, const std::string& name) {
  if (scan.initializers.count(name) != 0) refuse("no default for the input " + name, "one");
}

// Engines are given the parameters that differ from their default alone: so the default that the metadata says is the
// one that the graph has, to the last bit.
void check_default(const Scan& scan, const ParameterSpec& parameter, pykd_dtype dtype) {
  const auto found = scan.initializers.find(parameter.name);
  if (found == scan.initializers.end()) refuse("a default for the parameter " + parameter.name, "none");
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

void check_counts(const Scan& scan, const Signature& signature) {
  const std::size_t arguments = signature.inputs.size() + signature.parameters.size();
  if (scan.inputs.size() != arguments) {
    refuse(std::to_string(arguments) + " inputs, as its metadata says,", std::to_string(scan.inputs.size()));
  }
  if (scan.outputs.size() != signature.outputs.size()) {
    refuse(std::to_string(signature.outputs.size()) + " outputs, as its metadata says,",
           std::to_string(scan.outputs.size()));
  }
}

void check_graph(const Scan& scan, const Signature& signature) {
  check_counts(scan, signature);
  pykd_dtype parameter_dtype = PYKD_FLOAT32;
  for (const InputSpec& input : signature.inputs) {
    const pykd_dtype dtype = single_dtype(input.dtypes);
    if (dtype == PYKD_FLOAT64) parameter_dtype = PYKD_FLOAT64;
    check_value(scan.inputs, input.name, "an input", dtype, input.axes);
    check_no_default(scan, input.name);
  }
  for (const ParameterSpec& parameter : signature.parameters) {
    check_value(scan.inputs, parameter.name, "an input", parameter_dtype, {});
    if (signature.parameter_form == ParameterForm::kInputs) {
      check_no_default(scan, parameter.name);
    } else {
      check_default(scan, parameter, parameter_dtype);
    }
  }
  for (const ParameterSpec& parameter : signature.fixed) check_default(scan, parameter, parameter_dtype);
  for (const OutputSpec& output : signature.outputs) {
    check_value(scan.outputs, output.name, "an output", single_dtype(output.dtypes), output.axes);
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
    const Scan scan = scan_model(file.bytes);
    if (!scan.metadata) refuse("the metadata entry \"pykd\"", "none");
    Signature signature = parse_signature(std::string(*scan.metadata));
    if (signature.kind == ArtefactKind::kTorchScript) {
      refuse("\"value\" or \"gradient\" as the kind", "\"torchscript\"");
    }
    check_graph(scan, signature);
    Bodies(scan).check();
    check_opsets(scan);
    if (nodes != nullptr) *nodes = pykd_nodes(scan);
    return signature;
  } catch (const protozero::exception& error) {
    fail(PYKD_BAD_ARTEFACT, "an ONNX file at " + file.label, std::string("bytes that are none (") + error.what() + ")",
         "load a file that pykd.export wrote");
  } catch (const Failure& failure) {
    throw Failure(failure.status(), file.label + ": " + failure.what());
  }
}

}  // namespace pykd::internal
