// File: kernels/soft_target/soft_target_math.cuh
//
// The arithmetic of soft_target on a GPU: what a row's sums are, how partial sums are joined, and what values and
// gradient are made of them. No memory accesses, no thread indices: those are in soft_target_kernels.cuh.
//
// Logarithms are to the base 2. A logit x enters as fma(x, log2(e) / T, -base), where the base is a scaled logit of the
// row, rounded: one instruction, and as accurate as a difference of logits, because what the rounding of the base does
// to one class it does to all, and the sum of the row takes it out again. That holds as long as every place uses the
// same base, so it is a product that no compiler may fuse with what follows.
//
// One pass over the logits gives the sums Z of the exponentials and the values. With a and b the logits of student and
// teacher relative to their bases,
//
//     log q = a - log Zs,  log p = b - log Zt
//     KL(p || q) = sum 2^b (b - a) / Zt - log Zt + log Zs
//
// and likewise for KL(q || p) and the cross-entropy. JSD needs Z before its value: it takes a pass more.
#ifndef PYKD_KERNELS_SOFT_TARGET_SOFT_TARGET_MATH_CUH_
#define PYKD_KERNELS_SOFT_TARGET_SOFT_TARGET_MATH_CUH_

#include "kernels/cuda/gpu.cuh"
#include "kernels/soft_target/soft_target.h"

namespace pykd::kernels::soft_target {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// What holds for every row of a call.
struct Setting {
  Form form = Form::kCrossEntropy;
  bool soft = false;           // there is a teacher
  bool hard = false;           // there are labels or label_probs
  bool separate = false;       // softmax(s) is needed beside softmax(s / T)
  float beta = 0.5f;           // of jsd
  float entropy = 1.0f;        // 1: sum p log p is part of the value; 0: cross_entropy
  float student_scale = 0.0f;  // log2(e) / T, or log2(e)
  float teacher_scale = 0.0f;  // log2(e) / T
  float slope = 0.0f;          // d(s / T) / ds: 1 / T, or 1
};

inline Setting make_setting(Form form, bool soft, bool hard, float temperature, bool soften_student, float beta) {
  Setting setting;
  setting.form = form;
  setting.soft = soft;
  setting.hard = hard;
  setting.separate = soft && hard && soften_student && temperature != 1.0f;
  setting.beta = beta;
  setting.entropy = form == Form::kCrossEntropy ? 0.0f : 1.0f;
  setting.teacher_scale = static_cast<float>(1.44269504088896341 / temperature);
  setting.student_scale = soft && soften_student ? setting.teacher_scale : kLog2E;
  setting.slope = soften_student ? 1.0f / temperature : 1.0f;
  return setting;
}

// What a kernel is compiled for. `form`: kNoTeacher where labels are all there is; kKl stands for cross_entropy too.
// `general`: it can do label_probs, and a softmax for the labels beside the softened one.
constexpr int kNoTeacher = -1;
template <int form, bool general>
struct Kind {
  static constexpr bool kTeacher = form != kNoTeacher;
  static constexpr bool kSymmetric = form == static_cast<int>(Form::kSymmetricKl);
  static constexpr bool kReverse = form == static_cast<int>(Form::kReverseKl);
  static constexpr bool kMixture = form == static_cast<int>(Form::kJsd);
  static constexpr bool kForwardSum = form == static_cast<int>(Form::kKl) || kSymmetric;
  static constexpr bool kBackwardSum = kReverse || kSymmetric;
  static constexpr bool kGeneral = general;
};

// ---- First pass: sums of exponentials, and the values that need nothing else --------------------------

// Minus the base, before any class. Finite, so that what is masked out (-inf) counts as 0 relative to it, not as NaN.
constexpr float kNoOffset = 3.4028234e38f;
// How far a logit may rise above the base (as a power of 2) until that is raised. Logits rise seldom by so much.
constexpr float kRise = 8.0f;

// Of the classes seen so far; everything is relative to the bases, whose negatives are the offsets. NaN and +inf in a
// logit make its sum NaN, and with it everything that follows.
template <class K>
struct alignas(16) Statistics {
  float student_offset = kNoOffset;
  float student_sum = 0.0f;  // of 2^a
  float teacher_offset = kNoOffset;
  float teacher_sum = 0.0f;  // of 2^b
  float forward = 0.0f;      // of 2^b (b - a), or 2^b (-a)
  float backward = 0.0f;     // of 2^a (a - b)
  float plain_offset = kNoOffset;
  float plain_sum = 0.0f;  // of exp(s), where that is a second softmax
  float label_sum = 0.0f;  // of label_probs y
  float label_dot = 0.0f;  // of y (-log2 exp(s))

