#include "kernels/distribution_distillation/distribution_distillation.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/distribution_distillation/distribution_distillation.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/distribution_distillation/distribution_distillation_grid.h"
#include "kernels/host/memory.h"
#include "kernels/simd/math-inl.h"
#include "kernels/simd/product-inl.h"

// ---- What does not depend on the instruction set -------------------------------------------------
#ifndef PYKD_KERNELS_DISTRIBUTION_DISTILLATION_ONCE_
#define PYKD_KERNELS_DISTRIBUTION_DISTILLATION_ONCE_

namespace pykd::kernels {
namespace ddl {

constexpr std::size_t kBlock = 48;   // rows of a task: what they need of a product stays in the level-2 cache
constexpr double kNarrowest = 0.01;  // width
constexpr double kMostBins = 1 << 24;
constexpr std::size_t kMostTasks = 64;           // that sum pairs into cells of their own,
constexpr std::size_t kCellsOfAllTasks = 32768;  // and how many cells they have together, if one has no more
constexpr std::size_t kNodesOfTask = 64;
constexpr double kSerial = 4e6;  // N^2 D below which threads cost more than they bring

constexpr double kFactorial[kMoments + 1] = {1, 1, 2, 6, 24, 120, 720, 5040, 40320};

inline std::size_t round_up(std::size_t n, std::size_t step) { return (n + step - 1) / step * step; }

// For vectors that begin on a cache line.
template <class T>
struct OnLines {
  using value_type = T;
  OnLines() = default;
  template <class U>
  explicit OnLines(const OnLines<U>& /*other*/) {}
  T* allocate(std::size_t count) { return static_cast<T*>(::operator new (count * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* data, std::size_t /*count*/) { ::operator delete (data, std::align_val_t{64}); }
  bool operator==(const OnLines& /*other*/) const { return true; }
  bool operator!=(const OnLines& /*other*/) const { return false; }
};

// The pairs of one sort in one batch: how many, their sum, and what they add to every cell.
struct Pairs {
  explicit Pairs(const Grid& grid) : moments(grid.cells * kMoments) {}

  double mean(double count) const { return count > 0 ? sum / count : 0.0; }

  double sum = 0.0;
  std::vector<double, OnLines<double>> moments;  // cell, power
};

// The cells that hold pairs, side by side; a whole number of vectors, the last cell repeated with coefficients 0.
struct Occupied {
  Occupied(const Grid& grid, const Pairs& pairs, std::size_t lanes) {
    for (std::size_t i = 0; i < grid.cells; ++i) {
      if (pairs.moments[i * kMoments] > 0) index.push_back(i);
    }
    count = index.size();
    stride = round_up(count, lanes);
    centre.resize(stride);
    series.resize(stride * kMoments);
    for (std::size_t i = 0; i < stride; ++i) {
      const std::size_t from = index[std::min(i, count - 1)];
      centre[i] = grid.centre(from);
      for (std::size_t m = 0; m < kMoments && i < count; ++m) {
        series[m * stride + i] = static_cast<float>(pairs.moments[from * kMoments + m] / kFactorial[m]);
      }
    }
  }

  std::size_t count = 0, stride = 0;
  std::vector<std::size_t> index;
  std::vector<float> centre;
  std::vector<float> series;  // power, cell
};

// What every node sums up to: log is of the sum itself, scaled is relative to the nearest cell.
struct Histogram {
  explicit Histogram(std::size_t bins) : log(bins), scaled(bins), nearest(bins), begin(bins), end(bins) {}

  // Turns `log` into logarithms of probabilities.
  void normalise() {
    const double largest = *std::max_element(log.begin(), log.end());
    double sum = 0.0;
    for (const double value : log) sum += std::exp(value - largest);
    const double total = largest + std::log(sum);
    for (double& value : log) value -= total;
  }

  std::vector<double> log;
  std::vector<float> scaled;
  std::vector<float> nearest;             // its centre
  std::vector<std::uint32_t> begin, end;  // the cells that count
};

inline double divergence(const Histogram& p, const Histogram& q) {
  double sum = 0.0;
  for (std::size_t r = 0; r < p.log.size(); ++r) sum += std::exp(p.log[r]) * (p.log[r] - q.log[r]);
  return sum;
}

// Labels as 0, 1, 2 …; -1 from the last sample up to `length`.
inline std::vector<std::int32_t> identities(const std::int64_t* labels, std::size_t n, std::size_t length) {
  std::vector<std::uint32_t> order(n);
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) { return labels[a] < labels[b]; });
  std::vector<std::int32_t> ids(length, -1);
  std::int32_t id = 0;
  for (std::size_t i = 0; i < n; ++i) {
    if (i > 0 && labels[order[i]] != labels[order[i - 1]]) ++id;
    ids[order[i]] = id;
  }
  return ids;
}

// Ordered pairs of distinct samples of one identity, halved.
inline double count_positives(const std::vector<std::int32_t>& ids) {
  std::vector<double> sizes(ids.size());
  for (const std::int32_t id : ids) {
    if (id >= 0) ++sizes[static_cast<std::size_t>(id)];
  }
  double count = 0;
  for (const double size : sizes) count += size * (size - 1) / 2;
  return count;
}

}  // namespace ddl
}  // namespace pykd::kernels

