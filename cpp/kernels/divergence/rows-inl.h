// File: kernels/divergence/rows-inl.h
//
// The passes over a row of a student's and a teacher's logits, for kernels compiled once per instruction set. Include
// it as math-inl.h. A row may be taken in pieces; what is said of a row here holds for a piece.
//
//     maximum(p, count)      the largest logit
//     exponentials(...)      e of every class, with their sums
//     terms(...)             what every class adds to the value, and what the gradient needs to know of it
//     write_gradient(...)    factor (q (slope - mean) + own)
#if defined(PYKD_KERNELS_DIVERGENCE_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef PYKD_KERNELS_DIVERGENCE_ROWS_INL_H_
#undef PYKD_KERNELS_DIVERGENCE_ROWS_INL_H_
#else
#define PYKD_KERNELS_DIVERGENCE_ROWS_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "hwy/highway.h"
#include "kernels/simd/math-inl.h"
#include "kernels/simd/memory-inl.h"

HWY_BEFORE_NAMESPACE();
namespace pykd::kernels::divergence::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using kernels::HWY_NAMESPACE::entries_to_alignment;
using kernels::HWY_NAMESPACE::exp2;
using kernels::HWY_NAMESPACE::exp2m1;
using kernels::HWY_NAMESPACE::finish_streaming;
using kernels::HWY_NAMESPACE::kLog2E;
using kernels::HWY_NAMESPACE::load;
using kernels::HWY_NAMESPACE::store;
using kernels::HWY_NAMESPACE::stream;

using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLn2InDouble = 0.693147180559945309417;

// Sums over a row. y = (logit - largest) / T to the base 2, at most 0; e = 2^y.
struct Sums {
  double student = 0;  // sum e
  double teacher = 0;
  double student_scores = 0;  // sum e y, for the entropies
  double teacher_scores = 0;
  double excess = 0;  // sum e_student - e_teacher, each with its digits however small it is

  Sums& operator+=(const Sums& other) {
    student += other.student;
    teacher += other.teacher;
    student_scores += other.student_scores;
    teacher_scores += other.teacher_scores;
    excess += other.excess;
    return *this;
  }
};

// What a row has found out before the terms of its classes: what makes y a logarithm and e a probability.
struct Facts {
  float student_top, teacher_top, scale2;
  float student_factor, teacher_factor;  // q = student_factor e_student
  float log_student, log_teacher;        // log2 q = y_student - log_student
  float log_ratio;                       // log2 (q / p) = y_student - y_teacher - log_ratio
};

// What makes probabilities of exponentials: the sum of the student's, and logarithms to the base 2 of the teacher's sum
// and of the ratio of both. `almost_equal`: taken by how little they differ, where that is little.
struct Normalizers {
  double student, log_teacher, log_ratio;

  Normalizers(const Sums& sums, bool almost_equal)
      : student(sums.student),
        log_teacher(std::log2(sums.teacher)),
        log_ratio(std::log2(sums.student) - std::log2(sums.teacher)) {
    const double ratio = sums.excess / sums.teacher;
    if (almost_equal && std::abs(ratio) < 0.5 && !std::isnan(sums.student)) {
      student = sums.teacher * (1 + ratio);
      log_ratio = std::log1p(ratio) / kLn2InDouble;
    }
  }
  void enter(Facts& facts, const Sums& sums) const {
    facts.student_factor = static_cast<float>(1 / student);
    facts.teacher_factor = static_cast<float>(1 / sums.teacher);
    facts.log_teacher = static_cast<float>(log_teacher);
    facts.log_student = static_cast<float>(log_teacher + log_ratio);
    facts.log_ratio = static_cast<float>(log_ratio);
  }
};

// value, but 0 where factor is 0 (not where it is NaN).
HWY_INLINE V unless_zero(V factor, V value) { return hn::IfThenZeroElse(hn::Eq(factor, hn::Zero(D())), value); }

HWY_INLINE double sum_of_lanes(V v) { return hn::GetLane(hn::SumOfLanes(D(), v)); }

HWY_INLINE V set(double number) { return hn::Set(D(), static_cast<float>(number)); }

// Entries that a lane of a vector sums up in float32: no more than 64.
HWY_INLINE size_t part_entries() { return 64 * hn::Lanes(D()); }

// ---- Classes -------------------------------------------------------------------------------------

// A class: p, q, their logarithms to the base 2, that of q / p, and whether q > p.
struct Class {
  V p, q, log_p, log_q, log_ratio;
  hn::Mask<D> student_leads;
};

// What it adds to the value, at least 0. And to the gradient, before the temperature and the weight: q (slope - mean) +
// own, where the mean is that of the slopes over q, plus the sum of all own.
struct Term {
  V value, slope, own;
};

// p and q relative to the larger of the two, so that nothing overflows and equal ones give exactly 0.
struct Ratio {
  V less;     // the smaller one, relative to the larger, less 1: from -1 to 0
  V quarrel;  // (q - p) / max(p, q)