  // A chunk of classes. The tops are the largest entries of s and t (t: of no importance without a teacher).
  template <int kLanes>
  PYKD_GPU void add(const Setting& setting, float student_top, float teacher_top, const float (&s)[kLanes],
                    const float (&t)[kLanes]) {
    bool rises = gpu::fma(student_top, setting.student_scale, student_offset) > kRise;
    if constexpr (K::kTeacher) {
      rises |= gpu::fma(teacher_top, setting.teacher_scale, teacher_offset) > kRise;
      if constexpr (K::kGeneral) {
        rises |= setting.separate && gpu::fma(student_top, kLog2E, plain_offset) > kRise;
      }
    }
    if (rises) {
      rebase(setting, gpu::min(student_offset, -gpu::product(student_top, setting.student_scale)),
             gpu::min(teacher_offset, -gpu::product(teacher_top, setting.teacher_scale)),
             gpu::min(plain_offset, -gpu::product(student_top, kLog2E)));
    }
    PYKD_GPU_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      const float a = gpu::fma(s[i], setting.student_scale, student_offset);
      const float q = gpu::exp2(a);
      student_sum += q;
      if constexpr (K::kTeacher) {
        const float b = gpu::fma(t[i], setting.teacher_scale, teacher_offset);
        const float p = gpu::exp2(b);
        teacher_sum += p;
        if constexpr (K::kForwardSum) add_product(forward, p, gpu::fma(b, setting.entropy, -a));
        if constexpr (K::kBackwardSum) add_product(backward, q, a - b);
      }
    }
    if constexpr (K::kTeacher && K::kGeneral) {
      if (setting.separate) {
        PYKD_GPU_UNROLL
        for (int i = 0; i < kLanes; ++i) plain_sum += gpu::exp2(gpu::fma(s[i], kLog2E, plain_offset));
      }
    }
  }

  // The label_probs of a chunk that has been added.
  template <int kLanes>
  PYKD_GPU void add_labels(const Setting& setting, const float (&s)[kLanes], const float (&y)[kLanes]) {
    const float offset = setting.separate ? plain_offset : student_offset;
    PYKD_GPU_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      label_sum += y[i];
      add_product(label_dot, y[i], -gpu::fma(s[i], kLog2E, offset));
    }
  }

  // Adds the classes that `other` has seen. Two that are joined give the same bits whichever is which: so threads that
  // exchange theirs agree on the result.
  PYKD_GPU void merge(const Setting& setting, Statistics other) {
    const float student = gpu::min(student_offset, other.student_offset);
    const float teacher = gpu::min(teacher_offset, other.teacher_offset);
    const float plain = gpu::min(plain_offset, other.plain_offset);
    rebase(setting, student, teacher, plain);
    other.rebase(setting, student, teacher, plain);
    student_sum += other.student_sum;
    teacher_sum += other.teacher_sum;
    forward += other.forward;
    backward += other.backward;
    plain_sum += other.plain_sum;
    label_sum += other.label_sum;
    label_dot += other.label_dot;
  }

  // What the lane `lane ^ mask` has.
  PYKD_GPU Statistics exchanged(int mask) const {
    Statistics result;
    result.student_offset = gpu::shuffle_xor(student_offset, mask);
    result.student_sum = gpu::shuffle_xor(student_sum, mask);
    if constexpr (K::kTeacher) {
      result.teacher_offset = gpu::shuffle_xor(teacher_offset, mask);
      result.teacher_sum = gpu::shuffle_xor(teacher_sum, mask);
    }
    if constexpr (K::kForwardSum) result.forward = gpu::shuffle_xor(forward, mask);
    if constexpr (K::kBackwardSum) result.backward = gpu::shuffle_xor(backward, mask);
    if constexpr (K::kGeneral) {
      result.plain_offset = gpu::shuffle_xor(plain_offset, mask);
      result.plain_sum = gpu::shuffle_xor(plain_sum, mask);
      result.label_sum = gpu::shuffle_xor(label_sum, mask);
      result.label_dot = gpu::shuffle_xor(label_dot, mask);
    }
    return result;
  }

 private:
  // sum + weight * x, or sum where the weight is 0, whatever x is. (A branch: it becomes one predicated instruction.)
  static PYKD_GPU void add_product(float& sum, float weight, float x) {
    if (weight != 0.0f) sum = gpu::fma(weight, x, sum);
  }

  // Makes everything relative to the bases of these offsets, which are no greater than the present ones. What becomes 0
  // stays out of the values, even where they were infinite.
  PYKD_GPU void rebase(const Setting& setting, float student, float teacher, float plain) {
    const float a = student - student_offset, b = teacher - teacher_offset;
    const float of_q = gpu::exp2(a), of_p = gpu::exp2(b);
    if constexpr (K::kForwardSum) {
      const float shift = gpu::fma(setting.entropy, b, -a);
      forward = of_p == 0.0f ? 0.0f : gpu::product(of_p, gpu::fma(shift, teacher_sum, forward));
    }
    if constexpr (K::kBackwardSum) {
      backward = of_q == 0.0f ? 0.0f : gpu::product(of_q, gpu::fma(a - b, student_sum, backward));
    }
    if constexpr (K::kGeneral) {
      const float u = plain - plain_offset;
      label_dot = gpu::fma(-(setting.separate ? u : a), label_sum, label_dot);
      plain_sum = gpu::product(plain_sum, gpu::exp2(u));
      plain_offset = plain;
    }
    student_sum = gpu::product(student_sum, of_q);
    teacher_sum = gpu::product(teacher_sum, of_p);
    student_offset = student;
    teacher_offset = teacher;
  }
};