#endif  // PYKD_KERNELS_DISTRIBUTION_DISTILLATION_ONCE_

// ---- Once per instruction set --------------------------------------------------------------------
HWY_BEFORE_NAMESPACE();
namespace pykd::kernels::HWY_NAMESPACE {
namespace distribution_distillation_detail {

using namespace ddl;
namespace hn = hwy::HWY_NAMESPACE;

using D32 = hn::ScalableTag<float>;
using V32 = hn::Vec<D32>;
using M32 = hn::Mask<D32>;
using DInt = hn::RebindToSigned<D32>;
using VInt = hn::Vec<DInt>;

HWY_INLINE std::size_t lanes() { return hn::Lanes(D32()); }
static_assert(kBlock % kProductRows == 0, "a block is a whole number of strips");
constexpr std::size_t kStrips = kBlock / kProductRows;

// ---- Cells ---------------------------------------------------------------------------------------

// Where similarities lie: the cell's index, u in it, and decay = exp(-gamma d^2), by its series: gamma d^2 <= 1e-3.
HWY_INLINE void place(const Grid& grid, V32 s, VInt& index, V32& u, V32& decay) {
  const D32 d;
  const DInt di;
  const V32 below = hn::Floor(hn::Mul(s, hn::Set(d, 1.0f / grid.cell)));
  const V32 centre = hn::Mul(hn::Add(below, hn::Set(d, 0.5f)), hn::Set(d, grid.cell));
  u = hn::Mul(hn::Sub(s, centre), hn::Set(d, 1.0f / grid.half));
  const V32 z = hn::Mul(hn::Mul(u, u), hn::Set(d, static_cast<float>(grid.gamma * grid.half * grid.half)));
  decay = hn::Add(hn::Sub(hn::Set(d, 1.0f), z), hn::Mul(hn::Mul(z, z), hn::Set(d, 0.5f)));
  index = hn::Add(hn::ConvertTo(di, below), hn::Set(di, grid.first));
}

// Adds decay u^m, m = 0 … 7.
HWY_INLINE void add_powers(double u, double decay, double* HWY_RESTRICT to) {
  const hn::CappedTag<double, kMoments> d;
  using V = hn::Vec<decltype(d)>;
  const hn::RebindToSigned<decltype(d)> di;
  const std::size_t n = hn::Lanes(d);
  const V one = hn::Set(d, 1.0), u1 = hn::Set(d, u), u2 = hn::Set(d, u * u), u4 = hn::Mul(u2, u2);
  const auto lane = hn::Iota(di, 0);
  const auto bit0 = hn::RebindMask(d, hn::TestBit(lane, hn::Set(di, 1)));
  const auto bit1 = hn::RebindMask(d, hn::TestBit(lane, hn::Set(di, 2)));
  const auto bit2 = hn::RebindMask(d, hn::TestBit(lane, hn::Set(di, 4)));
  V power = hn::Mul(hn::Set(d, decay), hn::IfThenElse(bit0, u1, one));
  power = hn::Mul(power, hn::IfThenElse(bit1, u2, one));
  power = hn::Mul(power, hn::IfThenElse(bit2, u4, one));
  const V step = n == 1 ? u1 : n == 2 ? u2 : u4;
  for (std::size_t m = 0; m < kMoments; m += n) {
    hn::Store(hn::Add(hn::Load(d, to + m), power), d, to + m);
    power = hn::Mul(power, step);
  }
}

// The nodes [begin, end) of a histogram. A node's cells are summed relative to the nearest one.
HWY_NOINLINE void sum_nodes(const Grid& grid, const Occupied& cells, std::size_t begin, std::size_t end,
                            Histogram& histogram) {
  const D32 d;
  const std::size_t n = hn::Lanes(d);
  const auto first = cells.centre.begin(), last = first + static_cast<std::ptrdiff_t>(cells.count);
  const V32 minus_gamma = hn::Set(d, static_cast<float>(-grid.gamma));
  const V32 slope = hn::Set(d, static_cast<float>(-2 * grid.gamma * grid.half));
  for (std::size_t r = begin; r < end; ++r) {
    const double t = grid.node(r);
    auto near = std::lower_bound(first, last, static_cast<float>(t));
    if (near == last || (near != first && t - double{near[-1]} < double{*near} - t)) --near;
    const double distance = double{*near} - t;
    const double radius = std::sqrt(distance * distance + kNegligible / grid.gamma);
    const auto from = static_cast<std::size_t>(std::lower_bound(first, last, static_cast<float>(t - radius)) - first);
    const auto to = static_cast<std::size_t>(std::upper_bound(first, last, static_cast<float>(t + radius)) - first);
    const V32 node = hn::Set(d, static_cast<float>(t)), nearest = hn::Set(d, *near);
    V32 sum = hn::Zero(d);
    for (std::size_t i = from / n * n; i < to; i += n) {
      const V32 centre = hn::LoadU(d, &cells.centre[i]);
      const V32 away = hn::Sub(centre, node);
      const V32 y = hn::Mul(away, slope);
      const float* series = &cells.series[i];
      V32 p = hn::LoadU(d, series + 7 * cells.stride);
      for (std::size_t m = 7; m-- > 0;) p = hn::MulAdd(p, y, hn::LoadU(d, series + m * cells.stride));
      const V32 exponent = hn::Mul(hn::Sub(centre, nearest), hn::Add(away, hn::Sub(nearest, node)));
      sum = hn::MulAdd(exp(d, hn::Mul(exponent, minus_gamma)), p, sum);
    }
    const float scaled = hn::GetLane(hn::SumOfLanes(d, sum));
    histogram.log[r] = std::log(double{scaled}) - grid.gamma * distance * distance;
    histogram.scaled[r] = scaled;
    histogram.nearest[r] = *near;
    histogram.begin[r] = static_cast<std::uint32_t>(from);
    histogram.end[r] = static_cast<std::uint32_t>(to);
  }
}

// For one vector of cells, from `at` on: the polynomials in u that are, times exp(-gamma d^2), the slope of
// sum over r of pull_r K(s - t_r). `pull` is relative to the node's nearest cell, as Histogram::scaled.
HWY_NOINLINE void sum_slopes(const Grid& grid, const Occupied& cells, const Histogram& histogram,
                             const std::vector<float>& pull, const std::vector<float>& nodes, double weight,
                             std::size_t at, std::vector<float>& slopes) {
  const D32 d;
  const std::size_t n = hn::Lanes(d);
  const V32 centre = hn::LoadU(d, &cells.centre[at]);
  const V32 minus_gamma = hn::Set(d, static_cast<float>(-grid.gamma));
  const V32 slope = hn::Set(d, static_cast<float>(-2 * grid.gamma * grid.half));
  V32 s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0, s8 = s0;
  for (std::size_t r = 0; r < grid.bins; ++r) {
    if (histogram.end[r] <= at || histogram.begin[r] >= at + n) continue;
    const V32 node = hn::Set(d, nodes[r]), nearest = hn::Set(d, histogram.nearest[r]);
    const V32 away = hn::Sub(centre, node);
    const V32 y = hn::Mul(away, slope);
    const V32 exponent = hn::Mul(hn::Sub(centre, nearest), hn::Add(away, hn::Sub(nearest, node)));
    V32 part = hn::Mul(exp(d, hn::Mul(exponent, minus_gamma)), hn::Set(d, pull[r]));
    s0 = hn::Add(s0, part);
    s1 = hn::MulAdd(part, y, s1);
    part = hn::Mul(part, hn::Mul(y, y));
    s2 = hn::Add(s2, part);
    s3 = hn::MulAdd(part, y, s3);
    part = hn::Mul(part, hn::Mul(y, y));
    s4 = hn::Add(s4, part);
    s5 = hn::MulAdd(part, y, s5);
    part = hn::Mul(part, hn::Mul(y, y));
    s6 = hn::Add(s6, part);
    s7 = hn::MulAdd(part, y, s7);
    part = hn::Mul(part, hn::Mul(y, y));
    s8 = hn::Add(s8, part);
  }
  HWY_ALIGN float sums[(kMoments + 1) * hn::MaxLanes(D32())];
  hn::Store(s0, d, sums);
  hn::Store(s1, d, sums + n);
  hn::Store(s2, d, sums + 2 * n);
  hn::Store(s3, d, sums + 3 * n);
  hn::Store(s4, d, sums + 4 * n);
  hn::Store(s5, d, sums + 5 * n);
  hn::Store(s6, d, sums + 6 * n);
  hn::Store(s7, d, sums + 7 * n);
  hn::Store(s8, d, sums + 8 * n);
  for (std::size_t i = 0; i < n && at + i < cells.count; ++i) {
    for (std::size_t m = 0; m < kMoments; ++m) {
      // d/ds of exp(-gamma d^2) u^m: the power's slope, and the bell's.
      double value = sums[(m + 1) * n + i] / kFactorial[m] / double{grid.half};
      if (m > 0) value -= 2 * grid.gamma * double{grid.half} * sums[(m - 1) * n + i] / kFactorial[m - 1];
      slopes[cells.index[at + i] * kMoments + m] = static_cast<float>(weight * value);
    }
  }
}

// The slope at similarities.
HWY_INLINE V32 slope_at(const Grid& grid, const std::vector<float>& slopes, V32 s) {
  const D32 d;
  VInt index;
  V32 u, decay;
  place(grid, s, index, u, decay);
  const VInt first = hn::ShiftLeft<3>(index);
  static_assert(kMoments == 8, "ShiftLeft<3> multiplies by it");
  const float* table = slopes.data();
  V32 p = hn::GatherIndex(d, table + 7, first);
  for (std::size_t m = 7; m-- > 0;) p = hn::MulAdd(p, u, hn::GatherIndex(d, table + m, first));
  return hn::Mul(p, decay);
}

// ---- One call ------------------------------------------------------------------------------------

class Problem {
 public:
  explicit Problem(const Call& call)
      : call_(call),
        n_(static_cast<std::size_t>(call.inputs[kStudent].length(0))),
        d_(static_cast<std::size_t>(call.inputs[kStudent].length(1))),
        panel_(panel_width()),
        stride_(round_up(n_, panel_)),
        blocks_((n_ + kBlock - 1) / kBlock),
        mining_(static_cast<Mining>(call.choice(kNegatives))),
        grid_(static_cast<std::size_t>(call.attributes[kBins]), call.attributes[kWidth]),
        parallel_(static_cast<double>(n_) * static_cast<double>(n_) * static_cast<double>(d_) < kSerial
                      ? Parallel()
                      : *call.parallel),
        tasks_(std::min({blocks_, kMostTasks, std::max<std::size_t>(kCellsOfAllTasks / grid_.cells, 1)})),
        ids_(identities(call.inputs[kLabels].as<const std::int64_t>(), n_, stride_)) {
    const auto n = static_cast<double>(n_);
    count_[kPositives] = count_positives(ids_);
    const double others = n * (n - 1) / 2 - count_[kPositives];
    count_[kNegativePairs] = mining_ == kAll || others == 0 ? others : n;
    const bool gradient = call.outputs[kGradStudent].given();
    for (int sort = 0; sort < kSorts; ++sort) {
      const bool any = count_[sort] > 0;
      weight_[sort] = gradient && any ? weight(kPositiveWeight + sort) : 0.0;
      compared_[sort] = any && (call.outputs[kPositive + sort].given() || weight_[sort] != 0);
      pull_[sort] = gradient && any ? 2 * weight(kOrderWeight) / count_[sort] : 0.0;
    }
    pull_[kPositives] = -pull_[kPositives];
  }

