// File: tests/half_numbers.h
//
// The 16-bit formats by Eigen, rounded to nearest, ties to even: one number at a time, and tensors as they lie in
// memory.
#ifndef PYKD_TESTS_HALF_NUMBERS_H_
#define PYKD_TESTS_HALF_NUMBERS_H_

#include <Eigen/Core>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/dtypes.h"
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

using Bytes = std::vector<unsigned char>;

inline Bytes encode(pykd_dtype dtype, const std::vector<float>& numbers) {
  const std::size_t size = internal::dtype_size(dtype);
  Bytes bytes(numbers.size() * size);
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    const std::uint16_t half = to_half(dtype, numbers[i]);
    const auto index = static_cast<std::int64_t>(numbers[i]);
    const void* from = dtype == PYKD_INT64 ? static_cast<const void*>(&index) : &numbers[i];
    std::memcpy(&bytes[i * size], size == 2 ? static_cast<const void*>(&half) : from, size);
  }
  return bytes;
}

inline std::vector<float> decode(pykd_dtype dtype, const Bytes& bytes) {
  const std::size_t size = internal::dtype_size(dtype);
  std::vector<float> numbers(bytes.size() / size);
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    std::uint16_t half;
    if (size == 2) {
      std::memcpy(&half, &bytes[i * size], size);
      numbers[i] = from_half(dtype, half);
    } else {
      std::memcpy(&numbers[i], &bytes[i * size], sizeof(float));
    }
  }
  return numbers;
}

}  // namespace pykd::tests

#endif  // PYKD_TESTS_HALF_NUMBERS_H_
