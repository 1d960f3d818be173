// File: tensor_file.h
//
// Named tensors in one small file, so that the examples can take data from Python (or hand results
// back) without a library. Python's side is pykd/demo/tensor_file.py. All numbers are
// little-endian:
//
//     8 bytes      "PYKDTNS1"
//     uint32       number of tensors; then for each of them
//       uint32       length of its name, 1 to 255
//       bytes        its name
//       uint32       dtype: 3 float32, 4 float64, 5 int64 (the values of pykd_dtype)
//       uint32       number of axes, at most 8
//       int64 ...    one length per axis
//       bytes        the elements, last axis fastest
//
// A file is not trusted: every length is compared with what is left of the file before it is used.
#ifndef PYKD_EXAMPLES_TENSOR_FILE_H_
#define PYKD_EXAMPLES_TENSOR_FILE_H_

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "pykd/pykd.hpp"

namespace examples {

// A tensor that owns its memory.
struct StoredTensor {
  pykd_dtype dtype = PYKD_FLOAT32;
  std::vector<std::int64_t> shape;
  std::vector<unsigned char> bytes;

  // A view for pykd. It lives as long as this tensor.
  pykd::Tensor view() const { return pykd::Tensor(const_cast<unsigned char*>(bytes.data()), dtype, shape); }

  // The elements, where T is what lies there: float, double or std::int64_t.
  template <class T>
  std::vector<T> as() const {
    if (dtype != pykd::internal::dtype_of<T>::value) {
      throw std::runtime_error("expected another element type than the file holds");
    }
    std::vector<T> elements(bytes.size() / sizeof(T));
    if (!bytes.empty()) std::memcpy(elements.data(), bytes.data(), bytes.size());
    return elements;
  }
};

using StoredTensors = std::map<std::string, StoredTensor>;

namespace internal {

constexpr char kMagic[9] = "PYKDTNS1";

// Bytes per element, or 0 for a dtype that these files do not know.
inline std::uint64_t element_size(std::uint32_t dtype) {
  return dtype == PYKD_FLOAT32 ? 4 : dtype == PYKD_FLOAT64 || dtype == PYKD_INT64 ? 8 : 0;
}

// Takes numbers from the front of a buffer and refuses to read past its end.
class Reader {
 public:
  Reader(std::string path, std::vector<unsigned char> bytes) : path_(std::move(path)), bytes_(std::move(bytes)) {}

  [[noreturn]] void fail(const std::string& why) const {
    throw std::runtime_error("expected \"" + path_ + "\" to be a file of named tensors, but " + why + " (byte " +
                             std::to_string(position_) + " of " + std::to_string(bytes_.size()) +
                             "); write it anew with `python -m pykd demo`");
  }
  const unsigned char* take(std::uint64_t count) {
    if (count > bytes_.size() - position_) fail("it ends too early");
    const unsigned char* start = bytes_.data() + position_;
    position_ += static_cast<std::size_t>(count);
    return start;
  }
  template <class T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof(T)), sizeof(T));
    return value;
  }
  bool at_end() const { return position_ == bytes_.size(); }
  std::uint64_t left() const { return bytes_.size() - position_; }

 private:
  std::string path_;
  std::vector<unsigned char> bytes_;
  std::size_t position_ = 0;
};

}  // namespace internal

// Reads all tensors of a file. Throws std::runtime_error that says what is wrong with it.
inline StoredTensors read_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("expected a file of named tensors at \"" + path +
                             "\", got nothing that can be read; `python -m pykd demo` writes one");
  }
  internal::Reader in(path, std::vector<unsigned char>(std::istreambuf_iterator<char>(file), {}));
  if (in.left() < 8 || std::memcmp(in.take(8), internal::kMagic, 8) != 0) {
    in.fail("it does not start with PYKDTNS1");
  }
  StoredTensors tensors;
  const auto count = in.number<std::uint32_t>();
  for (std::uint32_t i = 0; i < count; ++i) {
    const auto length = in.number<std::uint32_t>();
    if (length < 1 || length > 255) in.fail("a name has " + std::to_string(length) + " bytes");
    const std::string name(reinterpret_cast<const char*>(in.take(length)), length);

    StoredTensor tensor;
    const auto dtype = in.number<std::uint32_t>();
    const std::uint64_t size = internal::element_size(dtype);
    if (size == 0) in.fail("\"" + name + "\" has the unknown dtype " + std::to_string(dtype));
    tensor.dtype = static_cast<pykd_dtype>(dtype);

    const auto rank = in.number<std::uint32_t>();
    if (rank > 8) in.fail("\"" + name + "\" has " + std::to_string(rank) + " axes");
    std::uint64_t elements = 1;
    for (std::uint32_t axis = 0; axis < rank; ++axis) {
      const auto extent = in.number<std::int64_t>();
      if (extent < 1) in.fail("\"" + name + "\" has an axis of length " + std::to_string(extent));
      // Every element takes a byte at least; this also keeps the product from overflowing.
      if (elements > in.left() / static_cast<std::uint64_t>(extent)) {
        in.fail("\"" + name + "\" is larger than what is left of it");
      }
      elements *= static_cast<std::uint64_t>(extent);
      tensor.shape.push_back(extent);
    }
    const unsigned char* data = in.take(elements * size);
    tensor.bytes.assign(data, data + elements * size);
    if (!tensors.emplace(name, std::move(tensor)).second) in.fail("\"" + name + "\" is there twice");
  }
  if (!in.at_end()) in.fail("something follows the last tensor");
  return tensors;
}

// Writes a file that read_tensors() reads.
inline void write_tensors(const std::string& path, const StoredTensors& tensors) {
  std::ofstream file(path, std::ios::binary);
  auto number = [&file](auto value) { file.write(reinterpret_cast<const char*>(&value), sizeof(value)); };
  file.write(internal::kMagic, 8);
  number(static_cast<std::uint32_t>(tensors.size()));
  for (const auto& [name, tensor] : tensors) {
    number(static_cast<std::uint32_t>(name.size()));
    file.write(name.data(), static_cast<std::streamsize>(name.size()));
    number(static_cast<std::uint32_t>(tensor.dtype));
    number(static_cast<std::uint32_t>(tensor.shape.size()));
    for (std::int64_t extent : tensor.shape) number(extent);
    file.write(reinterpret_cast<const char*>(tensor.bytes.data()), static_cast<std::streamsize>(tensor.bytes.size()));
  }
  file.close();
  if (!file) throw std::runtime_error("could not write \"" + path + "\"; is there room and permission?");
}

}  // namespace examples

#endif  // PYKD_EXAMPLES_TENSOR_FILE_H_
