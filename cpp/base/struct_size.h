// File: base/struct_size.h
//
// Structs of the C interface that may grow: their first field is their size, as the caller's header
// has it.
#ifndef PYKD_BASE_STRUCT_SIZE_H_
#define PYKD_BASE_STRUCT_SIZE_H_

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>

#include "base/error.h"

namespace pykd::internal {

// `given` is the struct_size that a caller set, whose header may be older or newer than this library's; `ours` is the
// library's, and `first` the one that the struct had when it was introduced.
inline void check_struct_size(std::size_t given, std::size_t first, std::size_t ours, const std::string& what,
                              const char* init) {
  constexpr std::size_t kMaxSize = 4096;
  const bool whole = given % alignof(std::size_t) == 0;  // as the size of a struct that holds one is
  if (whole && given >= first && given <= kMaxSize) return;
  fail(PYKD_INVALID_VALUE, what + " of " + std::to_string(ours) + " bytes, as struct_size tells", std::to_string(given),
       std::string("start from ") + init);
}

// A copy of `given`. What an older caller lacks keeps the value of `defaults`; a field that only a newer one has must
// not be set.
template <class Struct>
Struct copy_sized(const Struct& given, const Struct& defaults, std::size_t first_size, const std::string& what,
                  const char* init) {
  constexpr std::size_t kOurSize = sizeof(Struct);
  const std::size_t size = given.struct_size;
  check_struct_size(size, first_size, kOurSize, what, init);
  const auto* bytes = reinterpret_cast<const unsigned char*>(&given);
  for (std::size_t i = kOurSize; i < size; ++i) {
    if (bytes[i] == 0) continue;  // NOLINT(clang-analyzer-core.UndefinedBinaryOperatorResult): the caller has so many
    fail(PYKD_INVALID_VALUE, what + " that this library knows", "a newer one that is set",
         "use the libpykd that belongs to the header");
  }
  Struct copy = defaults;
  std::memcpy(&copy, &given, std::min(size, kOurSize));
  return copy;
}

// Fills in the struct that a caller asks for: those of the fields that it has.
template <class Struct>
void write_sized(Struct value, Struct& given, std::size_t first_size, const std::string& what, const char* init) {
  check_struct_size(given.struct_size, first_size, sizeof(Struct), what, init);
  value.struct_size = given.struct_size;
  std::memcpy(&given, &value, std::min(given.struct_size, sizeof(Struct)));
}

}  // namespace pykd::internal

#endif  // PYKD_BASE_STRUCT_SIZE_H_
