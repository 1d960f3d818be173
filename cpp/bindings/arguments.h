// File: bindings/arguments.h
//
// What Python gives for tensors, numbers and settings, as libpykd takes it.
#ifndef PYKD_BINDINGS_ARGUMENTS_H_
#define PYKD_BINDINGS_ARGUMENTS_H_

#include <pybind11/pybind11.h>

#include <cstddef>
#include <string>
#include <vector>

#include "bindings/borrowed_tensor.h"
#include "bindings/interpreter.h"
#include "pykd/kernels.h"
#include "pykd/pykd.h"

namespace pykd::bindings {

// The exceptions that pykd.h names.
inline PyObject* exception_of(pykd_status status) {
  switch (status) {
    case PYKD_INVALID_VALUE:
    case PYKD_BAD_ARTEFACT:
      return PyExc_ValueError;
    case PYKD_INVALID_TYPE:
      return PyExc_TypeError;
    case PYKD_NOT_FOUND:
      return PyExc_FileNotFoundError;
    default:
      return PyExc_RuntimeError;
  }
}

// Throws what libpykd reported on this thread.
inline void check(pykd_status status) {
  if (status != PYKD_OK) raise(exception_of(status), pykd_last_error());
}

inline constexpr char kNameOfTensor[] = "the name of a tensor";

// Tensors by name, borrowed for one call.
class Borrowed {
 public:
  Borrowed(const pybind11::dict& tensors, bool writable) : items_(items_of(tensors, kNameOfTensor)) {
    reserve(items_.size());
    for (const Item& item : items_) add(item.name, item.value, writable);
  }
  Borrowed() = default;
  void reserve(std::size_t count) {
    tensors_.reserve(count);
    views_.reserve(count);
  }
  // `name` outlives this object.
  void add(const char* name, pybind11::handle tensor, bool writable) {
    tensors_.emplace_back(name, tensor, writable);
    views_.push_back(tensors_.back().view());
  }
  const pykd_tensor* data() const { return views_.data(); }
  std::size_t size() const { return views_.size(); }

 private:
  std::vector<Item> items_;
  std::vector<BorrowedTensor> tensors_;
  std::vector<pykd_tensor> views_;
};

// Numbers and settings by name, for one call.
class Settings {
 public:
  Settings(const pybind11::dict& settings, const char* what) : items_(items_of(settings, what)) {}

  std::vector<pykd_parameter> parameters() const {
    std::vector<pykd_parameter> all;
    all.reserve(items_.size());
    for (const Item& item : items_) {
      all.push_back({item.name, number_of(item.value, std::string("the parameter ") + item.name)});
    }
    return all;
  }
  std::vector<pykd_kernel_attribute> attributes() const {
    std::vector<pykd_kernel_attribute> all;
    all.reserve(items_.size());
    for (const Item& item : items_) {
      const bool is_choice = PyUnicode_Check(item.value.ptr());
      all.push_back({item.name, is_choice ? 0.0 : number_of(item.value, std::string("the attribute ") + item.name),
                     is_choice ? text_of(item.value, item.name) : nullptr});
    }
    return all;
  }

 private:
  std::vector<Item> items_;
};

}  // namespace pykd::bindings

#endif  // PYKD_BINDINGS_ARGUMENTS_H_
