// kernels/simd/product-inl.h on every instruction set of this processor, against float64.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/kernels_product_test.cpp"
#include "hwy/foreach_target.h"

#include "hwy/aligned_allocator.h"
#include "hwy/highway.h"
#include "kernels/simd/product-inl.h"

#ifndef PYKD_TESTS_KERNELS_PRODUCT_ONCE_
#define PYKD_TESTS_KERNELS_PRODUCT_ONCE_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pykd::tests {

enum class Left { kPanel, kPanels, kRows, kListed };

struct Product {
  std::size_t rows, depth, columns;
  std::vector<float> a, b;          // rows x depth, depth x columns
  std::vector<std::uint32_t> list;  // for kListed
  Left left;
  bool add;
  float before;          // what c holds
  std::vector<float> c;  // rows x columns
  bool stays_inside;     // nothing was written beyond the vectors in use
};

}  // namespace pykd::tests

#endif  // PYKD_TESTS_KERNELS_PRODUCT_ONCE_

HWY_BEFORE_NAMESPACE();
namespace pykd::kernels::HWY_NAMESPACE {

// Strip by strip and panel by panel, as a kernel does it.
void Multiply(tests::Product& x) {
  const size_t width = panel_width(), lanes = width / kProductVectors, stride = width + 3;
  const size_t panels = (x.depth + width - 1) / width, jump = kProductRows * width;
  const auto b = hwy::AllocateAligned<float>(x.depth * width);
  const auto a = hwy::AllocateAligned<float>((panels + 1) * jump + x.depth * width);
  std::vector<float> c;
  x.c.resize(x.rows * x.columns);
  x.stays_inside = true;
  for (size_t column = 0; column < x.columns; column += width) {
    const size_t used = vectors_used(column, x.columns), filled = std::min(width, x.columns - column);
    for (size_t k = 0; k < x.depth; ++k) {
      for (size_t j = 0; j < width; ++j) b[k * width + j] = j < filled ? x.b[k * x.columns + column + j] : 0.0f;
    }
    for (size_t row = 0; row < x.rows; row += kProductRows) {
      const size_t height = std::min(kProductRows, x.rows - row);
      const auto entry = [&](size_t r, size_t k) { return r < height ? x.a[(row + r) * x.depth + k] : 0.0f; };
      for (size_t r = 0; r < kProductRows; ++r) {
        for (size_t k = 0; k < x.depth; ++k) {
          const bool side_by_side = x.left == tests::Left::kPanel;
          a[side_by_side ? k * width + r : k / width * jump + r * width + k % width] = entry(r, k);
        }
      }
      c.assign(kProductRows * stride, x.before);
      const float* first = x.a.data() + row * x.depth;
      switch (x.left) {
        case tests::Left::kPanel:
          multiply(used, x.depth, LeftPanel(a.get()), b.get(), c.data(), stride, x.add);
          break;
        case tests::Left::kPanels:
          multiply(used, x.depth, LeftPanels(a.get(), jump), b.get(), c.data(), stride, x.add);
          break;
        case tests::Left::kRows:
          multiply(used, x.depth, LeftRows<false>(first, x.depth, height), b.get(), c.data(), stride, x.add);
          break;
        case tests::Left::kListed:
          multiply(used, x.list.size(), LeftRows<true>(first, x.depth, height, x.list.data()), b.get(), c.data(),
                   stride, x.add);
          break;
      }
      for (size_t r = 0; r < kProductRows; ++r) {
        for (size_t j = 0; j < stride; ++j) {
          if (j >= used * lanes) x.stays_inside = x.stays_inside && c[r * stride + j] == x.before;
          if (r < height && j < filled) x.c[(row + r) * x.columns + column + j] = c[r * stride + j];
        }
      }
    }
  }
}

}  // namespace pykd::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>
#include <string>

#include "tests/every_target.h"

namespace pykd::kernels {
namespace {

HWY_EXPORT(Multiply);

using tests::Left;
using tests::Product;

Product draw(std::size_t rows, std::size_t depth, std::size_t columns) {
  std::mt19937 random(static_cast<unsigned>(rows + 7 * depth + 49 * columns));
  std::normal_distribution<float> normal;
  Product x = {rows, depth, columns, {}, {}, {}, Left::kPanel, false, 0.75f, {}, false};
  for (std::size_t i = 0; i < rows * depth; ++i) x.a.push_back(normal(random));
  for (std::size_t i = 0; i < depth * columns; ++i) x.b.push_back(normal(random));
  return x;
}

// A sum in float32 in any order is off by at most half a unit of the last place of its terms per step.
void expect_close(const Product& x, const std::vector<std::uint32_t>& list) {
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < x.rows; ++i) {
    for (std::size_t j = 0; j < x.columns; ++j) {
      double sum = x.add ? double{x.before} : 0.0, terms = std::abs(sum);
      for (const std::uint32_t k : list) {
        const double term = double{x.a[i * x.depth + k]} * double{x.b[k * x.columns + j]};
        sum += term;
        terms += std::abs(term);
      }
      const double error = std::abs(double{x.c[i * x.columns + j]} - sum);
      if (!(error <= static_cast<double>(list.size() + 1) * 0x1p-23 * terms)) ++wrong;
    }
  }
  EXPECT_EQ(wrong, 0u);
  EXPECT_TRUE(x.stays_inside);
}

TEST(Product, IsThatOfFloat64WithTheSameBitsFromEveryLayout) {
  tests::on_every_target([] {
    for (const std::size_t rows : {1, 3, 8, 13}) {
      for (const std::size_t depth : {1, 2, 48, 150}) {
        for (const std::size_t columns : {1, 5, 16, 33, 97}) {
          for (const bool add : {false, true}) {
            SCOPED_TRACE(std::to_string(rows) + " x " + std::to_string(depth) + " x " + std::to_string(columns));
            Product x = draw(rows, depth, columns);
            x.add = add;
            x.list.resize(depth);
            std::iota(x.list.begin(), x.list.end(), 0u);
            HWY_DYNAMIC_DISPATCH(Multiply)(x);
            expect_close(x, x.list);
            const std::vector<float> expected = x.c;
            for (const Left left : {Left::kPanels, Left::kRows, Left::kListed}) {
              x.left = left;
              HWY_DYNAMIC_DISPATCH(Multiply)(x);
              EXPECT_EQ(x.c, expected) << "layout " << static_cast<int>(left);
              EXPECT_TRUE(x.stays_inside);
            }
          }
        }
      }
    }
  });
}

TEST(Product, TakesTheListedEntriesAlone) {
  tests::on_every_target([] {
    Product x = draw(11, 90, 50);
    x.left = Left::kListed;
    for (const std::vector<std::uint32_t>& list :
         {std::vector<std::uint32_t>{}, {89}, {0, 3, 4, 70}, {5, 6, 7, 8, 9, 10, 88}}) {
      x.list = list;
      HWY_DYNAMIC_DISPATCH(Multiply)(x);
      expect_close(x, list);
    }
  });
}

}  // namespace
}  // namespace pykd::kernels

#endif  // HWY_ONCE