  void run() {
    const float* student = call_.inputs[kStudent].as<const float>();
    const float* teacher = call_.inputs[kTeacher].as<const float>();
    const bool moves = weight_[0] != 0 || weight_[1] != 0 || pull_[0] != 0 || pull_[1] != 0;
    const bool order = call_.outputs[kOrder].given();
    if (call_.outputs[kGradStudent].given() && !moves) {
      std::fill_n(call_.outputs[kGradStudent].as<float>(), n_ * d_, 0.0f);
    }
    const bool teacher_counts = compared_[0] || compared_[1] || order;
    if (!teacher_counts && !moves) return write({0.0, 0.0}, 0.0);
    if (!sound(student) || !sound(teacher)) return write_nan(moves);

    Floats similarities(n_ * stride_);
    Floats packed(std::max(stride_ * d_, n_ * round_up(d_, panel_)));
    similarities_ = similarities.get();
    packed_ = packed.get();
    if (mining_ == kHardest) {
      hardest_.resize(stride_);
      share_.resize(stride_);
    }

    double gap = 0.0;
    std::vector<Histogram> wanted;  // the teacher's
    if (teacher_counts) {
      const std::vector<Pairs> pairs = take(teacher);
      gap = 2 * (pairs[1].mean(count_[1]) - pairs[0].mean(count_[0]));
      for (int sort = 0; sort < kSorts; ++sort) {
        wanted.emplace_back(compared_[sort] ? grid_.bins : 0);
        if (compared_[sort]) fill(Occupied(grid_, pairs[sort], lanes()), wanted[sort]);
      }
    }
    const std::vector<Pairs> pairs = take(student);
    gap += 2 * (pairs[1].mean(count_[1]) - pairs[0].mean(count_[0]));
    double values[kSorts] = {0.0, 0.0};
    for (int sort = 0; sort < kSorts; ++sort) {
      if (!compared_[sort]) continue;
      const Occupied cells(grid_, pairs[sort], lanes());
      Histogram histogram(grid_.bins);
      fill(cells, histogram);
      values[sort] = divergence(wanted[sort], histogram);
      if (weight_[sort] != 0) set_slopes(sort, cells, histogram, wanted[sort]);
    }
    write({values[0], values[1]}, gap);
    if (moves) write_gradient(student);
  }

