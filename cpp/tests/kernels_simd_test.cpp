// kernels/simd: exp, log, and the conversions of half-precision entries, on every instruction set of this processor,
// against the C library and the compiler's own half-precision type.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/kernels_simd_test.cpp"
#include "hwy/foreach_target.h"

#include "hwy/highway.h"
#include "kernels/simd/math-inl.h"
#include "kernels/simd/memory-inl.h"

HWY_BEFORE_NAMESPACE();
namespace pykd::kernels::HWY_NAMESPACE {

// As a kernel reads and writes: whole vectors, and a partial one at the end.
template <class T>
hn::Vec<hn::ScalableTag<float>> load_some(const T* p, size_t i, size_t rest) {
  const hn::ScalableTag<float> d;
  return rest >= hn::Lanes(d) ? load(d, p + i) : load(d, p + i, rest, 1.0f);
}

template <class T>
void store_some(hn::Vec<hn::ScalableTag<float>> v, T* p, size_t i, size_t rest) {
  const hn::ScalableTag<float> d;
  if (rest >= hn::Lanes(d)) {
    store(v, d, p + i);
  } else {
    store(v, d, p + i, rest);
  }
}

template <int which>
void apply(const float* in, size_t count, float* out) {
  const hn::ScalableTag<float> d;
  const size_t lanes = hn::Lanes(d);
  for (size_t i = 0; i < count; i += lanes) {
    const size_t rest = count - i;
    const auto x = load_some(in, i, rest);
    const auto y = which == 0   ? exp2(d, x)
                   : which == 1 ? exp(d, x)
                   : which == 2 ? log(d, x)
                   : which == 3 ? exp2m1(d, x)
                                : log1p(d, x);
    store_some(y, out, i, rest);
  }
}

template <class T>
void widen_all(const void* in, size_t count, float* out) {
  const size_t lanes = hn::Lanes(hn::ScalableTag<float>());
  for (size_t i = 0; i < count; i += lanes) {
    store_some(load_some(static_cast<const T*>(in), i, count - i), out, i, count - i);
  }
}

template <class T>
void narrow_all(const float* in, size_t count, void* out) {
  const size_t lanes = hn::Lanes(hn::ScalableTag<float>());
  for (size_t i = 0; i < count; i += lanes) {
    store_some(load_some(in, i, count - i), static_cast<T*>(out), i, count - i);
  }
}

template <class T>
void stream_all(const float* in, size_t count, void* out) {
  const hn::ScalableTag<float> d;
  T* const p = static_cast<T*>(out);
  const size_t lanes = hn::Lanes(d), head = entries_to_alignment(d, p);
  size_t i = head < count ? head : count;
  if (i > 0) store(load(d, in), d, p, i);
  for (; i + lanes <= count; i += lanes) stream(load(d, in + i), d, p + i);
  if (i < count) store(load(d, in + i, count - i, 0.0f), d, p + i, count - i);
  finish_streaming();
}

void Exp2(const float* in, size_t count, float* out) { apply<0>(in, count, out); }
void Exp(const float* in, size_t count, float* out) { apply<1>(in, count, out); }
void Log(const float* in, size_t count, float* out) { apply<2>(in, count, out); }
void Exp2m1(const float* in, size_t count, float* out) { apply<3>(in, count, out); }
void Log1p(const float* in, size_t count, float* out) { apply<4>(in, count, out); }
void WidenFloat16(const void* in, size_t count, float* out) { widen_all<hwy::float16_t>(in, count, out); }
void WidenBFloat16(const void* in, size_t count, float* out) { widen_all<hwy::bfloat16_t>(in, count, out); }
void NarrowFloat16(const float* in, size_t count, void* out) { narrow_all<hwy::float16_t>(in, count, out); }
void NarrowBFloat16(const float* in, size_t count, void* out) { narrow_all<hwy::bfloat16_t>(in, count, out); }
void StreamFloat32(const float* in, size_t count, void* out) { stream_all<float>(in, count, out); }
void StreamFloat16(const float* in, size_t count, void* out) { stream_all<hwy::float16_t>(in, count, out); }

}  // namespace pykd::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/simd/targets.h"
#include "tests/half_numbers.h"

