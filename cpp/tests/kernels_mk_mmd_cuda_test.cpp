// mk_mmd for CUDA without a GPU: its kernels run on an emulated one (kernels/cuda/gpu_emulation.h), launch after
// launch, and are compared with the formula in float64.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/mk_mmd/mk_mmd_kernels.cuh"
#include "tests/emulated.h"

namespace pykd::kernels::mmd {
namespace {

using emulated::expect_near;
using emulated::kInf;
using emulated::kNan;
using emulated::rounded;
using emulated::Values;

struct Case {
  std::int64_t n = 5, d = 3;
  Bandwidth bandwidth = kJoint;
  Values student, teacher;  // [n, d]
  float weight = 1.5f;
};

struct Result {
  double value = 0.0;
  Values gradient;
};

double square_distance(const double* u, const double* v, std::int64_t d) {
  double sum = 0.0;
  for (std::int64_t k = 0; k < d; ++k) sum += (u[k] - v[k]) * (u[k] - v[k]);
  return sum;
}

// The formula of mk_mmd.h, pair by pair.
Result expected(const Case& c) {
  const auto n = static_cast<double>(c.n);
  const auto at = [&](const Values& set, std::int64_t i) { return &set[i * c.d]; };
  double xx = 0.0, yy = 0.0, xy = 0.0;
  for (std::int64_t i = 0; i < c.n; ++i) {
    for (std::int64_t j = 0; j < c.n; ++j) {
      xx += square_distance(at(c.student, i), at(c.student, j), c.d);
      yy += square_distance(at(c.teacher, i), at(c.teacher, j), c.d);
      xy += square_distance(at(c.student, i), at(c.teacher, j), c.d);
    }
  }
  double s_xx = xx / std::max(n * n - n, 1.0), s_yy = yy / std::max(n * n - n, 1.0), s_xy = xy / (n * n);
  if (c.bandwidth == kJoint) s_xx = s_yy = s_xy = (xx + yy + 2 * xy) / (2 * n * (2 * n - 1));

  Result result{0.0, Values(c.student.size(), 0.0)};
  const auto meet = [&](const Values& rows, const Values& columns, double s2, double sign, bool gradient) {
    for (std::int64_t i = 0; i < c.n; ++i) {
      for (std::int64_t j = 0; j < c.n; ++j) {
        const double distance = square_distance(at(rows, i), at(columns, j), c.d);
        double weight = 0.0;
        for (const double f : {1.0, 2.0, 4.0, 8.0, 16.0}) {
          const double kernel = s2 <= kTiny ? 1.0 : std::exp(-distance / (2 * f * s2));
          result.value += sign * kernel / (n * n);
          weight += s2 <= kTiny ? 0.0 : kernel / (f * s2);
        }
        for (std::int64_t k = 0; gradient && k < c.d; ++k) {
          result.gradient[i * c.d + k] -=
              (sign > 0 ? 1.0 : -1.0) * 2 * c.weight / (n * n) * weight * (at(rows, i)[k] - at(columns, j)[k]);
        }
      }
    }
  };
  meet(c.student, c.student, s_xx, 1.0, true);
  meet(c.teacher, c.teacher, s_yy, 1.0, false);
  meet(c.student, c.teacher, s_xy, -2.0, true);
  if (c.weight == 0.0f) std::fill(result.gradient.begin(), result.gradient.end(), 0.0);
  return result;
}

void draw(Case& c, unsigned seed, double spread = 1.0, double centre = 0.0) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0.0, spread);
  for (std::int64_t i = 0; i < c.n * c.d; ++i) {
    c.student.push_back(rounded<gpu::Float32>(centre + normal(random)));
    c.teacher.push_back(rounded<gpu::Float32>(centre + 0.3 * spread + normal(random)));
  }
}

struct Wanted {
  bool value = true, gradient = true, backwards = false;
};

