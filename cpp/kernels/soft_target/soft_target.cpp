#include "kernels/soft_target/soft_target.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

#include "kernels/host/checks.h"
#include "kernels/host/rows.h"
#include "kernels/kernel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/soft_target/soft_target.cpp"
#include "hwy/foreach_target.h"  // compiles this file once per instruction set

#include "hwy/highway.h"
#include "kernels/simd/math-inl.h"
#include "kernels/simd/memory-inl.h"

// ---- What all instruction sets share -------------------------------------------------------------
#ifndef PYKD_KERNELS_SOFT_TARGET_SHARED_
#define PYKD_KERNELS_SOFT_TARGET_SHARED_

namespace pykd::kernels::soft_target {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kLn2InDouble = 0.693147180559945309417;

// Classes at a time. Two float32 tensors and what is kept of them take 16 KiB of the nearest cache.
constexpr size_t kBlock = 1024;

// A call, with what it does not ask for taken away: without `teacher` there is no soft part, without `labels` and
// `label_probs` no hard part.
struct Problem {
  pykd_dtype dtype;
  size_t rows, classes;
  size_t row_entries;  // from the start of a row of logits to the next one's
  Form form;
  const void* student;
  const void* teacher;
  const std::int64_t* labels;
  const void* label_probs;
  const float* soft_weight;  // these five: nullptr where not given
  const float* hard_weight;
  float* soft;
  float* hard;
  void* gradient;
  float student_scale;  // logits are multiplied by it: 1 / T or 1
  float teacher_scale;
  float beta;
  bool almost_equal;     // a temperature at which p and q may be, and their divergence small beside their rounding
  bool separate_hard;    // the hard part needs a softmax of its own, without temperature
  bool stream_gradient;  // write it past the caches
};

// A log-probability as base files of llama.cpp have it: scale code + least, of 16-bit codes. A row begins with its two
// numbers, in float32.
struct Code {
  std::uint16_t bits;
};
constexpr size_t kCodesBegin = 4;  // words of a row before its codes

struct Codes {
  const std::uint16_t* words;
  float scale, least;

  Codes operator+(size_t count) const { return {words + count, scale, least}; }
};

// The entries of a row.
template <class T>
auto row_of(const void* rows, size_t row, size_t row_entries) {
  const T* const entries = static_cast<const T*>(rows) + row * row_entries;
  if constexpr (std::is_same_v<T, Code>) {
    float numbers[2];
    std::memcpy(numbers, entries, sizeof numbers);
    return Codes{reinterpret_cast<const std::uint16_t*>(entries) + kCodesBegin, numbers[0], numbers[1]};
  } else {
    return entries;
  }
}
template <class T>
const void* address_of(const T* entries) {
  return entries;
}
inline const void* address_of(const Codes& codes) { return codes.words; }

// What else is said of the rows, beside their losses; nullptr: it is not wanted.
struct RowScores {
  const void* teacher;
  const std::int64_t* labels;
  std::int64_t* teacher_class;  // with the largest logit, the first of equal ones
  std::int64_t* student_class;
  std::int64_t* teacher_class_rank;
  float* teacher_class_nll;
  float* student_class_nll;
  float* teacher_nll;  // of the labels
  float* student_nll;

  bool wanted() const {
    return teacher_class != nullptr || student_class != nullptr || teacher_class_rank != nullptr ||
           teacher_class_nll != nullptr || student_class_nll != nullptr || teacher_nll != nullptr ||
           student_nll != nullptr;
  }
};

// A form is what it sums up over the classes, and so what the gradient needs to find in scratch memory.
//   kForward      sum p (log p - log q), or without log p
//   kReverse      sum q (log q - log p)
//   kMixture      jsd, whose logarithms need the finished sums
struct NoForm {
  static constexpr bool kTeacher = false, kForward = false, kReverse = false, kMixture = false;
};
struct ForwardForm {
  static constexpr bool kTeacher = true, kForward = true, kReverse = false, kMixture = false;
};
struct ReverseForm {
  static constexpr bool kTeacher = true, kForward = false, kReverse = true, kMixture = false;
};
struct SymmetricForm {
  static constexpr bool kTeacher = true, kForward = true, kReverse = true, kMixture = false;
};
struct MixtureForm {
  static constexpr bool kTeacher = true, kForward = false, kReverse = false, kMixture = true;
};

// The hard part: with a softmax of its own or the soft part's; against probabilities or a label (or none at all).
template <bool separate, bool probs>
struct HardPart {
  static constexpr bool kSeparate = separate, kProbs = probs;
};

// Per class: e = 2^y, y = (logit - top) scale / ln 2 <= 0, with the row's largest logit when the block was read as top.
struct Scratch {
  float* student = nullptr;       // e of the student
  float* teacher = nullptr;       // e of the teacher
  float* difference = nullptr;    // y of the student less y of the teacher; later jsd's log(q / m)
  float* hard = nullptr;          // e of the student without temperature
  float* student_tops = nullptr;  // per block
  float* teacher_tops = nullptr;
  bool keep = false;  // false: one block's worth is enough, nobody reads it
};

template <class Terms, class Hard>
constexpr size_t scratch_arrays() {
  return 1 + (Terms::kTeacher ? 1 : 0) + (Terms::kReverse || Terms::kMixture ? 1 : 0) + (Hard::kSeparate ? 1 : 0);
}

// The sums over a row, relative to the tops so far.
struct Sums {
  double student = 0;  // sum e
  double teacher = 0;
  double hard = 0;
  double forward = 0;       // sum e_teacher (share y_teacher - y_student)
  double reverse = 0;       // sum e_student (y_student - y_teacher)
  double labels = 0;        // sum label_probs
  double label_scores = 0;  // sum label_probs y_hard

  // The tops have risen: every y so far is lower by so much (the deltas are negative).
  void lower(double student_delta, double teacher_delta, double hard_delta, double teacher_share) {
    // Without an entry above -inf so far there is no y to lower.
    if (student == 0) student_delta = hard_delta = 0;
    if (teacher == 0) teacher_delta = 0;
    const double student_factor = std::exp2(student_delta), teacher_factor = std::exp2(teacher_delta);
    forward = times(forward + teacher * (teacher_share * teacher_delta - student_delta), teacher_factor);
    reverse = times(reverse + student * (student_delta - teacher_delta), student_factor);
    label_scores += labels * hard_delta;
    student = times(student, student_factor);
    teacher = times(teacher, teacher_factor);
    if (hard != 0) hard = times(hard, std::exp2(hard_delta));
  }

 private:
  // Probabilities that have become 0 take infinite logarithms with them, NaN stays.
  static double times(double sum, double factor) { return factor == 0 && !std::isnan(sum) ? 0 : sum * factor; }
};

}  // namespace pykd::kernels::soft_target

#endif  // PYKD_KERNELS_SOFT_TARGET_SHARED_

// ---- Compiled for each instruction set -----------------------------------------------------------
HWY_BEFORE_NAMESPACE();
namespace pykd::kernels::soft_target::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using kernels::HWY_NAMESPACE::entries_to_alignment;
using kernels::HWY_NAMESPACE::exp2;
using kernels::HWY_NAMESPACE::exp2m1;
using kernels::HWY_NAMESPACE::finish_streaming;
using kernels::HWY_NAMESPACE::kLog2E;
using kernels::HWY_NAMESPACE::load;
using kernels::HWY_NAMESPACE::log;
using kernels::HWY_NAMESPACE::log1p;
using kernels::HWY_NAMESPACE::store;
using kernels::HWY_NAMESPACE::stream;

