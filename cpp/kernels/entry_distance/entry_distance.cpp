#include "kernels/entry_distance/entry_distance.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "kernels/host/rows.h"
#include "kernels/kernel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/entry_distance/entry_distance.cpp"
#include "hwy/foreach_target.h"  // compiles this file once per instruction set

#include "hwy/highway.h"
#include "kernels/simd/memory-inl.h"

// ---- What all instruction sets share -------------------------------------------------------------
#ifndef PYKD_KERNELS_ENTRY_DISTANCE_SHARED_
#define PYKD_KERNELS_ENTRY_DISTANCE_SHARED_

namespace pykd::kernels::entry_distance {

struct Problem {
  pykd_dtype dtype;
  size_t rows, entries;
  Form form;
  const void* student;
  const void* teacher;
  const float* weight;  // nullptr where not given
  void* gradient;       // nullptr where not wanted
  double share;         // of an entry in the value of its row
  float beta;
  bool stream_gradient;  // write it past the caches
};

}  // namespace pykd::kernels::entry_distance

#endif  // PYKD_KERNELS_ENTRY_DISTANCE_SHARED_

// ---- Compiled for each instruction set -----------------------------------------------------------
HWY_BEFORE_NAMESPACE();
namespace pykd::kernels::entry_distance::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using kernels::HWY_NAMESPACE::entries_to_alignment;
using kernels::HWY_NAMESPACE::finish_streaming;
using kernels::HWY_NAMESPACE::load;
using kernels::HWY_NAMESPACE::store;
using kernels::HWY_NAMESPACE::stream;

using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

// What an entry adds to the value, and its derivative.
struct Term {
  V value, slope;
};

template <Form form>
HWY_INLINE Term term(V student, V teacher, float beta) {
  const D d;
  const V difference = hn::Sub(student, teacher), size = hn::Abs(difference);
  if constexpr (form == Form::kMse) {
    return {hn::Mul(difference, difference), hn::Add(difference, difference)};
  } else if constexpr (form == Form::kL1) {
    const V sign = hn::CopySign(hn::Set(d, 1.0f), difference);
    return {size, hn::IfThenElse(hn::Gt(size, hn::Zero(d)), sign, difference)};  // 0 and NaN stay
  } else {
    const V limit = hn::Set(d, beta);
    const V near = hn::IfThenElse(hn::Gt(size, limit), limit, size);
    const V share = hn::Div(near, limit);
    const V value = hn::Mul(share, hn::NegMulAdd(hn::Set(d, 0.5f), near, size));
    return {value, hn::CopySign(share, difference)};
  }
}

// The entries [first, last) of a row: writes their gradient, returns their sum.
template <class T, Form form>
double part(const Problem& problem, size_t row, size_t first, size_t last) {
  const D d;
  const size_t lanes = hn::Lanes(d), run = 64 * lanes;
  const float beta = problem.beta;
  const T* const student = static_cast<const T*>(problem.student) + row * problem.entries;
  const T* const teacher = static_cast<const T*>(problem.teacher) + row * problem.entries;
  T* const gradient = problem.gradient == nullptr ? nullptr : static_cast<T*>(problem.gradient) + row * problem.entries;
  const float weight = gradient == nullptr ? 0 : problem.weight[row];
  const V factor = hn::Set(d, static_cast<float>(problem.share * weight));
  const auto gradient_of = [&](V slope) __attribute__((always_inline)) {
    return weight == 0 ? hn::Zero(d) : hn::Mul(factor, slope);
  };
  double total = 0;
  // What a value is made of does not depend on where the gradient lies: only its stores do.
  size_t i = first;
  const size_t whole = last - (last - first) % lanes;
  const bool aligned = gradient != nullptr && problem.stream_gradient && entries_to_alignment(d, gradient + first) == 0;
  while (i < whole) {
    const size_t end = std::min(whole, i + run);
    V sum = hn::Zero(d);
    for (; i < end; i += lanes) {
      const Term one = term<form>(load(d, student + i), load(d, teacher + i), beta);
      sum = hn::Add(sum, one.value);
      if (aligned) {
        stream(gradient_of(one.slope), d, gradient + i);
      } else if (gradient != nullptr) {
        store(gradient_of(one.slope), d, gradient + i);
      }
    }
    total += hn::GetLane(hn::SumOfLanes(d, sum));
  }
  if (i < last) {
    const Term one = term<form>(load(d, student + i, last - i, 0.0f), load(d, teacher + i, last - i, 0.0f), beta);
    if (gradient != nullptr) store(gradient_of(one.slope), d, gradient + i, last - i);
    total += hn::GetLane(hn::SumOfLanes(d, one.value));
  }
  if (aligned) finish_streaming();
  return total;
}

