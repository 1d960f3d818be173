#include "kernels/mk_mmd/mk_mmd.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/mk_mmd/mk_mmd.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/host/memory.h"
#include "kernels/mk_mmd/mk_mmd_widths.h"
#include "kernels/simd/product-inl.h"

// ---- What does not depend on the instruction set -------------------------------------------------
#ifndef PYKD_KERNELS_MK_MMD_ONCE_
#define PYKD_KERNELS_MK_MMD_ONCE_

namespace pykd::kernels {
namespace mmd {

constexpr std::size_t kTileRows = 192;  // a tile's kernels (147 KB) and samples share a level-2 cache of 1 MB
constexpr std::size_t kDepth = 256;     // features per pass over a tile of distances
constexpr std::size_t kTiles = 8;       // that a small batch is cut into, so that threads find work
constexpr std::size_t kColumns = 64;    // per task that takes means
constexpr std::size_t kLine = 64;       // floats between what different tasks write, at least
constexpr double kSerial = 4e6;         // N^2 D below which threads cost more than they bring

inline std::size_t round_up(std::size_t n, std::size_t step) { return (n + step - 1) / step * step; }

// Scratch for as many tasks as run at once. Tasks do not know their thread; each takes a free place.
class Places {
 public:
  Places(std::size_t count, std::size_t floats, float* memory)
      : count_(count), floats_(floats), memory_(memory), taken_(new std::atomic<bool>[count]) {
    for (std::size_t i = 0; i < count; ++i) taken_[i].store(false, std::memory_order_relaxed);
  }

  class Place {
   public:
    explicit Place(Places& places) : places_(places), index_(places.take()) {}
    Place(const Place&) = delete;
    Place& operator=(const Place&) = delete;
    ~Place() { places_.taken_[index_].store(false, std::memory_order_release); }
    float* get() const { return places_.memory_ + index_ * places_.floats_; }

   private:
    Places& places_;
    std::size_t index_;
  };

 private:
  std::size_t take() {
    for (std::size_t i = 0;; i = (i + 1) % count_) {
      if (!taken_[i].exchange(true, std::memory_order_acquire)) return i;
      if (i + 1 == count_) std::this_thread::yield();  // a host with more threads than it said
    }
  }

  std::size_t count_, floats_;
  float* memory_;
  std::unique_ptr<std::atomic<bool>[]> taken_;
};

// The samples of one side, moved to their centre and laid out for the products.
struct Set {
  Set(const float* rows_, std::size_t n, std::size_t d, float* samples_, float* features_)
      : rows(rows_), mean(d), norm(n), along(n), samples(samples_), features(features_) {}

  const float* rows;          // N x D, as given
  std::vector<double> mean;   // D
  std::vector<double> norm;   // squared, of the centred samples
  std::vector<double> along;  // their products with the difference of the two means
  float* samples;             // tile, panel of samples, feature, sample: the samples of a panel lie side by side
  float* features;            // tile, panel of features, sample, feature; unused without the gradient
};

// Exponents of base 2 from products: scale * product - lanes[i] - rows[j] is log2 of the widest kernel.
struct Exponents {
  Exponents(std::size_t lane_count, std::size_t row_count)
      : lanes(lane_count, std::numeric_limits<float>::infinity()), rows(row_count) {}

  float scale = 0.0f;
  float weight = 0.0f;       // of the gradient, with its sign: +- 1 / s2
  bool coincide = false;     // every kernel is 1
  std::vector<float> lanes;  // infinite beyond the last sample: there the kernels are 0
  std::vector<float> rows;
};

// A round of the tournament of `tiles` tiles (made even by one that does not exist): the pair `match` of it.
struct Pair {
  std::size_t first, second;
};
inline Pair pairing(std::size_t players, std::size_t round, std::size_t match) {
  const std::size_t others = players - 1;
  if (match == 0) return {round, others};
  const std::size_t a = (round + match) % others, b = (round + others - match) % others;
  return {std::min(a, b), std::max(a, b)};
}

}  // namespace mmd
}  // namespace pykd::kernels

