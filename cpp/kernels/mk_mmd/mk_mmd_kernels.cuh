// File: kernels/mk_mmd/mk_mmd_kernels.cuh
//
// mk_mmd on a GPU, in five launches that meet in scratch memory:
//
//     means      of both sets, in float64, and their difference
//     centre     the samples less their mean, in float32, padded with zeros to whole tiles; squared norms in float64
//     widths     the bandwidths, by one block
//     tiles      a block has a tile of samples and goes through its share of the tiles that these meet: products,
//                kernels, and for the gradient the kernels' weights times the samples once more
//     finish     what the shares have left, added up in order
//
// Students meet students and teachers; teachers meet teachers from their own tile on, which counts twice beyond it. All
// sums are formed in an order that depends on the shape and the device alone: the same bits every time. Products are
// summed in float32, at most kDepth terms in a row; kernels in float32 within a tile, in float64 beyond.
#ifndef PYKD_KERNELS_MK_MMD_MK_MMD_KERNELS_CUH_
#define PYKD_KERNELS_MK_MMD_MK_MMD_KERNELS_CUH_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/device_facts.h"
#include "kernels/cuda/gpu.cuh"
#include "kernels/cuda/layout.h"
#include "kernels/cuda/tiles.cuh"
#include "kernels/mk_mmd/mk_mmd_widths.h"

namespace pykd::kernels::mmd {

using namespace gpu::tiles;

// Of one set of samples, in scratch memory.
struct Set {
  const float* rows = nullptr;  // [n, d], as given
  double* mean = nullptr;       // [d]
  double* norm = nullptr;       // [n]: squared, of the centred samples
  double* along = nullptr;      // [n]: their products with the difference of the means
  float* centred = nullptr;     // [padded_n, padded_d]
};

// What a share of a tile's meetings leaves.
struct Sums {
  double xx = 0.0, yy = 0.0, xy = 0.0;  // of the kernels less 1
};

struct Problem {
  Set x, y;
  const float* weight = nullptr;  // null: no gradient
  float* value = nullptr;
  float* gradient = nullptr;
  std::int64_t n = 0, d = 0;
  std::int64_t padded_n = 0, padded_d = 0;
  int tiles = 0;   // of a set
  int shares = 1;  // of a tile's meetings
  int bandwidth = kJoint;

