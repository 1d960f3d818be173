// The kernel top_k against a float64 reference written from the formulas in its header, whose gradient is a difference
// quotient, on every instruction set of this machine.
#include "kernels/top_k/top_k.h"

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

using tests::on_every_target;
using top_k::Average;
using top_k::Form;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr Form kForms[] = {Form::kTail,          Form::kGhost,         Form::kRenormalized,
                           Form::kZero,          Form::kUnnormalized,  Form::kSampled,
                           Form::kPairwiseHinge, Form::kConstantHinge, Form::kLogistic};

struct Data {
  std::int64_t rows, classes, entries;
  std::vector<float> student, teacher, weight;
  std::vector<std::int64_t> ids;
  pykd_dtype dtype = PYKD_FLOAT32;
  float temperature = 2.0f;
  Average average = Average::kPairs;
  double margin = 0.2;
};

using Result = tests::RowResults;

// ---- The definition ------------------------------------------------------------------------------

std::vector<double> log_softmax(std::vector<double> logs) {
  const double top = *std::max_element(logs.begin(), logs.end());
  double sum = 0;
  for (const double log : logs) sum += std::exp(log - top);
  for (double& log : logs) log -= top + std::log(sum);
  return logs;
}

double times(double factor, double x) { return factor == 0 ? 0 : factor * x; }

double log_sum(const std::vector<double>& logs) {
  double top = -double{kInfinity}, sum = 0;
  for (const double log : logs) top = std::max(top, log);
  if (top == -double{kInfinity}) return top;
  for (const double log : logs) sum += std::exp(log - top);
  return top + std::log(sum);
}

// The value of a row whose student's logits are these; the constants of `sampled` are those of `base`.
double value_of(const Data& data, Form form, std::int64_t row, const std::vector<double>& logits,
                const std::vector<double>& base) {
  const auto scaled = [&](std::vector<double> x) {
    for (double& entry : x) entry /= data.temperature;
    return x;
  };
  std::vector<std::size_t> ids;
  std::vector<double> t, chosen;
  for (std::int64_t i = row * data.entries; i < (row + 1) * data.entries; ++i) {
    if (std::isinf(data.teacher[i]) && form != Form::kSampled) continue;
    ids.push_back(static_cast<std::size_t>(data.ids[i]));
    t.push_back(double{data.teacher[i]});
    chosen.push_back(logits[ids.back()]);
  }
  const std::vector<double> log_q_of_all = log_softmax(scaled(logits)), log_q_of_base = log_softmax(scaled(base));
  std::vector<double> log_q, log_p = t;
  for (const std::size_t id : ids) log_q.push_back(log_q_of_all[id]);
  if (form == Form::kRenormalized) log_q = log_softmax(scaled(chosen));
  if (form == Form::kRenormalized || form == Form::kZero) log_p = log_softmax(scaled(t));
  double value = 0, mass = 0;
  std::size_t pairs = 0;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (form == Form::kSampled) {
      value += (log_q_of_base[ids[i]] - t[i]) * log_q[i];
    } else if (form < Form::kPairwiseHinge) {
      value += times(std::exp(log_p[i]), log_p[i] - log_q[i]);
      mass += std::exp(log_p[i]);
    }
    for (std::size_t j = 0; j < ids.size() && form >= Form::kPairwiseHinge; ++j) {
      if (!(t[i] > t[j])) continue;
      ++pairs;
      if (form == Form::kLogistic) {
        const double apart = (chosen[j] - chosen[i]) / data.temperature;
        value += std::max(apart, 0.0) + std::log1p(std::exp(-std::abs(apart)));
      } else {
        const double least = form == Form::kConstantHinge ? data.margin : std::exp(t[i]) - std::exp(t[j]);
        value += std::max(0.0, least - (std::exp(log_q[i]) - std::exp(log_q[j])));
      }
    }
  }
  if (data.average == Average::kSamples && pairs > 0) value /= static_cast<double>(pairs);
  if (form == Form::kTail || form == Form::kGhost) {
    std::vector<double> others;
    for (std::size_t c = 0; c < logits.size(); ++c) {
      if (std::find(ids.begin(), ids.end(), c) == ids.end()) others.push_back(log_q_of_all[c]);
    }
    double p = std::max(1 - mass, 0.0), log_q_outside = log_sum(others);
    if (form == Form::kGhost) {
      p = std::max(p, 1e-8);
      log_q_outside = std::max(log_q_outside, std::log(1e-8));
    } else if (std::isinf(log_q_outside) && p < 1e-5) {
      p = 0;
    }
    value += times(p, std::log(p) - log_q_outside);
  }
  return value;
}