#endif  // PYKD_KERNELS_MK_MMD_ONCE_

// ---- Once per instruction set --------------------------------------------------------------------
HWY_BEFORE_NAMESPACE();
namespace pykd::kernels::HWY_NAMESPACE {
namespace mk_mmd_detail {

using namespace mmd;
namespace hn = hwy::HWY_NAMESPACE;

using D32 = hn::ScalableTag<float>;
using V32 = hn::Vec<D32>;
using D64 = hn::ScalableTag<double>;
using V64 = hn::Vec<D64>;

// 2^x - 1, with the relative precision of float32 near 0; 0 for x > 0 (rounding of a distance of 0), -1 below -126.
HWY_INLINE V32 exp2_less_1(D32 d, V32 x) {
  const hn::RebindToSigned<D32> di;
  x = hn::Max(hn::Min(x, hn::Zero(d)), hn::Set(d, -126.0f));
  const V32 n = hn::Round(x), r = hn::Sub(x, n);
  // (2^r - 1) / r for |r| <= 1/2: interpolated at Chebyshev's points, relative error 3e-8.
  V32 q = hn::MulAdd(hn::Set(d, 1.5453163e-4f), r, hn::Set(d, 1.3390863e-3f));
  q = hn::MulAdd(q, r, hn::Set(d, 9.6180830e-3f));
  q = hn::MulAdd(q, r, hn::Set(d, 5.5503570e-2f));
  q = hn::MulAdd(q, r, hn::Set(d, 2.4022651e-1f));
  q = hn::MulAdd(q, r, hn::Set(d, 6.9314718e-1f));
  const V32 power = hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(di, n), hn::Set(di, 127))));
  return hn::MulAdd(power, hn::Mul(r, q), hn::Sub(power, hn::Set(d, 1.0f)));
}

// ---- One call --------------------------------------------------------------------------------------

class Problem {
 public:
  Problem(const Call& call, bool gradient)
      : n_(static_cast<std::size_t>(call.inputs[kStudent].length(0))),
        d_(static_cast<std::size_t>(call.inputs[kStudent].length(1))),
        panel_(panel_width()),
        tile_(tile_rows(n_, panel_)),
        tiles_((n_ + tile_ - 1) / tile_),
        feature_panels_((d_ + panel_ - 1) / panel_),
        value_(call.outputs[kValue].as<float>()),
        gradient_(gradient ? call.outputs[kGradStudent].as<float>() : nullptr),
        parallel_(static_cast<double>(n_) * static_cast<double>(n_) * static_cast<double>(d_) < kSerial
                      ? Parallel()
                      : *call.parallel),
        places_count_(std::min(static_cast<std::size_t>(std::max(parallel_.threads, 1)), tiles_)),
        memory_(2 * (samples_floats() + features_floats()) + places_count_ * place_floats()),
        x_(call.inputs[kStudent].as<const float>(), n_, d_, memory_.get(), memory_.get() + 2 * samples_floats()),
        y_(call.inputs[kTeacher].as<const float>(), n_, d_, x_.samples + samples_floats(),
           x_.features + features_floats()),
        xx_(tiles_ * tile_, tiles_ * tile_),
        yy_(tiles_ * tile_, tiles_ * tile_),
        xy_(tiles_ * tile_, tiles_ * tile_),
        weight_sum_(gradient ? n_ : 0),
        cross_weight_sum_(gradient ? n_ : 0),
        offset_(d_),
        places_(places_count_, place_floats(), y_.features + features_floats()) {}

  void run(Bandwidth bandwidth, float weight) {
    take_means();
    parallel_.for_each(static_cast<std::int64_t>(2 * tiles_), [this](std::int64_t i) {
      const auto index = static_cast<std::size_t>(i);
      pack(index < tiles_ ? x_ : y_, index % tiles_);
    });
    if (!set_exponents(bandwidth)) {
      const float nan = std::numeric_limits<float>::quiet_NaN();
      if (value_ != nullptr) *value_ = nan;
      if (gradient_ != nullptr) std::fill_n(gradient_, n_ * d_, nan);
      return;
    }
    const double total = meet();
    if (value_ != nullptr) *value_ = static_cast<float>(total);
    if (gradient_ != nullptr) finish_gradient(weight);
  }

