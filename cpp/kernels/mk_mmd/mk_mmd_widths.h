// File: kernels/mk_mmd/mk_mmd_widths.h
//
// The bandwidths of mk_mmd, and what turns products of samples into exponents: on the CPU and on a GPU.
#ifndef PYKD_KERNELS_MK_MMD_MK_MMD_WIDTHS_H_
#define PYKD_KERNELS_MK_MMD_MK_MMD_WIDTHS_H_

#include "kernels/cuda/qualifiers.h"

namespace pykd::kernels::mmd {

// The places of a Call's arguments, in the order of the description.
enum Input { kStudent, kTeacher, kWeight };
enum Output { kValue, kGradStudent };
enum Bandwidth { kJoint, kPerBlock };

constexpr double kTiny = 1e-20;  // of a squared bandwidth: all samples coincide

// s2 of the three means.
struct Widths {
  double xx = 0.0, yy = 0.0, xy = 0.0;
  bool finite = false;  // all of them, and every distance in float32
};

// From the sums of the squared distances of n samples from their mean, the squared distance of the two means, and the
// largest of the former.
PYKD_GPU_AND_HOST Widths widths_of(int bandwidth, double n, double x_spread, double y_spread, double apart,
                                   double largest) {
  Widths widths;
  // Squared distances over all pairs of a set sum to 2 N times the squared distances from its mean.
  const double others = n > 1.0 ? n - 1.0 : 1.0;
  widths.xx = 2.0 * x_spread / others;
  widths.yy = 2.0 * y_spread / others;
  widths.xy = (x_spread + y_spread) / n + apart;
  if (bandwidth == kJoint) {
    widths.xx = widths.yy = widths.xy = (2.0 * (x_spread + y_spread) + n * apart) / (2.0 * n - 1.0);
  }
  constexpr double kLargest = 1e37;  // the largest distance is below 4 times this, and fits float32
  widths.finite = widths.xx + widths.yy + widths.xy < kLargest && largest + apart < kLargest;
  return widths;
}

// The exponent of base 2 of the widest kernel is -exponent_scale(s2) times the squared distance: it has 16 times s2.
PYKD_GPU_AND_HOST double exponent_scale(double width) {
  return 1.4426950408889634074 / (32.0 * (width > kTiny ? width : kTiny));
}

}  // namespace pykd::kernels::mmd

#endif  // PYKD_KERNELS_MK_MMD_MK_MMD_WIDTHS_H_
