#include "artefact.h"

#include <zlib.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <protozero/pbf_reader.hpp>
#include <system_error>
#include <unordered_map>

#include "error.h"
#include "sha256.h"

namespace pykd::internal {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kZipMagic = "PK\x03\x04";
constexpr std::size_t kMaxTorchScriptSize = 1u << 30;

// The trailers of docs/artefacts.md, without the eight digits that follow.
constexpr std::string_view kOnnxTrailer("\x72\x16\x0a\x0apykd.crc32\x12\x08", 16);
constexpr std::string_view kZipTrailer = "pykd.crc32=";
constexpr std::size_t kDigits = 8;

// ---- Reading files -----------------------------------------------------------------------------

[[noreturn]] void cannot_read(const std::string& path, const std::string& why) {
  fail(PYKD_NOT_FOUND, "a file that can be read at " + path, why, "check the path and its permissions");
}

void check_size(const std::string& label, FileFormat format, std::uintmax_t size) {
  const std::size_t limit = format == FileFormat::kOnnx ? kMaxOnnxSize : kMaxTorchScriptSize;
  if (size > limit) {
    fail(PYKD_BAD_ARTEFACT,
         std::string(format == FileFormat::kOnnx ? "an ONNX" : "a TorchScript") + " file of at most " +
             std::to_string(limit >> 20) + " MiB at " + label,
         std::to_string(size) + " bytes", "load a file that pykd.export wrote; they hold no weights");
  }
}

ArtefactFile read_file(const fs::path& path) {
  ArtefactFile file;
  file.label = path.string();
  std::error_code error;
  // A device or a pipe might never end.
  if (!fs::is_regular_file(path, error)) cannot_read(file.label, "no regular file there");
  std::ifstream stream(path, std::ios::binary);
  if (!stream) cannot_read(file.label, std::strerror(errno));
  // Of the file that is open: an export may put another one in its place.
  const std::streamoff end = stream.seekg(0, std::ios::end).tellg();
  if (end < 0) cannot_read(file.label, "no size");
  const auto size = static_cast<std::uintmax_t>(end);
  stream.seekg(0);
  char magic[4] = {};
  stream.read(magic, sizeof magic);
  const auto start = static_cast<std::size_t>(stream.gcount());
  file.format = detect_format({magic, start});
  check_size(file.label, file.format, size);
  file.bytes.assign(magic, start);
  if (size > start) {
    file.bytes.resize(static_cast<std::size_t>(size));
    stream.read(&file.bytes[start], static_cast<std::streamsize>(size - start));
    file.bytes.resize(start + static_cast<std::size_t>(stream.gcount()));
  }
  if (stream.bad()) cannot_read(file.label, "an error while reading it");
  return file;
}

[[noreturn]] void not_of_the_manifest(const std::string& label, const std::string& expected, const std::string& got) {
  fail(PYKD_BAD_ARTEFACT, label + " to be the file of manifest.json beside it, " + expected, got,
       "the files of this folder do not belong together: copy the whole folder, or export the loss again");
}

std::optional<ArtefactFile> find_member(const fs::path& folder, const char* name, FileFormat format,
                                        const Manifest& manifest) {
  std::error_code error;
  if (!fs::exists(folder / name, error)) return std::nullopt;
  ArtefactFile file;
  file.label = (folder / name).string();
  file.format = format;
  file.unread = true;
  for (const ManifestEntry& entry : manifest.files) {
    if (entry.name == name) file.described = entry;
  }
  if (!file.described) not_of_the_manifest(file.label, "which lists every file", "one that is not in it");
  return file;
}

std::string read_manifest(const fs::path& folder) { return read_file(folder / "manifest.json").bytes; }

Artefact read_folder(const fs::path& folder) {
  std::error_code error;
  const fs::path manifest_path = folder / "manifest.json";
  if (!fs::exists(manifest_path, error)) {
    fail(PYKD_NOT_FOUND, "a folder that pykd.export wrote at " + folder.string(), "one without manifest.json",
         "give the folder that was exported, or one of its files by its path");
  }
  Artefact artefact;
  artefact.folder = folder.string();
  artefact.manifest = read_manifest(folder);
  Manifest manifest;
  try {
    manifest = parse_manifest(artefact.manifest);
  } catch (const Failure& failure) {
    throw Failure(failure.status(), manifest_path.string() + ": " + failure.what());
  }
  artefact.value = find_member(folder, "loss.onnx", FileFormat::kOnnx, manifest);
  artefact.gradient = find_member(folder, "loss.grad.onnx", FileFormat::kOnnx, manifest);
  artefact.torchscript = find_member(folder, "loss.pt", FileFormat::kTorchScript, manifest);
  if (!artefact.has_onnx() && !artefact.torchscript) {
    fail(PYKD_NOT_FOUND, "loss.onnx, loss.grad.onnx or loss.pt in " + folder.string(), "none of them",
         "export the loss again");
  }
  return artefact;
}

Artefact single(ArtefactFile file) {
  Artefact artefact;
  (file.format == FileFormat::kOnnx ? artefact.value : artefact.torchscript) = std::move(file);
  return artefact;
}

// ---- Integrity ---------------------------------------------------------------------------------

std::string hex_digits(unsigned long value) {
  constexpr char kHex[] = "0123456789abcdef";
  std::string text(kDigits, '0');
  for (std::size_t i = 0; i < kDigits; ++i) text[i] = kHex[(value >> (28 - 4 * i)) & 15];
  return text;
}

[[noreturn]] void cut_short(const ArtefactFile& file) {
  fail(PYKD_BAD_ARTEFACT, "a whole file at " + file.label,
       "one that was cut short or is damaged (" + std::to_string(file.bytes.size()) + " bytes)", "copy it again");
}

// Whether the file ends in the middle of something. Called where the checksum is missing.
bool is_cut_short(const ArtefactFile& file) {
  if (file.format == FileFormat::kTorchScript) {
    // A ZIP archive ends with a record of at least 22 bytes and a comment of at most 65535.
    const std::size_t tail = std::min<std::size_t>(file.bytes.size(), 22 + 65535);
    return file.bytes.find("PK\x05\x06", file.bytes.size() - tail) == std::string::npos;
  }
  try {
    protozero::pbf_reader model(file.bytes);
    while (model.next()) model.skip();
    return false;
  } catch (const protozero::end_of_buffer_exception&) {
    return true;
  }
}

// ---- Scanning ONNX -----------------------------------------------------------------------------

using protozero::pbf_reader;
using protozero::pbf_wire_type;
using protozero::tag_and_type;

// A field with the wire type that onnx.proto gives it. One with another wire type is, to every
// protobuf parser, an unknown field: it is skipped.
constexpr std::uint32_t message(protozero::pbf_tag_type tag) {
  return tag_and_type(tag, pbf_wire_type::length_delimited);
}
constexpr std::uint32_t number(protozero::pbf_tag_type tag) { return tag_and_type(tag, pbf_wire_type::varint); }

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

bool is_standard(std::string_view domain) { return domain.empty() || domain == "ai.onnx"; }

void check_domain(std::string_view domain, const char* what) {
  if (!is_standard(domain) && domain != "pykd") {
    refuse(std::string(what) + " of the standard domain or of \"pykd\"", "domain " + in_quotes(domain));
  }
}

std::string_view view_of(const pbf_reader& reader) {
  const protozero::data_view bytes = const_cast<pbf_reader&>(reader).get_view();
  return {bytes.data(), bytes.size()};
}

// onnx.TensorProto.DataType
constexpr std::int64_t kOnnxFloat = 1, kOnnxInt64 = 7, kOnnxFloat16 = 10, kOnnxDouble = 11, kOnnxBfloat16 = 16;

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

struct ValueInfo {
  std::string_view name;
  std::int64_t dtype = 0;
  std::size_t rank = 0;
};

// A tensor as far as it may be a number: one element of float32 or float64.
struct Number {
  std::string_view name;
  std::optional<double> value;
};

// What the scan collects. All views point into the file.
struct Scan {
  std::optional<std::string_view> metadata;
  std::vector<ValueInfo> inputs, outputs;
  std::unordered_map<std::string_view, Number> initializers;  // by name; those that are no number, too

