// Merged scorers: every folder below PYKD_TEST_MERGED holds one that Python wrote (tests/make_merged.py), with its
// inputs and what three sessions return for them, bit for bit. There is no Python in this process.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "pykd/pykd.hpp"
#include "tests/support.h"
#include "tests/tiny_model.h"

#define EXPECT_ERROR(status, statement, ...) EXPECT_FAILS_WITH(Error, status, statement, __VA_ARGS__)

namespace pykd::tests {
namespace {

namespace fs = std::filesystem;

fs::path root() {
  const char* path = std::getenv("PYKD_TEST_MERGED");
  if (path == nullptr || !fs::is_directory(path)) {
    throw std::runtime_error("PYKD_TEST_MERGED names no folder; write one with tests/make_merged.py");
  }
  return path;
}

std::string read(const fs::path& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw std::runtime_error("cannot read " + path.string());
  return {std::istreambuf_iterator<char>(stream), {}};
}

// A tensor of calls.json.
struct Array {
  Array() = default;
  explicit Array(const json& described)
      : shape(described.at("shape").get<std::vector<std::int64_t>>()),
        bytes(described.at("bytes").get<std::vector<unsigned char>>()) {
    const std::string name = described.at("dtype");
    dtype = name == "float32" ? PYKD_FLOAT32 : name == "int64" ? PYKD_INT64 : name == "int32" ? PYKD_INT32 : PYKD_UINT8;
  }
  Tensor tensor() { return Tensor(bytes.data(), dtype, shape); }

  pykd_dtype dtype = PYKD_FLOAT32;
  std::vector<std::int64_t> shape;
  std::vector<unsigned char> bytes;
};

struct Arrays {
  explicit Arrays(const json& described) {
    for (const auto& item : described.items()) all[item.key()] = Array(item.value());
  }
  Tensors tensors() {
    Tensors views;
    for (auto& entry : all) views[entry.first] = entry.second.tensor();
    return views;
  }
  std::map<std::string, Array> all;
};

struct Case {
  explicit Case(const std::string& name)
      : folder(root() / name),
        calls(json::parse(read(folder / "calls.json"))),
        inputs(calls.at("inputs")),
        outputs(calls.at("outputs")),
        logits(calls.at("logits")) {}

  std::string path() const { return (folder / "scorer.onnx").string(); }
  fs::path weights() const {
    for (const auto& entry : fs::directory_iterator(folder)) {
      if (entry.path().extension() == ".data") return entry.path();
    }
    throw std::runtime_error("no weights in " + folder.string());
  }