  HWY_INLINE explicit Ratio(const Class& at) {
    less = exp2m1(D(), hn::Neg(hn::Abs(at.log_ratio)));
    quarrel = hn::IfThenElse(at.student_leads, hn::Neg(less), less);
  }
  HWY_INLINE V difference(const Class& at) const { return hn::Mul(quarrel, hn::Max(at.p, at.q)); }  // q - p
};

// ---- The passes ----------------------------------------------------------------------------------

// Calls body(i) for every whole vector of [begin, end), and returns where the rest begins.
template <class Body>
HWY_INLINE size_t whole_vectors(size_t begin, size_t end, const Body& body) {
  const size_t lanes = hn::Lanes(D());
  size_t i = begin;
  for (; i + lanes <= end; i += lanes) body(i);
  return i;
}

template <class T>
HWY_NOINLINE float maximum(const T* HWY_RESTRICT p, size_t count) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  V top0 = hn::Set(d, -kInfinity), top1 = top0;
  size_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    top0 = hn::Max(top0, load(d, p + i));
    top1 = hn::Max(top1, load(d, p + i + lanes));
  }
  if (i + lanes <= count) {
    top0 = hn::Max(top0, load(d, p + i));
    i += lanes;
  }
  if (i < count) top1 = hn::Max(top1, load(d, p + i, count - i, -kInfinity));
  return hn::GetLane(hn::MaxOfLanes(d, hn::Max(top0, top1)));
}

// The exponentials of a row, and their sums; without `with_teacher` those of the student alone.
template <bool with_teacher, bool entropies, bool almost_equal, class T>
HWY_NOINLINE Sums exponentials(const T* HWY_RESTRICT student, const T* HWY_RESTRICT teacher, size_t classes,
                               float student_top, float teacher_top, float scale2, float* HWY_RESTRICT student_out,
                               float* HWY_RESTRICT teacher_out) {
  const D d;
  const V student_high = hn::Set(d, student_top), teacher_high = hn::Set(d, teacher_top), scale = hn::Set(d, scale2);
  Sums sums;
  V of_student, of_teacher, student_scores, teacher_scores, excess;
  // `present(x)` is x, less what lies in lanes without a class.
  const auto add = [&](size_t i, V student_logits, V teacher_logits, const auto& present)
      __attribute__((always_inline)) {
    const V student_y = hn::Mul(hn::Sub(student_logits, student_high), scale);
    const V student_e = present(exp2(d, student_y));
    of_student = hn::Add(of_student, student_e);
    hn::Store(student_e, d, student_out + i);
    if constexpr (!with_teacher) return;
    const V teacher_y = hn::Mul(hn::Sub(teacher_logits, teacher_high), scale);
    const V teacher_e = present(exp2(d, teacher_y));
    of_teacher = hn::Add(of_teacher, teacher_e);
    hn::Store(teacher_e, d, teacher_out + i);
    if constexpr (entropies) {
      student_scores = hn::MulAdd(student_e, unless_zero(student_e, student_y), student_scores);
      teacher_scores = hn::MulAdd(teacher_e, unless_zero(teacher_e, teacher_y), teacher_scores);
    }
    if constexpr (almost_equal) {
      const V apart = hn::Sub(student_y, teacher_y), one = hn::Set(d, 1.0f);
      const V above = hn::IfThenElse(hn::Gt(apart, one), hn::Sub(student_e, teacher_e),
                                     hn::Mul(teacher_e, exp2m1(d, hn::Min(apart, one))));
      excess = hn::Add(excess, unless_zero(hn::Add(student_e, teacher_e), above));
    }
  };
  for (size_t part = 0; part < classes; part += part_entries()) {
    const size_t end = std::min(classes, part + part_entries());
    of_student = of_teacher = student_scores = teacher_scores = excess = hn::Zero(d);
    const size_t i = whole_vectors(
        part, end, [&](size_t at) __attribute__((always_inline)) {
          const V student_logits = load(d, student + at);
          add(at, student_logits, with_teacher ? load(d, teacher + at) : student_logits,
              [](V e) HWY_ATTR { return e; });
        });
    if (i < end) {
      const auto there = hn::FirstN(d, end - i);
      const V student_logits = load(d, student + i, end - i, student_top);
      add(i, student_logits, with_teacher ? load(d, teacher + i, end - i, teacher_top) : student_logits,
          [there](V e) HWY_ATTR { return hn::IfThenElseZero(there, e); });
    }
    sums.student += sum_of_lanes(of_student);
    sums.teacher += sum_of_lanes(of_teacher);
    sums.student_scores += sum_of_lanes(student_scores);
    sums.teacher_scores += sum_of_lanes(teacher_scores);
    sums.excess += sum_of_lanes(excess);
  }
  return sums;
}

struct Totals {
  double value = 0;
  double mean = 0;  // of the slopes over q, plus what classes have of their own