 private:
  double weight(int input) const {
    const Array& array = call_.inputs[input];
    return array.given() ? double{*array.as<const float>()} : 0.0;
  }

  void write(std::initializer_list<double> divergences, double gap) {
    int output = kPositive;
    for (const double value : divergences) {
      if (call_.outputs[output].given()) *call_.outputs[output].as<float>() = static_cast<float>(value);
      ++output;
    }
    if (call_.outputs[kOrder].given()) *call_.outputs[kOrder].as<float>() = static_cast<float>(gap);
  }

  void write_nan(bool moves) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    write({count_[0] > 0 ? nan : 0.0, count_[1] > 0 ? nan : 0.0}, count_[0] > 0 || count_[1] > 0 ? nan : 0.0);
    if (moves) std::fill_n(call_.outputs[kGradStudent].as<float>(), n_ * d_, static_cast<float>(nan));
  }

  // Whether no row is NaN, or longer than rounding explains.
  bool sound(const float* rows) const {
    const D32 d;
    for (std::size_t i = 0; i < n_; ++i) {
      const float* row = rows + i * d_;
      V32 sum = hn::Zero(d);
      std::size_t k = 0;
      for (; k + lanes() <= d_; k += lanes()) {
        const V32 entry = hn::LoadU(d, row + k);
        sum = hn::MulAdd(entry, entry, sum);
      }
      double squared = hn::GetLane(hn::SumOfLanes(d, sum));
      for (; k < d_; ++k) squared += double{row[k]} * double{row[k]};
      if (!(squared <= kLongest)) return false;
    }
    return true;
  }

