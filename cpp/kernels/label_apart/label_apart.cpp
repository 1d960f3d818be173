#include "kernels/label_apart/label_apart.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "kernels/host/checks.h"
#include "kernels/host/memory.h"
#include "kernels/host/rows.h"
#include "kernels/kernel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/label_apart/label_apart.cpp"
#include "hwy/foreach_target.h"  // compiles this file once per instruction set

#include "hwy/highway.h"
#include "kernels/divergence/rows-inl.h"

// ---- What all instruction sets share -------------------------------------------------------------
#ifndef PYKD_KERNELS_LABEL_APART_SHARED_
#define PYKD_KERNELS_LABEL_APART_SHARED_

namespace pykd::kernels::label_apart {

constexpr double kLn2 = 0.693147180559945309417;
constexpr double kNothing = -std::numeric_limits<double>::infinity();

struct Problem {
  pykd_dtype dtype;
  size_t rows, classes;
  Form form;
  const void* student;
  const void* teacher;  // these three: nullptr where not given
  const std::int64_t* labels;
  const float* weight;
  float* value;
  void* gradient;
  float temperature;
  float scale;  // of the logits: 1 / T
  double target_weight, other_weight;
  double threshold, label_probability;
  bool raise_right;
  bool almost_equal;     // a temperature at which p and q may be, and their divergence small beside their rounding
  bool at_one;           // the label's part has a softmax of its own, without temperature
  bool stream_gradient;  // write it past the caches
};

// Floats of scratch memory per class, and of that for two pieces of a row, each in whole vectors.
inline size_t floats_of_row(size_t classes) { return padded(classes) + 192; }

// Logarithms of what may be 0, and no floating-point exception.
inline double log_of(double x) { return x == 0 ? kNothing : std::log(x); }
inline double log2_of(double x) { return x == 0 ? kNothing : std::log2(x); }

// 1 / (1 + e^-x), which neither overflows nor loses the digits of what is almost 0.
inline double logistic(double x) {
  if (x >= 0) return 1 / (1 + std::exp(-x));
  const double e = std::exp(x);
  return e / (1 + e);
}

// log(1 + e^x)
inline double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

// factor x, and 0 where the factor is 0, even of an infinite x. NaN stays.
inline double times(double factor, double x) { return factor == 0 && !std::isnan(x) ? 0 : factor * x; }

// The probability of the label and that of all others together, each with its digits however small it is.
struct LabelAndRest {
  double label, rest, log_label, log_rest;

  LabelAndRest(double of_label, double of_rest)
      : label(of_label), rest(of_rest), log_label(log_of(of_label)), log_rest(log_of(of_rest)) {}
  // By the score of the label, log(label / rest).
  explicit LabelAndRest(double score)
      : label(logistic(score)), rest(logistic(-score)), log_label(-softplus(-score)), log_rest(-softplus(score)) {}
};

// What the label adds to the value, and d(that) / d(the student's score).
struct LabelTerm {
  double value = 0, slope = 0;

  static LabelTerm divergence(const LabelAndRest& p, const LabelAndRest& q) {
    double value = 0;
    if (p.label != 0) value += p.label * (p.log_label - q.log_label);
    if (p.rest != 0) value += p.rest * (p.log_rest - q.log_rest);
    return {value < 0 ? 0 : value, p.label > 0.5 ? p.rest - q.rest : q.label - p.label};
  }
  static LabelTerm cross_entropy(double p_label, const LabelAndRest& q) {
    return {times(p_label, -q.log_label), -times(p_label, q.rest)};
  }
};

// The teacher's p, corrected until the label leads. `largest`: the largest probability beside the label.
inline LabelAndRest corrected(const LabelAndRest& p, double largest, bool right, const Problem& problem) {
  const double threshold = problem.threshold;
  if (right) {
    if (!problem.raise_right) return p;
    return {std::min(p.label + threshold, 1.0), std::max(p.rest - threshold, 0.0)};
  }
  const double lead = largest - p.label, kept = (1 - threshold) / (1 + lead);
  return {((1 - threshold) * p.label + lead + threshold) / (1 + lead), kept * p.rest};
}

}  // namespace pykd::kernels::label_apart