  fs::path folder;
  json calls;
  Arrays inputs, outputs, logits;
};

LoadOptions trusting(const std::string& kernels = "auto") {
  LoadOptions options;
  options.trust_merged = true;
  options.kernels = kernels;
  return options;
}

std::vector<std::string> names_of(const std::vector<pykd_tensor_info>& infos) {
  std::vector<std::string> names;
  for (const pykd_tensor_info& info : infos) names.emplace_back(info.name);
  return names;
}

std::vector<std::string> axes_of(const pykd_tensor_info& info) { return {info.axes, info.axes + info.rank}; }
std::vector<std::int64_t> lengths_of(const pykd_tensor_info& info) { return {info.lengths, info.lengths + info.rank}; }

// A copy of a case's scorer in a folder of its own, with its weights.
class Copy : public TemporaryFolder {
 public:
  explicit Copy(const Case& of) {
    for (const auto& entry : fs::directory_iterator(of.folder)) {
      fs::copy(entry.path(), fs::path(TemporaryFolder::path()) / entry.path().filename());
    }
  }
  std::string scorer() const { return path("scorer.onnx"); }
};

class MergedScorers : public testing::TestWithParam<const char*> {};

TEST_P(MergedScorers, GiveTheBitsOfThreeSessions) {
  Case given(GetParam());
  const Loss portable = Loss::load(given.path(), trusting("off"));
  EXPECT_EQ(portable.kernels_in_use(), "");
  const Result values = portable.value(given.inputs.tensors());
  for (auto& [name, want] : given.outputs.all) {
    ASSERT_EQ(values.shape(name), want.shape) << name;
    EXPECT_EQ(std::memcmp(values.raw(name), want.bytes.data(), want.bytes.size()), 0) << name;
  }
  // With kernels: what the loss makes of the models' outputs in this library.
  const Loss merged = Loss::load(given.path(), trusting("on"));
  const Loss loss = Loss::load((root() / given.calls.at("loss").get<std::string>()).string());
  EXPECT_EQ(merged.kernels_in_use(), loss.kernels_in_use());
  EXPECT_NE(merged.kernels_in_use(), "");
  Tensors logits = given.logits.tensors();
  if (given.inputs.all.count("labels") != 0) logits["labels"] = given.inputs.all["labels"].tensor();
  Scorer apart(loss), together(merged);
  const Result want = apart.score(logits), got = together.score(given.inputs.tensors());
  EXPECT_EQ(got.names(), want.names());
  for (const std::string& name : want.names()) {
    EXPECT_EQ(std::memcmp(got.raw(name), want.raw(name), want.shape(name)[0] * sizeof(float)), 0) << name;
  }
  EXPECT_EQ(together.status(), apart.status());
  EXPECT_EQ(together.summary().mean, apart.summary().mean);
  EXPECT_NE(together.summary().mean, 0);
}

INSTANTIATE_TEST_SUITE_P(Of, MergedScorers,
                         testing::Values("plain", "labels", "int8", "outside", "ml", "uint8", "tokens"));

TEST(MergedScorer, TellsWhatToGive) {
  const Loss labels = Loss::load(Case("labels").path(), trusting());
  EXPECT_EQ(names_of(labels.inputs()), (std::vector<std::string>{"pixels", "labels"}));
  const std::vector<pykd_tensor_info> inputs = labels.inputs();
  EXPECT_EQ(axes_of(inputs[0]), (std::vector<std::string>{"batch", "7"}));
  EXPECT_EQ(lengths_of(inputs[0]), (std::vector<std::int64_t>{0, 7}));
  EXPECT_EQ(inputs[0].dtypes, 1u << PYKD_FLOAT32);
  EXPECT_EQ(axes_of(inputs[1]), std::vector<std::string>{"batch"});
  EXPECT_EQ(dtype_of(inputs[1]), PYKD_INT64);
  EXPECT_EQ(labels.parameters().size(), 3u);
  EXPECT_NE(labels.metadata().find("\"connections\""), std::string::npos);

  const Loss tokens = Loss::load(Case("tokens").path(), trusting());
  ASSERT_EQ(names_of(tokens.inputs()), (std::vector<std::string>{"ids", "mask"}));
  EXPECT_EQ(axes_of(tokens.inputs()[1]), (std::vector<std::string>{"batch", "mask.words"}));
  EXPECT_EQ(lengths_of(tokens.inputs()[1]), (std::vector<std::int64_t>{0, 0}));
  EXPECT_EQ(dtype_of(tokens.inputs()[1]), PYKD_INT32);

  const Loss fixed = Loss::load(Case("uint8").path(), trusting());
  EXPECT_EQ(dtype_of(fixed.inputs()[0]), PYKD_UINT8);
  EXPECT_EQ(lengths_of(fixed.inputs()[0]), (std::vector<std::int64_t>{6, 7}));
  EXPECT_EQ(axes_of(fixed.inputs()[0])[0], "batch");

  const Loss kept = Loss::load(Case("outside").path(), trusting());
  EXPECT_EQ(names_of(kept.outputs()), (std::vector<std::string>{"student/logits", "loss_per_sample"}));
  EXPECT_EQ(axes_of(kept.outputs()[0]), (std::vector<std::string>{"batch", "5"}));
}

TEST(MergedScorer, NeedsToBeTrusted) {
  const Case given("plain");
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, Loss::load(given.path()), "scorer.onnx", "pykd merge", "set trust_merged");
  const std::string bytes = read(given.path());
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, Loss::load_bytes(bytes.data(), bytes.size()), "the bytes", "set trust_merged");
  EXPECT_EQ(pykd_check_onnx(bytes.data(), bytes.size()), PYKD_BAD_ARTEFACT);
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, Loss::load(Case("outside").path()), "set trust_merged");
  pykd_load_options older = PYKD_LOAD_OPTIONS_INIT;  // of a program that does not know the field
  older.struct_size = offsetof(pykd_load_options, trust_merged);
  older.trust_merged = 1;
  pykd_loss* loss = nullptr;
  EXPECT_EQ(pykd_load(given.path().c_str(), &older, &loss), PYKD_BAD_ARTEFACT);
  EXPECT_EQ(pykd_load((root() / "soft").c_str(), &older, &loss), PYKD_OK) << pykd_last_error();
  pykd_free(loss);
  // The option changes nothing for other files.
  EXPECT_EQ(Loss::load((root() / "soft").string(), trusting()).inputs().size(), 2u);
}

