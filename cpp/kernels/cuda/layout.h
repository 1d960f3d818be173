// File: kernels/cuda/layout.h
//
// What lies where in the scratch memory of a call.
#ifndef PYKD_KERNELS_CUDA_LAYOUT_H_
#define PYKD_KERNELS_CUDA_LAYOUT_H_

#include <cstddef>
#include <cstdint>

namespace pykd::kernels::gpu {

// Gives out memory from `memory` on, a multiple of 16 bytes each time; where that is null, null, to learn how much.
class Layout {
 public:
  explicit Layout(unsigned char* memory) : memory_(memory) {}

  template <class T>
  void take(T*& place, std::int64_t count) {
    place = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + bytes_);
    bytes_ += (static_cast<std::size_t>(count) * sizeof(T) + 15) / 16 * 16;
  }
  std::size_t bytes() const { return bytes_; }

 private:
  unsigned char* memory_;
  std::size_t bytes_ = 0;
};

}  // namespace pykd::kernels::gpu

#endif  // PYKD_KERNELS_CUDA_LAYOUT_H_