 private:
  static std::size_t tile_rows(std::size_t n, std::size_t panel) {
    if (n <= 2 * panel) return round_up(n, panel);
    const std::size_t tiles = std::max((n + kTileRows - 1) / kTileRows, kTiles);
    return round_up((n + tiles - 1) / tiles, panel);
  }
  std::size_t samples_floats() const { return round_up(tiles_ * tile_ * d_, kLine); }
  std::size_t features_floats() const {
    return gradient_ == nullptr ? 0 : round_up(tiles_ * tile_ * feature_panels_ * panel_, kLine);
  }
  std::size_t place_floats() const {
    return round_up(tile_ * tile_ + kProductRows * panel_, kLine);
  }  // a tile, and a corner

  std::size_t rows_of(std::size_t tile) const { return std::min(tile_, n_ - tile * tile_); }
  const float* samples_of(const Set& set, std::size_t tile) const { return set.samples + tile * tile_ * d_; }
  const float* features_of(const Set& set, std::size_t tile) const {
    return set.features + tile * tile_ * feature_panels_ * panel_;
  }

  // ---- Preparation

  void take_means() {
    const std::size_t chunks = (d_ + kColumns - 1) / kColumns;
    parallel_.for_each(static_cast<std::int64_t>(chunks), [this](std::int64_t chunk) {
      const std::size_t first = static_cast<std::size_t>(chunk) * kColumns, count = std::min(kColumns, d_ - first);
      double x[kColumns] = {}, y[kColumns] = {};
      for (std::size_t i = 0; i < n_; ++i) {
        const float* x_row = x_.rows + i * d_ + first;
        const float* y_row = y_.rows + i * d_ + first;
        for (std::size_t k = 0; k < count; ++k) {
          x[k] += static_cast<double>(x_row[k]);
          y[k] += static_cast<double>(y_row[k]);
        }
      }
      for (std::size_t k = 0; k < count; ++k) {
        x_.mean[first + k] = x[k] / static_cast<double>(n_);
        y_.mean[first + k] = y[k] / static_cast<double>(n_);
        offset_[first + k] = x_.mean[first + k] - y_.mean[first + k];
      }
    });
  }

