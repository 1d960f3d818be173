// The kernel divergence against a float64 reference written from the formulas in its header, on every instruction set
// of this machine.
#include "kernels/divergence/divergence.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/kernel.h"
#include "tests/every_target.h"
#include "tests/half_numbers.h"
#include "tests/row_results.h"

namespace pykd::kernels {
namespace {

using divergence::Form;
using tests::on_every_target;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr Form kForms[] = {Form::kSkewedKl,  Form::kSkewedReverseKl, Form::kTotalVariation,
                           Form::kAlphaBeta, Form::kBalancedKl,      Form::kAdaptiveKl};

struct Data {
  std::int64_t rows, classes;
  std::vector<float> student, teacher, weight;
  pykd_dtype dtype = PYKD_FLOAT32;
  float temperature = 2.0f, emphasis = 3.0f;
  double alpha = 0.3, beta = 0.6, head_mass = 0.6;
  divergence::Boundary boundary = divergence::Boundary::kHead;
};

using Result = tests::RowResults;

// ---- The definition ------------------------------------------------------------------------------

std::vector<double> log_softmax(const float* logits, std::int64_t classes, double temperature) {
  std::vector<double> logs(logits, logits + classes);
  const double top = *std::max_element(logs.begin(), logs.end());
  double sum = 0;
  for (const double log : logs) sum += std::exp((log - top) / temperature);
  for (double& log : logs) log = (log - top) / temperature - std::log(sum);
  return logs;
}

double times(double factor, double x) { return factor == 0 ? 0 : factor * x; }

double entropy(const std::vector<double>& logs) {
  double sum = 0;
  for (const double log : logs) sum -= times(std::exp(log), log);
  return sum;
}

// What the forward and the reverse divergence of adaptive_kl count for, class by class from the likeliest on.
std::pair<double, double> shares(const Data& data, const std::vector<double>& log_p, const std::vector<double>& log_q) {
  std::vector<std::size_t> order;
  for (std::size_t c = 0; c < log_p.size(); ++c) order.push_back(c);
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return log_p[a] > log_p[b]; });
  double head = 0, tail = 0, mass = 0;
  for (const std::size_t c : order) {
    const double p = std::exp(log_p[c]), apart = std::abs(p - std::exp(log_q[c]));
    const bool of_head =
        data.boundary == divergence::Boundary::kHead ? mass < data.head_mass : mass + p <= data.head_mass;
    (of_head || c == order[0] ? head : tail) += apart;
    mass += p;
  }
  const double all = head + tail;
  return all == 0 ? std::pair(0.0, 0.0) : std::pair(head / all, tail / all);
}

// What a class adds to the value, and d(that)/d(log q).
struct Class {
  double value, slope;
};

Class one_class(const Data& data, Form form, double log_p, double log_q, double of_teacher, double of_student) {
  const double p = std::exp(log_p), q = std::exp(log_q), a = data.alpha, b = data.beta;
  switch (form) {
    case Form::kSkewedKl: {
      const double m = a * p + (1 - a) * q;
      return p == 0 ? Class{0, 0} : Class{p * std::log(p / m), -p * (1 - a) * q / m};
    }
    case Form::kSkewedReverseKl: {
      const double m = a * q + (1 - a) * p;
      return q == 0 ? Class{0, 0} : Class{q * std::log(q / m), q * (std::log(q / m) + 1 - a * q / m)};
    }
    case Form::kTotalVariation:
      return {std::abs(p - q) / 2, q > p ? q / 2 : q < p ? -q / 2 : 0};
    case Form::kAlphaBeta:
      return {(a * std::pow(p, a + b) + b * std::pow(q, a + b)) / ((a + b) * a * b) -
                  std::pow(p, a) * std::pow(q, b) / (a * b),
              (std::pow(q, a + b) - std::pow(p, a) * std::pow(q, b)) / a};
    case Form::kBalancedKl:
    case Form::kAdaptiveKl:
      break;
  }
  const double apart = times(q, log_q - log_p);
  return {of_teacher * times(p, log_p - log_q) + of_student * apart, -of_teacher * p + of_student * (apart + q)};
}

Result reference(const Data& data, Form form) {
  Result result;
  for (std::int64_t row = 0; row < data.rows; ++row) {
    const std::vector<double> log_p = log_softmax(&data.teacher[row * data.classes], data.classes, data.temperature);
    const std::vector<double> log_q = log_softmax(&data.student[row * data.classes], data.classes, data.temperature);
    const double of_p = entropy(log_p), of_q = entropy(log_q);
    double w = of_p > of_q ? data.emphasis : 1, v = of_q > of_p ? data.emphasis : 1;
    if (form == Form::kAdaptiveKl) std::tie(w, v) = shares(data, log_p, log_q);
    double value = 0, mean = 0;
    std::vector<double> slopes;
    for (std::int64_t c = 0; c < data.classes; ++c) {
      const bool absent = std::isinf(log_p[c]) && std::isinf(log_q[c]);
      const Class one = absent ? Class{0, 0} : one_class(data, form, log_p[c], log_q[c], w, v);
      value += one.value;
      mean += one.slope;
      slopes.push_back(one.slope);
    }
    result.value.push_back(value);
    for (std::int64_t c = 0; c < data.classes; ++c) {
      result.gradient.push_back(double{data.weight[row]} / data.temperature * (slopes[c] - std::exp(log_q[c]) * mean));
    }
  }
  return result;
}