using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

// As kernels/simd/memory-inl.h has it for other types; with two roundings, as who writes the codes expects.
HWY_INLINE V load(D d, const Codes& codes) {
  const hn::RebindToSigned<D> di;
  const V code = hn::ConvertTo(d, hn::PromoteTo(di, hn::LoadU(hn::Rebind<std::uint16_t, D>(), codes.words)));
  return hn::Add(hn::Mul(code, hn::Set(d, codes.scale)), hn::Set(d, codes.least));
}
HWY_INLINE V load(D d, const Codes& codes, size_t count, float fill) {
  std::uint16_t words[hn::MaxLanes(D())] = {};
  std::memcpy(words, codes.words, count * sizeof *words);
  return hn::IfThenElse(hn::FirstN(d, count), load(d, Codes{words, codes.scale, codes.least}), hn::Set(d, fill));
}

// value, but 0 where factor is 0 (not where it is NaN).
HWY_INLINE V unless_zero(V factor, V value) { return hn::IfThenZeroElse(hn::Eq(factor, hn::Zero(D())), value); }

HWY_INLINE double sum_of_lanes(V v) { return hn::GetLane(hn::SumOfLanes(D(), v)); }

// The largest of `count` entries and of `least`. Leaves entries that are no float32 as such in `wide`.
template <class Entries>
HWY_NOINLINE float maximum(const Entries p, size_t count, float least, float* HWY_RESTRICT wide) {
  constexpr bool kWiden = !std::is_same_v<Entries, const float*>;
  const D d;
  const size_t lanes = hn::Lanes(d);
  V top0 = hn::Set(d, least), top1 = top0;
  const auto read = [&](size_t i) __attribute__((always_inline)) {
    const V entries = load(d, p + i);
    if constexpr (kWiden) hn::Store(entries, d, wide + i);
    return entries;
  };
  size_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    top0 = hn::Max(top0, read(i));
    top1 = hn::Max(top1, read(i + lanes));
  }
  if (i + lanes <= count) {
    top0 = hn::Max(top0, read(i));
    i += lanes;
  }
  if (i < count) {
    const V entries = load(d, p + i, count - i, -kInfinity);
    if constexpr (kWiden) hn::Store(entries, d, wide + i);
    top1 = hn::Max(top1, entries);
  }
  return hn::GetLane(hn::MaxOfLanes(d, hn::Max(top0, top1)));
}

// Label probabilities as float32.
template <class T>
HWY_NOINLINE void widen_entries(const T* HWY_RESTRICT p, size_t count, float* HWY_RESTRICT wide) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= count; i += lanes) hn::Store(load(d, p + i), d, wide + i);
  if (i < count) hn::Store(load(d, p + i, count - i, 0.0f), d, wide + i);
}

template <class T>
HWY_NOINLINE void write_nan(T* HWY_RESTRICT p, size_t count) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  const V nan = hn::Set(d, static_cast<float>(kNan));
  for (size_t i = 0; i < count; i += lanes) store(nan, d, p + i, std::min(lanes, count - i));
}

// What a block needs to know.
struct BlockScales {
  float student_top, teacher_top;
  float student, teacher;  // times log2(e): the exponentials are powers of 2
  float teacher_share;     // 1: the forward sum has log p; 0: it has not
};

// A part of a block, of which each lane of a vector sums up 64 entries at most in float32.
HWY_INLINE size_t part_entries() { return std::min(64 * hn::Lanes(D()), kBlock); }

// Sums of every n-th vector of a part. A loop alternates between two of them, to have more work in flight.
template <class Terms, class Hard>
struct Lane {
  V student, teacher, hard, forward, reverse, labels, label_scores;

  HWY_INLINE void clear() { student = teacher = hard = forward = reverse = labels = label_scores = hn::Zero(D()); }

  // `present(e)` is e, less what lies in lanes without a class.
  template <class Present>
  HWY_INLINE void add(const BlockScales& scales, V student_logits, V teacher_logits, V label_probs,
                      const Present& present, float* HWY_RESTRICT student_out, float* HWY_RESTRICT teacher_out,
                      float* HWY_RESTRICT difference_out, float* HWY_RESTRICT hard_out) {
    const D d;
    const V above = hn::Sub(student_logits, hn::Set(d, scales.student_top));
    const V student_y = hn::Mul(above, hn::Set(d, scales.student));
    const V student_e = present(exp2(d, student_y));
    student = hn::Add(student, student_e);
    hn::Store(student_e, d, student_out);
    if constexpr (Terms::kTeacher) {
      const V teacher_y = hn::Mul(hn::Sub(teacher_logits, hn::Set(d, scales.teacher_top)), hn::Set(d, scales.teacher));
      const V teacher_e = present(exp2(d, teacher_y));
      teacher = hn::Add(teacher, teacher_e);
      hn::Store(teacher_e, d, teacher_out);
      if constexpr (Terms::kForward) {
        const V logs = hn::MulSub(hn::Set(d, scales.teacher_share), teacher_y, student_y);
        forward = hn::Add(forward, unless_zero(teacher_e, hn::Mul(teacher_e, logs)));
      }
      if constexpr (Terms::kReverse) {
        const V logs = unless_zero(student_e, hn::Sub(student_y, teacher_y));
        reverse = hn::MulAdd(student_e, logs, reverse);
        hn::Store(logs, d, difference_out);
      }
      if constexpr (Terms::kMixture) hn::Store(hn::Sub(student_y, teacher_y), d, difference_out);
    }
    V hard_y = student_y;
    if constexpr (Hard::kSeparate) {
      hard_y = hn::Mul(above, hn::Set(d, kLog2E));
      const V hard_e = present(exp2(d, hard_y));
      hard = hn::Add(hard, hard_e);
      hn::Store(hard_e, d, hard_out);
    }
    if constexpr (Hard::kProbs) {
      labels = hn::Add(labels, label_probs);
      label_scores = hn::Add(label_scores, unless_zero(label_probs, hn::Mul(label_probs, hard_y)));
    }
  }
};

// Where the entries of a part lie, as float32, and what of memory will be wanted soon, `width` bytes of it per entry.
// What a form has no use for is the student's.
struct PartInput {
  const float* student;
  const float* teacher;
  const float* probs;
  const unsigned char* student_ahead;
  const unsigned char* teacher_ahead;
  size_t width;

  PartInput from(size_t entry) const {
    return {student + entry,
            teacher + entry,
            probs + entry,
            student_ahead + entry * width,
            teacher_ahead + entry * width,
            width};
  }
};

