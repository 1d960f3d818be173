#include "kernels/top_k/top_k.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/host/checks.h"
#include "kernels/host/memory.h"
#include "kernels/host/rows.h"
#include "kernels/kernel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/top_k/top_k.cpp"
#include "hwy/foreach_target.h"  // compiles this file once per instruction set

#include "hwy/highway.h"
#include "kernels/simd/math-inl.h"
#include "kernels/simd/memory-inl.h"

// ---- What all instruction sets share -------------------------------------------------------------
#ifndef PYKD_KERNELS_TOP_K_SHARED_
#define PYKD_KERNELS_TOP_K_SHARED_

namespace pykd::kernels::top_k {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kGhost = 1e-8;   // the least mass of a tail
constexpr double kNoTail = 1e-5;  // what rounding leaves of 1 at most

struct Problem {
  pykd_dtype dtype;
  size_t rows, classes, entries;
  Form form;
  bool mean_of_pairs;
  const void* student;
  const void* teacher;
  const std::int64_t* ids;
  const float* weight;  // these three: nullptr where not given
  float* value;
  void* gradient;
  double scale;  // of the logits: 1 / T
  float margin;
  bool stream_gradient;  // write it past the caches

  bool on_pairs() const { return form >= Form::kPairwiseHinge; }
  // Whether it looks at the logits of the entries alone.
  bool on_entries() const { return form == Form::kRenormalized || form == Form::kLogistic; }
  bool has_tail() const { return form == Form::kTail || form == Form::kGhost; }
};

// An entry that is there. Logarithms are natural, and so are scores: logits / T.
struct Entry {
  size_t id;
  size_t first;        // the first entry of the same class: itself, but where that is there twice
  float logit, given;  // s and t
  double p = 0, log_p = 0, q = 0, log_q = 0;
  double own = 0;  // d value / d score, less what all classes have, q times Outcome::slope
};

// What the classes have that no entry names.
struct Others {
  double log_q = -kInfinity;  // log q*
  double factor = 0;          // q of such a class is factor times its exponential
  double reciprocal = 0;      // of the sum of these exponentials; 0 where it is 0
};

// d value / d score of a class is q slope, less `tail` times its share of the classes that no entry names; and what
// entries have of their own.
struct Outcome {
  double value = 0, slope = 0, tail = 0;
};

// The entries of a row as float32, for pairs of them.
struct Columns {
  std::vector<float> given, p, x, gradient;  // x: q, or the logit

  // There is a vector more, of entries that the teacher prefers to all.
  void assign(size_t count) {
    given.assign(padded(count), std::numeric_limits<float>::infinity());
    for (std::vector<float>* column : {&p, &x, &gradient}) column->assign(padded(count), 0.0f);
  }
};

inline double times(double factor, double x) { return factor == 0 ? 0 : factor * x; }  // NaN stays
inline double at_least_0(double x) { return x < 0 ? 0 : x; }

}  // namespace pykd::kernels::top_k

#endif  // PYKD_KERNELS_TOP_K_SHARED_

// ---- Compiled for each instruction set -----------------------------------------------------------
HWY_BEFORE_NAMESPACE();
namespace pykd::kernels::top_k::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using kernels::HWY_NAMESPACE::entries_to_alignment;
using kernels::HWY_NAMESPACE::exp;
using kernels::HWY_NAMESPACE::exp2;
using kernels::HWY_NAMESPACE::finish_streaming;
using kernels::HWY_NAMESPACE::kLog2E;
using kernels::HWY_NAMESPACE::load;
using kernels::HWY_NAMESPACE::log1p;
using kernels::HWY_NAMESPACE::store;
using kernels::HWY_NAMESPACE::stream;

using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

HWY_INLINE double sum_of_lanes(V v) { return hn::GetLane(hn::SumOfLanes(D(), v)); }

template <class T>
HWY_INLINE float entry_at(const T* p) {
  return hn::GetLane(load(D(), p, 1, 0.0f));
}

// ---- The passes over a row -----------------------------------------------------------------------

