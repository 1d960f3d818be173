#include "kernels/divergence/divergence.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels/host/checks.h"
#include "kernels/host/memory.h"
#include "kernels/host/rows.h"
#include "kernels/kernel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/divergence/divergence.cpp"
#include "hwy/foreach_target.h"  // compiles this file once per instruction set

#include "hwy/highway.h"
#include "kernels/divergence/rows-inl.h"
#include "kernels/simd/math-inl.h"

// ---- What all instruction sets share -------------------------------------------------------------
#ifndef PYKD_KERNELS_DIVERGENCE_SHARED_
#define PYKD_KERNELS_DIVERGENCE_SHARED_

namespace pykd::kernels::divergence {

constexpr double kSmallestLog = -1074;  // to the base 2, of a float64 that is not 0

struct Problem {
  pykd_dtype dtype;
  size_t rows, classes;
  Form form;
  const void* student;
  const void* teacher;
  const float* weight;  // these three: nullptr where not given
  float* value;
  void* gradient;
  float scale;  // of the logits: 1 / T
  double alpha, beta;
  float emphasis;
  double head_mass;
  bool cut_in_head;      // the class with which the head's mass is passed is of the head
  bool almost_equal;     // a temperature at which p and q may be, and their divergence small beside their rounding
  bool stream_gradient;  // write it past the caches
};

// A class that may be the last one of a head: teacher's y, and its number.
struct Candidate {
  float y;
  std::uint32_t number;

  bool operator<(const Candidate& other) const { return y > other.y || (y == other.y && number < other.number); }
};

constexpr size_t kBins = 1024;  // of classes by their y, when a head is looked for
constexpr float kDeepest = 32;  // binary orders of magnitude that bins tell apart

}  // namespace pykd::kernels::divergence

#endif  // PYKD_KERNELS_DIVERGENCE_SHARED_

// ---- Compiled for each instruction set -----------------------------------------------------------
HWY_BEFORE_NAMESPACE();
namespace pykd::kernels::divergence::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
struct RowFacts : Facts {
  float teacher_weight, student_weight;  // of balanced_kl and adaptive_kl
};

// ---- Forms ---------------------------------------------------------------------------------------

// log(m / max(p, q)), and m / max(p, q), for m = share_of_p p + (1 - share_of_p) q.
struct Mixture {
  V log, sum;

  HWY_INLINE Mixture(const Class& at, const Ratio& ratio, double share_of_p) {
    const D d;
    const V one = set(1);
    const V share = hn::IfThenElse(at.student_leads, set(share_of_p), set(1 - share_of_p));  // of the smaller one
    const V other = hn::IfThenElse(at.student_leads, set(1 - share_of_p), set(share_of_p));
    const V missing = hn::Mul(share, ratio.less);
    const V near = hn::Add(one, missing), lost = hn::Sub(missing, hn::Sub(near, one));
    const auto apart = hn::Lt(ratio.less, set(-0.5));
    sum = hn::IfThenElse(apart, hn::MulAdd(share, hn::Add(one, ratio.less), other), near);
    sum = hn::Max(sum, hn::Set(d, std::numeric_limits<float>::min()));
    log = hn::Add(kernels::HWY_NAMESPACE::log(d, sum), hn::IfThenZeroElse(apart, hn::Div(lost, sum)));
  }
};

struct SkewedKl {
  static constexpr bool kSlope = true, kOwn = false, kEntropies = false;
  double alpha;

  SkewedKl(const Problem& problem, const RowFacts& /*facts*/) : alpha(problem.alpha) {}
  HWY_INLINE Term operator()(const Class& at) const {
    const Ratio ratio(at);
    const Mixture mixture(at, ratio, alpha);
    const V log_m_over_p = hn::MulAdd(hn::Max(at.log_ratio, hn::Zero(D())), set(kLn2InDouble), mixture.log);
    const V of_p = unless_zero(at.p, hn::Mul(at.p, log_m_over_p));
    const V value = hn::MulSub(set(1 - alpha), ratio.difference(at), of_p);
    const V slope = hn::Mul(set((1 - alpha) * (1 - alpha)), hn::Div(ratio.quarrel, mixture.sum));
    return {value, slope, hn::Zero(D())};
  }
};

struct SkewedReverseKl {
  static constexpr bool kSlope = true, kOwn = false, kEntropies = false;
  double alpha;