TEST(MergedScorer, LoadsFromMemoryWhereItHoldsItsWeights) {
  Case given("plain");
  std::string bytes = read(given.path());
  const Loss loss = Loss::load_bytes(bytes.data(), bytes.size(), trusting("off"));
  std::fill(bytes.begin(), bytes.end(), 'x');  // they may be freed
  const Result values = loss.value(given.inputs.tensors());
  const Array& want = given.outputs.all["loss_per_sample"];
  EXPECT_EQ(std::memcmp(values.raw("loss_per_sample"), want.bytes.data(), want.bytes.size()), 0);
  const std::string outside = read(Case("outside").path());
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, Loss::load_bytes(outside.data(), outside.size(), trusting()), "beside it",
               "load it by its path");
}

TEST(MergedScorer, TakesParametersAndManyRows) {
  Case given("plain");
  const Loss loss = Loss::load(given.path(), trusting("off"));
  const Loss apart = Loss::load((root() / "soft").string(), trusting("off"));
  const Result got = loss.value(given.inputs.tensors(), {{"temperature", 3.0}});
  const Result want = apart.value(given.logits.tensors(), {{"temperature", 3.0}});
  EXPECT_EQ(std::memcmp(got.raw("loss_per_sample"), want.raw("loss_per_sample"), 6 * sizeof(float)), 0);
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.value(given.inputs.tensors(), {{"temperature", -1.0}}), "temperature");
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.value(given.inputs.tensors(), {{"temprature", 1.0}}), "did you mean");

  const std::int64_t rows = 20000;
  std::vector<float> pixels(static_cast<std::size_t>(rows) * 7);
  for (std::size_t i = 0; i < pixels.size(); ++i) pixels[i] = std::sin(static_cast<float>(i));
  pixels[7 * 3 + 2] = std::nanf("");
  pixels[7 * 4 + 2] = INFINITY;
  Scorer scorer(loss);
  scorer.score({{"pixels", view(pixels, {rows, 7})}});
  EXPECT_EQ(scorer.summary().by_status[PYKD_ROW_OK], rows - 2);
  EXPECT_EQ(scorer.status()[3], PYKD_ROW_NAN);
  EXPECT_EQ(scorer.status()[4], PYKD_ROW_INFINITE);
}

TEST(MergedScorer, TellsBadLabels) {
  Case given("labels");
  const Loss loss = Loss::load(given.path(), trusting());
  std::vector<std::int64_t> labels = {0, 5, -100, -1, 1, 1};
  Tensors inputs = given.inputs.tensors();
  inputs["labels"] = view(labels, {6});
  Scorer scorer(loss);
  scorer.score(inputs);
  EXPECT_EQ(scorer.status(), (std::vector<std::uint8_t>{PYKD_ROW_OK, PYKD_ROW_LABEL_OUT_OF_RANGE, PYKD_ROW_IGNORED,
                                                        PYKD_ROW_LABEL_OUT_OF_RANGE, PYKD_ROW_OK, PYKD_ROW_OK}));
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.value(inputs), "labels from 0 to 4 or -100", "got 5 at position [1]");
}