  // The functions of domain "pykd" and which of them each calls, for check_functions().
  struct Call {
    std::string_view name, overload;
  };
  struct Function {
    std::string_view name, overload;
    std::size_t nodes = 0;
    std::vector<Call> calls;
  };
  std::vector<Function> functions;
  std::vector<Call> calls;  // of the graph
};

// How engines call a function. They write a colon between its parts, so that no part may hold one.
std::string function_key(std::string_view name, std::string_view overload) {
  for (std::string_view part : {name, overload}) {
    if (part.find(':') != std::string_view::npos) {
      refuse("names of functions without colons", in_quotes(part));
    }
  }
  return std::string(name) + ":" + std::string(overload);
}

template <class T>
double number_at(std::string_view bytes) {
  T value;
  std::memcpy(&value, bytes.data(), sizeof value);
  return static_cast<double>(value);
}

Number scan_tensor(pbf_reader tensor) {
  Number result;
  std::int64_t dtype = 0;
  // The elements lie in one of two fields: as raw bytes, or as packed numbers, which are the same bytes.
  std::string_view elements;
  while (tensor.next()) {
    switch (tensor.tag_and_type()) {
      case number(2):
        dtype = tensor.get_int64();
        break;
      case message(8):
        result.name = view_of(tensor);
        break;
      case message(4):
      case message(9):
      case message(10):
        elements = view_of(tensor);
        break;
      case message(13):
        refuse("no external data", "a tensor with external_data");
      case number(14):
        if (tensor.get_uint64() != 0) refuse("no external data", "a tensor that lies elsewhere");
        break;
      default:
        tensor.skip();
    }
  }
  if (dtype == kOnnxFloat && elements.size() == sizeof(float)) result.value = number_at<float>(elements);
  if (dtype == kOnnxDouble && elements.size() == sizeof(double)) result.value = number_at<double>(elements);
  return result;
}

void scan_attribute(pbf_reader attribute) {
  while (attribute.next()) {
    switch (attribute.tag_and_type()) {
      case message(5):
      case message(10):
        scan_tensor(attribute.get_message());
        break;
      case message(6):
      case message(11):
        refuse("no subgraphs", "an attribute that holds a graph");
      case message(22):
      case message(23):
        refuse("no sparse tensors", "an attribute that holds one");
      default:
        attribute.skip();
    }
  }
}

// Adds the node to `calls` where it is one of domain "pykd".
void scan_node(pbf_reader node, std::vector<Scan::Call>& calls) {
  std::optional<std::string_view> domain, op, overload;
  while (node.next()) {
    switch (node.tag_and_type()) {
      case message(4):
        set_once(op, view_of(node), "the operator of a node");
        break;
      case message(5):
        scan_attribute(node.get_message());
        break;
      case message(7):
        set_once(domain, view_of(node), "the domain of a node");
        break;
      case message(8):
        set_once(overload, view_of(node), "the overload of a node");
        break;
      default:
        node.skip();
    }
  }
  check_domain(domain.value_or(""), "operators");
  if (!is_standard(domain.value_or(""))) calls.push_back({op.value_or(""), overload.value_or("")});
}

void scan_opset(pbf_reader opset) {
  std::optional<std::string_view> domain;
  while (opset.next()) {
    if (opset.tag_and_type() == message(1)) {
      set_once(domain, view_of(opset), "the domain of an operator set");
    } else {
      opset.skip();
    }
  }
  check_domain(domain.value_or(""), "operator sets");
}

void scan_function(pbf_reader function, Scan& scan) {
  std::optional<std::string_view> name, domain, overload;
  Scan::Function result;
  while (function.next()) {
    switch (function.tag_and_type()) {
      case message(1):
        set_once(name, view_of(function), "the name of a function");
        break;
      case message(7):
        scan_node(function.get_message(), result.calls);
        ++result.nodes;
        break;
      case message(9):
        scan_opset(function.get_message());
        break;
      case message(10):
        set_once(domain, view_of(function), "the domain of a function");
        break;
      case message(11):
        scan_attribute(function.get_message());
        break;
      case message(13):
        set_once(overload, view_of(function), "the overload of a function");
        break;
      default:
        function.skip();
    }
  }
  if (domain.value_or("") != "pykd") {
    refuse("functions of domain \"pykd\"", "domain " + in_quotes(domain.value_or("")));
  }
  result.name = name.value_or("");
  result.overload = overload.value_or("");
  scan.functions.push_back(std::move(result));
}

// Engines replace calls by bodies. A function that calls itself would keep them busy for ever, and
// a few that call each other ten times over would fill the memory: so they come in order, callees
// first, and what they expand to is bounded. A call without a body would tie the file to engines
// that have an op of that name.
void check_functions(const Scan& scan) {
  constexpr std::size_t kMaxNodes = 1000000;
  std::unordered_map<std::string, std::size_t> indices;  // into scan.functions
  for (const Scan::Function& function : scan.functions) {
    if (!indices.emplace(function_key(function.name, function.overload), indices.size()).second) {
      refuse("every function once", in_quotes(function.name) + " twice");
    }
  }
  std::vector<std::size_t> sizes;  // in nodes, of those functions that have been looked at
  auto expand = [&](std::size_t nodes, const std::vector<Scan::Call>& calls) {
    for (const Scan::Call& call : calls) {
      auto found = indices.find(function_key(call.name, call.overload));
      if (found == indices.end()) {
        refuse("a function for every operator of domain \"pykd\"",
               "none for " + in_quotes(call.name) +
                   (call.overload.empty() ? "" : " with the overload " + in_quotes(call.overload)));
      }
      if (found->second >= sizes.size()) {
        refuse("functions that call earlier ones alone", "a call of " + in_quotes(call.name) + " before it");
      }
      nodes += sizes[found->second];
      if (nodes > kMaxNodes) refuse("functions of reasonable size", "more than a million nodes");
    }
    return nodes;
  };
  for (const Scan::Function& function : scan.functions) {
    sizes.push_back(expand(function.nodes, function.calls));
  }
  expand(0, scan.calls);
}

PykdNodes pykd_nodes(const Scan& scan) {
  PykdNodes nodes;
  for (const Scan::Call& call : scan.calls) nodes.in_graph.emplace(call.name);
  for (const Scan::Function& function : scan.functions) {
    std::set<std::string>& names = nodes.in_functions[std::string(function.name)];
    for (const Scan::Call& call : function.calls) names.emplace(call.name);
  }
  return nodes;
}

std::size_t scan_shape(pbf_reader shape) {
  std::size_t rank = 0;
  while (shape.next()) {
    if (shape.tag_and_type() == message(1)) ++rank;
    shape.skip();
  }
  return rank;
}

void scan_tensor_type(pbf_reader type, ValueInfo& info, const std::string& name) {
  std::optional<std::int64_t> dtype;
  std::optional<std::size_t> rank;
  while (type.next()) {
    switch (type.tag_and_type()) {
      case number(1):
        set_once(dtype, static_cast<std::int64_t>(type.get_int64()), "an element type");
        break;
      case message(2):
        set_once(rank, scan_shape(type.get_message()), "a shape");
        break;
      default:
        type.skip();
    }
  }
  if (!dtype || !rank) refuse("an element type and a shape for " + name, "none");
  info.dtype = *dtype;
  info.rank = *rank;
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

void add_initializer(Scan& scan, const Number& number) {
  if (!scan.initializers.emplace(number.name, number).second) {
    refuse("every initializer once", in_quotes(number.name) + " twice");
  }
}

void scan_graph(pbf_reader graph, Scan& scan) {
  while (graph.next()) {
    switch (graph.tag_and_type()) {
      case message(1):
        scan_node(graph.get_message(), scan.calls);
        break;
      case message(5):
        add_initializer(scan, scan_tensor(graph.get_message()));
        break;
      case message(11):
        scan.inputs.push_back(scan_value_info(graph.get_message()));
        break;
      case message(12):
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
        scan_opset(model.get_message());
        break;
      case message(14):
        scan_property(model.get_message(), scan);
        break;
      case message(20):
        refuse("no training information", "some");
      case message(25):
        scan_function(model.get_message(), scan);
        break;
      default:
        model.skip();
    }
  }
  if (!has_graph) refuse("a graph", "none");
  check_functions(scan);
  return scan;
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
                 std::size_t rank) {
  const ValueInfo& value = find_value(values, name, what);
  if (value.dtype != onnx_dtype(dtype) || value.rank != rank) {
    refuse(std::string(what) + " " + name + " of " + dtype_name(dtype) + " and rank " + std::to_string(rank) +
               ", as its metadata says,",
           "ONNX type " + std::to_string(value.dtype) + " and rank " + std::to_string(value.rank));
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
  const std::optional<double>& got = found->second.value;
  if (got && std::memcmp(&*got, &expected, sizeof expected) == 0) return;
  refuse("the default " + number_text(expected) + " for the parameter " + parameter.name + ", as the metadata says,",
         got ? number_text(*got) : "a tensor that is no number of " + std::string(dtype_name(dtype)));
}

// "float" is for TorchScript files, so that every dtype here is a single one.
pykd_dtype single_dtype(std::uint32_t dtypes) {
  for (int dtype = PYKD_FLOAT16; dtype <= PYKD_INT64; ++dtype) {
    if (dtypes == dtype_bit(static_cast<pykd_dtype>(dtype))) return static_cast<pykd_dtype>(dtype);
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
    check_value(scan.inputs, input.name, "an input", dtype, input.rank());
    check_no_default(scan, input.name);
  }
  for (const ParameterSpec& parameter : signature.parameters) {
    check_value(scan.inputs, parameter.name, "an input", parameter_dtype, 0);
    if (signature.parameter_form == ParameterForm::kInputs) {
      check_no_default(scan, parameter.name);
    } else {
      check_default(scan, parameter, parameter_dtype);
    }
  }
  for (const ParameterSpec& parameter : signature.fixed) check_default(scan, parameter, parameter_dtype);
  for (const OutputSpec& output : signature.outputs) {
    check_value(scan.outputs, output.name, "an output", single_dtype(output.dtypes), output.rank());
  }
}

}  // namespace

FileFormat detect_format(std::string_view bytes) {
  return bytes.substr(0, kZipMagic.size()) == kZipMagic ? FileFormat::kTorchScript : FileFormat::kOnnx;
}

Artefact read_artefact(const std::string& path) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (!fs::exists(status)) {
    fail(PYKD_NOT_FOUND, "a folder that pykd.export wrote, or one of its files, at " + path,
         error && error != std::errc::no_such_file_or_directory ? error.message() : "nothing there", "check the path");
  }
  if (fs::is_directory(status)) return read_folder(path);
  return single(read_file(path));
}

void read_contents(ArtefactFile& file) {
  if (!file.unread) return;
  ArtefactFile read = read_file(file.label);
  if (read.format != file.format) {
    fail(PYKD_BAD_ARTEFACT,
         std::string(file.format == FileFormat::kOnnx ? "an ONNX" : "a TorchScript") + " file at " + file.label,
         file.format == FileFormat::kOnnx ? "a ZIP archive" : "no ZIP archive", "export the loss again");
  }
  file.bytes = std::move(read.bytes);
  file.unread = false;
}

bool was_replaced(const Artefact& artefact) {
  return !artefact.folder.empty() && read_manifest(artefact.folder) != artefact.manifest;
}

void check_sizes(const Artefact& artefact) {
  for (const std::optional<ArtefactFile>* file : {&artefact.value, &artefact.gradient, &artefact.torchscript}) {
    if (!file->has_value() || !(*file)->described) continue;
    std::error_code error;
    const std::uintmax_t size = fs::file_size((*file)->label, error);
    if (error) cannot_read((*file)->label, error.message());
    if (size != (*file)->described->bytes) {
      not_of_the_manifest((*file)->label, std::to_string((*file)->described->bytes) + " bytes long",
                          std::to_string(size) + " bytes");
    }
  }
}

Artefact wrap_artefact(const void* bytes, std::size_t size) {
  ArtefactFile file;
  file.label = "the bytes that were given";
  const std::string_view view(static_cast<const char*>(bytes), size);
  file.format = detect_format(view);
  check_size(file.label, file.format, size);
  file.bytes = view;
  return single(std::move(file));
}

void check_integrity(const ArtefactFile& file) {
  const std::string_view bytes = file.bytes;
  const std::string_view trailer = file.format == FileFormat::kOnnx ? kOnnxTrailer : kZipTrailer;
  const std::size_t length = trailer.size() + kDigits;
  if (bytes.empty()) {
    fail(PYKD_BAD_ARTEFACT, "a whole file at " + file.label, "an empty one", "copy it again");
  }
  if (bytes.size() < length || bytes.substr(bytes.size() - length, trailer.size()) != trailer) {
    bool truncated = false;
    try {
      truncated = is_cut_short(file);
    } catch (const protozero::exception&) {
      fail(PYKD_BAD_ARTEFACT, "an ONNX or a TorchScript file at " + file.label, "neither",
           "load a file that pykd.export wrote");
    }
    if (truncated) cut_short(file);
    fail(PYKD_BAD_ARTEFACT, "pykd's checksum at the end of " + file.label, "none",
         "it was not written by pykd.export or was changed afterwards: export the loss again, or "
         "load it with the integrity check switched off if you changed it yourself");
  }
  const std::size_t covered = bytes.size() - length;
  const unsigned long checksum = crc32_z(crc32_z(0, nullptr, 0), reinterpret_cast<const Bytef*>(bytes.data()), covered);
  const std::string_view written = bytes.substr(bytes.size() - kDigits);
  if (written != hex_digits(checksum)) {
    fail(PYKD_BAD_ARTEFACT, "contents with the checksum " + in_quotes(written) + " at " + file.label,
         in_quotes(hex_digits(checksum)), "the file is damaged: copy it again");
  }
  if (!file.described) return;
  const std::string hash = Sha256::hex(bytes);
  if (hash != file.described->sha256) {
    not_of_the_manifest(file.label, "with the SHA-256 " + in_quotes(file.described->sha256), in_quotes(hash));
  }
}

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
