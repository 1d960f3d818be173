// The metadata's parser and the checks of a call: what is wrong, and whether the message says so.
#include "runtime/signature/call.h"
#include "runtime/signature/metadata.h"

#include <cmath>
#include <limits>

#include "base/error.h"
#include "tests/support.h"
#include "tests/tiny_model.h"

namespace pykd::internal {
namespace {

using nlohmann::json;
using tests::tensor_json;
using tests::tiny_metadata;

#define EXPECT_BAD(statement, ...) EXPECT_FAILS_WITH(Failure, PYKD_BAD_ARTEFACT, statement, __VA_ARGS__)
#define EXPECT_VALUE_ERROR(statement, ...) EXPECT_FAILS_WITH(Failure, PYKD_INVALID_VALUE, statement, __VA_ARGS__)
#define EXPECT_TYPE_ERROR(statement, ...) EXPECT_FAILS_WITH(Failure, PYKD_INVALID_TYPE, statement, __VA_ARGS__)

Signature parse(const json& metadata) { return parse_signature(metadata.dump()); }

// ---- Metadata -----------------------------------------------------------------------------------

TEST(Metadata, ReadsTheSignature) {
  const Signature signature = parse(tiny_metadata(true));
  EXPECT_EQ(signature.name, "tiny");
  EXPECT_EQ(signature.kind, ArtefactKind::kGradient);
  ASSERT_EQ(signature.inputs.size(), 2u);
  EXPECT_EQ(signature.axes, (std::vector<std::string>{"batch", "classes"}));
  EXPECT_EQ(signature.inputs[0].gradient_output, 3u);
  EXPECT_EQ(signature.inputs[1].gradient_output, kNone);
  EXPECT_EQ(signature.outputs[3].gradient_of, 0u);
  EXPECT_EQ(signature.grad_scale, 1u);
  EXPECT_STREQ(signature.inputs[1].axis_names[1], "classes");
}

TEST(Metadata, NamesPointIntoTheSignatureAfterAMove) {
  Signature first = parse(tiny_metadata(true));
  const Signature second = std::move(first);
  EXPECT_EQ(second.inputs[0].axis_names[0], second.inputs[0].axes[0].c_str());
}

TEST(Metadata, NamesAMissingField) {
  for (const char* field : {"format", "format_version", "kind", "name", "inputs", "parameters", "outputs"}) {
    json metadata = tiny_metadata(true);
    metadata.erase(field);
    EXPECT_BAD(parse(metadata), field, "no such field", "export the loss again");
  }
  json metadata = tiny_metadata(true);
  metadata["inputs"][1].erase("dtype");
  EXPECT_BAD(parse(metadata), "inputs[1].dtype");
}

TEST(Metadata, NamesAFieldOfTheWrongType) {
  json metadata = tiny_metadata(true);
  metadata["inputs"][0]["axes"] = "batch classes";
  EXPECT_BAD(parse(metadata), "inputs[0].axes", "a list", "string");
  metadata = tiny_metadata(true);
  metadata["parameters"][0]["default"] = "2.0";
  EXPECT_BAD(parse(metadata), "parameters[0].default", "a number");
  metadata = tiny_metadata(true);
  metadata["outputs"] = {{"loss", 1}};
  EXPECT_BAD(parse(metadata), "outputs", "a list");
}

TEST(Metadata, ExplainsANewerFormat) {
  json metadata = tiny_metadata(true);
  metadata["format_version"] = 7;
  EXPECT_BAD(parse(metadata), "version 2", "version 7", "upgrade pykd or export");
}

TEST(Metadata, ReadsTheFormOfTheParameters) {
  json metadata = tiny_metadata(true);
  EXPECT_EQ(parse(metadata).parameter_form, ParameterForm::kOverridable);
  metadata["parameters_as"] = "inputs";
  Signature signature = parse(metadata);
  EXPECT_EQ(signature.parameter_form, ParameterForm::kInputs);
  EXPECT_EQ(signature.parameters.size(), 2u);
  EXPECT_TRUE(signature.fixed.empty());
  metadata["parameters_as"] = "fixed";
  signature = parse(metadata);
  EXPECT_EQ(signature.parameter_form, ParameterForm::kFixed);
  EXPECT_TRUE(signature.parameters.empty());
  EXPECT_EQ(signature.grad_scale, kNone);
  ASSERT_EQ(signature.fixed.size(), 2u);
  EXPECT_EQ(signature.fixed[0].default_value, 1.5);
  metadata["parameters_as"] = "anything";
  EXPECT_BAD(parse(metadata), "parameters_as", "anything");
  metadata["parameters_as"] = 1;
  EXPECT_BAD(parse(metadata), "parameters_as", "a string");
}

TEST(Metadata, ReadsMaximaAndLeastLengths) {
  json metadata = tiny_metadata(true);
  EXPECT_EQ(parse(metadata).parameters[0].maximum, std::numeric_limits<double>::infinity());
  EXPECT_EQ(parse(metadata).inputs[1].least_lengths, (std::vector<std::int64_t>{1, 1}));
  metadata["parameters"][0]["maximum"] = 1.5;
  metadata["least_lengths"] = {{"classes", 2}};
  const Signature signature = parse(metadata);
  EXPECT_EQ(signature.parameters[0].maximum, 1.5);
  EXPECT_EQ(signature.inputs[1].least_lengths, (std::vector<std::int64_t>{1, 2}));
  EXPECT_EQ(signature.outputs[3].least_lengths, (std::vector<std::int64_t>{1, 2}));
  metadata["parameters"][0]["maximum"] = 1.25;
  EXPECT_BAD(parse(metadata), "a default within its range", "parameters[0].default", "1.5");
  metadata["parameters"][0]["maximum"] = "2";
  EXPECT_BAD(parse(metadata), "parameters[0].maximum", "a number");
  metadata["parameters"][0].erase("maximum");
  metadata["least_lengths"] = {{"chanels", 2}};
  EXPECT_BAD(parse(metadata), "axes that the inputs have", "least_lengths", "chanels");
  metadata["least_lengths"] = {{"classes", 0}};
  EXPECT_BAD(parse(metadata), "at least 1", "least_lengths.classes");
  metadata["least_lengths"] = {{"classes", 1.5}};
  EXPECT_BAD(parse(metadata), "least_lengths.classes", "an integer");
  metadata["least_lengths"] = {"classes", 2};
  EXPECT_BAD(parse(metadata), "least_lengths", "an object");
}

TEST(Metadata, RefusesContradictions) {
  json metadata = tiny_metadata(true);
  metadata["outputs"][3]["axes"] = {"batch"};
  EXPECT_BAD(parse(metadata), "student_logits");
  metadata = tiny_metadata(true);
  metadata["outputs"][3]["gradient_of"] = "student";
  EXPECT_BAD(parse(metadata), "outputs[3].gradient_of");
  metadata = tiny_metadata(true);
  metadata["outputs"][1]["axes"] = {"channels"};
  EXPECT_BAD(parse(metadata), "outputs[1].axes", "channels");
  metadata = tiny_metadata(true);
  metadata["inputs"][1]["name"] = "student_logits";
  EXPECT_BAD(parse(metadata), "twice");
  metadata = tiny_metadata(true);
  metadata["inputs"][0]["index_of"] = "classes";
  EXPECT_BAD(parse(metadata), "inputs[0].index_of", "int64");
  metadata = tiny_metadata(true);
  metadata["outputs"].erase(0);
  EXPECT_BAD(parse(metadata), "loss");
  metadata = tiny_metadata(true);
  metadata["inputs"][0]["dtype"] = "float";  // for TorchScript files alone
  EXPECT_BAD(parse(metadata), "inputs[0].dtype");
  metadata = tiny_metadata(true);
  metadata["inputs"][0]["name"] = std::string("a\0b", 3);
  EXPECT_BAD(parse(metadata), "inputs[0].name");
  metadata = tiny_metadata(true);
  metadata["inputs"][0]["axes"] = json(std::vector<std::string>(9, "a"));
  EXPECT_BAD(parse(metadata), "inputs[0].axes", "8");
}

TEST(Metadata, WantsTheSamplesAlongEveryFirstAxisOfAScore) {
  const json metadata = tests::tiny_score().metadata;
  EXPECT_EQ(parse(metadata).kind, ArtefactKind::kScore);
  json changed = metadata;
  changed["outputs"][0]["axes"] = json::array();
  EXPECT_BAD(parse(changed), "a vector \"loss_per_sample\"", "a scalar");
  changed["outputs"][0]["name"] = "loss";
  EXPECT_BAD(parse(changed), "a vector \"loss_per_sample\"", "none");
  changed = metadata;
  changed["outputs"].push_back(tests::tensor_json("loss", json::array()));
  EXPECT_BAD(parse(changed), "first axis batch", "loss");
  changed = metadata;
  changed["inputs"][1]["axes"] = {"classes"};
  EXPECT_BAD(parse(changed), "first axis batch", "teacher_logits");
  changed = metadata;
  json gradient = tests::tensor_json("grad_student_logits", {"batch", "classes"});
  gradient["gradient_of"] = "student_logits";
  changed["outputs"].push_back(gradient);
  EXPECT_BAD(parse(changed), "no gradients where \"kind\" is \"score\"");
}

TEST(Metadata, RefusesWhatIsNoJson) {
  EXPECT_BAD(parse_signature(""), "JSON");
  EXPECT_BAD(parse_signature("{\"format\": \"pykd\""), "JSON");
  EXPECT_BAD(parse_signature("[]"), "object");
  EXPECT_BAD(parse_signature("[[1, 2], [3"), "JSON");
  EXPECT_BAD(parse_signature(std::string((1 << 20) + 1, ' ')), "1 MiB");
  EXPECT_BAD(parse_signature("{\"format\": \"\xff\xfe\"}"), "JSON");
}

TEST(Metadata, RefusesDeepNesting) {
  // What walks a document by recursion would use up the stack.
  std::string text = tiny_metadata(true).dump();
  text.pop_back();
  const std::size_t depth = 500000;
  text += ",\"recipe\":" + std::string(depth, '[') + std::string(depth, ']') + "}";
  EXPECT_BAD(parse_signature(text), "nested", "64");
}

TEST(Metadata, TakesTheRecipeAsItIs) {
  json metadata = tiny_metadata(true);
  metadata["recipe"] = {{"terms", {{"soft", {{"weight", 1.0}}}}}};
  EXPECT_EQ(parse(metadata).recipe, metadata["recipe"].dump());
}

TEST(Metadata, TakesTheFilesOfOneExport) { check_one_export(parse(tiny_metadata(false)), parse(tiny_metadata(true))); }

TEST(Metadata, RefusesFilesOfDifferentExports) {
  json other = tiny_metadata(true);
  other["name"] = "another";
  EXPECT_BAD(check_one_export(parse(tiny_metadata(false)), parse(other)), "one export");
  other = tiny_metadata(true);
  other["parameters"][0]["default"] = 2.5;
  EXPECT_BAD(check_one_export(parse(tiny_metadata(false)), parse(other)), "one export");
}

// ---- Calls --------------------------------------------------------------------------------------

json labelled_metadata(const char* float_dtype = "float32", const char* kind = "value") {
  json labels = tensor_json("labels", {"batch"}, "int64");
  labels["gradient"] = false;
  labels["index_of"] = "classes";
  labels["ignore_index"] = -100;
  json metadata = tiny_metadata(false);
  metadata["kind"] = kind;
  for (json& input : metadata["inputs"]) {
    input["dtype"] = float_dtype;
    if (metadata["kind"] != "value") input["gradient"] = false;  // there is none among the outputs
  }
  metadata["inputs"].push_back(labels);
  return metadata;
}

// What a C program may write into a field of enumeration type.
template <class Enumeration>
void set_raw(Enumeration& field, int value) {
  std::memcpy(&field, &value, sizeof value);
}

// A call that is right in everything; each test spoils one thing.
class Call : public testing::Test {
 protected:
  static constexpr int kBatch = 2, kClasses = 3;