// Copies a row as float32, and returns its largest entry; or the latter alone, where it is copied onto itself.
template <class T>
HWY_NOINLINE float copy_and_maximum(const T* p, size_t count, float* out) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  V top0 = hn::Set(d, -std::numeric_limits<float>::infinity()), top1 = top0;
  size_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    const V first = load(d, p + i), second = load(d, p + i + lanes);
    top0 = hn::Max(top0, first);
    top1 = hn::Max(top1, second);
    hn::Store(first, d, out + i);
    hn::Store(second, d, out + i + lanes);
  }
  for (; i < count; i += lanes) {  // there is room for a whole vector
    const V rest =
        i + lanes <= count ? load(d, p + i) : load(d, p + i, count - i, -std::numeric_limits<float>::infinity());
    top0 = hn::Max(top0, rest);
    hn::Store(rest, d, out + i);
  }
  return hn::GetLane(hn::MaxOfLanes(d, hn::Max(top0, top1)));
}

// 2^((entry - top) scale2) in the place of the entries, and their sum. A last vector is filled up with -inf.
HWY_NOINLINE double exponentials(float* HWY_RESTRICT entries, size_t count, float top, float scale2) {
  const D d;
  const size_t lanes = hn::Lanes(d), part_entries = 64 * lanes;
  const V high = hn::Set(d, top), scale = hn::Set(d, scale2);
  double total = 0;
  for (size_t part = 0; part < count; part += part_entries) {
    const size_t end = std::min(count, part + part_entries);
    V even = hn::Zero(d), odd = even;
    size_t i = part;
    const auto next = [&]() __attribute__((always_inline)) {
      const V e = exp2(d, hn::Mul(hn::Sub(hn::Load(d, entries + i), high), scale));
      hn::Store(e, d, entries + i);
      i += lanes;
      return e;
    };
    while (i + lanes < end) {
      even = hn::Add(even, next());
      odd = hn::Add(odd, next());
    }
    if (i < end) even = hn::Add(even, next());
    total += sum_of_lanes(hn::Add(even, odd));
  }
  return total;
}

// gradient = factor e; or zeros, where there are no exponentials.
template <class T>
HWY_NOINLINE void write_gradient(const float* e, size_t classes, float factor, bool past_caches,
                                 T* HWY_RESTRICT gradient) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  const V by = hn::Set(d, factor);
  const auto at = [&](size_t i) __attribute__((always_inline)) {
    return e == nullptr ? hn::Zero(d) : hn::Mul(hn::LoadU(d, e + i), by);
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

struct PairSum {
  double value = 0;
  size_t pairs = 0;
};

// The terms of the pairs in which the teacher prefers entry i: functions of x_j - x_i. Adds their gradients.
template <bool logistic>
HWY_NOINLINE PairSum pairs_of(size_t i, size_t count, float scale, bool constant, float margin, Columns& columns) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  const float *given = columns.given.data(), *p = columns.p.data(), *x = columns.x.data();
  float* const gradient = columns.gradient.data();
  const V own_given = hn::Set(d, given[i]), own_p = hn::Set(d, p[i]), own_x = hn::Set(d, x[i]);
  const V one = hn::Set(d, 1.0f), zero = hn::Zero(d);
  V value = zero, slopes = zero;
  PairSum sum;
  for (size_t j = 0; j < count; j += lanes) {
    const auto pair = hn::Lt(hn::LoadU(d, given + j), own_given);
    const V other = hn::LoadU(d, x + j);
    V term, slope;
    if constexpr (logistic) {
      const V masked = hn::Set(d, -std::numeric_limits<float>::infinity());
      const auto neither = hn::And(hn::Eq(other, masked), hn::Eq(own_x, masked));  // no difference, and no gradient
      const V apart = hn::IfThenZeroElse(neither, hn::Mul(hn::Sub(other, own_x), hn::Set(d, scale)));
      const V small = exp(d, hn::Neg(hn::Abs(apart)));
      term = hn::Add(hn::Max(apart, zero), log1p(d, small));
      slope = hn::Div(hn::IfThenElse(hn::Gt(apart, zero), one, small), hn::Add(one, small));
      slope = hn::IfThenZeroElse(neither, slope);
    } else {
      const V least = constant ? hn::Set(d, margin) : hn::Sub(own_p, hn::LoadU(d, p + j));
      const V lacking = hn::Sub(least, hn::Sub(own_x, other));
      const auto enough = hn::Le(lacking, zero);
      term = hn::IfThenZeroElse(enough, lacking);
      slope = hn::IfThenZeroElse(enough, one);
    }
    sum.pairs += hn::CountTrue(d, pair);
    value = hn::Add(value, hn::IfThenElseZero(pair, term));
    slope = hn::IfThenElseZero(pair, slope);
    slopes = hn::Add(slopes, slope);
    hn::StoreU(hn::Add(hn::LoadU(d, gradient + j), slope), d, gradient + j);
  }
  gradient[i] -= hn::GetLane(hn::SumOfLanes(d, slopes));
  sum.value = sum_of_lanes(value);
  return sum;
}

