// File: kernels/soft_target/soft_target_math.cuh
//
// The arithmetic of soft_target on a GPU: what a row's sums are, how partial sums are joined, and what each class adds
// to values and gradient. No memory accesses, no thread indices: those are in soft_target_kernels.cuh.
//
// Logarithms are to the base 2. A logit x enters as fma(x, log2(e) / T, -base), where base is the row's maximum times
// log2(e) / T, rounded: one instruction, and as accurate as a difference of logits, because what the rounding of the
// base does to one class it does to all, and the sum of the row takes it out again. That holds as long as every place
// uses the same base, so it is a product that no compiler may fuse with what follows.
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
  float student_scale = 0.0f;  // log2(e) / T, or log2(e)
  float teacher_scale = 0.0f;  // log2(e) / T
  float slope = 0.0f;          // d(s / T) / ds: 1 / T, or 1
};

inline Setting make_setting(Form form, bool soft, bool hard, float temperature, bool soften_student, float beta) {
  Setting setting;
  setting.form = form;
  setting.soft = soft;
  setting.hard = hard;
  setting.separate = hard && (!soft || (soften_student && temperature != 1.0f));
  setting.beta = beta;
  setting.teacher_scale = static_cast<float>(1.44269504088896341 / temperature);
  setting.student_scale = soften_student ? setting.teacher_scale : kLog2E;
  setting.slope = soften_student ? 1.0f / temperature : 1.0f;
  return setting;
}

// Whether the gradient needs the value of KL(q || p), or KL(q || m), first.
PYKD_GPU_AND_HOST bool slope_needs_sums(const Setting& setting) {
  return setting.soft && setting.form != Form::kCrossEntropy && setting.form != Form::kKl;
}

// ---- First pass: maxima and sums of exponentials -----------------------------------------------------

// What is subtracted from scaled logits with that maximum. Where all logits so far are -inf, their exponentials are to
// be 0, not NaN.
PYKD_GPU float base_of(float maximum, float scale) {
  return maximum == -gpu::infinity() ? 0.0f : gpu::product(maximum, scale);
}

// exp((x - maximum) scale), to the base 2
PYKD_GPU float relative_exp(float x, float scale, float base) { return gpu::exp2(gpu::fma(x, scale, -base)); }

// What sums relative to the maximum `old_maximum` are multiplied with to be relative to a base.
PYKD_GPU float rescaling(float old_maximum, float scale, float base) {
  return gpu::exp2(gpu::product(old_maximum, scale) - base);
}

template <int kLanes>
PYKD_GPU float greatest(const float (&x)[kLanes]) {
  float top = x[0];
  PYKD_GPU_UNROLL
  for (int i = 1; i < kLanes; ++i) top = gpu::max(top, x[i]);
  return top;
}

template <int kLanes>
PYKD_GPU float sum_of_exponentials(const float (&x)[kLanes], float scale, float maximum) {
  const float base = base_of(maximum, scale);
  float sum = relative_exp(x[0], scale, base);
  PYKD_GPU_UNROLL
  for (int i = 1; i < kLanes; ++i) sum += relative_exp(x[i], scale, base);
  return sum;
}

// Of the classes seen so far. The sums are relative to the bases of the maxima, and rescaled when these grow. NaN and
// +inf in a logit make its sum NaN, and with it everything that follows.
struct alignas(16) Statistics {
  float student_max = -gpu::infinity();
  float student_sum = 0.0f;  // of exp((s - max) / T), or exp(s - max)
  float plain_sum = 0.0f;    // of exp(s - max), where that is a second softmax
  float teacher_max = -gpu::infinity();
  float teacher_sum = 0.0f;
  float label_sum = 0.0f;  // of label_probs

  template <int kLanes>
  PYKD_GPU void add_student(const Setting& setting, const float (&s)[kLanes]) {
    const float top = greatest(s);
    if (top > student_max) {
      student_sum *= rescaling(student_max, setting.student_scale, base_of(top, setting.student_scale));
      plain_sum *= rescaling(student_max, kLog2E, base_of(top, kLog2E));
      student_max = top;
    }
    if (setting.soft) student_sum += sum_of_exponentials(s, setting.student_scale, student_max);
    if (setting.separate) plain_sum += sum_of_exponentials(s, kLog2E, student_max);
  }

  template <int kLanes>
  PYKD_GPU void add_teacher(const Setting& setting, const float (&t)[kLanes]) {
    const float top = greatest(t);
    if (top > teacher_max) {
      teacher_sum *= rescaling(teacher_max, setting.teacher_scale, base_of(top, setting.teacher_scale));
      teacher_max = top;
    }
    teacher_sum += sum_of_exponentials(t, setting.teacher_scale, teacher_max);
  }

  template <int kLanes>
  PYKD_GPU void add_label_probs(const float (&y)[kLanes]) {
    PYKD_GPU_UNROLL
    for (int i = 0; i < kLanes; ++i) label_sum += y[i];
  }

  // Adds the classes that `other` has seen. Two that are joined give the same bits whichever is which: so threads that
  // exchange theirs agree on the result.
  PYKD_GPU void merge(const Setting& setting, const Statistics& other) {
    const float student_top = gpu::max(student_max, other.student_max);
    const float teacher_top = gpu::max(teacher_max, other.teacher_max);
    student_sum =
        joined(student_sum, student_max, other.student_sum, other.student_max, student_top, setting.student_scale);
    plain_sum = joined(plain_sum, student_max, other.plain_sum, other.student_max, student_top, kLog2E);
    teacher_sum =
        joined(teacher_sum, teacher_max, other.teacher_sum, other.teacher_max, teacher_top, setting.teacher_scale);
    student_max = student_top;
    teacher_max = teacher_top;
    label_sum += other.label_sum;
  }

