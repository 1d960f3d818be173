// feature_distance for CUDA without a GPU: its kernels run on an emulated one (kernels/cuda/gpu_emulation.h) and are
// compared with the formulas in float64, in every layout; and the choice of a layout is tested as the arithmetic it is.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "kernels/feature_distance/feature_distance_kernels.cuh"
#include "tests/emulated.h"

namespace pykd::kernels::feature {
namespace {

using emulated::expect_near;
using emulated::half_unit;
using emulated::kInf;
using emulated::kNan;
using emulated::rounded;
using emulated::Tensor;
using emulated::Values;

struct Case {
  std::int64_t batch = 2, tokens = 3, channels = 70;
  Power power = kL1;
  Values student, teacher;  // [batch, tokens, channels]
  Values weight;            // [batch]
};

struct Result {
  Values value, gradient;
  Values terms;  // how large the terms are whose difference the gradient is
};

// The formula of feature_distance.h, token by token.
Result expected(const Case& c) {
  Result result;
  for (std::int64_t b = 0; b < c.batch; ++b) {
    double sum = 0.0;
    for (std::int64_t t = 0; t < c.tokens; ++t) {
      const double* x = &c.student[(b * c.tokens + t) * c.channels];
      const double* y = &c.teacher[(b * c.tokens + t) * c.channels];
      double x_norm = 0.0, y_norm = 0.0, along = 0.0;
      for (std::int64_t i = 0; i < c.channels; ++i) {
        x_norm += x[i] * x[i];
        y_norm += y[i] * y[i];
      }
      x_norm = std::sqrt(x_norm);
      y_norm = std::sqrt(y_norm);
      const auto direction = [](double entry, double norm) {
        return norm < 0x1p-126 ? 0.0 : std::isinf(norm) ? kNan : entry / norm;
      };
      if (c.power == kCosine) sum += 0.5 * ((x_norm < 0x1p-126 ? 1 : 0) + (y_norm < 0x1p-126 ? 1 : 0));
      Values slope;
      for (std::int64_t i = 0; i < c.channels; ++i) {
        const double u = direction(x[i], x_norm), difference = u - direction(y[i], y_norm);
        sum += c.power == kL1 ? std::fabs(difference) : difference * difference * (c.power == kL2 ? 1.0 : 0.5);
        const double sign = difference > 0 ? 1.0 : difference < 0 ? -1.0 : difference;
        slope.push_back(c.power == kL1 ? sign : (c.power == kL2 ? 2 : 1) * difference);
        along += slope.back() * u;
      }
      for (std::int64_t i = 0; i < c.channels; ++i) {
        const double across = slope[i] - direction(x[i], x_norm) * along;
        const bool none = c.weight[b] == 0.0 || x_norm < 0x1p-126;
        const double factor = c.weight[b] / static_cast<double>(c.tokens) / x_norm;
        result.gradient.push_back(none ? 0.0 : factor * across);
        const double terms = std::fabs(slope[i]) + std::fabs(across - slope[i]) + std::fabs(direction(x[i], x_norm));
        result.terms.push_back(none ? 0.0 : std::fabs(factor) * terms);
      }
    }
    result.value.push_back(sum / static_cast<double>(c.tokens));
  }
  return result;
}

template <class T>
void draw(Case& c, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  for (std::int64_t i = 0; i < c.batch * c.tokens * c.channels; ++i) {
    c.student.push_back(rounded<T>(normal(random)));
    c.teacher.push_back(rounded<T>(normal(random)));
  }
  for (std::int64_t b = 0; b < c.batch; ++b) c.weight.push_back(static_cast<float>(normal(random)));
}

struct Layout {
  int parts = 1, threads = 64, team = 32, staged = 99;
};
struct Leads {
  int student = 0, teacher = 0, gradient = 0;
};
struct Wanted {
  bool value = true, gradient = true, backwards = false;
};

template <class T>
Result run(const Case& c, const Layout& layout, Leads leads = {}, Wanted wanted = {}) {
  Tensor<T> student(c.student, leads.student), teacher(c.teacher, leads.teacher);
  Tensor<T> gradient(Values(c.student.size(), 77.0), leads.gradient);
  const std::vector<float> weight(c.weight.begin(), c.weight.end());
  std::vector<float> value(static_cast<std::size_t>(c.batch), 77.0f);
  Problem problem;
  problem.student = student.data();
  problem.teacher = teacher.data();
  problem.weight = weight.data();
  problem.value = wanted.value ? value.data() : nullptr;
  problem.gradient = wanted.gradient ? gradient.data() : nullptr;
  problem.batch = c.batch;
  problem.tokens = c.tokens;
  problem.channels = c.channels;

  Plan plan;
  plan.parts = layout.parts;
  plan.threads = layout.threads;
  plan.team = layout.team;
  plan.tokens = gpu::divide_up(c.tokens, plan.parts);
  plan.staged = static_cast<int>(std::min<std::int64_t>(
      layout.staged, gpu::divide_up(gpu::divide_up(c.channels + T::kLanes - 1, T::kLanes), plan.team)));
  plan.shared_bytes = kExchangeBytes + plan.staged * plan.threads * 32;
  const gpu::Launch launch{static_cast<unsigned>(blocks_of(plan, c.batch)), static_cast<unsigned>(plan.parts),
                           static_cast<unsigned>(plan.threads), static_cast<std::size_t>(plan.shared_bytes)};
  const auto kernel = c.power == kL1   ? tokens_kernel<T, kL1>
                      : c.power == kL2 ? tokens_kernel<T, kL2>
                                       : tokens_kernel<T, kCosine>;
  launch.run([&] { kernel(problem, plan); }, wanted.backwards);

  EXPECT_TRUE(gradient.intact()) << "written beside the gradient";
  Result result{Values(value.begin(), value.end()), {}, {}};
  for (std::size_t i = 0; i < c.student.size(); ++i) result.gradient.push_back(gradient[i]);
  return result;
}

// Of a gradient: the rounding in the tensors' dtype, and that of float32 arithmetic on terms that may cancel.
template <class T>
void expect_close(const Result& got, const Result& want) {
  const double least = std::is_same_v<T, gpu::Float16> ? 0x1p-25 : 0x1p-133;  // half of the smallest number above 0
  expect_near("value", got.value, want.value, 1e-6, 1e-7);
  ASSERT_EQ(got.gradient.size(), want.gradient.size());
  for (std::size_t i = 0; i < want.gradient.size(); ++i) {
    const double allowed = 2e-6 * want.terms[i] + least;
    ASSERT_TRUE(emulated::near(got.gradient[i], want.gradient[i], half_unit<T>(), allowed))
        << "gradient[" << i << "] is " << got.gradient[i] << ", expected " << want.gradient[i];
  }
}

template <class T>
void check(const Case& c, const Layout& layout, Leads leads = {}) {
  SCOPED_TRACE("l" + std::to_string(c.power + 1) + ", tokens " + std::to_string(c.tokens) + ", channels " +
               std::to_string(c.channels) + ", parts " + std::to_string(layout.parts) + ", threads " +
               std::to_string(layout.threads) + ", team " + std::to_string(layout.team) + ", staged " +
               std::to_string(layout.staged));
  expect_close<T>(run<T>(c, layout, leads), expected(c));
}

template <class T>
class FeatureDistanceCuda : public testing::Test {};
using Dtypes = testing::Types<gpu::Float32, gpu::Float16, gpu::Bfloat16>;
TYPED_TEST_SUITE(FeatureDistanceCuda, Dtypes);

constexpr Power kPowers[] = {kL1, kL2, kCosine};

TYPED_TEST(FeatureDistanceCuda, AgreesInEveryLayout) {
  unsigned seed = 1;
  for (const Power power : kPowers) {
    for (const int channels : {1, 2, 70, 1021}) {
      if (power == kL1 && channels == 1) continue;  // the directions differ by a rounding or by 0, and the slope by 1
      for (const int tokens : {1, 7}) {
        Case c;
        c.power = power;
        c.tokens = tokens;
        c.channels = channels;
        draw<TypeParam>(c, seed++);
        for (const Layout& layout : {Layout{1, 32, 32, 99}, Layout{1, 64, 32, 1}, Layout{2, 64, 32, 99},
                                     Layout{4, 64, 64, 99}, Layout{1, 96, 96, 0}}) {
          check<TypeParam>(c, layout);
        }
      }
    }
  }
  Case c;
  c.batch = 1;
  c.tokens = 40;
  draw<TypeParam>(c, seed);
  check<TypeParam>(c, {16, 64, 32, 99});
}

TYPED_TEST(FeatureDistanceCuda, SumsLongTokensInRuns) {
  for (const Power power : kPowers) {
    Case c;
    c.batch = c.tokens = 1;
    c.power = power;
    c.channels = 32 * TypeParam::kLanes * (2 * kRun + 3) + 1;
    draw<TypeParam>(c, 5);
    check<TypeParam>(c, {1, 32, 32, 2});
  }
}

TYPED_TEST(FeatureDistanceCuda, TakesTokensThatLieAnywhere) {
  for (const Power power : kPowers) {
    Case c;
    c.power = power;
    c.channels = 67;  // odd: every token begins elsewhere
    draw<TypeParam>(c, 7);
    for (int lead = 0; lead < TypeParam::kLanes; ++lead) check<TypeParam>(c, {1, 32, 32, 99}, {lead, lead, lead});
    for (const Leads& leads : {Leads{1, 0, 0}, Leads{0, 1, 0}, Leads{0, 0, 1}})
      check<TypeParam>(c, {2, 64, 32, 1}, leads);
  }
}

TYPED_TEST(FeatureDistanceCuda, WritesWhatIsWantedAlone) {
  for (const int parts : {1, 2}) {
    Case c;
    draw<TypeParam>(c, 11);
    const Result all = expected(c);
    Result some = run<TypeParam>(c, {parts, 64, 32, 99}, {}, {true, false});
    EXPECT_EQ(some.gradient, Values(c.student.size(), 77.0));
    expect_close<TypeParam>({some.value, all.gradient, {}}, all);
    some = run<TypeParam>(c, {parts, 64, 32, 99}, {}, {false, true});
    EXPECT_EQ(some.value, Values(2, 77.0));
    expect_close<TypeParam>({all.value, some.gradient, {}}, all);
  }
}

TYPED_TEST(FeatureDistanceCuda, LeavesOutWhatHasNoWeight) {
  Case c;
  c.batch = 3;
  draw<TypeParam>(c, 13);
  c.weight[0] = c.weight[2] = 0.0;
  c.student[2 * 3 * 70 + 5] = kNan;  // its value is NaN, its gradient 0 all the same
  for (const Layout& layout : {Layout{1, 64, 32, 99}, Layout{2, 64, 64, 99}}) {
    const Result got = run<TypeParam>(c, layout);
    expect_close<TypeParam>(got, expected(c));
    EXPECT_TRUE(std::isnan(got.value[2]));
    EXPECT_EQ(Values(got.gradient.end() - 210, got.gradient.end()), Values(210, 0.0));
    const Result alone = run<TypeParam>(c, layout, {}, {false, true});
    EXPECT_EQ(alone.gradient, got.gradient);
  }
}

TYPED_TEST(FeatureDistanceCuda, SaysNanForNanAndInfinity) {
  for (const double bad : {kNan, kInf, -kInf}) {
    for (const Power power : kPowers) {
      for (const bool in_student : {true, false}) {
        Case c;
        c.power = power;
        draw<TypeParam>(c, 17);
        (in_student ? c.student : c.teacher)[70 + 69] = bad;  // of row 0, token 1
        const Result got = run<TypeParam>(c, {1, 64, 32, 99});
        EXPECT_TRUE(std::isnan(got.value[0]));
        EXPECT_FALSE(std::isnan(got.value[1]));
        for (int i = 0; i < 3 * 70; ++i) EXPECT_EQ(std::isnan(got.gradient[i]), i / 70 == 1) << i;
      }
    }
  }
}

TYPED_TEST(FeatureDistanceCuda, TakesTokensWithoutADirection) {
  for (const Power power : kPowers) {
    Case c;
    c.power = power;
    draw<TypeParam>(c, 19);
    for (int i = 0; i < 70; ++i) {
      c.student[i] = 0.0;                             // of the student
      c.teacher[70 + i] = 0.0;                        // of the teacher
      c.student[140 + i] = c.teacher[140 + i] = 0.0;  // of both
    }
    check<TypeParam>(c, {1, 64, 32, 99});
    check<TypeParam>(c, {1, 64, 64, 0});
  }
}

TYPED_TEST(FeatureDistanceCuda, IsExactlyZeroForEqualFeatures) {
  for (const Power power : kPowers) {
    Case c;
    c.power = power;
    draw<TypeParam>(c, 23);
    c.teacher = c.student;
    const Result got = run<TypeParam>(c, {2, 64, 32, 99});
    EXPECT_EQ(got.value, Values(2, 0.0));
    EXPECT_EQ(got.gradient, Values(c.student.size(), 0.0));
  }
}

TYPED_TEST(FeatureDistanceCuda, DoesNotDependOnTheOrderOfBlocks) {
  Case c;
  c.tokens = 9;
  draw<TypeParam>(c, 29);
  for (const int parts : {1, 4}) {
    const Result forth = run<TypeParam>(c, {parts, 64, 32, 99});
    const Result back = run<TypeParam>(c, {parts, 64, 32, 99}, {}, {true, true, true});
    EXPECT_EQ(forth.value, back.value);
    EXPECT_EQ(forth.gradient, back.gradient);
  }
}

// Squares that float32 cannot hold, in one or both tensors. The gradient is as large as 1 / norm.
TEST(FeatureDistanceCudaRange, TakesLargeAndSmallFeatures) {
  for (const Power power : kPowers) {
    for (const auto& [of_student, of_teacher] : std::vector<std::pair<double, double>>{{1e30, 1.0},
                                                                                       {1.0, 1e30},
                                                                                       {1e-25, 1.0},
                                                                                       {1.0, 1e-25},
                                                                                       {1e-30, 1e30},
                                                                                       {1e30, 1e-30},
                                                                                       {1e36, 1e36},
                                                                                       {1e-36, 1e-36}}) {
      Case c;
      c.power = power;
      draw<gpu::Float32>(c, 31);
      for (double& x : c.student) x = rounded<gpu::Float32>(x * of_student);
      for (double& x : c.teacher) x = rounded<gpu::Float32>(x * of_teacher);
      for (double& w : c.weight) w = std::fabs(w) < 0.1 ? 0.1 : w;
      SCOPED_TRACE(std::to_string(std::log10(of_student)) + ", " + std::to_string(std::log10(of_teacher)));
      check<gpu::Float32>(c, {1, 64, 32, 99});
    }
  }
}

// ---- The choice of a layout ----------------------------------------------------------------------------

const gpu::Device kA100{108, 163 << 10, 164 << 10, 1};
const gpu::Device kH100{132, 227 << 10, 228 << 10, 16};

TEST(FeatureDistancePlan, CoversEveryTokenWithinTheDevicesLimits) {
  for (const gpu::Device& device : {kA100, kH100}) {
    for (const std::int64_t batch : {1, 2, 64, 4096}) {
      for (const std::int64_t tokens : {1, 7, 196, 5000}) {
        for (const std::int64_t channels : {1, 10, 512, 4096, 1 << 20}) {
          for (const int lanes : {4, 8}) {
            const Plan plan = make_plan(device, batch, tokens, channels, lanes);
            SCOPED_TRACE(std::to_string(batch) + " x " + std::to_string(tokens) + " x " + std::to_string(channels));
            EXPECT_GE(plan.parts * plan.tokens, tokens);
            EXPECT_LE(plan.parts, device.largest_cluster);
            EXPECT_TRUE(plan.team == 32 || plan.team == plan.threads);
            EXPECT_TRUE(plan.threads % 32 == 0 && plan.threads >= 32 && plan.threads <= kMostThreads);
            EXPECT_EQ(plan.shared_bytes, kExchangeBytes + plan.staged * plan.threads * 32);
            EXPECT_LE(3 * (plan.shared_bytes + gpu::kReservedBytes), device.shared_of_multiprocessor);
          }
        }
      }
    }
  }
}

TEST(FeatureDistancePlan, FindsWorkForAll) {
  EXPECT_EQ(make_plan(kH100, 64, 196, 512, 8).parts, 8);
  EXPECT_EQ(make_plan(kH100, 4096, 196, 512, 8).parts, 1);
  EXPECT_EQ(make_plan(kH100, 4096, 1, 512, 8).threads, 32);  // one token is one warp's
  EXPECT_EQ(make_plan(kH100, 4, 2, 1 << 20, 8).team, kMostThreads);
}

}  // namespace
}  // namespace pykd::kernels::feature
