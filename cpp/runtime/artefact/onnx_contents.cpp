// read_onnx(): the fields of an ONNX file that a loss may have, and no other.
#include "runtime/artefact/onnx_contents.h"

#include <algorithm>
#include <cstring>
#include <protozero/pbf_reader.hpp>

#include "base/error.h"
#include "base/tensor.h"
#include "runtime/artefact/onnx_operators.h"

namespace pykd::internal::onnx {
namespace {

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

pbf_reader reader_of(std::string_view bytes) { return pbf_reader(protozero::data_view(bytes.data(), bytes.size())); }

bool is_standard(std::string_view domain) { return domain.empty() || domain == "ai.onnx"; }

void check_domain(std::string_view domain, const char* what) {
  if (!is_standard(domain) && domain != "pykd") {
    refuse(std::string(what) + " of the standard domain or of \"pykd\"", "domain " + in_quotes(domain));
  }
}

template <class Items>
void bound(const Items& items, std::size_t limit, const char* what) {
  if (items.size() >= limit) refuse("at most " + std::to_string(limit) + " " + what, "more");
}

// onnx.TensorProto.DataType
constexpr std::int64_t kOnnxFloat = 1, kOnnxInt32 = 6, kOnnxInt64 = 7, kOnnxBool = 9, kOnnxFloat16 = 10,
                       kOnnxDouble = 11, kOnnxBfloat16 = 16;

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

}  // namespace

void refuse(const std::string& expected, const std::string& got) {
  fail(PYKD_BAD_ARTEFACT, expected + " in the ONNX file", got, "load a file that pykd.export wrote");
}

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
    case PYKD_INT8:
      return 3;
    case PYKD_UINT8:
      return 2;
    case PYKD_INT16:
      return 5;
    case PYKD_UINT16:
      return 4;
    case PYKD_INT32:
      return kOnnxInt32;
    case PYKD_UINT32:
      return 12;
    case PYKD_UINT64:
      return 13;
    case PYKD_BOOL:
      return kOnnxBool;
  }
  return 0;
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

char letter_of(std::int64_t attribute_type) {
  for (const AttributeType& known : kAttributeTypes) {
    if (known.type == attribute_type) return known.letter;
  }
  return 0;
}