// Adds `count` classes to the row's sums; leaves exponentials and differences in scratch memory.
template <class Terms, class Hard>
HWY_NOINLINE void add_part(const PartInput& part, size_t count, const BlockScales& block_scales,
                           float* HWY_RESTRICT student_out, float* HWY_RESTRICT teacher_out,
                           float* HWY_RESTRICT difference_out, float* HWY_RESTRICT hard_out, Sums& sums) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  const BlockScales scales = block_scales;  // copies, which no store can change
  const PartInput in = part;
  const V none = hn::Zero(d);
  Lane<Terms, Hard> even, odd;
  even.clear();
  odd.clear();
  const auto add_vector = [&](Lane<Terms, Hard> & lane, size_t i) __attribute__((always_inline)) {
    hwy::Prefetch(in.student_ahead + i * in.width);
    if constexpr (Terms::kTeacher) hwy::Prefetch(in.teacher_ahead + i * in.width);
    lane.add(
        scales, load(d, in.student + i), Terms::kTeacher ? load(d, in.teacher + i) : none,
        Hard::kProbs ? load(d, in.probs + i) : none, [](V e) HWY_ATTR { return e; }, student_out + i, teacher_out + i,
        difference_out + i, hard_out + i);
  };
  size_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    add_vector(even, i);
    add_vector(odd, i + lanes);
  }
  if (i + lanes <= count) {
    add_vector(even, i);
    i += lanes;
  }
  if (i < count) {  // classes that are not there have the largest logit, with which all is finite, and probability 0
    const size_t rest = count - i;
    const auto present = hn::FirstN(d, rest);
    odd.add(
        scales, load(d, in.student + i, rest, scales.student_top),
        Terms::kTeacher ? load(d, in.teacher + i, rest, scales.teacher_top) : none,
        Hard::kProbs ? load(d, in.probs + i, rest, 0.0f) : none,
        [present](V e) HWY_ATTR { return hn::IfThenElseZero(present, e); }, student_out + i, teacher_out + i,
        difference_out + i, hard_out + i);
  }
  sums.student += sum_of_lanes(hn::Add(even.student, odd.student));
  if constexpr (Terms::kTeacher) sums.teacher += sum_of_lanes(hn::Add(even.teacher, odd.teacher));
  if constexpr (Terms::kForward) sums.forward += sum_of_lanes(hn::Add(even.forward, odd.forward));
  if constexpr (Terms::kReverse) sums.reverse += sum_of_lanes(hn::Add(even.reverse, odd.reverse));
  if constexpr (Hard::kSeparate) sums.hard += sum_of_lanes(hn::Add(even.hard, odd.hard));
  if constexpr (Hard::kProbs) {
    sums.labels += sum_of_lanes(hn::Add(even.labels, odd.labels));
    sums.label_scores += sum_of_lanes(hn::Add(even.label_scores, odd.label_scores));
  }
}

// Sums over a row of student and teacher with one scale, relative to their largest logits.
struct Excess {
  double excess = 0;   // of e_student - e_teacher, each with its digits however small it is
  double teacher = 0;  // of e_teacher
};

template <class Entries>
HWY_NOINLINE Excess excess_over_teacher(const Entries student, const Entries teacher, size_t classes, float student_top,
                                        float teacher_top, float scale) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  Excess sums;
  V excess, teacher_sum;
  const auto add = [&](V student_logits, V teacher_logits, const auto& present) HWY_ATTR {
    const V student_y = hn::Mul(hn::Sub(student_logits, hn::Set(d, student_top)), hn::Set(d, scale));
    const V teacher_y = hn::Mul(hn::Sub(teacher_logits, hn::Set(d, teacher_top)), hn::Set(d, scale));
    const V student_e = exp2(d, student_y), teacher_e = exp2(d, teacher_y);
    const V difference = hn::Sub(student_y, teacher_y), one = hn::Set(d, 1.0f);
    const V above = hn::IfThenElse(hn::Gt(difference, one), hn::Sub(student_e, teacher_e),
                                   hn::Mul(teacher_e, exp2m1(d, hn::Min(difference, one))));
    // where both are -inf, whatever the difference is, it counts for nothing
    excess = hn::Add(excess, unless_zero(hn::Add(student_e, teacher_e), above));
    teacher_sum = hn::Add(teacher_sum, present(teacher_e));
  };
  for (size_t part = 0; part < classes; part += part_entries()) {
    const size_t end = std::min(classes, part + part_entries());
    excess = teacher_sum = hn::Zero(d);
    size_t i = part;
    for (; i + lanes <= end; i += lanes) {
      add(load(d, student + i), load(d, teacher + i), [](V e) HWY_ATTR { return e; });
    }
    if (i < end) {
      const auto present = hn::FirstN(d, end - i);
      add(load(d, student + i, end - i, student_top), load(d, teacher + i, end - i, teacher_top),
          [present](V e) HWY_ATTR { return hn::IfThenElseZero(present, e); });
    }
    sums.excess += sum_of_lanes(excess);
    sums.teacher += sum_of_lanes(teacher_sum);
  }
  return sums;
}

// The first of the entries that is `value`; 0 where none is.
template <class Entries>
HWY_NOINLINE size_t first_equal(const Entries row, size_t classes, float value) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  const V wanted = hn::Set(d, value);
  size_t i = 0;
  for (; i + lanes <= classes; i += lanes) {
    const auto equal = hn::Eq(load(d, row + i), wanted);
    if (!hn::AllFalse(d, equal)) return i + static_cast<size_t>(hn::FindFirstTrue(d, equal));
  }
  if (i == classes) return 0;
  const auto equal = hn::Eq(load(d, row + i, classes - i, std::numeric_limits<float>::quiet_NaN()), wanted);
  return hn::AllFalse(d, equal) ? 0 : i + static_cast<size_t>(hn::FindFirstTrue(d, equal));
}

// How many of the entries [begin, end) are larger than `value`, or equal to it.
template <bool or_equal, class Entries>
HWY_NOINLINE size_t count_above(const Entries row, size_t begin, size_t end, float value) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  const V least = hn::Set(d, value);
  const auto count = [&](V entries) HWY_ATTR {
    return hn::CountTrue(d, or_equal ? hn::Ge(entries, least) : hn::Gt(entries, least));
  };
  size_t found = 0, i = begin;
  for (; i + lanes <= end; i += lanes) found += count(load(d, row + i));
  if (i < end) found += count(load(d, row + i, end - i, std::numeric_limits<float>::quiet_NaN()));
  return found;
}

// The two divergences of jsd over a span of classes, given the factors that make e a probability and the logarithm to
// the base 2 of q / p where the difference is 0.
struct MixtureSums {
  double teacher = 0;  // KL(p || m)
  double student = 0;  // KL(q || m)
};

// almost_equal: with the digits of a small log(m / p), which the logarithm of a sum loses.
template <bool almost_equal>
HWY_NOINLINE void add_mixture(const Scratch& scratch, size_t begin, size_t end, float student_factor,
                              float teacher_factor, float log_ratio, float beta, MixtureSums& sums) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  const V ln2 = hn::Set(d, static_cast<float>(kLn2InDouble)), zero = hn::Zero(d);
  for (size_t block = begin; block < end; block += kBlock) {
    const size_t block_end = std::min(end, block + kBlock);
    V teacher_sum = zero, student_sum = zero;
    for (size_t i = block; i < block_end; i += lanes) {  // a last vector is filled up with probabilities of 0
      const V q = hn::Mul(hn::Load(d, scratch.student + i), hn::Set(d, student_factor));
      const V p = hn::Mul(hn::Load(d, scratch.teacher + i), hn::Set(d, teacher_factor));
      const V log2_q_over_p = hn::Add(hn::Load(d, scratch.difference + i), hn::Set(d, log_ratio));
      const V log_q_over_p = hn::Mul(log2_q_over_p, ln2);
      // Relative to the larger of p and q, so that nothing overflows and equal ones give exactly 0. Where both are 0,
      // or next to it, whatever the logarithm is, it counts for nothing.
      V log_m;
      if constexpr (almost_equal) {
        const V share = hn::IfThenElse(hn::Gt(log2_q_over_p, zero), hn::Set(d, beta), hn::Set(d, 1.0f - beta));
        const V missing = hn::Mul(share, exp2m1(d, hn::Neg(hn::Abs(log2_q_over_p))));
        log_m = log1p(d, hn::Max(missing, hn::Set(d, -1.0f + std::numeric_limits<float>::epsilon())));
      } else {
        const V larger = hn::Max(hn::Max(p, q), hn::Set(d, std::numeric_limits<float>::min()));
        log_m = log(d, hn::Div(hn::MulAdd(hn::Set(d, beta), hn::Sub(p, q), q), larger));
      }
      const V log_q = unless_zero(q, hn::Sub(hn::Min(log_q_over_p, zero), log_m));
      const V log_p = unless_zero(p, hn::Sub(hn::Min(hn::Neg(log_q_over_p), zero), log_m));
      student_sum = hn::MulAdd(q, log_q, student_sum);
      teacher_sum = hn::MulAdd(p, log_p, teacher_sum);
      hn::Store(log_q, d, scratch.difference + i);
    }
    sums.student += sum_of_lanes(student_sum);
    sums.teacher += sum_of_lanes(teacher_sum);
  }
}

