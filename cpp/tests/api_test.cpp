// The library as its users see it, through pykd.hpp and pykd.h, with ONNX Runtime.
#include "pykd/pykd.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <optional>
#include <regex>
#include <sstream>

#include "pykd/kernels.h"
#include "tests/support.h"
#include "tests/tiny_model.h"

extern "C" int run_c_example(const char* path, float* value, float gradient[6]);
extern "C" double run_c_score_example(const char* path);
extern "C" int run_c_kernel_example(float value[2], float gradient[6]);

namespace pykd::tests {
namespace {

#define EXPECT_ERROR(expected_status, statement, ...) EXPECT_FAILS_WITH(Error, expected_status, statement, __VA_ARGS__)

class Api : public testing::Test {
 protected:
  void SetUp() override { write_tiny_folder(folder); }

  Loss load(const LoadOptions& options = {}) { return Loss::load(folder.path(), options); }
  Tensors inputs() const {
    return {{"student_logits", view(student, {2, 3})}, {"teacher_logits", view(teacher, {2, 3})}};
  }

  TemporaryFolder folder;
  std::vector<float> student = {1, 2, 3, 3, 2, 1}, teacher = {0, 2, 4, 4, 2, 0};
};

TEST_F(Api, RunsTheExampleOfTheHeader) {
  auto loss = pykd::Loss::load(folder.path());
  pykd::Result result = loss.value_and_gradient(
      {{"student_logits", pykd::view(student, {2, 3})}, {"teacher_logits", pykd::view(teacher, {2, 3})}},
      {{"weight", 4.0}});
  double value = result.value("loss");
  const float* gradient = result.data<float>("grad_student_logits");

  // The differences are 1, 0, -1, -1, 0, 1: their mean square is 4/6.
  EXPECT_NEAR(value, 4.0 * 4.0 / 6.0, 1e-6);
  EXPECT_NEAR(result.value("error"), 4.0 / 6.0, 1e-6);
  const double expected[] = {1, 0, -1, -1, 0, 1};
  for (int i = 0; i < 6; ++i) EXPECT_NEAR(gradient[i], 4.0 * 2.0 / 6.0 * expected[i], 1e-6);
  EXPECT_EQ(result.shape("grad_student_logits"), (std::vector<std::int64_t>{2, 3}));
  EXPECT_NEAR(result.data<float>("loss_per_sample")[1], 4.0 * 2.0 / 3.0, 1e-6);
}

TEST_F(Api, RunsTheExampleOfTheCHeader) {
  float value = 0, gradient[6] = {};
  EXPECT_EQ(run_c_example(folder.path().c_str(), &value, gradient), 0) << pykd_last_error();
  EXPECT_NEAR(value, 1.5 * 4.0 / 6.0, 1e-6);
  EXPECT_NEAR(gradient[2], -1.5 * 2.0 / 6.0, 1e-6);
}

TEST_F(Api, RunsTheExampleOfScoresInTheCHeader) {
  EXPECT_EQ(run_c_score_example(folder.path("loss.onnx").c_str()), 3.75);  // (3 + 12 + 0 + 0) / 4
}

TEST_F(Api, RunsTheExampleOfTheKernelsHeader) {
  float value[2] = {}, gradient[6] = {};
  EXPECT_EQ(run_c_kernel_example(value, gradient), 0) << pykd_last_error();
  // Softmax of the student and the teacher at temperature 2, in float64.
  double q[3], p[3], sum_q = 0, sum_p = 0, expected = 0;
  for (int i = 0; i < 3; ++i) sum_q += q[i] = std::exp(student[i] / 2.0);
  for (int i = 0; i < 3; ++i) sum_p += p[i] = std::exp(teacher[i] / 2.0);
  for (int i = 0; i < 3; ++i) expected -= p[i] / sum_p * std::log(q[i] / sum_q);
  EXPECT_NEAR(value[0], expected, 1e-6);
  EXPECT_NEAR(value[1], expected, 1e-6);
  for (int i = 0; i < 3; ++i) {
    EXPECT_NEAR(gradient[i], 0.5 * (q[i] / sum_q - p[i] / sum_p) / 2.0, 1e-6);
    EXPECT_NEAR(gradient[3 + i], gradient[2 - i], 1e-6);
  }
}

TEST_F(Api, DescribesItself) {
  const Loss loss = load();
  EXPECT_EQ(loss.engine(), "onnxruntime");
  EXPECT_TRUE(std::regex_match(loss.engine_version(), std::regex("1\\.[0-9]+\\.[0-9].*")));
  EXPECT_EQ(loss.device(), "cpu");
  EXPECT_EQ(json::parse(loss.metadata())["name"], "tiny");
  ASSERT_EQ(loss.inputs().size(), 2u);
  EXPECT_STREQ(loss.inputs()[0].name, "student_logits");
  EXPECT_STREQ(loss.inputs()[0].axes[1], "classes");
  EXPECT_EQ(loss.inputs()[0].dtypes, 1u << PYKD_FLOAT32);
  EXPECT_EQ(loss.inputs()[0].has_gradient, 1);
  EXPECT_EQ(loss.inputs()[1].has_gradient, 0);
  std::vector<std::string> outputs;
  for (const pykd_tensor_info& info : loss.outputs()) outputs.push_back(info.name);
  EXPECT_EQ(outputs, (std::vector<std::string>{"loss", "error", "loss_per_sample", "grad_student_logits"}));
  ASSERT_EQ(loss.parameters().size(), 2u);
  EXPECT_EQ(loss.parameters()[0].default_value, 1.5);
  EXPECT_EQ(loss.parameters()[0].minimum, 0.0);
  EXPECT_EQ(loss.parameters()[1].minimum, -std::numeric_limits<double>::infinity());
  EXPECT_EQ(loss.parameters()[0].maximum, std::numeric_limits<double>::infinity());
  EXPECT_EQ(loss.inputs()[0].least_lengths[1], 1);
  pykd_tensor_info info = PYKD_TENSOR_INFO_INIT;
  EXPECT_EQ(pykd_input_info(loss.c(), 2, &info), PYKD_INVALID_VALUE);
  EXPECT_EQ(pykd_output_info(nullptr, 0, &info), PYKD_INVALID_VALUE);
  EXPECT_EQ(pykd_output_info(loss.c(), 0, nullptr), PYKD_INVALID_VALUE);
}

TEST_F(Api, LoadsSingleFilesAndBytes) {
  const Loss value = Loss::load(folder.path("loss.onnx"));
  EXPECT_NEAR(value.value(inputs()).value("loss"), 1.0, 1e-6);
  EXPECT_ERROR(PYKD_INVALID_VALUE, value.value_and_gradient(inputs()), "value alone", "loss.grad.onnx");
  const Loss gradient = Loss::load(folder.path("loss.grad.onnx"));
  EXPECT_TRUE(gradient.value_and_gradient(inputs()).has("grad_student_logits"));
  EXPECT_FALSE(gradient.value(inputs()).has("grad_student_logits"));
  const std::string bytes = sealed(tiny_model(true).bytes());
  EXPECT_NEAR(Loss::load_bytes(bytes.data(), bytes.size()).value(inputs()).value("loss"), 1.0, 1e-6);
}

TEST_F(Api, LoadsAFolderThatHoldsTheGradientAlone) {
  std::filesystem::remove(folder.path("loss.onnx"));
  const Loss loss = load();  // the manifest lists loss.onnx still
  EXPECT_TRUE(loss.value_and_gradient(inputs()).has("grad_student_logits"));
  EXPECT_NEAR(loss.value(inputs()).value("loss"), 1.0, 1e-6);
}

TEST_F(Api, LoadsAFolderThatHoldsTheValueAlone) {
  std::filesystem::remove(folder.path("loss.grad.onnx"));
  const Loss loss = load();
  EXPECT_NEAR(loss.value(inputs()).value("loss"), 1.0, 1e-6);
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.value_and_gradient(inputs()), "value alone", "loss.grad.onnx");
}

TEST_F(Api, RefusesAFolderOfTwoExports) {
  // Each of the files is whole, and the manifest is the one of both.
  auto refuses = [&](const char* named, auto change) {
    TinyModel value = tiny_model(false), gradient = tiny_model(true);
    change(value, gradient);
    folder.write("loss.onnx", sealed(value.bytes()));
    folder.write("loss.grad.onnx", sealed(gradient.bytes()));
    folder.write_manifest();
    EXPECT_ERROR(PYKD_BAD_ARTEFACT, load(), "of one export", named);
  };
  auto drop_vector = [](TinyModel& model) {
    model.metadata["outputs"].erase(2);
    model.outputs.erase(model.outputs.begin() + 2);
  };
  refuses("outputs", [&](TinyModel& value, TinyModel&) { drop_vector(value); });
  refuses("outputs", [&](TinyModel&, TinyModel& gradient) { drop_vector(gradient); });
  refuses("name", [](TinyModel& value, TinyModel&) { value.metadata["name"] = "another"; });
  refuses("recipe", [](TinyModel&, TinyModel& gradient) { gradient.metadata["recipe"] = {{"loss", "another"}}; });
  refuses("parameters", [](TinyModel& value, TinyModel&) {
    value.metadata["parameters"][0]["default"] = 2.5;
    value.initializers[0] = scalar("weight", 2.5f);
  });
  refuses("parameters", [](TinyModel&, TinyModel& gradient) { gradient.metadata["parameters"][0].erase("minimum"); });
  refuses("inputs", [](TinyModel& value, TinyModel&) { value.metadata["inputs"][0]["gradient"] = false; });
  refuses("terms", [](TinyModel& value, TinyModel&) { value.metadata["terms"].push_back("soft"); });
  refuses("versions", [](TinyModel&, TinyModel& gradient) { gradient.metadata["versions"] = {{"pykd", "9"}}; });
  refuses("opset", [](TinyModel&, TinyModel& gradient) { gradient.metadata["opset"] = 19; });
}

TEST_F(Api, RefusesAFileThatIsNotTheManifests) {
  TinyModel other = tiny_model(false);
  other.metadata["name"] = "other";
  folder.write("loss.onnx", sealed(other.bytes()));
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, load(), "loss.onnx to be the file of manifest.json", "do not belong together");
  other.metadata["name"] = "ymit";  // as long as the right one
  folder.write("loss.onnx", sealed(other.bytes()));
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, load(), "loss.onnx to be the file of manifest.json", "SHA-256");
  write_tiny_folder(folder);
  folder.write("loss.pt", "of another export");  // nobody reads it here
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, load(), "loss.pt", "not in it");
  folder.write_manifest();
  EXPECT_EQ(load().engine(), "onnxruntime");
  folder.write("loss.pt", "of one export more");
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, load(), "loss.pt", "17 bytes", "18 bytes");
  LoadOptions unchecked;
  unchecked.skip_integrity_check = true;
  EXPECT_EQ(load(unchecked).engine(), "onnxruntime");
}

