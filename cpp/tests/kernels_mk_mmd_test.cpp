// The fused MK-MMD kernel against its formula in float64, on every instruction set of this machine.
#include "kernels/mk_mmd/mk_mmd.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "tests/every_target.h"
#include "tests/kernel_threads.h"

namespace pykd::kernels {
namespace {

using tests::on_every_target;

enum Bandwidth { kJoint, kPerBlock };
constexpr float kGuard = -12345.0f;

struct Widths {
  double xx, yy, xy;
};

struct Answer {
  double value = 0.0;
  std::vector<double> gradient;
  std::vector<double> terms;  // the gradient's, without their signs
};

struct Samples {
  std::int64_t n, d;
  std::vector<float> x, y;
};

double distance(const float* a, const float* b, std::int64_t d) {
  double sum = 0.0;
  for (std::int64_t k = 0; k < d; ++k) sum += (double{a[k]} - double{b[k]}) * (double{a[k]} - double{b[k]});
  return sum;
}

double sum_of_distances(const std::vector<float>& a, const std::vector<float>& b, std::int64_t n, std::int64_t d) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < n; ++j) sum += distance(&a[i * d], &b[j * d], d);
  }
  return sum;
}

Widths widths(const Samples& s, Bandwidth bandwidth) {
  const double xx = sum_of_distances(s.x, s.x, s.n, s.d), yy = sum_of_distances(s.y, s.y, s.n, s.d);
  const double xy = sum_of_distances(s.x, s.y, s.n, s.d), n = static_cast<double>(s.n);
  if (bandwidth == kJoint) {
    const double joint = (xx + yy + 2 * xy) / (2 * n * (2 * n - 1));
    return {joint, joint, joint};
  }
  const double pairs = std::max(n * (n - 1), 1.0);
  return {xx / pairs, yy / pairs, xy / (n * n)};
}

// The definition, pair by pair, for bandwidths that are given. `weight` is that of the gradient.
Answer reference(const Samples& s, const Widths& width, double weight) {
  const auto n = static_cast<double>(s.n);
  Answer answer;
  answer.gradient.assign(s.x.size(), 0.0);
  answer.terms.assign(s.x.size(), 0.0);
  const auto mean_kernel = [&](const std::vector<float>& a, const std::vector<float>& b, double w, double factor) {
    double sum = 0.0;
    for (std::int64_t i = 0; i < s.n; ++i) {
      for (std::int64_t j = 0; j < s.n; ++j) {
        const double squared = distance(&a[i * s.d], &b[j * s.d], s.d);
        double slope = 0.0;  // d kernel / d squared distance, times -2
        for (const double f : {1.0, 2.0, 4.0, 8.0, 16.0}) {
          const double kernel = w <= 1e-20 ? 1.0 : std::exp(-squared / (2 * f * w));
          sum += kernel;
          if (w > 1e-20) slope += kernel / (f * w);
        }
        for (std::int64_t k = 0; k < s.d && factor != 0.0; ++k) {
          const double term = factor * slope * (double{a[i * s.d + k]} - double{b[j * s.d + k]});
          answer.gradient[i * s.d + k] -= term;
          answer.terms[i * s.d + k] += std::abs(term);
        }
      }
    }
    return sum / (n * n);
  };
  const double pull = 2 * weight / (n * n);
  answer.value = mean_kernel(s.x, s.x, width.xx, pull) + mean_kernel(s.y, s.y, width.yy, 0.0) -
                 2 * mean_kernel(s.x, s.y, width.xy, -pull);
  return answer;
}

Answer reference(const Samples& s, Bandwidth bandwidth, double weight) {
  return reference(s, widths(s, bandwidth), weight);
}

