// File: kernels/label_apart/label_apart.h
//
// The kernel "label_apart": divergences of soft targets that treat the label y apart from the other classes, with the
// gradient for the student's logits, in one call. A form is what both parts count, and what the teacher is made of.
//
// Per row b, with s and t the logits, T the temperature, p = softmax(t / T), q = softmax(s / T); p* and q* are p and q
// of the classes beside the label, which sum up to 1; KL2(a || b) is the divergence of (a, 1 - a) from (b, 1 - b):
//
//     value[b]  decoupled   target_weight KL2(p_y || q_y) + other_weight KL(p* || q*)
//               normalized  -p_y log q_y - other_weight sum p* log q*, with p_y and q_y at T = 1
//               corrected   KL(p' || q), p' = (1 - a) p + a [y]; a is such that the label leads p' by `threshold`, or,
//                           where it is the first largest class already, that it gains as much (raise_right; else 0)
//               uniform     KL(softmax(v / T) || q), v_y = label_probability, the other entries all alike and summing
//               up
//                           to the rest of 1; q = softmax(s) without soften_student. It takes no teacher.
//               decision    -log q_y, y = the first largest t, T = 1. It takes no labels.
//     grad_student[b, j]   weight[b] d value[b] / d s_j, rounded once
//
// There is no factor T^2, and no mean: both are part of the weights.
//
//  - Logits of -inf are classes that are masked out. One that both rule out adds 0; one that the student alone rules
//  out
//    makes the value infinite. Where the teacher has no class beside the label, p* adds nothing.
//  - A row with NaN has the value NaN, and so has one without a class, and one whose label is outside the classes; its
//    gradient is NaN, too. A part of weight 0 counts for nothing, even where it is infinite. A weight of 0 takes
//    nothing from its value: the gradient of a row whose weight is 0 (or left out) is exactly 0.
//
// Accuracy: the other classes are summed up without the label, relative to the largest of them, so that log(1 - q_y) is
// the logarithm of a sum and not of a difference; what is left of the label is one number, its score beside that sum,
// in double. Of the others it is as of the kernel divergence (kernels/divergence/divergence.h). Student and teacher
// that are equal give exactly 0 (decoupled).
//
// Determinism, memory (three float32 per class and task at most, four of uniform) and passes: those of the kernel
// divergence, taken over the classes before the label and over those after it.
#ifndef PYKD_KERNELS_LABEL_APART_LABEL_APART_H_
#define PYKD_KERNELS_LABEL_APART_LABEL_APART_H_

namespace pykd::kernels::label_apart {

// The places of a Call's arguments, in the order of the description.
enum Input { kStudent, kTeacher, kLabels, kTemperature, kTargetWeight, kOtherWeight, kWeight };
enum Output { kValue, kGradStudent };
enum AttributeIndex { kForm, kThreshold, kRaiseRight, kLabelProbability, kSoftenStudent };
enum class Form { kDecoupled, kNormalized, kCorrected, kUniform, kDecision };

}  // namespace pykd::kernels::label_apart

#endif  // PYKD_KERNELS_LABEL_APART_LABEL_APART_H_