Result reference(const Data& data, Form form) {
  constexpr double kStep = 1e-5;
  Result result;
  for (std::int64_t row = 0; row < data.rows; ++row) {
    const auto begin = data.student.begin() + row * data.classes;
    const std::vector<double> base(begin, begin + data.classes);
    result.value.push_back(value_of(data, form, row, base, base));
    for (std::size_t c = 0; c < base.size(); ++c) {
      std::vector<double> up = base, down = base;
      up[c] += kStep;
      down[c] -= kStep;
      const bool constant = std::isinf(base[c]);
      const double change = constant ? 0 : value_of(data, form, row, up, base) - value_of(data, form, row, down, base);
      result.gradient.push_back(double{data.weight[row]} * change / (2 * kStep));
    }
  }
  return result;
}

// ---- The kernel ----------------------------------------------------------------------------------

Result run(const Data& data, Form form, int thread_count = 1) {
  const std::int64_t shape[] = {data.rows, data.classes}, of_entries[] = {data.rows, data.entries};
  tests::Bytes student = tests::encode(data.dtype, data.student), teacher = tests::encode(data.dtype, data.teacher);
  std::vector<std::int64_t> ids = data.ids;
  std::vector<float> weight = data.weight;
  float temperature = data.temperature;
  const std::vector<Array> inputs = {{student.data(), data.dtype, 2, shape},
                                     {teacher.data(), data.dtype, 2, of_entries},
                                     {ids.data(), PYKD_INT64, 2, of_entries},
                                     {&temperature, PYKD_FLOAT32, 0, nullptr},
                                     {weight.data(), PYKD_FLOAT32, 1, shape}};
  return tests::run_rows("top_k", data.dtype, inputs,
                         {static_cast<double>(form), static_cast<double>(data.average), data.margin}, thread_count);
}

// The teacher's likeliest classes, by its probabilities of all; a hundredth of these is elsewhere, so that however they
// are rounded they are no more than 1.
Data draw(std::int64_t rows, std::int64_t classes, std::int64_t entries, float spread,
          pykd_dtype dtype = PYKD_FLOAT32) {
  std::mt19937 random(static_cast<unsigned>(classes));
  std::normal_distribution<float> normal(0, spread);
  Data data{rows, classes, entries, {}, {}, {}, {}};
  data.dtype = dtype;
  for (std::int64_t row = 0; row < rows; ++row) {
    std::vector<double> logits;
    std::vector<std::int64_t> order;
    for (std::int64_t c = 0; c < classes; ++c) {
      data.student.push_back(tests::rounded(dtype, normal(random)));
      logits.push_back(double{normal(random)});
      order.push_back(c);
    }
    const std::vector<double> log_p = log_softmax(logits);
    std::sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return log_p[a] > log_p[b]; });
    for (std::int64_t i = 0; i < entries; ++i) {
      data.ids.push_back(order[i]);
      data.teacher.push_back(tests::rounded(dtype, static_cast<float>(log_p[order[i]] - 0.01)));
    }
    data.weight.push_back(0.5f + 0.25f * static_cast<float>(row % 5));
  }
  return data;
}

void expect_close(const Data& data, Form form, const std::string& what, double exactness = 3e-6, double least = 1e-2) {
  const Result want = reference(data, form), got = run(data, form);
  const std::string where = what + ", form " + std::to_string(static_cast<int>(form));
  tests::expect_rows_close(got, want, data.dtype, where, exactness, least);
}

template <class Check>
void for_every_form(const Check& check) {
  tests::for_every_form(kForms, check);
}

// ---- The tests -----------------------------------------------------------------------------------

TEST(TopK, IsItsFormula) {
  for_every_form([](Form form) {
    for (const std::int64_t classes : {1, 2, 7, 33, 120}) {
      for (const std::int64_t entries : {std::int64_t{1}, std::min<std::int64_t>(5, classes), classes}) {
        if (entries > 33) continue;
        for (const pykd_dtype dtype : {PYKD_FLOAT32, PYKD_FLOAT16, PYKD_BFLOAT16}) {
          const Data data = draw(2, classes, entries, 2.0f, dtype);
          if (form == Form::kTail && entries == classes) continue;  // +inf, see below
          expect_close(data, form, std::to_string(entries) + " of " + std::to_string(classes) + " classes");
        }
      }
    }
  });
}

