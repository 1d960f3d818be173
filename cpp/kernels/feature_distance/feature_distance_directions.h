// File: kernels/feature_distance/feature_distance_directions.h
//
// What feature_distance takes of a token's squared norms, on the CPU and on a GPU.
#ifndef PYKD_KERNELS_FEATURE_DISTANCE_FEATURE_DISTANCE_DIRECTIONS_H_
#define PYKD_KERNELS_FEATURE_DISTANCE_FEATURE_DISTANCE_DIRECTIONS_H_

#include <cmath>

#include "kernels/cuda/qualifiers.h"

namespace pykd::kernels::feature {

// The places of a Call's arguments, in the order of the description.
enum Input { kStudent, kTeacher, kWeight };
enum Output { kValue, kGradStudent };
enum Power { kL1, kL2, kCosine };  // kCosine: half of kL2, where both have directions

constexpr double kTiny = 0x1p-252;           // a token of a smaller squared norm has no direction: no normal number
constexpr double kSmall = 1e-24;             // a sum of squares below it may have lost some to float32's range
constexpr double kNormal = 0x1p-126;         // the smallest normal number of float32
constexpr double kLargest = 0x1.fffffep127;  // of float32

// Whether a sum of squares that was had in float32 lost nothing to its range.
PYKD_GPU_AND_HOST bool in_range(double squares) { return squares >= kSmall && squares <= kLargest; }
// What the entries are multiplied with for another sum where something was lost.
PYKD_GPU_AND_HOST float range_multiplier(double squares) { return squares < kSmall ? 0x1p90f : 0x1p-90f; }

// The directions x^ and y^ of a token's features: x^ is keep x scale, and x^ - y^ is (keep x - ratio y) scale. Where
// both norms agree, keep and ratio are one power of 2, so the difference of equal features is exactly 0, whether or not
// the compiler fuses products and sums. That power is 1, unless 1 / norm is no normal number of float32: then it leaves
// each factor one.
class Directions {
 public:
  PYKD_GPU_AND_HOST Directions(double x_squares, double y_squares)
      : x_(reciprocal(x_squares)), y_(reciprocal(y_squares)) {
    const double ratio = y_ / x_, least = x_ < y_ ? x_ : y_, most = x_ < y_ ? y_ : x_;
    const bool relative = x_ != 0 && !(ratio > 1e15 || ratio < 1e-15);  // NaN is passed on
    // Where there is no x^, or the norms lie farther apart than float32 reaches, keep and ratio are the scales
    // themselves.
    double frame = 1;
    if (relative && x_ < kNormal) frame = 0x1p-64;
    if (!relative && least < kNormal && most < 1e30) frame = 0x1p24;
    keep_ = static_cast<float>(relative ? frame : x_ * frame);
    ratio_ = static_cast<float>(relative ? ratio * frame : y_ * frame);
    scale_ = static_cast<float>(relative ? x_ / frame : 1 / frame);
  }

  PYKD_GPU_AND_HOST bool has_x() const { return x_ != 0; }
  PYKD_GPU_AND_HOST bool has_y() const { return y_ != 0; }
  PYKD_GPU_AND_HOST double x_reciprocal() const { return x_; }  // 1 / norm
  PYKD_GPU_AND_HOST float keep() const { return keep_; }
  PYKD_GPU_AND_HOST float ratio() const { return ratio_; }
  PYKD_GPU_AND_HOST float scale() const { return scale_; }

 private:
  // 1 / norm; 0 for a token that has no direction, NaN for one that is not finite.
  static PYKD_GPU_AND_HOST double reciprocal(double squares) {
    if (squares < kTiny) return 0;
    return squares < 1e300 ? 1 / std::sqrt(squares) : std::nan("");
  }

  double x_, y_;
  float keep_, ratio_, scale_;
};

// Whether no step of x changes x^: it has none, or a single channel, whose direction is a sign. `along` tells NaN.
PYKD_GPU_AND_HOST bool turns_nowhere(const Directions& directions, bool one_channel, double along) {
  return along == along && (one_channel || !directions.has_x());
}

// The distance of a token, from the sum over its channels. What has no direction has the cosine 0 with everything.
template <Power power>
PYKD_GPU_AND_HOST double distance_of(double sum, const Directions& directions) {
  if (power != kCosine) return sum;
  return 0.5 * (sum + (directions.has_x() ? 0 : 1) + (directions.has_y() ? 0 : 1));
}

}  // namespace pykd::kernels::feature

#endif  // PYKD_KERNELS_FEATURE_DISTANCE_FEATURE_DISTANCE_DIRECTIONS_H_