  Totals& operator+=(const Totals& other) {
    value += other.value;
    mean += other.mean;
    return *this;
  }
};

// Adds up the terms of a row; leaves their slopes in the place of the teacher's exponentials, and what they have of
// their own in `own`, or in that place where there are no slopes.
template <class T, class Terms>
HWY_NOINLINE Totals terms(const T* HWY_RESTRICT student, const T* HWY_RESTRICT teacher, size_t classes,
                          const Facts& row_facts, const Terms& row_terms, const float* HWY_RESTRICT student_e,
                          float* HWY_RESTRICT teacher_e, float* HWY_RESTRICT own_out) {
  const D d;
  const Facts facts = row_facts;  // copies, which no store can change
  const Terms term_of = row_terms;
  const V none = hn::Set(d, -kInfinity);
  Totals totals;
  V value, mean;
  const auto add = [&](size_t i, V student_logits, V teacher_logits, const auto& present)
      __attribute__((always_inline)) {
    const V scale = hn::Set(d, facts.scale2);
    const V student_y = hn::Mul(hn::Sub(student_logits, hn::Set(d, facts.student_top)), scale);
    const V teacher_y = hn::Mul(hn::Sub(teacher_logits, hn::Set(d, facts.teacher_top)), scale);
    Class at;
    at.q = hn::Mul(hn::Load(d, student_e + i), hn::Set(d, facts.student_factor));
    at.p = hn::Mul(hn::Load(d, teacher_e + i), hn::Set(d, facts.teacher_factor));
    at.log_q = hn::Sub(student_y, hn::Set(d, facts.log_student));
    at.log_p = hn::Sub(teacher_y, hn::Set(d, facts.log_teacher));
    const auto absent = hn::And(hn::Eq(student_y, none), hn::Eq(teacher_y, none));
    at.log_ratio = hn::IfThenZeroElse(absent, hn::Sub(hn::Sub(student_y, teacher_y), hn::Set(d, facts.log_ratio)));
    at.student_leads = hn::Gt(at.log_ratio, hn::Zero(d));
    const Term term = term_of(at);
    value = hn::Add(value, present(term.value));
    if constexpr (Terms::kSlope) {
      mean = hn::MulAdd(at.q, present(term.slope), mean);
      hn::Store(term.slope, d, teacher_e + i);
    }
    if constexpr (Terms::kOwn) {
      mean = hn::Add(mean, present(term.own));
      hn::Store(term.own, d, (Terms::kSlope ? own_out : teacher_e) + i);
    }
  };
  for (size_t part = 0; part < classes; part += part_entries()) {
    const size_t end = std::min(classes, part + part_entries());
    value = mean = hn::Zero(d);
    const size_t i = whole_vectors(
        part, end, [&](size_t at) __attribute__((always_inline)) {
          add(at, load(d, student + at), load(d, teacher + at), [](V x) HWY_ATTR { return x; });
        });
    if (i < end) {
      const auto there = hn::FirstN(d, end - i);
      add(i, load(d, student + i, end - i, facts.student_top), load(d, teacher + i, end - i, facts.teacher_top),
          [there](V x) HWY_ATTR { return hn::IfThenElseZero(there, x); });
    }
    totals.value += sum_of_lanes(value);
    totals.mean += sum_of_lanes(mean);
  }
  return totals;
}

// gradient = factor (q (slope - mean) + own), with q = share e_student.
struct Coefficients {
  float factor, share, mean, rest;  // the mean is mean + rest
};

template <class T, class Terms>
HWY_NOINLINE void write_gradient(const float* HWY_RESTRICT student_e, const float* HWY_RESTRICT slopes,
                                 const float* HWY_RESTRICT own, size_t classes, const Coefficients& row,
                                 bool past_caches, T* HWY_RESTRICT gradient) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  const Coefficients c = row;
  const auto at = [&](size_t i) __attribute__((always_inline)) {
    const V q = hn::Mul(hn::LoadU(d, student_e + i), hn::Set(d, c.share));
    V above = hn::Set(d, -c.mean);
    if constexpr (Terms::kSlope) above = hn::Add(hn::LoadU(d, slopes + i), above);
    above = hn::Sub(above, hn::Set(d, c.rest));
    V result = unless_zero(q, hn::Mul(q, above));
    if constexpr (Terms::kOwn) result = hn::Add(result, hn::LoadU(d, (Terms::kSlope ? own : slopes) + i));
    return hn::Mul(hn::Set(d, c.factor), result);
  };
  size_t i = 0;
  if (past_caches) {
    const size_t head = std::min(entries_to_alignment(d, gradient), classes);
    if (head > 0) store(at(0), d, gradient, head);
    for (i = head; i + lanes <= classes; i += lanes) stream(at(i), d, gradient + i);
  } else {
    for (; i + lanes <= classes; i += lanes) store(at(i), d, gradient + i);
  }
  if (i < classes) store(at(i), d, gradient + i, classes - i);
}

}  // namespace pykd::kernels::divergence::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard, once per target
