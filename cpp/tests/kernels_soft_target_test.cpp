// The kernel soft_target against a float64 reference written from the formulas in its header.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/kernel.h"
#include "kernels/simd/targets.h"
#include "kernels/soft_target/soft_target.h"
#include "tests/half_numbers.h"
#include "tests/kernel_threads.h"

namespace pykd::kernels {
namespace {

using soft_target::Form;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

enum class Hard { kNone, kLabels, kProbs };

// A tensor of one of the three dtypes, with entries beyond its end that nobody may touch.
class Tensor {
 public:
  Tensor() = default;
  Tensor(pykd_dtype dtype, std::size_t count)
      : dtype_(dtype), count_(count), memory_((count + kGuard) * width(), 0xA5) {}
  Tensor(pykd_dtype dtype, const std::vector<double>& values) : Tensor(dtype, values.size()) {
    for (std::size_t i = 0; i < count_; ++i) {
      const float value = static_cast<float>(values[i]);
      if (dtype == PYKD_FLOAT32) {
        std::memcpy(&memory_[i * width()], &value, sizeof value);
      } else {
        const std::uint16_t half = tests::to_half(dtype, value);
        std::memcpy(&memory_[i * width()], &half, sizeof half);
      }
    }
  }
  double operator[](std::size_t i) const {
    float value;
    std::uint16_t half;
    std::memcpy(dtype_ == PYKD_FLOAT32 ? static_cast<void*>(&value) : &half, &memory_[i * width()], width());
    return dtype_ == PYKD_FLOAT32 ? value : tests::from_half(dtype_, half);
  }
  std::vector<double> values() const {
    std::vector<double> result(count_);
    for (std::size_t i = 0; i < count_; ++i) result[i] = (*this)[i];
    return result;
  }
  bool guard_is_whole() const {
    return std::all_of(memory_.begin() + static_cast<std::ptrdiff_t>(count_ * width()), memory_.end(),
                       [](unsigned char byte) { return byte == 0xA5; });
  }
  const std::vector<unsigned char>& memory() const { return memory_; }
  void* data() { return memory_.data(); }

