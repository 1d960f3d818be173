// File: kernels/top_k/top_k.h
//
// The kernel "top_k": losses of a student of whose classes the teacher knows k, with the gradient for the student's
// logits, in one call. A form is what it makes of the k entries; the passes over the classes are the same for all.
//
// Per row b, with s the student's logits, t the teacher's values, id the classes of the entries, T the temperature,
// q = softmax(s / T), p_i = exp(t_i), sums over the entries i (or pairs of them) that are there:
//
//     value[b]  tail              sum p log(p / q_id) + p* log(p* / q*), p* = 1 - sum p, q* = q of all others
//               ghost             the same with p* and q* of at least 1e-8
//               renormalized      KL(softmax(t / T) || softmax(s_id / T)), both on the entries alone
//               zero              sum p log(p / q_id) with p = softmax(t / T)
//               unnormalized      sum p log(p / q_id)
//               sampled           sum r log q_id, where r = log q_id - t is a constant
//               pairwise_hinge    sum max(0, p_i - p_j - (q_i - q_j)) over the pairs with t_i > t_j
//               constant_hinge    the same with `margin` for p_i - p_j
//               logistic          sum log(1 + exp((s_j - s_i) / T)) over these pairs
//     grad_student[b, j]   weight[b] d value[b] / d s_j, rounded once
//
// There is no factor T^2, and no mean over rows: both are part of the weights. With `average` samples the forms on
// pairs are divided by the number of pairs of their row, where it has some.
//
//  - An entry with t = -inf is not there, and its id counts for nothing (sampled: every entry is there). An id outside
//    the classes gives the value NaN, and a gradient of NaN where the row's weight is not 0. A class that is there
//    twice counts twice, and is one class where the others are summed up.
//  - Logits of -inf are classes that are masked out. tail is +inf where q* is 0 and p* is not: from 1e-5 on, since less
//    is the rounding of p. In logistic two classes that are masked out are as good as each other, and get no gradient
//    of their pair. All but unnormalized and sampled are at least 0.
//  - A row with NaN among its entries has the value NaN, and its gradient is NaN, too; so has one without entries in
//    renormalized and zero, and one with NaN among its logits in the forms that look at all of them (not renormalized
//    and logistic).
//  - A weight of 0 takes nothing from its value: the gradient of a row whose weight is 0 (or left out) is exactly 0,
//    even where the value is NaN.
//
// Accuracy: exponentials of the classes that no entry names are float32, summed in float32 within 64 vectors and in
// double beyond, relative to the largest of their own, so that q* is as exact where it is small; entries are double.
// The pairs of a row are float32, summed up in double over i.
//
// Determinism: a row is computed by one thread in one way; the same bits for every number of threads. Different SIMD
// targets differ in rounding.
//
// Memory: one float32 per class and task, kept for the next call (kernels/host/memory.h), as many numbers of 4 bytes,
// and some 80 bytes per entry.
//
// How: a row is read from memory once, for its largest logit. What it leaves in scratch memory loses the entries, and
// becomes exponentials; these times one number are the gradient, to which the entries' own are written in the end.
#ifndef PYKD_KERNELS_TOP_K_TOP_K_H_
#define PYKD_KERNELS_TOP_K_TOP_K_H_

namespace pykd::kernels::top_k {

// The places of a Call's arguments, in the order of the description.
enum Input { kStudent, kTeacher, kIds, kTemperature, kWeight };
enum Output { kValue, kGradStudent };
enum AttributeIndex { kForm, kAverage, kMargin };
enum class Form {
  kTail,
  kGhost,
  kRenormalized,
  kZero,
  kUnnormalized,
  kSampled,
  kPairwiseHinge,
  kConstantHinge,
  kLogistic
};
enum class Average { kPairs, kSamples };

}  // namespace pykd::kernels::top_k

#endif  // PYKD_KERNELS_TOP_K_TOP_K_H_
