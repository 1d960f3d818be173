// Crafted ONNX files: valid to ONNX, sealed with a right checksum, and yet no export of pykd's. They would cost too
// much, or load and give wrong numbers.
#include <cstdint>
#include <limits>

#include "base/error.h"
#include "runtime/artefact/checksum.h"
#include "runtime/artefact/files.h"
#include "runtime/artefact/onnx_operators.h"
#include "runtime/artefact/onnx_scan.h"
#include "tests/support.h"
#include "tests/tiny_model.h"

namespace pykd::internal {
namespace {

using tests::attribute;
using tests::function;
using tests::kFloat;
using tests::kInt64;
using tests::node;
using tests::opset;
using tests::pbf_writer;
using tests::scalar;
using tests::tiny_model;
using tests::TinyModel;
using tests::value_info;

#define EXPECT_BAD(statement, ...) EXPECT_FAILS_WITH(Failure, PYKD_BAD_ARTEFACT, statement, __VA_ARGS__)

Signature scan(const TinyModel& model) {
  ArtefactFile file;
  file.label = "test.onnx";
  file.bytes = model.bytes();
  return scan_onnx(file);
}

// The tiny model with further nodes, functions and initialisers.
TinyModel with(const std::vector<std::string>& nodes, const std::vector<std::string>& initializers = {},
               const std::vector<std::string>& functions = {}) {
  TinyModel model = tiny_model(true);
  model.opsets.push_back(opset("pykd", 1));
  model.nodes.insert(model.nodes.end(), nodes.begin(), nodes.end());
  model.initializers.insert(model.initializers.end(), initializers.begin(), initializers.end());
  model.functions = functions;
  return model;
}

std::string ints(const std::string& name, const std::vector<std::int64_t>& values) {
  std::string bytes;
  pbf_writer writer(bytes);
  writer.add_int64(1, static_cast<std::int64_t>(values.size()));
  writer.add_int32(2, kInt64);
  writer.add_string(8, name);
  writer.add_bytes(9, reinterpret_cast<const char*>(values.data()), values.size() * sizeof(std::int64_t));
  return bytes;
}

std::string typed_attribute(const std::string& name, std::int64_t type, std::uint32_t field, const std::string& value) {
  std::string bytes;
  pbf_writer writer(bytes);
  writer.add_string(1, name);
  writer.add_bytes(field, value);
  writer.add_enum(20, static_cast<std::int32_t>(type));
  return bytes;
}

// ---- What costs too much -------------------------------------------------------------------------

TEST(OnnxScan, BoundsTheNodes) {
  std::vector<std::string> nodes(60001, node("Neg", {"d"}, "x"));
  EXPECT_BAD(scan(with(nodes)), "at most 60000 nodes");
  const std::vector<std::string> many(1001, function("pykd", "f", {}));
  EXPECT_BAD(scan(with({}, {}, many)), "at most 1000 functions");
  // A few functions that call each other make many of few.
  std::vector<std::string> functions = {function("pykd", "f0", std::vector<std::string>(1, node("Neg", {"x"}, "y")))};
  for (int level = 1; level <= 20; ++level) {
    const std::string below = "f" + std::to_string(level - 1);
    functions.push_back(function("pykd", "f" + std::to_string(level),
                                 {node(below, {"x"}, "a", {}, "pykd"), node(below, {"a"}, "y", {}, "pykd")}));
  }
  EXPECT_BAD(scan(with({}, {}, functions)), "at most 60000 nodes with functions expanded");
}

TEST(OnnxScan, KnowsItsOperators) {
  for (const char* op : {"If", "Loop", "Scan", "ConstantOfShape", "Tile", "RandomNormal", "Resize", "Pad", "NonZero",
                         "SequenceEmpty", "StringConcat", "EyeLike", "Anything"}) {
    EXPECT_BAD(scan(with({node(op, {"d"}, "x")})), "operators that pykd's loader knows", op,
               "cpp/runtime/artefact/onnx_operators.h");
    EXPECT_BAD(scan(with({}, {}, {function("pykd", "f", {node(op, {"x"}, "y")})})),
               "operators that pykd's loader knows");
  }
}

TEST(OnnxScan, RefusesWhatGrowsFromConstants) {
  const std::vector<std::string> shape = {ints("shape", {2000, 2000}), scalar("zero", 0.0f)};
  EXPECT_BAD(scan(with({node("Expand", {"zero", "shape"}, "x")}, shape)), "shapes of at most 1048576");
  EXPECT_BAD(scan(with({node("Neg", {"shape"}, "s"), node("Expand", {"zero", "s"}, "x")}, shape)), "\"Expand\"",
             "constants");
  EXPECT_BAD(scan(with({node("Expand", {"d", ""}, "x"), node("Expand", {"zero"}, "y")}, shape)), "\"Expand\"",
             "constants");
  EXPECT_BAD(scan(with({node("Range", {"a", "b", "c"}, "x")}, {ints("a", {0}), ints("b", {1}), ints("c", {1})})),
             "constants");
  EXPECT_BAD(scan(with({node("Neg", {"zero"}, "n"), node("MatMul", {"n", "n"}, "x")}, shape)), "\"MatMul\"",
             "constants");
  EXPECT_BAD(
      scan(with({node("f", {"zero"}, "x", {}, "pykd")}, shape, {function("pykd", "f", {node("Neg", {"x"}, "y")})})),
      "inputs of \"f\" that depend on the graph's", "constants");
  // Constants that broadcast: 2,000 × 2,000.
  const std::string row = ints("row", std::vector<std::int64_t>(2000, 1));
  const std::string column = ints("column", std::vector<std::int64_t>(2000, 1));
  EXPECT_BAD(scan(with({node("Add", {"row", "column"}, "x")}, {row, column})), "constants");
  // A shape that stands in the file, for something that depends on an input.
  EXPECT_BAD(scan(with({node("Expand", {"d", "shape"}, "x")}, {ints("shape", {1 << 20, 2})})),
             "shapes of at most 1048576");
  const std::int64_t most = std::numeric_limits<std::int64_t>::max();
  EXPECT_BAD(scan(with({node("Expand", {"d", "shape"}, "x")}, {ints("shape", {most, most, most})})),
             "shapes of at most");
  // Arithmetic on numbers is fine, and so are constants of the size that losses have.
  EXPECT_NO_THROW(scan(with({node("Mul", {"zero", "zero"}, "x"), node("Expand", {"d", "shape"}, "y")},
                            {scalar("zero", 0.0f), ints("shape", {1000})})));
}

TEST(OnnxScan, BoundsConstants) {
  auto tensor = [](std::int64_t length, const std::string& bytes, int dtype = kFloat) {
    std::string result;
    pbf_writer writer(result);
    writer.add_int64(1, length);
    writer.add_int32(2, dtype);
    writer.add_string(8, "c");
    writer.add_bytes(9, bytes);
    return result;
  };
  EXPECT_NO_THROW(scan(with({}, {tensor(2, std::string(8, '\0'))})));
  EXPECT_BAD(scan(with({}, {tensor(1 << 30, "")})), "constants of at most 1048576 elements");
  EXPECT_BAD(scan(with({}, {tensor(-1, "")})), "constants of at most");
  EXPECT_BAD(scan(with({}, {tensor(3, std::string(8, '\0'))})), "12 bytes for the elements of the tensor \"c\"", "8");
  EXPECT_BAD(scan(with({}, {tensor(1, "12345678", 8)})), "tensors of numbers", "ONNX type 8");
  // Elements in two fields, or in one that is read differently.
  std::string two = tensor(1, std::string(4, '\0'));
  pbf_writer(two).add_bytes(4, std::string(4, '\1'));
  EXPECT_BAD(scan(with({}, {two})), "the elements of a tensor once");
  std::string unpacked = tensor(1, std::string(4, '\0'));
  pbf_writer(unpacked).add_float(4, 1.0f);
  EXPECT_BAD(scan(with({}, {unpacked})), "tensors of raw bytes or of packed numbers");
}

// ---- What would load and give wrong numbers ------------------------------------------------------

TEST(OnnxScan, EveryOutputIsComputed) {
  // Named like an input: engines leave it as the caller's memory is.
  TinyModel model = tiny_model(true);
  model.nodes[3] = node("Mul", {"error", "weight"}, "other");
  model.outputs[0] = value_info("weight", kFloat, {});
  model.metadata["outputs"][0]["name"] = "weight";
  EXPECT_BAD(scan(model), "metadata");
  model = tiny_model(true);
  model.nodes[3] = node("Mul", {"error", "weight"}, "other");
  EXPECT_BAD(scan(model), "a node that computes the output \"loss\" of a graph");
  model.initializers.push_back(scalar("loss", 0.0f));
  EXPECT_BAD(scan(model), "a node that computes the output \"loss\" of a graph");
  const std::vector<std::string> functions = {function("pykd", "f", {node("Neg", {"x"}, "z")})};
  EXPECT_BAD(scan(with({}, {}, functions)), "a node that computes the output \"y\" of a function");
}

TEST(OnnxScan, EveryValueHasOneOriginBeforeItsUse) {
  EXPECT_BAD(scan(with({node("Neg", {"later"}, "x"), node("Neg", {"d"}, "later")})),
             "values that an earlier node computes");
  EXPECT_BAD(scan(with({node("Neg", {"nowhere"}, "x")})), "values that an earlier node computes", "\"nowhere\"");
  EXPECT_BAD(scan(with({node("Neg", {"d"}, "loss")})), "a name of its own for every value", "\"loss\" twice");
  EXPECT_BAD(scan(with({node("Neg", {"d"}, "student_logits")})), "\"student_logits\" twice");
  EXPECT_BAD(scan(with({node("Neg", {"d"}, "weight")})), "\"weight\" twice");
  EXPECT_BAD(scan(with({node("Neg", {"d"}, "")})), "a name of its own for every value");
  EXPECT_BAD(scan(with({}, {}, {function("pykd", "f", {node("Neg", {"d"}, "y")})})),
             "values that an earlier node computes");
}

TEST(OnnxScan, OperatorSetsAreTheExports) {
  for (const std::int64_t version : {std::int64_t{0}, std::int64_t{2}, (std::int64_t{1} << 32) + 1}) {
    TinyModel model = tiny_model(true);
    std::string pykd;
    pbf_writer(pykd).add_string(1, "pykd");
    pbf_writer(pykd).add_int64(2, version);
    model.opsets.push_back(pykd);
    EXPECT_BAD(scan(model), "version 1 of the operator set \"pykd\"");
  }
  TinyModel model = tiny_model(true);
  model.opsets = {opset("", 17)};
  EXPECT_BAD(scan(model), "version 18 of the operator set \"\"");
  model.opsets = {opset("", 18), opset("ai.onnx", 18)};
  EXPECT_BAD(scan(model), "every operator set once");
  model.opsets = {};
  EXPECT_BAD(scan(model), "the operator sets of its nodes");
}

TEST(OnnxScan, AttributesAreTheOperators) {
  EXPECT_BAD(scan(with({node("Neg", {"d"}, "x", {attribute("axis", 1)})})), "attributes that \"Neg\" has", "\"axis\"");
  EXPECT_BAD(scan(with({node("LogSoftmax", {"d"}, "x", {attribute("axis", 1), attribute("axis", 0)})})), "once");
  EXPECT_BAD(scan(with({node("LogSoftmax", {"d"}, "x", {typed_attribute("axis", 3, 4, "1")})})), "of their types",
             "\"axis\"");
  EXPECT_BAD(scan(with({node("Cast", {"d"}, "x", {attribute("to", 8)})})), "tensors of numbers");
  // A value in the field of another type, which an engine that goes by the field takes.
  EXPECT_BAD(scan(with({node("LogSoftmax", {"d"}, "x", {typed_attribute("axis", 2, 4, "1")})})), "a value of its type");
  std::string both = attribute("axis", 1);
  pbf_writer(both).add_bytes(4, "1");
  EXPECT_BAD(scan(with({node("LogSoftmax", {"d"}, "x", {both})})), "the value of an attribute once");
  std::string reference = attribute("axis", 1);
  pbf_writer(reference).add_string(21, "other");
  EXPECT_BAD(scan(with({node("LogSoftmax", {"d"}, "x", {reference})})), "attributes that are a number");
  EXPECT_BAD(scan(with({node("Constant", {}, "x")})), "a value for every constant");
  EXPECT_BAD(scan(with({node("Sub", {"d", "d", "d"}, "x")})), "as many inputs and outputs of \"Sub\" as it has");
}

// A kernel reads its settings from the node. One that it does not find, or does not understand, must not become the
// default.
TEST(OnnxScan, AttributesOfKernelNodesAreTheFunctions) {
  std::string power = function("pykd", "f", {node("Neg", {"x"}, "y")});
  pbf_writer(power).add_string(6, "power");
  auto model = [&](const std::vector<std::string>& attributes) {
    return with({node("f", {"d"}, "x", attributes, "pykd")}, {}, {power});
  };
  EXPECT_NO_THROW(scan(model({typed_attribute("power", 3, 4, "l2")})));
  EXPECT_BAD(scan(model({})), "1 attributes of \"f\", as its function has");
  EXPECT_BAD(scan(model({typed_attribute("power", 8, 9, "l2")})), "attributes that are a number");
  EXPECT_BAD(scan(model({typed_attribute("power", 4, 5, scalar("", 1.0f))})), "a float or a string as the attribute");
  EXPECT_BAD(scan(model({attribute("power", 2)})), "a float or a string as the attribute \"power\"");
  EXPECT_BAD(scan(model({typed_attribute("bower", 3, 4, "l2")})), "the attributes of its function", "\"bower\"");
  EXPECT_BAD(scan(model({typed_attribute("power", 3, 4, "l2"), typed_attribute("power", 3, 4, "l1")})), "once");
  EXPECT_BAD(scan(with({node("f", {"d", "d"}, "x", {typed_attribute("power", 3, 4, "l2")}, "pykd")}, {}, {power})),
             "as many inputs and outputs of \"f\" as its function has");
}

TEST(OnnxScan, AxesAreTheMetadatas) {
  TinyModel model = tiny_model(true);
  model.outputs.back() = value_info("grad_student_logits", kFloat, {"classes", "batch"});
  EXPECT_BAD(scan(model), "the free axis batch of grad_student_logits", "\"classes\"");
  model = tiny_model(true);
  model.inputs[0] = value_info("student_logits", kFloat, {"batch", ""});
  EXPECT_BAD(scan(model), "the free axis classes of student_logits", "without a name");
}

TEST(OnnxScan, MetadataAgreesWithItself) {
  auto with_metadata = [](const char* pointer, const tests::json& value, bool gradient = true) {
    TinyModel model = tiny_model(gradient);
    model.metadata[tests::json::json_pointer(pointer)] = value;
    return model;
  };
  EXPECT_BAD(scan(with_metadata("/parameters/0/minimum", 2.0)), "a default within its range", "1.5");
  EXPECT_BAD(scan(with_metadata("/outputs/1/name", "student_logits")), "every name once among inputs, parameters and");
  EXPECT_BAD(scan(with_metadata("/outputs/1/name", "weight")), "\"weight\" twice");
  EXPECT_BAD(scan(with_metadata("/inputs/0/gradient", false)), "no gradient of student_logits among \"outputs\"");
  EXPECT_BAD(scan(with_metadata("/inputs/1/gradient", true)), "the gradient of teacher_logits among \"outputs\"");
}

// ---- The table -----------------------------------------------------------------------------------

TEST(OnnxOperators, StandOnce) {
  for (const OnnxOperator& one : kOnnxOperators) {
    int count = 0;
    for (const OnnxOperator& other : kOnnxOperators) count += one.name == other.name;
    EXPECT_EQ(count, 1) << one.name;
  }
}

}  // namespace
}  // namespace pykd::internal