TEST(MergedScorer, RefusesWrongCalls) {
  Case given("uint8");
  const Loss loss = Loss::load(given.path(), trusting());
  std::vector<float> numbers(6 * 7);
  EXPECT_ERROR(PYKD_INVALID_TYPE, loss.value({{"pixels", view(numbers, {6, 7})}}), "pixels of dtype uint8", "float32");
  std::vector<std::uint8_t> bytes(6 * 7);
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.value({{"pixels", view(bytes, {7, 6})}}), "pixels of length 6 along its axis 0",
               "[7, 6]");
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.value({{"pixels", view(bytes, {42})}}), "pixels with axes (batch, 7)");
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.value({}), "the inputs pixels");
  EXPECT_ERROR(PYKD_INVALID_VALUE, loss.value_and_gradient({{"pixels", view(bytes, {6, 7})}}), "kind \"score\"");

  Case words("tokens");
  const Loss tokens = Loss::load(words.path(), trusting());
  Tensors inputs = words.inputs.tensors();
  std::vector<std::int32_t> mask(6 * 3);
  inputs["mask"] = view(mask, {6, 3});  // which only the models know to be wrong
  EXPECT_ERROR(PYKD_ENGINE_FAILURE, tokens.value(inputs), "ONNX Runtime reported");
  std::vector<std::int64_t> none(1);
  inputs["ids"] = view(none.data(), {0, 4});
  EXPECT_ERROR(PYKD_INVALID_VALUE, tokens.value(inputs), "an empty batch");
  inputs["ids"] = view(none.data(), {std::int64_t{1} << 40, std::int64_t{1} << 40});
  EXPECT_ERROR(PYKD_INVALID_VALUE, tokens.value(inputs), "ids of a size that fits into memory");
}

TEST(MergedScorer, RefusesWrongOptions) {
  const Case given("plain");
  LoadOptions options = trusting();
  options.engine = "torchscript";
  EXPECT_ERROR(PYKD_NOT_FOUND, Loss::load(given.path(), options), "merged scorer");
}

TEST(MergedScorer, RefusesDamage) {
  const Case given("plain");
  const std::string good = read(given.path());
  for (std::size_t at = 0; at < good.size(); at += 7) {
    std::string damaged = good;
    damaged[at] = static_cast<char>(damaged[at] ^ (1 << (at % 8)));
    for (const std::string& bytes : {damaged, good.substr(0, at)}) {
      pykd_load_options options = PYKD_LOAD_OPTIONS_INIT;
      options.trust_merged = 1;
      pykd_loss* loss = nullptr;
      EXPECT_EQ(pykd_load_bytes(bytes.data(), bytes.size(), &options, &loss), PYKD_BAD_ARTEFACT) << at;
      pykd_free(loss);
    }
  }
  const std::string changed = good + good.substr(good.size() - 24);
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, Loss::load_bytes(changed.data(), changed.size(), trusting()), "checksum");
  LoadOptions options = trusting();
  options.skip_integrity_check = true;
  EXPECT_EQ(Loss::load_bytes(changed.data(), changed.size(), options).inputs().size(), 1u);
}

TEST(MergedScorer, RefusesMissingAndShortWeights) {
  const Case given("outside");
  const Copy copy(given);
  const fs::path weights = copy.path(given.weights().filename().string());
  EXPECT_EQ(Loss::load(copy.scorer(), trusting()).inputs().size(), 1u);
  fs::resize_file(weights, 100);
  EXPECT_ERROR(PYKD_BAD_ARTEFACT, Loss::load(copy.scorer(), trusting()), "at least 140 bytes", "got 100");
  fs::remove(weights);
  EXPECT_ERROR(PYKD_NOT_FOUND, Loss::load(copy.scorer(), trusting()), weights.filename().c_str());
  fs::create_directory(weights);
  EXPECT_ERROR(PYKD_NOT_FOUND, Loss::load(copy.scorer(), trusting()), "no regular file");
}

}  // namespace
}  // namespace pykd::tests