TEST_F(Api, RunsEveryFormOfParameters) {
  for (const char* form : {"fixed", "inputs"}) {
    for (bool gradient : {false, true}) {
      TinyModel model = tiny_model(gradient);
      model.metadata["format_version"] = 2;
      model.metadata["parameters_as"] = form;
      auto erase = [&](std::vector<std::string>& list, const std::string& name) {
        auto holds = [&](const std::string& item) { return item.find(name) != std::string::npos; };
        list.erase(std::remove_if(list.begin(), list.end(), holds), list.end());
      };
      for (const char* name : {"weight", "grad_scale"}) {
        erase(std::string(form) == "fixed" ? model.inputs : model.initializers, name);
      }
      folder.write(gradient ? "loss.grad.onnx" : "loss.onnx", sealed(model.bytes()));
    }
    folder.write_manifest();
    const Loss loss = load();
    EXPECT_NEAR(loss.value(inputs()).value("loss"), 1.0, 1e-6);
    EXPECT_NEAR(loss.value_and_gradient(inputs()).value("loss"), 1.0, 1e-6);
    if (std::string(form) == "fixed") {
      EXPECT_TRUE(loss.parameters().empty());
      EXPECT_ERROR(PYKD_INVALID_VALUE, loss.value(inputs(), {{"weight", 3.0}}), "weight, which is fixed at 1.5",
                   "got 3");
    } else {
      EXPECT_EQ(loss.parameters().size(), 2u);
      EXPECT_NEAR(loss.value(inputs(), {{"weight", 3.0}}).value("loss"), 2.0, 1e-6);
      EXPECT_ERROR(PYKD_INVALID_VALUE, loss.value(inputs(), {{"weight", -3.0}}), "weight");
    }
  }
  TinyModel model = tiny_model(false);
  model.metadata["parameters_as"] = "inputs";  // but the graph has a default
  folder.write("loss.onnx", sealed(model.bytes()));
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, Loss::load(folder.path("loss.onnx")), "no default for the input weight");
}