// ---- The pass between, of jsd --------------------------------------------------------------------------

// Sums over the classes, to the base 2.
struct alignas(16) Sums {
  float p = 0.0f;  // of p (log p - log m)
  float q = 0.0f;  // of q (log q - log m)

  PYKD_GPU void merge(const Setting&, const Sums& other) {
    p += other.p;
    q += other.q;
  }
  PYKD_GPU Sums exchanged(int mask) const { return gpu::shuffle_xor(*this, mask); }
};

// log2(beta 2^log_p + (1 - beta) 2^log_q), without leaving the range of floats; NaN where both are -inf. Exactly log_p
// where the two are equal and beta is 1/2.
PYKD_GPU float log_mixture(float log_p, float log_q, float beta) {
  const bool p_leads = log_p >= log_q;
  const float high = p_leads ? log_p : log_q;
  const float low = p_leads ? log_q : log_p;
  const float high_weight = p_leads ? beta : 1.0f - beta;
  const float low_weight = p_leads ? 1.0f - beta : beta;
  return high + gpu::log2_fast(high_weight + low_weight * gpu::exp2(low - high));
}

// ---- Values and gradient -------------------------------------------------------------------------------

// One row, its statistics known.
template <class K>
struct Row {
  const Setting& setting;
  Statistics<K> sums;
  Sums mixture;                    // once it is known
  float log_student, log_teacher;  // log2 of the sums
  float plain_offset, plain_sum;   // of the softmax that labels ask for
  float soft_factor, hard_factor;  // of the gradient; 0: adds exactly nothing
  float total = 1.0f;              // of the label's probabilities
  // Of the gradient: see soft_slope() and hard_slope().
  float scale = 0.0f, ratio = 0.0f, shift = 0.0f, curvature = 0.0f, plain_factor = 0.0f;

  PYKD_GPU Row(const Setting& the_setting, const Statistics<K>& statistics, float soft_weight, float hard_weight,
               bool label_probs)
      : setting(the_setting),
        sums(statistics),
        log_student(gpu::log2(sums.student_sum)),
        log_teacher(gpu::log2(sums.teacher_sum)),
        plain_offset(setting.separate ? sums.plain_offset : sums.student_offset),
        plain_sum(setting.separate ? sums.plain_sum : sums.student_sum),
        soft_factor(setting.soft ? soft_weight * setting.slope : 0.0f),
        hard_factor(setting.hard ? hard_weight : 0.0f) {
    if (label_probs) total = sums.label_sum;
  }

  PYKD_GPU float log_q(float s) const { return gpu::fma(s, setting.student_scale, sums.student_offset) - log_student; }
  PYKD_GPU float log_p(float t) const { return gpu::fma(t, setting.teacher_scale, sums.teacher_offset) - log_teacher; }
  PYKD_GPU float log_plain(float s) const { return gpu::fma(s, kLog2E, plain_offset); }

  // ---- Values ----