// ---- The kernel ----------------------------------------------------------------------------------

Result run(const Data& data, Form form, int thread_count = 1) {
  const std::int64_t shape[] = {data.rows, data.classes};
  tests::Bytes student = tests::encode(data.dtype, data.student), teacher = tests::encode(data.dtype, data.teacher);
  std::vector<float> weight = data.weight;
  float temperature = data.temperature, emphasis = data.emphasis;
  const bool balanced = form == Form::kBalancedKl;
  const std::vector<Array> inputs = {{student.data(), data.dtype, 2, shape},
                                     {teacher.data(), data.dtype, 2, shape},
                                     {&temperature, PYKD_FLOAT32, 0, nullptr},
                                     {balanced ? &emphasis : nullptr, PYKD_FLOAT32, 0, nullptr},
                                     {weight.data(), PYKD_FLOAT32, 1, shape}};
  return tests::run_rows(
      "divergence", data.dtype, inputs,
      {static_cast<double>(form), data.alpha, data.beta, data.head_mass, static_cast<double>(data.boundary)},
      thread_count);
}

Data draw(std::int64_t rows, std::int64_t classes, float spread, pykd_dtype dtype = PYKD_FLOAT32) {
  std::mt19937 random(static_cast<unsigned>(classes));
  std::normal_distribution<float> normal(0, spread);
  Data data{rows, classes, {}, {}, {}};
  data.dtype = dtype;
  for (std::int64_t i = 0; i < rows * classes; ++i) {
    data.student.push_back(tests::rounded(dtype, normal(random)));
    data.teacher.push_back(tests::rounded(dtype, normal(random)));
  }
  for (std::int64_t row = 0; row < rows; ++row) data.weight.push_back(0.5f + 0.25f * static_cast<float>(row % 5));
  return data;
}

void expect_close(const Data& data, Form form, const std::string& what, double exactness = 3e-6, double least = 1e-2) {
  const Result want = reference(data, form), got = run(data, form);
  const std::string where = what + ", form " + std::to_string(static_cast<int>(form));
  tests::expect_rows_close(got, want, data.dtype, where, exactness, least);
  for (const double value : got.value) EXPECT_GE(value, 0) << where;
}

template <class Check>
void for_every_form(const Check& check) {
  tests::for_every_form(kForms, check);
}

// ---- The tests -----------------------------------------------------------------------------------

TEST(Divergence, IsItsFormula) {
  for_every_form([](Form form) {
    for (const std::int64_t classes : {1, 2, 7, 33, 300, 5000}) {
      for (const pykd_dtype dtype : {PYKD_FLOAT32, PYKD_FLOAT16, PYKD_BFLOAT16}) {
        expect_close(draw(3, classes, 2.0f, dtype), form, std::to_string(classes) + " classes");
      }
    }
  });
}

TEST(Divergence, OfSureOnesIsItsFormula) {
  for_every_form([](Form form) {
    Data data = draw(6, 40, 25.0f);
    // Where one class has nearly all, the gradient is a difference of slopes of which little is left.
    expect_close(data, form, "wide", 1e-5, 0.1);
    data.temperature = 0.5f;
    expect_close(data, form, "wider", 2e-5, 0.1);
  });
}

// Heads of one class, of nearly all, and cut among classes of one probability; `tail` leaves out the class that passes.
TEST(Divergence, FindsTheHead) {
  on_every_target([] {
    for (const double mass : {0.01, 0.3, 0.5, 0.9, 0.999}) {
      for (const divergence::Boundary boundary : {divergence::Boundary::kHead, divergence::Boundary::kTail}) {
        for (const float spread : {0.001f, 2.0f, 30.0f}) {
          Data data = draw(3, 777, spread);
          data.head_mass = mass;
          data.boundary = boundary;
          for (int i = 0; i < 777; ++i) data.teacher[i] = spread * static_cast<float>(i * 7 % 4);  // four logits
          data.teacher[777 + 5] = data.teacher[777 + 300] = -kInfinity;
          data.student[777 + 5] = data.student[777 + 300] = -kInfinity;
          expect_close(data, Form::kAdaptiveKl, "head of " + std::to_string(mass), spread > 9 ? 1e-5 : 3e-6);
        }
      }
    }
  });
}

// A divergence without a weight counts for nothing, even where it is infinite.
TEST(Divergence, WithoutAShareCountsForNothing) {
  on_every_target([] {
    Data data = draw(1, 4, 1.0f);
    data.temperature = 1.0f;
    data.head_mass = 0.3;  // two classes, which the student takes for as likely
    data.teacher = {0.0f, 0.0f, 0.0f, 0.0f};
    data.student = {0.0f, 0.0f, std::log(2.0f), -kInfinity};
    EXPECT_NEAR(run(data, Form::kAdaptiveKl).value[0], 0.5 * std::log(2.0), 1e-6);
  });
}

