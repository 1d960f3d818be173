// The kernel entry_distance against a float64 reference written from the formulas in its header, on every instruction
// set of this machine.
#include "kernels/entry_distance/entry_distance.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/kernel.h"
#include "tests/half_numbers.h"
#include "tests/row_results.h"

namespace pykd::kernels {
namespace {

using entry_distance::Average;
using entry_distance::Form;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr Form kForms[] = {Form::kMse, Form::kL1, Form::kSmoothL1};

struct Data {
  std::int64_t rows, entries;
  std::vector<float> student, teacher, weight;
  pykd_dtype dtype = PYKD_FLOAT32;
  Average average = Average::kMean;
  double beta = 0.75;
};

using Result = tests::RowResults;

Result reference(const Data& data, Form form) {
  Result result;
  const double share = data.average == Average::kMean ? 1.0 / static_cast<double>(data.entries) : 1.0;
  for (std::int64_t row = 0; row < data.rows; ++row) {
    double value = 0;
    for (std::int64_t i = row * data.entries; i < (row + 1) * data.entries; ++i) {
      const double r = double{data.student[i]} - double{data.teacher[i]};
      const double sign = r > 0 ? 1 : r < 0 ? -1 : r;
      const bool near = std::abs(r) < data.beta;
      value += form == Form::kMse  ? r * r
               : form == Form::kL1 ? std::abs(r)
               : near              ? r * r / (2 * data.beta)
                                   : std::abs(r) - data.beta / 2;
      const double slope = form == Form::kMse ? 2 * r : form == Form::kL1 ? sign : near ? r / data.beta : sign;
      result.gradient.push_back(data.weight[row] == 0 ? 0 : double{data.weight[row]} * share * slope);
    }
    result.value.push_back(share * value);
  }
  return result;
}

Result run(const Data& data, Form form, int thread_count = 1) {
  const std::int64_t shape[] = {data.rows, data.entries};
  tests::Bytes student = tests::encode(data.dtype, data.student), teacher = tests::encode(data.dtype, data.teacher);
  std::vector<float> weight = data.weight;
  const std::vector<Array> inputs = {{student.data(), data.dtype, 2, shape},
                                     {teacher.data(), data.dtype, 2, shape},
                                     {weight.data(), PYKD_FLOAT32, 1, shape}};
  return tests::run_rows("entry_distance", data.dtype, inputs,
                         {static_cast<double>(form), static_cast<double>(data.average), data.beta}, thread_count);
}

Data draw(std::int64_t rows, std::int64_t entries, pykd_dtype dtype = PYKD_FLOAT32) {
  std::mt19937 random(static_cast<unsigned>(entries));
  std::normal_distribution<float> normal;
  Data data{rows, entries, {}, {}, {}};
  data.dtype = dtype;
  for (std::int64_t i = 0; i < rows * entries; ++i) {
    data.student.push_back(tests::rounded(dtype, normal(random)));
    data.teacher.push_back(i % 7 == 3 ? data.student.back() : tests::rounded(dtype, normal(random)));
  }
  for (std::int64_t row = 0; row < rows; ++row) data.weight.push_back(0.5f + 0.25f * static_cast<float>(row % 5));
  return data;
}

void expect_close(const Data& data, Form form, const std::string& what) {
  const Result want = reference(data, form), got = run(data, form);
  const std::string where = what + ", form " + std::to_string(static_cast<int>(form));
  for (std::int64_t row = 0; row < data.rows; ++row) {
    EXPECT_NEAR(got.value[row], want.value[row], 1e-6 * want.value[row] + 1e-30) << where;
  }
  const double unit = data.dtype == PYKD_FLOAT32 ? 4e-7 : data.dtype == PYKD_FLOAT16 ? 0x1p-11 : 0x1p-8;
  const double smallest = data.dtype == PYKD_FLOAT16 ? 0x1p-25 : 0.0;
  double worst = 0;
  for (std::size_t i = 0; i < want.gradient.size(); ++i) {
    worst = std::max(worst, std::abs(got.gradient[i] - want.gradient[i]) - 1.01 * unit * std::abs(want.gradient[i]));
  }
  EXPECT_LE(worst, smallest) << where;
}

template <class Check>
void for_every_form(const Check& check) {
  tests::for_every_form(kForms, check);
}

TEST(EntryDistance, IsItsFormula) {
  for_every_form([](Form form) {
    for (const Average average : {Average::kMean, Average::kSum}) {
      for (const std::int64_t entries : {1, 2, 7, 33, 300, 33000}) {
        for (const pykd_dtype dtype : {PYKD_FLOAT32, PYKD_FLOAT16, PYKD_BFLOAT16}) {
          Data data = draw(3, entries, dtype);
          data.average = average;
          expect_close(data, form, std::to_string(entries) + " entries");
        }
      }
    }
  });
}

TEST(EntryDistance, OfFarAndNearOnesIsItsFormula) {
  for_every_form([](Form form) {
    for (const float scale : {1e-12f, 1e4f, 1e15f}) {
      Data data = draw(2, 100);
      for (float& entry : data.student) entry *= scale;
      for (float& entry : data.teacher) entry *= scale;
      expect_close(data, form, "scale " + std::to_string(scale));
      for (float& entry : data.student) entry += 10000.0f;
      for (float& entry : data.teacher) entry += 10000.0f;
      expect_close(data, form, "offset");
    }
  });
}

TEST(EntryDistance, OfEqualOnesIsZero) {
  for_every_form([](Form form) {
    Data data = draw(2, 77);
    data.teacher = data.student;
    const Result got = run(data, form);
    for (const double value : got.value) EXPECT_EQ(value, 0.0);
    for (const double entry : got.gradient) EXPECT_EQ(entry, 0.0);
  });
}

TEST(EntryDistance, WeighsItsRowsAndKeepsNaN) {
  for_every_form([](Form form) {
    Data data = draw(4, 9);
    data.weight = {1.0f, 0.0f, -2.0f, 1.0f};
    data.student[10] = kNaN;
    data.teacher[28] = kNaN;
    data.student[20] = kInfinity;
    const Result got = run(data, form), want = reference(data, form);
    EXPECT_TRUE(std::isnan(got.value[1]) && std::isnan(got.value[3]));
    EXPECT_EQ(got.value[2], double{kInfinity});
    for (int i = 0; i < 9; ++i) {
      EXPECT_NEAR(got.gradient[i], want.gradient[i], 1e-6);
      EXPECT_EQ(got.gradient[9 + i], 0.0);
      if (i != 2) {
        EXPECT_NEAR(got.gradient[18 + i], want.gradient[18 + i], 1e-6);
      }
      EXPECT_EQ(std::isnan(got.gradient[27 + i]), i == 1);
    }
    if (form == Form::kMse) {
      EXPECT_EQ(got.gradient[20], -double{kInfinity});
    } else {
      EXPECT_NEAR(got.gradient[20], want.gradient[20], 1e-6);
    }
  });
}

TEST(EntryDistance, IsTheSameOnThreadsAndPastTheCaches) {
  for_every_form([](Form form) {
    for (const std::int64_t rows : {1, 40}) {
      const Data data = draw(rows, 70003);
      const Result one = run(data, form), many = run(data, form, 5);
      EXPECT_TRUE(one.value == many.value && one.gradient == many.gradient);
      if (rows == 1) continue;
      const Result want = reference(data, form);
      double worst = 0;
      for (std::size_t i = 0; i < want.gradient.size(); ++i) {
        worst = std::max(worst, std::abs(one.gradient[i] - want.gradient[i]));
      }
      EXPECT_LE(worst, 1e-10);
    }
  });
}

TEST(EntryDistance, RefusesWhatMakesNoSense) {
  Data data = draw(1, 3);
  for (const double beta : {0.0, -1.0, 1e-60, 1e60}) {
    data.beta = beta;
    EXPECT_ANY_THROW(run(data, Form::kSmoothL1));
    EXPECT_NO_THROW(run(data, Form::kL1));
  }
}

}  // namespace
}  // namespace pykd::kernels