Result run(const Case& c, int shares = 1, Wanted wanted = {}) {
  const std::vector<float> student(c.student.begin(), c.student.end()), teacher(c.teacher.begin(), c.teacher.end());
  std::vector<float> gradient(c.student.size() + 2, 77.0f);
  float value = 77.0f;
  Problem p;
  p.x.rows = student.data();
  p.y.rows = teacher.data();
  p.weight = &c.weight;
  p.value = wanted.value ? &value : nullptr;
  p.gradient = wanted.gradient ? gradient.data() + 1 : nullptr;
  p.n = c.n;
  p.d = c.d;
  p.shares = shares;
  p.bandwidth = c.bandwidth;
  const std::size_t bytes = lay_out(p, nullptr);
  std::vector<gpu::Words> scratch(bytes / sizeof(gpu::Words));
  std::memset(static_cast<void*>(scratch.data()), 0xff, bytes);  // NaN
  EXPECT_EQ(lay_out(p, reinterpret_cast<unsigned char*>(scratch.data())), bytes);

  const auto launch = [&](std::int64_t blocks, std::size_t shared_bytes, void (*kernel)(Problem)) {
    gpu::Launch{static_cast<unsigned>(blocks), 1, kThreads, shared_bytes}.run([&] { kernel(p); }, wanted.backwards);
  };
  launch(gpu::divide_up(p.d, gpu::kWarp), 2 * kThreads * sizeof(double), means_kernel);
  launch(gpu::divide_up(2 * p.padded_n, kThreads / gpu::kWarp), 0, centre_kernel);
  launch(1, kThreads / gpu::kWarp * sizeof(double), widths_kernel);
  launch((wanted.value ? 2 : 1) * p.tiles * p.shares, kSharedBytes, tiles_kernel);
  launch(wanted.gradient ? p.n : 1, 0, finish_kernel);

  EXPECT_TRUE(gradient.front() == 77.0f && gradient.back() == 77.0f) << "written beside the gradient";
  return {value, Values(gradient.begin() + 1, gradient.end() - 1)};
}

// What float32 products of unit-sized samples lose.
void expect_close(const Result& got, const Result& want) {
  double largest = 0.0;
  for (const double x : want.gradient) largest = std::isfinite(x) ? std::fmax(largest, std::fabs(x)) : largest;
  expect_near("value", {got.value}, {want.value}, 1e-6, 1e-6);
  expect_near("gradient", got.gradient, want.gradient, 2e-6, 4e-6 * largest);
}

void check(const Case& c, int shares = 1) {
  SCOPED_TRACE("n " + std::to_string(c.n) + ", d " + std::to_string(c.d) + ", bandwidth " +
               std::to_string(c.bandwidth) + ", shares " + std::to_string(shares));
  expect_close(run(c, shares), expected(c));
}

constexpr Bandwidth kBandwidths[] = {kJoint, kPerBlock};

TEST(MkMmdCuda, AgreesForEveryNumberOfSamplesAndFeatures) {
  unsigned seed = 1;
  for (const Bandwidth bandwidth : kBandwidths) {
    for (const int n : {1, 2, 64, 65}) {
      for (const int d : {1, 64, 70}) {
        if (n == 64 && d != 64) continue;
        if (n == 1 && bandwidth == kPerBlock) continue;  // below
        Case c;
        c.n = n;
        c.d = d;
        c.bandwidth = bandwidth;
        draw(c, seed++);
        check(c);
      }
    }
  }
}

TEST(MkMmdCuda, SharesTheMeetingsOfATile) {
  for (const int shares : {2, 8}) {  // 8: more than there are meetings
    Case c;
    c.n = 140;
    c.d = 20;
    draw(c, 50);
    check(c, shares);
  }
}

TEST(MkMmdCuda, SumsManyFeaturesInRuns) {
  Case c;
  c.n = 9;
  c.d = 2 * kDepth + 17;
  draw(c, 60);
  check(c);
}

TEST(MkMmdCuda, WritesWhatIsWantedAlone) {
  Case c;
  c.n = 70;
  draw(c, 70);
  const Result all = expected(c);
  Result some = run(c, 2, {true, false});
  EXPECT_EQ(some.gradient, Values(c.student.size(), 77.0));
  expect_close({some.value, all.gradient}, all);
  some = run(c, 2, {false, true});
  EXPECT_EQ(some.value, 77.0);
  expect_close({all.value, some.gradient}, all);
}

