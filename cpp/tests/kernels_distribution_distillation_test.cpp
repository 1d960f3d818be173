// The fused kernel of distribution distillation against its formula in float64, pair by pair and node by node, on every
// instruction set of this machine.
#include "kernels/distribution_distillation/distribution_distillation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/simd/targets.h"
#include "tests/distribution_distillation_reference.h"
#include "tests/kernel_threads.h"

namespace pykd::kernels {
namespace {

using namespace ddl;           // NOLINT(google-build-using-namespace): the names of the kernel's arguments
using namespace tests::pairs;  // NOLINT(google-build-using-namespace): the definition, and data for it

// ---- The kernel ----------------------------------------------------------------------------------------

// `given` and `wanted`: bits of the weights and the outputs that the call has.
Result kernel(const Samples& s, const Settings& settings, int thread_count = 1, unsigned given = 7,
              unsigned wanted = 15) {
  const std::int64_t matrix[] = {s.n, s.d}, vector[] = {s.n};
  std::vector<float> x = s.x, y = s.y, weights = settings.weights;
  std::vector<std::int64_t> labels = s.labels;
  Array inputs[6] = {
      {x.data(), PYKD_FLOAT32, 2, matrix}, {y.data(), PYKD_FLOAT32, 2, matrix}, {labels.data(), PYKD_INT64, 1, vector}};
  for (unsigned i = 0; i < 3; ++i) {
    if (given >> i & 1) inputs[kPositiveWeight + i] = {&weights[i], PYKD_FLOAT32, 0, nullptr};
  }
  Result result;
  result.gradient.assign(s.x.size() + 16, kGuard);
  Array outputs[4];
  for (unsigned i = 0; i < 3; ++i) {
    if (wanted >> i & 1) outputs[i] = {&result.values[i], PYKD_FLOAT32, 0, nullptr};
  }
  if (wanted >> kGradStudent & 1) outputs[kGradStudent] = {result.gradient.data(), PYKD_FLOAT32, 2, matrix};
  const double attributes[] = {settings.bins, settings.width, static_cast<double>(settings.mining)};
  const Parallel parallel = tests::threads(&thread_count);
  Call call;
  call.inputs = inputs;
  call.outputs = outputs;
  call.attributes = attributes;
  call.parallel = &parallel;
  const Kernel* found = find("distribution_distillation");
  EXPECT_NE(found, nullptr);
  EXPECT_EQ(found->refuse(call), nullptr);
  found->cpu(call);
  for (std::size_t i = s.x.size(); i < result.gradient.size(); ++i) {
    EXPECT_EQ(result.gradient[i], kGuard) << "written beyond the gradient";
  }
  result.gradient.resize(s.x.size());
  return result;
}

class DistributionDistillation : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { ASSERT_TRUE(use_simd(GetParam().c_str())); }
  void TearDown() override { use_simd(nullptr); }
};

INSTANTIATE_TEST_SUITE_P(Simd, DistributionDistillation, testing::ValuesIn(simd_targets()),
                         [](const auto& tested) { return tested.param; });

// ---- Values and gradients --------------------------------------------------------------------------------

TEST(DistributionDistillationReference, GradientIsTheSlopeOfTheValue) {
  for (const Mining mining : {kHardest, kAll}) {
    const Samples s = draw(7, 4, 3);
    const Settings settings{101, 0.15, mining};
    const Answer<double> answer = reference<double>(s, settings);
    for (const std::size_t at : {0u, 5u, 13u, 26u}) {
      const auto loss = [&](float step) {
        Samples moved = s;
        moved.x[at] += step;
        const Answer<double> end = reference<double>(moved, settings, false);
        double sum = 0.0;
        for (int i = 0; i < 3; ++i) sum += double{settings.weights[i]} * end.values[i];
        return std::pair{double{moved.x[at]}, sum};
      };
      const auto [right, above] = loss(1e-3f);
      const auto [left, below] = loss(-1e-3f);
      EXPECT_NEAR(answer.gradient[at], (above - below) / (right - left), 2e-3 * largest(answer.gradient));
    }
  }
}

TEST_P(DistributionDistillation, AgreesWithFloat64) {
  struct Case {
    std::int64_t n, d, people;
    double bins, width;
    float noise;
  };
  const Case cases[] = {
      {2, 3, 1, 1000, 0.1, 1.0f},  {2, 1, 2, 5, 0.1, 1.0f},      {3, 2, 2, 2, 0.3, 1.0f},
      {7, 5, 3, 64, 0.1, 1.0f},    {16, 16, 4, 100, 0.05, 0.5f}, {48, 31, 8, 65, 0.1, 0.5f},
      {49, 32, 9, 63, 0.02, 1.0f}, {97, 33, 31, 101, 0.1, 0.3f}, {130, 100, 20, 50, 1.0, 0.2f},
      {64, 9, 64, 40, 0.1, 1.0f},  {64, 9, 1, 40, 0.1, 1.0f},    {50, 24, 12, 30, 0.01, 0.7f},
      {50, 24, 12, 9, 0.03, 0.7f}, {40, 24, 12, 70, 20.0, 0.7f},
  };
  for (const Case& c : cases) {
    for (const Mining mining : {kHardest, kAll}) {
      SCOPED_TRACE(testing::Message() << c.n << " samples of " << c.people << " people, " << c.d << " channels, bins "
                                      << c.bins << ", width " << c.width << ", mining " << mining);
      const Samples s = draw(c.n, c.d, c.people, 1, c.noise);
      const Settings settings{c.bins, c.width, mining};
      expect_right(kernel(s, settings), reference<double>(s, settings));
    }
  }
}

TEST_P(DistributionDistillation, IsNoWorseThanThePlainFormulaInFloat32) {
  for (const Mining mining : {kHardest, kAll}) {
    for (const unsigned seed : {1u, 2u, 3u}) {
      const Samples s = draw(60, 40, 10, seed, 0.6f);
      const Settings settings{200, 0.1, mining};
      const Answer<double> want = reference<double>(s, settings);
      const Answer<float> plain = reference<float>(s, settings);
      const Result got = kernel(s, settings);
      for (int i = 0; i < 3; ++i) {
        const double plain_error = std::abs(double{plain.values[i]} - want.values[i]);
        const double allowed = plain_error + 3e-7 * (1 + std::abs(want.values[i]));
        EXPECT_NEAR(got.values[i], want.values[i], allowed) << "value " << i;
      }
      const double allowed = largest_error(plain.gradient, want.gradient) + 1e-6 * largest(want.gradient);
      EXPECT_LE(largest_error(got.gradient, want.gradient), allowed);
    }
  }
}

TEST_P(DistributionDistillation, KeepsTailsThatFloat32CannotHold) {
  // The only positive pair: cosine 1 to the teacher, -1 to the student, 40 widths away.
  Samples s{3, 2, {1, 0, -1, 0, 0, 1}, {1, 0, 1, 0, 0, 1}, {5, 5, 6}};
  const Settings settings{1000, 0.05, kAll, {1.0f, 1.0f, 0.0f}};
  const Answer<double> want = reference<double>(s, settings);
  EXPECT_GT(want.values[0], 700.0);  // exp(-700) is no float32
  expect_right(kernel(s, settings), want);
}

TEST_P(DistributionDistillation, TakesDistantGroupsOfSimilarities) {
  // Similarities near 1, 0 and -1 and nothing between: nodes whose nearest cell is far away, from either side.
  Samples s{6, 2, {1, 0, 1, 0, 0, 1, 0, 1, -1, 0, 0, -1}, {1, 0, 0, 1, -1, 0, 1, 0, 0, 1, 0, -1}, {1, 1, 1, 2, 2, 2}};
  for (const Mining mining : {kHardest, kAll}) {
    const Settings settings{500, 0.03, mining};
    expect_right(kernel(s, settings), reference<double>(s, settings));
  }
}

TEST_P(DistributionDistillation, SharesTheGradientOfEquallyHardNegatives) {
  Samples s = draw(12, 6, 4);
  for (std::int64_t k = 0; k < s.d; ++k) s.x[5 * s.d + k] = s.x[2 * s.d + k];  // of two people, as they are drawn
  ASSERT_NE(s.labels[5], s.labels[2]);
  for (std::int64_t k = 0; k < s.d; ++k) s.x[7 * s.d + k] = s.x[4 * s.d + k];
  const Settings settings{100, 0.2, kHardest};
  expect_right(kernel(s, settings), reference<double>(s, settings));
}

TEST_P(DistributionDistillation, IsZeroForEqualEmbeddings) {
  for (const Mining mining : {kHardest, kAll}) {
    Samples s = draw(50, 20, 8);
    s.y = s.x;
    const Result got = kernel(s, {300, 0.1, mining, {1.0f, 1.0f, 0.0f}});
    EXPECT_NEAR(got.values[0], 0.0f, 1e-12f);
    EXPECT_NEAR(got.values[1], 0.0f, 1e-12f);
    for (const float entry : got.gradient) EXPECT_NEAR(entry, 0.0f, 1e-7f);
  }
}

TEST_P(DistributionDistillation, TakesCollapsedAndZeroEmbeddings) {
  Samples s = draw(30, 8, 5);
  for (std::size_t i = 0; i < s.x.size(); ++i) s.x[i] = s.x[i % static_cast<std::size_t>(s.d)];
  for (const Mining mining : {kHardest, kAll}) {
    const Settings settings{50, 0.1, mining};
    expect_right(kernel(s, settings), reference<double>(s, settings));
  }
  std::fill(s.x.begin(), s.x.end(), 0.0f);
  const Settings settings{50, 0.1, kAll};
  expect_right(kernel(s, settings), reference<double>(s, settings));
}

TEST_P(DistributionDistillation, GivesZeroForPairsThatAreNotThere) {
  const Result alone = kernel(draw(1, 5, 1), {});
  for (const float value : alone.values) EXPECT_EQ(value, 0.0f);
  for (const float entry : alone.gradient) EXPECT_EQ(entry, 0.0f);
  for (const Mining mining : {kHardest, kAll}) {
    EXPECT_EQ(kernel(draw(20, 5, 20), {100, 0.1, mining}).values[0], 0.0f);
    EXPECT_EQ(kernel(draw(20, 5, 1), {100, 0.1, mining}).values[1], 0.0f);
  }
}

// ---- Weights and outputs -----------------------------------------------------------------------------------

TEST_P(DistributionDistillation, TakesTheWeightsThatAreGiven) {
  const Samples s = draw(40, 12, 6);
  for (const Mining mining : {kHardest, kAll}) {
    const Settings all{100, 0.1, mining};
    const Result whole = kernel(s, all);
    for (unsigned given = 0; given < 8; ++given) {
      Settings some = all;
      for (unsigned i = 0; i < 3; ++i) some.weights[i] = given >> i & 1 ? all.weights[i] : 0.0f;
      const Result got = kernel(s, all, 1, given);
      const Answer<double> want = reference<double>(s, some);
      EXPECT_LE(largest_error(got.gradient, want.gradient), 5e-6 * largest(want.gradient)) << "weights " << given;
      EXPECT_EQ(got.gradient, kernel(s, some).gradient) << "a weight of 0 is one that is left out, " << given;
      EXPECT_EQ(got.values, whole.values) << "weights " << given;
    }
  }
}

TEST_P(DistributionDistillation, PassesNanOnUnlessTheWeightsAreZero) {
  const Samples sound = draw(60, 9, 10);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1.1f}) {
    for (const bool student : {true, false}) {
      Samples s = sound;
      std::vector<float>& rows = student ? s.x : s.y;
      rows[31 * s.d + 8] = bad;  // 1.1: the row is not normalised
      const Result got = kernel(s, {});
      for (const float value : got.values) EXPECT_TRUE(std::isnan(value));
      for (const float entry : got.gradient) EXPECT_TRUE(std::isnan(entry));
      const Result unweighted = kernel(s, {1000, 0.1, kHardest, {0.0f, 0.0f, 0.0f}});
      for (const float value : unweighted.values) EXPECT_TRUE(std::isnan(value));
      for (const float entry : unweighted.gradient) EXPECT_EQ(entry, 0.0f);
    }
  }
}

TEST(DistributionDistillationCall, RefusesSettingsThatTheCellsAreNotMadeFor) {
  const Kernel* found = find("distribution_distillation");
  ASSERT_NE(found, nullptr);
  const auto refusal = [&](double bins, double width) {
    const double attributes[] = {bins, width, 0};
    Call call;
    call.attributes = attributes;
    const char* reason = found->refuse(call);
    return std::string(reason == nullptr ? "" : reason);
  };
  EXPECT_EQ(refusal(2, 0.01), "");
  EXPECT_EQ(refusal(1, 0.1), "bins is a whole number from 2 to 2^24");
  EXPECT_EQ(refusal(10.5, 0.1), "bins is a whole number from 2 to 2^24");
  EXPECT_EQ(refusal(std::nan(""), 0.1), "bins is a whole number from 2 to 2^24");
  EXPECT_EQ(refusal(100, 0.009), "width is at least 0.01");
  EXPECT_EQ(refusal(100, std::numeric_limits<double>::infinity()), "width is at least 0.01");
}

}  // namespace
}  // namespace pykd::kernels