TEST(Divergence, KnowsNoOffset) {
  for_every_form([](Form form) {
    Data data = draw(3, 21, 0.0f);
    for (std::int64_t i = 0; i < data.rows * data.classes; ++i) {
      data.student[i] = 20000.0f + static_cast<float>(i % 5);
      data.teacher[i] = -3000.0f + static_cast<float>(i % 7);
    }
    expect_close(data, form, "offsets");
  });
}

TEST(Divergence, LeavesMaskedClassesOut) {
  for_every_form([](Form form) {
    Data data = draw(4, 29, 2.0f);
    for (std::size_t i = 0; i < data.student.size(); i += 3) data.student[i] = data.teacher[i] = -kInfinity;
    expect_close(data, form, "masked in both");
    if (form == Form::kBalancedKl || form == Form::kAdaptiveKl) return;  // infinite where one of them masks a class
    for (std::size_t i = 1; i < data.student.size(); i += 6) data.student[i] = -kInfinity;
    for (std::size_t i = 4; i < data.student.size(); i += 6) data.teacher[i] = -kInfinity;
    expect_close(data, form, "masked in one");
  });
}

TEST(Divergence, OfEqualOnesIsZero) {
  for_every_form([](Form form) {
    for (const pykd_dtype dtype : {PYKD_FLOAT32, PYKD_FLOAT16, PYKD_BFLOAT16}) {
      for (const float temperature : {1.0f, 3.0f, 50.0f}) {
        Data data = draw(3, 1234, 3.0f, dtype);
        data.temperature = temperature;
        data.teacher = data.student;
        const Result got = run(data, form);
        for (const double value : got.value) EXPECT_EQ(value, 0.0);
        for (const double entry : got.gradient) EXPECT_EQ(entry, 0.0);
      }
    }
  });
}

// Times T^2, as trainers have it, the divergence of two that are almost equal keeps its digits.
TEST(Divergence, KeepsItsDigitsAtHighTemperatures) {
  for_every_form([](Form form) {
    for (const float temperature : {200.0f, 20000.0f}) {
      Data data = draw(3, 100, 2.0f);
      data.temperature = temperature;
      const Result want = reference(data, form), got = run(data, form);
      for (std::int64_t row = 0; row < data.rows; ++row) {
        EXPECT_NEAR(got.value[row] / want.value[row], 1.0, temperature > 1000 ? 2e-3 : 2e-4) << static_cast<int>(form);
      }
      double largest = 0;
      for (const double entry : want.gradient) largest = std::max(largest, std::abs(entry));
      for (std::size_t i = 0; i < want.gradient.size(); ++i) {
        EXPECT_NEAR(got.gradient[i], want.gradient[i], 2e-4 * largest) << static_cast<int>(form);
      }
    }
  });
}

TEST(Divergence, WeighsItsRows) {
  for_every_form([](Form form) {
    Data data = draw(4, 9, 2.0f);
    data.weight = {1.0f, 0.0f, -2.0f, 0.0f};
    data.student[9] = kNaN;
    data.teacher[28] = kInfinity;
    const Result want = reference(data, form), got = run(data, form);
    EXPECT_TRUE(std::isnan(got.value[1]) && std::isnan(got.value[3]));
    for (const int row : {0, 1, 2, 3}) {
      for (int i = 9 * row; i < 9 * row + 9; ++i) {
        EXPECT_NEAR(got.gradient[i], row % 2 == 0 ? want.gradient[i] : 0.0, 2e-7) << row;
      }
    }
  });
}

TEST(Divergence, IsTheSameOnThreads) {
  for_every_form([](Form form) {
    const Data data = draw(70, 2000, 2.0f);
    const Result one = run(data, form), many = run(data, form, 5);
    EXPECT_TRUE(one.value == many.value && one.gradient == many.gradient);
  });
}

TEST(Divergence, RefusesWhatMakesNoSense) {
  Data data = draw(1, 3, 1.0f);
  const auto refused = [&](Form form, const std::function<void(Data&)>& change) {
    Data other = data;
    change(other);
    EXPECT_ANY_THROW(run(other, form));
  };
  for (const float temperature : {0.0f, -1.0f, kNaN, kInfinity}) {
    refused(Form::kTotalVariation, [=](Data& other) { other.temperature = temperature; });
  }
  for (const double alpha : {0.0, 1.0, -0.5}) refused(Form::kSkewedKl, [=](Data& other) { other.alpha = alpha; });
  refused(Form::kAlphaBeta, [](Data& other) { other.alpha = 0.0; });
  refused(Form::kAlphaBeta, [](Data& other) { other.beta = -0.1; });
  refused(Form::kBalancedKl, [](Data& other) { other.emphasis = -1.0f; });
  for (const double mass : {0.0, 1.0, -0.5}) refused(Form::kAdaptiveKl, [=](Data& other) { other.head_mass = mass; });
  refused(Form::kSkewedKl, [](Data& other) { other.boundary = divergence::Boundary::kTail; });
  EXPECT_NO_THROW(run(data, Form::kAlphaBeta));
}

}  // namespace
}  // namespace pykd::kernels