// What the differences [begin, end) lie above `level`, and the exponentials, summed up over the student's.
struct AboveLevel {
  double differences = 0, exponentials = 0;
};

HWY_NOINLINE AboveLevel above_level(const Scratch& scratch, size_t begin, size_t end, float level) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  AboveLevel sums;
  for (size_t block = begin; block < end; block += kBlock) {
    const size_t block_end = std::min(end, block + kBlock);
    V differences = hn::Zero(d), exponentials = hn::Zero(d);
    for (size_t i = block; i < block_end; i += lanes) {  // a last vector is filled up with exponentials of 0
      const V e = hn::Load(d, scratch.student + i);
      differences = hn::MulAdd(e, hn::Sub(hn::Load(d, scratch.difference + i), hn::Set(d, level)), differences);
      exponentials = hn::Add(exponentials, e);
    }
    sums.differences += sum_of_lanes(differences);
    sums.exponentials += sum_of_lanes(exponentials);
  }
  return sums;
}

// gradient = constant e_student - teacher e_teacher + hard e_hard - labels label_probs
//            + (slope (difference - mean) + offset) e_student
// The mean is that of the differences: what is left of large logarithms without it is not rounded with them, nor with
// the probabilities, whose difference may be smaller still.
struct Coefficients {
  float constant = 0, teacher = 0, hard = 0, labels = 0, slope = 0, mean = 0, offset = 0;
};

template <bool kDifference, bool kTeacher, bool kSeparate, bool kProbs, class T>
struct GradientAt {
  const Scratch& scratch;
  const Coefficients coefficients;
  const T* HWY_RESTRICT probs;

  HWY_INLINE V operator()(size_t i, V label_probs) const {
    const D d;
    const V e = hn::LoadU(d, scratch.student + i);
    V result = hn::Mul(e, hn::Set(d, coefficients.constant));
    if constexpr (kTeacher) {
      result = hn::NegMulAdd(hn::Set(d, coefficients.teacher), hn::LoadU(d, scratch.teacher + i), result);
    }
    if constexpr (kSeparate) {
      result = hn::MulAdd(hn::Set(d, coefficients.hard), hn::LoadU(d, scratch.hard + i), result);
    }
    if constexpr (kProbs) result = hn::NegMulAdd(hn::Set(d, coefficients.labels), label_probs, result);
    if constexpr (kDifference) {
      const V from_mean = hn::Sub(hn::LoadU(d, scratch.difference + i), hn::Set(d, coefficients.mean));
      result =
          hn::MulAdd(e, hn::MulAdd(hn::Set(d, coefficients.slope), from_mean, hn::Set(d, coefficients.offset)), result);
    }
    return result;
  }
  HWY_INLINE V operator()(size_t i) const { return (*this)(i, kProbs ? load(D(), probs + i) : hn::Zero(D())); }
  HWY_INLINE V operator()(size_t i, size_t count) const {
    return (*this)(i, kProbs ? load(D(), probs + i, count, 0.0f) : hn::Zero(D()));
  }
};

// Writes the gradient of the classes [begin, end), `label` among them or not.
template <class T, bool kDifference, bool kTeacher, bool kSeparate, bool kProbs>
HWY_NOINLINE void write_gradient(const Scratch& row_scratch, const Coefficients& coefficients, const T* probs,
                                 size_t begin, size_t end, std::int64_t label, bool past_caches,
                                 T* HWY_RESTRICT gradient) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  const Scratch scratch = row_scratch;
  const GradientAt<kDifference, kTeacher, kSeparate, kProbs, T> at{scratch, coefficients, probs};
  size_t i = begin;
  if (past_caches) {
    const size_t head = std::min(entries_to_alignment(d, gradient + i), end - i);
    if (head > 0) store(at(i, head), d, gradient + i, head);
    i += head;
    for (; i + lanes <= end; i += lanes) stream(at(i), d, gradient + i);
  } else {
    for (; i + lanes <= end; i += lanes) store(at(i), d, gradient + i);
  }
  if (i < end) store(at(i, end - i), d, gradient + i, end - i);
  if (!kProbs && label >= static_cast<std::int64_t>(begin) && label < static_cast<std::int64_t>(end)) {
    const size_t place = static_cast<size_t>(label);
    store(hn::Sub(at(place, 1), hn::Set(d, coefficients.labels)), d, gradient + place, 1);
  }
}

// One row after the other, with the scratch memory of one thread.
template <class T, class Terms, class Hard>
class Rows {
 public:
  Rows(const Problem& problem, float* memory) : problem_(problem), classes_(problem.classes) {
    keep_possible_ = problem.gradient != nullptr || Terms::kMixture;
    const size_t each = padded(keep_possible_ ? classes_ : std::min(classes_, kBlock));
    const auto take = [&memory](size_t count) {
      float* part = memory;
      memory += count;
      return part;
    };
    // What the form has no use for points somewhere harmless.
    scratch_.student = scratch_.teacher = scratch_.difference = scratch_.hard = take(each);
    if (Terms::kTeacher) scratch_.teacher = take(each);
    if (Terms::kReverse || Terms::kMixture) scratch_.difference = take(each);
    if (Hard::kSeparate) scratch_.hard = take(each);
    const size_t blocks = (classes_ + kBlock - 1) / kBlock;
    scratch_.student_tops = take(blocks);
    scratch_.teacher_tops = take(blocks);
    student_scale2_ = problem.student_scale * kLog2E;
    teacher_scale2_ = problem.teacher_scale * kLog2E;
  }

  void run(size_t first, size_t last) {
    for (size_t row = first; row < last; ++row) run_row(row);
    if (problem_.stream_gradient) finish_streaming();
  }

  // The sums over a row, and its soft value; `keep`: what a gradient needs as well.
  void sum_up(size_t row, const T* probs, bool keep) {
    scratch_.keep = keep || Terms::kMixture;
    read(row, probs);

    log_student_ = std::log2(sums_.student);
    if (Terms::kTeacher) log_teacher_ = std::log2(sums_.teacher);
    if constexpr (Terms::kTeacher) {
      if (problem_.almost_equal) refine_ratio(row);
      soft_ = soft_value();
      if (problem_.soft != nullptr) problem_.soft[row] = static_cast<float>(soft_);
    }
  }

  // Of the row that was summed up: its largest logit, and -log of the probability of a class that has it. The
  // teacher's is softened, the student's is not.
  struct Best {
    float logit, nll;
  };
  Best student_best() const { return best(student_top_, Hard::kSeparate ? std::log2(sums_.hard) : log_student_); }
  Best teacher_best() const { return best(teacher_top_, log_teacher_); }

 private:
  static Best best(float top, double log2_sum) {
    return {top, std::isfinite(top) ? static_cast<float>(log2_sum * kLn2InDouble) : static_cast<float>(kNan)};
  }

