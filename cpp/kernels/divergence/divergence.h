// File: kernels/divergence/divergence.h
//
// The kernel "divergence": sums over the classes of a function of the teacher's and the student's probability, with the
// gradient for the student's logits, in one call. A form is that function; the skeleton around it is one.
//
// Per row b, with s and t the logits, T the temperature, p = softmax(t / T), q = softmax(s / T), H the entropy:
//
//     value[b]  skewed_kl          KL(p || alpha p + (1 - alpha) q)
//               skewed_reverse_kl  KL(q || alpha q + (1 - alpha) p)
//               total_variation    sum |p - q| / 2
//               alpha_beta         sum (alpha p^(alpha + beta) + beta q^(alpha + beta)) / ((alpha + beta) alpha beta)
//                                  - p^alpha q^beta / (alpha beta), alpha and beta above 0
//               balanced_kl        w KL(p || q) + v KL(q || p): w is emphasis where H(p) > H(q), v where H(q) > H(p);
//               else 1
//               adaptive_kl        h KL(p || q) + t KL(q || p): h is the share of sum |p - q| that the head has, t that
//               of the other classes, both 0 where p = q. The head is the likeliest classes of p that together reach
//               `head_mass`; the one with which they pass it is of the head (`boundary` head), or not, but for the
//               first
//     grad_student[b, j]   weight[b] d value[b] / d s_j, rounded once; w, v, h and t are constants
//
// There is no factor T^2, and no mean: both are part of the weights.
//
//  - Logits of -inf are classes that are masked out. One that both rule out adds 0. A probability below 2^-126 of the
//    largest one counts as 0 where it is a factor; its logarithm stays what it is, and so do its powers.
//  - A class with p = q exactly adds exactly 0 to the value and to the gradient, in every form. For total_variation p
//  and q are
//    equal that differ by less than 2^-48 of themselves.
//  - A row with NaN has the value NaN, and so has one without a class; its gradient is NaN, too. A
//    weight of 0 takes nothing from its value: the gradient of a row whose weight is 0 (or left out) is exactly 0, even
//    where the value is NaN.
//
// Accuracy: what a class adds is written as a term that is never negative, by log(q / p) and e^x - 1: the sum over p -
// q, which is 0, is part of it. So a divergence of two that are almost equal keeps its digits, and the rounding of the
// two sums that make probabilities of exponentials does not come into it but squared. Above T = 8 these sums are taken
// by how little they differ. Entries are float32, summed in float32 within 64 vectors and in double beyond.
//
// Determinism: a row is computed by one thread in one way; the same bits for every number of threads. Different SIMD
// targets differ in rounding.
//
// Memory: two float32 per class and task, three for balanced_kl and adaptive_kl (and 8 bytes for every class that may
// be the last of the head); kept for the next call (kernels/host/memory.h).
//
// How: a row is read from memory once, for its largest logits, and again from the cache: for the exponentials and their
// sums, for the terms and their slopes, and the gradient is a few multiplications per entry of what these left. The
// head is found by the masses of classes in bins, and sorting those of one bin.
#ifndef PYKD_KERNELS_DIVERGENCE_DIVERGENCE_H_
#define PYKD_KERNELS_DIVERGENCE_DIVERGENCE_H_

namespace pykd::kernels::divergence {

// The places of a Call's arguments, in the order of the description.
enum Input { kStudent, kTeacher, kTemperature, kEmphasis, kWeight };
enum Output { kValue, kGradStudent };
enum AttributeIndex { kForm, kAlpha, kBeta, kHeadMass, kBoundary };
enum class Form { kSkewedKl, kSkewedReverseKl, kTotalVariation, kAlphaBeta, kBalancedKl, kAdaptiveKl };
enum class Boundary { kHead, kTail };

}  // namespace pykd::kernels::divergence

#endif  // PYKD_KERNELS_DIVERGENCE_DIVERGENCE_H_