  // ---- Similarities and the cells that they fall into ---------------------------------------------

  // All of one side: similarities_, and the pairs of both sorts that somebody wants.
  std::vector<Pairs> take(const float* rows) {
    parallel_.for_each(static_cast<std::int64_t>(stride_ / panel_), [&](std::int64_t panel) {
      const auto first = static_cast<std::size_t>(panel) * panel_;
      float* to = packed_ + first * d_;
      for (std::size_t column = 0; column < panel_; ++column) {
        const float* row = rows + (first + column) * d_;
        const bool exists = first + column < n_;
        for (std::size_t k = 0; k < d_; ++k) to[k * panel_ + column] = exists ? row[k] : 0.0f;
      }
    });
    std::vector<std::vector<Pairs>> parts;
    const std::size_t sorts = mining_ == kAll ? 2 : 1;  // the hardest negatives come later
    for (std::size_t task = 0; task < tasks_; ++task) parts.emplace_back(sorts, Pairs(grid_));
    parallel_.for_each(static_cast<std::int64_t>(tasks_), [&](std::int64_t index) {
      const auto task = static_cast<std::size_t>(index);
      for (std::size_t block = task; block < blocks_; block += tasks_) {
        const std::size_t end = std::min((block + 1) * kBlock, n_);
        multiply_block(rows, block * kBlock, end);
        for (std::size_t i = block * kBlock; i < end; ++i) {
          if (mining_ == kAll) {
            add_row<true>(i, parts[task].data());
          } else {
            add_row<false>(i, parts[task].data());
          }
        }
      }
    });
    std::vector<Pairs> pairs = std::move(parts[0]);
    for (std::size_t task = 1; task < tasks_; ++task) {
      for (std::size_t sort = 0; sort < sorts; ++sort) {
        pairs[sort].sum += parts[task][sort].sum;
        const double* from = parts[task][sort].moments.data();
        double* to = pairs[sort].moments.data();
        for (std::size_t i = 0; i < grid_.cells * kMoments; ++i) to[i] += from[i];
      }
    }
    if (mining_ == kHardest) {
      pairs.emplace_back(grid_);
      mine(pairs[kNegativePairs]);
    }
    return pairs;
  }

  // Rows [begin, end) from their own column on, and those columns' rows by symmetry.
  void multiply_block(const float* rows, std::size_t begin, std::size_t end) {
    HWY_ALIGN float tile[kProductRows * kProductVectors * hn::MaxLanes(D32())];
    for (std::size_t column = begin / panel_ * panel_; column < n_; column += panel_) {
      const std::size_t used = vectors_used(column, n_), width = std::min(panel_, n_ - column);
      for (std::size_t row = begin; row < end; row += kProductRows) {
        if (column + panel_ <= row) continue;
        const std::size_t height = std::min(kProductRows, end - row);
        multiply(used, d_, LeftRows<false>(rows + row * d_, d_, height), packed_ + column * d_, tile, panel_, false);
        for (std::size_t r = 0; r < height; ++r) {
          float* to = similarities_ + (row + r) * stride_ + column;
          for (std::size_t c = column > row + r ? 0 : row + r - column; c < used * lanes(); ++c) {
            to[c] = tile[r * panel_ + c];
          }
        }
        for (std::size_t c = 0; c < width; ++c) {
          float* to = similarities_ + (column + c) * stride_ + row;
          for (std::size_t r = 0; r < height && row + r < column + c; ++r) to[r] = tile[r * panel_ + c];
        }
      }
    }
  }