TEST(TopK, AveragesPairs) {
  on_every_target([&] {
    for (const Form form : {Form::kPairwiseHinge, Form::kConstantHinge, Form::kLogistic}) {
      Data data = draw(3, 40, 19, 1.0f);
      data.average = Average::kSamples;
      data.temperature = 1.0f;
      data.teacher[3] = data.teacher[4];  // no pair
      expect_close(data, form, "mean of pairs");
    }
  });
}

TEST(TopK, OfSureOnesIsItsFormula) {
  for_every_form([](Form form) {
    Data data = draw(6, 40, 9, 25.0f);
    expect_close(data, form, "wide", 1e-5, 0.1);
    data.temperature = 0.5f;
    expect_close(data, form, "wider", 1e-5, 0.1);
  });
}

TEST(TopK, KnowsNoOffset) {
  for_every_form([](Form form) {
    Data data = draw(3, 21, 6, 1.0f);
    for (std::int64_t i = 0; i < data.rows * data.classes; ++i) data.student[i] = 10000.0f + static_cast<float>(i % 5);
    expect_close(data, form, "offset");
  });
}

TEST(TopK, LeavesMaskedClassesAndAbsentEntriesOut) {
  for_every_form([](Form form) {
    Data data = draw(4, 29, 6, 2.0f);
    for (std::size_t i = 0; i < data.student.size(); i += 3) {
      const auto row = data.ids.begin() + static_cast<std::ptrdiff_t>(i / 29 * 6);
      if (std::find(row, row + 6, static_cast<std::int64_t>(i % 29)) == row + 6) data.student[i] = -kInfinity;
    }
    expect_close(data, form, "masked");
    if (form == Form::kSampled) return;  // every entry is one that was drawn
    for (std::size_t i = 1; i < data.ids.size(); i += 4) {
      data.teacher[i] = -kInfinity;
      data.ids[i] = i % 8 == 1 ? -5 : 1000;
    }
    expect_close(data, form, "absent");
  });
}

TEST(TopK, CountsAClassTwiceThatIsThereTwice) {
  for_every_form([](Form form) {
    for (const pykd_dtype dtype : {PYKD_FLOAT32, PYKD_BFLOAT16}) {
      Data data = draw(3, 30, 7, 2.0f, dtype);
      for (std::int64_t row = 0; row < 3; ++row) {
        data.ids[row * 7 + 5] = data.ids[row * 7 + 6] = data.ids[row * 7 + 1];
        for (int i = 0; i < 7; ++i) data.teacher[row * 7 + i] -= 1.0f;
      }
      for (float& number : data.teacher) number = tests::rounded(dtype, number);
      expect_close(data, form, "twice");
    }
  });
}

TEST(TopK, OfAClassOutOfRangeIsNaN) {
  for_every_form([](Form form) {
    for (const std::int64_t wrong : {std::int64_t{-1}, std::int64_t{9}, std::int64_t{1} << 40}) {
      Data data = draw(4, 9, 3, 1.0f);
      data.ids[4] = data.ids[11] = wrong;
      data.weight[3] = 0;
      const Result got = run(data, form);
      for (int row = 0; row < 4; ++row) {
        EXPECT_EQ(std::isnan(got.value[row]), row % 2 == 1) << row;
        for (int i = 9 * row; i < 9 * row + 9; ++i) {
          EXPECT_EQ(std::isnan(got.gradient[i]), row == 1) << row;
          if (row == 3) {
            EXPECT_EQ(got.gradient[i], 0.0);
          }
        }
      }
    }
  });
}

// A tail of which float32 would leave nothing beside the entries, on either side.
TEST(TopK, KnowsSmallTails) {
  on_every_target([] {
    Data data = draw(2, 50, 4, 1.0f);
    for (std::int64_t row = 0; row < 2; ++row) {
      for (std::int64_t c = 0; c < 50; ++c) data.student[row * 50 + c] -= row == 0 ? 30.0f : 400.0f;
      for (int i = 0; i < 4; ++i) data.student[row * 50 + data.ids[row * 4 + i]] = 0.5f * static_cast<float>(i);
    }
    data.temperature = 1.0f;
    expect_close(data, Form::kTail, "small", 3e-6, 1.0);
    expect_close(data, Form::kGhost, "small", 3e-6, 1.0);
  });
}

