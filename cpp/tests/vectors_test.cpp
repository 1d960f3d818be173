// Numbers from Python: every folder below PYKD_TEST_VECTORS holds an artefact and a vectors.json
// with calls and what they must give. Each is run with every engine it has a file for, all calls in
// sequence on one loaded loss. Python writes the folders; there is none in this process.
//
//   {"name": ...,
//    "calls": [{"tolerance": {"value": 1e-6, "gradient": 1e-5},
//               "inputs": {"student_logits": {"dtype": "float32", "shape": [2, 3], "data": [...]}},
//               "parameters": {"temperature": 2.0},
//               "outputs": {"loss": {...}, "grad_student_logits": {...}}}]}
//
// Numbers are decimal; "nan", "inf" and "-inf" are strings.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "pykd/pykd.hpp"
#include "tests/half_numbers.h"
#include "tests/support.h"

namespace pykd::tests {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

// ---- Numbers ---------------------------------------------------------------------------------------

double to_number(const json& item) {
  if (item.is_number()) return item.get<double>();
  const std::string text = item.get<std::string>();
  if (text == "nan") return std::numeric_limits<double>::quiet_NaN();
  if (text == "inf") return std::numeric_limits<double>::infinity();
  if (text == "-inf") return -std::numeric_limits<double>::infinity();
  throw std::runtime_error("no number: " + text);
}

pykd_dtype to_dtype(const std::string& name) {
  if (name == "float16") return PYKD_FLOAT16;
  if (name == "bfloat16") return PYKD_BFLOAT16;
  if (name == "float32") return PYKD_FLOAT32;
  if (name == "float64") return PYKD_FLOAT64;
  if (name == "int64") return PYKD_INT64;
  throw std::runtime_error("no dtype: " + name);
}

// A tensor of vectors.json, in memory as the library wants it.
struct Array {
  Array() = default;
  explicit Array(const json& description)
      : dtype(to_dtype(description.at("dtype"))), shape(description.at("shape").get<std::vector<std::int64_t>>()) {
    for (const json& item : description.at("data")) append(item);
  }

  template <class T>
  void append_bytes(T value) {
    const auto* begin = reinterpret_cast<const unsigned char*>(&value);
    bytes.insert(bytes.end(), begin, begin + sizeof value);
  }
  void append(const json& item) {
    if (dtype == PYKD_INT64) return append_bytes(item.get<std::int64_t>());
    const double value = to_number(item);
    if (dtype == PYKD_FLOAT64) return append_bytes(value);
    if (dtype == PYKD_FLOAT32) return append_bytes(static_cast<float>(value));
    const auto narrow = static_cast<float>(value);
    append_bytes(to_half(dtype, narrow));
  }

  template <class T>
  T at(std::size_t index) const {
    T value;
    std::memcpy(&value, bytes.data() + index * sizeof value, sizeof value);
    return value;
  }
  double number(std::size_t index) const {
    switch (dtype) {
      case PYKD_FLOAT16:
        return from_half(at<std::uint16_t>(index));
      case PYKD_BFLOAT16:
        return from_bfloat16(at<std::uint16_t>(index));
      case PYKD_FLOAT32:
        return at<float>(index);
      case PYKD_FLOAT64:
        return at<double>(index);
      case PYKD_INT64:
        return static_cast<double>(at<std::int64_t>(index));
      default:
        return 0;  // to_dtype() knows no other
    }
  }

  Tensor tensor() { return Tensor(bytes.data(), dtype, shape); }

