// File: kernels/distribution_distillation/distribution_distillation_kernels.cuh
//
// distribution_distillation on a GPU, in launches that meet in scratch memory (launch_all):
//
//     clear      what is added up
//     rows       both sides padded with zeros to whole tiles; whether they are of length 1
//     tiles      of one side: similarities, and what the pairs add to their cells
//     hardest    of one side: the hardest negative of every sample, likewise
//     nodes      what every node sums up to, a warp each
//     compare    the three values, and how each node pulls, by one block
//     slopes     of the divergences within each cell, a warp each
//     strengths  what a sample's hardest negative has of the gradient
//     gradient   a block has a tile of samples and a share of the tiles that these meet: weights times samples
//     finish     what the shares have left, added up in order
//
// Pairs meet in their cells in an order that nobody knows: what they add are whole numbers, multiples of 2^-bits. All
// other sums have an order that depends on the shape and the device alone: the same bits every time. Nodes and slopes
// are summed in float64, products in float32.
#ifndef PYKD_KERNELS_DISTRIBUTION_DISTILLATION_DISTRIBUTION_DISTILLATION_KERNELS_CUH_
#define PYKD_KERNELS_DISTRIBUTION_DISTILLATION_DISTRIBUTION_DISTILLATION_KERNELS_CUH_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/device_facts.h"
#include "kernels/cuda/gpu.cuh"
#include "kernels/cuda/layout.h"
#include "kernels/cuda/tiles.cuh"
#include "kernels/distribution_distillation/distribution_distillation_grid.h"

namespace pykd::kernels::ddl {

using namespace gpu::tiles;

enum Side { kOfStudent, kOfTeacher, kSides };

constexpr int kPowers = static_cast<int>(kMoments);
constexpr int kWarps = kThreads / gpu::kWarp;
constexpr std::int64_t kMostSamples = 1 << 17;

// Sums of whole numbers.
struct Totals {
  std::int64_t unsound;              // rows
  std::int64_t positives;            // pairs
  std::int64_t sum[kSides][kSorts];  // of similarities, in units of 2^-bits
};

struct Problem {
  explicit Problem(const Grid& its_grid) : grid(its_grid) {}

  Grid grid;
  const float* rows[kSides] = {};         // [n, d], as given
  const std::int64_t* labels = nullptr;   // [n]
  const float* weights[kSorts + 1] = {};  // of the values in the gradient; null: 0
  float* values[kSorts + 1] = {};         // null: not wanted
  float* gradient = nullptr;              // likewise
  std::int64_t n = 0, d = 0;
  std::int64_t padded_n = 0, padded_d = 0;
  int tiles = 0;   // of a side
  int shares = 1;  // of a tile's meetings
  int mining = kHardest;
  int bits = 0;
  Side side = kOfTeacher;  // of tiles and hardest