TEST(TopK, HasNoTailWhereThereIsNoClassForIt) {
  on_every_target([] {
    Data data = draw(2, 5, 5, 1.0f);
    EXPECT_EQ(run(data, Form::kTail).value[0], double{kInfinity});  // a hundredth is missing
    for (int i = 0; i < 10; ++i) data.teacher[i] = std::log(i % 5 == 0 ? 0.5f : 0.125f);
    expect_close(data, Form::kTail, "all classes");
    const Result tail = run(data, Form::kTail), zero = run(data, Form::kUnnormalized);
    for (int row = 0; row < 2; ++row) EXPECT_NEAR(tail.value[row], zero.value[row], 1e-6);
  });
}

// Of a student that agrees on the entries: no divergence, and nothing to learn.
TEST(TopK, OfEqualOnesIsNothing) {
  on_every_target([] {
    for (const float temperature : {1.0f, 3.0f, 50.0f}) {
      Data data = draw(3, 1234, 20, 3.0f);
      data.temperature = temperature;
      for (std::int64_t row = 0; row < 3; ++row) {
        std::vector<double> scores;
        for (int c = 0; c < 1234; ++c) scores.push_back(double{data.student[row * 1234 + c]} / temperature);
        const std::vector<double> log_q = log_softmax(scores);
        for (int i = 0; i < 20; ++i) {
          data.teacher[row * 20 + i] = static_cast<float>(log_q[static_cast<std::size_t>(data.ids[row * 20 + i])]);
        }
      }
      const Result got = run(data, Form::kTail);
      for (const double value : got.value) EXPECT_TRUE(value >= 0 && value < 1e-10 / temperature) << value;
      for (const double entry : got.gradient) EXPECT_NEAR(entry, 0.0, 3e-7 / temperature);
    }
  });
}

TEST(TopK, WeighsItsRows) {
  for_every_form([](Form form) {
    Data data = draw(4, 9, 3, 1.0f);
    data.weight = {1.0f, 0.0f, -2.0f, 0.0f};
    data.student[9 + data.ids[3]] = kNaN;
    data.teacher[10] = kNaN;
    const Result want = reference(data, form), got = run(data, form);
    EXPECT_TRUE(std::isnan(got.value[1]) && std::isnan(got.value[3]));
    for (const int row : {0, 1, 2, 3}) {
      for (int i = 9 * row; i < 9 * row + 9; ++i) {
        EXPECT_NEAR(got.gradient[i], row % 2 == 0 ? want.gradient[i] : 0.0, 2e-6) << row;
      }
    }
  });
}

TEST(TopK, IsTheSameOnThreadsAndPastTheCaches) {
  for_every_form([](Form form) {
    const Data data = draw(70, 2000, 20, 2.0f);
    const Result one = run(data, form), many = run(data, form, 5);
    EXPECT_TRUE(one.value == many.value && one.gradient == many.gradient);
    if (form != Form::kTail && form != Form::kRenormalized) return;  // as the others are written, too
    Data large = data;
    for (int i = 0; i < 4; ++i) {  // beyond kStreamedBytes
      large.rows *= 2;
      large.student.insert(large.student.end(), large.student.begin(), large.student.end());
      large.teacher.insert(large.teacher.end(), large.teacher.begin(), large.teacher.end());
      large.ids.insert(large.ids.end(), large.ids.begin(), large.ids.end());
      large.weight.insert(large.weight.end(), large.weight.begin(), large.weight.end());
    }
    const Result streamed = run(large, form, 2);
    EXPECT_TRUE(std::equal(one.gradient.begin(), one.gradient.end(), streamed.gradient.end() - 140000));
  });
}

TEST(TopK, RefusesWhatMakesNoSense) {
  const Data data = draw(1, 3, 2, 1.0f);
  const auto refused = [&](Form form, const std::function<void(Data&)>& change) {
    Data other = data;
    change(other);
    EXPECT_ANY_THROW(run(other, form));
  };
  for (const float temperature : {0.0f, -1.0f, kNaN, kInfinity}) {
    refused(Form::kTail, [=](Data& other) { other.temperature = temperature; });
  }
  refused(Form::kZero, [](Data& other) { other.average = Average::kSamples; });
  refused(Form::kConstantHinge, [](Data& other) { other.margin = -0.1; });
  EXPECT_NO_THROW(run(data, Form::kConstantHinge));
}

}  // namespace
}  // namespace pykd::kernels
