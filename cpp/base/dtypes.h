// File: base/dtypes.h
//
// The element types of tensors: their names, sizes and sets.
#ifndef PYKD_BASE_DTYPES_H_
#define PYKD_BASE_DTYPES_H_

#include <cstddef>
#include <cstdint>

#include "pykd/pykd.h"

namespace pykd::internal {

constexpr pykd_dtype kDtypes[] = {PYKD_FLOAT16, PYKD_BFLOAT16, PYKD_FLOAT32, PYKD_FLOAT64, PYKD_INT64};

// Sets of them, as in pykd_tensor_info::dtypes.
constexpr std::uint32_t dtype_bit(pykd_dtype dtype) { return 1u << static_cast<unsigned>(dtype); }
constexpr std::uint32_t kAnyFloat =
    dtype_bit(PYKD_FLOAT16) | dtype_bit(PYKD_BFLOAT16) | dtype_bit(PYKD_FLOAT32) | dtype_bit(PYKD_FLOAT64);

// "float32" and the like; `dtype` is one of the enumeration.
constexpr const char* dtype_name(pykd_dtype dtype) {
  switch (dtype) {
    case PYKD_FLOAT16:
      return "float16";
    case PYKD_BFLOAT16:
      return "bfloat16";
    case PYKD_FLOAT32:
      return "float32";
    case PYKD_FLOAT64:
      return "float64";
    case PYKD_INT64:
      return "int64";
  }
  return "";  // not reached: what callers give is checked before
}

// Bytes of one element.
constexpr std::size_t dtype_size(pykd_dtype dtype) {
  if (dtype == PYKD_FLOAT16 || dtype == PYKD_BFLOAT16) return 2;
  return dtype == PYKD_FLOAT32 ? 4 : 8;
}

}  // namespace pykd::internal

#endif  // PYKD_BASE_DTYPES_H_