// One row after the other, with the scratch memory of one task.
template <class T>
class Rows {
 public:
  Rows(const Problem& problem, float* memory)
      : problem_(problem), classes_(problem.classes), rest_(memory), place_(problem.classes, 0) {
    entries_.reserve(problem.entries);
  }

  void run(size_t first, size_t last) {
    for (size_t row = first; row < last; ++row) run_row(row);
    if (problem_.stream_gradient) finish_streaming();
  }

 private:
  void run_row(size_t row) {
    T* const gradient = problem_.gradient == nullptr ? nullptr : static_cast<T*>(problem_.gradient) + row * classes_;
    const float weight = gradient != nullptr && problem_.weight != nullptr ? problem_.weight[row] : 0;
    if (gradient != nullptr && weight == 0) std::fill_n(gradient, classes_, T{});
    if (weight == 0 && problem_.value == nullptr) return;

    const T* const student = static_cast<const T*>(problem_.student) + row * classes_;
    const bool known = find_entries(row, student);
    Outcome outcome;
    Others others;
    if (known) {
      if (!problem_.on_entries()) others = normalize(student);
      outcome = problem_.on_pairs() ? pairs() : entries(others);
    } else {
      outcome.value = outcome.slope = kNan;
    }
    if (problem_.value != nullptr) problem_.value[row] = static_cast<float>(outcome.value);
    if (weight == 0) return;

    const double chain = weight * problem_.scale;
    if (std::isnan(outcome.value)) {
      std::fill_n(rest_, classes_, 1.0f);
      return write_gradient(rest_, classes_, static_cast<float>(kNan), false, gradient);
    }
    if (problem_.on_entries()) {
      write_gradient<T>(nullptr, classes_, 0.0f, problem_.stream_gradient, gradient);
    } else {
      const double factor = outcome.slope * others.factor - outcome.tail * others.reciprocal;
      write_gradient(rest_, classes_, static_cast<float>(chain * factor), problem_.stream_gradient, gradient);
    }
    for (size_t i = 0; i < entries_.size(); ++i) {
      Entry& entry = entries_[i];
      if (entry.first != i) entries_[entry.first].own += entry.own;
    }
    for (size_t i = 0; i < entries_.size(); ++i) {
      const Entry& entry = entries_[i];
      if (entry.first != i) continue;
      const double slope = entry.own + (problem_.on_entries() ? 0 : outcome.slope * entry.q);
      store(hn::Set(D(), static_cast<float>(chain * slope)), D(), gradient + entry.id, 1);
    }
  }

  // The entries that are there; whether all of them are classes.
  bool find_entries(size_t row, const T* student) {
    const T* const teacher = static_cast<const T*>(problem_.teacher) + row * problem_.entries;
    const std::int64_t* const ids = problem_.ids + row * problem_.entries;
    entries_.clear();
    for (size_t i = 0; i < problem_.entries; ++i) {
      const float given = entry_at(teacher + i);
      if (given == -static_cast<float>(kInfinity) && problem_.form != Form::kSampled) continue;
      if (ids[i] < 0 || ids[i] >= static_cast<std::int64_t>(classes_)) return false;
      const auto id = static_cast<size_t>(ids[i]);
      const size_t number = entries_.size(), before = place_[id];  // of this row or any before
      Entry entry{};
      entry.id = id;
      entry.first = before < number && entries_[before].id == id ? before : number;
      if (entry.first == number) place_[id] = static_cast<std::uint32_t>(number);
      entry.logit = entry_at(student + id);
      entry.given = given;
      entries_.push_back(entry);
    }
    return true;
  }

