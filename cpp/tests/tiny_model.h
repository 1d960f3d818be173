// File: tests/tiny_model.h
//
// ONNX artefacts made by hand, byte by byte, for tests that need one without Python: the mean
// squared error of two tensors with a weight, as value or with its gradient. Tests change its parts
// to see what the loader does about them.
#ifndef PYKD_TESTS_TINY_MODEL_H_
#define PYKD_TESTS_TINY_MODEL_H_

#include <zlib.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <protozero/pbf_writer.hpp>
#include <string>
#include <utility>
#include <vector>

#include "runtime/artefact/sha256.h"

namespace pykd::tests {

using nlohmann::json;
using protozero::pbf_writer;

constexpr int kFloat = 1, kInt64 = 7;  // onnx.TensorProto.DataType

// ---- Parts of an ONNX file, serialised ----------------------------------------------------------

inline std::string attribute(const std::string& name, std::int64_t value) {
  std::string bytes;
  pbf_writer writer(bytes);
  writer.add_string(1, name);
  writer.add_int64(3, value);
  writer.add_enum(20, 2);
  return bytes;
}

// An attribute with one field of type message, to put anything into.
inline std::string attribute_with(std::uint32_t field, const std::string& message) {
  std::string bytes;
  pbf_writer writer(bytes);
  writer.add_string(1, "value");
  writer.add_message(field, message);
  return bytes;
}

inline std::string node(const std::string& op, const std::vector<std::string>& inputs, const std::string& output,
                        const std::vector<std::string>& attributes = {}, const std::string& domain = "") {
  std::string bytes;
  pbf_writer writer(bytes);
  for (const std::string& input : inputs) writer.add_string(1, input);
  writer.add_string(2, output);
  writer.add_string(4, op);
  for (const std::string& item : attributes) writer.add_message(5, item);
  if (!domain.empty()) writer.add_string(7, domain);
  return bytes;
}

inline std::string scalar(const std::string& name, float value) {
  std::string bytes, raw(sizeof value, '\0');
  std::memcpy(raw.data(), &value, sizeof value);
  pbf_writer writer(bytes);
  writer.add_int32(2, kFloat);
  writer.add_string(8, name);
  writer.add_bytes(9, raw);
  return bytes;
}

inline std::string value_info(const std::string& name, int dtype, const std::vector<std::string>& axes) {
  std::string shape, tensor, type, bytes;
  for (const std::string& axis : axes) {
    std::string dimension;
    if (!axis.empty() && axis.find_first_not_of("0123456789") == std::string::npos) {
      pbf_writer(dimension).add_int64(1, std::stoll(axis));  // a length
    } else {
      pbf_writer(dimension).add_string(2, axis);
    }
    pbf_writer(shape).add_message(1, dimension);
  }
  pbf_writer(tensor).add_int32(1, dtype);
  pbf_writer(tensor).add_message(2, shape);
  pbf_writer(type).add_message(1, tensor);
  pbf_writer(bytes).add_string(1, name);
  pbf_writer(bytes).add_message(2, type);
  return bytes;
}

inline std::string opset(const std::string& domain, int version) {
  std::string bytes;
  pbf_writer writer(bytes);
  writer.add_string(1, domain);
  writer.add_int64(2, version);
  return bytes;
}

// A function from `inputs` to "y".
inline std::string function(const std::string& domain, const std::string& name, const std::vector<std::string>& nodes,
                            const std::string& overload = "", const std::vector<std::string>& inputs = {"x"}) {
  std::string bytes;
  pbf_writer writer(bytes);
  writer.add_string(1, name);
  for (const std::string& input : inputs) writer.add_string(4, input);
  writer.add_string(5, "y");
  for (const std::string& item : nodes) writer.add_message(7, item);
  writer.add_message(9, opset("", 18));
  writer.add_message(9, opset("pykd", 1));
  writer.add_string(10, domain);
  if (!overload.empty()) writer.add_string(13, overload);
  return bytes;
}

// A call of one overload of a function of pykd.
inline std::string call_of(const std::string& op, const std::string& overload, const std::vector<std::string>& inputs,
                           const std::string& output) {
  std::string bytes = node(op, inputs, output, {}, "pykd");
  pbf_writer(bytes).add_string(8, overload);
  return bytes;
}

inline std::string property(const std::string& key, const std::string& value) {
  std::string bytes;
  pbf_writer writer(bytes);
  writer.add_string(1, key);
  writer.add_string(2, value);
  return bytes;
}

// ---- The model ----------------------------------------------------------------------------------

struct TinyModel {
  json metadata;
  std::vector<std::string> nodes, initializers, inputs, outputs, functions;
  std::vector<std::string> opsets = {opset("", 18)};
  std::string graph_extra, model_extra;  // serialised fields that are appended

