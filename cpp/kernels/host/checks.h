// File: kernels/host/checks.h
//
// Checks that several kernels make of a call.
#ifndef PYKD_KERNELS_HOST_CHECKS_H_
#define PYKD_KERNELS_HOST_CHECKS_H_

#include <cmath>
#include <limits>

namespace pykd::kernels {

// Why logits are not divided by this number; nullptr: they are.
inline const char* refuse_temperature(float number) {
  if (number >= std::numeric_limits<float>::min() && std::isfinite(number)) return nullptr;
  return "temperature must be a finite number of at least 1.2e-38 (what float32 holds in full precision)";
}

}  // namespace pykd::kernels

#endif  // PYKD_KERNELS_HOST_CHECKS_H_
