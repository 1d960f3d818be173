// File: kernels/host/memory.h
//
// Memory for what comes in every step of a training loop, results and the kernels' scratch, kept between two steps.
//
// A large block that goes back to the system comes back with pages that are not there: the first touch of each is a
// fault and a page to clear, which together take as long as a fused kernel. What was given back is therefore kept for
// the next request of about that size:
//
//  - in use and kept together are never more than twice what was in use at some time, so that batches of two sizes may
//    take turns; and no more than kMostKept is kept;
//  - what no request of the last kKeptFor has taken goes back to the system.
#ifndef PYKD_KERNELS_HOST_MEMORY_H_
#define PYKD_KERNELS_HOST_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

#include "pykd/pykd.h"

namespace pykd::kernels {

class KeptMemory {
 public:
  static constexpr std::size_t kAlignment = 256;
  static constexpr std::size_t kSmallest = PYKD_KEPT_FROM;  // below, malloc() keeps memory well by itself
  static constexpr std::uint64_t kKeptFor = 64;             // requests
  static constexpr std::size_t kMostKept = std::size_t{1} << 30;

  KeptMemory() = default;
  KeptMemory(const KeptMemory&) = delete;
  KeptMemory& operator=(const KeptMemory&) = delete;
  ~KeptMemory();  // what is in use must have been given back

  // The one of this process. It is never destroyed: results may outlive static objects.
  static KeptMemory& instance();

  void* allocate(std::size_t bytes);  // nullptr: there is no such memory
  void deallocate(void* memory);      // nullptr is allowed
  void trim();                        // keeps nothing of what is kept now
  std::size_t bytes_kept();

  // Around fork(), which must not happen in the middle of a request.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  struct Block {
    void* start;  // of the header, which precedes what the user sees
    std::size_t bytes;
    std::uint64_t given_back;  // in requests
  };

  void drop(std::vector<Block>::iterator block);
  void drop_what_is_too_much();

  std::mutex mutex_;
  std::vector<Block> kept_;  // in the order in which they were given back
  std::size_t bytes_in_use_ = 0, bytes_kept_ = 0, peak_ = 0;
  std::uint64_t requests_ = 0;
};

// Scratch: floats that start on a cache line and a vector of their own, not initialised.
class Floats {
 public:
  explicit Floats(std::size_t count)
      : data_(static_cast<float*>(KeptMemory::instance().allocate(count * sizeof(float)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  ~Floats() { KeptMemory::instance().deallocate(data_); }
  float* get() const { return data_; }

 private:
  float* data_;
};

}  // namespace pykd::kernels

#endif  // PYKD_KERNELS_HOST_MEMORY_H_