  // One tile of one side: centred, rounded, in both layouts, and the sums over its features.
  void pack(Set& set, std::size_t tile) {
    constexpr std::size_t kBlock = 64;  // features at a time: the panel's lines stay in the level-1 cache
    const std::size_t first = tile * tile_, count = rows_of(tile);
    float* samples = set.samples + first * d_;
    float* features = gradient_ == nullptr ? nullptr : set.features + first * feature_panels_ * panel_;
    const D64 d64;
    const hn::Rebind<float, D64> d32;
    const std::size_t lanes = hn::Lanes(d64);
    for (std::size_t p = 0; p < count; p += panel_, samples += panel_ * d_) {
      const std::size_t used = std::min(panel_, count - p);
      for (std::size_t k0 = 0; k0 < d_; k0 += kBlock) {
        const std::size_t block = std::min(kBlock, d_ - k0);
        for (std::size_t i = 0; i < used; ++i) {
          const float* row = set.rows + (first + p + i) * d_ + k0;
          float centred[kBlock];
          V64 norm = hn::Zero(d64), along = hn::Zero(d64);
          double norm_rest = 0.0, along_rest = 0.0;
          std::size_t k = 0;
          for (; k + lanes <= block; k += lanes) {
            const V64 entry = hn::PromoteTo(d64, hn::LoadU(d32, row + k));
            const auto rounded = hn::DemoteTo(d32, hn::Sub(entry, hn::LoadU(d64, &set.mean[k0 + k])));
            const V64 exact = hn::PromoteTo(d64, rounded);
            hn::StoreU(rounded, d32, centred + k);
            norm = hn::MulAdd(exact, exact, norm);
            along = hn::MulAdd(exact, hn::LoadU(d64, &offset_[k0 + k]), along);
          }
          for (; k < block; ++k) {
            centred[k] = static_cast<float>(static_cast<double>(row[k]) - set.mean[k0 + k]);
            norm_rest += static_cast<double>(centred[k]) * static_cast<double>(centred[k]);
            along_rest += static_cast<double>(centred[k]) * offset_[k0 + k];
          }
          set.norm[first + p + i] += hn::GetLane(hn::SumOfLanes(d64, norm)) + norm_rest;
          set.along[first + p + i] += hn::GetLane(hn::SumOfLanes(d64, along)) + along_rest;
          for (k = 0; k < block; ++k) samples[(k0 + k) * panel_ + i] = centred[k];
          for (k = 0; features != nullptr && k < block;) {
            const std::size_t panel = (k0 + k) / panel_, at = (k0 + k) % panel_,
                              some = std::min(panel_ - at, block - k);
            std::memcpy(features + (panel * tile_ + p + i) * panel_ + at, centred + k, some * sizeof(float));
            k += some;
          }
        }
        for (std::size_t k = k0; used < panel_ && k < k0 + block; ++k) {
          std::fill(samples + k * panel_ + used, samples + (k + 1) * panel_, 0.0f);
        }
      }
    }
    const std::size_t last = d_ % panel_;
    if (features == nullptr || last == 0) return;
    float* rest = features + (feature_panels_ - 1) * tile_ * panel_;
    for (std::size_t i = 0; i < count; ++i) std::fill(rest + i * panel_ + last, rest + (i + 1) * panel_, 0.0f);
  }

  // The bandwidths, and what turns products into exponents. False where something is not finite.
  bool set_exponents(Bandwidth bandwidth) {
    const auto n = static_cast<double>(n_);
    double x_spread = 0.0, y_spread = 0.0, apart = 0.0, largest = 0.0;
    for (std::size_t i = 0; i < n_; ++i) {
      x_spread += x_.norm[i];
      y_spread += y_.norm[i];
      largest = std::max({largest, x_.norm[i], y_.norm[i]});
    }
    for (const double entry : offset_) apart += entry * entry;
    const Widths widths = widths_of(bandwidth, n, x_spread, y_spread, apart, largest);
    if (!widths.finite) return false;

    set_width(xx_, widths.xx, 1.0);
    set_width(yy_, widths.yy, 1.0);
    set_width(xy_, widths.xy, -1.0);
    const double xx_scale = exponent_scale(widths.xx), yy_scale = exponent_scale(widths.yy),
                 xy_scale = exponent_scale(widths.xy);
    for (std::size_t i = 0; i < n_; ++i) {
      xx_.lanes[i] = xx_.rows[i] = static_cast<float>(xx_scale * x_.norm[i]);
      yy_.lanes[i] = yy_.rows[i] = static_cast<float>(yy_scale * y_.norm[i]);
    }
    // |x_i - y_j|^2 where each is centred on its own mean, and the means are `offset` apart:
    // |x_i|^2 + |y_j|^2 - 2 x_i.y_j + 2 x_i.offset - 2 y_j.offset + |offset|^2.
    for (std::size_t i = 0; i < n_; ++i) {
      xy_.lanes[i] = static_cast<float>(xy_scale * (x_.norm[i] + 2.0 * x_.along[i] + apart));
      xy_.rows[i] = static_cast<float>(xy_scale * (y_.norm[i] - 2.0 * y_.along[i]));
    }
    return true;
  }

  static void set_width(Exponents& exponents, double width, double sign) {
    exponents.coincide = width <= kTiny;
    exponents.scale = static_cast<float>(2.0 * exponent_scale(width));
    exponents.weight = static_cast<float>(sign / std::max(width, kTiny));
  }