  // Adds the pairs (i, j > i): the positive ones, or both sorts.
  template <bool both>
  void add_row(std::size_t i, Pairs* sorts) {
    const D32 d;
    const DInt di;
    const float* row = similarities_ + i * stride_;
    const VInt id = hn::Set(di, ids_[i]), own = hn::Set(di, static_cast<std::int32_t>(i));
    const VInt end = hn::Set(di, static_cast<std::int32_t>(n_));
    V32 positive_sum = hn::Zero(d), negative_sum = hn::Zero(d);
    HWY_ALIGN std::int32_t index[hn::MaxLanes(D32())];
    HWY_ALIGN float u[hn::MaxLanes(D32())], decay[hn::MaxLanes(D32())];
    double* moments[2] = {sorts[0].moments.data(), both ? sorts[1].moments.data() : nullptr};
    for (std::size_t j = (i + 1) / lanes() * lanes(); j < n_; j += lanes()) {
      const VInt column = hn::Iota(di, static_cast<std::int32_t>(j));
      const auto ahead = hn::And(hn::Gt(column, own), hn::Lt(column, end));
      const auto same = hn::And(ahead, hn::Eq(hn::LoadU(di, &ids_[j]), id));
      const auto counts = both ? ahead : same;
      if (hn::AllFalse(di, counts)) continue;
      const V32 s = hn::Load(d, row + j);
      const M32 positive = hn::RebindMask(d, same);
      positive_sum = hn::Add(positive_sum, hn::IfThenElseZero(positive, s));
      if (both) {
        const V32 counted = hn::IfThenElseZero(hn::RebindMask(d, ahead), s);
        negative_sum = hn::Add(negative_sum, hn::IfThenZeroElse(positive, counted));
      }
      VInt cell;
      V32 place_in_cell, bell;
      place(grid_, s, cell, place_in_cell, bell);
      // The index tells the sort in its last bit, and is negative where there is nothing to add.
      const VInt twice = hn::Add(hn::ShiftLeft<1>(cell), hn::IfThenElse(same, hn::Zero(di), hn::Set(di, 1)));
      hn::Store(hn::IfThenElse(counts, twice, hn::Set(di, -1)), di, index);
      hn::Store(place_in_cell, d, u);
      hn::Store(bell, d, decay);
      for (std::size_t lane = 0; lane < lanes(); ++lane) {
        if (index[lane] < 0) continue;
        double* to = moments[both ? index[lane] & 1 : 0] + static_cast<std::size_t>(index[lane] >> 1) * kMoments;
        add_powers(double{u[lane]}, double{decay[lane]}, to);
      }
    }
    sorts[0].sum += hn::GetLane(hn::SumOfLanes(d, positive_sum));
    if (both) sorts[1].sum += hn::GetLane(hn::SumOfLanes(d, negative_sum));
  }

  // The most similar sample of another identity, for every sample; and by how many its gradient is shared.
  void mine(Pairs& pairs) {
    if (count_[kNegativePairs] == 0) return;
    parallel_.for_each(static_cast<std::int64_t>(blocks_), [&](std::int64_t block) {
      const std::size_t begin = static_cast<std::size_t>(block) * kBlock, end = std::min(begin + kBlock, n_);
      for (std::size_t i = begin; i < end; ++i) {
        const D32 d;
        const float* row = similarities_ + i * stride_;
        const V32 lowest = hn::Set(d, -std::numeric_limits<float>::infinity());
        V32 largest = lowest;
        for (std::size_t j = 0; j < n_; j += lanes()) {
          largest = hn::Max(largest, hn::IfThenElse(others(i, j), hn::Load(d, row + j), lowest));
        }
        hardest_[i] = hn::GetLane(hn::MaxOfLanes(d, largest));
        std::size_t ties = 0;
        for (std::size_t j = 0; j < n_; j += lanes()) {
          const M32 equal = hn::Eq(hn::Load(d, row + j), hn::Set(d, hardest_[i]));
          ties += hn::CountTrue(d, hn::And(others(i, j), equal));
        }
        share_[i] = 1.0f / static_cast<float>(ties);
      }
    });
    const D32 d;
    const DInt di;
    HWY_ALIGN std::int32_t index[hn::MaxLanes(D32())];
    HWY_ALIGN float u[hn::MaxLanes(D32())], decay[hn::MaxLanes(D32())];
    for (std::size_t i = 0; i < n_; i += lanes()) {
      VInt cell;
      V32 place_in_cell, bell;
      place(grid_, hn::LoadU(d, &hardest_[i]), cell, place_in_cell, bell);
      hn::Store(cell, di, index);
      hn::Store(place_in_cell, d, u);
      hn::Store(bell, d, decay);
      for (std::size_t lane = 0; lane < lanes() && i + lane < n_; ++lane) {
        pairs.sum += hardest_[i + lane];
        double* to = &pairs.moments[static_cast<std::size_t>(index[lane]) * kMoments];
        add_powers(double{u[lane]}, double{decay[lane]}, to);
      }
    }
  }

  // Which of a vector of samples, from j on, are of another identity than i.
  M32 others(std::size_t i, std::size_t j) const {
    const DInt di;
    const VInt ids = hn::LoadU(di, &ids_[j]);
    const auto exist = hn::Gt(ids, hn::Set(di, -1));
    return hn::RebindMask(D32(), hn::AndNot(hn::Eq(ids, hn::Set(di, ids_[i])), exist));
  }

