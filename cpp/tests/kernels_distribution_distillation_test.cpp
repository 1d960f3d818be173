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
#include "tests/kernel_threads.h"

namespace pykd::kernels {
namespace {

enum Mining { kHardest, kAll };
enum Input { kPositiveWeight = 3, kNegativeWeight, kOrderWeight };
enum Output { kPositive, kNegative, kOrder, kGradStudent };
constexpr float kGuard = -12345.0f;

struct Samples {
  std::int64_t n, d;
  std::vector<float> x, y;
  std::vector<std::int64_t> labels;
};

struct Settings {
  double bins = 1000;
  double width = 0.1;
  Mining mining = kHardest;
  std::vector<float> weights = {0.7f, 0.3f, -0.4f};  // upstream, of the three values
};

// ---- The definition ----------------------------------------------------------------------------------

template <class T>
struct Answer {
  T values[3] = {0, 0, 0};
  std::vector<T> gradient;
  T slopes[2] = {0, 0};  // sum over pairs of |d divergence / d similarity|
};

// A similarity that counts, and the pairs that it is the similarity of: one, or those that are equally similar.
template <class T>
struct Similarity {
  T value;
  std::vector<std::pair<std::int64_t, std::int64_t>> pairs;
};

template <class T>
T product(const std::vector<float>& rows, std::int64_t i, std::int64_t j, std::int64_t d) {
  T sum = 0;
  for (std::int64_t k = 0; k < d; ++k) sum += T{rows[i * d + k]} * T{rows[j * d + k]};
  return sum;
}

template <class T>
std::vector<Similarity<T>> positives(const Samples& s, const std::vector<float>& rows) {
  std::vector<Similarity<T>> found;
  for (std::int64_t i = 0; i < s.n; ++i) {
    for (std::int64_t j = 0; j < i; ++j) {
      if (s.labels[i] == s.labels[j]) found.push_back({product<T>(rows, i, j, s.d), {{i, j}}});
    }
  }
  return found;
}

template <class T>
std::vector<Similarity<T>> negatives(const Samples& s, const std::vector<float>& rows, Mining mining) {
  std::vector<Similarity<T>> found;
  for (std::int64_t i = 0; i < s.n; ++i) {
    Similarity<T> hardest{-2, {}};
    for (std::int64_t j = 0; j < s.n; ++j) {
      if (s.labels[i] == s.labels[j]) continue;
      const T value = product<T>(rows, i, j, s.d);
      if (mining == kAll && j < i) found.push_back({value, {{i, j}}});
      if (value > hardest.value) hardest = {value, {}};
      if (value == hardest.value) hardest.pairs.push_back({i, j});
    }
    if (mining == kHardest && !hardest.pairs.empty()) found.push_back(hardest);
  }
  return found;
}

template <class T>
T bell(T s, std::size_t r, const Settings& settings) {
  const T distance = s - (T{-1} + T{2} * static_cast<T>(r) / static_cast<T>(settings.bins - 1));
  return -distance * distance / (T{2} * static_cast<T>(settings.width * settings.width));
}

template <class T>
T log_sum(const std::vector<T>& exponents) {
  const T largest = *std::max_element(exponents.begin(), exponents.end());
  T sum = 0;
  for (const T exponent : exponents) sum += std::exp(exponent - largest);
  return largest + std::log(sum);
}

// Logarithms of what the nodes sum up to; the last entry is that of their total.
template <class T>
std::vector<T> log_histogram(const std::vector<Similarity<T>>& similarities, const Settings& settings) {
  std::vector<T> logs;
  for (std::size_t r = 0; r < static_cast<std::size_t>(settings.bins); ++r) {
    std::vector<T> exponents;
    exponents.reserve(similarities.size());
    for (const Similarity<T>& s : similarities) exponents.push_back(bell(s.value, r, settings));
    logs.push_back(log_sum(exponents));
  }
  logs.push_back(log_sum(logs));
  return logs;
}

template <class T>
T mean(const std::vector<Similarity<T>>& similarities) {
  T sum = 0;
  for (const Similarity<T>& s : similarities) sum += s.value;
  return similarities.empty() ? 0 : sum / static_cast<T>(similarities.size());
}

template <class T>
Answer<T> reference(const Samples& s, const Settings& settings, bool with_gradient = true) {
  Answer<T> answer;
  answer.gradient.assign(s.x.size(), 0);
  for (int sort = 0; sort < 2; ++sort) {
    const auto student = sort == 0 ? positives<T>(s, s.x) : negatives<T>(s, s.x, settings.mining);
    const auto teacher = sort == 0 ? positives<T>(s, s.y) : negatives<T>(s, s.y, settings.mining);
    answer.values[2] += (sort == 0 ? -2 : 2) * (mean(student) + mean(teacher));
    if (student.empty()) continue;
    const std::vector<T> p = log_histogram(teacher, settings), q = log_histogram(student, settings);
    for (std::size_t r = 0; r + 1 < p.size(); ++r) {
      answer.values[sort] += std::exp(p[r] - p.back()) * ((p[r] - p.back()) - (q[r] - q.back()));
    }
    for (const Similarity<T>& pair : student) {
      if (!with_gradient) break;
      T slope = 0;
      for (std::size_t r = 0; r + 1 < p.size(); ++r) {
        const T node = T{-1} + T{2} * static_cast<T>(r) / static_cast<T>(settings.bins - 1);
        const T share = std::exp(bell(pair.value, r, settings) - q[r]);  // of this pair in the node
        const T pull = std::exp(q[r] - q.back()) - std::exp(p[r] - p.back());
        slope -= pull * share * (pair.value - node) / static_cast<T>(settings.width * settings.width);
      }
      answer.slopes[sort] += std::abs(slope);
      T weight = static_cast<T>(settings.weights[sort]) * slope;
      weight += static_cast<T>(settings.weights[2]) * (sort == 0 ? -2 : 2) / static_cast<T>(student.size());
      weight /= static_cast<T>(pair.pairs.size());
      for (const auto& [i, j] : pair.pairs) {
        for (std::int64_t k = 0; k < s.d; ++k) {
          answer.gradient[i * s.d + k] += weight * s.x[j * s.d + k];
          answer.gradient[j * s.d + k] += weight * s.x[i * s.d + k];
        }
      }
    }
  }
  return answer;
}

// ---- The kernel ----------------------------------------------------------------------------------------

struct Result {
  std::array<float, 3> values = {kGuard, kGuard, kGuard};
  std::vector<float> gradient;
};

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

// ---- Data ------------------------------------------------------------------------------------------------

void normalise(std::vector<float>& rows, std::int64_t d) {
  for (std::size_t begin = 0; begin < rows.size(); begin += static_cast<std::size_t>(d)) {
    double squared = 0.0;
    for (std::int64_t k = 0; k < d; ++k) squared += double{rows[begin + k]} * double{rows[begin + k]};
    for (std::int64_t k = 0; k < d; ++k) rows[begin + k] /= static_cast<float>(std::sqrt(squared));
  }
}

// Samples around the centres of `people`, the student's further away from them.
Samples draw(std::int64_t n, std::int64_t d, std::int64_t people, unsigned seed = 1, float noise = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> centres(people * d);
  for (float& entry : centres) entry = normal(generator);
  Samples s{n, d, {}, {}, {}};
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t person = i * 7 % people;
    s.labels.push_back(person * 1'000'000'000'000 - 3);
    for (std::int64_t k = 0; k < d; ++k) {
      s.x.push_back(centres[person * d + k] + noise * normal(generator));
      s.y.push_back(centres[person * d + k] + 0.5f * noise * normal(generator));
    }
  }
  normalise(s.x, d);
  normalise(s.y, d);
  return s;
}

double largest(const std::vector<double>& values) {
  double most = 0.0;
  for (const double value : values) most = std::max(most, std::abs(value));
  return most;
}

template <class T>
double largest_error(const std::vector<T>& got, const std::vector<double>& want) {
  double most = 0.0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double error = std::abs(static_cast<double>(got[i]) - want[i]);
    most = error <= most ? most : error;  // NaN stays
  }
  return most;
}

// float32 similarities are known to some 1e-7; what a divergence makes of that is not the kernel's doing.
double margin(const Answer<double>& want, int value) {
  const double sensitivity = value < 2 ? want.slopes[value] : 1.0;
  return 1e-6 * (1 + std::abs(want.values[value])) + 3e-7 * sensitivity;
}

void expect_right(const Result& got, const Answer<double>& want) {
  for (int i = 0; i < 3; ++i) EXPECT_NEAR(got.values[i], want.values[i], margin(want, i)) << "value " << i;
  EXPECT_LE(largest_error(got.gradient, want.gradient), 5e-6 * largest(want.gradient) + 1e-7);
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