  // q of the entries, and what the other classes have: their exponentials are left in scratch memory, with 0 for
  // entries.
  Others normalize(const T* student) {
    const auto none = -static_cast<float>(kInfinity);
    const float top = copy_and_maximum(student, classes_, rest_);
    float rest_top = top;
    double mass = 0;
    for (size_t i = 0; i < entries_.size(); ++i) {
      Entry& entry = entries_[i];
      entry.log_q = (double{entry.logit} - top) * problem_.scale;
      entry.q = std::exp(entry.log_q);
      if (entry.first == i) mass += entry.q;
      rest_[entry.id] = none;
      if (problem_.has_tail() && !(entry.logit < top)) rest_top = none;
    }
    if (rest_top == none) rest_top = copy_and_maximum<float>(rest_, classes_, rest_);
    if (rest_top == none) rest_top = 0;  // any finite one gives the right exponentials: 0
    const double sum = exponentials(rest_, classes_, rest_top, static_cast<float>(problem_.scale) * kLog2E);
    const double shift = sum == 0 ? 0 : (double{rest_top} - top) * problem_.scale;
    const double log_sum = std::log(sum) + shift;
    mass += sum == 0 ? 0 : std::exp(log_sum);
    const double log_mass = mass == 0 ? kNan : std::log(mass);
    for (Entry& entry : entries_) {
      entry.log_q -= log_mass;
      entry.q /= mass;
    }
    Others others;
    others.log_q = log_sum - log_mass;
    others.factor = sum == 0 ? 0 : std::exp(shift) / mass;
    others.reciprocal = sum == 0 ? 0 : 1 / sum;
    return others;
  }

  // q of the entries among themselves, and p where it is of the entries among themselves.
  template <class Score>
  void softmax_over_entries(const Score& score, double Entry::*probability, double Entry::*log_probability) {
    double top = -kInfinity, sum = 0;
    for (const Entry& entry : entries_) top = std::max(top, score(entry));
    for (const Entry& entry : entries_) sum += std::exp((score(entry) - top) * problem_.scale);
    const double log_sum = std::log(sum);
    for (Entry& entry : entries_) {
      entry.*log_probability = (score(entry) - top) * problem_.scale - log_sum;
      entry.*probability = std::exp(entry.*log_probability);
    }
  }

  // The forms that are sums over the entries.
  Outcome entries(const Others& others) {
    Outcome outcome;
    if (problem_.form == Form::kSampled) {
      for (Entry& entry : entries_) {
        const double ratio = entry.log_q - entry.given;
        outcome.value += ratio * entry.log_q;
        outcome.slope -= ratio;
        entry.own = ratio;
      }
      return outcome;
    }
    const bool among_themselves = problem_.form == Form::kRenormalized || problem_.form == Form::kZero;
    if (problem_.form == Form::kRenormalized) {
      softmax_over_entries([](const Entry& e) { return double{e.logit}; }, &Entry::q, &Entry::log_q);
    }
    if (among_themselves) {
      if (entries_.empty()) outcome.value = kNan;
      softmax_over_entries([](const Entry& e) { return double{e.given}; }, &Entry::p, &Entry::log_p);
    }
    double mass = 0;
    for (Entry& entry : entries_) {
      if (!among_themselves) {
        entry.log_p = entry.given;
        entry.p = std::exp(entry.log_p);
      }
      mass += entry.p;
      outcome.value += times(entry.p, entry.log_p - entry.log_q);
      entry.own = problem_.form == Form::kRenormalized ? entry.q - entry.p : -entry.p;
    }
    outcome.slope = mass;
    if (problem_.has_tail()) {
      const bool ghost = problem_.form == Form::kGhost;
      double outside = at_least_0(1 - mass), log_q = others.log_q;
      const bool moves =
          !(log_q < (ghost ? std::log(kGhost) : -std::numeric_limits<double>::max()));  // with the student
      if (ghost) {
        if (outside < kGhost) outside = kGhost;
        if (!moves) log_q = std::log(kGhost);
      } else if (log_q == -kInfinity && outside < kNoTail) {
        outside = 0;
      }
      outcome.value += times(outside, std::log(outside) - log_q);
      if (moves) {
        outcome.slope += outside;
        outcome.tail = outside;
      }
    }
    if (problem_.form != Form::kUnnormalized) outcome.value = at_least_0(outcome.value);
    return outcome;
  }

  // The forms that are sums over pairs of entries.
  Outcome pairs() {
    const bool logistic = problem_.form == Form::kLogistic, constant = problem_.form == Form::kConstantHinge;
    const size_t count = entries_.size();
    columns_.assign(count);
    bool unknown = false;
    for (size_t i = 0; i < count; ++i) {
      const Entry& entry = entries_[i];
      unknown = unknown || std::isnan(entry.given);
      columns_.given[i] = entry.given;
      columns_.p[i] = static_cast<float>(std::exp(double{entry.given}));
      columns_.x[i] = logistic ? entry.logit : static_cast<float>(entry.q);
    }
    Outcome outcome;
    size_t number = 0;
    for (size_t i = 0; i < count; ++i) {
      const PairSum sum = (logistic ? pairs_of<true> : pairs_of<false>)(i, count, static_cast<float>(problem_.scale),
                                                                        constant, problem_.margin, columns_);
      outcome.value += sum.value;
      number += sum.pairs;
    }
    double share = problem_.mean_of_pairs && number > 0 ? 1.0 / static_cast<double>(number) : 1.0;
    if (unknown) share = kNan;
    outcome.value *= share;
    for (size_t i = 0; i < count; ++i) {
      Entry& entry = entries_[i];
      entry.own = share * columns_.gradient[i] * (logistic ? 1.0 : entry.q);
      if (!logistic) outcome.slope -= entry.own;
    }
    return outcome;
  }