  SkewedReverseKl(const Problem& problem, const RowFacts& /*facts*/) : alpha(problem.alpha) {}
  HWY_INLINE Term operator()(const Class& at) const {
    const Ratio ratio(at);
    const Mixture mixture(at, ratio, 1 - alpha);
    const V log_m_over_q = hn::MulAdd(hn::Max(hn::Neg(at.log_ratio), hn::Zero(D())), set(kLn2InDouble), mixture.log);
    const V of_q = unless_zero(at.q, hn::Mul(at.q, log_m_over_q));
    const V value = hn::NegMulSub(set(1 - alpha), ratio.difference(at), of_q);
    const V of_ratio = hn::Mul(set(alpha * (1 - alpha)), hn::Div(ratio.quarrel, mixture.sum));
    return {value, unless_zero(at.q, hn::Neg(hn::Add(log_m_over_q, of_ratio))), hn::Zero(D())};
  }
};

struct TotalVariation {
  static constexpr bool kSlope = true, kOwn = false, kEntropies = false;

  TotalVariation(const Problem& /*problem*/, const RowFacts& /*facts*/) {}
  HWY_INLINE Term operator()(const Class& at) const {
    const Ratio ratio(at);
    const V half = set(0.5), distance = hn::Mul(hn::Abs(ratio.difference(at)), half);
    const V sign = hn::IfThenElse(at.student_leads, half, hn::Neg(half));
    // Where no float64 would tell p from q, what is left of their logarithms is no direction.
    const auto equal = hn::Lt(hn::Abs(at.log_ratio), hn::Set(D(), 0x1p-48f));
    return {distance, hn::IfThenZeroElse(equal, sign), hn::Zero(D())};
  }
};

struct AlphaBeta {
  static constexpr bool kSlope = false, kOwn = true, kEntropies = false;
  double alpha, beta;

  AlphaBeta(const Problem& problem, const RowFacts& /*facts*/) : alpha(problem.alpha), beta(problem.beta) {}
  HWY_INLINE Term operator()(const Class& at) const {
    const D d;
    const double both = alpha + beta;
    const V apart = hn::Neg(hn::Abs(at.log_ratio));
    const V largest = exp2(d, hn::Mul(set(both), hn::Max(at.log_p, at.log_q)));
    const V of_alpha = exp2m1(d, hn::Mul(set(alpha), apart)), of_beta = exp2m1(d, hn::Mul(set(beta), apart));
    const V of_both = exp2m1(d, hn::Mul(set(both), apart));
    const V share = hn::IfThenElse(at.student_leads, set(alpha / both), set(beta / both));
    const V gap = hn::MulSub(share, of_both, hn::IfThenElse(at.student_leads, of_alpha, of_beta));
    const V power = hn::Mul(largest, of_alpha);
    const V own = hn::IfThenElse(at.student_leads, hn::Neg(power), hn::MulAdd(power, of_beta, power));
    return {hn::Mul(hn::Mul(largest, set(1 / (alpha * beta))), gap), hn::Zero(d), hn::Mul(own, set(1 / alpha))};
  }
};

struct BalancedKl {
  static constexpr bool kSlope = true, kOwn = true, kEntropies = true;
  float teacher_weight, student_weight;

  BalancedKl(const Problem& /*problem*/, const RowFacts& facts)
      : teacher_weight(facts.teacher_weight), student_weight(facts.student_weight) {}
  HWY_INLINE Term operator()(const Class& at) const {
    const D d;
    const V difference = Ratio(at).difference(at);
    const V log_ratio = hn::Mul(at.log_ratio, set(kLn2InDouble));
    const V forward = hn::Sub(difference, unless_zero(at.p, hn::Mul(at.p, log_ratio)));
    const V reverse = hn::Sub(unless_zero(at.q, hn::Mul(at.q, log_ratio)), difference);
    const V of_teacher = hn::Set(d, teacher_weight), of_student = hn::Set(d, student_weight);
    // A divergence that has no weight counts for nothing, even where it is infinite.
    return {hn::Add(unless_zero(of_teacher, hn::Mul(of_teacher, forward)),
                    unless_zero(of_student, hn::Mul(of_student, reverse))),
            unless_zero(of_student, hn::Mul(of_student, unless_zero(at.q, log_ratio))),
            hn::Mul(of_teacher, difference)};
  }
};