  void run_row(size_t row) {
    const bool has_hard = problem_.labels != nullptr || problem_.label_probs != nullptr;
    T* const gradient = problem_.gradient == nullptr ? nullptr : static_cast<T*>(problem_.gradient) + row * classes_;
    const float soft_weight =
        gradient != nullptr && Terms::kTeacher && problem_.soft_weight != nullptr ? problem_.soft_weight[row] : 0;
    const float hard_weight =
        gradient != nullptr && has_hard && problem_.hard_weight != nullptr ? problem_.hard_weight[row] : 0;
    const bool gradient_is_zero = soft_weight == 0 && hard_weight == 0;
    if (gradient != nullptr && gradient_is_zero) std::fill_n(gradient, classes_, T{});
    if (gradient_is_zero && problem_.soft == nullptr && problem_.hard == nullptr) return;

    const T* const probs = Hard::kProbs ? static_cast<const T*>(problem_.label_probs) + row * classes_ : nullptr;
    const std::int64_t label = problem_.labels != nullptr ? problem_.labels[row] : -1;
    sum_up(row, probs, !gradient_is_zero);
    const double hard = has_hard ? hard_value(row, label) : 0;
    if (problem_.hard != nullptr) problem_.hard[row] = static_cast<float>(hard);
    if (gradient_is_zero) return;
    if ((soft_weight != 0 && std::isnan(soft_)) || (hard_weight != 0 && std::isnan(hard))) {
      write_nan(gradient, classes_);
    } else {
      write(gradient, probs, label, soft_weight, hard_weight);
    }
  }

  // Fills sums_ and scratch_.
  void read(size_t row, const T* probs) {
    const auto student = row_of<T>(problem_.student, row, problem_.row_entries);
    const auto teacher = Terms::kTeacher ? row_of<T>(problem_.teacher, row, problem_.row_entries) : student;
    sums_ = Sums();
    student_top_ = teacher_top_ = -kInfinity;
    const float teacher_share = problem_.form == Form::kCrossEntropy ? 0.0f : 1.0f;
    HWY_ALIGN float wide[3][sizeof(T) < sizeof(float) ? kBlock : 1];
    BlockScales scales{0, 0, student_scale2_, teacher_scale2_, teacher_share};
    for (size_t begin = 0, block = 0; begin < classes_; begin += kBlock, ++block) {
      const size_t count = std::min(kBlock, classes_ - begin);
      student_top_ = maximum(student + begin, count, student_top_, wide[0]);
      if constexpr (Terms::kTeacher) teacher_top_ = maximum(teacher + begin, count, teacher_top_, wide[1]);
      // Where everything is -inf so far, any finite top gives the right exponentials: 0.
      const float student_top = student_top_ == -kInfinity ? 0.0f : student_top_;
      const float teacher_top = teacher_top_ == -kInfinity ? 0.0f : teacher_top_;
      if (block > 0 && (student_top != scales.student_top || teacher_top != scales.teacher_top)) {
        const double student_rise = static_cast<double>(scales.student_top) - student_top;
        const double teacher_rise = static_cast<double>(scales.teacher_top) - teacher_top;
        sums_.lower(student_rise * student_scale2_, teacher_rise * teacher_scale2_,
                    student_rise * (Hard::kSeparate ? kLog2E : student_scale2_), teacher_share);
      }
      scales.student_top = student_top;
      scales.teacher_top = teacher_top;
      // The next block is fetched from memory while this one is worked on.
      const float* const student_entries = as_float32(student + begin, wide[0]);
      const auto* const student_ahead = static_cast<const unsigned char*>(address_of(student + begin + kBlock));
      PartInput input{student_entries, student_entries, student_entries, student_ahead, student_ahead, sizeof(T)};
      if constexpr (Terms::kTeacher) {
        input.teacher = as_float32(teacher + begin, wide[1]);
        input.teacher_ahead = static_cast<const unsigned char*>(address_of(teacher + begin + kBlock));
      }
      if constexpr (Hard::kProbs) {
        if constexpr (sizeof(T) < sizeof(float)) widen_entries(probs + begin, count, wide[2]);
        input.probs = as_float32(probs + begin, wide[2]);
      }
      for (size_t part = 0; part < count; part += part_entries()) {
        const size_t out = scratch_.keep ? begin + part : 0;
        add_part<Terms, Hard>(input.from(part), std::min(part_entries(), count - part), scales, scratch_.student + out,
                              scratch_.teacher + out, scratch_.difference + out, scratch_.hard + out, sums_);
      }
      scratch_.student_tops[block] = student_top_;
      scratch_.teacher_tops[block] = teacher_top_;
    }
  }

  // The student's sum once more, by how little it differs from the teacher's: the rounding of the exponentials, which
  // is another one for each, is more than what a divergence of two that are almost equal is made of.
  void refine_ratio(size_t row) {
    const auto student = row_of<T>(problem_.student, row, problem_.row_entries);
    const auto teacher = row_of<T>(problem_.teacher, row, problem_.row_entries);
    const Excess sums = excess_over_teacher(student, teacher, classes_, student_top_, teacher_top_, student_scale2_);
    const double ratio = sums.excess / sums.teacher;
    if (!(std::abs(ratio) < 0.5) || std::isnan(sums_.student)) return;
    sums_.student = sums_.teacher * (1 + ratio);
    log_student_ = log_teacher_ + std::log1p(ratio) / kLn2InDouble;
  }

  static const float* as_float32(const float* entries, const float* /*wide*/) { return entries; }
  template <class Narrow>
  static const float* as_float32(const Narrow& /*entries*/, const float* wide) {
    return wide;
  }

  double soft_value() {
    const double log_ratio = log_student_ - log_teacher_;
    if constexpr (Terms::kMixture) {
      mixture_ = MixtureSums();
      const auto add = problem_.almost_equal ? add_mixture<true> : add_mixture<false>;
      for (size_t begin = 0, end; begin < classes_; begin = end) {
        const Span span = span_at(begin);
        end = span.end;
        add(scratch_, begin, end, static_cast<float>(span.student_factor), static_cast<float>(span.teacher_factor),
            static_cast<float>(span.log_ratio - log_ratio), problem_.beta, mixture_);
      }
      return problem_.beta * mixture_.teacher + (1.0 - problem_.beta) * mixture_.student;
    }
    const double teacher_share = problem_.form == Form::kCrossEntropy ? 0.0 : 1.0;
    const double forward = sums_.forward / sums_.teacher + log_student_ - teacher_share * log_teacher_;
    difference_ = sums_.reverse / sums_.student;
    const double reverse = difference_ - log_ratio;
    if (Terms::kForward && Terms::kReverse) return 0.5 * kLn2InDouble * (forward + reverse);
    return kLn2InDouble * (Terms::kForward ? forward : reverse);
  }

  double hard_value(size_t row, std::int64_t label) const {
    const double log_sum = Hard::kSeparate ? std::log2(sums_.hard) : log_student_;
    if (Hard::kProbs) return (sums_.labels * log_sum - sums_.label_scores) * kLn2InDouble;
    if (label < 0 || label >= static_cast<std::int64_t>(classes_)) return kNan;
    const D d;
    const auto logit = row_of<T>(problem_.student, row, problem_.row_entries) + static_cast<size_t>(label);
    return log_sum * kLn2InDouble -
           (static_cast<double>(hn::GetLane(load(d, logit, 1, 0.0f))) - static_cast<double>(student_top_));
  }

