// File: kernels/feature_distance/feature_distance_plan.h
//
// How a call of feature_distance is laid out on a GPU: a cluster of blocks has the tokens of one row of the batch, a
// warp has a token, or a block has one that is long. Plain arithmetic on the host, so that it is tested without a GPU.
#ifndef PYKD_KERNELS_FEATURE_DISTANCE_FEATURE_DISTANCE_PLAN_H_
#define PYKD_KERNELS_FEATURE_DISTANCE_FEATURE_DISTANCE_PLAN_H_

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/device_facts.h"

namespace pykd::kernels::feature {

constexpr int kWarpThreads = 32;
constexpr int kMostThreads = 256;
constexpr int kLongToken = 64;       // chunks per lane above which a block has a token
constexpr int kExchangeBytes = 464;  // of Exchange (feature_distance_kernels.cuh), or more; a multiple of 16

struct Plan {
  int parts = 1;            // of a row of the batch: blocks of a cluster
  std::int64_t tokens = 0;  // of a part
  int threads = 256;        // of a block
  int team = kWarpThreads;  // threads that have a token: a warp, or all of the block
  int staged = 0;           // rounds (one chunk of both tensors per thread) that stay in shared memory
  int shared_bytes = kExchangeBytes;
};

// `lanes`: elements in 16 bytes.
inline Plan make_plan(const gpu::Device& device, std::int64_t batch, std::int64_t tokens, std::int64_t channels,
                      int lanes) {
  const std::int64_t chunks = gpu::divide_up(channels + lanes - 1, lanes);
  Plan plan;
  if (chunks > kLongToken * kWarpThreads) plan.team = plan.threads;
  const int workers = plan.threads / plan.team;
  while (plan.parts < device.largest_cluster && batch * plan.parts < 3LL * device.multiprocessors &&
         tokens > plan.parts * workers) {
    plan.parts *= 2;
  }
  plan.tokens = gpu::divide_up(tokens, plan.parts);
  while (plan.team == kWarpThreads && plan.threads > kWarpThreads && plan.tokens <= plan.threads / (2 * kWarpThreads)) {
    plan.threads /= 2;
  }
  const int round_bytes = plan.threads * 32;
  const std::int64_t room = device.shared_of_multiprocessor / 3 - gpu::kReservedBytes - kExchangeBytes;
  plan.staged = static_cast<int>(std::clamp<std::int64_t>(room / round_bytes, 0, gpu::divide_up(chunks, plan.team)));
  plan.shared_bytes = kExchangeBytes + plan.staged * round_bytes;
  return plan;
}

inline std::int64_t blocks_of(const Plan& plan, std::int64_t batch) { return batch * plan.parts; }

}  // namespace pykd::kernels::feature

#endif  // PYKD_KERNELS_FEATURE_DISTANCE_FEATURE_DISTANCE_PLAN_H_