namespace pykd::kernels {
namespace {

HWY_EXPORT(Exp2);
HWY_EXPORT(Exp2m1);
HWY_EXPORT(Log1p);
HWY_EXPORT(Exp);
HWY_EXPORT(Log);
HWY_EXPORT(WidenFloat16);
HWY_EXPORT(WidenBFloat16);
HWY_EXPORT(NarrowFloat16);
HWY_EXPORT(NarrowBFloat16);
HWY_EXPORT(StreamFloat32);
HWY_EXPORT(StreamFloat16);

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

class Simd : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { ASSERT_TRUE(use_simd(GetParam().c_str())); }
  void TearDown() override { use_simd(nullptr); }
};

INSTANTIATE_TEST_SUITE_P(Targets, Simd, testing::ValuesIn(simd_targets()),
                         [](const auto& target) { return target.param; });

using Function = void (*)(const float*, size_t, float*);

std::vector<float> evenly(float from, float to, size_t count) {
  std::vector<float> points(count);
  for (size_t i = 0; i < count; ++i) {
    points[i] = static_cast<float>(from + (to - from) * (static_cast<double>(i) + 0.5) / static_cast<double>(count));
  }
  return points;
}

double largest_relative_error(Function function, const std::vector<float>& points, double (*exact)(double)) {
  std::vector<float> results(points.size());
  function(points.data(), points.size(), results.data());
  double largest = 0;
  for (size_t i = 0; i < points.size(); ++i) {
    const double error = std::abs(results[i] / exact(points[i]) - 1);
    if (!(error <= largest)) largest = error;
  }
  return largest;
}

float at(Function function, float x) {
  float result;
  function(&x, 1, &result);
  return result;
}

void exp2_of(const float* in, size_t count, float* out) { HWY_DYNAMIC_DISPATCH(Exp2)(in, count, out); }
void exp_of(const float* in, size_t count, float* out) { HWY_DYNAMIC_DISPATCH(Exp)(in, count, out); }
void log_of(const float* in, size_t count, float* out) { HWY_DYNAMIC_DISPATCH(Log)(in, count, out); }
void exp2m1_of(const float* in, size_t count, float* out) { HWY_DYNAMIC_DISPATCH(Exp2m1)(in, count, out); }
void log1p_of(const float* in, size_t count, float* out) { HWY_DYNAMIC_DISPATCH(Log1p)(in, count, out); }
double exp2m1_exact(double x) { return std::expm1(x * 0.693147180559945309417); }

TEST_P(Simd, ExponentialsAndLogarithm) {
  constexpr size_t kPoints = 1000003;
  EXPECT_LT(largest_relative_error(exp2_of, evenly(-126, 127, kPoints), std::exp2), 2e-7);
  EXPECT_LT(largest_relative_error(exp2_of, evenly(-1, 1, kPoints), std::exp2), 2e-7);
  EXPECT_LT(largest_relative_error(exp_of, evenly(-87, 88, kPoints), std::exp), 3e-7);
  EXPECT_LT(largest_relative_error(exp_of, evenly(-1, 1, kPoints), std::exp), 3e-7);
  EXPECT_LT(largest_relative_error(log_of, evenly(0.0f, 2.0f, kPoints), std::log), 2e-7);
  EXPECT_LT(largest_relative_error(log_of, evenly(1.0f, 1e30f, kPoints), std::log), 2e-7);
  EXPECT_LT(largest_relative_error(log_of, {1e-37f, 1e37f, 0.999999f, 1.000001f}, std::log), 2e-7);
}

TEST_P(Simd, WhatIsNextTo1KeepsItsDigits) {
  std::vector<float> points;
  for (float x = -1e-30f; x > -125.0f; x *= 1.01f) points.insert(points.end(), {x, -x});
  EXPECT_LT(largest_relative_error(exp2m1_of, points, exp2m1_exact), 2e-7);
  std::vector<float> around = evenly(-0.9999f, 30.0f, 1000003);
  for (float x = 1e-30f; x < 0.999f; x *= 1.01f) around.insert(around.end(), {x, -x});
  EXPECT_LT(largest_relative_error(log1p_of, around, std::log1p), 3e-7);
  for (const Function function : {Function{exp2m1_of}, Function{log1p_of}}) {
    EXPECT_EQ(at(function, 0.0f), 0.0f);
    EXPECT_TRUE(std::isnan(at(function, kNan)));
  }
  for (const float far : {-127.0f, -1e38f, -kInf}) EXPECT_EQ(at(exp2m1_of, far), -1.0f) << far;
}

TEST_P(Simd, ExponentialsAndLogarithmAtTheEdges) {
  for (const Function function : {Function{exp2_of}, Function{exp_of}}) {
    EXPECT_EQ(at(function, 0.0f), 1.0f);
    EXPECT_EQ(at(function, -0.0f), 1.0f);
    for (const float far : {-126.5f, -127.0f, -1e4f, -1e38f, -kInf}) EXPECT_EQ(at(function, far), 0.0f) << far;
    EXPECT_TRUE(std::isnan(at(function, kNan)));
  }
  EXPECT_EQ(at(exp2_of, -126.0f), 0x1p-126f);
  EXPECT_EQ(at(exp2_of, 127.0f), 0x1p127f);
  EXPECT_EQ(at(log_of, 1.0f), 0.0f);
  EXPECT_TRUE(std::isnan(at(log_of, kNan)));
}

std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

std::vector<std::uint16_t> all_halves() {
  std::vector<std::uint16_t> halves(65536);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<std::uint16_t>(i);
  return halves;
}

TEST_P(Simd, EveryHalfWidensExactly) {
  const std::vector<std::uint16_t> halves = all_halves();
  std::vector<float> wide(halves.size());
  for (const size_t count : {halves.size(), halves.size() - 1}) {
    HWY_DYNAMIC_DISPATCH(WidenFloat16)(halves.data(), count, wide.data());
    for (size_t i = 0; i < count; ++i) {
      const float exact = tests::from_half(halves[i]);
      ASSERT_TRUE(std::isnan(exact) ? std::isnan(wide[i]) : bits_of(wide[i]) == bits_of(exact)) << "float16 " << i;
    }
    HWY_DYNAMIC_DISPATCH(WidenBFloat16)(halves.data(), count, wide.data());
    for (size_t i = 0; i < count; ++i) ASSERT_EQ(bits_of(wide[i]), i << 16) << "bfloat16 " << i;
  }
}

// Random bits, among them ties, numbers that are subnormal as float16, infinities and NaN.
std::vector<float> awkward_floats() {
  std::mt19937 random(3);
  std::vector<float> values = {0.0f,     -0.0f,      kInf,         -kInf,        kNan,
                               65504.0f, 65519.99f,  65520.0f,     -65536.0f,    0x1p-24f,
                               0x1p-25f, 0x1.8p-25f, 0x1.ffcp-15f, 0x1.ffep-15f, 3.4e38f};
  while (values.size() < 400003) {
    std::uint32_t bits = static_cast<std::uint32_t>(random());
    if (random() % 2 == 0) bits = (bits & 0x8fffffffu) | 0x30000000u;  // about 2^-31 to 2^0
    if (random() % 3 == 0) bits &= 0xfffff000u;                        // ties of float16
    if (random() % 3 == 0) bits &= 0xffff8000u;                        // ties of bfloat16
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    values.push_back(value);
  }
  return values;
}

TEST_P(Simd, NarrowsToTheNearestHalf) {
  const std::vector<float> values = awkward_floats();
  std::vector<std::uint16_t> halves(values.size() + 1, 0xABCD);
  HWY_DYNAMIC_DISPATCH(NarrowFloat16)(values.data(), values.size(), halves.data());
  for (size_t i = 0; i < values.size(); ++i) {
    const std::uint16_t exact = tests::to_half(values[i]);
    ASSERT_TRUE(std::isnan(values[i]) ? (halves[i] & 0x7fff) > 0x7c00 : halves[i] == exact) << values[i];
  }
  HWY_DYNAMIC_DISPATCH(NarrowBFloat16)(values.data(), values.size(), halves.data());
  for (size_t i = 0; i < values.size(); ++i) {
    const std::uint32_t bits = bits_of(values[i]);
    const std::uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    ASSERT_TRUE(std::isnan(values[i]) ? (halves[i] & 0x7fff) > 0x7f80 : halves[i] == nearest) << values[i];
  }
  EXPECT_EQ(halves.back(), 0xABCD);
}

TEST_P(Simd, StreamsWhatItStores) {
  const std::vector<float> values = awkward_floats();
  std::vector<std::uint16_t> stored(values.size() + 40), streamed(values.size() + 40);
  std::vector<float> floats(values.size() + 40);
  HWY_DYNAMIC_DISPATCH(NarrowFloat16)(values.data(), values.size(), stored.data());
  for (size_t offset = 0; offset < 33; ++offset) {
    const size_t count = 1000 + offset;
    std::fill(streamed.begin(), streamed.end(), std::uint16_t{0xABCD});
    HWY_DYNAMIC_DISPATCH(StreamFloat16)(values.data(), count, streamed.data() + offset);
    EXPECT_EQ(std::memcmp(streamed.data() + offset, stored.data(), count * sizeof(std::uint16_t)), 0) << offset;
    EXPECT_EQ(streamed[offset + count], 0xABCD);
    EXPECT_TRUE(offset == 0 || streamed[offset - 1] == 0xABCD);
    std::fill(floats.begin(), floats.end(), 7.0f);
    HWY_DYNAMIC_DISPATCH(StreamFloat32)(values.data(), count, floats.data() + offset);
    EXPECT_EQ(std::memcmp(floats.data() + offset, values.data(), count * sizeof(float)), 0) << offset;
    EXPECT_EQ(floats[offset + count], 7.0f);
    EXPECT_TRUE(offset == 0 || floats[offset - 1] == 7.0f);
  }
}

}  // namespace
}  // namespace pykd::kernels

#endif  // HWY_ONCE
