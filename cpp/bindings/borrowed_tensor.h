// File: bindings/borrowed_tensor.h
//
// A tensor taken over from a Python object by DLPack, for the length of one call.
#ifndef PYKD_BINDINGS_BORROWED_TENSOR_H_
#define PYKD_BINDINGS_BORROWED_TENSOR_H_

#include <pybind11/pybind11.h>

#include "bindings/dlpack_abi.h"
#include "pykd/pykd.h"

namespace pykd::bindings {

// Owns the managed tensor behind a capsule and gives it back when it goes; moves, does not copy.
// Everything here, the destructor included, needs the GIL.
class BorrowedTensor {
 public:
  // Asks `object` for its memory. A tuple of one stands for bfloat16 values kept as uint16, because
  // NumPy has no such dtype. Throws TypeError or ValueError that names `name`.
  BorrowedTensor(const char* name, pybind11::handle object, bool writable);
  BorrowedTensor(BorrowedTensor&& other) noexcept;
  BorrowedTensor& operator=(BorrowedTensor&&) = delete;
  ~BorrowedTensor();

  // The view for libpykd; it lives as long as this object and `name`.
  pykd_tensor view() const { return view_; }

 private:
  void take_over(PyObject* capsule, const char* name, pybind11::handle object);
  void give_back() noexcept;

  // One of the two is set.
  dlpack::ManagedTensor* managed_ = nullptr;
  dlpack::VersionedTensor* versioned_ = nullptr;
  pykd_tensor view_{};
};

}  // namespace pykd::bindings

#endif  // PYKD_BINDINGS_BORROWED_TENSOR_H_
