#include "kernels/feature_distance/feature_distance.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/feature_distance/feature_distance.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/feature_distance/feature_distance_directions.h"
#include "kernels/simd/memory-inl.h"

// ---- What does not depend on the instruction set -------------------------------------------------
#ifndef PYKD_KERNELS_FEATURE_DISTANCE_ONCE_
#define PYKD_KERNELS_FEATURE_DISTANCE_ONCE_

namespace pykd::kernels::feature {

constexpr std::size_t kTask = 32768;        // channels of all its tokens, about
constexpr std::size_t kRun = 256;           // channels that one lane sums in float32
constexpr std::size_t kStreamed = 8 << 20;  // bytes

// One call as a task needs it.
struct Job {
  const void* student;
  const void* teacher;
  void* gradient;       // nullptr: not wanted
  const float* weight;  // nullptr only where the gradient is not wanted
  std::size_t tokens, channels;
  bool value;
  bool stream;
};

// Tokens [first, last) of one row of the batch: writes their gradients, returns the sum of their distances.
using Part = double (*)(const Job& job, std::size_t row, std::size_t first, std::size_t last);

}  // namespace pykd::kernels::feature

#endif  // PYKD_KERNELS_FEATURE_DISTANCE_ONCE_

// ---- Once per instruction set --------------------------------------------------------------------
HWY_BEFORE_NAMESPACE();
namespace pykd::kernels::HWY_NAMESPACE {
namespace feature_detail {

using namespace feature;
namespace hn = hwy::HWY_NAMESPACE;

using D32 = hn::ScalableTag<float>;
using V32 = hn::Vec<D32>;

HWY_INLINE double sum_of(V32 v) { return static_cast<double>(hn::GetLane(hn::SumOfLanes(D32(), v))); }

template <class T, Power power>
struct Token {
  const T* x;
  const T* y;
  std::size_t channels;

  // add(x, y) for the channels [first, last), vector by vector; lanes beyond the last are 0 in both.
  template <class Add>
  HWY_INLINE void for_each(std::size_t first, std::size_t last, const Add& add) const {
    const D32 d;
    const std::size_t lanes = hn::Lanes(d);
    std::size_t c = first;
    for (; c + lanes <= last; c += lanes) add(load(d, x + c), load(d, y + c));
    if (c < last) add(load(d, x + c, last - c, 0.0f), load(d, y + c, last - c, 0.0f));
  }

  Directions directions() const {
    const D32 d;
    const std::size_t run = kRun * hn::Lanes(d);
    double x_squares = 0.0, y_squares = 0.0;
    for (std::size_t c = 0; c < channels; c += run) {
      V32 sum_x = hn::Zero(d), sum_y = hn::Zero(d);
      for_each(c, std::min(c + run, channels), [&](V32 vx, V32 vy) HWY_ATTR {
        sum_x = hn::MulAdd(vx, vx, sum_x);
        sum_y = hn::MulAdd(vy, vy, sum_y);
      });
      x_squares += sum_of(sum_x);
      y_squares += sum_of(sum_y);
    }
    return {in_range(x_squares) ? x_squares : squares_out_of_range(x, x_squares),
            in_range(y_squares) ? y_squares : squares_out_of_range(y, y_squares)};
  }

  // The squares of a token some of which float32 does not hold, or of one with NaN or an infinity, which come out as
  // such: those of the token times a power of 2.
  HWY_NOINLINE double squares_out_of_range(const T* token, double squares) const {
    const D32 d;
    const std::size_t lanes = hn::Lanes(d), run = kRun * lanes;
    const float multiplier = range_multiplier(squares);
    const V32 factor = hn::Set(d, multiplier);
    double result = 0.0;
    for (std::size_t start = 0; start < channels; start += run) {
      V32 sum = hn::Zero(d);
      const auto add = [&](V32 entries) HWY_ATTR {
        const V32 scaled = hn::Mul(entries, factor);
        sum = hn::MulAdd(scaled, scaled, sum);
      };
      const std::size_t end = std::min(start + run, channels);
      std::size_t c = start;
      for (; c + lanes <= end; c += lanes) add(load(d, token + c));
      if (c < end) add(load(d, token + c, end - c, 0.0f));
      result += sum_of(sum);
    }
    const double back = 1.0 / static_cast<double>(multiplier);
    return result * back * back;
  }