  // Classes whose blocks have the same tops, and what makes their entries probabilities.
  struct Span {
    size_t end;
    double student_factor, teacher_factor, hard_factor;  // q = student_factor e_student, and so on
    double log_ratio;  // to be added to the difference: log2 of how much larger q / p is than the entries say
  };

  Span span_at(size_t begin) const {
    size_t block = begin / kBlock;
    const float student_top = scratch_.student_tops[block], teacher_top = scratch_.teacher_tops[block];
    const size_t blocks = (classes_ + kBlock - 1) / kBlock;
    do {
      ++block;
    } while (block < blocks && scratch_.student_tops[block] == student_top &&
             (!Terms::kTeacher || scratch_.teacher_tops[block] == teacher_top));
    Span span;
    span.end = std::min(block * kBlock, classes_);
    const double student_below = student_top == student_top_ ? 0 : static_cast<double>(student_top) - student_top_;
    const double teacher_below = teacher_top == teacher_top_ ? 0 : static_cast<double>(teacher_top) - teacher_top_;
    span.student_factor = factor(student_below * student_scale2_) / sums_.student;
    span.teacher_factor = Terms::kTeacher ? factor(teacher_below * teacher_scale2_) / sums_.teacher : 0;
    span.hard_factor = Hard::kSeparate ? factor(student_below * kLog2E) / sums_.hard : span.student_factor;
    span.log_ratio = student_below * student_scale2_ - teacher_below * teacher_scale2_;
    return span;
  }
  static double factor(double log2) { return log2 == 0 ? 1.0 : std::exp2(log2); }

  // The mean of the differences once more, where one class has most of q and its difference is large: that difference
  // then leaves no digits for the others, which are all of the gradient.
  void refine_difference() {
    if (sums_.student > 2 || std::abs(difference_) < 1 || !(std::abs(difference_) < 1e30)) return;
    double correction = 0;
    for (size_t begin = 0, end; begin < classes_; begin = end) {
      const Span span = span_at(begin);
      end = span.end;
      if (span.student_factor == 0) continue;
      const double level = difference_ - span.log_ratio;
      const float rounded = static_cast<float>(level);
      const AboveLevel above = above_level(scratch_, begin, end, rounded);
      correction += span.student_factor * (above.differences + (rounded - level) * above.exponentials);
    }
    difference_ += correction;
  }

  void write(T* gradient, const T* probs, std::int64_t label, float soft_weight, float hard_weight) {
    constexpr bool kDifference = Terms::kReverse || Terms::kMixture;
    using Write = void (*)(const Scratch&, const Coefficients&, const T*, size_t, size_t, std::int64_t, bool, T*);
    const bool with_soft = Terms::kTeacher && soft_weight != 0, with_probs = Hard::kProbs && hard_weight != 0;
    constexpr bool kSeparate = Hard::kSeparate, kProbs = Hard::kProbs;
    const Write write_span = with_soft
                                 ? (with_probs ? write_gradient<T, kDifference, Terms::kForward, kSeparate, kProbs>
                                               : write_gradient<T, kDifference, Terms::kForward, kSeparate, false>)
                                 : (with_probs ? write_gradient<T, false, false, kSeparate, kProbs>
                                               : write_gradient<T, false, false, kSeparate, false>);
    double hard = hard_weight;
    if (hard_weight != 0 && problem_.labels != nullptr && (label < 0 || label >= static_cast<std::int64_t>(classes_))) {
      hard = kNan;
    }
    if (hard_weight == 0) label = -1;
    if (Terms::kReverse && with_soft) refine_difference();
    const double chain = static_cast<double>(soft_weight) * problem_.student_scale;  // d(scaled logits) / d(logits)
    for (size_t begin = 0, end; begin < classes_; begin = end) {
      const Span span = span_at(begin);
      end = span.end;
      double constant = 0, slope = 0, mean = 0;
      Coefficients c;
      if (with_soft && Terms::kForward) {
        const double half = Terms::kReverse ? 0.5 : 1.0;
        constant += half * chain * span.student_factor;
        c.teacher = static_cast<float>(half * chain * span.teacher_factor);
      }
      if (with_soft && Terms::kReverse && span.student_factor != 0) {
        const double half = Terms::kForward ? 0.5 : 1.0;
        slope = half * chain * span.student_factor * kLn2InDouble;
        mean = difference_ - span.log_ratio;
      }
      if (with_soft && Terms::kMixture) {
        slope = chain * (1.0 - problem_.beta) * span.student_factor;
        mean = mixture_.student;
      }
      if (std::abs(mean) < 1e30) c.mean = static_cast<float>(mean);
      c.offset = static_cast<float>(slope * (c.mean - mean));
      const double hard_constant = hard * (Hard::kProbs ? sums_.labels : 1.0) * span.hard_factor;
      if (hard_weight != 0 && Hard::kSeparate) c.hard = static_cast<float>(hard_constant);
      if (hard_weight != 0 && !Hard::kSeparate) constant += hard_constant;
      c.constant = static_cast<float>(constant);
      c.slope = static_cast<float>(slope);
      c.labels = static_cast<float>(hard);
      write_span(scratch_, c, probs, begin, end, label, problem_.stream_gradient, gradient);
    }
  }

  const Problem& problem_;
  const size_t classes_;
  bool keep_possible_ = false;
  Scratch scratch_;
  float student_scale2_, teacher_scale2_;
  // Of the row at hand:
  Sums sums_;
  MixtureSums mixture_;
  float student_top_ = 0, teacher_top_ = 0;
  double log_student_ = 0, log_teacher_ = 0, soft_ = 0;
  double difference_ = 0;  // the mean over q, of blocks with the final tops
};

template <class T, class Terms, class Hard>
void run_rows(const Problem& problem, size_t first, size_t last, float* memory) {
  Rows<T, Terms, Hard>(problem, memory).run(first, last);
}

template <class T, class Terms>
void with_hard(const Problem& problem, size_t first, size_t last, float* memory) {
  const bool probs = problem.label_probs != nullptr;
  if constexpr (Terms::kTeacher) {
    if (problem.separate_hard) {
      return probs ? run_rows<T, Terms, HardPart<true, true>>(problem, first, last, memory)
                   : run_rows<T, Terms, HardPart<true, false>>(problem, first, last, memory);
    }
  }
  return probs ? run_rows<T, Terms, HardPart<false, true>>(problem, first, last, memory)
               : run_rows<T, Terms, HardPart<false, false>>(problem, first, last, memory);
}

template <class T>
void with_form(const Problem& problem, size_t first, size_t last, float* memory) {
  if (problem.teacher == nullptr) return with_hard<T, NoForm>(problem, first, last, memory);
  switch (problem.form) {
    case Form::kCrossEntropy:
    case Form::kKl:
      return with_hard<T, ForwardForm>(problem, first, last, memory);
    case Form::kReverseKl:
      return with_hard<T, ReverseForm>(problem, first, last, memory);
    case Form::kSymmetricKl:
      return with_hard<T, SymmetricForm>(problem, first, last, memory);
    case Form::kJsd:
      return with_hard<T, MixtureForm>(problem, first, last, memory);
  }
}

void SoftTargetRows(const Problem& problem, size_t first, size_t last, float* memory) {
  switch (problem.dtype) {
    case PYKD_FLOAT16:
      return with_form<hwy::float16_t>(problem, first, last, memory);
    case PYKD_BFLOAT16:
      return with_form<hwy::bfloat16_t>(problem, first, last, memory);
    default:
      return with_form<float>(problem, first, last, memory);
  }
}

// ---- Scores of rows ------------------------------------------------------------------------------