Samples draw(std::int64_t n, std::int64_t d, bool normalise = true, unsigned seed = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  Samples s{n, d, std::vector<float>(n * d), std::vector<float>(n * d)};
  for (float& entry : s.x) entry = normal(generator);
  for (float& entry : s.y) entry = normal(generator) + 0.3f;
  for (std::vector<float>* rows : {&s.x, &s.y}) {
    for (std::int64_t i = 0; i < n && normalise; ++i) {
      double norm = 0.0;
      for (std::int64_t k = 0; k < d; ++k) norm += double{(*rows)[i * d + k]} * double{(*rows)[i * d + k]};
      for (std::int64_t k = 0; k < d; ++k) (*rows)[i * d + k] /= static_cast<float>(std::sqrt(norm));
    }
  }
  return s;
}

struct Result {
  float value = kGuard;
  std::vector<float> gradient;
};

enum Wanted { kBoth, kValueAlone };

Result run(const Samples& s, Bandwidth bandwidth, float weight, int thread_count = 1, Wanted wanted = kBoth) {
  const Kernel* kernel = find("mk_mmd");
  EXPECT_NE(kernel, nullptr);
  const std::int64_t shape[] = {s.n, s.d};
  const std::size_t count = s.x.size(), around = 64;
  Result result;
  std::vector<float> guarded(count + 2 * around, kGuard);
  std::vector<float> x = s.x, y = s.y;
  const Array inputs[] = {
      {x.data(), PYKD_FLOAT32, 2, shape}, {y.data(), PYKD_FLOAT32, 2, shape}, {&weight, PYKD_FLOAT32, 0, nullptr}};
  const Array outputs[] = {{&result.value, PYKD_FLOAT32, 0, nullptr},
                           {wanted == kValueAlone ? nullptr : &guarded[around], PYKD_FLOAT32, 2, shape}};
  const double attribute = bandwidth;
  const Parallel parallel = tests::threads(&thread_count);
  kernel->cpu({inputs, outputs, &attribute, PYKD_FLOAT32, &parallel});
  EXPECT_EQ(std::memcmp(x.data(), s.x.data(), count * sizeof(float)), 0) << "the student was written";
  EXPECT_EQ(std::memcmp(y.data(), s.y.data(), count * sizeof(float)), 0) << "the teacher was written";
  for (std::size_t i = 0; i < around; ++i) {
    EXPECT_EQ(guarded[i], kGuard) << "written before the gradient";
    EXPECT_EQ(guarded[around + count + i], kGuard) << "written after the gradient";
  }
  result.gradient.assign(&guarded[around], &guarded[around] + count);
  return result;
}

double largest(const std::vector<double>& entries) {
  double most = 0.0;
  for (const double entry : entries) most = std::max(most, std::abs(entry));
  return most;
}

// A value is a difference of means of up to 5 that are summed in float32. A gradient's entry is a sum over all samples;
// its error is measured against the largest entry, or, where the sums cancel, against their terms.
constexpr double kValueError = 5e-7;
constexpr double kGradientError = 1e-5;
constexpr double kTermsError = 2e-6;
enum class Against { kGradient, kTerms };

void expect_close(const Result& result, const Answer& answer, Against against = Against::kGradient) {
  EXPECT_NEAR(result.value, answer.value, kValueError);
  const bool cancels = against == Against::kTerms;
  const double scale = largest(cancels ? answer.terms : answer.gradient);
  double error = 0.0;
  for (std::size_t i = 0; i < answer.gradient.size(); ++i) {
    const double difference = std::abs(double{result.gradient[i]} - answer.gradient[i]);
    error = difference <= error ? error : difference;  // NaN stays
  }
  EXPECT_LE(error, (cancels ? kTermsError : kGradientError) * scale);
}

TEST(MkMmd, TheReferenceHasTheGradientOfItsValue) {
  const Samples s = draw(5, 3);
  for (const Bandwidth bandwidth : {kJoint, kPerBlock}) {
    const Widths width = widths(s, bandwidth);
    const Answer answer = reference(s, width, 1.0);
    for (std::size_t i = 0; i < s.x.size(); ++i) {
      Samples more = s, less = s;
      more.x[i] += 1e-3f;
      less.x[i] -= 1e-3f;
      const double step = double{more.x[i]} - double{less.x[i]};
      const double slope = (reference(more, width, 1.0).value - reference(less, width, 1.0).value) / step;
      EXPECT_NEAR(slope, answer.gradient[i], 1e-6);
    }
  }
}