  void SetUp() override { use(labelled_metadata()); }

  void use(const json& metadata) { signature = parse(metadata); }

  pykd_tensor floats(const char* name, float* data) {
    return {name, data, PYKD_FLOAT32, 2, shape, nullptr, PYKD_CPU, 0};
  }

  Binding check() {
    std::vector<pykd_tensor> ordered;
    return check_inputs(signature, device, inputs.data(), inputs.size(), ordered);
  }
  std::vector<double> check(const std::vector<pykd_parameter>& parameters) {
    std::vector<double> ordered;
    check_parameters(signature, check(), parameters.data(), parameters.size(), ordered);
    return ordered;
  }
  std::vector<std::size_t> check(const std::vector<pykd_tensor>& outputs) {
    std::vector<pykd_tensor> ordered;
    std::vector<std::size_t> ids;
    const Binding binding = check_inputs(signature, device, inputs.data(), inputs.size(), ordered);
    check_outputs(signature, device, binding, ordered, outputs.data(), outputs.size(), ids);
    return ids;
  }

  Signature signature;
  Device device;
  std::int64_t shape[8] = {kBatch, kClasses, 1, 1, 1, 1, 1, 1};
  float student[6] = {}, teacher[6] = {}, gradient[6] = {}, loss = 0;
  std::int64_t labels[2] = {2, -100};
  std::vector<pykd_tensor> inputs = {floats("student_logits", student),
                                     floats("teacher_logits", teacher),
                                     {"labels", labels, PYKD_INT64, 1, shape, nullptr, PYKD_CPU, 0}};
  pykd_tensor output = {"loss", &loss, PYKD_FLOAT32, 0, nullptr, nullptr, PYKD_CPU, 0};
};

TEST_F(Call, BindsTheAxes) {
  EXPECT_EQ(check().lengths, (std::vector<std::int64_t>{kBatch, kClasses}));
  std::swap(inputs[0], inputs[2]);
  EXPECT_EQ(check().lengths, (std::vector<std::int64_t>{kBatch, kClasses}));
}

TEST_F(Call, NamesAMissingInput) {
  inputs.pop_back();
  EXPECT_VALUE_ERROR(check(), "student_logits, teacher_logits, labels", "no labels");
}

TEST_F(Call, SuggestsTheNearName) {
  inputs[2].name = "label";
  EXPECT_VALUE_ERROR(check(), "\"label\"", "did you mean \"labels\"?");
  inputs[2].name = "logits_of_somebody";
  EXPECT_VALUE_ERROR(check(), "logits_of_somebody", "use the names that the artefact has");
}

TEST_F(Call, RefusesANameTwice) {
  inputs[1].name = "student_logits";
  EXPECT_VALUE_ERROR(check(), "student_logits once");
}

TEST_F(Call, RefusesNullPointers) {
  inputs[1].data = nullptr;
  EXPECT_VALUE_ERROR(check(), "teacher_logits", "NULL");
  inputs[1] = floats("teacher_logits", teacher);
  inputs[1].shape = nullptr;
  EXPECT_VALUE_ERROR(check(), "teacher_logits with axes (batch, classes)", "NULL for its shape");
  inputs[1] = floats(nullptr, teacher);
  EXPECT_VALUE_ERROR(check(), "a name", "index 1");
  std::vector<pykd_tensor> ordered;
  EXPECT_VALUE_ERROR(check_inputs(signature, device, nullptr, 2, ordered), "NULL", "2");
}

TEST_F(Call, NamesTheAxesForAWrongRank) {
  inputs[0].rank = 1;
  EXPECT_VALUE_ERROR(check(), "student_logits with axes (batch, classes)", "rank 1 with shape [2]");
  inputs[0].rank = 9;
  EXPECT_VALUE_ERROR(check(), "rank 9", "8");
  inputs[0].rank = -1;
  EXPECT_VALUE_ERROR(check(), "rank -1");
}

TEST_F(Call, NamesBothTensorsForUnequalAxes) {
  std::int64_t other[2] = {kBatch, 5};
  inputs[1].shape = other;
  EXPECT_VALUE_ERROR(check(),
                     "expected teacher_logits of length 3 along \"classes\", as student_logits has, "
                     "got 5 (shape [2, 5])");
  std::int64_t batch[1] = {4};
  inputs[1].shape = shape;
  inputs[2].shape = batch;
  EXPECT_VALUE_ERROR(check(), "labels of length 2 along \"batch\"", "got 4");
}

TEST_F(Call, TakesOneNameTwiceInATensorAsEqualLengths) {
  json metadata = labelled_metadata();
  metadata["inputs"][0]["axes"] = {"classes", "classes"};
  metadata["inputs"].erase(1);
  metadata["inputs"].erase(1);
  metadata["outputs"] = {tensor_json("loss", json::array())};
  use(metadata);
  inputs.resize(1);
  EXPECT_VALUE_ERROR(check(), "student_logits of length 2 along \"classes\"", "got 3");
}

TEST_F(Call, RefusesEmptyTensors) {
  shape[0] = 0;
  EXPECT_VALUE_ERROR(check(), "student_logits", "\"batch\"", "[0, 3]", "an empty batch");
  shape[0] = -2;
  EXPECT_VALUE_ERROR(check(), "student_logits", "[-2, 3]");
}

TEST_F(Call, RefusesWhatIsShorterThanItsLeastLength) {
  json metadata = labelled_metadata();
  metadata["least_lengths"] = {{"classes", kClasses}};
  use(metadata);
  check();
  shape[1] = kClasses - 1;
  EXPECT_VALUE_ERROR(check(), "student_logits of length at least 3 along \"classes\", got shape [2, 2]",
                     "give more of them");
}

TEST_F(Call, RefusesSizesThatOverflow) {
  shape[0] = std::int64_t{1} << 40;
  shape[1] = std::int64_t{1} << 40;
  EXPECT_VALUE_ERROR(check(), "student_logits", "1099511627776");
}

TEST_F(Call, ChecksStrides) {
  std::int64_t strides[2] = {3, 1};
  inputs[0].strides = strides;
  check();
  strides[0] = 6;  // every other row
  EXPECT_VALUE_ERROR(check(), "student_logits contiguous", "[6, 1]", "copy");
  strides[0] = 1;  // transposed
  strides[1] = 2;
  EXPECT_VALUE_ERROR(check(), "student_logits contiguous");
}

TEST_F(Call, AllowsAnyStrideAlongAnAxisOfLengthOne) {
  shape[0] = 1;
  std::int64_t strides[2] = {12345, 1};
  inputs[0].strides = strides;
  labels[0] = 0;
  check();
}

TEST_F(Call, ChecksDtypes) {
  inputs[1].dtype = PYKD_FLOAT64;
  EXPECT_TYPE_ERROR(check(), "teacher_logits of dtype float32", "float64");
  set_raw(inputs[1].dtype, 0);
  EXPECT_TYPE_ERROR(check(), "teacher_logits", "unknown dtype (0)");
  set_raw(inputs[1].dtype, 33);
  EXPECT_TYPE_ERROR(check(), "unknown dtype (33)");
  inputs[1].dtype = PYKD_FLOAT32;
  inputs[2].dtype = PYKD_FLOAT32;
  EXPECT_TYPE_ERROR(check(), "labels of dtype int64", "float32");
}

TEST_F(Call, WantsOneFloatingDtypePerCall) {
  use(labelled_metadata("float", "torchscript"));
  double wide[6] = {};
  for (int i : {0, 1}) {
    inputs[i].dtype = PYKD_FLOAT64;
    inputs[i].data = wide;
  }
  EXPECT_EQ(check().float_dtype, PYKD_FLOAT64);
  inputs[0].dtype = PYKD_FLOAT32;
  EXPECT_TYPE_ERROR(check(), "teacher_logits of dtype float32, as student_logits has", "float64");
}

TEST_F(Call, ChecksDevices) {
  device = {PYKD_CUDA, 1};
  EXPECT_TYPE_ERROR(check(), "student_logits on cuda:1", "cpu");
  for (pykd_tensor& input : inputs) input.device = PYKD_CUDA;
  EXPECT_TYPE_ERROR(check(), "student_logits on cuda:1", "cuda:0");
  set_raw(inputs[1].device, 9);
  inputs[0].device_id = 1;
  EXPECT_TYPE_ERROR(check(), "teacher_logits on cuda:1", "an unknown device (9)");
  inputs[1].device = PYKD_CUDA;
  for (pykd_tensor& input : inputs) input.device_id = 1;
  labels[0] = 99;  // not looked at: it would lie on the GPU
  check();
}

TEST_F(Call, ChecksLabels) {
  labels[1] = 3;
  EXPECT_VALUE_ERROR(check(), "labels from 0 to 2 or -100 (ignored)", "3 at position [1]", "\"classes\"");
  labels[1] = -1;
  EXPECT_VALUE_ERROR(check(), "-1 at position [1]");
  labels[1] = std::numeric_limits<std::int64_t>::min();
  EXPECT_VALUE_ERROR(check(), "-9223372036854775808 at position [1]");
}

TEST_F(Call, IgnoresNoLabelWhereNoneIsDeclared) {
  json metadata = labelled_metadata();
  metadata["inputs"][2].erase("ignore_index");
  use(metadata);
  EXPECT_VALUE_ERROR(check(), "labels from 0 to 2,", "-100 at position [1]");
}

TEST_F(Call, TellsThePositionOfALabelInTwoAxes) {
  json metadata = labelled_metadata();
  metadata["inputs"][2]["axes"] = {"batch", "tokens"};
  use(metadata);
  std::int64_t tokens[6] = {0, 0, 0, 0, 7, 0};
  std::int64_t two[2] = {kBatch, 3};
  inputs[2] = {"labels", tokens, PYKD_INT64, 2, two, nullptr, PYKD_CPU, 0};
  EXPECT_VALUE_ERROR(check(), "7 at position [1, 1]");
}

TEST_F(Call, ChecksParameters) {
  json metadata = labelled_metadata();
  metadata["parameters"][0]["maximum"] = 2.5;
  use(metadata);
  EXPECT_EQ(check(std::vector<pykd_parameter>{{"weight", 0.0}}), (std::vector<double>{0.0}));
  EXPECT_EQ(check(std::vector<pykd_parameter>{}), (std::vector<double>{1.5}));
  const double infinity = std::numeric_limits<double>::infinity();
  auto one = [&](const char* name, double value) { return check(std::vector<pykd_parameter>{{name, value}}); };
  EXPECT_VALUE_ERROR(one("wieght", 1), "wieght", "did you mean \"weight\"?");
  EXPECT_VALUE_ERROR(one("weight", -0.5), "weight at least 0", "-0.5");
  EXPECT_EQ(one("weight", 2.5), (std::vector<double>{2.5}));
  EXPECT_VALUE_ERROR(one("weight", 2.75), "expected the parameter weight at most 2.5, got 2.75; give a smaller value");
  EXPECT_VALUE_ERROR(one("weight", std::nan("")), "full precision", "weight", "nan");
  EXPECT_VALUE_ERROR(one("weight", infinity), "full precision", "inf");
  EXPECT_VALUE_ERROR(one("weight", 1e300), "full precision", "1e+300");  // float32 cannot hold it
  EXPECT_VALUE_ERROR(check(std::vector<pykd_parameter>{{"weight", 1}, {"weight", 2}}), "once");
  EXPECT_VALUE_ERROR(check(std::vector<pykd_parameter>{{nullptr, 1}}), "a name");
}

TEST_F(Call, TakesNoTemperatureThatRoundsToZero) {
  json metadata = labelled_metadata();
  metadata["parameters"][0]["minimum_exclusive"] = true;
  use(metadata);
  EXPECT_VALUE_ERROR(check(std::vector<pykd_parameter>{{"weight", 0}}), "weight greater than 0");
  for (const double tiny : {1e-50, 1e-40, -1e-40}) {  // 1 / 1e-40 is infinite in float32
    EXPECT_VALUE_ERROR(check(std::vector<pykd_parameter>{{"weight", tiny}}), "from 1.17549435e-38 to 3.40282347e+38");
  }
  EXPECT_EQ(check(std::vector<pykd_parameter>{{"weight", 1e-30}}), (std::vector<double>{1e-30}));
}

TEST_F(Call, ChecksOutputs) {
  EXPECT_EQ(check(std::vector<pykd_tensor>{output}), (std::vector<std::size_t>{0}));
  EXPECT_VALUE_ERROR(check(std::vector<pykd_tensor>{}), "at least one output", "loss, error");
  EXPECT_VALUE_ERROR(check(std::vector<pykd_tensor>{output, output}), "loss once");
  output.name = "los";
  EXPECT_VALUE_ERROR(check(std::vector<pykd_tensor>{output}), "\"los\"", "did you mean \"loss\"?");
  output.name = "grad_student_logits";
  EXPECT_VALUE_ERROR(check(std::vector<pykd_tensor>{output}), "gradients", "loss.grad.onnx");
  output.name = "loss";
  output.dtype = PYKD_FLOAT64;
  EXPECT_TYPE_ERROR(check(std::vector<pykd_tensor>{output}), "loss of dtype float32", "float64");
  set_raw(output.dtype, -1);
  EXPECT_TYPE_ERROR(check(std::vector<pykd_tensor>{output}), "unknown dtype (-1)");
  output.dtype = PYKD_FLOAT32;
  output.data = nullptr;
  EXPECT_VALUE_ERROR(check(std::vector<pykd_tensor>{output}), "loss", "NULL");
  output.data = &loss;
  output.rank = 1;
  output.shape = shape;
  EXPECT_VALUE_ERROR(check(std::vector<pykd_tensor>{output}), "loss with no axes", "rank 1");
}

TEST_F(Call, ChecksOutputShapes) {
  float per_sample[3];
  std::int64_t wrong[1] = {3};
  output = {"loss_per_sample", per_sample, PYKD_FLOAT32, 1, wrong, nullptr, PYKD_CPU, 0};
  EXPECT_VALUE_ERROR(check(std::vector<pykd_tensor>{output}), "loss_per_sample with shape [2]", "[3]");
}

TEST_F(Call, TakesScalarsOnTheCpuWhateverTheDevice) {
  device = {PYKD_CUDA, 0};
  for (pykd_tensor& input : inputs) input.device = PYKD_CUDA;
  check(std::vector<pykd_tensor>{output});
  float per_sample[2];
  output = {"loss_per_sample", per_sample, PYKD_FLOAT32, 1, shape, nullptr, PYKD_CPU, 0};
  EXPECT_TYPE_ERROR(check(std::vector<pykd_tensor>{output}), "loss_per_sample on cuda:0", "cpu");
}

TEST_F(Call, RefusesMemoryThatIsUsedTwice) {
  output.data = student + 5;
  EXPECT_VALUE_ERROR(check(std::vector<pykd_tensor>{output}), "loss in memory of its own", "student_logits");
  output.data = &loss;
  pykd_tensor second = output;
  second.name = "error";
  EXPECT_VALUE_ERROR(check(std::vector<pykd_tensor>{output, second}), "error", "loss");
}

TEST(OutputDtype, FollowsTheInputsInTorchScriptFiles) {
  OutputSpec output;
  output.dtypes = kAnyFloat;
  EXPECT_EQ(output_dtype(output, PYKD_FLOAT16), PYKD_FLOAT32);
  EXPECT_EQ(output_dtype(output, PYKD_FLOAT64), PYKD_FLOAT64);
  output.gradient_of = 0;
  EXPECT_EQ(output_dtype(output, PYKD_FLOAT16), PYKD_FLOAT16);
  output.dtypes = dtype_bit(PYKD_FLOAT32);
  EXPECT_EQ(output_dtype(output, PYKD_FLOAT16), PYKD_FLOAT32);
}

}  // namespace
}  // namespace pykd::internal