  std::string graph() const {
    std::string bytes;
    pbf_writer writer(bytes);
    for (const std::string& item : nodes) writer.add_message(1, item);
    writer.add_string(2, "tiny");
    for (const std::string& item : initializers) writer.add_message(5, item);
    for (const std::string& item : inputs) writer.add_message(11, item);
    for (const std::string& item : outputs) writer.add_message(12, item);
    return bytes + graph_extra;
  }

  // The file without a checksum.
  std::string bytes() const {
    std::string result;
    pbf_writer writer(result);
    writer.add_int64(1, 9);
    writer.add_message(7, graph());
    for (const std::string& item : opsets) writer.add_message(8, item);
    for (const std::string& item : functions) writer.add_message(25, item);
    if (!metadata.is_null()) writer.add_message(14, property("pykd", metadata.dump()));
    return result + model_extra;
  }
};

inline std::string crc_digits(const std::string& bytes) {
  const unsigned long crc = crc32_z(0, reinterpret_cast<const Bytef*>(bytes.data()), bytes.size());
  char digits[16];
  std::snprintf(digits, sizeof digits, "%08lx", crc);
  return digits;
}

// An ONNX file with pykd's checksum, as docs/artefacts.md says.
inline std::string sealed(const std::string& bytes) {
  std::string result = bytes;
  pbf_writer(result).add_message(14, property("pykd.crc32", crc_digits(bytes)));
  return result;
}

inline json tensor_json(const char* name, const json& axes, const char* dtype = "float32") {
  return {{"name", name}, {"axes", axes}, {"dtype", dtype}};
}

inline json tiny_metadata(bool gradient) {
  const json axes = {"batch", "classes"};
  json student = tensor_json("student_logits", axes), teacher = tensor_json("teacher_logits", axes);
  student["gradient"] = true;
  teacher["gradient"] = false;
  json result = {
      {"format", "pykd"},
      {"format_version", 1},
      {"kind", gradient ? "gradient" : "value"},
      {"name", "tiny"},
      {"terms", json::array()},
      {"inputs", {student, teacher}},
      {"parameters", {{{"name", "weight"}, {"default", 1.5}, {"minimum", 0.0}}}},
      {"outputs",
       {tensor_json("loss", json::array()), tensor_json("error", json::array()),
        tensor_json("loss_per_sample", {"batch"})}},
  };
  if (gradient) {
    json output = tensor_json("grad_student_logits", axes);
    output["gradient_of"] = "student_logits";
    result["outputs"].push_back(output);
    result["parameters"].push_back({{"name", "grad_scale"}, {"default", 1.0}});
  }
  return result;
}

// loss = weight * mean((student - teacher)^2); "error" is the mean, "loss_per_sample" has the means of the rows.
inline TinyModel tiny_model(bool gradient) {
  const std::vector<std::string> axes = {"batch", "classes"};
  TinyModel model;
  model.metadata = tiny_metadata(gradient);
  model.inputs = {value_info("student_logits", kFloat, axes), value_info("teacher_logits", kFloat, axes),
                  value_info("weight", kFloat, {})};
  model.outputs = {value_info("loss", kFloat, {}), value_info("error", kFloat, {})};
  model.initializers = {scalar("weight", 1.5f)};
  model.nodes = {node("Sub", {"student_logits", "teacher_logits"}, "d"), node("Mul", {"d", "d"}, "dd"),
                 node("ReduceMean", {"dd"}, "error", {attribute("keepdims", 0)}),
                 node("Mul", {"error", "weight"}, "loss")};
  auto add = [&](std::string item) { model.nodes.push_back(std::move(item)); };
  model.outputs.push_back(value_info("loss_per_sample", kFloat, {"batch"}));
  add(node("Shape", {"d"}, "last", {attribute("start", 1)}));
  add(node("Cast", {"last"}, "classes", {attribute("to", kFloat)}));
  add(node("ReduceSumSquare", {"d", "axis"}, "sums", {attribute("keepdims", 0)}));
  add(node("Div", {"sums", "classes"}, "means"));
  add(node("Mul", {"means", "weight"}, "loss_per_sample"));
  std::string axis, one(8, '\0');
  one[0] = 1;
  pbf_writer writer(axis);
  writer.add_int64(1, 1);
  writer.add_int32(2, kInt64);
  writer.add_string(8, "axis");
  writer.add_bytes(9, one);
  model.initializers.push_back(axis);
  if (!gradient) return model;
  model.inputs.push_back(value_info("grad_scale", kFloat, {}));
  model.outputs.push_back(value_info("grad_student_logits", kFloat, axes));
  model.initializers.push_back(scalar("grad_scale", 1.0f));
  model.initializers.push_back(scalar("two", 2.0f));
  add(node("Size", {"d"}, "size"));
  add(node("Cast", {"size"}, "count", {attribute("to", kFloat)}));
  add(node("Div", {"two", "count"}, "factor"));
  add(node("Mul", {"factor", "weight"}, "weighted"));
  add(node("Mul", {"weighted", "grad_scale"}, "scaled"));
  add(node("Mul", {"d", "scaled"}, "grad_student_logits"));
  return model;
}

// The scores of the tiny model: what an export of kind "score" would write.
inline TinyModel tiny_score() {
  TinyModel model = tiny_model(false);
  model.metadata["kind"] = "score";
  model.metadata["outputs"] = {tensor_json("loss_per_sample", {"batch"})};
  model.outputs = {value_info("loss_per_sample", kFloat, {"batch"})};
  model.nodes.erase(model.nodes.begin() + 2, model.nodes.begin() + 4);  // of the two scalars
  return model;
}

// A tensor whose elements lie in another file, at the entries' place.
inline std::string tensor_outside(const std::string& name,
                                  const std::vector<std::pair<std::string, std::string>>& entries) {
  std::string bytes;
  pbf_writer writer(bytes);
  writer.add_int32(2, kFloat);
  writer.add_string(8, name);
  for (const auto& entry : entries) writer.add_message(13, property(entry.first, entry.second));
  writer.add_enum(14, 1);
  return bytes;
}

// What `pykd merge` would write of two models that return their pixels, and the scores of the tiny model.
inline json scorer_metadata() {
  return {{"format_version", 1},
          {"loss", tiny_score().metadata},
          {"connections", {{"student_logits", "student:same"}, {"teacher_logits", "teacher:same"}}},
          {"lengths", {{"classes", 3}}},
          {"outputs", {"loss_per_sample"}}};
}

inline TinyModel tiny_scorer(const json& metadata = scorer_metadata()) {
  TinyModel model = tiny_score();
  model.metadata = json();
  model.inputs = {value_info("pixels", kFloat, {"n", "width"}), value_info("weight", kFloat, {})};
  model.nodes[0] = node("Sub", {"pixels", "pixels"}, "d");
  pbf_writer(model.model_extra).add_message(14, property("pykd.scorer", metadata.dump()));
  return model;
}

// ---- Files --------------------------------------------------------------------------------------

// A folder that goes away with this object.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "pykd-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    path_ = pattern;
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  std::string path() const { return path_.string(); }
  std::string path(const std::string& name) const { return (path_ / name).string(); }
  void write(const std::string& name, const std::string& bytes) const {
    std::ofstream(path_ / name, std::ios::binary) << bytes;
  }