TEST(MkMmd, MatchesTheDefinition) {
  for (const std::int64_t n : {1, 2, 3, 17, 64, 130}) {
    for (const std::int64_t d : {1, 3, 16, 33, 512}) {
      for (const Bandwidth bandwidth : {kJoint, kPerBlock}) {
        SCOPED_TRACE("n " + std::to_string(n) + ", d " + std::to_string(d) + ", bandwidth " +
                     std::to_string(bandwidth));
        const Samples s = draw(n, d, d > 1);
        const Answer answer = reference(s, bandwidth, 0.7);
        on_every_target([&] { expect_close(run(s, bandwidth, 0.7f), answer); });
      }
    }
  }
}

TEST(MkMmd, MatchesTheDefinitionOnManyTiles) {
  for (const std::int64_t n : {401, 1700}) {  // tiles of two sizes
    const Samples s = draw(n, 7);
    for (const Bandwidth bandwidth : {kJoint, kPerBlock}) {
      SCOPED_TRACE("n " + std::to_string(n) + ", bandwidth " + std::to_string(bandwidth));
      const Answer answer = reference(s, bandwidth, -1.5);
      on_every_target([&] { expect_close(run(s, bandwidth, -1.5f, 2), answer); });
    }
  }
}

// Large enough to be shared among threads at all; tiles of one panel and of more.
TEST(MkMmd, DoesNotDependOnTheNumberOfThreads) {
  for (const Samples& s : {draw(130, 250), draw(700, 10)}) {
    on_every_target([&] {
      const Result alone = run(s, kPerBlock, 0.3f, 1);
      const Result value = run(s, kPerBlock, 0.3f, 1, kValueAlone);
      for (const int count : {2, 3, 8}) {
        const Result together = run(s, kPerBlock, 0.3f, count);
        EXPECT_EQ(together.value, alone.value) << count;
        EXPECT_EQ(together.gradient, alone.gradient) << count;
        EXPECT_EQ(run(s, kPerBlock, 0.3f, count, kValueAlone).value, value.value) << count;
      }
    });
  }
}

TEST(MkMmd, IsZeroWhereAllSamplesCoincide) {
  Samples s = draw(70, 19);
  for (std::int64_t i = 0; i < s.n; ++i) {
    std::copy_n(s.x.begin(), s.d, s.x.begin() + i * s.d);
    std::copy_n(s.x.begin(), s.d, s.y.begin() + i * s.d);
  }
  for (const Bandwidth bandwidth : {kJoint, kPerBlock}) {
    on_every_target([&] {
      const Result result = run(s, bandwidth, 1.0f);
      EXPECT_EQ(result.value, 0.0f);
      EXPECT_EQ(result.gradient, std::vector<float>(s.x.size(), 0.0f));
    });
  }
}

TEST(MkMmd, TakesOneSideThatCoincides) {
  for (const bool student : {true, false}) {
    Samples s = draw(70, 19);
    std::vector<float>& rows = student ? s.x : s.y;
    for (std::int64_t i = 1; i < s.n; ++i) std::copy_n(rows.begin(), s.d, rows.begin() + i * s.d);
    for (const Bandwidth bandwidth : {kJoint, kPerBlock}) {
      const Answer answer = reference(s, bandwidth, 1.0);
      on_every_target([&] { expect_close(run(s, bandwidth, 1.0f), answer); });
    }
  }
}

TEST(MkMmd, TakesSomeSamplesThatCoincide) {
  Samples s = draw(40, 12);
  for (std::int64_t i = 0; i < s.n; i += 3) {
    std::copy_n(s.x.begin(), s.d, s.x.begin() + i * s.d);
    std::copy_n(s.x.begin(), s.d, s.y.begin() + i * s.d);
  }
  for (const Bandwidth bandwidth : {kJoint, kPerBlock}) {
    const Answer answer = reference(s, bandwidth, 1.0);
    on_every_target([&] { expect_close(run(s, bandwidth, 1.0f), answer); });
  }
}