struct AdaptiveKl : BalancedKl {  // with other weights
  static constexpr bool kEntropies = false;
  using BalancedKl::BalancedKl;
};

// ---- A row ---------------------------------------------------------------------------------------

// The largest of the entries that are less than `top`.
template <class T>
HWY_NOINLINE float runner_up(const T* HWY_RESTRICT p, size_t count, float top) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  const V none = hn::Set(d, -kInfinity);
  V next = none;
  for (size_t i = 0; i < count; i += lanes) {
    const V entries = i + lanes <= count ? load(d, p + i) : load(d, p + i, count - i, -kInfinity);
    next = hn::Max(next, hn::IfThenElse(hn::Lt(entries, hn::Set(d, top)), entries, none));
  }
  return hn::GetLane(hn::MaxOfLanes(d, next));
}

// ---- The head of adaptive_kl ---------------------------------------------------------------------

// The classes with a y above `y`, and of those that have it the ones with a number below `number`.
struct Cut {
  float y;
  std::uint32_t number;
};

// Leaves the teacher's y in `out`, and returns the lowest that is finite; 0 where there is none.
template <class T>
HWY_NOINLINE float scores(const T* HWY_RESTRICT teacher, size_t classes, float top, float scale2,
                          float* HWY_RESTRICT out) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  V lowest = hn::Zero(d);
  for (size_t i = 0; i < classes; i += lanes) {  // a last vector is filled up with y = 0
    const V logits = i + lanes <= classes ? load(d, teacher + i) : load(d, teacher + i, classes - i, top);
    const V y = hn::Mul(hn::Sub(logits, hn::Set(d, top)), hn::Set(d, scale2));
    lowest = hn::Min(lowest, hn::IfThenZeroElse(hn::Eq(y, hn::Set(d, -kInfinity)), y));
    hn::Store(y, d, out + i);
  }
  return hn::GetLane(hn::MinOfLanes(d, lowest));
}

// The likeliest classes that together reach the mass, relative to the exponentials, which are no NaN. `candidates`
// holds those of one y among others in the end.
Cut find_cut(const float* y, const float* e, size_t classes, float lowest, double mass, bool cut_in_head,
             std::vector<Candidate>& candidates) {
  // By bins first: what is above the one in which the mass is reached need not be sorted.
  const float per_bin = static_cast<float>(kBins - 1) / std::min(std::max(-lowest, 1e-30f), kDeepest);
  const auto bin_of = [per_bin](float score) {
    return static_cast<size_t>(std::min(-score * per_bin, static_cast<float>(kBins - 1)));
  };
  double masses[kBins] = {};
  for (size_t i = 0; i < classes; ++i) masses[bin_of(y[i])] += e[i];
  size_t bin = 0;
  double reached = 0;
  while (bin + 1 < kBins && reached + masses[bin] < mass) reached += masses[bin++];
  candidates.clear();
  for (size_t i = 0; i < classes; ++i) {
    if (bin_of(y[i]) == bin) candidates.push_back({y[i], static_cast<std::uint32_t>(i)});
  }
  if (!std::is_sorted(candidates.begin(), candidates.end())) std::sort(candidates.begin(), candidates.end());
  Cut cut{-kInfinity, static_cast<std::uint32_t>(classes)};
  for (const Candidate& one : candidates) {
    const double before = reached;
    reached += e[one.number];
    const bool in_head = (cut_in_head ? before < mass : reached <= mass) || before == 0;
    if (!in_head) return {one.y, one.number};
    cut = {one.y, one.number + 1};
  }
  return cut;
}

// |q - p| summed up over the head and over the other classes.
struct Apart {
  double head = 0, tail = 0;
};

