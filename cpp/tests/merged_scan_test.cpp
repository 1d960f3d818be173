// What is refused of merged scorers before an engine sees them, and what they say of themselves.
#include "runtime/artefact/merged_scan.h"

#include <string>

#include "base/error.h"
#include "runtime/artefact/merged_contents.h"
#include "tests/support.h"
#include "tests/tiny_model.h"

namespace pykd::tests {
namespace {

using internal::FileSource;
using internal::MemorySource;
using internal::PykdNodes;
using internal::scan_merged;
using internal::Signature;

#define EXPECT_REFUSED(bytes, ...) EXPECT_FAILS_WITH(internal::Failure, PYKD_BAD_ARTEFACT, scan(bytes), __VA_ARGS__)

Signature scan(const std::string& bytes, PykdNodes* nodes = nullptr) {
  MemorySource source(bytes, "the bytes");
  PykdNodes found;
  Signature signature = scan_merged(source, "", found);
  if (nodes != nullptr) *nodes = found;
  return signature;
}

std::string with_metadata(const char* pointer, const json& value) {
  json metadata = scorer_metadata();
  metadata[json::json_pointer(pointer)] = value;
  return tiny_scorer(metadata).bytes();
}

bool is_merged(const std::string& bytes) {
  MemorySource source(bytes, "the bytes");
  return internal::is_merged(source);
}

// An attribute with that tensor or graph.
std::string holding(std::uint32_t field, const std::string& message) {
  return node("If", {"d"}, "inner", {attribute_with(field, message)});
}

TEST(MergedScan, ReadsTheSignature) {
  const Signature signature = scan(tiny_scorer().bytes());
  ASSERT_EQ(signature.inputs.size(), 1u);
  EXPECT_EQ(signature.inputs[0].axes, (std::vector<std::string>{"batch", "pixels.width"}));
  ASSERT_EQ(signature.outputs.size(), 1u);
  EXPECT_EQ(signature.outputs[0].axis_ids[0], signature.inputs[0].axis_ids[0]);
  ASSERT_EQ(signature.parameters.size(), 1u);
  EXPECT_EQ(signature.parameters[0].default_value, 1.5);
  const Signature copy = signature.copy();
  EXPECT_EQ(copy.inputs[0].axis_names[1], copy.inputs[0].axes[1].c_str());
  EXPECT_NE(copy.inputs[0].axis_names[1], signature.inputs[0].axis_names[1]);
}

TEST(MergedScan, KnowsScorersByTheirMetadata) {
  EXPECT_TRUE(is_merged(tiny_scorer().bytes()));
  EXPECT_FALSE(is_merged(tiny_score().bytes()));
  EXPECT_FALSE(is_merged(""));
  EXPECT_FALSE(is_merged("no protobuf"));
  TinyModel elsewhere = tiny_score();  // the words alone are no metadata
  pbf_writer(elsewhere.graph_extra).add_message(14, property("pykd.scorer", "{}"));
  EXPECT_FALSE(is_merged(elsewhere.bytes()));
}

TEST(MergedScan, TakesWhatModelsHave) {
  TinyModel model = tiny_scorer();
  const std::string tensor = scalar("inside", 1.0f);
  std::string graph;
  pbf_writer(graph).add_message(5, tensor);
  pbf_writer(graph).add_message(1, node("QLinearMatMul", {"a"}, "b", {}, "com.microsoft"));
  model.nodes.push_back(holding(6, graph));
  model.nodes.push_back(node("f", {"d"}, "e", {}, "pykd"));
  model.functions = {function("here", "g", {node("Relu", {"x"}, "y")}),
                     function("pykd", "f", {node("soft_target_float32", {"x"}, "y", {}, "pykd")})};
  model.opsets = {opset("", 21), opset("com.microsoft", 1), opset("here", 1)};
  PykdNodes nodes;
  scan(model.bytes(), &nodes);
  EXPECT_EQ(nodes.in_graph, std::set<std::string>{"f"});
  EXPECT_EQ(nodes.in_functions["f"], std::set<std::string>{"soft_target_float32"});
  EXPECT_EQ(nodes.that_run({"soft_target_float32"}), std::set<std::string>{"soft_target_float32"});
}

TEST(MergedScan, SaysWhichAxesAreFixed) {
  TinyModel model = tiny_scorer();
  model.inputs[0] = value_info("pixels", kFloat, {"4", "3", "", "3"});
  const Signature fixed = scan(model.bytes());
  EXPECT_EQ(fixed.inputs[0].axes, (std::vector<std::string>{"batch", "3", "pixels.2", "3"}));
  EXPECT_EQ(fixed.inputs[0].lengths, (std::vector<std::int64_t>{4, 3, 0, 3}));
  EXPECT_EQ(fixed.outputs[0].lengths, std::vector<std::int64_t>{4});
  // Two that do not agree are no samples; beside a free one they are something else.
  model.inputs.push_back(value_info("sizes", kInt64, {"2"}));
  EXPECT_REFUSED(model.bytes(), "samples along its first axis", "several fixed lengths");
  model.inputs[0] = value_info("pixels", kFloat, {"n", "3"});
  EXPECT_EQ(scan(model.bytes()).inputs[1].axes, std::vector<std::string>{"2"});
  model.inputs = {value_info("flag", kFloat, {}), value_info("weight", kFloat, {})};
  EXPECT_REFUSED(model.bytes(), "samples along its first axis", "none with axes");
}

TEST(MergedScan, LeavesOutOutputsOfUnknownLengths) {
  json metadata = scorer_metadata();
  metadata["outputs"] = {"loss_per_sample", "hidden", "logits", "text"};
  TinyModel model = tiny_scorer(metadata);
  model.outputs.push_back(value_info("hidden", kFloat, {"n", "steps"}));
  model.outputs.push_back(value_info("logits", kInt64, {"n", "3"}));
  model.outputs.push_back(value_info("text", 8, {"n"}));
  const Signature signature = scan(model.bytes());
  ASSERT_EQ(signature.outputs.size(), 2u);
  EXPECT_EQ(signature.outputs[1].axes, (std::vector<std::string>{"batch", "3"}));
  EXPECT_EQ(signature.shapeless, (std::vector<std::string>{"hidden", "text"}));
}

TEST(MergedScan, RefusesMetadataThatAreWrong) {
  EXPECT_REFUSED(with_metadata("/format_version", 2), "format version 1", "upgrade pykd");
  EXPECT_REFUSED(with_metadata("/format_version", "1"), "an integer", "format_version");
  EXPECT_REFUSED(with_metadata("/loss", 1), "an object", "loss");
  EXPECT_REFUSED(with_metadata("/loss/format_version", 99), "format version");
  EXPECT_REFUSED(with_metadata("/loss/inputs/0/dtype", "float31"), "dtype");
  EXPECT_REFUSED(with_metadata("/loss/parameters/0/default", 2.5), "the default 2.5", "weight", "1.5");
  EXPECT_REFUSED(with_metadata("/loss/outputs/0/axes", json::array()), "loss_per_sample");
  EXPECT_REFUSED(with_metadata("/lengths/classes", 0), "at least 1", "lengths.classes");
  EXPECT_REFUSED(with_metadata("/lengths", json::array()), "lengths");
  EXPECT_REFUSED(with_metadata("/outputs", json::array({1})), "strings", "outputs");
  EXPECT_REFUSED(with_metadata("/outputs", json::array({"other"})), "the outputs other", "loss_per_sample");
  EXPECT_REFUSED(with_metadata("/outputs", std::string(2 << 20, 'x')), "at most 2097152 bytes");
  TinyModel model = tiny_score();
  EXPECT_REFUSED(model.bytes(), "the metadata entry \"pykd.scorer\"", "none");
  pbf_writer(model.model_extra).add_message(14, property("pykd.scorer", "{"));
  EXPECT_REFUSED(model.bytes(), "JSON");
  pbf_writer(model.model_extra).add_message(14, property("pykd.scorer", "{}"));
  EXPECT_REFUSED(model.bytes(), "\"pykd.scorer\" once", "it twice");
}

TEST(MergedScan, RefusesGraphsThatAreNotAsTheMetadataSays) {
  auto with_input = [](const std::string& input) {
    TinyModel model = tiny_scorer();
    model.inputs.push_back(input);
    return model.bytes();
  };
  EXPECT_REFUSED(with_input(value_info("pixels", kFloat, {"n"})), "every input once", "\"pixels\"");
  EXPECT_REFUSED(with_input(value_info("words", 8, {"n"})), "tensors of numbers", "\"words\" of ONNX type 8");
  EXPECT_REFUSED(with_input(value_info("", kFloat, {"n"})), "printable characters");
  EXPECT_REFUSED(with_input(value_info("a\nb", kFloat, {"n"})), "printable characters");
  EXPECT_REFUSED(with_input(value_info("deep", kFloat, std::vector<std::string>(9, "n"))), "8 axes");
  EXPECT_REFUSED(with_input(value_info("axis", kInt64, {"1"})), "no default for the input \"axis\"");
  EXPECT_REFUSED(with_input(value_info("student_logits", kInt64, {"n", "m"})), "student_logits of float32 and rank 2");
  EXPECT_REFUSED(with_input(property("unshaped", "")), "with a type and a shape", "\"unshaped\"");
  TinyModel model = tiny_scorer();
  model.inputs[1] = value_info("weight", kInt64, {});
  EXPECT_REFUSED(model.bytes(), "a number of float32 as the parameter weight");
  model = tiny_scorer();
  model.initializers.erase(model.initializers.begin());
  EXPECT_REFUSED(model.bytes(), "the default 1.5 for the parameter weight", "none");
  model = tiny_scorer();
  model.outputs[0] = value_info("loss_per_sample", kInt64, {"batch"});
  EXPECT_REFUSED(model.bytes(), "loss_per_sample of float32 and rank 1");
  model = tiny_scorer();
  pbf_writer(model.model_extra).add_message(7, model.graph());
  EXPECT_REFUSED(model.bytes(), "one graph", "two");
  model = tiny_scorer();
  pbf_writer(model.model_extra).add_message(20, std::string());
  EXPECT_REFUSED(model.bytes(), "training information");
  model = tiny_scorer();
  model.initializers.push_back(scalar("weight", 1.5f));
  EXPECT_REFUSED(model.bytes(), "every initializer once");
}

TEST(MergedScan, RefusesWeightsThatLieAnywhereElse) {
  using Entries = std::vector<std::pair<std::string, std::string>>;
  for (const char* location :
       {"../w.data", "/etc/passwd", "a/w.data", "..", ".", "", "a\\w.data", "*/_ORT_MEM_ADDR_/*"}) {
    const std::string tensor = tensor_outside("w", {{"location", location}});
    TinyModel model = tiny_scorer();
    model.initializers.push_back(tensor);
    EXPECT_REFUSED(model.bytes(), "a file beside the scorer, by its name alone");
    // Wherever a tensor may be: in attributes, in graphs of attributes, sparse, and in functions.
    std::string sparse, graph, deeper;
    pbf_writer(sparse).add_message(2, tensor);
    pbf_writer(graph).add_message(5, tensor);
    pbf_writer(deeper).add_message(1, holding(6, graph));
    for (const std::string& inner : {holding(5, tensor), holding(10, tensor), holding(6, graph), holding(11, graph),
                                     holding(22, sparse), holding(23, sparse), holding(6, deeper)}) {
      model = tiny_scorer();
      model.nodes.push_back(inner);
      EXPECT_REFUSED(model.bytes(), "by its name alone");
      model = tiny_scorer();
      model.functions = {function("here", "f", {inner})};
      EXPECT_REFUSED(model.bytes(), "by its name alone");
    }
    model = tiny_scorer();
    pbf_writer(model.graph_extra).add_message(15, sparse);
    EXPECT_REFUSED(model.bytes(), "by its name alone");
  }
  auto with = [](const Entries& entries) {
    TinyModel model = tiny_scorer();
    model.initializers.push_back(tensor_outside("w", entries));
    return model.bytes();
  };
  EXPECT_REFUSED(with({}), "the file of the weight \"w\"", "none");
  EXPECT_REFUSED(with({{"location", "w"}, {"location", "v"}}), "location of a weight once");
  EXPECT_REFUSED(with({{"location", "w"}, {"offset", "-1"}}), "numbers of bytes", "-1");
  EXPECT_REFUSED(with({{"location", "w"}, {"length", "99999999999999999999"}}), "numbers of bytes");
  EXPECT_REFUSED(with({{"location", "w"}, {"length", "0x10"}}), "numbers of bytes");
  EXPECT_REFUSED(with({{"location", "w"}}), "holds its weights", "load it by its path");
}

TEST(MergedScan, LooksForWeightsBesideTheFile) {
  const TemporaryFolder folder;
  TinyModel model = tiny_scorer();
  model.initializers.push_back(tensor_outside("w", {{"location", "w.data"}, {"offset", "4096"}, {"length", "4"}}));
  folder.write("scorer.onnx", model.bytes());
  auto scan_file = [&] {
    FileSource source(folder.path("scorer.onnx"));
    PykdNodes nodes;
    return scan_merged(source, folder.path(), nodes);
  };
  EXPECT_FAILS_WITH(internal::Failure, PYKD_NOT_FOUND, scan_file(), "scorer.onnx", "w.data", "no regular file");
  folder.write("w.data", std::string(4099, 'x'));
  EXPECT_FAILS_WITH(internal::Failure, PYKD_BAD_ARTEFACT, scan_file(), "w.data", "at least 4100 bytes", "got 4099");
  folder.write("w.data", std::string(4100, 'x'));
  EXPECT_EQ(scan_file().inputs.size(), 1u);
}

TEST(MergedScan, BoundsWhatItReads) {
  std::string graph;
  for (int depth = 0; depth < 40; ++depth) {
    std::string around;
    pbf_writer(around).add_message(1, holding(6, graph));
    graph = around;
  }
  TinyModel model = tiny_scorer();
  model.nodes.push_back(holding(6, graph));
  EXPECT_REFUSED(model.bytes(), "graphs within graphs 30 deep");
  model = tiny_scorer();
  model.inputs.insert(model.inputs.end(), 5000, value_info("pixels", kFloat, {"n"}));
  EXPECT_REFUSED(model.bytes(), "at most 4000 inputs");
  model = tiny_scorer();
  model.nodes.push_back(node(std::string(70000, 'x'), {"d"}, "e"));
  EXPECT_REFUSED(model.bytes(), "the operator of a node of at most 65536 bytes");
}

TEST(MergedScan, RefusesWhatIsNoProtobuf) {
  const std::string good = tiny_scorer().bytes();
  for (std::size_t length = 0; length < good.size(); ++length) {
    EXPECT_FAILS_WITH(internal::Failure, PYKD_BAD_ARTEFACT, scan(good.substr(0, length)), "");
  }
  EXPECT_REFUSED(std::string("\x3b"), "a field of an unknown kind");
  EXPECT_REFUSED(std::string("\x00\x01", 2), "a field without a number");
  EXPECT_REFUSED(std::string(11, '\xff'), "more than 64 bits");
  EXPECT_REFUSED(std::string("\x3a\x7f"), "longer than what holds it");
  EXPECT_REFUSED(std::string("\x08\x80"), "the end of it within a number");
}

// The reader has a buffer: what it reads does not depend on where its ends fall.
TEST(MergedScan, ReadsLongFilesInPieces) {
  for (std::size_t filler : {16370u, 16383u, 16384u, 16385u, 50000u, 200000u}) {
    TinyModel model = tiny_scorer();
    std::string tensor = scalar("much", 0);
    pbf_writer(tensor).add_bytes(9, std::string(filler, 'w'));
    model.initializers.insert(model.initializers.begin(), tensor);
    EXPECT_EQ(scan(model.bytes()).parameters.size(), 1u) << filler;
    EXPECT_TRUE(is_merged(model.bytes()));
  }
}

}  // namespace
}  // namespace pykd::tests
