// File: kernels/entry_distance/entry_distance.h
//
// The kernel "entry_distance": features that are compared entry by entry, as they are, with the gradient for the
// student's, in one call.
//
// Per row b, with r = student - teacher:
//
//     value[b]  mse        sum r^2
//               l1         sum |r|
//               smooth_l1  sum r^2 / (2 beta) where |r| < beta, and |r| - beta / 2 elsewhere
//     grad_student[b, i]   weight[b] d value[b] / d student[b, i], rounded once; that of l1 is 0 where r = 0
//
// With `average` mean both are divided by the number of entries. NaN and infinities come out as such. The gradient of a
// row whose weight is 0 (or left out) is exactly 0, even where the value is NaN.
//
// Accuracy: entries are float32, summed in float32 within 64 vectors and in double beyond.
//
// Determinism: rows are cut into parts whose sums are added up in their order, whatever the number of threads.
// Different SIMD targets differ in rounding.
//
// Memory: one double for every 32,768 entries.
#ifndef PYKD_KERNELS_ENTRY_DISTANCE_ENTRY_DISTANCE_H_
#define PYKD_KERNELS_ENTRY_DISTANCE_ENTRY_DISTANCE_H_

namespace pykd::kernels::entry_distance {

// The places of a Call's arguments, in the order of the description.
enum Input { kStudent, kTeacher, kWeight };
enum Output { kValue, kGradStudent };
enum AttributeIndex { kForm, kAverage, kBeta };
enum class Form { kMse, kL1, kSmoothL1 };
enum class Average { kMean, kSum };

}  // namespace pykd::kernels::entry_distance

#endif  // PYKD_KERNELS_ENTRY_DISTANCE_ENTRY_DISTANCE_H_