// `y` holds the teacher's; what is there in the end is |q - p|.
template <class T>
HWY_NOINLINE Apart apart(const T* HWY_RESTRICT student, size_t classes, const Facts& row_facts, Cut cut,
                         const std::vector<Candidate>& candidates, const float* HWY_RESTRICT student_e,
                         const float* HWY_RESTRICT teacher_e, float* HWY_RESTRICT y) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  const Facts facts = row_facts;
  const V none = hn::Set(d, -kInfinity);
  Apart sums;
  for (size_t part = 0; part < classes; part += part_entries()) {
    const size_t end = std::min(classes, part + part_entries());
    V head = hn::Zero(d), tail = head;
    for (size_t i = part; i < end; i += lanes) {  // a last vector is filled up with exponentials of 0
      const V logits =
          i + lanes <= classes ? load(d, student + i) : load(d, student + i, classes - i, facts.student_top);
      const V student_y = hn::Mul(hn::Sub(logits, hn::Set(d, facts.student_top)), hn::Set(d, facts.scale2));
      const V teacher_y = hn::Load(d, y + i);
      Class at;
      at.q = hn::Mul(hn::Load(d, student_e + i), hn::Set(d, facts.student_factor));
      at.p = hn::Mul(hn::Load(d, teacher_e + i), hn::Set(d, facts.teacher_factor));
      const auto absent = hn::And(hn::Eq(student_y, none), hn::Eq(teacher_y, none));
      at.log_ratio = hn::IfThenZeroElse(absent, hn::Sub(hn::Sub(student_y, teacher_y), hn::Set(d, facts.log_ratio)));
      at.student_leads = hn::Gt(at.log_ratio, hn::Zero(d));
      const V difference = hn::Abs(Ratio(at).difference(at));
      const auto above = hn::Gt(teacher_y, hn::Set(d, cut.y));
      head = hn::Add(head, hn::IfThenElseZero(above, difference));
      tail = hn::Add(tail, hn::IfThenZeroElse(above, difference));
      hn::Store(difference, d, y + i);
    }
    sums.head += sum_of_lanes(head);
    sums.tail += sum_of_lanes(tail);
  }
  for (const Candidate& one : candidates) {
    if (one.y != cut.y || one.number >= cut.number) continue;
    sums.head += y[one.number];
    sums.tail -= y[one.number];
  }
  sums.tail = sums.tail < 0 ? 0 : sums.tail;
  return sums;
}

// What the slopes lie above `level` in the mean over q. Where one class has most of q and its slope is large, that
// slope leaves no digits for the others, which are all of the gradient.
HWY_NOINLINE double mean_above(const float* HWY_RESTRICT student_e, const float* HWY_RESTRICT slopes, size_t classes,
                               float factor, float level) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  double total = 0;
  for (size_t part = 0; part < classes; part += part_entries()) {
    V sum = hn::Zero(d);
    const size_t end = std::min(classes, part + part_entries());
    for (size_t i = part; i < end; i += lanes) {  // a last vector is filled up with probabilities of 0
      const V q = hn::Mul(hn::Load(d, student_e + i), hn::Set(d, factor));
      sum = hn::Add(sum, unless_zero(q, hn::Mul(q, hn::Sub(hn::Load(d, slopes + i), hn::Set(d, level)))));
    }
    total += sum_of_lanes(sum);
  }
  return total;
}