  const Problem& problem_;
  const size_t classes_;
  float* const rest_;                 // the row without the entries
  std::vector<std::uint32_t> place_;  // of a class: the number of the entry that named it last
  std::vector<Entry> entries_;
  Columns columns_;
};

void TopKRows(const Problem& problem, size_t first, size_t last, float* memory) {
  switch (problem.dtype) {
    case PYKD_FLOAT16:
      return Rows<hwy::float16_t>(problem, memory).run(first, last);
    case PYKD_BFLOAT16:
      return Rows<hwy::bfloat16_t>(problem, memory).run(first, last);
    default:
      return Rows<float>(problem, memory).run(first, last);
  }
}

}  // namespace pykd::kernels::top_k::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

// ---- Compiled once -------------------------------------------------------------------------------
#if HWY_ONCE

namespace pykd::kernels::top_k {
namespace {

HWY_EXPORT(TopKRows);

const char* refuse(const Call& call) {
  if (call.outputs[kGradStudent].given() && !call.inputs[kWeight].given()) return "grad_student needs weight";
  if (const char* why = refuse_temperature(call.number(kTemperature))) return why;
  const Form form = static_cast<Form>(call.choice(kForm));
  if (static_cast<Average>(call.choice(kAverage)) != Average::kPairs && form < Form::kPairwiseHinge) {
    return "average belongs to the forms on pairs: pairwise_hinge, constant_hinge, logistic";
  }
  if (form == Form::kConstantHinge && !(call.attributes[kMargin] >= 0)) return "margin is a number from 0 on";
  return nullptr;
}

void run(const Call& call) {
  const auto in = [&call](Input input) { return call.inputs[input]; };
  Problem problem{};
  problem.dtype = call.dtype;
  problem.rows = static_cast<size_t>(in(kStudent).length(0));
  problem.classes = static_cast<size_t>(in(kStudent).length(1));
  problem.entries = static_cast<size_t>(in(kTeacher).length(1));
  problem.form = static_cast<Form>(call.choice(kForm));
  problem.mean_of_pairs = static_cast<Average>(call.choice(kAverage)) == Average::kSamples;
  problem.student = in(kStudent).data;
  problem.teacher = in(kTeacher).data;
  problem.ids = in(kIds).as<const std::int64_t>();
  problem.weight = in(kWeight).as<const float>();
  problem.value = call.outputs[kValue].as<float>();
  problem.gradient = call.outputs[kGradStudent].data;
  problem.scale = 1.0 / double{call.number(kTemperature)};
  problem.margin = static_cast<float>(call.attributes[kMargin]);
  const size_t numbers = problem.rows * problem.classes;
  problem.stream_gradient = problem.gradient != nullptr && is_streamed(numbers, call.dtype);

  for_rows(call, problem.rows, numbers, [&](size_t first, size_t last) {
    const Floats memory(padded(problem.classes));
    HWY_DYNAMIC_DISPATCH(TopKRows)(problem, first, last, memory.get());
  });
}

const bool registered = add({
    "top_k",
    {{"student", "batch classes", Role::kTensor},
     {"teacher", "batch top_k", Role::kTensor},
     {"ids", "batch top_k", Role::kIndex},
     {"temperature", "", Role::kNumber},
     {"weight", "batch", Role::kFloat32, kOptional}},
    {{"value", "batch", Role::kFloat32}, {"grad_student", "batch classes", Role::kTensor}},
    {{"form",
      0,
      {"tail", "ghost", "renormalized", "zero", "unnormalized", "sampled", "pairwise_hinge", "constant_hinge",
       "logistic"}},
     {"average", 0, {"pairs", "samples"}},
     {"margin", 0.1}},
    kFloatAndHalves,
    refuse,
    run,
});

}  // namespace
}  // namespace pykd::kernels::top_k

#endif  // HWY_ONCE
