// File: struct_size.h
//
// Structs of the C interface that may grow: their first field is their size, as the caller's header
// has it.
#ifndef PYKD_SRC_STRUCT_SIZE_H_
#define PYKD_SRC_STRUCT_SIZE_H_

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>

#include "error.h"

namespace pykd::internal {

// A copy of `given`, which was written by a caller whose header may be older or newer than this
// library's. What an older one lacks keeps the value of `defaults`; a field that only a newer one
// has must not be set. `first_size` is the size that the struct had when it was introduced.
template <class Struct>
Struct copy_sized(const Struct& given, const Struct& defaults, std::size_t first_size, const std::string& what,
                  const char* init) {
  constexpr std::size_t kOurSize = sizeof(Struct), kMaxSize = 4096;
  const std::size_t size = given.struct_size;
  if (size < first_size || size > kMaxSize) {
    fail(PYKD_INVALID_VALUE, what + " of " + std::to_string(kOurSize) + " bytes, as struct_size tells",
         std::to_string(size), std::string("start from ") + init);
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(&given);
  if (size > kOurSize && std::any_of(bytes + kOurSize, bytes + size, [](unsigned char byte) { return byte != 0; })) {
    fail(PYKD_INVALID_VALUE, what + " that this library knows", "a newer one that is set",
         "use the libpykd that belongs to the header");
  }
  Struct copy = defaults;
  std::memcpy(&copy, &given, std::min(size, kOurSize));
  return copy;
}

}  // namespace pykd::internal

#endif  // PYKD_SRC_STRUCT_SIZE_H_