// One row after the other, with the scratch memory of one task.
template <class T, class Terms>
void run_rows(const Problem& problem, size_t first, size_t last, float* memory) {
  const size_t classes = problem.classes, each = padded(classes);
  float* const student_e = memory;
  float* const teacher_e = memory + each;
  float* const own = Terms::kSlope && Terms::kOwn ? memory + 2 * each : teacher_e;
  std::vector<Candidate> candidates;
  const auto sums_of = problem.almost_equal ? exponentials<true, Terms::kEntropies, true, T>
                                            : exponentials<true, Terms::kEntropies, false, T>;
  for (size_t row = first; row < last; ++row) {
    T* const gradient = problem.gradient == nullptr ? nullptr : static_cast<T*>(problem.gradient) + row * classes;
    const float weight = gradient != nullptr && problem.weight != nullptr ? problem.weight[row] : 0;
    if (gradient != nullptr && weight == 0) std::fill_n(gradient, classes, T{});
    if (weight == 0 && problem.value == nullptr) continue;

    const T* const student = static_cast<const T*>(problem.student) + row * classes;
    const T* const teacher = static_cast<const T*>(problem.teacher) + row * classes;
    RowFacts facts;
    facts.scale2 = problem.scale * kLog2E;
    facts.student_top = maximum(student, classes);
    facts.teacher_top = maximum(teacher, classes);
    const Sums sums =
        sums_of(student, teacher, classes, facts.student_top, facts.teacher_top, facts.scale2, student_e, teacher_e);
    const Normalizers normalizers(sums, problem.almost_equal);
    normalizers.enter(facts, sums);
    facts.teacher_weight = facts.student_weight = 1;
    if constexpr (Terms::kEntropies) {
      double of_teacher = normalizers.log_teacher - sums.teacher_scores / sums.teacher;
      double of_student = normalizers.log_teacher + normalizers.log_ratio - sums.student_scores / normalizers.student;
      if (of_teacher == 0 && of_student == 0) {  // one class has all: the entropy is as large as what the next one has
        const auto next = [&](const T* logits, float top) {
          return std::max(kSmallestLog, (double{runner_up(logits, classes, top)} - top) * facts.scale2);
        };
        of_teacher = next(teacher, facts.teacher_top);
        of_student = next(student, facts.student_top);
      }
      if (of_teacher > of_student) facts.teacher_weight = problem.emphasis;
      if (of_student > of_teacher) facts.student_weight = problem.emphasis;
    }
    if constexpr (std::is_same_v<Terms, AdaptiveKl>) {
      facts.teacher_weight = facts.student_weight = static_cast<float>(sums.teacher - sums.teacher);  // NaN stays
      if (sums.teacher > 0) {
        const float lowest = scores(teacher, classes, facts.teacher_top, facts.scale2, own);
        const Cut cut = find_cut(own, teacher_e, classes, lowest, problem.head_mass * sums.teacher, problem.cut_in_head,
                                 candidates);
        const Apart differences = apart(student, classes, facts, cut, candidates, student_e, teacher_e, own);
        const double all = differences.head + differences.tail;
        facts.teacher_weight = static_cast<float>(all == 0 ? 0 : differences.head / all);
        facts.student_weight = static_cast<float>(all == 0 ? 0 : differences.tail / all);
      }
    }
    const Terms form(problem, facts);
    const Totals totals = terms<T, Terms>(student, teacher, classes, facts, form, student_e, teacher_e, own);
    if (problem.value != nullptr) problem.value[row] = static_cast<float>(totals.value);
    if (weight == 0) continue;

    double mean = totals.mean;
    if (Terms::kSlope && std::abs(mean) > 1 && std::abs(mean) < 1e30) {  // beside slopes all own terms sum up to 0
      const float level = static_cast<float>(mean);
      mean = level + mean_above(student_e, teacher_e, classes, facts.student_factor, level);
    }
    const float level = std::abs(mean) < 1e30 ? static_cast<float>(mean) : 0.0f;
    // Of a value that is NaN the gradient is, too, whatever is left of its slopes.
    const float factor = std::isnan(totals.value) ? std::numeric_limits<float>::quiet_NaN() : weight * problem.scale;
    const Coefficients coefficients{factor, facts.student_factor, level, static_cast<float>(mean - level)};
    write_gradient<T, Terms>(student_e, teacher_e, own, classes, coefficients, problem.stream_gradient, gradient);
  }
  if (problem.stream_gradient) finish_streaming();
}

template <class T>
void with_form(const Problem& problem, size_t first, size_t last, float* memory) {
  switch (problem.form) {
    case Form::kSkewedKl:
      return run_rows<T, SkewedKl>(problem, first, last, memory);
    case Form::kSkewedReverseKl:
      return run_rows<T, SkewedReverseKl>(problem, first, last, memory);
    case Form::kTotalVariation:
      return run_rows<T, TotalVariation>(problem, first, last, memory);
    case Form::kAlphaBeta:
      return run_rows<T, AlphaBeta>(problem, first, last, memory);
    case Form::kBalancedKl:
      return run_rows<T, BalancedKl>(problem, first, last, memory);
    case Form::kAdaptiveKl:
      return run_rows<T, AdaptiveKl>(problem, first, last, memory);
  }
}

void DivergenceRows(const Problem& problem, size_t first, size_t last, float* memory) {
  switch (problem.dtype) {
    case PYKD_FLOAT16:
      return with_form<hwy::float16_t>(problem, first, last, memory);
    case PYKD_BFLOAT16:
      return with_form<hwy::bfloat16_t>(problem, first, last, memory);
    default:
      return with_form<float>(problem, first, last, memory);
  }
}

}  // namespace pykd::kernels::divergence::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

// ---- Compiled once -------------------------------------------------------------------------------
#if HWY_ONCE