TEST_F(Api, ScoresSamplesAndNothingElse) {
  TemporaryFolder scores;
  scores.write("score.onnx", sealed(tiny_score().bytes()));
  scores.write_manifest();
  const Loss loss = Loss::load(scores.path());
  const Result result = loss.value(inputs(), {{"weight", 3.0}});
  EXPECT_EQ(result.names(), (std::vector<std::string>{"loss_per_sample"}));
  EXPECT_NEAR(result.data<float>("loss_per_sample")[0], 2.0, 1e-6);
  EXPECT_EQ(loss.inputs()[0].has_gradient, 0);
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.value_and_gradient(inputs()), "scores of samples", "call value()");
  float value = 0;
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.run(inputs(), {{"loss", Tensor(&value, PYKD_FLOAT32, {})}}),
               "an artefact with \"loss\"", "\"loss_per_sample\"");
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.run(inputs(), {{"grad_student_logits", Tensor(&value, PYKD_FLOAT32, {})}}),
               "an artefact with \"grad_student_logits\"", "kind \"score\"");
  EXPECT_NEAR(Loss::load(scores.path("score.onnx")).value(inputs()).data<float>("loss_per_sample")[1], 1.0, 1e-6);

  scores.write("score.onnx", sealed(tiny_model(false).bytes()));
  scores.write_manifest();
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, Loss::load(scores.path()), "score.onnx", "another kind");
  folder.write("score.onnx", sealed(tiny_score().bytes()));
  folder.write_manifest();
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, load(), "score.onnx alone", "both");
}

// Rows with a label each; two classes.
class Scores : public testing::Test {
 protected:
  void SetUp() override {
    TinyModel model = tiny_score();
    json described = tensor_json("labels", {"batch"}, "int64");
    described["gradient"] = false;
    described["index_of"] = "classes";
    described["ignore_index"] = -100;
    model.metadata["inputs"].push_back(described);
    model.inputs.insert(model.inputs.begin() + 2, value_info("labels", kInt64, {"batch"}));
    folder.write("score.onnx", sealed(model.bytes()));
    folder.write_manifest();
    loss.emplace(Loss::load(folder.path()));
  }

  Tensors rows(std::size_t first, std::size_t count) const {
    const std::vector<std::int64_t> matrix = {static_cast<std::int64_t>(count), 2};
    return {{"student_logits", view(student.data() + 2 * first, matrix)},
            {"teacher_logits", view(teacher.data() + 2 * first, matrix)},
            {"labels", view(labels.data() + first, {static_cast<std::int64_t>(count)})}};
  }

  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  TemporaryFolder folder;
  std::optional<Loss> loss;
  //                               ok    nan      +inf          -inf alone              one -inf     label  ignored both
  //                               ok
  const std::vector<float> student = {1, 2, kNan, 0, kInfinity, 0,    -kInfinity, -kInfinity, -kInfinity,
                                      1, 1, 1,    5, 5,         kNan, 1,          3,          4};
  const std::vector<float> teacher = {1, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0};
  const std::vector<std::int64_t> labels = {0, 1, 0, 1, 0, 2, -100, -1, 1};
  const std::vector<std::uint8_t> expected = {PYKD_ROW_OK,
                                              PYKD_ROW_NAN,
                                              PYKD_ROW_INFINITE,
                                              PYKD_ROW_INFINITE,
                                              PYKD_ROW_INFINITE_SCORE,
                                              PYKD_ROW_LABEL_OUT_OF_RANGE,
                                              PYKD_ROW_IGNORED,
                                              PYKD_ROW_LABEL_OUT_OF_RANGE,
                                              PYKD_ROW_OK};
};

TEST_F(Scores, KeepBadRowsOutAndCountThem) {
  for (const std::size_t size : {1, 2, 4, 9}) {  // the numbers do not depend on the blocks
    Scorer scorer(*loss);
    std::vector<std::uint8_t> status;
    std::vector<float> scores;
    for (std::size_t first = 0; first < 9; first += size) {
      const std::size_t count = std::min(size, 9 - first);
      const Result block = scorer.score(rows(first, count));
      const float* data = block.data<float>("loss_per_sample");
      scores.insert(scores.end(), data, data + count);
      status.insert(status.end(), scorer.status().begin(), scorer.status().end());
    }
    EXPECT_EQ(status, expected);
    EXPECT_EQ(scores[0], 3.0f);  // 1.5 · (0² + 2²) / 2
    EXPECT_EQ(scores[8], 12.0f);
    for (std::size_t i = 1; i < 8; ++i) EXPECT_TRUE(std::isnan(scores[i])) << i;
    const pykd_score_summary& sum = scorer.summary();
    EXPECT_EQ(sum.rows, 9);
    EXPECT_EQ(sum.mean, 7.5);
    EXPECT_EQ(sum.total + sum.lost, 15.0);
    const std::vector<std::int64_t> counts(sum.by_status, sum.by_status + 8);
    EXPECT_EQ(counts, (std::vector<std::int64_t>{2, 1, 2, 1, 2, 1, 0, 0}));
  }
}

TEST(ScoresOfAHinge, AreNotThoseOfInfiniteRows) {
  TinyModel model = tiny_score();
  model.nodes[0] = node("Sub", {"lowered", "teacher_logits"}, "d");
  model.nodes.insert(model.nodes.begin(), node("Min", {"student_logits", "weight"}, "lowered"));  // finite of +infinity
  TemporaryFolder folder;
  folder.write("score.onnx", sealed(model.bytes()));
  folder.write_manifest();
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> student = {0, 2, infinity, 0, 1, 1}, teacher = {0, 0, 0, 0, 0, 0};
  const Loss loss = Loss::load(folder.path());
  Scorer scorer(loss);
  const Result result =
      scorer.score({{"student_logits", view(student, {3, 2})}, {"teacher_logits", view(teacher, {3, 2})}});
  const float* scores = result.data<float>("loss_per_sample");
  EXPECT_EQ(scorer.status(), (std::vector<std::uint8_t>{PYKD_ROW_OK, PYKD_ROW_INFINITE, PYKD_ROW_OK}));
  EXPECT_TRUE(std::isfinite(scores[0]) && std::isnan(scores[1]) && std::isfinite(scores[2]));
}