#endif  // PYKD_KERNELS_LABEL_APART_SHARED_

// ---- Compiled for each instruction set -----------------------------------------------------------
HWY_BEFORE_NAMESPACE();
namespace pykd::kernels::label_apart::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
namespace passes = divergence::HWY_NAMESPACE;
using passes::Class;
using passes::D;
using passes::Facts;
using passes::kInfinity;
using passes::kLog2E;
using passes::load;
using passes::Normalizers;
using passes::Ratio;
using passes::set;
using passes::store;
using passes::Sums;
using passes::Term;
using passes::Totals;
using passes::unless_zero;
using passes::V;

// ---- What the classes beside the label add --------------------------------------------------------

// The divergence, in terms that are never negative; its gradient times `weight`.
struct Kl {
  static constexpr bool kSlope = false, kOwn = true;
  float weight;

  HWY_INLINE Term operator()(const Class& at) const {
    const V difference = Ratio(at).difference(at);
    const V log_ratio = hn::Mul(at.log_ratio, set(kLn2));
    return {hn::Sub(difference, unless_zero(at.p, hn::Mul(at.p, log_ratio))), hn::Zero(D()),
            hn::Mul(hn::Set(D(), weight), difference)};
  }
};

struct CrossEntropy {
  static constexpr bool kSlope = false, kOwn = true;
  float weight;

  HWY_INLINE Term operator()(const Class& at) const {
    const V value = unless_zero(at.p, hn::Mul(at.p, hn::Mul(at.log_q, set(-kLn2))));
    return {value, hn::Zero(D()), hn::Mul(hn::Set(D(), weight), Ratio(at).difference(at))};
  }
};

struct Nothing {
  static constexpr bool kSlope = false, kOwn = false;
};

// ---- A row ---------------------------------------------------------------------------------------

// The classes on one side of the label, and their scratch memory.
struct Piece {
  size_t begin, count;
  float* student_e;
  float* teacher_e;
  float* at_one;  // e of the student without temperature
};

template <class T>
HWY_INLINE float entry(const T* p) {
  return hn::GetLane(load(D(), p, 1, 0.0f));
}

template <class T>
HWY_INLINE void set_entry(T* p, double value) {
  store(set(value), D(), p, 1);
}

// The place of the first largest logit; `count` where one is NaN.
template <class T>
HWY_NOINLINE size_t decision(const T* HWY_RESTRICT p, size_t count) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  const V top = hn::Set(d, passes::maximum(p, count));
  auto is_nan = hn::IsNaN(hn::Zero(d));
  size_t place = count;
  for (size_t i = 0; i < count; i += lanes) {
    const V logits = i + lanes <= count ? load(d, p + i) : load(d, p + i, count - i, -kInfinity);
    is_nan = hn::Or(is_nan, hn::IsNaN(logits));
    if (place < count) continue;
    const intptr_t found = hn::FindFirstTrue(d, hn::Eq(logits, top));
    if (found >= 0) place = i + static_cast<size_t>(found);
  }
  return hn::AllFalse(d, is_nan) ? place : count;
}

HWY_NOINLINE void add_multiple(const float* HWY_RESTRICT from, float factor, size_t count, float* HWY_RESTRICT to) {
  const D d;
  for (size_t i = 0; i < count; i += hn::Lanes(d)) {
    hn::Store(hn::MulAdd(hn::Load(d, from + i), hn::Set(d, factor), hn::Load(d, to + i)), d, to + i);
  }
}