  // What a class adds to the sums of jsd.
  PYKD_GPU void add_mixture(Sums& of, float s, float t) const {
    const float lp = log_p(t), lq = log_q(s), p = gpu::exp2(lp), q = gpu::exp2(lq);
    const float lm = log_mixture(lp, lq, setting.beta);
    if (p != 0.0f) of.p = gpu::fma(p, lp - lm, of.p);
    if (q != 0.0f) of.q = gpu::fma(q, lq - lm, of.q);
  }

  PYKD_GPU float soft_value() const {
    if constexpr (K::kMixture) {
      const float share = 1.0f - setting.beta;
      return kLn2 *
             ((setting.beta == 0.0f ? 0.0f : setting.beta * mixture.p) + (share == 0.0f ? 0.0f : share * mixture.q));
    }
    float value = 0.0f;
    if constexpr (K::kForwardSum) {
      value = sums.forward / sums.teacher_sum + log_student - setting.entropy * log_teacher;
    }
    if constexpr (K::kBackwardSum) value += sums.backward / sums.student_sum + log_teacher - log_student;
    return (K::kSymmetric ? 0.5f * kLn2 : kLn2) * value;
  }
  // Of label_probs; and where the label is the class of logit s.
  PYKD_GPU float hard_value() const {
    return kLn2 * (sums.label_dot + (total != 0.0f ? total * gpu::log2(plain_sum) : 0.0f));
  }
  PYKD_GPU float hard_value_at(float s) const { return kLn2 * (gpu::log2(plain_sum) - log_plain(s)); }

  // ---- Gradient ----

  // To be called before the slopes. Where no second softmax is needed, the labels' is the student's own: its share of
  // the gradient becomes part of `ratio` or `shift`.
  PYKD_GPU void prepare_gradient() {
    const float hard = hard_factor == 0.0f ? 0.0f : hard_factor * total;
    const float beside = setting.separate ? 0.0f : hard;
    plain_factor = hard_factor == 0.0f ? 0.0f : hard / plain_sum;
    const float weight = K::kSymmetric ? 0.5f * soft_factor : soft_factor;
    const float quotient = sums.teacher_sum / sums.student_sum;
    if constexpr (K::kForwardSum) {  // 1 times `quotient` without labels: equal logits give exactly 0
      scale = weight / sums.teacher_sum;
      ratio = quotient * ((weight + beside) / weight);
    }
    if constexpr (K::kSymmetric) {
      shift = sums.backward / sums.student_sum;
      curvature = kLn2 * quotient;
    }
    if constexpr (K::kReverse) {
      scale = weight * kLn2 / sums.student_sum;
      shift = sums.backward / sums.student_sum - beside / (weight * kLn2);
    }
    if constexpr (K::kMixture) {
      scale = weight * (1.0f - setting.beta) * kLn2;
      shift = beside;
    }
  }

  // The soft part, for a factor that is not 0, and what the labels add to it through the same softmax.
  PYKD_GPU float soft_slope(float s, float t) const {
    if constexpr (K::kMixture) {
      const float lq = log_q(s), q = gpu::exp2(lq);
      const float slope = scale * q * ((lq - log_mixture(log_p(t), lq, setting.beta)) - mixture.q);
      const float own = q == 0.0f || scale == 0.0f ? 0.0f : slope;
      return gpu::fma(shift, q, own);
    } else {
      const float a = gpu::fma(s, setting.student_scale, sums.student_offset), q = gpu::exp2(a);
      const float b = gpu::fma(t, setting.teacher_scale, sums.teacher_offset);
      // A probability of 0 gives 0 times a factor: NaN where that is, in a row with NaN.
      if constexpr (K::kReverse) return scale * (q * (q == 0.0f ? 1.0f : (a - b) - shift));
      if constexpr (K::kSymmetric) {
        const float of_q = gpu::fma(curvature, (a - b) - shift, ratio);
        return scale * gpu::fma(q == 0.0f ? ratio : of_q, q, -gpu::exp2(b));
      }
      return scale * gpu::fma(ratio, q, -gpu::exp2(b));
    }
  }
  // The hard part by a softmax of its own, but for what the label says of this class.
  PYKD_GPU float hard_slope(float s) const { return plain_factor * gpu::exp2(log_plain(s)); }
};

}  // namespace pykd::kernels::soft_target

#endif  // PYKD_KERNELS_SOFT_TARGET_SOFT_TARGET_MATH_CUH_
