#include "base/tensor.h"

#include <cmath>
#include <limits>

namespace pykd::internal {

std::string dtypes_text(std::uint32_t dtypes) {
  std::vector<std::string> names;
  for (const pykd_dtype dtype : kAllDtypes) {
    if (dtypes & dtype_bit(dtype)) names.emplace_back(dtype_name(dtype));
  }
  std::string last = names.back();
  names.pop_back();
  return names.empty() ? last : join(names) + " or " + last;
}

std::string given_dtype(const pykd_tensor& tensor) {
  if (is_dtype(tensor.dtype)) return dtype_name(tensor.dtype);
  return "an unknown dtype (" + std::to_string(raw(tensor.dtype)) + ")";
}

std::string given_device(const pykd_tensor& tensor) {
  const int kind = raw(tensor.device);
  if (kind == PYKD_CPU || kind == PYKD_CUDA) return device_name({tensor.device, tensor.device_id});
  return "an unknown device (" + std::to_string(kind) + ")";
}

std::string shape_text(const std::int64_t* shape, std::int32_t rank) {
  std::string text = "[";
  for (std::int32_t i = 0; i < rank && i < static_cast<std::int32_t>(kMaxRank); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

std::string join(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

std::size_t check_size(std::string_view name, const pykd_tensor& tensor) {
  std::int64_t bytes = static_cast<std::int64_t>(dtype_size(tensor.dtype));
  for (std::int32_t axis = 0; axis < tensor.rank; ++axis) {
    if (__builtin_mul_overflow(bytes, tensor.shape[axis], &bytes)) {
      fail(PYKD_INVALID_VALUE, std::string(name) + " of a size that fits into memory",
           "shape " + shape_text(tensor.shape, tensor.rank), "check the shape");
    }
  }
  return static_cast<std::size_t>(bytes);
}

void check_strides(std::string_view name, const pykd_tensor& tensor) {
  if (tensor.strides == nullptr) return;
  std::int64_t step = 1;
  for (std::int32_t axis = tensor.rank - 1; axis >= 0; --axis) {
    if (tensor.shape[axis] != 1 && tensor.strides[axis] != step) {
      fail(
          PYKD_INVALID_VALUE, std::string(name) + " contiguous in memory, its last axis fastest",
          "strides " + shape_text(tensor.strides, tensor.rank) + " with shape " + shape_text(tensor.shape, tensor.rank),
          "copy it into contiguous memory first");
    }
    step *= tensor.shape[axis];  // check_size() has shown that this fits
  }
}

void check_data(std::string_view name, const pykd_tensor& tensor) {
  if (tensor.data == nullptr) {
    fail(PYKD_INVALID_VALUE, std::string(name) + " with a pointer to its data", "NULL",
         "set data to the first element");
  }
  check_alignment(name, tensor.data, tensor.dtype);
}

void check_alignment(std::string_view name, const void* data, pykd_dtype dtype) {
  const std::size_t alignment = dtype_size(dtype), over = reinterpret_cast<std::uintptr_t>(data) % alignment;
  if (over == 0) return;
  fail(PYKD_INVALID_VALUE,
       std::string(name) + " at an address that " + std::to_string(alignment) + " divides, as " + dtype_name(dtype) +
           " needs it",
       "an address " + std::to_string(over) + " beyond one", "copy it into memory of its own");
}

void check_axes_pointers(std::string_view name, const pykd_tensor& tensor) {
  if (tensor.rank <= 0) return;
  for (const std::int64_t* lengths : {tensor.shape, tensor.strides}) {
    if (reinterpret_cast<std::uintptr_t>(lengths) % alignof(std::int64_t) == 0) continue;
    fail(PYKD_INVALID_VALUE, std::string(name) + " with its shape and strides at addresses that 8 divides", "others",
         "keep them in arrays of int64_t");
  }
}

void check_extension(const pykd_tensor& tensor) {
  if (tensor.extension == nullptr) return;
  fail(PYKD_INVALID_VALUE, std::string("NULL for the extension of ") + tensor.name,
       "another pointer, which this library knows nothing of",
       "set every field of a pykd_tensor, or use the libpykd that belongs to the header");
}

void check_number(const std::string& name, double value, pykd_dtype tensors) {
  const bool wide = tensors == PYKD_FLOAT64;
  const double least = wide ? std::numeric_limits<double>::min() : double{std::numeric_limits<float>::min()};
  const double most = wide ? std::numeric_limits<double>::max() : double{std::numeric_limits<float>::max()};
  if (value == 0 || (std::fabs(value) >= least && std::fabs(value) <= most)) return;
  fail(PYKD_INVALID_VALUE,
       std::string("a number that ") + (wide ? "float64" : "float32") + " holds in full precision for " + name,
       number_text(value), "give 0, or a magnitude from " + number_text(least) + " to " + number_text(most));
}

void check_no_overlap(const Extent& written, const Extent& other) {
  if (written.begin < other.begin + other.bytes && other.begin < written.begin + written.bytes) {
    fail(PYKD_INVALID_VALUE, std::string(written.name) + " in memory of its own",
         "memory that " + std::string(other.name) + " uses, too", "give it a buffer of its own");
  }
}

void given_twice(const char* name) {
  fail(PYKD_INVALID_VALUE, std::string(name) + " once", "it twice", "give every name once");
}

void unknown_name(const char* what, const char* name, const std::vector<std::string>& names, const char* owner) {
  const std::string near = nearest(name, names);
  fail(
      PYKD_INVALID_VALUE, names.empty() ? std::string("no ") + what : std::string(what) + " among " + join(names),
      in_quotes(name),
      near.empty() ? std::string("use the names that the ") + owner + " has" : "did you mean " + in_quotes(near) + "?");
}

}  // namespace pykd::internal