  // d |difference|^power / d difference, up to the factor 2 of l2.
  static HWY_INLINE V32 slope(V32 difference) {
    if (power != kL1) return difference;
    const D32 d;
    const V32 sign = hn::CopySign(hn::Set(d, 1.0f), difference);
    return hn::IfThenElse(hn::Gt(hn::Abs(difference), hn::Zero(d)), sign, difference);  // 0 and NaN stay
  }

  // The distance; and the slopes' component along x^, where the gradient is wanted.
  template <bool gradient>
  double distance(const Directions& directions, double* along) const {
    const D32 d;
    const std::size_t run = kRun * hn::Lanes(d);
    const V32 keep = hn::Set(d, directions.keep()), ratio = hn::Set(d, directions.ratio());
    const V32 scale = hn::Set(d, directions.scale());
    double value = 0.0;
    *along = 0.0;
    for (std::size_t c = 0; c < channels; c += run) {
      V32 sum = hn::Zero(d), product = hn::Zero(d);
      for_each(c, std::min(c + run, channels), [&](V32 vx, V32 vy) HWY_ATTR {
        const V32 kept = hn::Mul(vx, keep);
        const V32 difference = hn::Mul(hn::NegMulAdd(vy, ratio, kept), scale);
        sum = power != kL1 ? hn::MulAdd(difference, difference, sum) : hn::Add(sum, hn::Abs(difference));
        if (gradient) product = hn::MulAdd(hn::Mul(kept, scale), slope(difference), product);
      });
      value += sum_of(sum);
      if (gradient) *along += sum_of(product);
    }
    return distance_of<power>(value, directions);
  }

  // The gradient of a token that has a direction.
  void differentiate(const Directions& directions, float along, float factor, T* to, bool past_caches) const {
    const D32 d;
    const std::size_t lanes = hn::Lanes(d);
    const V32 keep = hn::Set(d, directions.keep()), ratio = hn::Set(d, directions.ratio());
    const V32 scale = hn::Set(d, directions.scale()), component = hn::Set(d, along);
    const V32 result_scale = hn::Set(d, static_cast<float>(double{factor} * directions.x_reciprocal()));
    const auto entries = [&](V32 vx, V32 vy) HWY_ATTR {
      const V32 kept = hn::Mul(vx, keep);
      const V32 across = slope(hn::Mul(hn::NegMulAdd(vy, ratio, kept), scale));
      return hn::Mul(result_scale, hn::NegMulAdd(hn::Mul(kept, scale), component, across));
    };
    const auto some = [&](std::size_t c, std::size_t count) HWY_ATTR {
      store(entries(load(d, x + c, count, 0.0f), load(d, y + c, count, 0.0f)), d, to + c, count);
    };
    std::size_t c = 0;
    if (past_caches) {
      c = std::min(entries_to_alignment(d, to), channels);
      if (c > 0) some(0, c);
      for (; c + lanes <= channels; c += lanes) stream(entries(load(d, x + c), load(d, y + c)), d, to + c);
    } else {
      for (; c + lanes <= channels; c += lanes) store(entries(load(d, x + c), load(d, y + c)), d, to + c);
    }
    if (c < channels) some(c, channels - c);
  }
};

template <class T, Power power>
double part(const Job& job, std::size_t row, std::size_t first, std::size_t last) {
  const float weight = job.gradient == nullptr ? 0.0f : job.weight[row];
  const float factor = (power == kL2 ? 2.0f : 1.0f) * weight / static_cast<float>(job.tokens);
  double sum = 0.0;
  for (std::size_t i = row * job.tokens + first; i < row * job.tokens + last; ++i) {
    const std::size_t start = i * job.channels;
    T* gradient = job.gradient == nullptr ? nullptr : static_cast<T*>(job.gradient) + start;
    if (gradient != nullptr && weight == 0.0f) {
      std::memset(gradient, 0, job.channels * sizeof(T));
      gradient = nullptr;
    }
    if (gradient == nullptr && !job.value) continue;
    const Token<T, power> token{static_cast<const T*>(job.student) + start, static_cast<const T*>(job.teacher) + start,
                                job.channels};
    const Directions directions = token.directions();
    double along;
    if (gradient == nullptr) {
      sum += token.template distance<false>(directions, &along);
      continue;
    }
    sum += token.template distance<true>(directions, &along);
    if (turns_nowhere(directions, job.channels == 1, along)) {
      std::memset(gradient, 0, job.channels * sizeof(T));
    } else {
      token.differentiate(directions, static_cast<float>(along), factor, gradient, job.stream);
    }
  }
  if (job.stream) finish_streaming();
  return sum;
}

template <class T>
Part choose(int power) {
  return power == kL1 ? part<T, kL1> : power == kL2 ? part<T, kL2> : part<T, kCosine>;
}

}  // namespace feature_detail

feature::Part feature_part(pykd_dtype dtype, int power) {
  switch (dtype) {
    case PYKD_FLOAT16:
      return feature_detail::choose<hwy::float16_t>(power);
    case PYKD_BFLOAT16:
      return feature_detail::choose<hwy::bfloat16_t>(power);
    default:
      return feature_detail::choose<float>(power);
  }
}

}  // namespace pykd::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