  double* offset = nullptr;  // [d]: mean of x less mean of y
  Widths* widths = nullptr;
  double* apart = nullptr;          // the squared length of offset
  Sums* sums = nullptr;             // [2 tiles, shares]: of students, then of teachers
  double* own_weights = nullptr;    // [shares, padded_n]: sums of a student's weights over students,
  double* cross_weights = nullptr;  // over teachers
  float* parts = nullptr;           // [shares, padded_n, padded_d]: of the gradient
};

// Lays the scratch memory of a call out from `memory` on, a multiple of 16 bytes; returns how many bytes it takes.
// Nothing is written where memory is null.
inline std::size_t lay_out(Problem& p, unsigned char* memory) {
  gpu::Layout layout(memory);
  p.tiles = static_cast<int>(gpu::divide_up(p.n, kTile));
  p.padded_n = static_cast<std::int64_t>(p.tiles) * kTile;
  p.padded_d = gpu::divide_up(p.d, kTile) * kTile;
  for (Set* set : {&p.x, &p.y}) {
    layout.take(set->mean, p.d);
    layout.take(set->norm, p.n);
    layout.take(set->along, p.n);
    layout.take(set->centred, p.padded_n * p.padded_d);
  }
  layout.take(p.offset, p.d);
  layout.take(p.widths, 1);
  layout.take(p.apart, 1);
  layout.take(p.sums, 2LL * p.tiles * p.shares);
  if (p.gradient != nullptr) {
    layout.take(p.own_weights, p.shares * p.padded_n);
    layout.take(p.cross_weights, p.shares * p.padded_n);
    layout.take(p.parts, p.shares * p.padded_n * p.padded_d);
  }
  return layout.bytes();
}

// ---- Means: grid of divide_up(d, kWarp) blocks, shared memory for a double per thread and set ---------------

PYKD_GPU_KERNEL(kThreads, 2)
means_kernel(Problem p) {
  auto* room = reinterpret_cast<double*>(gpu::shared_memory());
  const unsigned lane = gpu::thread() % gpu::kWarp, warp = gpu::thread() / gpu::kWarp;
  const std::int64_t column = static_cast<std::int64_t>(gpu::block()) * gpu::kWarp + lane;
  double x = 0.0, y = 0.0;
  if (column < p.d) {
    PYKD_GPU_NO_UNROLL
    for (std::int64_t i = warp; i < p.n; i += kThreads / gpu::kWarp) {
      x += static_cast<double>(p.x.rows[i * p.d + column]);
      y += static_cast<double>(p.y.rows[i * p.d + column]);
    }
  }
  room[gpu::thread()] = x;
  room[kThreads + gpu::thread()] = y;
  gpu::block_barrier();
  if (warp != 0 || column >= p.d) return;
  x = y = 0.0;
  for (int w = 0; w < kThreads / gpu::kWarp; ++w) {
    x += room[w * gpu::kWarp + lane];
    y += room[kThreads + w * gpu::kWarp + lane];
  }
  p.x.mean[column] = x / static_cast<double>(p.n);
  p.y.mean[column] = y / static_cast<double>(p.n);
  p.offset[column] = p.x.mean[column] - p.y.mean[column];
}

// ---- Centring: grid of divide_up(2 padded_n, kThreads / kWarp) blocks; a warp has a sample ------------------

PYKD_GPU_KERNEL(kThreads, 2)
centre_kernel(Problem p) {
  const unsigned lane = gpu::thread() % gpu::kWarp, warp = gpu::thread() / gpu::kWarp;
  const std::int64_t index = static_cast<std::int64_t>(gpu::block()) * (kThreads / gpu::kWarp) + warp;
  if (index >= 2 * p.padded_n) return;  // all of the warp
  const Set& set = index < p.padded_n ? p.x : p.y;
  const std::int64_t row = index % p.padded_n;
  float* centred = set.centred + row * p.padded_d;
  double norm = 0.0, along = 0.0;
  PYKD_GPU_NO_UNROLL
  for (std::int64_t k = lane; k < p.padded_d; k += gpu::kWarp) {
    float entry = 0.0f;
    if (row < p.n && k < p.d) {
      entry = static_cast<float>(static_cast<double>(set.rows[row * p.d + k]) - set.mean[k]);
      norm += static_cast<double>(entry) * static_cast<double>(entry);
      along += static_cast<double>(entry) * p.offset[k];
    }
    centred[k] = entry;
  }
  norm = sum_of_warp(norm);
  along = sum_of_warp(along);
  if (lane == 0 && row < p.n) {
    set.norm[row] = norm;
    set.along[row] = along;
  }
}

// ---- Bandwidths: one block ---------------------------------------------------------------------------------

PYKD_GPU_KERNEL(kThreads, 1)
widths_kernel(Problem p) {
  auto* room = reinterpret_cast<double*>(gpu::shared_memory());
  double x_spread = 0.0, y_spread = 0.0, apart = 0.0, largest = 0.0;
  PYKD_GPU_NO_UNROLL
  for (std::int64_t i = gpu::thread(); i < p.n; i += kThreads) {
    const double x = p.x.norm[i], y = p.y.norm[i];
    x_spread += x;
    y_spread += y;
    largest = x > largest ? x : largest;
    largest = y > largest ? y : largest;
  }
  PYKD_GPU_NO_UNROLL
  for (std::int64_t k = gpu::thread(); k < p.d; k += kThreads) apart += p.offset[k] * p.offset[k];
  x_spread = sum_of_block(x_spread, room);
  y_spread = sum_of_block(y_spread, room);
  apart = sum_of_block(apart, room);
  largest = largest_of_block(largest, room);
  if (gpu::thread() != 0) return;
  *p.widths = widths_of(p.bandwidth, static_cast<double>(p.n), x_spread, y_spread, apart, largest);
  *p.apart = apart;
}

// ---- Tiles -------------------------------------------------------------------------------------------------

// 2^x - 1, with the relative precision of float32 near 0; 0 for x > 0 (rounding of a distance of 0), -1 below -126.
PYKD_GPU float exp2_less_1(float x) {
  x = gpu::max(gpu::min(x, 0.0f), -126.0f);
  const int n = gpu::nearest_int(x);
  const float r = x - static_cast<float>(n);
  // (2^r - 1) / r for |r| <= 1/2: interpolated at Chebyshev's points, relative error 3e-8.
  float q = gpu::fma(1.5453163e-4f, r, 1.3390863e-3f);
  q = gpu::fma(q, r, 9.6180830e-3f);
  q = gpu::fma(q, r, 5.5503570e-2f);
  q = gpu::fma(q, r, 2.4022651e-1f);
  q = gpu::fma(q, r, 6.9314718e-1f);
  const float power = gpu::bits_to_float(static_cast<std::uint32_t>(n + 127) << 23);
  return gpu::fma(power, gpu::product(r, q), power - 1.0f);
}

// Who meets whom, and how.
struct Meeting {
  const Set& rows;
  const Set& columns;
  double scale;   // of squared distances
  float weight;   // +- 1 / s2
  bool coincide;  // all distances are 0
  bool same;      // the same set
};

// Turns products into the gradient's weights; returns the sum of the kernels less 1.
PYKD_GPU float kernels_of(const Problem& p, const Meeting& meeting, int i, int j, float (&products)[kOwn][kOwn]) {
  const int mine = static_cast<int>(gpu::thread());
  const std::int64_t row = static_cast<std::int64_t>(i) * kTile + mine / kAcross * kOwn;
  const std::int64_t column = static_cast<std::int64_t>(j) * kTile + mine % kAcross * kOwn;
  float of_row[kOwn], of_column[kOwn];
  PYKD_GPU_UNROLL
  for (int q = 0; q < kOwn; ++q) {
    // Between sets |x_i - y_j|^2 is |x_i|^2 + |y_j|^2 - 2 x_i.y_j + 2 x_i.offset - 2 y_j.offset + |offset|^2, of
    // centred ones.
    double r = 0.0, c = 0.0;
    if (row + q < p.n) {
      r = meeting.rows.norm[row + q];
      if (!meeting.same) r += 2.0 * meeting.rows.along[row + q] + *p.apart;
    }
    if (column + q < p.n) {
      c = meeting.columns.norm[column + q];
      if (!meeting.same) c -= 2.0 * meeting.columns.along[column + q];
    }
    of_row[q] = static_cast<float>(meeting.scale * r);
    of_column[q] = static_cast<float>(meeting.scale * c);
  }
  const auto scale = static_cast<float>(2.0 * meeting.scale);
  float sum = 0.0f;
  PYKD_GPU_UNROLL
  for (int r = 0; r < kOwn; ++r) {
    PYKD_GPU_UNROLL
    for (int c = 0; c < kOwn; ++c) {
      // A sample is at distance 0 from itself, whatever the products say.
      const bool counts = row + r < p.n && column + c < p.n && !(meeting.same && row + r == column + c);
      // The five kernels, each less 1: (1 + m)^2 - 1 = m (2 + m) keeps the digits that squaring 1 + m would lose.
      const float m16 = exp2_less_1(gpu::fma(scale, products[r][c], -(of_row[r] + of_column[c])));
      const float m8 = m16 * (m16 + 2.0f), m4 = m8 * (m8 + 2.0f), m2 = m4 * (m4 + 2.0f), m1 = m2 * (m2 + 2.0f);
      // 16 m1 + 8 m2 + 4 m4 + 2 m8 + m16: exactly -31 where every kernel is 0.
      float weight = gpu::fma(2.0f, gpu::fma(2.0f, m1, m2), m4);
      weight = gpu::fma(2.0f, gpu::fma(2.0f, weight, m8), m16);
      products[r][c] = counts ? meeting.weight / 16.0f * (weight + 31.0f) : 0.0f;
      sum += counts ? (m16 + m8) + ((m4 + m2) + m1) : 0.0f;
    }
  }
  return sum;
}

// Grid: 2 tiles * shares blocks, or tiles * shares where no value is wanted; kSharedBytes.
PYKD_GPU_KERNEL(kThreads, 2)
tiles_kernel(Problem p) {
  auto* shared = reinterpret_cast<float*>(gpu::shared_memory());
  float* weights = shared + kTile * kTile;  // [column, row]
  const int share = static_cast<int>(gpu::block()) % p.shares, unit = static_cast<int>(gpu::block()) / p.shares;
  const bool student = unit < p.tiles;
  const int i = student ? unit : unit - p.tiles;
  const Widths widths = *p.widths;
  if (!widths.finite) return;  // all of the grid
  const bool gradient = student && p.gradient != nullptr;
  const int mine = static_cast<int>(gpu::thread());
  const int column = mine % kAcross * kOwn, row = mine / kAcross * kOwn;

  // Students meet 2 tiles tiles, teachers those from their own on; a share has some of them in a row.
  const int from = student ? 0 : i, all = student ? 2 * p.tiles : p.tiles;
  const int each = (all - from + p.shares - 1) / p.shares;
  const int begin = from + share * each, end = begin + each < all ? begin + each : all;
  Sums sums;
  double own_weight = 0.0, cross_weight = 0.0;  // of the row mine / 4
  float* part = gradient ? p.parts + share * p.padded_n * p.padded_d : nullptr;
  bool first = true;
  PYKD_GPU_NO_UNROLL
  for (int met = begin; met < end; ++met) {
    const bool same = !student || met < p.tiles;
    const int j = student && !same ? met - p.tiles : met;
    const double width = !student ? widths.yy : same ? widths.xx : widths.xy;
    const double sign = same ? 1.0 : -1.0;
    const Meeting meeting{student ? p.x : p.y,   student && same ? p.x : p.y,
                          exponent_scale(width), static_cast<float>(sign / (width > kTiny ? width : kTiny)),
                          width <= kTiny,        same};
    if (meeting.coincide) continue;
    float entries[kOwn][kOwn];
    multiply(p.padded_d, meeting.rows.centred, i, meeting.columns.centred, j, shared, entries);
    const double sum = static_cast<double>(kernels_of(p, meeting, i, j, entries));
    if (!student) {
      sums.yy += met == i ? sum : 2.0 * sum;
    } else {
      (same ? sums.xx : sums.xy) += sum;
    }
    if (!gradient) continue;
    gpu::block_barrier();  // the last weights have been read
    PYKD_GPU_UNROLL
    for (int c = 0; c < kOwn; ++c) {
      const float down[kOwn] = {entries[0][c], entries[1][c], entries[2][c], entries[3][c]};
      gpu::store(weights + (column + c) * kTile + row, gpu::Float32::pack(down));
    }
    gpu::block_barrier();
    float weight = 0.0f;  // kOwn threads have a row
    PYKD_GPU_NO_UNROLL
    for (int c = mine % kOwn; c < kTile; c += kOwn) weight += weights[c * kTile + mine / kOwn];
    (same ? own_weight : cross_weight) += static_cast<double>(weight);
    accumulate(p.padded_d, meeting.columns.centred, i, j, weights, shared, part, first);
    first = false;
  }

  auto* room = reinterpret_cast<double*>(shared);
  sums.xx = sum_of_block(sums.xx, room);
  sums.yy = sum_of_block(sums.yy, room);
  sums.xy = sum_of_block(sums.xy, room);
  if (mine == 0) p.sums[unit * p.shares + share] = sums;
  if (!gradient) return;
  PYKD_GPU_UNROLL
  for (int mask = kOwn / 2; mask > 0; mask /= 2) {
    own_weight += gpu::shuffle_xor(own_weight, mask);
    cross_weight += gpu::shuffle_xor(cross_weight, mask);
  }
  if (mine % kOwn == 0) {
    const std::int64_t at = share * p.padded_n + static_cast<std::int64_t>(i) * kTile + mine / kOwn;
    p.own_weights[at] = own_weight;
    p.cross_weights[at] = cross_weight;
  }
  if (!first) return;
  clear(p.padded_d, i, part);
}

// ---- The end: grid of n blocks, or of one where no gradient is wanted; a block has a row of the gradient -----

PYKD_GPU_KERNEL(kThreads, 2)
finish_kernel(Problem p) {
  const bool finite = p.widths->finite;
  const auto n = static_cast<double>(p.n);
  if (p.value != nullptr && gpu::block() == 0 && gpu::thread() == 0) {
    Sums all;
    for (int i = 0; i < 2 * p.tiles * p.shares && finite; ++i) {
      all.xx += p.sums[i].xx;
      all.yy += p.sums[i].yy;
      all.xy += p.sums[i].xy;
    }
    *p.value = finite ? static_cast<float>((all.xx + all.yy - 2.0 * all.xy) / (n * n)) : gpu::nan();
  }
  if (p.gradient == nullptr) return;
  const std::int64_t row = gpu::block();
  const float weight = *p.weight;
  const double scale = 2.0 * static_cast<double>(weight) / (n * n);
  double own = 0.0, cross = 0.0;
  for (int share = 0; share < p.shares; ++share) {
    own += p.own_weights[share * p.padded_n + row];
    cross += p.cross_weights[share * p.padded_n + row];
  }
  // What the products with centred samples leave out: the sample itself, and the distance of the means.
  const auto of_sample = static_cast<float>(scale * (own + cross)), across = static_cast<float>(scale * cross);
  const auto factor = static_cast<float>(scale);
  PYKD_GPU_NO_UNROLL
  for (std::int64_t k = gpu::thread(); k < p.d; k += kThreads) {
    float sum = 0.0f;
    for (int share = 0; share < p.shares; ++share) sum += p.parts[(share * p.padded_n + row) * p.padded_d + k];
    const float result =
        factor * sum - of_sample * p.x.centred[row * p.padded_d + k] - across * static_cast<float>(p.offset[k]);
    p.gradient[row * p.d + k] = weight == 0.0f ? 0.0f : finite ? result : gpu::nan();
  }
}

}  // namespace pykd::kernels::mmd

#endif  // PYKD_KERNELS_MK_MMD_MK_MMD_KERNELS_CUH_