template <class T, class Terms>
class Rows {
 public:
  Rows(const Problem& problem, float* memory) : problem_(problem), classes_(problem.classes), memory_(memory) {
    // Without a teacher all other classes are alike to it.
    T* const zeros = reinterpret_cast<T*>(memory + 3 * floats_of_row(classes_));
    if (problem.form == Form::kUniform) std::fill_n(zeros, classes_, T{});
    zeros_ = zeros;
  }

  void run(size_t first, size_t last) {
    for (size_t row = first; row < last; ++row) {
      T* const gradient = problem_.gradient == nullptr ? nullptr : static_cast<T*>(problem_.gradient) + row * classes_;
      const float weight = gradient != nullptr && problem_.weight != nullptr ? problem_.weight[row] : 0;
      if (gradient != nullptr && weight == 0) std::fill_n(gradient, classes_, T{});
      if (weight == 0 && problem_.value == nullptr) continue;
      student_ = static_cast<const T*>(problem_.student) + row * classes_;
      teacher_ = problem_.teacher == nullptr ? zeros_ : static_cast<const T*>(problem_.teacher) + row * classes_;
      const auto label = problem_.form == Form::kDecision ? static_cast<std::int64_t>(decision(teacher_, classes_))
                                                          : problem_.labels[row];
      const double value = has_label(label) ? compute(static_cast<size_t>(label), weight, gradient)
                                            : std::numeric_limits<double>::quiet_NaN();
      if (problem_.value != nullptr) problem_.value[row] = static_cast<float>(value);
      for (size_t i = 0; i < classes_ && std::isnan(value) && weight != 0; ++i) set_entry(gradient + i, value);
    }
    if (problem_.stream_gradient) passes::finish_streaming();
  }

 private:
  static constexpr bool kOthers = Terms::kOwn;

  // Whether the label is a class whose logits are no NaN and not +inf, of which there is no softmax. Those of the other
  // classes the passes find.
  bool has_label(std::int64_t label) const {
    if (label < 0 || label >= static_cast<std::int64_t>(classes_)) return false;
    return entry(student_ + label) < kInfinity && (!kOthers || entry(teacher_ + label) < kInfinity);
  }