template <class T, class Terms, class Hard>
void score_rows(const Problem& problem, const RowScores& scores, size_t first, size_t last, float* memory) {
  constexpr bool kTeacherAlone = !Terms::kTeacher || Hard::kSeparate;  // its softmax without temperature is another
  using TeacherRows = Rows<T, NoForm, HardPart<false, false>>;
  Problem of_teacher = problem;
  of_teacher.student = scores.teacher;
  of_teacher.teacher = nullptr;
  of_teacher.soft = nullptr;
  of_teacher.student_scale = 1.0f;
  Rows<T, Terms, Hard> rows(problem, memory);
  TeacherRows teacher_rows(of_teacher, memory);
  const D d;
  for (size_t row = first; row < last; ++row) {
    rows.sum_up(row, nullptr, false);
    if (!scores.wanted()) continue;
    float teacher_top, teacher_nll;
    if constexpr (kTeacherAlone) {
      teacher_rows.sum_up(row, nullptr, false);
      const auto best = teacher_rows.student_best();
      teacher_top = best.logit;
      teacher_nll = best.nll;
    } else {
      const auto best = rows.teacher_best();
      teacher_top = best.logit;
      teacher_nll = best.nll;
    }
    const auto best = rows.student_best();
    const auto student = row_of<T>(problem.student, row, problem.row_entries);
    const auto teacher = row_of<T>(scores.teacher, row, problem.row_entries);
    const size_t teacher_class = first_equal(teacher, problem.classes, teacher_top);
    const size_t student_class = first_equal(student, problem.classes, best.logit);
    if (scores.teacher_class != nullptr) scores.teacher_class[row] = static_cast<std::int64_t>(teacher_class);
    if (scores.student_class != nullptr) scores.student_class[row] = static_cast<std::int64_t>(student_class);
    if (scores.teacher_class_nll != nullptr) scores.teacher_class_nll[row] = teacher_nll;
    if (scores.student_class_nll != nullptr) scores.student_class_nll[row] = best.nll;
    const auto logit = [&](const auto& entries, size_t place)
                           HWY_ATTR { return hn::GetLane(load(d, entries + place, 1, 0.0f)); };
    if (scores.teacher_class_rank != nullptr) {
      size_t before = 0;
      if (teacher_class != student_class) {
        const float own = logit(student, teacher_class);
        before = count_above<true>(student, 0, teacher_class, own) +
                 count_above<false>(student, teacher_class, problem.classes, own);
      }
      scores.teacher_class_rank[row] = static_cast<std::int64_t>(before + 1);
    }
    if (scores.labels == nullptr) continue;
    const std::int64_t label = scores.labels[row];
    const bool known = label >= 0 && label < static_cast<std::int64_t>(problem.classes);
    // Both terms are at least 0: nothing cancels.
    const auto nll = [&](float of_best, float top, const auto& entries) HWY_ATTR {
      return known ? of_best + (top - logit(entries, static_cast<size_t>(label))) : static_cast<float>(kNan);
    };
    if (scores.teacher_nll != nullptr) scores.teacher_nll[row] = nll(teacher_nll, teacher_top, teacher);
    if (scores.student_nll != nullptr) scores.student_nll[row] = nll(best.nll, best.logit, student);
  }
}

template <class T>
void score_rows_of(const Problem& problem, const RowScores& scores, size_t first, size_t last, float* memory) {
  const auto with = [&](auto terms) {
    using Terms = decltype(terms);
    if constexpr (Terms::kTeacher) {
      if (problem.separate_hard)
        return score_rows<T, Terms, HardPart<true, false>>(problem, scores, first, last, memory);
    }
    return score_rows<T, Terms, HardPart<false, false>>(problem, scores, first, last, memory);
  };
  if (problem.teacher == nullptr) return with(NoForm());
  switch (problem.form) {
    case Form::kCrossEntropy:
    case Form::kKl:
      return with(ForwardForm());
    case Form::kReverseKl:
      return with(ReverseForm());
    case Form::kSymmetricKl:
      return with(SymmetricForm());
    case Form::kJsd:
      return with(MixtureForm());
  }
}

void ScoreRows(const Problem& problem, const RowScores& scores, bool codes, size_t first, size_t last, float* memory) {
  if (codes) return score_rows_of<Code>(problem, scores, first, last, memory);
  switch (problem.dtype) {
    case PYKD_FLOAT16:
      return score_rows_of<hwy::float16_t>(problem, scores, first, last, memory);
    case PYKD_BFLOAT16:
      return score_rows_of<hwy::bfloat16_t>(problem, scores, first, last, memory);
    default:
      return score_rows_of<float>(problem, scores, first, last, memory);
  }
}

}  // namespace pykd::kernels::soft_target::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

// ---- Compiled once -------------------------------------------------------------------------------
#if HWY_ONCE

#include "hwy/aligned_allocator.h"

