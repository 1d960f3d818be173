// File: kernels/cuda/tiles.cuh
//
// Products of all rows with all rows, a tile at a time, by blocks of kThreads; and sums whose order is fixed. Rows are
// padded with zeros to whole tiles, in both directions. Products are summed in float32, at most kDepth terms in a row.
#ifndef PYKD_KERNELS_CUDA_TILES_CUH_
#define PYKD_KERNELS_CUDA_TILES_CUH_

#include <cstdint>

#include "kernels/cuda/gpu.cuh"

namespace pykd::kernels::gpu::tiles {

constexpr int kThreads = 256;
constexpr int kTile = 64;    // samples, and features of a step of the gradient
constexpr int kStep = 16;    // features of a step of the products
constexpr int kDepth = 256;  // features summed in a row
constexpr int kOwn = 4;      // a thread has kOwn x kOwn entries of a tile
constexpr int kAcross = kTile / kOwn;
constexpr int kTileBytes = kTile * kTile * 4;
constexpr int kSharedBytes = 2 * kTileBytes;
static_assert(kAcross * kAcross == kThreads && 2 * kStep <= kTile);

// How many shares of the `met` tiles that each of `tiles` meets keep a device busy, at most 8.
inline int shares_of(int multiprocessors, int tiles, int met) {
  int shares = 1;
  while (shares < 8 && static_cast<std::int64_t>(tiles) * shares < 2LL * multiprocessors && shares < met) shares *= 2;
  return shares;
}

PYKD_GPU double sum_of_warp(double mine) {
  PYKD_GPU_NO_UNROLL
  for (int mask = gpu::kWarp / 2; mask > 0; mask /= 2) mine += gpu::shuffle_xor(mine, mask);
  return mine;
}
// Of the block; `room`: kThreads / kWarp doubles in shared memory. Every thread gets it.
PYKD_GPU double sum_of_block(double mine, double* room) {
  mine = sum_of_warp(mine);
  gpu::block_barrier();
  if (gpu::thread() % gpu::kWarp == 0) room[gpu::thread() / gpu::kWarp] = mine;
  gpu::block_barrier();
  double all = 0.0;
  PYKD_GPU_NO_UNROLL
  for (int warp = 0; warp < kThreads / gpu::kWarp; ++warp) all += room[warp];
  return all;
}

// Likewise the largest; none is NaN, or one that is does not count.
PYKD_GPU double largest_of_block(double mine, double* room) {
  PYKD_GPU_NO_UNROLL
  for (int mask = gpu::kWarp / 2; mask > 0; mask /= 2) {
    const double other = gpu::shuffle_xor(mine, mask);
    mine = other > mine ? other : mine;
  }
  gpu::block_barrier();
  if (gpu::thread() % gpu::kWarp == 0) room[gpu::thread() / gpu::kWarp] = mine;
  gpu::block_barrier();
  PYKD_GPU_NO_UNROLL
  for (int warp = 0; warp < kThreads / gpu::kWarp; ++warp) mine = room[warp] > mine ? room[warp] : mine;
  return mine;
}

PYKD_GPU void load_floats(const float* from, float (&to)[kOwn]) { gpu::Float32::unpack(gpu::load(from), to); }

// Tile i of some rows times tile j of others, [.., padded_d]: this thread's entries. `shared`: 2 * kTileBytes.
PYKD_GPU void multiply(std::int64_t padded_d, const float* rows, int i, const float* columns, int j, float* shared,
                       float (&products)[kOwn][kOwn]) {
  float* a = shared;                  // [kStep, kTile]
  float* b = shared + kStep * kTile;  // likewise
  const int mine = static_cast<int>(gpu::thread());
  const int column = mine % kAcross * kOwn, row = mine / kAcross * kOwn;
  const int loaded_row = mine / kOwn, loaded_k = mine % kOwn * kOwn;  // kTile rows of kStep features
  const float* from_a = rows + (static_cast<std::int64_t>(i) * kTile + loaded_row) * padded_d + loaded_k;
  const float* from_b = columns + (static_cast<std::int64_t>(j) * kTile + loaded_row) * padded_d + loaded_k;
  float run[kOwn][kOwn] = {};
  PYKD_GPU_UNROLL
  for (int r = 0; r < kOwn; ++r) {
    PYKD_GPU_UNROLL
    for (int c = 0; c < kOwn; ++c) products[r][c] = 0.0f;
  }
  PYKD_GPU_NO_UNROLL
  for (std::int64_t k = 0; k < padded_d; k += kStep) {
    float of_a[kOwn], of_b[kOwn];
    load_floats(from_a + k, of_a);
    load_floats(from_b + k, of_b);
    gpu::block_barrier();  // what was there has been read
    PYKD_GPU_UNROLL
    for (int q = 0; q < kOwn; ++q) {
      a[(loaded_k + q) * kTile + loaded_row] = of_a[q];
      b[(loaded_k + q) * kTile + loaded_row] = of_b[q];
    }
    gpu::block_barrier();
    PYKD_GPU_UNROLL
    for (int step = 0; step < kStep; ++step) {
      load_floats(a + step * kTile + row, of_a);
      load_floats(b + step * kTile + column, of_b);
      PYKD_GPU_UNROLL
      for (int r = 0; r < kOwn; ++r) {
        PYKD_GPU_UNROLL
        for (int c = 0; c < kOwn; ++c) run[r][c] = gpu::fma(of_a[r], of_b[c], run[r][c]);
      }
    }
    if ((k / kStep + 1) % (kDepth / kStep) == 0 || k + kStep == padded_d) {
      PYKD_GPU_UNROLL
      for (int r = 0; r < kOwn; ++r) {
        PYKD_GPU_UNROLL
        for (int c = 0; c < kOwn; ++c) {
          products[r][c] += run[r][c];
          run[r][c] = 0.0f;
        }
      }
    }
  }
}

// Adds weights, [column, row], times the rows of tile j of `columns` to tile i of `part`; the first of a share writes.
// `samples`: kTileBytes of shared memory.
PYKD_GPU void accumulate(std::int64_t padded_d, const float* columns, int i, int j, const float* weights,
                         float* samples, float* part, bool first) {
  const int mine = static_cast<int>(gpu::thread());
  const int column = mine % kAcross * kOwn, row = mine / kAcross * kOwn;
  PYKD_GPU_NO_UNROLL
  for (std::int64_t k = 0; k < padded_d; k += kTile) {
    gpu::block_barrier();  // what was there has been read
    PYKD_GPU_UNROLL
    for (int q = 0; q < kOwn; ++q) {
      const int sample = q * kAcross + mine / kAcross;
      gpu::store(samples + sample * kTile + column,
                 gpu::load(columns + (static_cast<std::int64_t>(j) * kTile + sample) * padded_d + k + column));
    }
    gpu::block_barrier();
    float sums[kOwn][kOwn] = {};
    PYKD_GPU_NO_UNROLL
    for (int sample = 0; sample < kTile; ++sample) {
      float w[kOwn], z[kOwn];
      load_floats(weights + sample * kTile + row, w);
      load_floats(samples + sample * kTile + column, z);
      PYKD_GPU_UNROLL
      for (int r = 0; r < kOwn; ++r) {
        PYKD_GPU_UNROLL
        for (int c = 0; c < kOwn; ++c) sums[r][c] = gpu::fma(w[r], z[c], sums[r][c]);
      }
    }
    PYKD_GPU_UNROLL
    for (int r = 0; r < kOwn; ++r) {
      float* to = part + (static_cast<std::int64_t>(i) * kTile + row + r) * padded_d + k + column;
      if (!first) {
        float before[kOwn];
        load_floats(to, before);
        PYKD_GPU_UNROLL
        for (int c = 0; c < kOwn; ++c) sums[r][c] += before[c];
      }
      gpu::store(to, gpu::Float32::pack(sums[r]));
    }
  }
}

// Writes zeros to tile i of `part`.
PYKD_GPU void clear(std::int64_t padded_d, int i, float* part) {
  const int mine = static_cast<int>(gpu::thread());
  const int column = mine % kAcross * kOwn, row = mine / kAcross * kOwn;
  const gpu::Words nothing = {};
  PYKD_GPU_NO_UNROLL
  for (std::int64_t k = 0; k < padded_d; k += kTile) {
    for (int r = 0; r < kOwn; ++r) {
      gpu::store(part + (static_cast<std::int64_t>(i) * kTile + row + r) * padded_d + k + column, nothing);
    }
  }
}

}  // namespace pykd::kernels::gpu::tiles

#endif  // PYKD_KERNELS_CUDA_TILES_CUH_