 private:
  static constexpr std::size_t kGuard = 64;
  std::size_t width() const { return dtype_ == PYKD_FLOAT32 ? 4 : 2; }
  pykd_dtype dtype_ = PYKD_FLOAT32;
  std::size_t count_ = 0;
  std::vector<unsigned char> memory_;
};

// ---- A call -------------------------------------------------------------------------------------

struct Settings {
  Form form = Form::kCrossEntropy;
  bool teacher = true, soften = true;
  Hard hard = Hard::kNone;
  pykd_dtype dtype = PYKD_FLOAT32;
  float temperature = 2.0f, beta = 0.3f;
};

struct Data {
  std::size_t rows = 0, classes = 0;
  std::vector<double> student, teacher, probs;  // as the tensors hold them
  std::vector<std::int64_t> labels;
  std::vector<float> soft_weight, hard_weight;
};

struct Result {
  std::vector<double> soft, hard, gradient;
  std::vector<unsigned char> bits;  // of all of them
};

Parallel one_thread() { return {}; }

enum Want { kValues = 1, kGradient = 2 };

Result run(const Settings& settings, Data data, int want = kValues | kGradient,
           const Parallel& parallel = one_thread()) {
  const std::int64_t matrix[2] = {static_cast<std::int64_t>(data.rows), static_cast<std::int64_t>(data.classes)};
  Tensor student(settings.dtype, data.student), teacher(settings.dtype, data.teacher);
  Tensor probs(settings.dtype, data.probs), gradient(settings.dtype, data.rows * data.classes);
  Tensor soft(PYKD_FLOAT32, data.rows), hard(PYKD_FLOAT32, data.rows);
  float temperature = settings.temperature;
  Array inputs[7], outputs[3];
  const auto in = [&](soft_target::Input input, void* memory, pykd_dtype dtype, std::int32_t rank) {
    inputs[input] = {memory, dtype, rank, matrix};
  };
  in(soft_target::kStudent, student.data(), settings.dtype, 2);
  if (settings.teacher) {
    in(soft_target::kTeacher, teacher.data(), settings.dtype, 2);
    in(soft_target::kTemperature, &temperature, PYKD_FLOAT32, 0);
    if (!data.soft_weight.empty()) in(soft_target::kSoftWeight, data.soft_weight.data(), PYKD_FLOAT32, 1);
    if ((want & kValues) != 0) outputs[soft_target::kSoft] = {soft.data(), PYKD_FLOAT32, 1, matrix};
  }
  if (settings.hard == Hard::kLabels) in(soft_target::kLabels, data.labels.data(), PYKD_INT64, 1);
  if (settings.hard == Hard::kProbs) in(soft_target::kLabelProbs, probs.data(), settings.dtype, 2);
  if (settings.hard != Hard::kNone) {
    if (!data.hard_weight.empty()) in(soft_target::kHardWeight, data.hard_weight.data(), PYKD_FLOAT32, 1);
    if ((want & kValues) != 0) outputs[soft_target::kHard] = {hard.data(), PYKD_FLOAT32, 1, matrix};
  }
  if ((want & kGradient) != 0) outputs[soft_target::kGradStudent] = {gradient.data(), settings.dtype, 2, matrix};
  const double attributes[3] = {static_cast<double>(settings.form), settings.soften ? 1.0 : 0.0, settings.beta};
  const Call call{inputs, outputs, attributes, settings.dtype, &parallel};
  const Kernel* kernel = find("soft_target");
  EXPECT_NE(kernel, nullptr);
  EXPECT_EQ(kernel->refuse(call), nullptr);
  kernel->cpu(call);
  EXPECT_TRUE(gradient.guard_is_whole() && soft.guard_is_whole() && hard.guard_is_whole());
  Result result{soft.values(), hard.values(), gradient.values(), {}};
  for (const Tensor* tensor : {&soft, &hard, &gradient}) {
    result.bits.insert(result.bits.end(), tensor->memory().begin(), tensor->memory().end());
  }
  return result;
}

// ---- The reference -------------------------------------------------------------------------------

std::vector<double> log_softmax(const double* logits, std::size_t classes, double temperature) {
  double top = -kInf, sum = 0;
  for (std::size_t j = 0; j < classes; ++j) top = std::isnan(logits[j]) ? kNan : std::max(logits[j], top);
  std::vector<double> result(logits, logits + classes);
  for (double& entry : result) {
    entry = (entry - top) / temperature;
    sum += std::exp(entry);
  }
  for (double& entry : result) entry -= std::log(sum);
  return result;
}

double term(double factor, double value) { return factor == 0 ? 0.0 : factor * value; }

struct Row {
  double soft = 0, hard = 0;
  std::vector<double> soft_gradient, hard_gradient;
  double soft_scale = 0, hard_scale = 0;  // the largest terms whose differences the gradients are
};

Row reference(const Settings& settings, const Data& data, std::size_t row) {
  const std::size_t n = data.classes;
  const double* const s = &data.student[row * n];
  Row result;
  result.soft_gradient.resize(n);
  result.hard_gradient.resize(n);
  if (settings.teacher) {
    const std::vector<double> log_p = log_softmax(&data.teacher[row * n], n, settings.temperature);
    const double student_temperature = settings.soften ? settings.temperature : 1.0;
    const std::vector<double> log_q = log_softmax(s, n, student_temperature);
    const double beta = settings.beta;
    double cross_entropy = 0, kl = 0, reverse = 0, p_to_m = 0, q_to_m = 0;
    std::vector<double> log_m(n);
    for (std::size_t j = 0; j < n; ++j) {
      const double p = std::exp(log_p[j]), q = std::exp(log_q[j]);
      log_m[j] = std::log(beta * p + (1 - beta) * q);
      cross_entropy -= term(p, log_q[j]);
      kl += term(p, log_p[j] - log_q[j]);
      reverse += term(q, log_q[j] - log_p[j]);
      p_to_m += term(p, log_p[j] - log_m[j]);
      q_to_m += term(q, log_q[j] - log_m[j]);
    }
    for (std::size_t j = 0; j < n; ++j) {
      const double p = std::exp(log_p[j]), q = std::exp(log_q[j]);
      const double forward_gradient = q - p, reverse_gradient = term(q, log_q[j] - log_p[j] - reverse);
      const double forward_scale = std::max(p, q);
      const double reverse_scale = std::max(std::abs(term(q, log_q[j] - log_p[j])), std::abs(term(q, reverse)));
      double gradient = 0, scale = 0;
      switch (settings.form) {
        case Form::kCrossEntropy:
        case Form::kKl:
          gradient = forward_gradient, scale = forward_scale;
          break;
        case Form::kReverseKl:
          gradient = reverse_gradient, scale = reverse_scale;
          break;
        case Form::kSymmetricKl:
          gradient = 0.5 * forward_gradient + 0.5 * reverse_gradient;
          scale = std::max(forward_scale, reverse_scale);
          break;
        case Form::kJsd:
          gradient = (1 - beta) * term(q, log_q[j] - log_m[j] - q_to_m), scale = q;
          break;
      }
      result.soft_gradient[j] = gradient / student_temperature;
      result.soft_scale = std::max(result.soft_scale, scale / student_temperature);
    }
    switch (settings.form) {
      case Form::kCrossEntropy:
        result.soft = cross_entropy;
        break;
      case Form::kKl:
        result.soft = kl;
        break;
      case Form::kReverseKl:
        result.soft = reverse;
        break;
      case Form::kSymmetricKl:
        result.soft = 0.5 * kl + 0.5 * reverse;
        break;
      case Form::kJsd:
        result.soft = beta * p_to_m + (1 - beta) * q_to_m;
        break;
    }
  }
  if (settings.hard != Hard::kNone) {
    const std::vector<double> log_q = log_softmax(s, n, 1.0);
    double sum = 0;
    if (std::isnan(log_q[0])) result.hard = kNan;  // all of them are, whatever the labels
    for (std::size_t j = 0; j < n; ++j) {
      const bool is_label = settings.hard == Hard::kLabels && data.labels[row] == static_cast<std::int64_t>(j);
      const double y = settings.hard == Hard::kProbs ? data.probs[row * n + j] : is_label ? 1.0 : 0.0;
      result.hard -= term(y, log_q[j]);
      result.hard_gradient[j] = -y;
      sum += y;
    }
    for (std::size_t j = 0; j < n; ++j) {
      result.hard_scale = std::max({result.hard_scale, -result.hard_gradient[j], std::exp(log_q[j]) * sum});
      result.hard_gradient[j] += std::exp(log_q[j]) * sum;
    }
    if (settings.hard == Hard::kLabels && (data.labels[row] < 0 || data.labels[row] >= static_cast<std::int64_t>(n))) {
      result.hard = kNan;
      result.hard_gradient.assign(n, kNan);
    }
  }
  return result;
}

// ---- Comparing -----------------------------------------------------------------------------------

// float32 arithmetic on float32 exponentials: a few units of the last place of what is summed up. Values relative to
// max(1, |value|), gradients to the largest terms that a row's entries are the differences of; and half a unit of the
// last place of a half-precision result.
constexpr double kValueMargin = 1e-6;
constexpr double kGradientMargin = 1e-6;
constexpr double kSmallest = 1e-36;  // probabilities below 2^-126 are 0

double rounding(pykd_dtype dtype, double value) {
  if (dtype == PYKD_FLOAT32) return 0;
  if (dtype == PYKD_BFLOAT16) return std::abs(value) * 0x1p-8;
  return std::max(std::abs(value) * 0x1p-11, 0x1p-25);
}

std::string describe(const Settings& settings, const Data& data) {
  return "form " + std::to_string(static_cast<int>(settings.form)) + ", teacher " + std::to_string(settings.teacher) +
         ", soften " + std::to_string(settings.soften) + ", hard " + std::to_string(static_cast<int>(settings.hard)) +
         ", dtype " + std::to_string(settings.dtype) + ", T " + std::to_string(settings.temperature) + ", " +
         std::to_string(data.rows) + " x " + std::to_string(data.classes);
}

void expect_value(double got, double expected, const std::string& what) {
  if (std::isnan(expected) || std::isinf(expected)) {
    EXPECT_TRUE(std::isnan(expected) ? std::isnan(got) : got == expected) << what << ": " << got << " for " << expected;
    return;
  }
  EXPECT_LE(std::abs(got - expected), kValueMargin * std::max(1.0, std::abs(expected)))
      << what << ": " << got << " for " << expected;
}

void expect_row(const Settings& settings, const Data& data, const Result& result, const Row& expected,
                std::size_t row) {
  const std::string what = describe(settings, data) + ", row " + std::to_string(row);
  if (settings.teacher) expect_value(result.soft[row], expected.soft, what + ", soft");
  if (settings.hard != Hard::kNone) expect_value(result.hard[row], expected.hard, what + ", hard");
  const double soft_weight = !settings.teacher || data.soft_weight.empty() ? 0 : data.soft_weight[row];
  const double hard_weight = settings.hard == Hard::kNone || data.hard_weight.empty() ? 0 : data.hard_weight[row];
  std::vector<double> gradient(data.classes);
  const double scale =
      std::max(std::abs(term(soft_weight, expected.soft_scale)), std::abs(term(hard_weight, expected.hard_scale)));
  bool finite = true;
  for (std::size_t j = 0; j < data.classes; ++j) {
    gradient[j] = term(soft_weight, expected.soft_gradient[j]) + term(hard_weight, expected.hard_gradient[j]);
    finite = finite && std::isfinite(gradient[j]);
  }
  std::size_t wrong = 0, not_finite = 0, worst = 0;
  double worst_error = 0;
  for (std::size_t j = 0; j < data.classes; ++j) {
    const double got = result.gradient[row * data.classes + j];
    const double error = std::abs(got - gradient[j]);
    const double allowed = kGradientMargin * scale + kSmallest + rounding(settings.dtype, gradient[j]);
    if (!std::isfinite(got)) ++not_finite;
    if (!(error <= allowed)) ++wrong;
    if (error > worst_error || std::isnan(error)) worst = j, worst_error = error;
  }
  if (!finite) {  // a value of NaN, or of +inf for the reverse forms, has no gradient
    EXPECT_GT(not_finite, 0u) << what;
    return;
  }
  EXPECT_EQ(wrong, 0u) << what << ": entry " << worst << " is " << result.gradient[row * data.classes + worst]
                       << " for " << gradient[worst] << " (scale " << scale << ")";
}

// ---- Data ----------------------------------------------------------------------------------------

std::vector<double> rounded(pykd_dtype dtype, const std::vector<double>& values) {
  return Tensor(dtype, values).values();
}

Data ordinary(const Settings& settings, std::size_t rows, std::size_t classes, double spread = 3.0, unsigned seed = 1) {
  std::mt19937 random(seed + static_cast<unsigned>(classes));
  std::normal_distribution<double> normal(0.0, spread);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  Data data;
  data.rows = rows;
  data.classes = classes;
  for (std::size_t i = 0; i < rows * classes; ++i) {
    data.student.push_back(normal(random));
    data.teacher.push_back(normal(random));
    data.probs.push_back(i % 3 == 0 ? 0.0 : uniform(random) / static_cast<double>(classes));
  }
  data.student = rounded(settings.dtype, data.student);
  data.teacher = rounded(settings.dtype, data.teacher);
  data.probs = rounded(settings.dtype, data.probs);
  for (std::size_t row = 0; row < rows; ++row) {
    data.labels.push_back(static_cast<std::int64_t>(random() % classes));
    data.soft_weight.push_back(static_cast<float>(0.25 + uniform(random)));
    data.hard_weight.push_back(static_cast<float>(-1.0 - uniform(random)));
  }
  return data;
}

// Every combination of form, student softening, hard part and dtype.
std::vector<Settings> all_settings() {
  std::vector<Settings> result;
  for (const pykd_dtype dtype : {PYKD_FLOAT32, PYKD_FLOAT16, PYKD_BFLOAT16}) {
    for (const Hard hard : {Hard::kNone, Hard::kLabels, Hard::kProbs}) {
      for (const Form form : {Form::kCrossEntropy, Form::kKl, Form::kReverseKl, Form::kSymmetricKl, Form::kJsd}) {
        for (const bool soften : {true, false}) {
          Settings settings;
          settings.form = form;
          settings.soften = soften;
          settings.hard = hard;
          settings.dtype = dtype;
          result.push_back(settings);
        }
      }
      if (hard == Hard::kNone) continue;
      Settings alone;
      alone.teacher = false;
      alone.hard = hard;
      alone.dtype = dtype;
      result.push_back(alone);
    }
  }
  return result;
}

class SoftTarget : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { ASSERT_TRUE(use_simd(GetParam().c_str())); }
  void TearDown() override { use_simd(nullptr); }