TEST_F(Scores, LeaveTheLabelsOfTheCallerAlone) {
  const std::vector<std::int64_t> before = labels;
  Scorer(*loss).score(rows(0, 9));
  EXPECT_EQ(labels, before);
}

TEST_F(Scores, TakeParametersAndSumWithoutLoss) {
  Scorer scorer(*loss, {{"weight", 1e16}});
  scorer.score(rows(0, 1));
  EXPECT_EQ(scorer.summary().mean, static_cast<double>(2e16f));
  // 1 beside 2e16 is lost in a plain sum.
  pykd_score_summary sum = scorer.summary();
  const Tensors one = rows(0, 1);
  std::vector<pykd_tensor> in;
  for (const auto& entry : one) in.push_back(entry.second.c(entry.first.c_str()));
  float score = 0;
  const std::int64_t length = 1;
  const pykd_tensor out = {"loss_per_sample", &score, PYKD_FLOAT32, 1, &length, nullptr, PYKD_CPU, 0, nullptr};
  const pykd_parameter half = {"weight", 0.5};
  ASSERT_EQ(pykd_score(loss->c(), in.data(), in.size(), &half, 1, &out, 1, nullptr, &sum), PYKD_OK);
  EXPECT_EQ(score, 1.0f);
  EXPECT_EQ(sum.lost, 1.0);
  EXPECT_EQ(sum.by_status[PYKD_ROW_OK], 2);
  ASSERT_EQ(pykd_score(loss->c(), in.data(), in.size(), nullptr, 0, &out, 1, nullptr, nullptr), PYKD_OK);
}

TEST_F(Scores, ReportWrongCallsAndAddNothing) {
  Scorer scorer(*loss);
  scorer.score(rows(0, 9));
  EXPECT_ERROR(PYKD_INVALID_VALUE, scorer.score({}), "the inputs student_logits");
  Tensors uneven = rows(0, 2);
  uneven["teacher_logits"] = view(teacher.data(), {3, 2});
  EXPECT_ERROR(PYKD_INVALID_VALUE, scorer.score(uneven), "\"batch\"");
  uneven["teacher_logits"] = view(teacher.data(), {0, 2});
  EXPECT_ERROR(PYKD_INVALID_VALUE, scorer.score(uneven), "teacher_logits");
  EXPECT_ERROR(PYKD_INVALID_VALUE, Scorer(*loss, {{"wait", 1}}).score(rows(0, 1)), "weight");
  EXPECT_EQ(scorer.summary().rows, 9);
  EXPECT_EQ(scorer.status().size(), 9u);

  TemporaryFolder other;
  write_tiny_folder(other);
  const Loss values = Loss::load(other.path());
  const std::vector<float> logits = {1, 2};
  const Tensors one = {{"student_logits", view(logits, {1, 2})}, {"teacher_logits", view(logits, {1, 2})}};
  EXPECT_EQ(Scorer(values).score(one).names(), (std::vector<std::string>{"loss_per_sample"}));
  float value = 0;
  std::int64_t length = 1;
  std::vector<pykd_tensor> in;
  for (const auto& entry : one) in.push_back(entry.second.c(entry.first.c_str()));
  pykd_tensor out = {"loss", &value, PYKD_FLOAT32, 0, nullptr, nullptr, PYKD_CPU, 0, nullptr};
  auto score = [&](const pykd_tensor* outputs, std::size_t count, pykd_score_summary* sum) {
    internal::check(pykd_score(values.c(), in.data(), in.size(), nullptr, 0, outputs, count, nullptr, sum));
  };
  EXPECT_ERROR(PYKD_INVALID_VALUE, score(&out, 1, nullptr), "a value per row", "\"loss\"");
  EXPECT_ERROR(PYKD_INVALID_VALUE, score(nullptr, 0, nullptr), "\"loss_per_sample\" among the outputs");
  out.name = nullptr;
  EXPECT_ERROR(PYKD_INVALID_VALUE, score(&out, 1, nullptr), "outputs");
  out = {"loss_per_sample", &value, PYKD_FLOAT32, 1, &length, nullptr, PYKD_CPU, 0, nullptr};
  pykd_score_summary sum = PYKD_SCORE_SUMMARY_INIT;
  score(&out, 1, &sum);
  EXPECT_EQ(sum.rows, 1);
  sum.struct_size = 8;
  EXPECT_ERROR(PYKD_INVALID_VALUE, score(&out, 1, &sum), "PYKD_SCORE_SUMMARY_INIT");
  EXPECT_EQ(pykd_score(nullptr, in.data(), 2, nullptr, 0, &out, 1, nullptr, nullptr), PYKD_INVALID_VALUE);

  TinyModel model = tiny_model(false);
  model.outputs.pop_back();
  model.metadata["outputs"].erase(2);
  other.write("loss.onnx", sealed(model.bytes()));
  EXPECT_ERROR(PYKD_INVALID_VALUE, Scorer(Loss::load(other.path("loss.onnx"))).score(one), "without a value per sample",
               "kind \"score\"");
}

TEST_F(Scores, HaveNames) {
  EXPECT_STREQ(pykd_row_status_name(PYKD_ROW_OK), "ok");
  EXPECT_STREQ(pykd_row_status_name(PYKD_ROW_IGNORED), "ignored");
  EXPECT_STREQ(pykd_row_status_name(6), "");
  EXPECT_STREQ(pykd_row_status_name(-1), "");
}

TEST_F(Api, ComparesTheExportInEveryFile) {
  TinyModel value = tiny_model(false), gradient = tiny_model(true);
  value.metadata["export_id"] = gradient.metadata["export_id"] = "one";
  folder.write("loss.onnx", sealed(value.bytes()));
  folder.write("loss.grad.onnx", sealed(gradient.bytes()));
  folder.write_manifest({{"export_id", "one"}});
  EXPECT_EQ(load().engine(), "onnxruntime");
  folder.write_manifest({{"export_id", "another"}});
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, load(), "\"another\"", "\"one\"");
  folder.write_manifest();
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, load(), "loss.onnx", "\"one\"");
}