namespace {

// ---- Tensors and attributes --------------------------------------------------------------------

template <class T>
T element(std::string_view bytes, std::size_t index) {
  T value;
  std::memcpy(&value, bytes.data() + index * sizeof value, sizeof value);
  return value;
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

}  // namespace

// The elements lie in one field: as raw bytes, or as packed numbers, which are the same bytes. Whatever else a tensor
// may hold could mean something else to an engine.
Constant read_tensor(std::string_view bytes_of_tensor) {
  pbf_reader tensor = reader_of(bytes_of_tensor);
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

namespace {

// The value stands in the field of its type, once, and in no other.
Attribute read_attribute(pbf_reader attribute) {
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
        result.constant = read_tensor(view_of(attribute));
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

Node read_node(pbf_reader node, OnnxContents& contents) {
  if (++contents.num_nodes > kMaxNodes) refuse("at most " + std::to_string(kMaxNodes) + " nodes", "more");
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
        result.attributes.push_back(read_attribute(node.get_message()));
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

Function read_function(pbf_reader function, OnnxContents& contents) {
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
        result.nodes.push_back(read_node(function.get_message(), contents));
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

void read_shape(pbf_reader shape, ValueInfo& info) {
  while (shape.next()) {
    if (shape.tag_and_type() != message(1)) {
      shape.skip();
      continue;
    }
    bound(info.axes, kMaxRank + 1, "axes");
    std::string_view axis;
    std::int64_t length = 0;
    pbf_reader dimension = shape.get_message();
    while (dimension.next()) {
      if (dimension.tag_and_type() == message(2)) {
        axis = view_of(dimension);
      } else if (dimension.tag_and_type() == number(1)) {
        length = dimension.get_int64();
      } else {
        dimension.skip();
      }
    }
    info.axes.push_back(axis);
    info.lengths.push_back(std::max<std::int64_t>(length, 0));  // some write -1 for a free one
  }
}

void read_tensor_type(pbf_reader type, ValueInfo& info) {
  std::optional<std::int64_t> dtype;
  while (type.next()) {
    switch (type.tag_and_type()) {
      case number(1):
        set_once(dtype, static_cast<std::int64_t>(type.get_int64()), "an element type");
        break;
      case message(2):
        if (info.has_shape) refuse("a shape once", "it twice");
        info.has_shape = true;
        read_shape(type.get_message(), info);
        break;
      default:
        type.skip();
    }
  }
  info.dtype = dtype.value_or(0);
}

}  // namespace

ValueInfo read_value_info(std::string_view bytes) {
  pbf_reader value = reader_of(bytes);
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
  info.is_tensor = true;
  pbf_reader type_reader = reader_of(type.value_or(""));
  while (type_reader.next()) {
    if (type_reader.tag_and_type() == message(1)) {
      set_once(tensor, view_of(type_reader), "a tensor type");
    } else {
      info.is_tensor &= type_reader.tag_and_type() == message(6);  // denotation: a remark
      type_reader.skip();
    }
  }
  read_tensor_type(reader_of(tensor.value_or("")), info);
  return info;
}

namespace {

ValueInfo read_tensor_info(std::string_view bytes) {
  ValueInfo info = read_value_info(bytes);
  if (!info.is_tensor) refuse("tensors as inputs and outputs", in_quotes(info.name) + " of another kind");
  if (info.dtype == 0 || !info.has_shape) refuse("an element type and a shape for " + in_quotes(info.name), "none");
  return info;
}

void read_graph(pbf_reader graph, OnnxContents& contents) {
  while (graph.next()) {
    switch (graph.tag_and_type()) {
      case message(1):
        contents.nodes.push_back(read_node(graph.get_message(), contents));
        break;
      case message(5): {
        bound(contents.initializers, kMaxNodes, "initializers");
        const Constant constant = read_tensor(view_of(graph));
        if (!contents.initializers.emplace(constant.name, constant).second) {
          refuse("every initializer once", in_quotes(constant.name) + " twice");
        }
        break;
      }
      case message(11):
        bound(contents.inputs, kMaxArguments, "inputs");
        contents.inputs.push_back(read_tensor_info(view_of(graph)));
        break;
      case message(12):
        bound(contents.outputs, kMaxArguments, "outputs");
        contents.outputs.push_back(read_tensor_info(view_of(graph)));
        break;
      case message(15):
        refuse("no sparse tensors", "a sparse initializer");
      default:
        graph.skip();
    }
  }
}

void read_property(pbf_reader property, OnnxContents& contents) {
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
  if (key.value_or("") == "pykd") set_once(contents.metadata, value.value_or(""), "the metadata \"pykd\"");
}

}  // namespace

OnnxContents read_onnx(const std::string& bytes) {
  OnnxContents contents;
  bool has_graph = false;
  pbf_reader model(bytes);
  while (model.next()) {
    switch (model.tag_and_type()) {
      case message(7):
        if (has_graph) refuse("one graph", "two");
        has_graph = true;
        read_graph(model.get_message(), contents);
        break;
      case message(8):
        add_opset(model.get_message(), contents.opsets);
        break;
      case message(14):
        read_property(model.get_message(), contents);
        break;
      case message(20):
        refuse("no training information", "some");
      case message(25):
        bound(contents.functions, kMaxFunctions, "functions");
        contents.functions.push_back(read_function(model.get_message(), contents));
        break;
      default:
        model.skip();
    }
  }
  if (!has_graph) refuse("a graph", "none");
  return contents;
}

}  // namespace pykd::internal::onnx