  // ---- Histograms ----------------------------------------------------------------------------------

  void fill(const Occupied& cells, Histogram& histogram) {
    const std::size_t tasks = (grid_.bins + kNodesOfTask - 1) / kNodesOfTask;
    parallel_.for_each(static_cast<std::int64_t>(tasks), [&](std::int64_t task) {
      const std::size_t begin = static_cast<std::size_t>(task) * kNodesOfTask;
      sum_nodes(grid_, cells, begin, std::min(begin + kNodesOfTask, grid_.bins), histogram);
    });
    histogram.normalise();
  }

  void set_slopes(int sort, const Occupied& cells, const Histogram& q, const Histogram& p) {
    std::vector<float> pull(grid_.bins), nodes(grid_.bins);
    for (std::size_t r = 0; r < grid_.bins; ++r) {
      pull[r] = static_cast<float>((std::exp(q.log[r]) - std::exp(p.log[r])) / q.scaled[r]);
      nodes[r] = static_cast<float>(grid_.node(r));
    }
    slopes_[sort].assign(grid_.cells * kMoments, 0.0f);
    parallel_.for_each(static_cast<std::int64_t>(cells.stride / lanes()), [&](std::int64_t vector) {
      const std::size_t at = static_cast<std::size_t>(vector) * lanes();
      sum_slopes(grid_, cells, q, pull, nodes, weight_[sort], at, slopes_[sort]);
    });
  }

  // ---- Gradient --------------------------------------------------------------------------------------

  // From the student's similarities, which become the weights of its rows.
  void write_gradient(const float* rows) {
    const std::size_t panels = (d_ + panel_ - 1) / panel_;
    parallel_.for_each(static_cast<std::int64_t>(panels), [&](std::int64_t panel) {
      const std::size_t first = static_cast<std::size_t>(panel) * panel_, width = std::min(panel_, d_ - first);
      float* to = packed_ + first * n_;
      for (std::size_t j = 0; j < n_; ++j) {
        std::copy_n(rows + j * d_ + first, width, to + j * panel_);
        std::fill_n(to + j * panel_ + width, panel_ - width, 0.0f);
      }
    });
    const bool mined = mining_ == kHardest && count_[kNegativePairs] > 0;
    if (mined) {
      const D32 d;
      for (std::size_t i = 0; i < n_; i += lanes()) {
        V32 slope = hn::Set(d, static_cast<float>(pull_[kNegativePairs]));
        if (weight_[kNegativePairs] != 0) {
          slope = hn::Add(slope, slope_at(grid_, slopes_[kNegativePairs], hn::LoadU(d, &hardest_[i])));
        }
        hn::StoreU(hn::Mul(slope, hn::LoadU(d, &share_[i])), d, &share_[i]);
      }
    }
    std::vector<std::uint32_t> lists(blocks_ * n_ * kStrips);
    parallel_.for_each(static_cast<std::int64_t>(blocks_), [&](std::int64_t index) {
      const auto block = static_cast<std::size_t>(index);
      const std::size_t begin = block * kBlock, end = std::min(begin + kBlock, n_);
      for (std::size_t i = begin; i < end; ++i) mined ? weigh_row<true>(i) : weigh_row<false>(i);
      std::uint32_t* list = &lists[block * n_ * kStrips];
      std::size_t lengths[kStrips];
      for (std::size_t row = begin; row < end; row += kProductRows) {
        const std::size_t strip = (row - begin) / kProductRows;
        lengths[strip] = list_columns(row, std::min(row + kProductRows, end), list + strip * n_);
      }
      HWY_ALIGN float tile[kProductRows * kProductVectors * hn::MaxLanes(D32())];
      for (std::size_t column = 0; column < d_; column += panel_) {
        const std::size_t used = vectors_used(column, d_);
        for (std::size_t row = begin; row < end; row += kProductRows) {
          const std::size_t strip = (row - begin) / kProductRows, height = std::min(kProductRows, end - row);
          const LeftRows<true> left(similarities_ + row * stride_, stride_, height, list + strip * n_);
          multiply(used, lengths[strip], left, packed_ + column * n_, tile, panel_, false);
          float* to = call_.outputs[kGradStudent].as<float>() + row * d_ + column;
          for (std::size_t r = 0; r < height; ++r) {
            std::copy_n(tile + r * panel_, std::min(panel_, d_ - column), to + r * d_);
          }
        }
      }
    });
  }