  pykd_dtype dtype = PYKD_FLOAT32;
  std::vector<std::int64_t> shape;
  std::vector<unsigned char> bytes;
};

// ---- Comparison ---------------------------------------------------------------------------------

bool is_gradient(const std::string& name) { return name.rfind("grad_", 0) == 0; }

double largest(const std::vector<double>& values) {
  double result = 0;
  for (double value : values) {
    if (std::isfinite(value)) result = std::max(result, std::fabs(value));
  }
  return result;
}

// Values are compared one by one, |got - want| <= tolerance * (1 + |want|); a gradient's elements
// with the largest of them, because those near zero carry its rounding.
void compare(const std::string& name, const json& expected, const Array& got, const json& tolerance) {
  std::vector<double> want;
  for (const json& item : expected.at("data")) want.push_back(to_number(item));
  ASSERT_EQ(got.shape, expected.at("shape").get<std::vector<std::int64_t>>()) << name;
  ASSERT_EQ(got.dtype, to_dtype(expected.at("dtype"))) << name;
  const bool gradient = is_gradient(name);
  const double bound = tolerance.at(gradient ? "gradient" : "value").get<double>();
  // Features of one channel have no direction to change, so that their gradient is 0: what comes out instead is the
  // rounding of two terms of size 1 / |x| that cancel.
  const double scale = !gradient ? 0 : largest(want) < 1e-9 ? 0.1 : std::max(largest(want), 0.01);
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double value = got.number(i);
    if (!std::isfinite(want[i])) {
      const bool same = std::isnan(want[i]) ? std::isnan(value) : value == want[i];
      ASSERT_TRUE(same) << name << "[" << i << "]: expected " << want[i] << ", got " << value;
      continue;
    }
    const double allowed = bound * (gradient ? scale : 1 + std::fabs(want[i]));
    // Written so that a NaN fails.
    ASSERT_TRUE(std::fabs(value - want[i]) <= allowed)
        << name << "[" << i << "]: expected " << want[i] << ", got " << value << ", "
        << std::fabs(value - want[i]) / allowed << " times the tolerance";
  }
}

// ---- One case with one engine -------------------------------------------------------------------

json read_json(const fs::path& path) {
  std::ifstream stream(path);
  if (!stream) throw std::runtime_error("cannot read " + path.string());
  return json::parse(stream);
}

void run_call(const Loss& loss, const json& call, bool with_gradient) {
  std::map<std::string, Array> inputs, outputs;
  Tensors in, out;
  for (const auto& item : call.at("inputs").items()) {
    in[item.key()] = (inputs[item.key()] = Array(item.value())).tensor();
  }
  for (const auto& item : call.at("outputs").items()) {
    if (is_gradient(item.key()) && !with_gradient) continue;
    Array& array = outputs[item.key()];
    array = Array(item.value());
    std::fill(array.bytes.begin(), array.bytes.end(), 0xA5);  // what is not written is seen
    out[item.key()] = array.tensor();
  }
  if (out.empty()) return;
  Parameters parameters;
  const json given = call.value("parameters", json::object());
  for (const auto& item : given.items()) {
    if (item.key() == "grad_scale" && !with_gradient) continue;
    parameters[item.key()] = item.value().get<double>();
  }
  loss.run(in, out, parameters);
  for (const auto& item : outputs) {
    compare(item.first, call.at("outputs").at(item.first), item.second, call.at("tolerance"));
  }
}

class VectorsTest : public testing::Test {
 public:
  VectorsTest(fs::path folder, std::string engine) : folder_(std::move(folder)), engine_(std::move(engine)) {}

  void TestBody() override {
    const json vectors = read_json(folder_ / "vectors.json");
    LoadOptions options;
    options.engine = engine_;
    options.torch_library = PYKD_TORCH_LIBRARY_PATH;
    const Loss loss = Loss::load(folder_.string(), options);
    ASSERT_EQ(loss.engine(), engine_);
    ASSERT_FALSE(vectors.at("calls").empty());
    for (std::size_t i = 0; i < vectors.at("calls").size(); ++i) {
      SCOPED_TRACE("call " + std::to_string(i));
      const json& call = vectors.at("calls")[i];
      run_call(loss, call, true);
      run_call(loss, call, false);
      if (HasFatalFailure()) return;
    }
  }

 private:
  fs::path folder_;
  std::string engine_;
};

// ---- Damage -------------------------------------------------------------------------------------

// Real files are refused, cut at any length and with any byte changed; large ones at a few thousand
// places, and at fewer where sanitizers, which fuzz files as well, make it slow. Those of one type: what a
// file is made of does not depend on it.
class DamageTest : public testing::Test {
 public:
  explicit DamageTest(fs::path file) : file_(std::move(file)) {}

