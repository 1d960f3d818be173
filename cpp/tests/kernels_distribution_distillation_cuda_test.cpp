// distribution_distillation for CUDA without a GPU: its kernels run on an emulated one (kernels/cuda/gpu_emulation.h),
// launch after launch, and are compared with the formula in float64.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/distribution_distillation/distribution_distillation_kernels.cuh"
#include "tests/distribution_distillation_reference.h"
#include "tests/emulated.h"

namespace pykd::kernels::ddl {
namespace {

using namespace tests::pairs;  // NOLINT(google-build-using-namespace): the definition, and data for it
using emulated::kInf;
using emulated::kNan;

struct Wanted {
  unsigned given = 7, outputs = 15;  // bits of the weights and the outputs that the call has
  int shares = 1;
  bool backwards = false;
};

Result run(const Samples& s, const Settings& settings, Wanted wanted = {}) {
  Result result;
  result.gradient.assign(s.x.size() + 2, kGuard);
  Problem p(Grid(static_cast<std::size_t>(settings.bins), settings.width));
  p.rows[kOfStudent] = s.x.data();
  p.rows[kOfTeacher] = s.y.data();
  p.labels = s.labels.data();
  for (unsigned i = 0; i < 3; ++i) {
    if (wanted.given >> i & 1) p.weights[i] = &settings.weights[i];
    if (wanted.outputs >> i & 1) p.values[i] = &result.values[i];
  }
  if (wanted.outputs >> kGradStudent & 1) p.gradient = result.gradient.data() + 1;
  p.n = s.n;
  p.d = s.d;
  p.shares = wanted.shares;
  p.mining = settings.mining;
  const std::size_t bytes = lay_out(p, nullptr);
  std::vector<gpu::Words> scratch(bytes / sizeof(gpu::Words));
  std::memset(static_cast<void*>(scratch.data()), 0xff, bytes);  // NaN
  EXPECT_EQ(lay_out(p, reinterpret_cast<unsigned char*>(scratch.data())), bytes);
  launch_all(p, [&](void (*kernel)(Problem), std::int64_t blocks, int shared_bytes, const Problem& problem) {
    const gpu::Launch launch{static_cast<unsigned>(blocks), 1, kThreads, static_cast<std::size_t>(shared_bytes)};
    launch.run([&] { kernel(problem); }, wanted.backwards);
  });
  EXPECT_TRUE(result.gradient.front() == kGuard && result.gradient.back() == kGuard) << "written beside the gradient";
  result.gradient.pop_back();
  result.gradient.erase(result.gradient.begin());
  return result;
}

constexpr Mining kMinings[] = {kHardest, kAll};

TEST(DistributionDistillationCuda, AgreesWithFloat64) {
  struct Case {
    std::int64_t n, d, people;
    double bins, width;
    float noise;
    int shares;
  };
  const Case cases[] = {
      {2, 3, 1, 9, 0.1, 1.0f, 1},     {2, 1, 2, 5, 0.2, 1.0f, 1},   {3, 2, 2, 2, 0.3, 1.0f, 2},
      {16, 64, 4, 9, 0.1, 0.5f, 1},   {64, 70, 9, 9, 0.2, 1.0f, 1}, {130, 20, 31, 9, 0.2, 0.3f, 2},
      {70, 9, 20, 11, 20.0, 0.2f, 4},  // more shares than tiles
  };
  for (const Case& c : cases) {
    for (const Mining mining : kMinings) {
      SCOPED_TRACE(testing::Message() << c.n << " samples of " << c.people << " people, " << c.d << " channels, bins "
                                      << c.bins << ", width " << c.width << ", mining " << mining);
      const Samples s = draw(c.n, c.d, c.people, 1, c.noise);
      const Settings settings{c.bins, c.width, mining};
      expect_right(run(s, settings, {7, 15, c.shares}), reference<double>(s, settings));
    }
  }
}

TEST(DistributionDistillationCuda, TakesManyNodes) {
  const Samples s = draw(10, 6, 3);
  const Settings settings{100, 0.2, kHardest};
  expect_right(run(s, settings), reference<double>(s, settings));
}

// The nodes far from all similarities, whose sums float32 cannot hold.
TEST(DistributionDistillationCuda, KeepsTailsThatFloat32CannotHold) {
  for (const Mining mining : kMinings) {
    const Samples s = draw(12, 32, 3, 4, 0.02f);
    const Settings settings{16, 0.1, mining};
    expect_right(run(s, settings), reference<double>(s, settings));
  }
}

TEST(DistributionDistillationCuda, SamplesThatAreEquallySimilarShareTheGradient) {
  // Two persons, and a third with the same embedding twice: each of the first has two hardest negatives.
  Samples s{6, 4, {}, {}, {1, 1, 2, 2, 3, 3}};
  s.x = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0.6f, 0, 0.8f, 0, 0.6f, 0, 0.8f, 0};
  s.y = draw(6, 4, 3).y;
  const Settings settings{31, 0.2, kHardest};
  const Answer<double> want = reference<double>(s, settings);
  expect_right(run(s, settings), want);
  s.x.assign(24, 0.5f);  // all coincide: every similarity is exactly 1
  expect_right(run(s, settings), reference<double>(s, settings));
}

TEST(DistributionDistillationCuda, PairsOfASortThatIsNotThereGiveZero) {
  for (const Mining mining : kMinings) {
    const Settings settings{8, 0.2, mining};
    const Result alone = run(draw(1, 3, 1), settings);
    EXPECT_EQ(alone.values, (std::array<float, 3>{0, 0, 0}));
    EXPECT_EQ(alone.gradient, std::vector<float>(3, 0.0f));
    for (const std::int64_t people : {5, 1}) {  // no positives, no negatives
      const Samples s = draw(5, 3, people);
      const Result got = run(s, settings);
      EXPECT_EQ(got.values[people == 5 ? kPositive : kNegative], 0.0f);
      expect_right(got, reference<double>(s, settings));
    }
  }
}

TEST(DistributionDistillationCuda, WeightsSelectTermsAndZeroIsExact) {
  const Samples s = draw(9, 5, 3);
  for (const Mining mining : kMinings) {
    const Settings settings{8, 0.2, mining};
    for (const unsigned given : {1u, 2u, 4u, 0u}) {
      Settings same = settings;  // what is left out counts as 0
      for (unsigned i = 0; i < 3; ++i) same.weights[i] = given >> i & 1 ? settings.weights[i] : 0.0f;
      const Result got = run(s, settings, {given});
      expect_right(got, reference<double>(s, same));
      if (given != 0) continue;
      EXPECT_EQ(got.gradient, std::vector<float>(s.x.size(), 0.0f));
      EXPECT_EQ(run(s, same).gradient, got.gradient);
    }
  }
}

TEST(DistributionDistillationCuda, WritesWhatIsWantedAlone) {
  const Samples s = draw(9, 5, 3);
  const Settings settings{8, 0.2, kAll};
  const Result all = run(s, settings);
  for (const unsigned outputs : {1u, 2u, 4u, 8u}) {
    const Result some = run(s, settings, {7, outputs});
    for (unsigned i = 0; i < 3; ++i) EXPECT_EQ(some.values[i], outputs >> i & 1 ? all.values[i] : kGuard);
    EXPECT_EQ(some.gradient, outputs & 8 ? all.gradient : std::vector<float>(s.x.size(), kGuard));
  }
}

TEST(DistributionDistillationCuda, SaysNanForRowsThatAreNoUnitVectors) {
  for (const double bad : {kNan, -kInf, 3.0}) {
    for (const bool in_student : {true, false}) {
      const Mining mining = in_student ? kAll : kHardest;
      Samples s = draw(7, 4, 3);
      (in_student ? s.x : s.y)[9] = static_cast<float>(bad);
      Settings settings{8, 0.2, mining};
      const Result got = run(s, settings);
      for (const float value : got.values) EXPECT_TRUE(std::isnan(value)) << bad;
      for (const float x : got.gradient) EXPECT_TRUE(std::isnan(x)) << bad;
      settings.weights = {0, 0, 0};
      const Result still = run(s, settings);
      for (const float value : still.values) EXPECT_TRUE(std::isnan(value)) << bad;
      EXPECT_EQ(still.gradient, std::vector<float>(s.x.size(), 0.0f)) << bad;
    }
  }
  Samples s = draw(5, 4, 1);  // no negatives: their value is 0 all the same
  s.x[0] = static_cast<float>(kNan);
  const Result got = run(s, {8, 0.2, kAll});
  EXPECT_TRUE(std::isnan(got.values[kPositive]) && std::isnan(got.values[kOrder]));
  EXPECT_EQ(got.values[kNegative], 0.0f);
}

TEST(DistributionDistillationCuda, DoesNotDependOnTheOrderOfBlocks) {
  for (const Mining mining : kMinings) {
    const Samples s = draw(130, 5, 30);
    const Settings settings{5, 0.2, mining};
    const Result forth = run(s, settings, {7, 15, 2}), back = run(s, settings, {7, 15, 2, true});
    EXPECT_EQ(forth.values, back.values);
    EXPECT_EQ(forth.gradient, back.gradient);
  }
}

TEST(DistributionDistillationCuda, CountsInAsManyBitsAsFit) {
  EXPECT_EQ(bits_of(1), 40);
  for (const std::int64_t n : {std::int64_t{2}, std::int64_t{4096}, kMostSamples}) {
    const double pairs = static_cast<double>(n) * static_cast<double>(n) / 2;
    EXPECT_LT(pairs * kReach * std::exp2(bits_of(n)), std::exp2(62)) << n;
    EXPECT_GE(bits_of(n), 26) << n;  // what is rounded is beyond float32
  }
}

TEST(DistributionDistillationCuda, PlacesSimilaritiesInCells) {
  for (const double width : {0.01, 0.1, 5.0}) {
    const Grid grid(10, width);
    for (const float s : {-1.0019f, -1.0f, -0.3f, -0.0f, 0.0f, 1e-9f, 0.25f, 0.7f, 1.0f, 1.0019f}) {
      const Place at = place(grid, s);
      ASSERT_TRUE(at.cell >= 0 && at.cell < static_cast<int>(grid.cells));
      EXPECT_TRUE(at.u >= -1.0f && at.u <= 1.0f);
      const auto centre = static_cast<double>(grid.centre(static_cast<std::size_t>(at.cell)));
      const double d = static_cast<double>(s) - centre;
      EXPECT_NEAR(centre + static_cast<double>(grid.half * at.u), s, 1e-7 * grid.cell);
      EXPECT_NEAR(at.decay, std::exp(-grid.gamma * d * d), 1.2e-7);
    }
  }
}

}  // namespace
}  // namespace pykd::kernels::ddl