TEST_F(Api, WritesIntoTheCallersMemory) {
  const Loss loss = load();
  std::vector<float> gradient(8, -7.0f);
  float value = 0;
  loss.run(inputs(), {{"loss", view(&value, {})}, {"grad_student_logits", view(gradient.data() + 1, {2, 3})}},
           {{"grad_scale", 10.0}});
  EXPECT_NEAR(value, 1.0, 1e-6);
  EXPECT_NEAR(gradient[1], 5.0, 1e-5);
  EXPECT_EQ(gradient[0], -7.0f);  // nothing beside it
  EXPECT_EQ(gradient[7], -7.0f);
}

TEST_F(Api, DependsOnNoLocale) {
  const CommaLocale comma;
  std::ostringstream shown;
  shown << 1234.5;
  ASSERT_EQ(shown.str(), "1.234,5");
  const Loss loss = load();
  EXPECT_EQ(loss.parameters()[0].default_value, 1.5);
  EXPECT_NEAR(loss.value(inputs()).value("loss"), 1.0, 1e-6);
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.value(inputs(), {{"weight", 1.5e-300}}), "got 1.5e-300;");
  std::vector<float> many(1234 * 3);
  const Tensors wrong = {{"student_logits", view(many, {1234, 3})}, {"teacher_logits", view(many, {3, 1234})}};
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.value(wrong), "1234");
}

TEST_F(Api, LeavesTheInputsAsTheyWere) {
  const std::vector<float> before = student;
  load().value_and_gradient(inputs());
  EXPECT_EQ(student, before);
}

TEST_F(Api, TakesOtherSizesWithOneLoss) {
  const Loss loss = load();
  for (std::int64_t batch : {1, 7, 2, 33}) {
    std::vector<float> a(batch * 5, 1.0f), b(batch * 5, 3.0f);
    const Result result =
        loss.value_and_gradient({{"student_logits", view(a, {batch, 5})}, {"teacher_logits", view(b, {batch, 5})}});
    EXPECT_NEAR(result.value("loss"), 6.0, 1e-5);
    EXPECT_NEAR(result.data<float>("grad_student_logits")[0], -6.0 / (5.0 * batch), 1e-5);
  }
}

TEST_F(Api, GivesNanForNan) {
  student[4] = std::nanf("");
  EXPECT_TRUE(std::isnan(load().value(inputs()).value("loss")));
}

TEST_F(Api, ReportsWrongCallsWithoutWriting) {
  const Loss loss = load();
  float value = 42.0f;
  alignas(8) char odd[64] = {};
  const Tensors out = {{"loss", view(&value, {})}};
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.run({{"student_logits", view(student, {2, 3})}}, out), "teacher_logits");
  EXPECT_ERROR(PYKD_INVALID_VALUE,
               loss.run({{"student_logits", view(student, {2, 3})}, {"teacher_logits", view(teacher, {3, 2})}}, out),
               "teacher_logits of length 2 along \"batch\"");
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.run(inputs(), out, {{"temperature", 1}}), "temperature");
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.run(inputs(), {}), "at least one output");
  const std::vector<double> wide(6);
  EXPECT_ERROR(PYKD_INVALID_TYPE,
               loss.run({{"student_logits", view(wide, {2, 3})}, {"teacher_logits", view(teacher, {2, 3})}}, out),
               "student_logits of dtype float32", "float64");
  EXPECT_ERROR(
      PYKD_INVALID_VALUE,
      loss.run({{"student_logits", Tensor(odd + 1, PYKD_FLOAT32, {2, 3})}, {"teacher_logits", view(teacher, {2, 3})}},
               out),
      "student_logits at an address that 4 divides", "1 beyond");
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.run(inputs(), {{"loss", Tensor(odd + 2, PYKD_FLOAT32, {})}}),
               "loss at an address that 4 divides");
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.run(inputs(), out, {{std::string("a\0b", 3), 1}}), "without NUL");
  const Tensor one_stride(student.data(), PYKD_FLOAT32, {2, 3}, PYKD_CPU, 0, {3});
  EXPECT_ERROR(PYKD_INVALID_VALUE,
               loss.run({{"student_logits", one_stride}, {"teacher_logits", view(teacher, {2, 3})}}, out),
               "2 strides for student_logits", "got 1");
  EXPECT_ERROR(PYKD_INVALID_VALUE, Tensor(odd, PYKD_FLOAT32, {2}, PYKD_CPU, 0, {1, 1}).c("x"), "1 strides", "got 2");
  EXPECT_EQ(value, 42.0f);
}

TEST_F(Api, TellsOutputShapes) {
  const Loss loss = load();
  const Tensors tensors = inputs();
  std::vector<pykd_tensor> in;
  for (const auto& entry : tensors) in.push_back(entry.second.c(entry.first.c_str()));
  std::int64_t shape[8] = {};
  std::int32_t rank = -1;
  pykd_dtype dtype = PYKD_INT64;
  ASSERT_EQ(pykd_output_shape(loss.c(), in.data(), in.size(), "grad_student_logits", shape, &rank, &dtype), PYKD_OK);
  EXPECT_EQ(rank, 2);
  EXPECT_EQ(shape[1], 3);
  EXPECT_EQ(dtype, PYKD_FLOAT32);
  EXPECT_EQ(pykd_output_shape(loss.c(), in.data(), 1, "loss", shape, &rank, &dtype), PYKD_INVALID_VALUE);
  EXPECT_EQ(pykd_output_shape(loss.c(), in.data(), 2, "lost", shape, &rank, &dtype), PYKD_INVALID_VALUE);
}

TEST_F(Api, ReportsWhatTheEngineReports) {
  // All rows at once do not fit into the shape of one: only ONNX Runtime can notice, and only while it runs.
  TinyModel model = tiny_model(false);
  model.nodes[0] = node("Sub", {"row", "teacher_logits"}, "d");
  const std::vector<std::string> before = {node("Shape", {"teacher_logits"}, "width", {attribute("start", 1)}),
                                           node("Reshape", {"student_logits", "width"}, "row")};
  model.nodes.insert(model.nodes.begin(), before.begin(), before.end());
  folder.write("loss.onnx", sealed(model.bytes()));
  const Loss loss = Loss::load(folder.path("loss.onnx"));
  EXPECT_ERROR(PYKD_ENGINE_FAILURE, loss.value(inputs()), "ONNX Runtime reported", "Reshape");
}

