// File: kernels/feature_distance/feature_distance.h
//
// Distance between the student's and the teacher's features, each token normalised along its channels, and the
// gradient through the normalisation. The definitions are pykd/losses/features/feature_l1.py, feature_l2.py and
// cosine_features.py:
//
//     value_b = mean over tokens of sum over channels of |x^ - y^| (l1) or (x^ - y^)^2 (l2),   x^ = x / |x|;
//               cosine: 1 - x^ . y^, as half of l2, and 1/2 more for each of the two that has no direction
//     grad    = weight_b / (tokens |x|) (u - x^ (x^ . u)),   u = sign(x^ - y^), sign(0) = 0, or 2 (x^ - y^); half of it
//     for cosine
//
// A token whose norm is below any normal number of float32 (1.2e-38) keeps the direction 0, and its gradient is 0. A
// token with NaN or an infinity makes its value and its gradient NaN.
//
// How. A token is read from memory once: norms, distances and gradient take three passes over its channels, which stay
// in the cache. Each lane sums at most kRun channels in float32; beyond, sums run in float64. The gradient goes past
// the caches where it is larger than kStreamed bytes: nobody finds it there anyway.
//
// Memory: none; where a row of the batch is cut into several tasks (tokens x channels above kTask), one float64 for
// each.
//
// Threads: over batch x tokens; the same bits whatever their number, because what is summed together does not depend
// on it.
#ifndef PYKD_KERNELS_FEATURE_DISTANCE_FEATURE_DISTANCE_H_
#define PYKD_KERNELS_FEATURE_DISTANCE_FEATURE_DISTANCE_H_

#include "kernels/kernel.h"

namespace pykd::kernels {

// "feature_distance": student, teacher "batch tokens channels" (float32, float16, bfloat16), weight "batch" float32
// optional -> value "batch" float32, grad_student "batch tokens channels" (needs weight). Attribute power: l1, l2 or
// cosine.
void feature_distance(const Call& call);

}  // namespace pykd::kernels

#endif  // PYKD_KERNELS_FEATURE_DISTANCE_FEATURE_DISTANCE_H_
