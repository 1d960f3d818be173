// File: kernels/soft_target/soft_target.h
//
// The kernel "soft_target": how far a student's class probabilities are from a teacher's, and from the labels, with
// the gradient for the student's logits, in one call.
//
// Per row b, with s and t the logits, T the temperature, p = softmax(t / T), q = softmax(s / T), or softmax(s) where
// soften_student is 0:
//
//     soft[b]   cross_entropy   -sum p log q
//               kl              KL(p || q) = sum p (log p - log q)
//               reverse_kl      KL(q || p)
//               symmetric_kl    KL(p || q) / 2 + KL(q || p) / 2
//               jsd             beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
//     hard[b]   -log softmax(s)[labels[b]], or -sum y log softmax(s) with y = label_probs[b]; never softened
//     grad_student[b, j]   soft_weight[b] d soft[b] / d s_j + hard_weight[b] d hard[b] / d s_j, rounded once
//
// There is no factor T^2, and no mean: both are part of the weights.
//
//  - Logits of -inf are classes that are masked out. A term whose factor, a probability or an entry of label_probs, is
//    exactly 0 adds 0; p > 0 where q = 0 makes cross_entropy and kl +inf. A probability below 2^-126 of the largest
//    one counts as 0 (on CUDA: certainly one below 2^-134).
//  - A row with NaN has the value NaN, and so has one whose label is outside the classes. The gradient of a value that
//    is NaN, and has a weight that is not 0, is NaN.
//  - A weight of 0 takes nothing from its value: the gradient of a row whose weights are 0 (or left out) is exactly 0,
//    even where the values are NaN.
//
// Accuracy: entries are float32, summed in float32 within 1,024 classes and in double beyond. At temperatures above 8
// (soften_student, not cross_entropy) the rows are read twice, so that a divergence of two that are almost equal keeps
// its digits: T^2 times it is off by T roundings, not T^2.
//
// Determinism: a row is computed by one thread in one way; the same bits for every number of threads. Different SIMD
// targets differ in rounding.
//
// Memory: at most four float32 per class and working thread, kept by the thread for the next call (two for
// cross_entropy and kl without a separate hard softmax; none that grows with the classes where no gradient is wanted,
// except for jsd).
//
// How: each row is read once, in blocks of 1,024 classes that stay in the nearest cache. A block raises the row's
// maximum so far, takes the exponentials (once per entry and softmax) and adds to the row's sums, which are rescaled
// when the maximum has changed. Once the sums are known, the gradient is a few multiplications per entry of what the
// blocks left in scratch memory.
//
// "row_scores", of no loss and so in no list, says of each row what `pykd score` writes of it, in one pass over the
// logits of both sides where the temperature is 1:
//
//     soft[b]                as above, with beta = 1/2
//     teacher_class[b]       the class with the largest logit, the first of equal ones; student_class[b] likewise
//     teacher_class_rank[b]  the place of teacher_class in the student's order, from 1
//     teacher_class_nll[b]   -log softmax(t)[teacher_class]; student_class_nll[b] likewise: never softened
//     teacher_nll[b]         -log softmax(t)[labels[b]]; student_nll[b] likewise; NaN for a label outside the classes
//
// The first `classes` entries of a row are compared (0: all). With codes = 1 rows are those of base files of llama.cpp,
// words of 16 bits that are called bfloat16: scale and least as two float32, then codes; a log-probability is scale
// code
// + least. Classes of rows with NaN, and of rows whose largest logit is infinite, mean nothing; their numbers are NaN.
#ifndef PYKD_KERNELS_SOFT_TARGET_SOFT_TARGET_H_
#define PYKD_KERNELS_SOFT_TARGET_SOFT_TARGET_H_

namespace pykd::kernels::soft_target {

// The places of a Call's arguments, in the order of the description.
enum Input { kStudent, kTeacher, kTemperature, kSoftWeight, kLabels, kLabelProbs, kHardWeight };
enum Output { kSoft, kHard, kGradStudent };
enum AttributeIndex { kForm, kSoftenStudent, kBeta };
enum ScoreInput { kScoreStudent, kScoreTeacher, kScoreTemperature, kScoreLabels };
enum ScoreOutput {
  kSoftScore,
  kTeacherClass,
  kStudentClass,
  kTeacherClassRank,
  kTeacherClassNll,
  kStudentClassNll,
  kTeacherNll,
  kStudentNll
};
enum ScoreAttribute { kScoreForm, kCodes, kClasses };
enum class Form { kCrossEntropy, kKl, kReverseKl, kSymmetricKl, kJsd };

}  // namespace pykd::kernels::soft_target

#endif  // PYKD_KERNELS_SOFT_TARGET_SOFT_TARGET_H_