 private:
  static PYKD_GPU float joined(float sum, float maximum, float other_sum, float other_maximum, float top, float scale) {
    const float base = base_of(top, scale);
    return gpu::product(sum, rescaling(maximum, scale, base)) +
           gpu::product(other_sum, rescaling(other_maximum, scale, base));
  }
};

// ---- Second pass: values, and the gradient -----------------------------------------------------------

// Sums over the classes, to the base 2.
struct alignas(16) Sums {
  float p = 0.0f;     // of p (log p - log q); p (log p - log m) for jsd; -p log q for cross_entropy
  float q = 0.0f;     // of q (log q - log p); q (log q - log m) for jsd
  float hard = 0.0f;  // of -y log softmax(s)

  PYKD_GPU void merge(const Setting&, const Sums& other) {
    p += other.p;
    q += other.q;
    hard += other.hard;
  }
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

// One row, its statistics known.
struct Row {
  const Setting& setting;
  float student_base, plain_base, teacher_base;  // of scaled logits; -inf where all of the row are
  float log_student, log_plain, log_teacher;     // log2 of the sums
  float label_sum;
  float soft_factor, hard_factor;  // of the gradient; 0: adds exactly nothing
  float q_sum = 0.0f;              // Sums::q of the whole row, once it is known

  PYKD_GPU Row(const Setting& the_setting, const Statistics& statistics, float soft_weight, float hard_weight)
      : setting(the_setting),
        student_base(gpu::product(statistics.student_max, setting.student_scale)),
        plain_base(gpu::product(statistics.student_max, kLog2E)),
        teacher_base(gpu::product(statistics.teacher_max, setting.teacher_scale)),
        log_student(gpu::log2(statistics.student_sum)),
        log_plain(gpu::log2(setting.separate ? statistics.plain_sum : statistics.student_sum)),
        log_teacher(gpu::log2(statistics.teacher_sum)),
        label_sum(statistics.label_sum),
        soft_factor(setting.soft ? soft_weight * setting.slope : 0.0f),
        hard_factor(setting.hard ? hard_weight : 0.0f) {}

  PYKD_GPU float log_q(float s) const { return gpu::fma(s, setting.student_scale, -student_base) - log_student; }
  PYKD_GPU float log_p(float t) const { return gpu::fma(t, setting.teacher_scale, -teacher_base) - log_teacher; }
  PYKD_GPU float log_plain_q(float s) const { return gpu::fma(s, kLog2E, -plain_base) - log_plain; }

  // What a class of these probabilities (lp and lq are their logarithms) adds to the sums that the form uses.
  template <Form kForm>
  PYKD_GPU void add_soft(Sums& sums, float lp, float lq, float p, float q) const {
    if constexpr (kForm == Form::kCrossEntropy) add(sums.p, p, -lq);
    if constexpr (kForm == Form::kKl || kForm == Form::kSymmetricKl) add(sums.p, p, lp - lq);
    if constexpr (kForm == Form::kReverseKl || kForm == Form::kSymmetricKl) add(sums.q, q, lq - lp);
    if constexpr (kForm == Form::kJsd) {
      const float lm = log_mixture(lp, lq, setting.beta);
      add(sums.p, p, lp - lm);
      add(sums.q, q, lq - lm);
    }
  }
  // weight * x, or nothing where the weight is 0, whatever x is. (A branch: it becomes one predicated instruction.)
  static PYKD_GPU void add(float& sum, float weight, float x) {
    if (weight != 0.0f) sum = gpu::fma(weight, x, sum);
  }

  // d soft / d(s scaled)
  template <Form kForm>
  PYKD_GPU float soft_slope(float lp, float lq, float p, float q) const {
    if constexpr (kForm == Form::kReverseKl) return reverse_slope(lp, lq, q);
    if constexpr (kForm == Form::kSymmetricKl) return 0.5f * ((q - p) + reverse_slope(lp, lq, q));
    if constexpr (kForm == Form::kJsd) {
      const float share = 1.0f - setting.beta;
      const float slope = share * kLn2 * q * ((lq - log_mixture(lp, lq, setting.beta)) - q_sum);
      return q == 0.0f || share == 0.0f ? 0.0f : slope;
    }
    return q - p;
  }
  PYKD_GPU float reverse_slope(float lp, float lq, float q) const {
    return q == 0.0f ? 0.0f : kLn2 * q * ((lq - lp) - q_sum);
  }

  PYKD_GPU void add_hard(Sums& sums, float y, float s) const { add(sums.hard, y, -log_plain_q(s)); }
  // d hard / d s, where `target` is what the label says of this class.
  PYKD_GPU float hard_slope(float target, float target_sum, float s) const {
    return gpu::exp2(log_plain_q(s)) * target_sum - target;
  }

  PYKD_GPU float soft_value(const Sums& sums) const {
    switch (setting.form) {
      case Form::kCrossEntropy:
      case Form::kKl:
        return kLn2 * sums.p;
      case Form::kReverseKl:
        return kLn2 * sums.q;
      case Form::kSymmetricKl:
        return 0.5f * kLn2 * (sums.p + sums.q);
      case Form::kJsd: {
        const float share = 1.0f - setting.beta;
        return kLn2 * ((setting.beta == 0.0f ? 0.0f : setting.beta * sums.p) + (share == 0.0f ? 0.0f : share * sums.q));
      }
    }
    return gpu::nan();
  }
  PYKD_GPU float hard_value(const Sums& sums) const { return kLn2 * sums.hard; }
  PYKD_GPU float hard_value_at(float s) const { return -kLn2 * log_plain_q(s); }
};

}  // namespace pykd::kernels::soft_target

#endif  // PYKD_KERNELS_SOFT_TARGET_SOFT_TARGET_MATH_CUH_
