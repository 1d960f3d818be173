// File: kernels/cuda/device_facts.h
//
// What the layout of a call depends on. Plain numbers, so that layouts are tested without a GPU.
#ifndef PYKD_KERNELS_CUDA_DEVICE_FACTS_H_
#define PYKD_KERNELS_CUDA_DEVICE_FACTS_H_

#include <cstdint>

namespace pykd::kernels::gpu {

constexpr int kMostParts = 16;        // blocks of a cluster
constexpr int kPortableParts = 8;     // of a cluster that every device with clusters can run
constexpr int kReservedBytes = 1024;  // that the system takes of a multiprocessor's shared memory, per block

struct Device {
  int multiprocessors = 0;
  int shared_of_block = 0;           // bytes, the most that a block may ask for
  int shared_of_multiprocessor = 0;  // bytes
  int largest_cluster = 1;           // 1, 2, 4, 8 or 16 blocks
};

inline std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace pykd::kernels::gpu

#endif  // PYKD_KERNELS_CUDA_DEVICE_FACTS_H_