// Their distances are far smaller than the rounding of their squared norms.
TEST(MkMmd, KeepsTheDigitsOfSamplesThatLieClose) {
  Samples s = draw(60, 24);
  for (std::int64_t i = 1; i < s.n; ++i) {
    for (std::int64_t k = 0; k < s.d; ++k) s.x[i * s.d + k] = s.x[k] + 1e-5f * s.x[i * s.d + k];
  }
  for (const Bandwidth bandwidth : {kJoint, kPerBlock}) {
    const Answer answer = reference(s, bandwidth, 1.0);
    on_every_target([&] { expect_close(run(s, bandwidth, 1.0f), answer); });
  }
}

TEST(MkMmd, IsNearlyZeroForEqualSets) {
  Samples s = draw(130, 33);
  s.y = s.x;
  for (const Bandwidth bandwidth : {kJoint, kPerBlock}) {
    const Answer answer = reference(s, bandwidth, 1.0);
    on_every_target([&] { expect_close(run(s, bandwidth, 1.0f), answer, Against::kTerms); });
  }
}

TEST(MkMmd, TakesSamplesFarFromTheOriginAndOutliers) {
  Samples s = draw(90, 10, false);
  for (float& entry : s.x) entry += 100.0f;
  for (float& entry : s.y) entry += 100.0f;
  s.x[5] += 1e4f;
  for (const Bandwidth bandwidth : {kJoint, kPerBlock}) {
    const Answer answer = reference(s, bandwidth, 1.0);
    on_every_target([&] { expect_close(run(s, bandwidth, 1.0f), answer, Against::kTerms); });
  }
}

TEST(MkMmd, GivesNaNForNaN) {
  for (const bool student : {true, false}) {
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1e30f}) {
      Samples s = draw(66, 5);
      (student ? s.x : s.y)[7] = bad;
      for (const Bandwidth bandwidth : {kJoint, kPerBlock}) {
        const Result result = run(s, bandwidth, 1.0f);
        EXPECT_TRUE(std::isnan(result.value));
        EXPECT_TRUE(std::all_of(result.gradient.begin(), result.gradient.end(), [](float g) { return std::isnan(g); }));
      }
    }
  }
}

TEST(MkMmd, AWeightOfZeroGivesNoGradient) {
  Samples s = draw(66, 5);
  const std::vector<float> zeros(s.x.size(), 0.0f);
  const Result fine = run(s, kJoint, 0.0f);
  EXPECT_EQ(fine.gradient, zeros);
  EXPECT_NEAR(fine.value, reference(s, kJoint, 0.0).value, kValueError);
  s.x[3] = std::numeric_limits<float>::quiet_NaN();
  const Result bad = run(s, kJoint, 0.0f);
  EXPECT_EQ(bad.gradient, zeros);
  EXPECT_TRUE(std::isnan(bad.value));
}

TEST(MkMmd, RefusesAGradientWithoutWeight) {
  const Kernel* kernel = find("mk_mmd");
  ASSERT_NE(kernel, nullptr);
  float number = 0.0f;
  const std::int64_t shape[] = {1, 1};
  Array inputs[] = {{&number, PYKD_FLOAT32, 2, shape}, {&number, PYKD_FLOAT32, 2, shape}, {}};
  Array outputs[] = {{}, {&number, PYKD_FLOAT32, 2, shape}};
  const double attribute = kJoint;
  const Parallel parallel;
  const Call call{inputs, outputs, &attribute, PYKD_FLOAT32, &parallel};
  ASSERT_NE(kernel->refuse(call), nullptr);
  EXPECT_NE(std::string(kernel->refuse(call)).find("weight"), std::string::npos);
  outputs[0] = {&number, PYKD_FLOAT32, 0, nullptr};
  outputs[1] = {};
  EXPECT_EQ(kernel->refuse(call), nullptr);
}

}  // namespace
}  // namespace pykd::kernels
