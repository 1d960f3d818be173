// File: tests/half_numbers.h
//
// The 16-bit formats, one number at a time, by Eigen: rounded to nearest, ties to even.
#ifndef PYKD_TESTS_HALF_NUMBERS_H_
#define PYKD_TESTS_HALF_NUMBERS_H_

#include <Eigen/Core>
#include <cstdint>

#include "pykd/pykd.h"

namespace pykd::tests {

inline std::uint16_t to_half(float number) { return Eigen::numext::bit_cast<std::uint16_t>(Eigen::half(number)); }

inline float from_half(std::uint16_t bits) { return static_cast<float>(Eigen::numext::bit_cast<Eigen::half>(bits)); }

inline std::uint16_t to_bfloat16(float number) {
  return Eigen::numext::bit_cast<std::uint16_t>(Eigen::bfloat16(number));
}

inline float from_bfloat16(std::uint16_t bits) {
  return static_cast<float>(Eigen::numext::bit_cast<Eigen::bfloat16>(bits));
}

// The same by dtype: PYKD_FLOAT16 or PYKD_BFLOAT16.
inline std::uint16_t to_half(pykd_dtype dtype, float number) {
  return dtype == PYKD_FLOAT16 ? to_half(number) : to_bfloat16(number);
}

inline float from_half(pykd_dtype dtype, std::uint16_t bits) {
  return dtype == PYKD_FLOAT16 ? from_half(bits) : from_bfloat16(bits);
}

// The nearest number that the dtype has, float32 included.
inline float rounded(pykd_dtype dtype, float number) {
  return dtype == PYKD_FLOAT32 ? number : from_half(dtype, to_half(dtype, number));
}

}  // namespace pykd::tests

#endif  // PYKD_TESTS_HALF_NUMBERS_H_