  Totals* totals = nullptr;
  std::int64_t* cells = nullptr;  // [kSides, kSorts, kPowers, cells]: in units of 2^-bits
  float* padded[kSides] = {};     // [padded_n, padded_d]
  float* similarities = nullptr;  // [padded_n, padded_n]: of the teacher, then of the student
  float* hardest = nullptr;       // [n]: similarity; likewise
  float* share = nullptr;         // [n]: of each sample that is so similar; in the end, of the gradient
  double* logs = nullptr;         // [kSides, kSorts, bins]
  double* scaled = nullptr;       // [kSorts, bins]: the student's nodes, relative to their nearest cell; then pulls
  float* nearest = nullptr;       // [kSorts, bins]: its centre
  float* slopes = nullptr;        // [kSorts, cells, kPowers]
  float* parts = nullptr;         // [shares, padded_n, padded_d]: of the gradient
};

// As many bits as all pairs of n samples together leave of 63.
inline int bits_of(std::int64_t n) {
  int bits = 40;
  while (bits > 0 && n * n / 2 >= std::int64_t{1} << (61 - bits)) --bits;
  return bits;
}

// Lays the scratch memory of a call out from `memory` on; returns how many bytes it takes.
inline std::size_t lay_out(Problem& p, unsigned char* memory) {
  gpu::Layout layout(memory);
  const auto cells = static_cast<std::int64_t>(p.grid.cells), bins = static_cast<std::int64_t>(p.grid.bins);
  p.tiles = static_cast<int>(gpu::divide_up(p.n, kTile));
  p.padded_n = static_cast<std::int64_t>(p.tiles) * kTile;
  p.padded_d = gpu::divide_up(p.d, kTile) * kTile;
  p.bits = bits_of(p.n);
  layout.take(p.totals, 1);
  layout.take(p.cells, kSides * kSorts * kPowers * cells);
  for (float*& padded : p.padded) layout.take(padded, p.padded_n * p.padded_d);
  layout.take(p.similarities, p.padded_n * p.padded_n);
  layout.take(p.hardest, p.n);
  layout.take(p.share, p.n);
  layout.take(p.logs, kSides * kSorts * bins);
  layout.take(p.scaled, kSorts * bins);
  layout.take(p.nearest, kSorts * bins);
  if (p.gradient != nullptr) {
    layout.take(p.slopes, kSorts * cells * kPowers);
    layout.take(p.parts, p.shares * p.padded_n * p.padded_d);
  }
  return layout.bytes();
}

// ---- What the launches have found out ------------------------------------------------------------------------

PYKD_GPU bool sound(const Problem& p) { return p.totals->unsound == 0; }

PYKD_GPU double count_of(const Problem& p, int sort) {
  const std::int64_t positives = p.totals->positives, others = p.n * (p.n - 1) / 2 - positives;
  if (sort == kPositives) return static_cast<double>(positives);
  return static_cast<double>(p.mining == kHardest && others > 0 ? p.n : others);
}
PYKD_GPU double weight_of(const Problem& p, int value) {
  return p.weights[value] == nullptr ? 0.0 : static_cast<double>(*p.weights[value]);
}
// Of a divergence in the gradient, and of the order, on every pair of the sort.
PYKD_GPU double weight_of_sort(const Problem& p, int sort) { return count_of(p, sort) > 0 ? weight_of(p, sort) : 0.0; }
PYKD_GPU double pull_of_sort(const Problem& p, int sort) {
  const double count = count_of(p, sort);
  return count > 0 ? (sort == kPositives ? -2.0 : 2.0) * weight_of(p, kSorts) / count : 0.0;
}
// Whether the gradient is anything but 0.
PYKD_GPU bool moves(const Problem& p) {
  bool any = false;
  for (int sort = 0; sort < kSorts; ++sort) any |= weight_of_sort(p, sort) != 0 || pull_of_sort(p, sort) != 0;
  return any;
}

// ---- Cells ---------------------------------------------------------------------------------------------------

// Where a similarity lies.
struct Place {
  int cell;
  float u;      // in the cell, from -1 to 1
  float decay;  // exp(-gamma d^2), by its series: gamma d^2 <= 1e-3
};

PYKD_GPU Place place(const Grid& grid, float s) {
  const float scaled = s / grid.cell;  // exact: a power of two
  int below = static_cast<int>(scaled);
  if (static_cast<float>(below) > scaled) --below;
  const float u = 2.0f * (scaled - static_cast<float>(below)) - 1.0f;
  const float z = u * u * static_cast<float>(grid.gamma * grid.half * grid.half);
  return {below + grid.first, u, 1.0f - z + 0.5f * z * z};
}

PYKD_GPU std::int64_t* cells_of(const Problem& p, int side, int sort) {
  return p.cells + (side * kSorts + sort) * kPowers * static_cast<std::int64_t>(p.grid.cells);
}

// 2^bits.
PYKD_GPU double units(const Problem& p) { return static_cast<double>(std::int64_t{1} << p.bits); }

PYKD_GPU void add_pair(const Problem& p, int sort, float s) {
  const Place at = place(p.grid, s);
  std::int64_t* to = cells_of(p, p.side, sort) + at.cell;
  const auto u = static_cast<double>(at.u);
  double power = static_cast<double>(at.decay) * units(p);
  PYKD_GPU_UNROLL
  for (int m = 0; m < kPowers; ++m) {
    gpu::add(to + m * static_cast<std::int64_t>(p.grid.cells), gpu::nearest_int64(power));
    power *= u;
  }
}

// The slope of a sort's divergence with respect to a similarity.
PYKD_GPU float slope_at(const Problem& p, int sort, float s) {
  const Place at = place(p.grid, s);
  const float* from = p.slopes + (sort * static_cast<std::int64_t>(p.grid.cells) + at.cell) * kPowers;
  float slope = from[kPowers - 1];
  PYKD_GPU_UNROLL
  for (int m = kPowers - 2; m >= 0; --m) slope = gpu::fma(slope, at.u, from[m]);
  return slope * at.decay;
}

// ---- Clear: a thread has a cell of a sort of a side -------------------------------------------------------------

PYKD_GPU_KERNEL(kThreads, 2)
clear_kernel(Problem p) {
  const std::int64_t at = static_cast<std::int64_t>(gpu::block()) * kThreads + gpu::thread();
  const std::int64_t count = kSides * kSorts * static_cast<std::int64_t>(p.grid.cells);
  if (at == 0) *p.totals = Totals{};
  if (at >= count) return;
  PYKD_GPU_UNROLL
  for (int m = 0; m < kPowers; ++m) p.cells[m * count + at] = 0;
}

// ---- Rows: a warp has one of either side -----------------------------------------------------------------------

PYKD_GPU_KERNEL(kThreads, 2)
rows_kernel(Problem p) {
  const unsigned lane = gpu::thread() % gpu::kWarp, warp = gpu::thread() / gpu::kWarp;
  const std::int64_t index = static_cast<std::int64_t>(gpu::block()) * kWarps + warp;
  if (index >= kSides * p.padded_n) return;  // all of the warp
  const int side = static_cast<int>(index / p.padded_n);
  const std::int64_t row = index % p.padded_n;
  double squared = 0.0;
  PYKD_GPU_NO_UNROLL
  for (std::int64_t k = lane; k < p.padded_d; k += gpu::kWarp) {
    const float entry = row < p.n && k < p.d ? p.rows[side][row * p.d + k] : 0.0f;
    squared += static_cast<double>(entry) * static_cast<double>(entry);
    p.padded[side][row * p.padded_d + k] = entry;
  }
  squared = sum_of_warp(squared);
  if (lane == 0 && !(squared <= kLongest)) gpu::add(&p.totals->unsound, 1);
}

// ---- Tiles: grid of tiles * tiles blocks, of which those on and above the diagonal work; kSharedBytes -----------

PYKD_GPU_KERNEL(kThreads, 2)
tiles_kernel(Problem p) {
  auto* shared = reinterpret_cast<float*>(gpu::shared_memory());
  const int i = static_cast<int>(gpu::block()) / p.tiles, j = static_cast<int>(gpu::block()) % p.tiles;
  if (j < i) return;  // all of the block
  const bool adds = sound(p);
  const int mine = static_cast<int>(gpu::thread());
  const std::int64_t row = static_cast<std::int64_t>(i) * kTile + mine / kAcross * kOwn;
  const std::int64_t column = static_cast<std::int64_t>(j) * kTile + mine % kAcross * kOwn;
  float s[kOwn][kOwn];
  multiply(p.padded_d, p.padded[p.side], i, p.padded[p.side], j, shared, s);
  double positives = 0.0, sum[kSorts] = {};
  PYKD_GPU_UNROLL
  for (int r = 0; r < kOwn; ++r) {
    gpu::store(p.similarities + (row + r) * p.padded_n + column, gpu::Float32::pack(s[r]));
    PYKD_GPU_UNROLL
    for (int c = 0; c < kOwn; ++c) {
      if (column + c >= p.n || row + r >= column + c) continue;
      const bool same = p.labels[row + r] == p.labels[column + c];
      positives += same ? 1.0 : 0.0;
      if (!adds || (!same && p.mining == kHardest)) continue;
      add_pair(p, same ? kPositives : kNegativePairs, s[r][c]);
      sum[kPositives] += same ? static_cast<double>(s[r][c]) : 0.0;
      sum[kNegativePairs] += same ? 0.0 : static_cast<double>(s[r][c]);
    }
  }
  if (i != j) {
    PYKD_GPU_UNROLL
    for (int c = 0; c < kOwn; ++c) {
      const float down[kOwn] = {s[0][c], s[1][c], s[2][c], s[3][c]};
      gpu::store(p.similarities + (column + c) * p.padded_n + row, gpu::Float32::pack(down));
    }
  }
  auto* room = reinterpret_cast<double*>(shared);
  positives = sum_of_block(positives, room);
  sum[kPositives] = sum_of_block(sum[kPositives], room);
  sum[kNegativePairs] = sum_of_block(sum[kNegativePairs], room);
  if (mine != 0) return;
  if (p.side == kOfStudent) gpu::add(&p.totals->positives, gpu::nearest_int64(positives));
  PYKD_GPU_UNROLL
  for (int sort = 0; sort < kSorts; ++sort) {
    gpu::add(&p.totals->sum[p.side][sort], gpu::nearest_int64(sum[sort] * units(p)));
  }
}

// ---- Hardest: a warp has a sample ------------------------------------------------------------------------------

PYKD_GPU_KERNEL(kThreads, 2)
hardest_kernel(Problem p) {
  const unsigned lane = gpu::thread() % gpu::kWarp, warp = gpu::thread() / gpu::kWarp;
  const std::int64_t row = static_cast<std::int64_t>(gpu::block()) * kWarps + warp;
  if (row >= p.n || !sound(p)) return;  // all of the warp
  const float* s = p.similarities + row * p.padded_n;
  const std::int64_t label = p.labels[row];
  float largest = -gpu::infinity();
  PYKD_GPU_NO_UNROLL
  for (std::int64_t j = lane; j < p.n; j += gpu::kWarp) {
    if (p.labels[j] != label) largest = gpu::max(largest, s[j]);
  }
  PYKD_GPU_NO_UNROLL
  for (int mask = gpu::kWarp / 2; mask > 0; mask /= 2) largest = gpu::max(largest, gpu::shuffle_xor(largest, mask));
  double ties = 0.0;
  PYKD_GPU_NO_UNROLL
  for (std::int64_t j = lane; j < p.n; j += gpu::kWarp) {
    ties += p.labels[j] != label && s[j] == largest ? 1.0 : 0.0;
  }
  ties = sum_of_warp(ties);
  if (lane != 0 || ties == 0.0) return;
  p.hardest[row] = largest;
  p.share[row] = static_cast<float>(1.0 / ties);
  add_pair(p, kNegativePairs, largest);
  gpu::add(&p.totals->sum[p.side][kNegativePairs], gpu::nearest_int64(static_cast<double>(largest) * units(p)));
}

// ---- Nodes: a warp has one of a sort of a side ------------------------------------------------------------------

PYKD_GPU_KERNEL(kThreads, 2)
nodes_kernel(Problem p) {
  const unsigned lane = gpu::thread() % gpu::kWarp, warp = gpu::thread() / gpu::kWarp;
  const std::int64_t index = static_cast<std::int64_t>(gpu::block()) * kWarps + warp;
  const auto bins = static_cast<std::int64_t>(p.grid.bins);
  if (index >= kSides * kSorts * bins) return;  // all of the warp
  const int side = static_cast<int>(index / bins) / kSorts, sort = static_cast<int>(index / bins) % kSorts;
  if (!sound(p) || count_of(p, sort) == 0) return;
  const std::int64_t r = index % bins;
  const double node = p.grid.node(static_cast<std::size_t>(r)), gamma = p.grid.gamma;
  const std::int64_t* cells = cells_of(p, side, sort);
  const auto count = static_cast<std::int64_t>(p.grid.cells);

  double nearest = 8.0;  // further than any
  const auto closer = [&](double centre) {
    const double now = nearest < node ? node - nearest : nearest - node;
    const double then = centre < node ? node - centre : centre - node;
    if (then < now || (then == now && centre < nearest)) nearest = centre;
  };
  PYKD_GPU_NO_UNROLL
  for (std::int64_t i = lane; i < count; i += gpu::kWarp) {
    if (cells[i] > 0) closer(static_cast<double>(p.grid.centre(static_cast<std::size_t>(i))));
  }
  PYKD_GPU_NO_UNROLL
  for (int mask = gpu::kWarp / 2; mask > 0; mask /= 2) closer(gpu::shuffle_xor(nearest, mask));

  const double slope = -2.0 * gamma * static_cast<double>(p.grid.half);
  double sum = 0.0;
  PYKD_GPU_NO_UNROLL
  for (std::int64_t i = lane; i < count; i += gpu::kWarp) {
    if (cells[i] == 0) continue;
    const auto centre = static_cast<double>(p.grid.centre(static_cast<std::size_t>(i)));
    const double away = centre - node;
    const double exponent = gamma * (centre - nearest) * (away + (nearest - node));
    if (exponent > kNegligible) continue;
    double series = 0.0;
    PYKD_GPU_NO_UNROLL
    for (int m = kPowers - 1; m >= 0; --m) {
      series = static_cast<double>(cells[m * count + i]) + series * (slope * away / static_cast<double>(m + 1));
    }
    sum += gpu::exp(-exponent) * series;
  }
  sum = sum_of_warp(sum) / units(p);
  if (lane != 0) return;
  p.logs[index] = gpu::log(sum) - gamma * (nearest - node) * (nearest - node);
  if (side != kOfStudent) return;
  p.scaled[sort * bins + r] = sum;
  p.nearest[sort * bins + r] = static_cast<float>(nearest);
}

// ---- Compare: one block; room for a double per warp --------------------------------------------------------------

// The logarithm of what all nodes sum up to.
PYKD_GPU double log_total(const double* logs, std::int64_t bins, double* room) {
  double largest = logs[0], sum = 0.0;
  PYKD_GPU_NO_UNROLL
  for (std::int64_t r = gpu::thread(); r < bins; r += kThreads) largest = logs[r] > largest ? logs[r] : largest;
  largest = largest_of_block(largest, room);
  PYKD_GPU_NO_UNROLL
  for (std::int64_t r = gpu::thread(); r < bins; r += kThreads) sum += gpu::exp(logs[r] - largest);
  return largest + gpu::log(sum_of_block(sum, room));
}

PYKD_GPU_KERNEL(kThreads, 1)
compare_kernel(Problem p) {
  auto* room = reinterpret_cast<double*>(gpu::shared_memory());
  const bool right = sound(p), first = gpu::thread() == 0;
  const auto bins = static_cast<std::int64_t>(p.grid.bins);
  const auto not_a_number = static_cast<double>(gpu::nan());
  double order = 0.0;
  PYKD_GPU_NO_UNROLL
  for (int sort = 0; sort < kSorts; ++sort) {
    const double count = count_of(p, sort);
    double divergence = 0.0;
    if (count > 0 && right) {
      const double* teacher = p.logs + (kOfTeacher * kSorts + sort) * bins;
      const double* student = p.logs + (kOfStudent * kSorts + sort) * bins;
      const double of_teacher = log_total(teacher, bins, room), of_student = log_total(student, bins, room);
      PYKD_GPU_NO_UNROLL
      for (std::int64_t r = gpu::thread(); r < bins; r += kThreads) {
        const double log_p = teacher[r] - of_teacher, log_q = student[r] - of_student, wanted = gpu::exp(log_p);
        divergence += wanted * (log_p - log_q);
        double& scaled = p.scaled[sort * bins + r];
        scaled = (gpu::exp(log_q) - wanted) / scaled;
      }
      divergence = sum_of_block(divergence, room);
      const auto sum = static_cast<double>(p.totals->sum[kOfStudent][sort] + p.totals->sum[kOfTeacher][sort]);
      order += (sort == kPositives ? -2.0 : 2.0) * sum / units(p) / count;
    } else if (count > 0) {
      divergence = order = not_a_number;
    }
    if (first && p.values[sort] != nullptr) *p.values[sort] = static_cast<float>(divergence);
  }
  if (first && p.values[kSorts] != nullptr) *p.values[kSorts] = static_cast<float>(order);
}

// ---- Slopes: a warp has a cell of a sort ---------------------------------------------------------------------------

// One after the other in a lane's registers: shuffled at once.
struct Powers {
  double of[kPowers];
};

PYKD_GPU_KERNEL(kThreads, 1)
slopes_kernel(Problem p) {
  const unsigned lane = gpu::thread() % gpu::kWarp, warp = gpu::thread() / gpu::kWarp;
  const std::int64_t index = static_cast<std::int64_t>(gpu::block()) * kWarps + warp;
  const auto count = static_cast<std::int64_t>(p.grid.cells), bins = static_cast<std::int64_t>(p.grid.bins);
  if (index >= kSorts * count || !sound(p)) return;  // all of the warp
  const int sort = static_cast<int>(index / count);
  const std::int64_t cell = index % count;
  const double weight = weight_of_sort(p, sort);
  if (weight == 0.0 || cells_of(p, kOfStudent, sort)[cell] == 0) return;
  const double gamma = p.grid.gamma, half = static_cast<double>(p.grid.half);
  const auto centre = static_cast<double>(p.grid.centre(static_cast<std::size_t>(cell)));
  Powers sums = {};  // of part y^m
  double last = 0.0;
  PYKD_GPU_NO_UNROLL
  for (std::int64_t r = lane; r < bins; r += gpu::kWarp) {
    const double node = p.grid.node(static_cast<std::size_t>(r)), away = centre - node;
    const auto nearest = static_cast<double>(p.nearest[sort * bins + r]);
    const double exponent = gamma * (centre - nearest) * (away + (nearest - node));
    if (exponent > kNegligible) continue;
    double part = gpu::exp(-exponent) * p.scaled[sort * bins + r];
    const double y = -2.0 * gamma * half * away;
    PYKD_GPU_UNROLL
    for (int m = 0; m < kPowers; ++m) {
      sums.of[m] += part;
      part *= y;
    }
    last += part;
  }
  PYKD_GPU_NO_UNROLL
  for (int mask = gpu::kWarp / 2; mask > 0; mask /= 2) {
    const Powers others = gpu::shuffle_xor(sums, mask);
    PYKD_GPU_UNROLL
    for (int m = 0; m < kPowers; ++m) sums.of[m] += others.of[m];
  }
  last = sum_of_warp(last);
  if (lane != 0) return;
  // d/ds of exp(-gamma d^2) u^m / m!: the power's slope, and the bell's.
  float* to = p.slopes + index * kPowers;
  double factorial = 1.0, before = 0.0;
  PYKD_GPU_UNROLL
  for (int m = 0; m < kPowers; ++m) {
    const double after = m + 1 < kPowers ? sums.of[(m + 1) % kPowers] : last;
    if (m > 0) factorial *= static_cast<double>(m);
    const double bell = m > 0 ? 2.0 * gamma * half * before * static_cast<double>(m) : 0.0;
    to[m] = static_cast<float>(weight * (after / half - bell) / factorial);
    before = sums.of[m];
  }
}

// ---- Strengths: a thread has a sample ------------------------------------------------------------------------------

PYKD_GPU_KERNEL(kThreads, 2)
strengths_kernel(Problem p) {
  const std::int64_t row = static_cast<std::int64_t>(gpu::block()) * kThreads + gpu::thread();
  if (row >= p.n || !sound(p) || count_of(p, kNegativePairs) == 0) return;
  auto strength = static_cast<float>(pull_of_sort(p, kNegativePairs));
  if (weight_of_sort(p, kNegativePairs) != 0) strength += slope_at(p, kNegativePairs, p.hardest[row]);
  p.share[row] *= strength;
}

// ---- Gradient: grid of tiles * shares blocks; kSharedBytes
// ------------------------------------------------------------

PYKD_GPU_KERNEL(kThreads, 2)
gradient_kernel(Problem p) {
  if (!sound(p) || !moves(p)) return;  // all of the grid
  auto* shared = reinterpret_cast<float*>(gpu::shared_memory());
  float* weights = shared + kTile * kTile;  // [column, row]
  const int share = static_cast<int>(gpu::block()) % p.shares, i = static_cast<int>(gpu::block()) / p.shares;
  const int mine = static_cast<int>(gpu::thread());
  const int tile_row = mine / kAcross * kOwn, tile_column = mine % kAcross * kOwn;
  const std::int64_t row = static_cast<std::int64_t>(i) * kTile + tile_row;
  const bool compares_positives = weight_of_sort(p, kPositives) != 0;
  const bool compares_negatives = weight_of_sort(p, kNegativePairs) != 0;
  const auto positive_pull = static_cast<float>(pull_of_sort(p, kPositives));
  const auto negative_pull = static_cast<float>(pull_of_sort(p, kNegativePairs));
  float* part = p.parts + share * p.padded_n * p.padded_d;
  const int each = (p.tiles + p.shares - 1) / p.shares;
  const int begin = share * each, end = begin + each < p.tiles ? begin + each : p.tiles;
  PYKD_GPU_NO_UNROLL
  for (int j = begin; j < end; ++j) {
    const std::int64_t column = static_cast<std::int64_t>(j) * kTile + tile_column;
    float w[kOwn][kOwn];
    PYKD_GPU_UNROLL
    for (int r = 0; r < kOwn; ++r) {
      load_floats(p.similarities + (row + r) * p.padded_n + column, w[r]);
      PYKD_GPU_UNROLL
      for (int c = 0; c < kOwn; ++c) {
        const float s = w[r][c];
        w[r][c] = 0.0f;
        if (row + r >= p.n || column + c >= p.n || row + r == column + c) continue;
        const bool same = p.labels[row + r] == p.labels[column + c];
        if (!same && p.mining == kHardest) {
          // Hardest of the row, or the row the hardest of theirs.
          if (s == p.hardest[row + r]) w[r][c] += p.share[row + r];
          if (s == p.hardest[column + c]) w[r][c] += p.share[column + c];
        } else {
          w[r][c] = same ? positive_pull : negative_pull;
          if (same ? compares_positives : compares_negatives) {
            w[r][c] += slope_at(p, same ? kPositives : kNegativePairs, s);
          }
        }
      }
    }
    gpu::block_barrier();  // the last weights have been read
    PYKD_GPU_UNROLL
    for (int c = 0; c < kOwn; ++c) {
      const float down[kOwn] = {w[0][c], w[1][c], w[2][c], w[3][c]};
      gpu::store(weights + (tile_column + c) * kTile + tile_row, gpu::Float32::pack(down));
    }
    accumulate(p.padded_d, p.padded[kOfStudent], i, j, weights, shared, part, j == begin);
  }
  if (begin >= end) clear(p.padded_d, i, part);
}

// ---- The end: a block has a row of the gradient --------------------------------------------------------------------

PYKD_GPU_KERNEL(kThreads, 2)
finish_kernel(Problem p) {
  const bool any = moves(p), right = sound(p);
  const std::int64_t row = gpu::block();
  PYKD_GPU_NO_UNROLL
  for (std::int64_t k = gpu::thread(); k < p.d; k += kThreads) {
    float sum = 0.0f;
    for (int share = 0; share < p.shares && any && right; ++share) {
      sum += p.parts[(share * p.padded_n + row) * p.padded_d + k];
    }
    p.gradient[row * p.d + k] = !any || right ? sum : gpu::nan();
  }
}

// launch(kernel, blocks, bytes of shared memory, problem), one after the other.
template <class Launch>
void launch_all(const Problem& p, const Launch& launch) {
  const auto cells = static_cast<std::int64_t>(p.grid.cells), bins = static_cast<std::int64_t>(p.grid.bins);
  const bool hardest = p.mining == kHardest;
  launch(clear_kernel, gpu::divide_up(kSides * kSorts * cells, kThreads), 0, p);
  launch(rows_kernel, gpu::divide_up(kSides * p.padded_n, kWarps), 0, p);
  for (const Side side : {kOfTeacher, kOfStudent}) {  // the student's similarities stay
    Problem of_side = p;
    of_side.side = side;
    launch(tiles_kernel, static_cast<std::int64_t>(p.tiles) * p.tiles, kSharedBytes, of_side);
    if (hardest) launch(hardest_kernel, gpu::divide_up(p.n, kWarps), 0, of_side);
  }
  launch(nodes_kernel, gpu::divide_up(kSides * kSorts * bins, kWarps), 0, p);
  launch(compare_kernel, 1, kWarps * static_cast<int>(sizeof(double)), p);
  if (p.gradient == nullptr) return;
  launch(slopes_kernel, gpu::divide_up(kSorts * cells, kWarps), 0, p);
  if (hardest) launch(strengths_kernel, gpu::divide_up(p.n, kThreads), 0, p);
  launch(gradient_kernel, static_cast<std::int64_t>(p.tiles) * p.shares, kSharedBytes, p);
  launch(finish_kernel, p.n, 0, p);
}

}  // namespace pykd::kernels::ddl

#endif  // PYKD_KERNELS_DISTRIBUTION_DISTILLATION_DISTRIBUTION_DISTILLATION_KERNELS_CUH_