  // Row i of the similarities becomes what the loss changes by with each of them.
  template <bool mined>
  void weigh_row(std::size_t i) {
    const D32 d;
    const DInt di;
    float* row = similarities_ + i * stride_;
    const VInt id = hn::Set(di, ids_[i]), own = hn::Set(di, static_cast<std::int32_t>(i));
    const bool compares[kSorts] = {weight_[0] != 0, weight_[1] != 0};
    const V32 positive_pull = hn::Set(d, static_cast<float>(pull_[kPositives]));
    const V32 negative_pull = hn::Set(d, static_cast<float>(pull_[kNegativePairs]));
    for (std::size_t j = 0; j < n_; j += lanes()) {
      const V32 s = hn::Load(d, row + j);
      const VInt ids = hn::LoadU(di, &ids_[j]);
      const auto distinct = hn::Ne(hn::Iota(di, static_cast<std::int32_t>(j)), own);
      const auto same = hn::And(hn::Eq(ids, id), distinct);
      V32 w = hn::Zero(d);
      if (!hn::AllFalse(di, same)) {
        V32 slope = positive_pull;
        if (compares[kPositives]) slope = hn::Add(slope, slope_at(grid_, slopes_[kPositives], s));
        w = hn::IfThenElseZero(hn::RebindMask(d, same), slope);
      }
      const M32 other = others(i, j);
      if (mined) {
        // Hardest of row i, or row i the hardest of theirs.
        const M32 mine = hn::And(other, hn::Eq(s, hn::Set(d, hardest_[i])));
        const M32 theirs = hn::And(other, hn::Eq(s, hn::LoadU(d, &hardest_[j])));
        w = hn::Add(w, hn::IfThenElseZero(mine, hn::Set(d, share_[i])));
        w = hn::Add(w, hn::IfThenElseZero(theirs, hn::LoadU(d, &share_[j])));
      } else if (count_[kNegativePairs] > 0) {
        V32 slope = negative_pull;
        if (compares[kNegativePairs]) slope = hn::Add(slope, slope_at(grid_, slopes_[kNegativePairs], s));
        w = hn::IfThenElse(other, slope, w);
      }
      hn::Store(w, d, row + j);
    }
  }

  // The columns in which any of the rows [begin, end) has a weight.
  std::size_t list_columns(std::size_t begin, std::size_t end, std::uint32_t* list) const {
    std::size_t length = 0;
    for (std::size_t j = 0; j < n_; ++j) {
      bool any = false;
      for (std::size_t i = begin; i < end; ++i) any |= similarities_[i * stride_ + j] != 0.0f;
      list[length] = static_cast<std::uint32_t>(j);
      length += any ? 1 : 0;
    }
    return length;
  }

  const Call& call_;
  const std::size_t n_, d_;
  const std::size_t panel_, stride_;  // columns of a panel; of a row of similarities
  const std::size_t blocks_;
  const Mining mining_;
  const Grid grid_;
  const Parallel parallel_;
  const std::size_t tasks_;  // that sum pairs
  const std::vector<std::int32_t> ids_;
  double count_[kSorts];
  double weight_[kSorts];          // of a divergence in the gradient
  bool compared_[kSorts];          // whether a divergence is wanted at all
  double pull_[kSorts];            // of the order term, on every pair of the sort
  float* similarities_ = nullptr;  // N x stride_
  float* packed_ = nullptr;
  std::vector<float> hardest_, share_;  // of every sample's negative: similarity; part of the gradient for each
  std::vector<float> slopes_[kSorts];   // cell, power
};

}  // namespace distribution_distillation_detail

void distribution_distillation(const Call& call) { distribution_distillation_detail::Problem(call).run(); }

}  // namespace pykd::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

// ---- Once ------------------------------------------------------------------------------------------
#if HWY_ONCE
namespace pykd::kernels {
namespace {

HWY_EXPORT(distribution_distillation);

const char* refuse(const Call& call) {
  const double bins = call.attributes[ddl::kBins], width = call.attributes[ddl::kWidth];
  const bool countable = bins >= 2 && bins <= ddl::kMostBins && bins == std::floor(bins);
  if (!countable) return "bins is a whole number from 2 to 2^24";
  if (!(width >= ddl::kNarrowest && std::isfinite(width))) return "width is at least 0.01";
  return nullptr;
}

}  // namespace

void distribution_distillation(const Call& call) { HWY_DYNAMIC_DISPATCH(distribution_distillation)(call); }

namespace {
const bool registered = add({"distribution_distillation",
                             {{"student", "batch channels", Role::kTensor},
                              {"teacher", "batch channels", Role::kTensor},
                              {"labels", "batch", Role::kIndex},
                              {"positive_weight", "", Role::kFloat32, kOptional},
                              {"negative_weight", "", Role::kFloat32, kOptional},
                              {"order_weight", "", Role::kFloat32, kOptional}},
                             {{"positive", "", Role::kFloat32},
                              {"negative", "", Role::kFloat32},
                              {"order", "", Role::kFloat32},
                              {"grad_student", "batch channels", Role::kTensor}},
                             {{"bins", 1000}, {"width", 0.1}, {"negatives", ddl::kHardest, {"hardest", "all"}}},
                             kFloat32Alone,
                             refuse,
                             distribution_distillation});
}  // namespace

}  // namespace pykd::kernels
#endif  // HWY_ONCE