TEST_F(Api, RefusesAGraphThatOnnxRuntimeRefuses) {
  TinyModel model = tiny_model(false);
  model.nodes[0] = node("NoSuchOperator", {"student_logits", "teacher_logits"}, "d");
  folder.write("loss.onnx", sealed(model.bytes()));
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, Loss::load(folder.path("loss.onnx")), "loss.onnx", "NoSuchOperator");
}

TEST_F(Api, RefusesDamagedFiles) {
  std::string bytes = sealed(tiny_model(true).bytes());
  bytes[100] ^= 4;
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, Loss::load_bytes(bytes.data(), bytes.size()), "damaged");
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, Loss::load_bytes(bytes.data(), 50), "cut short");
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, Loss::load_bytes(bytes.data(), 0), "empty");
  EXPECT_ERROR(PYKD_NOT_FOUND, Loss::load("/nowhere"), "/nowhere");
  folder.write("loss.onnx", sealed(tiny_model(true).bytes()));
  folder.write_manifest();
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, load(), "kind of", "loss.onnx");
}

TEST_F(Api, SaysWhatToDoWithAMergedScorer) {
  TinyModel model = tiny_model(false);
  model.metadata = json();
  pbf_writer(model.model_extra).add_message(14, property("pykd.scorer", "{}"));
  folder.write("scorer.onnx", model.bytes());
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, Loss::load(folder.path("scorer.onnx")), "scorer.onnx", "pykd merge",
               "set trust_merged");
}

TEST_F(Api, SkipsTheIntegrityCheckOnRequestAlone) {
  const std::string bytes = tiny_model(true).bytes();
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, Loss::load_bytes(bytes.data(), bytes.size()), "integrity check switched off");
  LoadOptions options;
  options.skip_integrity_check = true;
  EXPECT_NEAR(Loss::load_bytes(bytes.data(), bytes.size(), options).value(inputs()).value("loss"), 1.0, 1e-6);
}

TEST_F(Api, RefusesWrongOptions) {
  LoadOptions options;
  options.engine = "onnx";
  EXPECT_ERROR(PYKD_INVALID_VALUE, load(options), "\"onnx\"", "onnxruntime");
  options = {};
  options.engine = "torchscript";
  EXPECT_ERROR(PYKD_NOT_FOUND, load(options), "\"torchscript\"", "ONNX alone");
  for (const char* device : {"gpu", "cuda:", "cuda:x", "cuda:99999", "CPU"}) {
    options = {};
    options.device = device;
    EXPECT_ERROR(PYKD_INVALID_VALUE, load(options), device);
  }
  options = {};
  for (int threads : {-1, 1025, 100000}) {
    options.threads = threads;
    EXPECT_ERROR(PYKD_INVALID_VALUE, load(options), "from 0 to 1024 threads");
  }
  EXPECT_ERROR(PYKD_NOT_FOUND, Loss::load(""), "the path of an artefact, got an empty one");
  EXPECT_ERROR(PYKD_INVALID_VALUE, Loss::load(std::string("a\0b", 3)), "without NUL, got \"a\"");

  pykd_loss* loss = nullptr;
  pykd_load_options c = PYKD_LOAD_OPTIONS_INIT;
  for (const std::size_t size : {std::size_t{0}, std::size_t{4}, sizeof c - 4, sizeof c + 4, SIZE_MAX - 3}) {
    c.struct_size = size;
    EXPECT_EQ(pykd_load(folder.path().c_str(), &c, &loss), PYKD_INVALID_VALUE) << size;
  }
  struct {
    pykd_load_options known;
    void* unknown;
  } newer = {PYKD_LOAD_OPTIONS_INIT, nullptr};
  newer.known.struct_size = sizeof newer;
  EXPECT_EQ(pykd_load(folder.path().c_str(), &newer.known, &loss), PYKD_OK);
  pykd_free(loss);
  loss = nullptr;
  newer.unknown = &newer;
  EXPECT_EQ(pykd_load(folder.path().c_str(), &newer.known, &loss), PYKD_INVALID_VALUE);
  EXPECT_EQ(loss, nullptr);
}

TEST_F(Api, RefusesNullPointers) {
  pykd_loss* loss = nullptr;
  EXPECT_EQ(pykd_load(nullptr, nullptr, &loss), PYKD_INVALID_VALUE);
  EXPECT_EQ(pykd_load("x", nullptr, nullptr), PYKD_INVALID_VALUE);
  EXPECT_EQ(pykd_load_bytes(nullptr, 3, nullptr, &loss), PYKD_INVALID_VALUE);
  EXPECT_EQ(pykd_run(nullptr, nullptr, 0, nullptr, 0, nullptr, 0), PYKD_INVALID_VALUE);
  EXPECT_EQ(pykd_num_inputs(nullptr), 0u);
  EXPECT_STREQ(pykd_metadata(nullptr), "");
  pykd_free(nullptr);
}

TEST_F(Api, SaysWhatIsMissingForCuda) {
  LoadOptions options;
  options.device = "cuda";
  try {
    EXPECT_EQ(load(options).device(), "cuda");  // on a machine that has it
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), PYKD_UNAVAILABLE) << error.what();
    expect_words(error.what(), {"CUDA", "onnxruntime-gpu", "cuda:0"});
  }
}

TEST_F(Api, MovesButStaysWhole) {
  Loss first = load();
  const Loss second = std::move(first);
  EXPECT_NEAR(second.value(inputs()).value("loss"), 1.0, 1e-6);
}

// ---- Kernels -----------------------------------------------------------------------------------

// The value's file, whose loss per sample is a node of pykd. The function of that node computes
// something else than a kernel of its name would: the index of the student's largest logit. So the
// numbers tell which of the two ran.
std::string file_with_node(const std::string& op) {
  TinyModel model = tiny_model(false);
  model.opsets.push_back(opset("pykd", 1));
  model.functions = {function("pykd", op,
                              {node("ArgMax", {"s"}, "largest", {attribute("axis", 1), attribute("keepdims", 0)}),
                               node("Cast", {"largest"}, "y", {attribute("to", kFloat)})},
                              "", {"s", "t", "tau"})};
  model.nodes.resize(4);
  model.nodes.push_back(node(op, {"student_logits", "teacher_logits", "weight"}, "loss_per_sample", {}, "pykd"));
  return sealed(model.bytes());
}