  void expect_reference(const Settings& settings, const Data& data) {
    const Result result = run(settings, data);
    for (std::size_t row = 0; row < data.rows; ++row) {
      expect_row(settings, data, result, reference(settings, data, row), row);
    }
  }
};

INSTANTIATE_TEST_SUITE_P(Simd, SoftTarget, testing::ValuesIn(simd_targets()),
                         [](const auto& target) { return target.param; });

TEST_P(SoftTarget, AgreesWithTheFormulas) {
  for (const Settings& settings : all_settings()) {
    for (const std::size_t classes : {1, 2, 3, 15, 16, 17, 31, 33, 1000, 1024, 1025, 2111}) {
      expect_reference(settings, ordinary(settings, classes < 1000 ? 3 : 2, classes));
    }
  }
}

TEST_P(SoftTarget, LongRows) {
  for (Settings settings : all_settings()) {
    if (settings.dtype != PYKD_FLOAT32) continue;
    expect_reference(settings, ordinary(settings, 1, 32000));
  }
  Settings settings;
  settings.form = Form::kKl;
  expect_reference(settings, ordinary(settings, 1, 262144));
}

TEST_P(SoftTarget, TemperatureOneSharesTheSoftmax) {
  for (Settings settings : all_settings()) {
    settings.temperature = 1.0f;
    expect_reference(settings, ordinary(settings, 2, 1030));
  }
}

TEST_P(SoftTarget, SharpAndFlatTemperatures) {
  for (const float temperature : {0.05f, 100.0f}) {
    for (Settings settings : all_settings()) {
      settings.temperature = temperature;
      expect_reference(settings, ordinary(settings, 2, 65));
    }
  }
}

// One class has nearly all of q there, and a large logarithm; the gradient is what the others leave of it.
TEST_P(SoftTarget, AReverseGradientKeepsItsDigitsAtLowTemperatures) {
  for (const float temperature : {2.0f, 0.2f, 0.05f}) {
    for (const std::size_t classes : {65, 1500, 5000}) {
      Settings settings;
      settings.form = Form::kReverseKl;
      settings.temperature = temperature;
      const Data data = ordinary(settings, 16, classes, 10.0);
      const Result result = run(settings, data);
      for (std::size_t row = 0; row < data.rows; ++row) {
        const Row expected = reference(settings, data, row);
        double largest = 0, worst = 0;
        for (std::size_t j = 0; j < classes; ++j) {
          const double gradient = data.soft_weight[row] * expected.soft_gradient[j];
          largest = std::max(largest, std::abs(gradient));
          worst = std::max(worst, std::abs(result.gradient[row * classes + j] - gradient));
        }
        EXPECT_LE(worst, 2e-3 * largest + 1e-10) << "T = " << temperature << ", " << classes << " classes, row " << row;
      }
    }
  }
}

TEST_P(SoftTarget, Saturated) {
  for (const Settings& settings : all_settings()) {
    for (const std::size_t classes : {1, 2, 17, 1500}) {
      Data data = ordinary(settings, 4, classes);
      for (std::size_t i = 0; i < data.student.size(); ++i) {
        data.student[i] = data.student[i] > 0 ? 1e4 : -1e4;
        data.teacher[i] = data.teacher[i] > 0 ? 1e4 : -1e4;
      }
      data.student = rounded(settings.dtype, data.student);
      data.teacher = rounded(settings.dtype, data.teacher);
      expect_reference(settings, data);
      for (const double value : run(settings, data).soft) EXPECT_TRUE(!settings.teacher || std::isfinite(value));
      expect_reference(settings, ordinary(settings, 4, classes, 3e3));
    }
  }
}

TEST_P(SoftTarget, EqualInputsHaveNoDivergence) {
  for (const Settings& settings : all_settings()) {
    for (const double spread : {3.0, 3e3}) {
      Data data = ordinary(settings, 3, 1100, spread);
      data.teacher = data.student;
      expect_reference(settings, data);
      if (!settings.teacher || !settings.soften || settings.form == Form::kCrossEntropy) continue;
      for (const double value : run(settings, data).soft) EXPECT_NEAR(value, 0.0, 1e-9) << describe(settings, data);
    }
  }
}

// The running maximum rises in every block of a row, and finds nothing but masked classes in its first ones.
TEST_P(SoftTarget, MaximaThatRise) {
  for (const Settings& settings : all_settings()) {
    for (const bool falling : {false, true}) {
      for (const bool masked_at_first : {false, true}) {
        Data data = ordinary(settings, 1, 5000);
        for (std::size_t j = 0; j < data.classes; ++j) {
          const double slope = 0.02 * static_cast<double>(falling ? data.classes - j : j);
          data.student[j] += slope - 70.0;
          data.teacher[j] += 0.9 * slope;
          if (masked_at_first && j < 2500) data.student[j] = data.teacher[j] = -kInf;
        }
        data.student = rounded(settings.dtype, data.student);
        data.teacher = rounded(settings.dtype, data.teacher);
        if (masked_at_first) {
          for (std::size_t j = 0; j < 2500; ++j) data.probs[j] = 0;
          data.labels[0] = 4000;
        }
        expect_reference(settings, data);
      }
    }
  }
}

TEST_P(SoftTarget, MaskedClasses) {
  for (const Settings& settings : all_settings()) {
    for (const std::size_t classes : {2, 16, 33, 2100}) {
      Data data = ordinary(settings, 4, classes);
      for (std::size_t i = 0; i < data.student.size(); ++i) {
        const std::size_t row = i / classes, j = i % classes;
        if (j % 4 != 1) continue;
        if (row != 2) data.student[i] = -kInf;  // row 2: the teacher alone; row 3: the student alone, values of +inf
        if (row != 3) data.teacher[i] = -kInf;
        data.probs[i] = 0;
      }
      for (std::int64_t& label : data.labels) label = 0;
      expect_reference(settings, data);
      const Result result = run(settings, data);
      for (std::size_t i = 0; i < classes * 2; ++i) EXPECT_TRUE(std::isfinite(result.gradient[i]));
      if (settings.teacher && (settings.form == Form::kKl || settings.form == Form::kCrossEntropy)) {
        EXPECT_EQ(result.soft[3], kInf);
      }
    }
  }
}

TEST_P(SoftTarget, EveryClassMaskedIsNan) {
  for (const Settings& settings : all_settings()) {
    Data data = ordinary(settings, 2, 1030);
    std::fill_n(data.student.begin(), data.classes, -kInf);
    std::fill_n(data.teacher.begin() + static_cast<std::ptrdiff_t>(data.classes), data.classes, -kInf);
    const Result result = run(settings, data);
    if (settings.teacher) {
      EXPECT_TRUE(std::isnan(result.soft[0]) && std::isnan(result.soft[1])) << describe(settings, data);
    }
    if (settings.hard != Hard::kNone) {
      EXPECT_TRUE(std::isnan(result.hard[0]) && std::isfinite(result.hard[1])) << describe(settings, data);
    }
  }
}

TEST_P(SoftTarget, NanStaysInItsRow) {
  for (const Settings& settings : all_settings()) {
    for (const std::size_t classes : {1, 5, 16, 40, 1500}) {
      for (const std::size_t place : {std::size_t{0}, classes / 2, classes - 1}) {
        Data data = ordinary(settings, 3, classes);
        data.student[place] = kNan;                // row 0
        data.teacher[2 * classes + place] = kNan;  // row 2
        expect_reference(settings, data);
        const Result result = run(settings, data);
        EXPECT_TRUE(!settings.teacher || std::isnan(result.soft[0])) << describe(settings, data);
        EXPECT_TRUE(!settings.teacher || std::isnan(result.soft[2])) << describe(settings, data);
        EXPECT_TRUE(settings.hard == Hard::kNone || std::isnan(result.hard[0])) << describe(settings, data);
      }
    }
  }
}

TEST_P(SoftTarget, WeightsOfZeroTakeNothing) {
  for (const Settings& settings : all_settings()) {
    const std::size_t classes = 1100;
    Data data = ordinary(settings, 4, classes);
    data.soft_weight = {0, 0, 2, 0};
    data.hard_weight = {0, 3, 0, 0};
    data.student[3 * classes + 5] = data.student[0] = kNan;
    for (std::size_t j = 0; j < classes; ++j) data.teacher[classes + j] = kNan;    // row 1: no soft part
    for (std::size_t j = 0; j < classes; ++j) data.probs[2 * classes + j] = kNan;  // row 2: no hard part
    data.labels[2] = -100;
    const Result result = run(settings, data);
    for (const std::size_t row : {0, 3}) {
      for (std::size_t j = 0; j < classes; ++j) ASSERT_EQ(result.gradient[row * classes + j], 0.0);
    }
    for (const std::size_t row : {1, 2}) {
      expect_row(settings, data, result, reference(settings, data, row), row);
      for (std::size_t j = 0; j < classes; ++j) ASSERT_TRUE(std::isfinite(result.gradient[row * classes + j]));
    }
    // The same without values, where such rows are not even read.
    const Result gradient_alone = run(settings, data, kGradient);
    EXPECT_EQ(gradient_alone.gradient, result.gradient) << describe(settings, data);
  }
}

TEST_P(SoftTarget, LabelsOutOfRange) {
  for (const Settings& settings : all_settings()) {
    if (settings.hard != Hard::kLabels) continue;
    Data data = ordinary(settings, 4, 20);
    data.labels = {-1, 20, 19, std::numeric_limits<std::int64_t>::min()};
    expect_reference(settings, data);
    const Result result = run(settings, data);
    EXPECT_TRUE(std::isnan(result.hard[0]) && std::isnan(result.hard[1]) && std::isnan(result.hard[3]));
    EXPECT_TRUE(std::isnan(result.gradient[0]) && std::isfinite(result.gradient[40]));
    data.hard_weight = {0, 0, 0, 0};
    for (const double entry : run(settings, data).gradient) EXPECT_TRUE(std::isfinite(entry));
  }
}

TEST_P(SoftTarget, ValuesAndGradientDoNotDependOnEachOther) {
  for (const Settings& settings : all_settings()) {
    const Data data = ordinary(settings, 3, 2100);
    const Result both = run(settings, data);
    const Result values = run(settings, data, kValues), gradient = run(settings, data, kGradient);
    EXPECT_EQ(both.soft, values.soft) << describe(settings, data);
    EXPECT_EQ(both.hard, values.hard) << describe(settings, data);
    EXPECT_EQ(both.gradient, gradient.gradient) << describe(settings, data);
    if (!settings.teacher || settings.hard == Hard::kNone) continue;
    // One of the weights left out, as if it were 0.
    Data zero = data, none = data;
    zero.hard_weight.assign(data.rows, 0.0f);
    none.hard_weight.clear();
    EXPECT_EQ(run(settings, zero).gradient, run(settings, none).gradient) << describe(settings, data);
    zero = none = data;
    zero.soft_weight.assign(data.rows, 0.0f);
    none.soft_weight.clear();
    const Result zeros = run(settings, zero), nones = run(settings, none);
    EXPECT_EQ(zeros.hard, nones.hard) << describe(settings, data);
    for (std::size_t row = 0; row < data.rows; ++row) {
      expect_row(settings, none, nones, reference(settings, none, row), row);
      expect_row(settings, zero, zeros, reference(settings, zero, row), row);
    }
  }
}

// Large enough to be written past the caches, with rows that begin anywhere.
TEST_P(SoftTarget, LargeGradients) {
  for (const pykd_dtype dtype : {PYKD_FLOAT32, PYKD_FLOAT16, PYKD_BFLOAT16}) {
    Settings settings;
    settings.dtype = dtype;
    settings.hard = Hard::kLabels;
    settings.temperature = 1.5f;
    const Data few = ordinary(settings, 5, 30011);
    Data data = few;
    data.rows = dtype == PYKD_FLOAT32 ? 75 : 150;
    data.student.clear();
    data.teacher.clear();
    for (std::size_t i = 0; i < data.rows / few.rows; ++i) {
      data.student.insert(data.student.end(), few.student.begin(), few.student.end());
      data.teacher.insert(data.teacher.end(), few.teacher.begin(), few.teacher.end());
    }
    for (std::size_t row = few.rows; row < data.rows; ++row) {
      data.labels.push_back(few.labels[row % few.rows]);
      data.soft_weight.push_back(few.soft_weight[row % few.rows]);
      data.hard_weight.push_back(few.hard_weight[row % few.rows]);
    }
    const Result small = run(settings, few), large = run(settings, data);
    for (std::size_t i = 0; i < data.student.size(); ++i) {
      ASSERT_EQ(large.gradient[i], small.gradient[i % few.student.size()]) << "entry " << i;
    }
    for (std::size_t row = 0; row < few.rows; ++row) {
      expect_row(settings, few, small, reference(settings, few, row), row);
    }
  }
}

// ---- The reference itself, and what is refused ---------------------------------------------------

TEST(SoftTargetReference, GradientIsTheDerivative) {
  for (Settings settings : all_settings()) {
    if (settings.dtype != PYKD_FLOAT32) continue;
    Data data = ordinary(settings, 1, 7);
    const Row row = reference(settings, data, 0);
    for (std::size_t j = 0; j < data.classes; ++j) {
      const double step = 1e-5;
      Data above = data, below = data;
      above.student[j] += step;
      below.student[j] -= step;
      const Row high = reference(settings, above, 0), low = reference(settings, below, 0);
      EXPECT_NEAR(row.soft_gradient[j], (high.soft - low.soft) / (2 * step), 1e-8) << describe(settings, data);
      EXPECT_NEAR(row.hard_gradient[j], (high.hard - low.hard) / (2 * step), 1e-8) << describe(settings, data);
    }
  }
}

TEST(SoftTargetRefuses, CallsThatMakeNoSense) {
  const Kernel* kernel = find("soft_target");
  ASSERT_NE(kernel, nullptr);
  float number = 1;
  const std::int64_t shape[2] = {1, 1};
  const auto refusal = [&](const std::vector<int>& given_inputs, const std::vector<int>& given_outputs, double form = 0,
                           double beta = 0.5) {
    Array inputs[7], outputs[3];
    for (const int i : given_inputs) inputs[i] = {&number, PYKD_FLOAT32, 2, shape};
    for (const int i : given_outputs) outputs[i] = {&number, PYKD_FLOAT32, 2, shape};
    const double attributes[3] = {form, 1, beta};
    const char* reason = kernel->refuse({inputs, outputs, attributes, PYKD_FLOAT32, nullptr});
    return std::string(reason == nullptr ? "" : reason);
  };
  using namespace soft_target;
  EXPECT_EQ(refusal({kStudent, kTeacher, kTemperature}, {kSoft}), "");
  EXPECT_EQ(refusal({kStudent, kLabels, kHardWeight}, {kHard, kGradStudent}), "");
  EXPECT_EQ(refusal({kStudent, kTeacher, kTemperature, kLabels, kLabelProbs}, {kSoft}),
            "it takes labels or label_probs, not both");
  EXPECT_EQ(refusal({kStudent}, {}), "it needs teacher, labels or label_probs");
  EXPECT_EQ(refusal({kStudent, kTeacher}, {kSoft}), "teacher needs temperature");
  EXPECT_EQ(refusal({kStudent, kLabels}, {kSoft}), "soft_weight and soft need teacher");
  EXPECT_EQ(refusal({kStudent, kLabels, kSoftWeight}, {kHard}), "soft_weight and soft need teacher");
  EXPECT_EQ(refusal({kStudent, kTeacher, kTemperature}, {kHard}), "hard_weight and hard need labels or label_probs");
  const std::vector<int> soft = {kStudent, kTeacher, kTemperature};
  EXPECT_EQ(refusal(soft, {kGradStudent}), "grad_student needs soft_weight or hard_weight");
  for (const double beta : {0.0, 1.0, -1.0, kNan}) {
    EXPECT_EQ(refusal(soft, {kSoft}, static_cast<double>(Form::kJsd), beta), "beta of jsd must lie between 0 and 1");
    EXPECT_EQ(refusal(soft, {kSoft}, static_cast<double>(Form::kKl), beta), "");
  }
}

}  // namespace
}  // namespace pykd::kernels
