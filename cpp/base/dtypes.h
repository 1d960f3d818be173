// File: base/dtypes.h
//
// The element types of tensors: their names, sizes and sets.
#ifndef PYKD_BASE_DTYPES_H_
#define PYKD_BASE_DTYPES_H_

#include <cstddef>
#include <cstdint>

#include "pykd/pykd.h"

namespace pykd::internal {

// Those that losses and kernels have, and all: the inputs of models have others, too.
constexpr pykd_dtype kDtypes[] = {PYKD_FLOAT16, PYKD_BFLOAT16, PYKD_FLOAT32, PYKD_FLOAT64, PYKD_INT64};
constexpr pykd_dtype kAllDtypes[] = {PYKD_FLOAT16, PYKD_BFLOAT16, PYKD_FLOAT32, PYKD_FLOAT64, PYKD_INT64,
                                     PYKD_INT8,    PYKD_UINT8,    PYKD_INT16,   PYKD_UINT16,  PYKD_INT32,
                                     PYKD_UINT32,  PYKD_UINT64,   PYKD_BOOL};

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
    case PYKD_INT8:
      return "int8";
    case PYKD_UINT8:
      return "uint8";
    case PYKD_INT16:
      return "int16";
    case PYKD_UINT16:
      return "uint16";
    case PYKD_INT32:
      return "int32";
    case PYKD_UINT32:
      return "uint32";
    case PYKD_UINT64:
      return "uint64";
    case PYKD_BOOL:
      return "bool";
  }
  return "";  // not reached: what callers give is checked before
}

// Bytes of one element.
constexpr std::size_t dtype_size(pykd_dtype dtype) {
  switch (dtype) {
    case PYKD_INT8:
    case PYKD_UINT8:
    case PYKD_BOOL:
      return 1;
    case PYKD_FLOAT16:
    case PYKD_BFLOAT16:
    case PYKD_INT16:
    case PYKD_UINT16:
      return 2;
    case PYKD_FLOAT32:
    case PYKD_INT32:
    case PYKD_UINT32:
      return 4;
    case PYKD_FLOAT64:
    case PYKD_INT64:
    case PYKD_UINT64:
      break;
  }
  return 8;
}

}  // namespace pykd::internal

#endif  // PYKD_BASE_DTYPES_H_
