// The kernel label_apart against a float64 reference written from the formulas in its header, on every instruction set
// of this machine.
#include "kernels/label_apart/label_apart.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/kernel.h"
#include "tests/every_target.h"
#include "tests/half_numbers.h"
#include "tests/row_results.h"

namespace pykd::kernels {
namespace {

using label_apart::Form;
using tests::on_every_target;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr Form kForms[] = {Form::kDecoupled, Form::kNormalized, Form::kCorrected, Form::kUniform, Form::kDecision};

struct Data {
  std::int64_t rows, classes;
  std::vector<float> student, teacher, weight;
  std::vector<std::int64_t> labels;
  pykd_dtype dtype = PYKD_FLOAT32;
  float temperature = 2.0f, target_weight = 1.5f, other_weight = 4.0f;
  double threshold = 0.3, label_probability = 0.7;
  bool raise_right = true, soften_student = true;
};

using Result = tests::RowResults;

// ---- The definition ------------------------------------------------------------------------------

using Logs = std::vector<double>;

double log_sum(const Logs& logs) {
  const double top = *std::max_element(logs.begin(), logs.end());
  double sum = 0;
  for (const double log : logs) sum += std::exp(log - top);
  return top + std::log(sum);
}

Logs log_softmax(Logs logits, double temperature) {
  for (double& logit : logits) logit /= temperature;
  const double total = log_sum(logits);
  for (double& logit : logits) logit -= total;
  return logits;
}

Logs without(Logs all, std::int64_t place) {
  all.erase(all.begin() + place);
  return all;
}

double times(double factor, double x) { return factor == 0 ? 0 : factor * x; }

double divergence(const Logs& log_p, const Logs& log_q) {
  double sum = 0;
  for (std::size_t c = 0; c < log_p.size(); ++c) sum += times(std::exp(log_p[c]), log_p[c] - log_q[c]);
  return sum;
}

struct Row {
  double value = 0;
  Logs gradient;
};

// KL(p || q) of logarithms, and its gradient for the logits of q.
Row whole(const Logs& log_p, const Logs& log_q, double temperature) {
  Row row{divergence(log_p, log_q), {}};
  for (std::size_t c = 0; c < log_p.size(); ++c) {
    row.gradient.push_back((std::exp(log_q[c]) - std::exp(log_p[c])) / temperature);
  }
  return row;
}

Row one_row(const Data& data, Form form, const Logs& student, const Logs& teacher, std::int64_t label) {
  const double temperature = data.temperature;
  if (form == Form::kDecision) {
    Logs log_p(student.size(), -std::numeric_limits<double>::infinity());
    log_p[std::max_element(teacher.begin(), teacher.end()) - teacher.begin()] = 0;
    return whole(log_p, log_softmax(student, 1), 1);
  }
  if (form == Form::kUniform) {
    const double own = data.label_probability, softened = data.soften_student ? temperature : 1;
    Logs virtual_logits(student.size(), (1 - own) / static_cast<double>(student.size() - 1));
    virtual_logits[label] = own;
    return whole(log_softmax(virtual_logits, temperature), log_softmax(student, softened), softened);
  }
  const Logs log_p = log_softmax(teacher, temperature), log_q = log_softmax(student, temperature);
  if (form == Form::kCorrected) {
    const auto largest = std::max_element(log_p.begin(), log_p.end()) - log_p.begin();
    const double p_label = std::exp(log_p[label]), lead = std::exp(log_p[largest]) - p_label;
    double share = (lead + data.threshold) / (1 + lead);
    if (largest == label) share = data.raise_right ? std::min(data.threshold / (1 - p_label), 1.0) : 0;
    if (p_label == 1) share = 0;
    Logs corrected;
    for (std::size_t c = 0; c < log_p.size(); ++c) {
      const double hot = static_cast<std::int64_t>(c) == label ? 1 : 0;
      corrected.push_back(std::log((1 - share) * std::exp(log_p[c]) + share * hot));
    }
    return whole(corrected, log_q, temperature);
  }
  Row row{0, Logs(student.size(), 0)};
  if (student.size() > 1) {
    const Logs others_p = log_softmax(without(teacher, label), temperature);
    const Logs others_q = log_softmax(without(student, label), temperature);
    for (std::size_t c = 0; c < others_p.size(); ++c) {
      const double p = std::exp(others_p[c]), q = std::exp(others_q[c]);
      const double own = form == Form::kDecoupled ? others_p[c] : 0;
      row.value += data.other_weight * times(p, own - others_q[c]);
      row.gradient[c + (static_cast<std::int64_t>(c) >= label ? 1 : 0)] = data.other_weight / temperature * (q - p);
    }
  }
  if (form == Form::kNormalized) {
    const Logs at_one = log_softmax(student, 1);
    const double p = std::exp(log_softmax(teacher, 1)[label]);
    row.value -= times(p, at_one[label]);
    for (std::size_t c = 0; c < student.size(); ++c) row.gradient[c] += p * std::exp(at_one[c]);
    row.gradient[label] -= p;
    return row;
  }
  const auto rest_of = [&](const Logs& logs) {
    return logs.size() == 1 ? -std::numeric_limits<double>::infinity() : log_sum(without(logs, label));
  };
  const double rest_p = rest_of(log_p), rest_q = rest_of(log_q);
  row.value += data.target_weight * divergence({log_p[label], rest_p}, {log_q[label], rest_q});
  const double p = std::exp(log_p[label]), q = std::exp(log_q[label]);
  const double apart = p > 0.5 ? std::exp(rest_p) - std::exp(rest_q) : q - p;
  for (std::size_t c = 0; c < student.size(); ++c) {
    const double share = static_cast<std::int64_t>(c) == label ? 1 : -std::exp(log_q[c] - rest_q);
    row.gradient[c] += data.target_weight / temperature * apart * share;
  }
  return row;
}

Result reference(const Data& data, Form form) {
  Result result;
  for (std::int64_t row = 0; row < data.rows; ++row) {
    const auto logits = [&](const std::vector<float>& all) {
      return Logs(all.begin() + row * data.classes, all.begin() + (row + 1) * data.classes);
    };
    const Row one = one_row(data, form, logits(data.student), logits(data.teacher), data.labels[row]);
    result.value.push_back(one.value);
    for (const double entry : one.gradient) result.gradient.push_back(double{data.weight[row]} * entry);
  }
  return result;
}

// ---- The kernel ----------------------------------------------------------------------------------

Result run(const Data& data, Form form, int thread_count = 1, unsigned char before = 0xFF) {
  const std::int64_t shape[] = {data.rows, data.classes};
  tests::Bytes student = tests::encode(data.dtype, data.student), teacher = tests::encode(data.dtype, data.teacher);
  std::vector<float> weight = data.weight;
  std::vector<std::int64_t> labels = data.labels;
  float temperature = data.temperature, target_weight = data.target_weight, other_weight = data.other_weight;
  const auto number = [](bool given, float* at) { return Array{given ? at : nullptr, PYKD_FLOAT32, 0, nullptr}; };
  const bool decides = form == Form::kDecision, decoupled = form == Form::kDecoupled;
  const std::vector<Array> inputs = {{student.data(), data.dtype, 2, shape},
                                     {form == Form::kUniform ? nullptr : teacher.data(), data.dtype, 2, shape},
                                     {decides ? nullptr : labels.data(), PYKD_INT64, 1, shape},
                                     number(!decides, &temperature),
                                     number(decoupled, &target_weight),
                                     number(decoupled || form == Form::kNormalized, &other_weight),
                                     {weight.data(), PYKD_FLOAT32, 1, shape}};
  return tests::run_rows("label_apart", data.dtype, inputs,
                         {static_cast<double>(form), data.threshold, data.raise_right ? 1.0 : 0.0,
                          data.label_probability, data.soften_student ? 1.0 : 0.0},
                         thread_count, before);
}

Data draw(std::int64_t rows, std::int64_t classes, float spread, pykd_dtype dtype = PYKD_FLOAT32) {
  std::mt19937 random(static_cast<unsigned>(classes));
  std::normal_distribution<float> normal(0, spread);
  Data data{rows, classes, {}, {}, {}, {}};
  data.dtype = dtype;
  for (std::int64_t i = 0; i < rows * classes; ++i) {
    data.student.push_back(tests::rounded(dtype, normal(random)));
    data.teacher.push_back(tests::rounded(dtype, normal(random)));
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    data.weight.push_back(0.5f + 0.25f * static_cast<float>(row % 5));
    // The first class, the last, that of the teacher, and others.
    const auto teacher = data.teacher.begin() + row * classes;
    const std::int64_t places[] = {0, classes - 1, std::max_element(teacher, teacher + classes) - teacher,
                                   static_cast<std::int64_t>(random() % static_cast<unsigned>(classes))};
    data.labels.push_back(places[row % 4]);
  }
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

TEST(LabelApart, IsItsFormula) {
  for_every_form([](Form form) {
    for (const std::int64_t classes : {1, 2, 7, 33, 300, 5000}) {
      for (const pykd_dtype dtype : {PYKD_FLOAT32, PYKD_FLOAT16, PYKD_BFLOAT16}) {
        expect_close(draw(4, classes, 2.0f, dtype), form, std::to_string(classes) + " classes");
      }
    }
  });
}

TEST(LabelApart, OfOtherSettingsIsItsFormula) {
  for_every_form([](Form form) {
    Data data = draw(8, 50, 2.0f);
    data.temperature = 1.0f;
    expect_close(data, form, "no temperature");
    data.temperature = 0.5f;
    data.raise_right = data.soften_student = false;
    expect_close(data, form, "cold");
    data.temperature = 20.0f;
    data.threshold = 1.0;
    expect_close(data, form, "hot");
    data.threshold = data.target_weight = 0.0;
    expect_close(data, form, "others alone");
    data.target_weight = 2.0f;
    data.other_weight = 0.0f;
    expect_close(data, form, "label alone");
  });
}

TEST(LabelApart, OfSureOnesIsItsFormula) {
  for_every_form([](Form form) {
    Data data = draw(8, 40, 25.0f);
    expect_close(data, form, "wide", 1e-5, 0.1);
    data.temperature = 0.5f;
    expect_close(data, form, "wider", 2e-5, 0.1);
    // The label so far above the others that 1 - p is 0 in float32: its logarithm is what counts.
    for (std::int64_t row = 0; row < data.rows; ++row) {
      data.student[row * data.classes + data.labels[row]] = 300.0f;
      data.teacher[row * data.classes + data.labels[row]] = 200.0f;
    }
    expect_close(data, form, "sure of the label", 2e-5, 1e-30);
  });
}

// Where 1 - p and 1 - q are far below the rounding of p and q, they are all of the label's gradient.
TEST(LabelApart, OfASureLabelKeepsItsDigits) {
  on_every_target([&] {
    Data data = draw(8, 40, 2.0f);
    data.other_weight = 0.0f;
    for (std::int64_t row = 0; row < data.rows; ++row) {
      data.student[row * data.classes + data.labels[row]] = 90.0f;
      data.teacher[row * data.classes + data.labels[row]] = 80.0f;
    }
    expect_close(data, Form::kDecoupled, "sure of the label", 2e-5, 1e-30);
  });
}

TEST(LabelApart, KnowsNoOffset) {
  for_every_form([](Form form) {
    Data data = draw(4, 21, 0.0f);
    for (std::int64_t i = 0; i < data.rows * data.classes; ++i) {
      data.student[i] = 10000.0f + static_cast<float>(i % 5);
      data.teacher[i] = -10000.0f + static_cast<float>(i % 7);
    }
    expect_close(data, form, "offsets");
  });
}

TEST(LabelApart, LeavesMaskedClassesOut) {
  for_every_form([](Form form) {
    if (form == Form::kUniform) return;  // which gives every class a probability
    Data data = draw(4, 29, 2.0f);
    data.labels = {1, 4, 28, 25};
    for (std::size_t i = 0; i < data.student.size(); i += 29) {
      for (const std::size_t c : {0, 3, 26, 27}) data.student[i + c] = data.teacher[i + c] = -kInfinity;
    }
    expect_close(data, form, "masked in both");
    for (std::size_t i = 0; i < data.student.size(); i += 29) data.teacher[i + 7] = data.teacher[i + 9] = -kInfinity;
    expect_close(data, form, "masked by the teacher");
    if (form == Form::kDecision) return;
    // The label alone is there; its logit is out; the student alone rules a class out.
    for (int c = 0; c < 29; ++c) data.student[c] = data.teacher[c] = c == 1 ? 2.0f : -kInfinity;
    data.teacher[29 + 4] = -kInfinity;
    data.student[2 * 29 + 5] = -kInfinity;
    const Result got = run(data, form);
    EXPECT_EQ(got.value[0], 0.0);
    EXPECT_TRUE(std::isfinite(got.value[1])) << static_cast<int>(form);
    EXPECT_EQ(got.value[2], double{kInfinity}) << static_cast<int>(form);
    for (int i = 0; i < 3 * 29; ++i) EXPECT_TRUE(std::isfinite(got.gradient[i])) << static_cast<int>(form) << i;
    for (int i = 0; i < 29; ++i) EXPECT_EQ(got.gradient[i], 0.0);
  });
}

TEST(LabelApart, OfEqualOnesIsZero) {
  on_every_target([&] {
    for (const pykd_dtype dtype : {PYKD_FLOAT32, PYKD_FLOAT16, PYKD_BFLOAT16}) {
      for (const float temperature : {1.0f, 3.0f, 50.0f}) {
        Data data = draw(4, 1234, 3.0f, dtype);
        data.temperature = temperature;
        data.teacher = data.student;
        const Result got = run(data, Form::kDecoupled);
        for (const double value : got.value) EXPECT_EQ(value, 0.0);
        for (const double entry : got.gradient) EXPECT_EQ(entry, 0.0);
      }
    }
  });
}

// Times T^2, as trainers have it, the divergence of two that are almost equal keeps its digits.
TEST(LabelApart, KeepsItsDigitsAtHighTemperatures) {
  on_every_target([&] {
    for (const float temperature : {200.0f, 20000.0f}) {
      Data data = draw(4, 5, 2.0f);
      data.temperature = temperature;
      const Result want = reference(data, Form::kDecoupled), got = run(data, Form::kDecoupled);
      double largest = 0;
      for (const double entry : want.gradient) largest = std::max(largest, std::abs(entry));
      for (std::int64_t row = 0; row < data.rows; ++row)
        EXPECT_NEAR(got.value[row] / want.value[row], 1.0, temperature > 1000 ? 2e-3 : 2e-4);
      for (std::size_t i = 0; i < want.gradient.size(); ++i) {
        EXPECT_NEAR(got.gradient[i], want.gradient[i], 2e-4 * largest);
      }
    }
  });
}

TEST(LabelApart, TakesTheFirstOfTheLargest) {
  on_every_target([&] {
    Data data = draw(4, 70, 1.0f);
    for (std::int64_t row = 0; row < data.rows; ++row) {
      for (const int c : {11, 12, 60}) data.teacher[row * data.classes + c] = 5.0f;
    }
    data.labels = {11, 12, 60, 0};
    expect_close(data, Form::kDecision, "ties");
    expect_close(data, Form::kCorrected, "ties");
  });
}

TEST(LabelApart, WeighsItsRows) {
  for_every_form([](Form form) {
    Data data = draw(4, 9, 2.0f);
    data.weight = {1.0f, 0.0f, -2.0f, 0.0f};
    data.student[9] = kNaN;
    data.labels[3] = form == Form::kDecision ? 0 : -100;  // an ignored label
    if (form == Form::kDecision) data.teacher[28] = kNaN;
    Data kept = data;
    kept.labels[3] = 0;
    const Result want = reference(kept, form), got = run(data, form);
    EXPECT_TRUE(std::isnan(got.value[1]) && std::isnan(got.value[3]));
    for (const int row : {0, 1, 2, 3}) {
      for (int i = 9 * row; i < 9 * row + 9; ++i) {
        EXPECT_NEAR(got.gradient[i], row % 2 == 0 ? want.gradient[i] : 0.0, 3e-6) << row;
      }
    }
  });
}

TEST(LabelApart, OfALabelThatIsNoClassIsNaN) {
  for_every_form([](Form form) {
    if (form == Form::kDecision) return;
    for (const std::int64_t label : {-1, 9, std::numeric_limits<int>::max()}) {
      Data data = draw(2, 9, 2.0f);
      data.labels[1] = label;
      const Result got = run(data, form, 1, 0);
      EXPECT_TRUE(std::isfinite(got.value[0]) && std::isnan(got.value[1]));
      for (int i = 0; i < 9; ++i) EXPECT_TRUE(std::isfinite(got.gradient[i]) && std::isnan(got.gradient[9 + i]));
    }
  });
}

TEST(LabelApart, IsTheSameOnThreads) {
  for_every_form([](Form form) {
    const Data data = draw(70, 2000, 2.0f);
    const Result one = run(data, form), many = run(data, form, 5);
    EXPECT_TRUE(one.value == many.value && one.gradient == many.gradient);
  });
}

TEST(LabelApart, RefusesWhatMakesNoSense) {
  const Data data = draw(1, 3, 1.0f);
  const auto refused = [&](Form form, const std::function<void(Data&)>& change) {
    Data other = data;
    change(other);
    EXPECT_ANY_THROW(run(other, form));
  };
  for (const float temperature : {0.0f, -1.0f, kNaN, kInfinity}) {
    refused(Form::kUniform, [=](Data& other) { other.temperature = temperature; });
  }
  for (const float weight : {-1.0f, kNaN, kInfinity}) {
    refused(Form::kDecoupled, [=](Data& other) { other.target_weight = weight; });
    refused(Form::kNormalized, [=](Data& other) { other.other_weight = weight; });
  }
  for (const double threshold : {-0.1, 1.1}) {
    refused(Form::kCorrected, [=](Data& other) { other.threshold = threshold; });
  }
  for (const double own : {0.0, 1.0}) refused(Form::kUniform, [=](Data& other) { other.label_probability = own; });
  for (const Form form : kForms) EXPECT_NO_THROW(run(data, form));
}

}  // namespace
}  // namespace pykd::kernels