template <class T>
double with_form(const Problem& problem, size_t row, size_t first, size_t last) {
  switch (problem.form) {
    case Form::kMse:
      return part<T, Form::kMse>(problem, row, first, last);
    case Form::kL1:
      return part<T, Form::kL1>(problem, row, first, last);
    case Form::kSmoothL1:
      break;
  }
  return part<T, Form::kSmoothL1>(problem, row, first, last);
}

double EntryDistancePart(const Problem& problem, size_t row, size_t first, size_t last) {
  switch (problem.dtype) {
    case PYKD_FLOAT16:
      return with_form<hwy::float16_t>(problem, row, first, last);
    case PYKD_BFLOAT16:
      return with_form<hwy::bfloat16_t>(problem, row, first, last);
    default:
      return with_form<float>(problem, row, first, last);
  }
}

}  // namespace pykd::kernels::entry_distance::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

// ---- Compiled once -------------------------------------------------------------------------------
#if HWY_ONCE

namespace pykd::kernels::entry_distance {
namespace {

HWY_EXPORT(EntryDistancePart);

const char* refuse(const Call& call) {
  if (call.outputs[kGradStudent].given() && !call.inputs[kWeight].given()) return "grad_student needs weight";
  const double beta = call.attributes[kBeta];
  if (static_cast<Form>(call.choice(kForm)) == Form::kSmoothL1 &&
      !(static_cast<float>(beta) > 0 && std::isfinite(static_cast<float>(beta)))) {
    return "beta of smooth_l1 must be above 0";
  }
  return nullptr;
}

void run(const Call& call) {
  Problem problem{};
  const Array& student = call.inputs[kStudent];
  problem.dtype = call.dtype;
  problem.rows = static_cast<size_t>(student.length(0));
  problem.entries = static_cast<size_t>(student.length(1));
  problem.form = static_cast<Form>(call.choice(kForm));
  problem.student = student.data;
  problem.teacher = call.inputs[kTeacher].data;
  problem.weight = call.inputs[kWeight].as<const float>();
  problem.gradient = call.outputs[kGradStudent].data;
  const bool mean = static_cast<Average>(call.choice(kAverage)) == Average::kMean;
  problem.share = mean ? 1.0 / static_cast<double>(problem.entries) : 1.0;
  problem.beta = static_cast<float>(call.attributes[kBeta]);
  problem.stream_gradient = problem.gradient != nullptr && is_streamed(problem.rows * problem.entries, call.dtype);

  // A part is some entries of one row, a task some parts; neither depends on the number of threads.
  const size_t parts_per_row = (problem.entries + kTaskEntries - 1) / kTaskEntries;
  const size_t parts = problem.rows * parts_per_row;
  const size_t task_parts = std::max<size_t>(kTaskEntries / problem.entries, 1);
  std::vector<double> sums(parts);
  call.parallel->for_each(static_cast<std::int64_t>((parts + task_parts - 1) / task_parts), [&](std::int64_t task) {
    const size_t begin = static_cast<size_t>(task) * task_parts;
    for (size_t i = begin; i < std::min(begin + task_parts, parts); ++i) {
      const size_t first = i % parts_per_row * kTaskEntries;
      sums[i] = HWY_DYNAMIC_DISPATCH(EntryDistancePart)(problem, i / parts_per_row, first,
                                                        std::min(first + kTaskEntries, problem.entries));
    }
  });
  float* const value = call.outputs[kValue].as<float>();
  for (size_t row = 0; row < problem.rows && value != nullptr; ++row) {
    double sum = 0;
    for (size_t i = 0; i < parts_per_row; ++i) sum += sums[row * parts_per_row + i];
    value[row] = static_cast<float>(problem.share * sum);
  }
}

const bool registered = add({
    "entry_distance",
    {{"student", "batch entries", Role::kTensor},
     {"teacher", "batch entries", Role::kTensor},
     {"weight", "batch", Role::kFloat32, kOptional}},
    {{"value", "batch", Role::kFloat32}, {"grad_student", "batch entries", Role::kTensor}},
    {{"form", 0, {"mse", "l1", "smooth_l1"}}, {"average", 0, {"mean", "sum"}}, {"beta", 1.0}},
    kFloatAndHalves,
    refuse,
    run,
});

}  // namespace
}  // namespace pykd::kernels::entry_distance

#endif  // HWY_ONCE