  void TestBody() override {
    std::ifstream stream(file_, std::ios::binary);
    const std::string good((std::istreambuf_iterator<char>(stream)), {});
    ASSERT_FALSE(good.empty());
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    const std::size_t places = 250;
#else
    const std::size_t places = 2000;
#endif
    const std::size_t step = 1 + good.size() / places;
    for (std::size_t at = 0; at < good.size(); at += step) {
      std::string damaged = good;
      damaged[at] = static_cast<char>(damaged[at] ^ (1 << (at % 8)));
      expect_refused(damaged.data(), damaged.size(), at);
      expect_refused(good.data(), at, at);
    }
  }

 private:
  static void expect_refused(const char* bytes, std::size_t size, std::size_t at) {
    pykd_loss* loss = nullptr;
    EXPECT_EQ(pykd_load_bytes(bytes, size, nullptr, &loss), PYKD_BAD_ARTEFACT)
        << "at " << at << ": " << pykd_last_error();
    EXPECT_EQ(loss, nullptr);
    pykd_free(loss);
  }

  fs::path file_;
};

class BrokenSetup : public testing::Test {
 public:
  explicit BrokenSetup(std::string why) : why_(std::move(why)) {}
  void TestBody() override { FAIL() << why_; }

 private:
  std::string why_;
};

// ---- The list of tests --------------------------------------------------------------------------

std::string test_name(const fs::path& path) {
  std::string name = path.filename().string();
  for (char& c : name) {
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  }
  return name;
}

template <class Make>
void add_test(const std::string& suite, const std::string& name, Make make) {
  testing::RegisterTest(suite.c_str(), name.c_str(), nullptr, nullptr, __FILE__, __LINE__,
                        [make]() -> testing::Test* { return make(); });
}

void add_broken(const std::string& name, const std::string& why) {
  add_test("Setup", name, [why] { return new BrokenSetup(why); });
}

bool is_damaged(const fs::path& folder) { return folder.filename().string().find("-float32") != std::string::npos; }

void add_case(const fs::path& folder) {
  const std::string name = test_name(folder);
  auto has = [&](const char* file) { return fs::exists(folder / file); };
  const bool onnx = has("loss.onnx") || has("loss.grad.onnx"), torchscript = has("loss.pt");
  auto add_engine = [&](const char* suite, const std::string& engine) {
    add_test(suite, name, [folder, engine] { return new VectorsTest(folder, engine); });
  };
  if (onnx) add_engine("OnnxRuntime", "onnxruntime");
  if (torchscript && std::strlen(PYKD_TORCH_LIBRARY_PATH) > 0) add_engine("TorchScript", "torchscript");
  if (!onnx && !torchscript) add_broken(name, "no artefact in " + folder.string());
  for (const char* file : {"loss.onnx", "loss.grad.onnx", "loss.pt"}) {
    const fs::path path = folder / file;
    if (!is_damaged(folder) || !fs::exists(path)) continue;
    add_test("Damage", name + "_" + test_name(file), [path] { return new DamageTest(path); });
  }
}

void add_all() {
  const char* root = std::getenv("PYKD_TEST_VECTORS");
  if (root == nullptr || !fs::is_directory(root)) {
    return add_broken("Vectors",
                      "PYKD_TEST_VECTORS names no folder; write one with pykd's Python package and "
                      "set the variable to it");
  }
  std::vector<fs::path> folders;
  for (const fs::directory_entry& entry : fs::directory_iterator(root)) {
    if (fs::exists(entry.path() / "vectors.json")) folders.push_back(entry.path());
  }
  if (std::none_of(folders.begin(), folders.end(), is_damaged)) add_broken("Damage", "no case in float32");
  if (folders.empty()) return add_broken("Vectors", std::string("no cases in ") + root);
  std::sort(folders.begin(), folders.end());
  for (const fs::path& folder : folders) add_case(folder);
}

}  // namespace
}  // namespace pykd::tests

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  pykd::tests::add_all();
  return RUN_ALL_TESTS();
}
