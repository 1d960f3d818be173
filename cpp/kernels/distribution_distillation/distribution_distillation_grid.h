// File: kernels/distribution_distillation/distribution_distillation_grid.h
//
// The nodes and cells of distribution_distillation (see there): on the CPU and on a GPU.
#ifndef PYKD_KERNELS_DISTRIBUTION_DISTILLATION_DISTRIBUTION_DISTILLATION_GRID_H_
#define PYKD_KERNELS_DISTRIBUTION_DISTILLATION_DISTRIBUTION_DISTILLATION_GRID_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "kernels/cuda/qualifiers.h"

namespace pykd::kernels::ddl {

// The places of a Call's arguments, in the order of the description.
enum Input { kStudent, kTeacher, kLabels, kPositiveWeight, kNegativeWeight, kOrderWeight };
enum Output { kPositive, kNegative, kOrder, kGradStudent };
enum AttributeIndex { kBins, kWidth, kNegatives };
enum Mining { kHardest, kAll };
enum Sort { kPositives, kNegativePairs, kSorts };

constexpr std::size_t kMoments = 8;
constexpr double kLargestExponent = 0.5;  // |y| of the series, see the header
constexpr double kLongest = 1.001;        // squared length of a row
constexpr double kReach = 1.002;          // no similarity is beyond
constexpr double kNegligible = 40.0;      // nats below the nearest cell

// Nodes and cells. A cell's width is a power of two: where a similarity lies in its cell is then exact in float32.
struct Grid {
  Grid(std::size_t bins_, double width) : bins(bins_), gamma(0.5 / (width * width)) {
    const double widest = std::min(kLargestExponent / (2 * kReach * gamma), 1.0 / 64);
    cell = static_cast<float>(std::exp2(std::floor(std::log2(widest))));
    half = cell / 2;
    first = static_cast<std::int32_t>(std::ceil(kReach / cell)) + 1;
    cells = 2 * static_cast<std::size_t>(first);
  }

  PYKD_GPU_AND_HOST double node(std::size_t r) const {
    return -1.0 + 2.0 * static_cast<double>(r) / static_cast<double>(bins - 1);
  }
  PYKD_GPU_AND_HOST float centre(std::size_t index) const {
    return (static_cast<float>(static_cast<std::int32_t>(index) - first) + 0.5f) * cell;
  }

  std::size_t bins, cells;
  double gamma;
  float cell, half;
  std::int32_t first;  // cells left of 0
};

}  // namespace pykd::kernels::ddl

#endif  // PYKD_KERNELS_DISTRIBUTION_DISTILLATION_DISTRIBUTION_DISTILLATION_GRID_H_