  // The value of a row, and where its weight is not 0 the gradient.
  double compute(size_t label, float weight, T* gradient) {
    const size_t after = padded(label), each = floats_of_row(classes_);
    const auto piece = [&](size_t begin, size_t end, float* memory) {
      return Piece{begin, end - begin, memory, memory + each, memory + 2 * each};
    };
    pieces_[0] = piece(0, label, memory_);
    pieces_[1] = piece(label + 1, classes_, memory_ + after);
    const float teacher_label = entry(teacher_ + label);
    bool right = true;  // the label is the first largest class of the teacher
    float student_top = -kInfinity, teacher_top = -kInfinity;
    for (const Piece& part : pieces_) {
      if (part.count == 0) continue;
      student_top = std::max(student_top, passes::maximum(student_ + part.begin, part.count));
      if (!kOthers) continue;
      const float top = passes::maximum(teacher_ + part.begin, part.count);
      right = right && (part.begin == 0 ? top < teacher_label : top <= teacher_label);
      teacher_top = std::max(teacher_top, top);
    }
    facts_.scale2 = problem_.scale * kLog2E;
    facts_.student_top = student_top == -kInfinity ? 0 : student_top;  // all e are 0 then
    facts_.teacher_top = teacher_top == -kInfinity ? 0 : teacher_top;

    // The score of the label without temperature first, whose teacher's exponentials nobody needs afterwards.
    LabelTerm of_label;
    Sums sums_at_one;
    if (kOthers && problem_.at_one) {
      sums_at_one = exponentials(kLog2E, &Piece::at_one);
      of_label = at_one(sums_at_one, kLog2E, label);
    }
    const Sums sums = exponentials(facts_.scale2, &Piece::student_e);
    const double student_y = (double{entry(student_ + label)} - facts_.student_top) * facts_.scale2;
    if constexpr (!kOthers) {
      facts_.student_factor = sums.student == 0 ? 0 : static_cast<float>(1 / sums.student);
      of_label = LabelTerm::cross_entropy(1, LabelAndRest(kLn2 * (student_y - log2_of(sums.student))));
      if (weight != 0) write(label, weight, of_label.slope, of_label.slope, problem_.scale, gradient);
      return of_label.value;
    } else {
      const double teacher_y = (double{teacher_label} - facts_.teacher_top) * facts_.scale2;
      double log_student = log2_of(sums.student);
      if (sums.student != 0 && sums.teacher != 0) {
        const Normalizers normalizers(sums, problem_.almost_equal);
        normalizers.enter(facts_, sums);
        log_student = normalizers.log_teacher + normalizers.log_ratio;
      } else {  // without a class all logarithms are infinite, whatever is taken from them
        facts_.student_factor = sums.student == 0 ? 0 : static_cast<float>(1 / sums.student);
        facts_.teacher_factor = sums.teacher == 0 ? 0 : static_cast<float>(1 / sums.teacher);
        facts_.log_student = facts_.log_teacher = facts_.log_ratio = 0;
      }
      const double score = kLn2 * (student_y - log_student);
      double other_weight = problem_.other_weight;
      switch (problem_.form) {
        case Form::kNormalized:
          if (!problem_.at_one) of_label = at_one(sums, facts_.scale2, label);
          break;
        case Form::kUniform: {
          const LabelAndRest p(score_of_label());
          of_label = LabelTerm::divergence(p, LabelAndRest(score));
          other_weight = p.rest;
          break;
        }
        default: {
          const double log_teacher = log2_of(sums.teacher);
          // Equal ones are exactly equal, and of those that are almost equal the difference keeps its digits.
          const LabelAndRest of_teacher(kLn2 * (teacher_y - log_teacher));
          const LabelAndRest of_student(score);
          const LabelAndRest p =
              problem_.form == Form::kDecoupled
                  ? of_teacher
                  : corrected(of_teacher, sums.teacher == 0 ? 0 : of_teacher.rest / sums.teacher, right, problem_);
          of_label = LabelTerm::divergence(p, of_student);
          if (problem_.form == Form::kDecoupled) {
            of_label = {times(problem_.target_weight, of_label.value), times(problem_.target_weight, of_label.slope)};
          } else {
            other_weight = p.rest;
          }
        }
      }
      const Totals totals = others(sums, other_weight);
      if (weight != 0) {
        double slope = of_label.slope;
        if (problem_.at_one) {  // other probabilities than those of the others' part
          const double share = sums_at_one.student == 0 ? 0 : -slope * problem_.temperature / sums_at_one.student;
          for (const Piece& part : pieces_) {
            add_multiple(part.at_one, static_cast<float>(share), part.count, part.teacher_e);
          }
          slope = 0;
        }
        write(label, weight, totals.mean + slope, of_label.slope, problem_.at_one ? 1.0f : problem_.scale, gradient);
      }
      return of_label.value + times(other_weight, totals.value);
    }
  }

  // The label's score in softmax(v / T), where v is made of the label alone.
  double score_of_label() const {
    if (classes_ == 1) return -kNothing;
    const auto others = static_cast<double>(classes_ - 1);
    const double other = (1 - problem_.label_probability) / others;
    return (problem_.label_probability - other) / static_cast<double>(problem_.temperature) - std::log(others);
  }

  // The label's cross-entropy by the teacher's trust in it, from sums without temperature.
  LabelTerm at_one(const Sums& sums, float scale2, size_t label) const {
    const double student_y = (double{entry(student_ + label)} - facts_.student_top) * scale2;
    const double teacher_y = (double{entry(teacher_ + label)} - facts_.teacher_top) * scale2;
    const LabelAndRest p(kLn2 * (teacher_y - log2_of(sums.teacher)));
    return LabelTerm::cross_entropy(p.label, LabelAndRest(kLn2 * (student_y - log2_of(sums.student))));
  }