  // A manifest of the files that are there now, with what `facts` adds to it.
  void write_manifest(const json& facts = json::object()) const {
    json manifest = {{"format", "pykd"}, {"format_version", 1}, {"files", json::object()}};
    for (const char* name : {"loss.onnx", "loss.grad.onnx", "loss.pt", "score.onnx"}) {
      std::ifstream file(path_ / name, std::ios::binary);
      if (!file) continue;
      const std::string bytes{std::istreambuf_iterator<char>(file), {}};
      manifest["files"][name] = {{"bytes", bytes.size()}, {"sha256", internal::Sha256::hex(bytes)}};
    }
    manifest.update(facts);
    write("manifest.json", manifest.dump());
  }

 private:
  std::filesystem::path path_;
};

// What pykd.export would write for the tiny model.
inline void write_tiny_folder(const TemporaryFolder& folder) {
  folder.write("loss.onnx", sealed(tiny_model(false).bytes()));
  folder.write("loss.grad.onnx", sealed(tiny_model(true).bytes()));
  folder.write_manifest();
}

// A stand-in for loss.pt: a ZIP archive in its first and last bytes, with the metadata between
// them. The engine in fake_torch.cpp reads it.
inline std::string fake_torchscript(const json& metadata) {
  std::string bytes = "PK\x03\x04" + metadata.dump() + std::string("PK\x05\x06") + std::string(16, '\0');
  bytes += std::string("\x13\x00", 2);  // the length of the comment
  return bytes + "pykd.crc32=" + crc_digits(bytes);
}

}  // namespace pykd::tests

#endif  // PYKD_TESTS_TINY_MODEL_H_
