// File: kernels/soft_target/soft_target_plan.h
//
// How a call of soft_target is laid out on a GPU: which team works on a row, and what of it stays in shared memory.
// Plain arithmetic on the host, so that it is tested without a GPU.
//
//  - Short rows (some hundred classes) are the work of 1 to 32 lanes of a warp each, with as many rows in a block as it
//  has
//    room for.
//  - A row whose part fits in a third of a multiprocessor's shared memory is read from device memory once, while three
//    blocks per multiprocessor keep reading, computing and writing at the same time. Rows that are too long for one
//    block are shared by a cluster of 2, 4 or 8 (compute capability 9.0 and later): 32,000 classes in bfloat16 by 2,
//    128,256 by 8.
//  - What does not fit is read again in the later passes, from L2 where the rows under way fit there.
//  - Few rows spread over clusters of up to 16 blocks, more than their length asks for, until every multiprocessor has
//  work.
#ifndef PYKD_KERNELS_SOFT_TARGET_SOFT_TARGET_PLAN_H_
#define PYKD_KERNELS_SOFT_TARGET_SOFT_TARGET_PLAN_H_

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/device_facts.h"

namespace pykd::kernels::soft_target {

using gpu::Device;
using gpu::divide_up;
using gpu::kMostParts;
using gpu::kPortableParts;
using gpu::kReservedBytes;

constexpr int kWarpThreads = 32;
constexpr int kMostThreads = 256;
constexpr int kRoundsOfLanes = 4;     // chunks per lane where a warp or less has a row
constexpr int kExchangeBytes = 1568;  // of Exchange (soft_target_kernels.cuh), or more; a multiple of 16

struct Plan {
  int parts = 1;        // of a row: blocks of a cluster
  int chunks = 0;       // of a part, 16 bytes of each tensor
  int threads = 32;     // of a block
  int team = 32;        // threads that have a part: those of a block, or a power of 2 up to 32
  int staged = 0;       // rounds (one chunk per thread) that stay in shared memory,
  int round_bytes = 0;  // and how much of it they take
  int shared_bytes = kExchangeBytes;
};

// `lanes`: elements in 16 bytes. `tensors`: how many are staged, 1 or 2 (student, teacher).
inline Plan make_plan(const Device& device, std::int64_t batch, std::int32_t classes, int lanes, int tensors) {
  // Of a row that begins lanes - 1 elements after a boundary.
  const std::int64_t chunks = divide_up(static_cast<std::int64_t>(classes) + lanes - 1, lanes);
  const std::int64_t chunk_bytes = 16LL * tensors;
  Plan plan;
  const auto stage = [&](std::int64_t room) {
    plan.round_bytes = plan.threads * 16 * tensors;
    plan.staged = static_cast<int>(
        std::clamp<std::int64_t>((room - kExchangeBytes) / plan.round_bytes, 0, divide_up(plan.chunks, plan.team)));
    plan.shared_bytes = kExchangeBytes + plan.staged * plan.round_bytes;
  };

  if (chunks <= kRoundsOfLanes * kWarpThreads && batch >= 2LL * device.multiprocessors) {
    plan.chunks = static_cast<int>(chunks);
    plan.threads = kMostThreads;
    plan.team = 1;
    while (plan.team < kWarpThreads && 2 * plan.team <= chunks) plan.team *= 2;
    // As many blocks as multiprocessors have, before as many rows in a block as it has room for.
    while (plan.threads > kWarpThreads && batch * plan.team < 2LL * device.multiprocessors * plan.threads) {
      plan.threads /= 2;
    }
    stage(device.shared_of_multiprocessor / 3 - kReservedBytes);
    return plan;
  }

  const std::int64_t wanted_bytes = device.shared_of_multiprocessor / 3 - kReservedBytes - kExchangeBytes;
  std::int64_t parts = 1;
  while (parts < std::min(device.largest_cluster, kPortableParts) &&
         divide_up(chunks, parts) * chunk_bytes > wanted_bytes) {
    parts *= 2;
  }
  while (parts < device.largest_cluster && batch * parts < 2LL * device.multiprocessors &&
         divide_up(chunks, 2 * parts) >= kMostThreads) {
    parts *= 2;
  }
  plan.parts = static_cast<int>(parts);
  plan.chunks = static_cast<int>(divide_up(chunks, parts));
  // Two chunks per thread or more; two whole warps or more.
  plan.threads = static_cast<int>(std::clamp<std::int64_t>(
      divide_up(divide_up(plan.chunks, 2), kWarpThreads) * kWarpThreads, 2 * kWarpThreads, kMostThreads));
  plan.team = plan.threads;
  // The whole part where it is as short as wanted; else as much as leaves room for a second block, where there is one.
  const bool alone = batch * parts <= device.multiprocessors;
  stage(alone ? device.shared_of_block
              : std::min<std::int64_t>(device.shared_of_multiprocessor / 2 - kReservedBytes, device.shared_of_block));
  return plan;
}

// Of the grid.
inline std::int64_t blocks_of(const Plan& plan, std::int64_t batch) {
  return plan.team <= kWarpThreads ? divide_up(batch, plan.threads / plan.team) : batch * plan.parts;
}

}  // namespace pykd::kernels::soft_target

#endif  // PYKD_KERNELS_SOFT_TARGET_SOFT_TARGET_PLAN_H_