namespace pykd::kernels::divergence {
namespace {

HWY_EXPORT(DivergenceRows);

const char* refuse(const Call& call) {
  const auto in = [&call](Input input) { return call.inputs[input].given(); };
  const Form form = static_cast<Form>(call.choice(kForm));
  if (call.outputs[kGradStudent].given() && !in(kWeight)) return "grad_student needs weight";
  if (form == Form::kBalancedKl && !in(kEmphasis)) return "balanced_kl needs emphasis";
  if (form != Form::kBalancedKl && in(kEmphasis)) return "emphasis belongs to balanced_kl";
  if (const char* why = refuse_temperature(call.number(kTemperature))) return why;
  if (in(kEmphasis) && !(call.number(kEmphasis) >= 0 && std::isfinite(call.number(kEmphasis)))) {
    return "emphasis is a number from 0 on";
  }
  const double alpha = call.attributes[kAlpha], beta = call.attributes[kBeta];
  if ((form == Form::kSkewedKl || form == Form::kSkewedReverseKl) && !(alpha > 0 && alpha < 1)) {
    return "alpha of skewed_kl must lie between 0 and 1";
  }
  const double head_mass = call.attributes[kHeadMass];
  if (form == Form::kAdaptiveKl && !(head_mass > 0 && head_mass < 1)) return "head_mass must lie between 0 and 1";
  if (form != Form::kAdaptiveKl && static_cast<Boundary>(call.choice(kBoundary)) != Boundary::kHead) {
    return "boundary belongs to adaptive_kl";
  }
  if (form == Form::kAlphaBeta && !(alpha > 0 && beta > 0 && std::isfinite(alpha) && std::isfinite(beta))) {
    return "alpha and beta of alpha_beta must be above 0";
  }
  return nullptr;
}

void run(const Call& call) {
  const auto in = [&call](Input input) { return call.inputs[input]; };
  Problem problem{};
  problem.dtype = call.dtype;
  problem.rows = static_cast<size_t>(in(kStudent).length(0));
  problem.classes = static_cast<size_t>(in(kStudent).length(1));
  problem.form = static_cast<Form>(call.choice(kForm));
  problem.student = in(kStudent).data;
  problem.teacher = in(kTeacher).data;
  problem.weight = in(kWeight).as<const float>();
  problem.value = call.outputs[kValue].as<float>();
  problem.gradient = call.outputs[kGradStudent].data;
  problem.scale = 1.0f / call.number(kTemperature);
  problem.alpha = call.attributes[kAlpha];
  problem.beta = call.attributes[kBeta];
  problem.head_mass = call.attributes[kHeadMass];
  problem.cut_in_head = static_cast<Boundary>(call.choice(kBoundary)) == Boundary::kHead;
  if (in(kEmphasis).given()) problem.emphasis = call.number(kEmphasis);
  problem.almost_equal = call.number(kTemperature) > 8.0f;
  const size_t entries = problem.rows * problem.classes;
  problem.stream_gradient = problem.gradient != nullptr && is_streamed(entries, call.dtype);

  const bool with_both = problem.form == Form::kBalancedKl || problem.form == Form::kAdaptiveKl;
  const size_t scratch = (with_both ? 3 : 2) * padded(problem.classes);
  for_rows(call, problem.rows, entries, [&](size_t first, size_t last) {
    const Floats memory(scratch);
    HWY_DYNAMIC_DISPATCH(DivergenceRows)(problem, first, last, memory.get());
  });
}

const bool registered = add({
    "divergence",
    {{"student", "batch classes", Role::kTensor},
     {"teacher", "batch classes", Role::kTensor},
     {"temperature", "", Role::kNumber},
     {"emphasis", "", Role::kNumber, kOptional},
     {"weight", "batch", Role::kFloat32, kOptional}},
    {{"value", "batch", Role::kFloat32}, {"grad_student", "batch classes", Role::kTensor}},
    {{"form", 0, {"skewed_kl", "skewed_reverse_kl", "total_variation", "alpha_beta", "balanced_kl", "adaptive_kl"}},
     {"alpha", 0.2},
     {"beta", 0.7},
     {"head_mass", 0.5},
     {"boundary", 0, {"head", "tail"}}},
    kFloatAndHalves,
    refuse,
    run,
});

}  // namespace
}  // namespace pykd::kernels::divergence

#endif  // HWY_ONCE