class ApiKernels : public Api {
 protected:
  void SetUp() override {
    Api::SetUp();
    use("soft_target_float32");
    std::int64_t shape[2] = {2, 3};
    float temperature = 1.5f;
    const pykd_tensor in[] = {{"student", student.data(), PYKD_FLOAT32, 2, shape, nullptr, PYKD_CPU, 0},
                              {"teacher", teacher.data(), PYKD_FLOAT32, 2, shape, nullptr, PYKD_CPU, 0},
                              {"temperature", &temperature, PYKD_FLOAT32, 0, nullptr, nullptr, PYKD_CPU, 0}};
    const pykd_tensor out[] = {{"soft", kernel, PYKD_FLOAT32, 1, shape, nullptr, PYKD_CPU, 0}};
    ASSERT_EQ(pykd_kernel_run("soft_target", in, 3, nullptr, 0, out, 1, nullptr), PYKD_OK) << pykd_last_error();
    ASSERT_NE(kernel[0], body[0]);
  }

  void use(const std::string& op) { folder.write("loss.onnx", file_with_node(op)); }

  Loss load(const char* kernels) {
    LoadOptions options;
    options.kernels = kernels;
    return Loss::load(folder.path("loss.onnx"), options);
  }

  // Both numbers of each sample.
  void expect_ran(const Loss& loss, const float (&expected)[2]) {
    const Result result = loss.value(inputs());
    for (int i = 0; i < 2; ++i) EXPECT_FLOAT_EQ(result.data<float>("loss_per_sample")[i], expected[i]);
    EXPECT_NEAR(result.value("loss"), 1.0, 1e-6);
  }

  const float body[2] = {2, 0};
  float kernel[2] = {};
};

TEST_F(ApiKernels, RunWhereTheFileHasTheirNode) {
  for (const char* kernels : {"", "auto", "on"}) {
    const Loss loss = load(kernels);
    EXPECT_EQ(loss.kernels_in_use(), "soft_target_float32") << kernels;
    expect_ran(loss, kernel);
  }
  EXPECT_STREQ(pykd_kernels_in_use(nullptr), "");
}

TEST_F(ApiKernels, LeaveTheWorkToTheBodyWhenOff) {
  const Loss loss = load("off");
  EXPECT_EQ(loss.kernels_in_use(), "");
  expect_ran(loss, body);
}

TEST_F(ApiKernels, LeaveNodesThatTheyDoNotKnow) {
  use("something_else_float32");
  const Loss loss = load("auto");
  EXPECT_EQ(loss.kernels_in_use(), "");
  expect_ran(loss, body);
  EXPECT_ERROR(PYKD_UNAVAILABLE, load("on"), "a kernel for every node", "none for \"something_else_float32\" on cpu",
               "kernels \"auto\"");
}

TEST_F(ApiKernels, NeverPassOverALibraryThatIsNamed) {
  const Variable variable("PYKD_CUDA_LIBRARY", folder.path("libpykd_cuda.so").c_str());
  LoadOptions options;
  options.device = "cuda";
  options.engine = "onnxruntime";
  // "no file at ..."; in a process that has opened another one before, what that one says.
  EXPECT_ERROR(PYKD_UNAVAILABLE, Loss::load(folder.path("loss.onnx"), options), "for kernels on CUDA");
  EXPECT_EQ(load("auto").kernels_in_use(), "soft_target_float32");  // on the CPU nobody needs it
}

TEST_F(ApiKernels, AreAnErrorWhereTheyAreAskedForAndMissing) {
  folder.write("loss.onnx", sealed(tiny_model(false).bytes()));
  EXPECT_EQ(load("auto").kernels_in_use(), "");
  EXPECT_ERROR(PYKD_UNAVAILABLE, load("on"), "a node that a kernel computes", "loss.onnx", "kernels \"auto\"");
  EXPECT_ERROR(PYKD_INVALID_VALUE, load("fast"), "\"auto\", \"on\" or \"off\"", "\"fast\"");
  folder.write("loss.pt", fake_torchscript(tiny_metadata(true)));
  LoadOptions options;
  options.kernels = "on";
  EXPECT_ERROR(PYKD_UNAVAILABLE, Loss::load(folder.path("loss.pt"), options), "an ONNX file", "loss.pt");
}

TEST_F(Api, RefusesProgramsOfAnotherInterface) {
  pykd_load_options options = PYKD_LOAD_OPTIONS_INIT;
  options.abi_version = PYKD_ABI_VERSION - 1;
  pykd_loss* loss = nullptr;
  EXPECT_EQ(pykd_load(folder.path().c_str(), &options, &loss), PYKD_UNAVAILABLE);
  expect_words(pykd_last_error(), {"interface", "headers of this library"});
  options.struct_size = offsetof(pykd_load_options, abi_version);  // as the version before had it
  EXPECT_EQ(pykd_load(folder.path().c_str(), &options, &loss), PYKD_INVALID_VALUE);
}

TEST_F(Api, LeavesWhatLiesBehindAnInfoAlone) {
  struct {
    pykd_tensor_info info = PYKD_TENSOR_INFO_INIT;
    int behind = 7;
  } newer;
  newer.info.struct_size = sizeof newer;
  const Loss loss = Loss::load(folder.path());
  ASSERT_EQ(pykd_input_info(loss.c(), 0, &newer.info), PYKD_OK) << pykd_last_error();
  EXPECT_STREQ(newer.info.name, "student_logits");
  EXPECT_EQ(newer.info.struct_size, sizeof newer);
  EXPECT_EQ(newer.behind, 7);
  for (const std::size_t size : {std::size_t{0}, sizeof(pykd_tensor_info) - 1, static_cast<std::size_t>(-4)}) {
    newer.info.struct_size = size;
    EXPECT_EQ(pykd_output_info(loss.c(), 0, &newer.info), PYKD_INVALID_VALUE);
    expect_words(pykd_last_error(), {"PYKD_TENSOR_INFO_INIT"});
    pykd_parameter_info parameter = PYKD_PARAMETER_INFO_INIT;
    parameter.struct_size = std::min(size, sizeof parameter - 1);
    EXPECT_EQ(pykd_get_parameter_info(loss.c(), 0, &parameter), PYKD_INVALID_VALUE);
    expect_words(pykd_last_error(), {"PYKD_PARAMETER_INFO_INIT"});
  }
}

