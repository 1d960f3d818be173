// File: kernels/soft_target/soft_target_plan.h
//
// How a call of soft_target is laid out on a GPU: which team works on a row, and what of it stays in shared memory.
// Plain arithmetic on the host, so that it is tested without a GPU.
//
//  - A row whose part fits in a third of a multiprocessor's shared memory is read from device memory once, while three
//    blocks per multiprocessor keep reading, computing and writing at the same time. Rows that are too long for one
//    block are shared by a cluster of 2, 4 or 8 (compute capability 9.0 and later): 32,000 classes in bfloat16 by 2,
//    128,256 by 8.
//  - What does not fit is read again in the later passes, from L2 where the rows under way fit there.
//  - Few rows spread over more blocks than their length asks for, until every multiprocessor has work; where clusters
//    are not enough, blocks meet in device memory between three launches.
#ifndef PYKD_KERNELS_SOFT_TARGET_SOFT_TARGET_PLAN_H_
#define PYKD_KERNELS_SOFT_TARGET_SOFT_TARGET_PLAN_H_

#include <algorithm>
#include <cstdint>

namespace pykd::kernels::soft_target {

constexpr int kMostThreads = 256;
constexpr int kCopiesAhead = 8;       // chunks per thread and tensor on their way to shared memory
constexpr int kExchangeBytes = 448;   // of Exchange (soft_target_kernels.cuh); a multiple of 16
constexpr int kReservedBytes = 1024;  // that the system takes of a multiprocessor's shared memory, per block

// What matters of a device.
struct Device {
  int multiprocessors = 0;
  int shared_of_block = 0;           // bytes, the most that a block may ask for
  int shared_of_multiprocessor = 0;  // bytes
  int largest_cluster = 1;           // 1, 2, 4 or 8 blocks
};

struct Plan {
  bool apart = false;  // the parts of a row meet in device memory, not in a cluster
  int parts = 1;       // of a row
  int chunks = 0;      // of a part, 16 bytes of each tensor
  int threads = 32;    // of a block
  int staged = 0;      // rounds (one chunk per thread) that stay in shared memory
  int shared_bytes = kExchangeBytes;
};

inline std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// `lanes`: elements in 16 bytes. `tensors`: how many are staged, 1 or 2 (student, teacher).
inline Plan make_plan(const Device& device, std::int64_t batch, std::int32_t classes, int lanes, int tensors) {
  // Of a row that begins lanes - 1 elements after a boundary.
  const std::int64_t chunks = divide_up(static_cast<std::int64_t>(classes) + lanes - 1, lanes);
  const std::int64_t chunk_bytes = 16LL * tensors;
  const std::int64_t wanted_bytes = device.shared_of_multiprocessor / 3 - kReservedBytes - kExchangeBytes;

  std::int64_t parts = 1;
  while (parts < device.largest_cluster && divide_up(chunks, parts) * chunk_bytes > wanted_bytes) parts *= 2;
  while (parts < device.largest_cluster && batch * parts < 2LL * device.multiprocessors &&
         divide_up(chunks, 2 * parts) >= kMostThreads) {
    parts *= 2;
  }

  Plan plan;
  // Three launches and a trip through memory cost some microseconds: worth it where each block would otherwise go
  // through eight rounds or more while half of the device is idle.
  plan.apart = 2 * batch * parts <= device.multiprocessors && divide_up(chunks, parts) >= 8LL * kMostThreads;
  if (plan.apart) parts = std::min<std::int64_t>(2LL * device.multiprocessors / batch, chunks / (2 * kMostThreads));

  plan.parts = static_cast<int>(parts);
  plan.chunks = static_cast<int>(divide_up(chunks, parts));
  // Two chunks per thread or more; whole warps.
  plan.threads =
      static_cast<int>(std::clamp<std::int64_t>(divide_up(divide_up(plan.chunks, 2), 32) * 32, 32, kMostThreads));
  if (plan.apart) return plan;

  // The whole part where it is as short as wanted; else as much as leaves room for a second block.
  const std::int64_t rounds = divide_up(plan.chunks, plan.threads);
  const std::int64_t round_bytes = plan.threads * chunk_bytes;
  const std::int64_t room =
      std::min<std::int64_t>(device.shared_of_multiprocessor / 2 - kReservedBytes, device.shared_of_block) -
      kExchangeBytes;
  plan.staged = static_cast<int>(std::clamp<std::int64_t>(room / round_bytes, 0, rounds));
  plan.shared_bytes = kExchangeBytes + static_cast<int>(plan.staged * round_bytes);
  return plan;
}

}  // namespace pykd::kernels::soft_target

#endif  // PYKD_KERNELS_SOFT_TARGET_SOFT_TARGET_PLAN_H_