  Sums exponentials(float scale2, float* Piece::*student_e) const {
    const auto of_piece = problem_.almost_equal ? passes::exponentials<kOthers, false, true, T>
                                                : passes::exponentials<kOthers, false, false, T>;
    Sums sums;
    for (const Piece& part : pieces_) {
      sums += of_piece(student_ + part.begin, teacher_ + part.begin, part.count, facts_.student_top, facts_.teacher_top,
                       scale2, part.*student_e, part.teacher_e);
    }
    return sums;
  }

  // Leaves what the classes have of their own in the gradient in the place of the teacher's exponentials.
  Totals others(const Sums& sums, double weight) {
    Totals totals;
    for (const Piece& part : pieces_) {
      if (weight == 0 || sums.teacher == 0) {
        std::fill_n(part.teacher_e, padded(part.count), 0.0f);
      } else {
        totals += passes::terms<T, Terms>(student_ + part.begin, teacher_ + part.begin, part.count, facts_,
                                          Terms{static_cast<float>(weight)}, part.student_e, part.teacher_e, nullptr);
      }
    }
    return totals;
  }

  // `mean`: what is taken from all classes beside the label by their probabilities; `slope`: of the label.
  void write(size_t label, float weight, double mean, double slope, float scale, T* gradient) const {
    const float level = std::abs(mean) < 1e30 ? static_cast<float>(mean) : 0.0f;
    const passes::Coefficients coefficients{weight * problem_.scale, facts_.student_factor, level,
                                            static_cast<float>(mean - level)};
    for (const Piece& part : pieces_) {
      passes::write_gradient<T, Terms>(part.student_e, part.teacher_e, nullptr, part.count, coefficients,
                                       problem_.stream_gradient, gradient + part.begin);
    }
    set_entry(gradient + label, double{weight * scale} * slope);
  }

  const Problem& problem_;
  const size_t classes_;
  float* const memory_;
  const T* zeros_;
  // Of the row at hand:
  const T* student_ = nullptr;
  const T* teacher_ = nullptr;
  Piece pieces_[2] = {};
  Facts facts_ = {};
};

template <class T>
void with_form(const Problem& problem, size_t first, size_t last, float* memory) {
  switch (problem.form) {
    case Form::kDecision:
      return Rows<T, Nothing>(problem, memory).run(first, last);
    case Form::kNormalized:
      return Rows<T, CrossEntropy>(problem, memory).run(first, last);
    default:
      return Rows<T, Kl>(problem, memory).run(first, last);
  }
}

void LabelApartRows(const Problem& problem, size_t first, size_t last, float* memory) {
  switch (problem.dtype) {
    case PYKD_FLOAT16:
      return with_form<hwy::float16_t>(problem, first, last, memory);
    case PYKD_BFLOAT16:
      return with_form<hwy::bfloat16_t>(problem, first, last, memory);
    default:
      return with_form<float>(problem, first, last, memory);
  }
}

}  // namespace pykd::kernels::label_apart::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

// ---- Compiled once -------------------------------------------------------------------------------
#if HWY_ONCE