TEST_F(Api, FillsInTheInfosOfAnOlderHeader) {
  const Loss loss = Loss::load(folder.path());
  const std::int64_t untouched = 7;
  pykd_tensor_info info = PYKD_TENSOR_INFO_INIT;
  info.struct_size = offsetof(pykd_tensor_info, least_lengths);
  info.least_lengths = &untouched;
  ASSERT_EQ(pykd_input_info(loss.c(), 0, &info), PYKD_OK) << pykd_last_error();
  EXPECT_STREQ(info.axes[1], "classes");
  EXPECT_EQ(info.least_lengths, &untouched);
  pykd_parameter_info parameter = PYKD_PARAMETER_INFO_INIT;
  parameter.struct_size = offsetof(pykd_parameter_info, maximum);
  parameter.maximum = 7;
  ASSERT_EQ(pykd_get_parameter_info(loss.c(), 0, &parameter), PYKD_OK) << pykd_last_error();
  EXPECT_EQ(parameter.default_value, 1.5);
  EXPECT_EQ(parameter.maximum, 7);
}

TEST_F(Api, RefusesAnExtensionThatItDoesNotKnow) {
  const Loss loss = Loss::load(folder.path());
  float value = 0;
  const Tensors tensors = inputs();
  std::vector<pykd_tensor> in;
  for (const auto& entry : tensors) in.push_back(entry.second.c(entry.first.c_str()));
  pykd_tensor out = view(&value, {}).c("loss");
  in[1].extension = &loss;
  EXPECT_EQ(pykd_run(loss.c(), in.data(), 2, nullptr, 0, &out, 1), PYKD_INVALID_VALUE);
  expect_words(pykd_last_error(), {"extension of teacher_logits", "set every field"});
  in[1].extension = nullptr;
  out.extension = &loss;
  EXPECT_EQ(pykd_run(loss.c(), in.data(), 2, nullptr, 0, &out, 1), PYKD_INVALID_VALUE);
  expect_words(pykd_last_error(), {"extension of loss"});
}

TEST_F(Api, WritesNoConstMemory) {
  const Loss loss = Loss::load(folder.path());
  const float fixed = 5;
  float value = 5;
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.run(inputs(), {{"loss", view(&fixed, {})}}), "\"loss\"", "const memory");
  const std::vector<float> gradient(6);
  EXPECT_ERROR(PYKD_INVALID_VALUE,
               loss.run(inputs(), {{"loss", view(&value, {})}, {"grad_student_logits", view(gradient, {2, 3})}}),
               "grad_student_logits");
  EXPECT_EQ(value, 5) << "written before the other output was looked at";
  loss.run(inputs(), {{"loss", view(&value, {})}});
  EXPECT_NE(value, 5);
}

TEST_F(Api, SaysWhatWasMovedFrom) {
  Loss loss = Loss::load(folder.path());
  Result result = loss.value(inputs());
  const Result kept = std::move(result);
  EXPECT_ERROR(PYKD_INVALID_VALUE, result.value("loss"), "moved from");  // NOLINT(bugprone-use-after-move)
  EXPECT_NO_THROW(kept.value("loss"));
  Tensor tensor = view(student, {2, 3});
  const Tensors good = {{"student_logits", std::move(tensor)}, {"teacher_logits", view(teacher, {2, 3})}};
  Tensors bad = good;
  bad["student_logits"] = std::move(tensor);  // NOLINT(bugprone-use-after-move)
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.value(bad), "student_logits");

  const Loss moved = std::move(loss);
  EXPECT_NO_THROW(moved.value(good));
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.value(good), "moved from");  // NOLINT(bugprone-use-after-move)
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.value_and_gradient(good), "moved from");
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.run(good, {}), "moved from");
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.inputs(), "moved from");
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.outputs(), "moved from");
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.parameters(), "moved from");
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.metadata(), "moved from");
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.engine(), "moved from");
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.passed_over(), "moved from");
}

template <class Argument, class = void>
struct CanBeViewed : std::false_type {};
template <class Argument>
struct CanBeViewed<Argument, std::void_t<decltype(view(std::declval<Argument>(), std::vector<std::int64_t>{}))>>
    : std::true_type {};

TEST(Views, AreOfMemoryThatStays) {
  // NOLINTBEGIN(misc-redundant-expression): the types differ, which clang-tidy 14 does not see
  static_assert(CanBeViewed<std::vector<float>&>::value && CanBeViewed<const std::vector<double>&>::value);
  static_assert(!CanBeViewed<std::vector<float>>::value && !CanBeViewed<const std::vector<float>>::value);
  static_assert(CanBeViewed<float*>::value && CanBeViewed<const std::int64_t*>::value);
  // NOLINTEND(misc-redundant-expression)
  std::vector<float> values(2);
  const std::vector<float>& fixed = values;
  EXPECT_FALSE(view(values, {2}).read_only());
  EXPECT_FALSE(view(values.data(), {2}).read_only());
  EXPECT_TRUE(view(fixed, {2}).read_only());
  EXPECT_TRUE(view(fixed.data(), {2}).read_only());
  EXPECT_TRUE(Tensor::of_const(fixed.data(), PYKD_FLOAT32, {2}).read_only());
}

TEST(Views, CheckTheirSize) {
  const std::vector<float> values(6);
  EXPECT_ERROR(PYKD_INVALID_VALUE, view(values, {2, 4}), "8 elements", "got 6");
}

TEST(Views, ComeFromDlpack) {
  struct {
    void* data;
    struct {
      int device_type, device_id;
    } device;
    int ndim;
    struct {
      unsigned char code, bits;
      unsigned short lanes;
    } dtype;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
  } tensor;
  float values[4] = {};
  std::int64_t shape[1] = {3};
  tensor = {values, {1, 0}, 1, {2, 32, 1}, shape, nullptr, 4};
  EXPECT_EQ(from_dlpack(tensor).data(), values + 1);
  EXPECT_EQ(from_dlpack(tensor).dtype(), PYKD_FLOAT32);
  tensor.dtype.bits = 8;
  EXPECT_ERROR(PYKD_INVALID_TYPE, from_dlpack(tensor), "8 bits");
}

}  // namespace
}  // namespace pykd::tests