namespace pykd::kernels::soft_target {
namespace {

HWY_EXPORT(SoftTargetRows);
HWY_EXPORT(ScoreRows);

// The floats of scratch memory that a thread needs.
size_t scratch_size(const Problem& problem) {
  const bool keep = problem.gradient != nullptr || (problem.teacher != nullptr && problem.form == Form::kJsd);
  size_t arrays = 1;
  if (problem.teacher != nullptr) arrays += problem.form == Form::kCrossEntropy || problem.form == Form::kKl ? 1 : 2;
  if (problem.separate_hard) ++arrays;
  return arrays * padded(keep ? problem.classes : std::min(problem.classes, kBlock)) +
         2 * ((problem.classes + kBlock - 1) / kBlock);
}

// This thread's memory, at least `size` floats of it.
float* thread_memory(size_t size) {
  thread_local hwy::AlignedFreeUniquePtr<float[]> memory;
  thread_local size_t capacity = 0;
  if (capacity < size) {
    capacity = 0;
    memory.reset();
    memory = hwy::AllocateAligned<float>(size);
    if (!memory) throw std::bad_alloc();
    capacity = size;
  }
  return memory.get();
}

// Whether p and q may be so alike that rounding matters. Up to 8, T^2 times the rounding of a probability is below
// 1e-5.
bool is_almost_equal(Form form, float temperature) { return form != Form::kCrossEntropy && temperature > 8.0f; }

const char* refuse(const Call& call) {
  const auto in = [&call](Input input) { return call.inputs[input].given(); };
  const auto out = [&call](Output output) { return call.outputs[output].given(); };
  const bool has_hard = in(kLabels) || in(kLabelProbs);
  if (in(kLabels) && in(kLabelProbs)) return "it takes labels or label_probs, not both";
  if (!in(kTeacher) && !has_hard) return "it needs teacher, labels or label_probs";
  if (in(kTeacher) && !in(kTemperature)) return "teacher needs temperature";
  if (!in(kTeacher) && (in(kSoftWeight) || out(kSoft))) return "soft_weight and soft need teacher";
  if (!has_hard && (in(kHardWeight) || out(kHard))) return "hard_weight and hard need labels or label_probs";
  if (out(kGradStudent) && !in(kSoftWeight) && !in(kHardWeight)) {
    return "grad_student needs soft_weight or hard_weight";
  }
  if (in(kTeacher)) {
    if (const char* why = refuse_temperature(call.number(kTemperature))) return why;
  }
  const double beta = call.attributes[kBeta];
  if (call.choice(kForm) == static_cast<int>(Form::kJsd) && !(beta > 0 && beta < 1)) {
    return "beta of jsd must lie between 0 and 1";
  }
  return nullptr;
}

void run(const Call& call) {
  const auto in = [&call](Input input) { return call.inputs[input]; };
  const auto out = [&call](Output output) { return call.outputs[output]; };
  Problem problem{};
  problem.dtype = call.dtype;
  problem.rows = static_cast<size_t>(in(kStudent).length(0));
  problem.classes = problem.row_entries = static_cast<size_t>(in(kStudent).length(1));
  problem.form = static_cast<Form>(call.choice(kForm));
  problem.student = in(kStudent).data;
  problem.soft = out(kSoft).as<float>();
  problem.hard = out(kHard).as<float>();
  problem.gradient = out(kGradStudent).data;
  if (problem.gradient != nullptr) {
    problem.soft_weight = in(kSoftWeight).as<const float>();
    problem.hard_weight = in(kHardWeight).as<const float>();
  }
  // A part that nobody asks for is not read.
  if (problem.soft != nullptr || problem.soft_weight != nullptr) problem.teacher = in(kTeacher).data;
  if (problem.hard != nullptr || problem.hard_weight != nullptr) {
    problem.labels = in(kLabels).as<const std::int64_t>();
    problem.label_probs = in(kLabelProbs).data;
  }
  problem.student_scale = problem.teacher_scale = 1.0f;
  if (problem.teacher != nullptr) {
    problem.teacher_scale = 1.0f / call.number(kTemperature);
    if (call.attributes[kSoftenStudent] != 0) problem.student_scale = problem.teacher_scale;
  }
  problem.beta = static_cast<float>(call.attributes[kBeta]);
  problem.almost_equal = problem.teacher != nullptr && call.attributes[kSoftenStudent] != 0 &&
                         is_almost_equal(problem.form, call.number(kTemperature));
  problem.separate_hard =
      problem.student_scale != 1.0f && (problem.labels != nullptr || problem.label_probs != nullptr);
  const size_t entries = problem.rows * problem.classes;
  problem.stream_gradient = problem.gradient != nullptr && is_streamed(entries, call.dtype);

  const size_t size = scratch_size(problem);
  for_rows(call, problem.rows, entries, [&](size_t first, size_t last) {
    HWY_DYNAMIC_DISPATCH(SoftTargetRows)(problem, first, last, thread_memory(size));
  });
}

const bool registered = add({
    "soft_target",
    {{"student", "batch classes", Role::kTensor},
     {"teacher", "batch classes", Role::kTensor, kOptional},
     {"temperature", "", Role::kNumber, kOptional},
     {"soft_weight", "batch", Role::kFloat32, kOptional},
     {"labels", "batch", Role::kIndex, kOptional},
     {"label_probs", "batch classes", Role::kTensor, kOptional},
     {"hard_weight", "batch", Role::kFloat32, kOptional}},
    {{"soft", "batch", Role::kFloat32},
     {"hard", "batch", Role::kFloat32},
     {"grad_student", "batch classes", Role::kTensor}},
    {{"form", 0, {"cross_entropy", "kl", "reverse_kl", "symmetric_kl", "jsd"}}, {"soften_student", 1}, {"beta", 0.5}},
    kFloatAndHalves,
    refuse,
    run,
});

// ---- Scores of rows ------------------------------------------------------------------------------

const char* refuse_scores(const Call& call) {
  const auto in = [&call](ScoreInput input) { return call.inputs[input]; };
  const auto out = [&call](ScoreOutput output) { return call.outputs[output].given(); };
  if (out(kSoftScore) && !in(kScoreTemperature).given()) return "soft needs temperature";
  if (in(kScoreTemperature).given()) {
    if (const char* why = refuse_temperature(call.number(kScoreTemperature))) return why;
  }
  if ((out(kTeacherNll) || out(kStudentNll)) && !in(kScoreLabels).given()) {
    return "teacher_nll and student_nll need labels";
  }
  const double codes = call.attributes[kCodes], classes = call.attributes[kClasses];
  if (codes != 0 && codes != 1) return "codes is 0 or 1";
  if (codes == 1 && call.dtype != PYKD_BFLOAT16) return "codes are 16-bit words, given as bfloat16";
  const double most = static_cast<double>(in(kScoreStudent).length(1)) - (codes == 1 ? kCodesBegin : 0);
  if (!(classes >= codes && classes <= most) || classes != std::floor(classes)) {
    return "classes is how many are compared, of those that a row has";
  }
  return nullptr;
}

void run_scores(const Call& call) {
  const auto in = [&call](ScoreInput input) { return call.inputs[input]; };
  const auto out = [&call](ScoreOutput output) { return call.outputs[output]; };
  Problem problem{};
  problem.dtype = call.dtype;
  problem.rows = static_cast<size_t>(in(kScoreStudent).length(0));
  problem.row_entries = static_cast<size_t>(in(kScoreStudent).length(1));
  problem.classes = static_cast<size_t>(call.attributes[kClasses]);
  if (problem.classes == 0) problem.classes = problem.row_entries;
  problem.form = static_cast<Form>(call.choice(kScoreForm));
  problem.student = in(kScoreStudent).data;
  problem.soft = out(kSoftScore).as<float>();
  problem.student_scale = problem.teacher_scale = 1.0f;
  problem.beta = 0.5f;
  RowScores scores{};
  scores.teacher = in(kScoreTeacher).data;
  scores.labels = in(kScoreLabels).as<const std::int64_t>();
  scores.teacher_class = out(kTeacherClass).as<std::int64_t>();
  scores.student_class = out(kStudentClass).as<std::int64_t>();
  scores.teacher_class_rank = out(kTeacherClassRank).as<std::int64_t>();
  scores.teacher_class_nll = out(kTeacherClassNll).as<float>();
  scores.student_class_nll = out(kStudentClassNll).as<float>();
  scores.teacher_nll = out(kTeacherNll).as<float>();
  scores.student_nll = out(kStudentNll).as<float>();
  if (problem.soft != nullptr) {
    const float temperature = call.number(kScoreTemperature);
    problem.teacher = scores.teacher;
    problem.student_scale = problem.teacher_scale = 1.0f / temperature;
    problem.almost_equal = is_almost_equal(problem.form, temperature);
    problem.separate_hard = problem.student_scale != 1.0f && scores.wanted();
  }
  const bool codes = call.attributes[kCodes] != 0;
  const size_t size = scratch_size(problem);
  for_rows(call, problem.rows, problem.rows * problem.classes, [&](size_t first, size_t last) {
    HWY_DYNAMIC_DISPATCH(ScoreRows)(problem, scores, codes, first, last, thread_memory(size));
  });
}

const bool scores_registered = add_unlisted({
    "row_scores",
    {{"student", "batch entries", Role::kTensor},
     {"teacher", "batch entries", Role::kTensor},
     {"temperature", "", Role::kNumber, kOptional},
     {"labels", "batch", Role::kIndex, kOptional}},
    {{"soft", "batch", Role::kFloat32},
     {"teacher_class", "batch", Role::kIndex},
     {"student_class", "batch", Role::kIndex},
     {"teacher_class_rank", "batch", Role::kIndex},
     {"teacher_class_nll", "batch", Role::kFloat32},
     {"student_class_nll", "batch", Role::kFloat32},
     {"teacher_nll", "batch", Role::kFloat32},
     {"student_nll", "batch", Role::kFloat32}},
    {{"form", 1, {"cross_entropy", "kl", "reverse_kl", "symmetric_kl", "jsd"}}, {"codes", 0}, {"classes", 0}},
    kFloatAndHalves,
    refuse_scores,
    run_scores,
});

}  // namespace
}  // namespace pykd::kernels::soft_target

#endif  // HWY_ONCE