// ---- The kernel ----------------------------------------------------------------------------------
#if HWY_ONCE
namespace pykd::kernels {
namespace {

HWY_EXPORT(feature_part);

const char* refuse(const Call& call) {
  const bool weightless = call.outputs[feature::kGradStudent].given() && !call.inputs[feature::kWeight].given();
  return weightless ? "grad_student needs weight" : nullptr;
}

}  // namespace

void feature_distance(const Call& call) {
  using namespace feature;
  const Array& student = call.inputs[kStudent];
  const Array& gradient = call.outputs[kGradStudent];
  float* value = call.outputs[kValue].as<float>();
  const auto batch = static_cast<std::size_t>(student.length(0));
  const auto tokens = static_cast<std::size_t>(student.length(1));
  const auto channels = static_cast<std::size_t>(student.length(2));
  const std::size_t entry = call.dtype == PYKD_FLOAT32 ? sizeof(float) : sizeof(hwy::float16_t);
  const Job job{student.data,     call.inputs[kTeacher].data,
                gradient.data,    call.inputs[kWeight].as<const float>(),
                tokens,           channels,
                value != nullptr, gradient.given() && batch * tokens * channels * entry > kStreamed};
  const Part part = HWY_DYNAMIC_DISPATCH(feature_part)(call.dtype, call.choice(0));

  // A part is some tokens of one row; a task some parts. Neither depends on the number of threads.
  const std::size_t part_tokens = std::min(std::max<std::size_t>(kTask / channels, 1), tokens);
  const std::size_t parts_per_row = (tokens + part_tokens - 1) / part_tokens;
  const std::size_t parts = batch * parts_per_row;
  const std::size_t task_parts = std::max<std::size_t>(kTask / (part_tokens * channels), 1);
  const auto mean = [tokens](double sum) { return static_cast<float>(sum / static_cast<double>(tokens)); };
  std::vector<double> sums(parts_per_row > 1 && value != nullptr ? parts : 0);
  call.parallel->for_each(static_cast<std::int64_t>((parts + task_parts - 1) / task_parts), [&](std::int64_t task) {
    const std::size_t begin = static_cast<std::size_t>(task) * task_parts;
    for (std::size_t i = begin; i < std::min(begin + task_parts, parts); ++i) {
      const std::size_t row = i / parts_per_row, first = i % parts_per_row * part_tokens;
      const double sum = part(job, row, first, std::min(first + part_tokens, tokens));
      if (!sums.empty()) {
        sums[i] = sum;
      } else if (value != nullptr) {
        value[row] = mean(sum);
      }
    }
  });
  for (std::size_t row = 0; row < batch && !sums.empty(); ++row) {
    double sum = 0.0;
    for (std::size_t i = 0; i < parts_per_row; ++i) sum += sums[row * parts_per_row + i];
    value[row] = mean(sum);
  }
}

namespace {
const bool registered =
    add({"feature_distance",
         {{"student", "batch tokens channels", Role::kTensor},
          {"teacher", "batch tokens channels", Role::kTensor},
          {"weight", "batch", Role::kFloat32, kOptional}},
         {{"value", "batch", Role::kFloat32}, {"grad_student", "batch tokens channels", Role::kTensor}},
         {{"power", feature::kL1, {"l1", "l2", "cosine"}}},
         kFloatAndHalves,
         refuse,
         feature_distance});
}  // namespace

}  // namespace pykd::kernels
#endif  // HWY_ONCE