namespace pykd::kernels::label_apart {
namespace {

HWY_EXPORT(LabelApartRows);

const char* refuse(const Call& call) {
  const auto in = [&call](Input input) { return call.inputs[input].given(); };
  const Form form = static_cast<Form>(call.choice(kForm));
  const bool decides = form == Form::kDecision;
  if (call.outputs[kGradStudent].given() && !in(kWeight)) return "grad_student needs weight";
  if (in(kTeacher) == (form == Form::kUniform)) return "every form but uniform takes teacher";
  if (in(kLabels) == decides) return "every form but decision takes labels";
  if (in(kTemperature) == decides) return "every form but decision takes temperature";
  if (in(kTargetWeight) != (form == Form::kDecoupled)) return "decoupled takes target_weight, and no other form";
  if (in(kOtherWeight) != (form == Form::kDecoupled || form == Form::kNormalized)) {
    return "decoupled and normalized take other_weight, and no other form";
  }
  if (!decides) {
    if (const char* why = refuse_temperature(call.number(kTemperature))) return why;
  }
  for (const Input input : {kTargetWeight, kOtherWeight}) {
    if (in(input) && !(call.number(input) >= 0 && std::isfinite(call.number(input)))) {
      return "target_weight and other_weight are numbers from 0 on";
    }
  }
  const double threshold = call.attributes[kThreshold], probability = call.attributes[kLabelProbability];
  if (form == Form::kCorrected && !(threshold >= 0 && threshold <= 1)) return "threshold must lie between 0 and 1";
  if (form == Form::kUniform && !(probability > 0 && probability < 1)) {
    return "label_probability must lie between 0 and 1";
  }
  return nullptr;
}

void run(const Call& call) {
  const auto in = [&call](Input input) { return call.inputs[input]; };
  const auto number = [&](Input input, float otherwise) { return in(input).given() ? call.number(input) : otherwise; };
  Problem problem{};
  problem.dtype = call.dtype;
  problem.rows = static_cast<size_t>(in(kStudent).length(0));
  problem.classes = static_cast<size_t>(in(kStudent).length(1));
  problem.form = static_cast<Form>(call.choice(kForm));
  problem.student = in(kStudent).data;
  problem.teacher = in(kTeacher).data;
  problem.labels = in(kLabels).as<const std::int64_t>();
  problem.weight = in(kWeight).as<const float>();
  problem.value = call.outputs[kValue].as<float>();
  problem.gradient = call.outputs[kGradStudent].data;
  problem.temperature = number(kTemperature, 1.0f);
  const bool softens = problem.form != Form::kUniform || call.attributes[kSoftenStudent] != 0;
  problem.scale = softens ? 1.0f / problem.temperature : 1.0f;
  problem.target_weight = number(kTargetWeight, 1.0f);
  problem.other_weight = number(kOtherWeight, 1.0f);
  problem.threshold = call.attributes[kThreshold];
  problem.raise_right = call.attributes[kRaiseRight] != 0;
  problem.label_probability = call.attributes[kLabelProbability];
  problem.almost_equal = problem.form != Form::kDecision && softens && problem.temperature > 8.0f;
  problem.at_one = problem.form == Form::kNormalized && problem.temperature != 1.0f;
  const size_t entries = problem.rows * problem.classes;
  problem.stream_gradient = problem.gradient != nullptr && is_streamed(entries, call.dtype);

  const size_t scratch = (problem.form == Form::kUniform ? 4 : 3) * floats_of_row(problem.classes);
  for_rows(call, problem.rows, entries, [&](size_t first, size_t last) {
    const Floats memory(scratch);
    HWY_DYNAMIC_DISPATCH(LabelApartRows)(problem, first, last, memory.get());
  });
}

const bool registered = add({
    "label_apart",
    {{"student", "batch classes", Role::kTensor},
     {"teacher", "batch classes", Role::kTensor, kOptional},
     {"labels", "batch", Role::kIndex, kOptional},
     {"temperature", "", Role::kNumber, kOptional},
     {"target_weight", "", Role::kNumber, kOptional},
     {"other_weight", "", Role::kNumber, kOptional},
     {"weight", "batch", Role::kFloat32, kOptional}},
    {{"value", "batch", Role::kFloat32}, {"grad_student", "batch classes", Role::kTensor}},
    {{"form", 0, {"decoupled", "normalized", "corrected", "uniform", "decision"}},
     {"threshold", 0.2},
     {"raise_right", 1},
     {"label_probability", 0.99},
     {"soften_student", 1}},
    kFloatAndHalves,
    refuse,
    run,
});

}  // namespace
}  // namespace pykd::kernels::label_apart

#endif  // HWY_ONCE
