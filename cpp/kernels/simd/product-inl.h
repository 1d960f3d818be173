// File: kernels/simd/product-inl.h
//
// Products of matrices, for kernels compiled once per instruction set: of samples with samples (Gram matrices,
// distances), and of weights with samples (gradients). Include it as math-inl.h.
//
//     multiply(used, depth, left, b, c, c_stride, add)
//
// c = A B, or c += A B where `add`, for kProductRows rows of A and `used` vectors of columns of B, from 1 to
// kProductVectors. B is a panel: panel_width() columns side by side, row k at b + k * panel_width(), aligned to a
// vector. The rows of c are c_stride apart. Who wants fewer rows lets c be a corner of its own.
//
// `left` tells where the entries of A lie: LeftPanel, LeftPanels or LeftRows. A sum runs over k in order, in float32,
// one MulAdd for each: it has the same bits whichever of these holds A, and however the matrix is cut into rows and
// panels.
#if defined(PYKD_KERNELS_SIMD_PRODUCT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef PYKD_KERNELS_SIMD_PRODUCT_INL_H_
#undef PYKD_KERNELS_SIMD_PRODUCT_INL_H_
#else
#define PYKD_KERNELS_SIMD_PRODUCT_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace pykd::kernels::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// The accumulators, kProductRows x kProductVectors vectors, stay in registers: 24 of 32, or 12 of 16.
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
constexpr std::size_t kProductRows = 8;
#define PYKD_PRODUCT_EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)
#elif HWY_TARGET == HWY_SCALAR
constexpr std::size_t kProductRows = 1;  // of three, those beyond the last sample would read lanes that nobody wrote
#define PYKD_PRODUCT_EACH_ROW(DO) DO(0)
#else
constexpr std::size_t kProductRows = 4;
#define PYKD_PRODUCT_EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3)
#endif
constexpr std::size_t kProductVectors = 3;

// kProductRows divides it.
HWY_INLINE std::size_t panel_width() { return kProductVectors * hn::Lanes(hn::ScalableTag<float>()); }

// How many vectors of a panel that starts at column `first` hold some of `count` columns.
HWY_INLINE std::size_t vectors_used(std::size_t first, std::size_t count) {
  const std::size_t lanes = hn::Lanes(hn::ScalableTag<float>());
  return std::min(kProductVectors, (count - first + lanes - 1) / lanes);
}

// A's rows lie side by side in a panel of their own: entry (row, k) at a[k * panel_width() + row].
class LeftPanel {
 public:
  explicit LeftPanel(const float* a) : a_(a), width_(panel_width()) {}
  std::size_t steps(std::size_t depth) const { return depth; }
  std::size_t index(std::size_t step) const { return step; }
  float at(std::size_t row, std::size_t k) const { return a_[k * width_ + row]; }
  void next() {}

 private:
  const float* a_;
  std::size_t width_;
};

// A row of A is a row of each of several panels: entry (row, k) at a[row * panel_width() + k], and after every
// panel_width() entries a jumps to the next panel.
class LeftPanels {
 public:
  LeftPanels(const float* a, std::size_t jump) : a_(a), jump_(jump), width_(panel_width()) {}
  std::size_t steps(std::size_t depth) const { return std::min(depth, width_); }
  std::size_t index(std::size_t step) const { return step; }
  float at(std::size_t row, std::size_t k) const { return a_[row * width_ + k]; }
  void next() { a_ += jump_; }

 private:
  const float* a_;
  std::size_t jump_, width_;
};

// Row r of A begins at a + r * stride, or is the last of `rows` rows. `listed`: only the k of a list count, in A and B,
// and depth is its length.
template <bool listed>
class LeftRows {
 public:
  LeftRows(const float* a, std::size_t stride, std::size_t rows, const std::uint32_t* list = nullptr) : list_(list) {
    for (std::size_t r = 0; r < kProductRows; ++r) rows_[r] = a + std::min(r, rows - 1) * stride;
  }
  std::size_t steps(std::size_t depth) const { return depth; }
  std::size_t index(std::size_t step) const { return listed ? list_[step] : step; }
  float at(std::size_t row, std::size_t k) const { return rows_[row][k]; }
  void next() {}

 private:
  const float* rows_[kProductRows];
  const std::uint32_t* list_;
};

template <std::size_t used, class Left>
HWY_INLINE void multiply_vectors(std::size_t depth, Left left, const float* HWY_RESTRICT b, float* HWY_RESTRICT c,
                                 std::size_t c_stride, bool add) {
  const hn::ScalableTag<float> d;
  using V = hn::Vec<decltype(d)>;
  const std::size_t lanes = hn::Lanes(d), width = kProductVectors * lanes;
#define PYKD_PRODUCT_ZERO(r) V c##r##0 = hn::Zero(d), c##r##1 = c##r##0, c##r##2 = c##r##0;
  PYKD_PRODUCT_EACH_ROW(PYKD_PRODUCT_ZERO)
  while (depth > 0) {
    const std::size_t steps = left.steps(depth);
    for (std::size_t step = 0; step < steps; ++step) {
      const std::size_t k = left.index(step);
      const V b0 = hn::Load(d, b + k * width);
      const V b1 = used > 1 ? hn::Load(d, b + k * width + lanes) : b0;
      const V b2 = used > 2 ? hn::Load(d, b + k * width + 2 * lanes) : b0;
#define PYKD_PRODUCT_STEP(r)                                \
  {                                                         \
    const V entry = hn::Set(d, left.at(r, k));              \
    c##r##0 = hn::MulAdd(entry, b0, c##r##0);               \
    if (used > 1) c##r##1 = hn::MulAdd(entry, b1, c##r##1); \
    if (used > 2) c##r##2 = hn::MulAdd(entry, b2, c##r##2); \
  }
      PYKD_PRODUCT_EACH_ROW(PYKD_PRODUCT_STEP)
    }
    depth -= steps;
    b += steps * width;
    left.next();
  }
#define PYKD_PRODUCT_STORE(r)                                                                            \
  {                                                                                                      \
    float* HWY_RESTRICT to = c + (r)*c_stride;                                                           \
    hn::StoreU(add ? hn::Add(hn::LoadU(d, to), c##r##0) : c##r##0, d, to);                               \
    if (used > 1) hn::StoreU(add ? hn::Add(hn::LoadU(d, to + lanes), c##r##1) : c##r##1, d, to + lanes); \
    if (used > 2) {                                                                                      \
      hn::StoreU(add ? hn::Add(hn::LoadU(d, to + 2 * lanes), c##r##2) : c##r##2, d, to + 2 * lanes);     \
    }                                                                                                    \
  }
  PYKD_PRODUCT_EACH_ROW(PYKD_PRODUCT_STORE)
#undef PYKD_PRODUCT_ZERO
#undef PYKD_PRODUCT_STEP
#undef PYKD_PRODUCT_STORE
}

template <class Left>
HWY_NOINLINE void multiply(std::size_t used, std::size_t depth, Left left, const float* b, float* c,
                           std::size_t c_stride, bool add) {
  if (used == 1) return multiply_vectors<1>(depth, left, b, c, c_stride, add);
  if (used == 2) return multiply_vectors<2>(depth, left, b, c, c_stride, add);
  return multiply_vectors<3>(depth, left, b, c, c_stride, add);
}

#undef PYKD_PRODUCT_EACH_ROW

}  // namespace pykd::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard, once per target
