// File: base/tensor.h
//
// What can be said and checked of one pykd_tensor without knowing what it is for. The losses
// (runtime/signature/) and the kernels (kernels/c_interface/) share it, so that both say it in the same
// words.
//
// In C an enumeration may hold any number, and C++ must not read it as the enumeration before it is
// known to be one of its values: that is what raw() is for.
#ifndef PYKD_BASE_TENSOR_H_
#define PYKD_BASE_TENSOR_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "base/device.h"
#include "base/dtypes.h"
#include "base/error.h"
#include "pykd/pykd.h"

namespace pykd::internal {

constexpr std::size_t kMaxRank = 8;

// ---- Words --------------------------------------------------------------------------------------

// "float16 or float32"; the set is not empty.
std::string dtypes_text(std::uint32_t dtypes);
// The same for what a caller gave, which may be no value of the enumeration.
std::string given_dtype(const pykd_tensor& tensor);
std::string given_device(const pykd_tensor& tensor);
// "[2, 3]"; of the first eight.
std::string shape_text(const std::int64_t* shape, std::int32_t rank);
// "a, b, c".
std::string join(const std::vector<std::string>& words);

// The names of tensors, parameters or kernels, for such a message.
template <class Items>
std::vector<std::string> names_of(const Items& items) {
  std::vector<std::string> names;
  names.reserve(items.size());
  for (const auto& item : items) names.emplace_back(item.name);
  return names;
}

// ---- Values -------------------------------------------------------------------------------------

template <class Enumeration>
int raw(const Enumeration& field) {
  static_assert(sizeof(Enumeration) == sizeof(int));
  int value;
  std::memcpy(&value, &field, sizeof value);
  return value;
}

inline bool is_dtype(const pykd_dtype& dtype) { return raw(dtype) >= PYKD_FLOAT16 && raw(dtype) <= PYKD_BOOL; }

// ---- Checks: each throws a Failure that names the tensor ----------------------------------------

// Bytes of a tensor whose lengths are all at least 1.
std::size_t check_size(std::string_view name, const pykd_tensor& tensor);
// Contiguity in the sense of pykd.h: the step along an axis of length 1 is never taken. The size
// has been checked.
void check_strides(std::string_view name, const pykd_tensor& tensor);
// Where the data lie: somewhere, and where the processor may read elements of that dtype.
void check_data(std::string_view name, const pykd_tensor& tensor);
PYKD_API void check_alignment(std::string_view name, const void* data, pykd_dtype dtype);
// Where the lengths and steps lie, before any of them is read. A rank of 0 or below has none.
void check_axes_pointers(std::string_view name, const pykd_tensor& tensor);

// A setting of a loss whose tensors have that dtype: 0, or a number of full precision where it is computed, in float32
// or float64. What is smaller has lost digits, and its reciprocal may be infinite.
void check_number(const std::string& name, double value, pykd_dtype tensors);

// The memory of a tensor.
struct Extent {
  std::string_view name;
  std::uintptr_t begin;
  std::size_t bytes;
};

inline Extent extent_of(std::string_view name, const pykd_tensor& tensor) {
  return {name, reinterpret_cast<std::uintptr_t>(tensor.data), check_size(name, tensor)};
}

// One output may be written before every input has been read.
void check_no_overlap(const Extent& written, const Extent& other);

// pykd_tensor::extension is for later versions.
void check_extension(const pykd_tensor& tensor);

// ---- Checks of lists of named things ------------------------------------------------------------

[[noreturn]] void given_twice(const char* name);
// `what` is "an input"; `owner` is whose names they are.
[[noreturn]] void unknown_name(const char* what, const char* name, const std::vector<std::string>& names,
                               const char* owner);

template <class Item>
void check_list(const Item* items, std::size_t count, const char* what) {
  if (items == nullptr && count != 0) {
    fail(PYKD_INVALID_VALUE, std::string("an array of ") + what, "NULL with a count of " + std::to_string(count),
         "pass the array or a count of 0");
  }
  for (std::size_t i = 0; i < count; ++i) {
    if (items[i].name == nullptr) {
      fail(PYKD_INVALID_VALUE, std::string("a name for every one of the ") + what, "NULL at index " + std::to_string(i),
           "set its name");
    }
    if constexpr (std::is_same_v<Item, pykd_tensor>) check_extension(items[i]);
  }
}

}  // namespace pykd::internal

#endif  // PYKD_BASE_TENSOR_H_