  // ---- Tiles

  // The products of a tile of x (in the lanes) with one of x or y (in the rows), by panels of lanes: row j of panel p
  // starts at out + (p * tile_ + j) * panel_.
  void products(const float* lanes, std::size_t lane_count, const float* rows, std::size_t row_count,
                float* out) const {
    for (std::size_t k = 0; k < d_; k += kDepth) {
      const std::size_t depth = std::min(kDepth, d_ - k);
      for (std::size_t i = 0; i < lane_count; i += panel_) {
        const std::size_t used = vectors_used(i, lane_count);
        for (std::size_t j = 0; j < row_count; j += kProductRows) {
          const float* a = rows + j / panel_ * panel_ * d_ + k * panel_ + j % panel_;
          multiply(used, depth, LeftPanel(a), lanes + i * d_ + k * panel_, out + i * tile_ + j * panel_, panel_, k > 0);
        }
      }
    }
  }

  // Turns products into the gradient's weights where `weights`; returns the sum of the kernels. Adds the weights' sums
  // to lane_sums, and to row_sums where that is given.
  template <bool weights, bool sum_rows>
  double kernels(const Exponents& exponents, std::size_t lane_tile, std::size_t row_tile, float* tile,
                 double* lane_sums, double* row_sums) const {
    const D32 d;
    const D64 d64;
    const std::size_t lanes = hn::Lanes(d), lane_count = rows_of(lane_tile), row_count = rows_of(row_tile);
    const float* HWY_RESTRICT lane_terms = exponents.lanes.data() + lane_tile * tile_;
    const float* HWY_RESTRICT row_terms = exponents.rows.data() + row_tile * tile_;
    const V32 scale = hn::Set(d, exponents.scale), two = hn::Set(d, 2.0f);
    const V32 weight_16 = hn::Set(d, exponents.weight / 16);
    V64 low = hn::Zero(d64), high = hn::Zero(d64);
    double ones = 0.0;
    for (std::size_t i = 0; i < lane_count; i += panel_) {
      float* HWY_RESTRICT row = tile + i * tile_;
      const std::size_t used = vectors_used(i, lane_count);
      V32 sums[kProductVectors] = {hn::Zero(d), hn::Zero(d), hn::Zero(d)};
      for (std::size_t j = 0; j < row_count; ++j, row += panel_) {
        const V32 row_term = hn::Set(d, row_terms[j]);
        V32 kernel_sum = hn::Zero(d), weight_sum = hn::Zero(d);
        for (std::size_t v = 0; v < used; ++v) {
          const V32 norms = hn::Add(hn::LoadU(d, lane_terms + i + v * lanes), row_term);
          // The five kernels, each less 1: (1 + m)^2 - 1 = m (2 + m) keeps the digits that squaring 1 + m would lose.
          const V32 m16 = exp2_less_1(d, hn::MulSub(scale, hn::Load(d, row + v * lanes), norms));
          const V32 m8 = hn::Mul(m16, hn::Add(m16, two)), m4 = hn::Mul(m8, hn::Add(m8, two));
          const V32 m2 = hn::Mul(m4, hn::Add(m4, two)), m1 = hn::Mul(m2, hn::Add(m2, two));
          kernel_sum = hn::Add(kernel_sum, hn::Add(hn::Add(m16, m8), hn::Add(hn::Add(m4, m2), m1)));
          if (weights) {
            // 16 m1 + 8 m2 + 4 m4 + 2 m8 + m16: exactly -31 where every kernel is 0.
            V32 sum = hn::MulAdd(two, hn::MulAdd(two, m1, m2), m4);
            sum = hn::MulAdd(two, hn::MulAdd(two, sum, m8), m16);
            const V32 weight = hn::Mul(weight_16, hn::Add(sum, hn::Set(d, 31.0f)));
            hn::Store(weight, d, row + v * lanes);
            sums[v] = hn::Add(sums[v], weight);
            if (sum_rows) weight_sum = hn::Add(weight_sum, weight);
          }
        }
        low = hn::Add(low, hn::PromoteTo(d64, hn::LowerHalf(kernel_sum)));
#if HWY_TARGET != HWY_SCALAR  // one lane: it is its own lower half
        high = hn::Add(high, hn::PromoteTo(d64, hn::UpperHalf(hn::Half<D32>(), kernel_sum)));
#endif
        if (sum_rows) row_sums[j] += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, weight_sum)));
      }
      ones += 5.0 * static_cast<double>(used * lanes) * static_cast<double>(row_count);
      if (weights) {
        float buffer[kProductVectors * hn::MaxLanes(D32())];
        for (std::size_t v = 0; v < used; ++v) hn::StoreU(sums[v], d, buffer + v * lanes);
        for (std::size_t k = 0; k < std::min(panel_, lane_count - i); ++k) {
          lane_sums[i + k] += static_cast<double>(buffer[k]);
        }
      }
    }
    return ones + hn::GetLane(hn::SumOfLanes(d64, hn::Add(low, high)));
  }

  // Distances on the diagonal are exactly 0 whatever the products say: they are left out here, and added as such.
  void drop_diagonal(std::size_t tile_index, float* tile) const {
    for (std::size_t i = 0; i < rows_of(tile_index); ++i) {
      tile[i / panel_ * panel_ * tile_ + i * panel_ + i % panel_] = -std::numeric_limits<float>::infinity();
    }
  }

  // gradient rows of tile `to` (+)= weights times the samples of tile `from`; transposed where `to` lies in the rows.
  template <bool transposed>
  void accumulate(const float* tile, const Set& set, std::size_t from, std::size_t to, bool add, float* corner) {
    const std::size_t depth = rows_of(from), count = rows_of(to);
    const float* features = features_of(set, from);
    float* gradient = gradient_ + to * tile_ * d_;
    for (std::size_t k = 0; k < d_; k += panel_, features += tile_ * panel_) {
      const std::size_t used = vectors_used(k, d_), columns = used * hn::Lanes(D32());
      for (std::size_t i = 0; i < count; i += kProductRows) {
        float* out = gradient + i * d_ + k;
        const bool fits = i + kProductRows <= count && k + columns <= d_;
        float* target = fits ? out : corner;
        const std::size_t stride = fits ? d_ : panel_;
        if (transposed) {
          multiply(used, depth, LeftPanels(tile + i * panel_, tile_ * panel_), features, target, stride, fits && add);
        } else {
          // The panels of a tile's columns lie side by side, so each entry has one place.
          multiply(used, depth, LeftPanel(tile + i / panel_ * panel_ * tile_ + i % panel_), features, target, stride,
                   fits && add);
        }
        if (fits) continue;
        for (std::size_t r = 0; r < std::min(kProductRows, count - i); ++r) {
          for (std::size_t c = 0; c < std::min(columns, d_ - k); ++c) {
            out[r * d_ + c] = corner[r * panel_ + c] + (add ? out[r * d_ + c] : 0.0f);
          }
        }
      }
    }
  }

  // ---- All pairs of tiles

  // The value.
  double meet() {
    const auto n = static_cast<double>(n_);
    const std::size_t players = round_up(std::max<std::size_t>(tiles_, 2), 2), rounds = players - 1,
                      matches = players / 2;
    std::vector<double> cross(tiles_), own(tiles_), student(rounds * matches), teacher(tiles_ * (tiles_ + 1) / 2);
    const bool teacher_wanted = value_ != nullptr && !yy_.coincide;

    // Each student tile with every teacher tile, and with itself.
    parallel_.for_each(static_cast<std::int64_t>(tiles_), [&](std::int64_t tile) {
      const Places::Place place(places_);
      meet_teacher(static_cast<std::size_t>(tile), place.get(), cross, own);
    });
    // Each with every other. The teacher's pairs, which are independent, fill the rounds up.
    const std::size_t share = teacher_wanted ? (teacher.size() + rounds - 1) / rounds : 0;
    for (std::size_t round = 0; round < rounds; ++round) {
      const std::size_t first = std::min(round * share, teacher.size()), last = std::min(first + share, teacher.size());
      const std::size_t students = xx_.coincide ? 0 : matches;
      parallel_.for_each(static_cast<std::int64_t>(students + last - first), [&](std::int64_t i) {
        const auto index = static_cast<std::size_t>(i);
        const Places::Place place(places_);
        if (index < students) {
          const Pair pair = pairing(players, round, index);
          if (pair.second < tiles_) student[round * matches + index] = meet_student(pair, place.get());
        } else {
          const std::size_t which = first + index - students;
          teacher[which] = meet_within_teacher(which, place.get());
        }
      });
    }

    double xx = 0.0, yy = 0.0, xy = 0.0;
    for (const double sum : student) xx += 2.0 * sum;
    for (const double sum : own) xx += sum;
    for (const double sum : teacher) yy += sum;
    for (const double sum : cross) xy += sum;
    const double all = 5.0 * n * n;
    xx = xx_.coincide ? all : xx + 5.0 * n;
    yy = yy_.coincide ? all : yy + 5.0 * n;
    xy = xy_.coincide ? all : xy;
    return (xx + yy - 2.0 * xy) / (n * n);
  }

  void meet_teacher(std::size_t i, float* tile, std::vector<double>& cross, std::vector<double>& own) {
    float* corner = tile + tile_ * tile_;
    const bool gradient = gradient_ != nullptr;
    double* sums = gradient ? weight_sum_.data() + i * tile_ : nullptr;
    double* cross_sums = gradient ? cross_weight_sum_.data() + i * tile_ : nullptr;
    if (gradient && xy_.coincide) std::fill_n(gradient_ + i * tile_ * d_, rows_of(i) * d_, 0.0f);
    for (std::size_t j = 0; j < tiles_ && !xy_.coincide; ++j) {
      products(samples_of(x_, i), rows_of(i), samples_of(y_, j), rows_of(j), tile);
      if (gradient) {
        cross[i] += kernels<true, false>(xy_, i, j, tile, cross_sums, nullptr);
        accumulate<false>(tile, y_, j, i, j > 0, corner);
      } else {
        cross[i] += kernels<false, false>(xy_, i, j, tile, nullptr, nullptr);
      }
    }
    if (xx_.coincide) return;
    products(samples_of(x_, i), rows_of(i), samples_of(x_, i), rows_of(i), tile);
    drop_diagonal(i, tile);
    if (gradient) {
      own[i] = kernels<true, false>(xx_, i, i, tile, sums, nullptr);
      accumulate<false>(tile, x_, i, i, true, corner);
    } else {
      own[i] = kernels<false, false>(xx_, i, i, tile, nullptr, nullptr);
    }
  }

  double meet_student(Pair pair, float* tile) {
    float* corner = tile + tile_ * tile_;
    products(samples_of(x_, pair.first), rows_of(pair.first), samples_of(x_, pair.second), rows_of(pair.second), tile);
    if (gradient_ == nullptr) return kernels<false, false>(xx_, pair.first, pair.second, tile, nullptr, nullptr);
    const double sum = kernels<true, true>(xx_, pair.first, pair.second, tile, weight_sum_.data() + pair.first * tile_,
                                           weight_sum_.data() + pair.second * tile_);
    accumulate<false>(tile, x_, pair.second, pair.first, true, corner);
    accumulate<true>(tile, x_, pair.first, pair.second, true, corner);
    return sum;
  }

  // The pair `which` of (0, 0), (0, 1), (1, 1), (0, 2), ...; those of two tiles count twice.
  double meet_within_teacher(std::size_t which, float* tile) const {
    std::size_t j = 0;
    while ((j + 1) * (j + 2) / 2 <= which) ++j;
    const std::size_t i = which - j * (j + 1) / 2;
    products(samples_of(y_, i), rows_of(i), samples_of(y_, j), rows_of(j), tile);
    if (i == j) drop_diagonal(i, tile);
    return kernels<false, false>(yy_, i, j, tile, nullptr, nullptr) * (i == j ? 1.0 : 2.0);
  }

  // What the products with centred samples leave out: the sample itself, and the distance of the means.
  void finish_gradient(float weight) {
    const auto n = static_cast<double>(n_);
    const double scale = 2.0 * static_cast<double>(weight) / (n * n);
    parallel_.for_each(static_cast<std::int64_t>(tiles_), [this, scale](std::int64_t tile) {
      const std::size_t first = static_cast<std::size_t>(tile) * tile_;
      for (std::size_t i = first; i < first + rows_of(static_cast<std::size_t>(tile)); ++i) {
        const auto all = static_cast<float>(scale * (weight_sum_[i] + cross_weight_sum_[i]));
        const auto across = static_cast<float>(scale * cross_weight_sum_[i]);
        const auto factor = static_cast<float>(scale);
        const float* HWY_RESTRICT row = x_.rows + i * d_;
        float* HWY_RESTRICT gradient = gradient_ + i * d_;
        for (std::size_t k = 0; k < d_; ++k) {
          const auto centred = static_cast<float>(static_cast<double>(row[k]) - x_.mean[k]);
          gradient[k] = factor * gradient[k] - all * centred - across * static_cast<float>(offset_[k]);
        }
      }
    });
  }

  std::size_t n_, d_;
  std::size_t panel_, tile_, tiles_, feature_panels_;
  float *value_, *gradient_;  // nullptr: not wanted
  Parallel parallel_;
  std::size_t places_count_;
  Floats memory_;  // one block for everything that is large
  Set x_, y_;
  Exponents xx_, yy_, xy_;                             // in xy the student lies in the lanes
  std::vector<double> weight_sum_, cross_weight_sum_;  // per student sample, over students and over teachers
  std::vector<double> offset_;                         // mean of x less mean of y
  Places places_;
};