TEST(MkMmdCuda, TakesAnyWeight) {
  Case c;
  draw(c, 80);
  for (const float weight : {-2.0f, 0.0f}) {
    c.weight = weight;
    check(c);
  }
  c.student[0] = kNan;
  const Result got = run(c);
  EXPECT_TRUE(std::isnan(got.value));
  EXPECT_EQ(got.gradient, Values(c.student.size(), 0.0));
}

TEST(MkMmdCuda, SaysNanForNanAndInfinityAndWhatFloatsCannotHold) {
  for (const double bad : {kNan, kInf, -kInf, 1e25}) {
    for (const bool in_student : {true, false}) {
      Case c;
      draw(c, 90);
      (in_student ? c.student : c.teacher)[7] = bad;
      const Result got = run(c);
      EXPECT_TRUE(std::isnan(got.value)) << bad;
      for (const double x : got.gradient) EXPECT_TRUE(std::isnan(x)) << bad;
    }
  }
}

TEST(MkMmdCuda, TakesSamplesThatCoincide) {
  for (const Bandwidth bandwidth : kBandwidths) {
    for (const int which : {1, 2, 3}) {  // the student's, the teacher's, both, each set at a place of its own
      Case c;
      c.n = 66;
      c.bandwidth = bandwidth;
      draw(c, 100);
      for (std::int64_t i = 0; i < c.n; ++i) {
        for (std::int64_t k = 0; k < c.d; ++k) {
          if (which & 1) c.student[i * c.d + k] = c.student[k];
          if (which & 2) c.teacher[i * c.d + k] = c.teacher[k];
        }
      }
      check(c, 2);
    }
    Case c;  // all at one place: the value and the gradient are exactly 0
    c.bandwidth = bandwidth;
    c.student = c.teacher = Values(15, 0.25);
    const Result got = run(c);
    EXPECT_EQ(got.value, 0.0);
    EXPECT_EQ(got.gradient, Values(15, 0.0));
  }
  Case one;  // one sample each
  one.n = 1;
  one.bandwidth = kPerBlock;
  draw(one, 101);
  check(one);
}

TEST(MkMmdCuda, KeepsTheDigitsOfSamplesFarFromTheOrigin) {
  for (const Bandwidth bandwidth : kBandwidths) {
    Case c;
    c.n = 20;
    c.bandwidth = bandwidth;
    draw(c, 110, 1e-3, 1000.0);
    check(c);
    Case apart;
    apart.n = 20;
    apart.bandwidth = bandwidth;
    draw(apart, 111, 1e-2);
    for (double& x : apart.teacher) x = rounded<gpu::Float32>(x + 100.0);
    check(apart);
  }
}

TEST(MkMmdCuda, DoesNotDependOnTheOrderOfBlocks) {
  Case c;
  c.n = 130;
  c.d = 5;
  draw(c, 120);
  const Result forth = run(c, 2), back = run(c, 2, {true, true, true});
  EXPECT_EQ(forth.value, back.value);
  EXPECT_EQ(forth.gradient, back.gradient);
}

TEST(MkMmdCuda, FindsWorkForAll) {
  EXPECT_EQ(shares_of(132, 64, 128), 8);  // 4,096 samples
  EXPECT_EQ(shares_of(132, 1, 2), 2);     // a tile of students meets two
  EXPECT_EQ(shares_of(132, 1000, 2000), 1);
}

TEST(MkMmdCuda, ExponentialsKeepTheirDigitsNearZero) {
  for (const double x : {-1e-7, -1e-3, -0.3, -0.5, -1.0, -7.4, -40.0, -125.9}) {
    const auto rounded_x = static_cast<float>(x);
    const double want = std::expm1(static_cast<double>(rounded_x) * std::log(2.0));
    EXPECT_NEAR(exp2_less_1(rounded_x), want, 2e-7 * std::fabs(want)) << x;
  }
  EXPECT_EQ(exp2_less_1(0.0f), 0.0f);
  EXPECT_EQ(exp2_less_1(1e-6f), 0.0f);
  EXPECT_EQ(exp2_less_1(-500.0f), -1.0f);
}

}  // namespace
}  // namespace pykd::kernels::mmd
