// File: runtime/artefact/onnx_contents.h
//
// What an ONNX file holds, as far as a loss has need of it: read from its bytes, bounded, and not judged yet.
#ifndef PYKD_RUNTIME_ARTEFACT_ONNX_CONTENTS_H_
#define PYKD_RUNTIME_ARTEFACT_ONNX_CONTENTS_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "pykd/pykd.h"

namespace pykd::internal::onnx {

// The largest files of pykd's losses have 400 nodes with functions expanded, and a composition has at most 100 losses.
constexpr std::size_t kMaxNodes = 60000;
constexpr std::size_t kMaxArguments = 4000;  // of the graph: inputs, outputs, initialisers with a default
constexpr std::size_t kMaxFunctions = 1000;
constexpr std::size_t kMaxElements = 1 << 20;  // of one constant, and of what a constant shape asks for

[[noreturn]] void refuse(const std::string& expected, const std::string& got);

// onnx.TensorProto.DataType of a dtype, and the bytes of one element of such a type; one that no loss has is refused.
std::int64_t onnx_dtype(pykd_dtype dtype);
std::size_t bytes_of_element(std::int64_t dtype);

// The letter that the table of operators has for an onnx.AttributeProto.AttributeType; 0 where it has none.
char letter_of(std::int64_t attribute_type);

// All views point into the file.

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
  std::vector<std::int64_t> lengths;   // of each axis; 0 where it is free
  bool is_tensor = false, has_shape = false;
};

struct OnnxContents {
  std::optional<std::string_view> metadata;
  std::vector<ValueInfo> inputs, outputs;
  std::unordered_map<std::string_view, Constant> initializers;
  std::vector<Node> nodes;
  std::vector<Function> functions;
  std::size_t num_nodes = 0;  // functions' included
  std::unordered_map<std::string_view, std::int64_t> opsets;
};

// An input or output of a graph, whatever it is; the views point into `bytes`. Bytes that are no protobuf throw
// protozero::exception, here and below.
ValueInfo read_value_info(std::string_view bytes);
// A tensor whose elements lie in it, as few and as plain as those of a loss.
Constant read_tensor(std::string_view bytes);

// Reads an ONNX file: domains that are known, no external data, subgraphs, sparse tensors or training information,
// bounded numbers of all things; a field that comes twice is refused. Bytes that are no protobuf throw
// protozero::exception.
OnnxContents read_onnx(const std::string& bytes);

}  // namespace pykd::internal::onnx

#endif  // PYKD_RUNTIME_ARTEFACT_ONNX_CONTENTS_H_