void run(const Call& call) {
  const Array& weight = call.inputs[kWeight];
  const Array& gradient = call.outputs[kGradStudent];
  const float weight_value = weight.given() ? *weight.as<const float>() : 0.0f;
  const bool gradient_wanted = gradient.given() && weight_value != 0.0f;
  if (gradient_wanted || call.outputs[kValue].given()) {
    Problem(call, gradient_wanted).run(static_cast<Bandwidth>(call.choice(0)), weight_value);
  }
  if (gradient.given() && !gradient_wanted) {
    std::fill_n(gradient.as<float>(), static_cast<std::size_t>(gradient.elements()), 0.0f);
  }
}

}  // namespace mk_mmd_detail

void mk_mmd(const Call& call) { mk_mmd_detail::run(call); }

}  // namespace pykd::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

// ---- The kernel ----------------------------------------------------------------------------------
#if HWY_ONCE
namespace pykd::kernels {
namespace {

HWY_EXPORT(mk_mmd);

const char* refuse(const Call& call) {
  const bool weightless = call.outputs[mmd::kGradStudent].given() && !call.inputs[mmd::kWeight].given();
  return weightless ? "grad_student needs weight" : nullptr;
}

}  // namespace

void mk_mmd(const Call& call) { HWY_DYNAMIC_DISPATCH(mk_mmd)(call); }

namespace {
const bool registered = add({"mk_mmd",
                             {{"student", "batch features", Role::kTensor},
                              {"teacher", "batch features", Role::kTensor},
                              {"weight", "", Role::kFloat32, kOptional}},
                             {{"value", "", Role::kFloat32}, {"grad_student", "batch features", Role::kTensor}},
                             {{"bandwidth", mmd::kJoint, {"joint", "per_block"}}},
                             kFloat32Alone,
                             refuse,
                             mk_mmd});
}  // namespace

}  // namespace pykd::kernels
#endif  // HWY_ONCE
