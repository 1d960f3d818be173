// The fused distance of normalised features against its formula in float64, on every instruction set of this machine.
#include "kernels/feature_distance/feature_distance.h"

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
#include "tests/half_numbers.h"
#include "tests/kernel_threads.h"

namespace pykd::kernels {
namespace {

using tests::decode;
using tests::encode;
using tests::on_every_target;

enum Power { kL1, kL2, kCosine };
constexpr float kGuard = -12352.0f;  // every dtype has it
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// ---- The definition --------------------------------------------------------------------------------

struct Features {
  std::int64_t batch, tokens, channels;
  pykd_dtype dtype;
  std::vector<float> x, y;  // numbers of that dtype
  std::vector<float> weight;
};

struct Answer {
  std::vector<double> value, gradient;
  std::vector<bool> unsure;  // per token: l1, and float32 may find another sign of a difference than the exact one
};

std::vector<double> direction(const float* entries, std::int64_t channels, double* norm) {
  double squares = 0.0;
  for (std::int64_t c = 0; c < channels; ++c) squares += double{entries[c]} * double{entries[c]};
  *norm = std::sqrt(squares);
  std::vector<double> result(channels, 0.0);
  for (std::int64_t c = 0; c < channels && !(squares < 0x1p-252); ++c) result[c] = entries[c] / *norm;
  return result;
}

Answer reference(const Features& f, Power power) {
  Answer answer;
  answer.gradient.assign(f.x.size(), 0.0);
  for (std::int64_t b = 0; b < f.batch; ++b) {
    double sum = 0.0;
    for (std::int64_t t = 0; t < f.tokens; ++t) {
      const std::int64_t start = (b * f.tokens + t) * f.channels;
      double x_norm, y_norm, along = 0.0;
      const std::vector<double> x = direction(&f.x[start], f.channels, &x_norm);
      const std::vector<double> y = direction(&f.y[start], f.channels, &y_norm);
      std::vector<double> slope(f.channels);
      if (power == kCosine) sum += 0.5 * ((x_norm < 0x1p-126 ? 1 : 0) + (y_norm < 0x1p-126 ? 1 : 0));
      bool unsure = false;
      for (std::int64_t c = 0; c < f.channels; ++c) {
        const double difference = x[c] - y[c];
        sum += power == kL1   ? std::abs(difference)
               : power == kL2 ? difference * difference
                              : difference * difference / 2;
        const double sign = difference > 0 ? 1.0 : difference < 0 ? -1.0 : difference;
        slope[c] = power == kL1 ? sign : power == kL2 ? 2 * difference : difference;
        unsure = unsure || (power == kL1 && difference != 0 && std::abs(difference) < 1e-6 * std::abs(x[c]));
        along += x[c] * slope[c];
      }
      answer.unsure.push_back(unsure);
      for (std::int64_t c = 0; c < f.channels && !(x_norm < 0x1p-126) && f.weight[b] != 0.0f; ++c) {
        answer.gradient[start + c] =
            double{f.weight[b]} / static_cast<double>(f.tokens) / x_norm * (slope[c] - x[c] * along);
      }
    }
    answer.value.push_back(sum / static_cast<double>(f.tokens));
  }
  return answer;
}

// ---- The kernel ------------------------------------------------------------------------------------

Features draw(std::int64_t batch, std::int64_t tokens, std::int64_t channels, pykd_dtype dtype, unsigned seed = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  Features f{batch, tokens, channels, dtype, {}, {}, {}};
  for (std::int64_t i = 0; i < batch * tokens * channels; ++i) {
    f.x.push_back(tests::rounded(dtype, normal(generator)));
    f.y.push_back(tests::rounded(dtype, 3.0f * normal(generator) + 0.5f));
  }
  for (std::int64_t b = 0; b < batch; ++b) f.weight.push_back(0.5f + 0.25f * static_cast<float>(b % 7));
  return f;
}

struct Result {
  std::vector<float> value, gradient;
};

Result run(const Features& f, Power power, int thread_count = 1) {
  const Kernel* kernel = find("feature_distance");
  EXPECT_NE(kernel, nullptr);
  const std::int64_t shape[] = {f.batch, f.tokens, f.channels};
  const std::size_t around = 64, count = f.x.size();
  std::vector<unsigned char> x = encode(f.dtype, f.x), y = encode(f.dtype, f.y);
  const std::vector<unsigned char> x_before = x, y_before = y;
  std::vector<unsigned char> guarded = encode(f.dtype, std::vector<float>(count + 2 * around, kGuard));
  std::vector<float> weight = f.weight;
  Result result;
  result.value.assign(f.batch, kGuard);
  const std::size_t size = f.dtype == PYKD_FLOAT32 ? 4 : 2;
  const Array inputs[] = {
      {x.data(), f.dtype, 3, shape}, {y.data(), f.dtype, 3, shape}, {weight.data(), PYKD_FLOAT32, 1, shape}};
  const Array outputs[] = {{result.value.data(), PYKD_FLOAT32, 1, shape},
                           {guarded.data() + around * size, f.dtype, 3, shape}};
  const double attribute = power;
  const Parallel parallel = tests::threads(&thread_count);
  kernel->cpu({inputs, outputs, &attribute, f.dtype, &parallel});
  EXPECT_EQ(x, x_before);
  EXPECT_EQ(y, y_before);
  const std::vector<float> numbers = decode(f.dtype, guarded);
  for (std::size_t i = 0; i < around; ++i) {
    EXPECT_EQ(numbers[i], kGuard) << "written before the gradient";
    EXPECT_EQ(numbers[around + count + i], kGuard) << "written after the gradient";
  }
  result.gradient.assign(numbers.begin() + around, numbers.begin() + around + static_cast<std::ptrdiff_t>(count));
  return result;
}

// A sum of channels in float32, relative to it. A gradient is rounded to its dtype. One sign changes the gradient of a
// whole token, so tokens whose signs are unsure are not compared; they must be few.
void expect_close(const Features& f, const Result& result, const Answer& answer) {
  for (std::size_t b = 0; b < answer.value.size(); ++b) {
    EXPECT_NEAR(result.value[b], answer.value[b], 1e-6 * std::max(1.0, answer.value[b])) << "row " << b;
  }
  const double unit = f.dtype == PYKD_FLOAT32 ? 0x1p-24 : f.dtype == PYKD_FLOAT16 ? 0x1p-11 : 0x1p-8;
  const double smallest = f.dtype == PYKD_FLOAT16 ? 0x1p-25 : 0.0;  // half a step of subnormal numbers
  double largest = 0.0;
  for (const double entry : answer.gradient) largest = std::max(largest, std::abs(entry));
  const auto unsure = std::count(answer.unsure.begin(), answer.unsure.end(), true);
  EXPECT_LE(unsure, static_cast<std::ptrdiff_t>(answer.unsure.size() / 100 + 1)) << "draw other numbers";
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < answer.gradient.size(); ++i) {
    if (answer.unsure[i / static_cast<std::size_t>(f.channels)]) continue;
    const double error = std::abs(double{result.gradient[i]} - answer.gradient[i]);
    if (error <= unit * std::abs(answer.gradient[i]) + 1e-6 * largest + smallest) continue;
    if (wrong++ == 0) ADD_FAILURE() << "entry " << i << ": " << result.gradient[i] << ", not " << answer.gradient[i];
  }
  EXPECT_EQ(wrong, 0u);
}

template <class Statement>
void for_every_kind(const Statement& statement) {
  for (const pykd_dtype dtype : {PYKD_FLOAT32, PYKD_FLOAT16, PYKD_BFLOAT16}) {
    for (const Power power : {kL1, kL2, kCosine}) {
      SCOPED_TRACE("dtype " + std::to_string(dtype) + (power == kL1 ? ", l1" : power == kL2 ? ", l2" : ", cosine"));
      statement(dtype, power);
    }
  }
}

TEST(FeatureDistance, TheReferenceHasTheGradientOfItsValue) {
  Features f = draw(2, 3, 5, PYKD_FLOAT32);
  for (const Power power : {kL1, kL2, kCosine}) {
    const Answer answer = reference(f, power);
    for (std::size_t i = 0; i < f.x.size(); ++i) {
      Features more = f, less = f;
      more.x[i] += 1e-3f;
      less.x[i] -= 1e-3f;
      const Answer up = reference(more, power), down = reference(less, power);
      double slope = 0.0;
      for (std::size_t b = 0; b < f.weight.size(); ++b) slope += double{f.weight[b]} * (up.value[b] - down.value[b]);
      EXPECT_NEAR(slope / (double{more.x[i]} - double{less.x[i]}), answer.gradient[i], 1e-5);
    }
  }
}

TEST(FeatureDistance, MatchesTheDefinition) {
  for_every_kind([](pykd_dtype dtype, Power power) {
    for (const std::int64_t batch : {1, 3}) {
      for (const std::int64_t tokens : {1, 2, 7}) {
        for (const std::int64_t channels : {2, 3, 8, 16, 17, 31, 33, 64, 255}) {
          SCOPED_TRACE(std::to_string(batch) + " x " + std::to_string(tokens) + " x " + std::to_string(channels));
          const Features f = draw(batch, tokens, channels, dtype);
          const Answer answer = reference(f, power);
          on_every_target([&] { expect_close(f, run(f, power), answer); });
        }
      }
    }
  });
}

// More tasks than one, rows that are cut, sums in several runs, a gradient that goes past the caches.
TEST(FeatureDistance, MatchesTheDefinitionWhereItIsLarge) {
  struct Shape {
    std::int64_t batch, tokens, channels;
  };
  for_every_kind([](pykd_dtype dtype, Power power) {
    for (const Shape shape : {Shape{3, 196, 512}, Shape{200, 1, 1000}, Shape{2, 3, 10001}, Shape{41, 101, 1030}}) {
      SCOPED_TRACE(std::to_string(shape.batch) + " x " + std::to_string(shape.tokens));
      const Features f = draw(shape.batch, shape.tokens, shape.channels, dtype);
      const Answer answer = reference(f, power);
      on_every_target([&] { expect_close(f, run(f, power, 2), answer); });
    }
  });
}

// x / |x| is a sign: the gradient is 0 but for rounding, on the scale of slope / |x|.
TEST(FeatureDistance, TakesOneChannel) {
  for_every_kind([](pykd_dtype dtype, Power power) {
    const Features f = draw(5, 9, 1, dtype);
    const Answer answer = reference(f, power);
    on_every_target([&] {
      const Result result = run(f, power);
      for (std::size_t b = 0; b < 5; ++b) EXPECT_NEAR(result.value[b], answer.value[b], 1e-6);
      for (std::size_t i = 0; i < f.x.size(); ++i) {
        EXPECT_NEAR(result.gradient[i], 0.0, 1e-6 * double{f.weight[i / 9]} / std::abs(double{f.x[i]}));
      }
    });
  });
}

TEST(FeatureDistance, ATokenOfZerosHasNoDirectionAndNoGradient) {
  for_every_kind([](pykd_dtype dtype, Power power) {
    Features f = draw(2, 4, 19, dtype);
    const auto zero = [&](std::vector<float>& rows, std::int64_t token) {
      std::fill_n(rows.begin() + token * f.channels, f.channels, 0.0f);
    };
    zero(f.x, 1);
    zero(f.y, 2);
    zero(f.x, 6);
    zero(f.y, 6);
    const Answer answer = reference(f, power);
    on_every_target([&] {
      const Result result = run(f, power);
      expect_close(f, result, answer);
      for (const std::int64_t token : {1, 6}) {
        for (std::int64_t c = 0; c < f.channels; ++c) EXPECT_EQ(result.gradient[token * f.channels + c], 0.0f);
      }
    });
  });
}

// On both sides of the norm that counts as 0.
TEST(FeatureDistance, KnowsAShortTokenFromAZeroOne) {
  for (const Power power : {kL1, kL2, kCosine}) {
    Features f = draw(1, 2, 4, PYKD_FLOAT32);
    for (std::int64_t c = 0; c < 4; ++c) {
      f.x[c] *= 1e-42f;
      f.x[4 + c] *= 1e-36f;
    }
    const Answer answer = reference(f, power);
    EXPECT_EQ(answer.gradient[0], 0.0);
    EXPECT_NE(answer.gradient[4], 0.0);
    on_every_target([&] { expect_close(f, run(f, power), answer); });
  }
}

TEST(FeatureDistance, EqualTokensHaveNeitherDistanceNorGradient) {
  for_every_kind([](pykd_dtype dtype, Power power) {
    Features f = draw(3, 5, 37, dtype);
    f.y = f.x;
    on_every_target([&] {
      const Result result = run(f, power);
      EXPECT_EQ(result.value, std::vector<float>(3, 0.0f));
      EXPECT_EQ(result.gradient, std::vector<float>(f.x.size(), 0.0f));
    });
  });
}

// The sign of a difference of 0 is 0: equal entries of unequal tokens. Norms of 5, exact in every dtype.
TEST(FeatureDistance, EqualEntriesHaveNoSlope) {
  for (const pykd_dtype dtype : {PYKD_FLOAT32, PYKD_FLOAT16, PYKD_BFLOAT16}) {
    const Features f{1, 1, 4, dtype, {3, 4, 0, 0}, {3, 0, 4, 0}, {1}};
    const Answer answer = reference(f, kL1);
    on_every_target([&] { expect_close(f, run(f, kL1), answer); });
  }
}

TEST(FeatureDistance, NaNAndInfinityStayInTheirToken) {
  for_every_kind([](pykd_dtype dtype, Power power) {
    for (const bool student : {true, false}) {
      for (const float bad : {kNaN, kInfinity, -kInfinity}) {
        for (const std::int64_t channels : {5, 40}) {
          Features f = draw(3, 4, channels, dtype);
          const Answer answer = reference(f, power);
          (student ? f.x : f.y)[5 * channels + 2] = bad;  // of row 1, token 1
          on_every_target([&] {
            const Result result = run(f, power);
            for (const std::size_t b : {0, 2}) EXPECT_NEAR(result.value[b], answer.value[b], 1e-5);
            EXPECT_TRUE(std::isnan(result.value[1]));
            for (std::int64_t i = 0; i < static_cast<std::int64_t>(f.x.size()); ++i) {
              EXPECT_EQ(std::isnan(result.gradient[i]), i / channels == 5) << i;
            }
          });
        }
      }
    }
  });
}

TEST(FeatureDistance, AWeightOfZeroGivesNoGradient) {
  for_every_kind([](pykd_dtype dtype, Power power) {
    Features f = draw(3, 4, 21, dtype);
    f.weight[1] = 0.0f;
    for (const float bad : {1.0f, kNaN}) {
      f.x[5 * f.channels] = bad;
      on_every_target([&] {
        const Result result = run(f, power);
        for (std::int64_t i = 4 * f.channels; i < 8 * f.channels; ++i) EXPECT_EQ(result.gradient[i], 0.0f);
        EXPECT_EQ(std::isnan(result.value[1]), std::isnan(bad));
        EXPECT_NE(result.gradient[0], 0.0f);
      });
    }
  });
}

// Squares that float32 does not hold.
TEST(FeatureDistance, TakesVeryLargeAndVerySmallFeatures) {
  for (const pykd_dtype dtype : {PYKD_FLOAT32, PYKD_BFLOAT16}) {
    for (const Power power : {kL1, kL2, kCosine}) {
      Features f = draw(2, 3, 29, dtype);
      for (std::int64_t c = 0; c < f.channels; ++c) f.x[c] *= 0x1p70f;
      for (std::int64_t c = 0; c < f.channels; ++c) f.y[4 * f.channels + c] *= 0x1p70f;
      for (std::int64_t c = 0; c < f.channels; ++c) f.x[2 * f.channels + c] *= 0x1p110f;  // and far apart
      for (std::int64_t c = 0; c < f.channels; ++c) f.y[2 * f.channels + c] *= 0x1p-110f;
      const Answer answer = reference(f, power);
      on_every_target([&] { expect_close(f, run(f, power), answer); });
    }
  }
}

// 1 / norm is no normal number of float32 there, and has three digits where there are many channels; the norm itself
// may be none.
TEST(FeatureDistance, TakesFeaturesAtTheEndOfTheRange) {
  const float largest = std::numeric_limits<float>::max();
  for (const Power power : {kL1, kL2, kCosine}) {
    Features f = draw(8, 1, 20000, PYKD_FLOAT32);
    const auto fit = [&](std::vector<float>& entries, std::int64_t row, float scale) {
      const auto begin = entries.begin() + row * f.channels, end = begin + f.channels;
      std::transform(begin, end, begin, [&](float entry) { return std::clamp(entry / 8, -1.0f, 1.0f) * scale; });
    };
    fit(f.x, 0, largest);
    fit(f.y, 0, largest);
    fit(f.x, 1, largest);
    fit(f.y, 2, largest);
    fit(f.x, 3, largest);
    fit(f.y, 3, 1e-30f);
    fit(f.x, 4, 1e-30f);
    fit(f.y, 4, largest);
    for (std::int64_t c = 0; c < f.channels; ++c) {
      f.x[5 * f.channels + c] = f.x[6 * f.channels + c] = f.y[6 * f.channels + c] = c % 2 == 0 ? largest : -largest;
      f.y[5 * f.channels + c] = c == 7 ? 1.0f : 0.0f;
      f.x[7 * f.channels + c] = c % 3 == 0 ? largest : -largest;
      f.y[7 * f.channels + c] = c % 5 == 0 ? largest : -largest;
    }
    const Answer answer = reference(f, power);
    EXPECT_EQ(answer.value[6], 0.0);
    on_every_target([&] {
      const Result result = run(f, power);
      for (std::size_t b = 0; b < answer.value.size(); ++b) {
        EXPECT_NEAR(result.value[b], answer.value[b], 1e-5 * answer.value[b]) << "row " << b;
        const auto begin = answer.gradient.begin() + static_cast<std::ptrdiff_t>(b) * f.channels;
        const double top = std::abs(*std::max_element(begin, begin + f.channels));
        const auto channels = static_cast<std::size_t>(f.channels);
        for (std::size_t i = b * channels; i < (b + 1) * channels; ++i) {
          ASSERT_NEAR(result.gradient[i], answer.gradient[i], 0x1p-148 + 1e-5 * top) << "entry " << i;
        }
      }
    });
  }
}

TEST(FeatureDistance, RefusesAGradientWithoutWeight) {
  const Kernel* kernel = find("feature_distance");
  ASSERT_NE(kernel, nullptr);
  float number = 0.0f;
  const std::int64_t shape[] = {1, 1, 1};
  const Array inputs[] = {{&number, PYKD_FLOAT32, 3, shape}, {&number, PYKD_FLOAT32, 3, shape}, {}};
  Array outputs[] = {{}, {&number, PYKD_FLOAT32, 3, shape}};
  const double attribute = kL1;
  const Parallel parallel;
  const Call call{inputs, outputs, &attribute, PYKD_FLOAT32, &parallel};
  ASSERT_NE(kernel->refuse(call), nullptr);
  EXPECT_NE(std::string(kernel->refuse(call)).find("weight"), std::string::npos);
  outputs[0] = {&number, PYKD_FLOAT32, 1, shape};
  outputs[1] = {};
  EXPECT_EQ(kernel->refuse(call), nullptr);
}

}  // namespace
}  // namespace pykd::kernels
