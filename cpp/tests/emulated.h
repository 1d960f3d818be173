// What the tests on an emulated GPU share: tensors that lie anywhere, numbers of their dtype, comparisons.
#ifndef PYKD_TESTS_EMULATED_H_
#define PYKD_TESTS_EMULATED_H_

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels/cuda/gpu.cuh"

namespace pykd::kernels::emulated {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

using Values = std::vector<double>;

// To the nearest number of the dtype.
template <class T>
double rounded(double x) {
  return T::widen(T::narrow(static_cast<float>(x)));
}

// A tensor whose first element lies `lead` elements after a 16-byte boundary, with guards around it.
template <class T>
class Tensor {
 public:
  Tensor(const Values& values, int lead) : size_(values.size()), lead_(lead), words_((lead + size_) / T::kLanes + 3) {
    std::memset(static_cast<void*>(words_.data()), 0x7f, words_.size() * sizeof(gpu::Words));  // NaN, in bfloat16 3e38
    for (std::size_t i = 0; i < size_; ++i) data()[i] = T::narrow(static_cast<float>(values[i]));
  }
  typename T::Storage* data() { return reinterpret_cast<typename T::Storage*>(words_.data() + 1) + lead_; }
  double operator[](std::size_t i) { return T::widen(data()[i]); }
  // Nothing was written beside it.
  bool intact() {
    const auto* begin = reinterpret_cast<unsigned char*>(words_.data());
    const auto* end = begin + words_.size() * sizeof(gpu::Words);
    const auto* first = reinterpret_cast<unsigned char*>(data());
    const auto* last = first + size_ * sizeof(typename T::Storage);
    for (const auto* p = begin; p < first; ++p)
      if (*p != 0x7f) return false;
    for (const auto* p = last; p < end; ++p)
      if (*p != 0x7f) return false;
    return true;
  }

 private:
  std::size_t size_;
  int lead_;
  std::vector<gpu::Words> words_;
};

// Half a unit in the last place of 1 in the tensors' dtype.
template <class T>
constexpr double half_unit() {
  return sizeof(typename T::Storage) == 4 ? 0x1p-24 : std::is_same_v<T, gpu::Float16> ? 0x1p-11 : 0x1p-8;
}

inline bool near(double got, double want, double relative, double absolute) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::isinf(want)) return got == want;
  return std::fabs(got - want) <= absolute + relative * std::fabs(want);
}

inline void expect_near(const char* what, const Values& got, const Values& want, double relative, double absolute) {
  ASSERT_EQ(got.size(), want.size()) << what;
  for (std::size_t i = 0; i < got.size(); ++i) {
    EXPECT_TRUE(near(got[i], want[i], relative, absolute))
        << what << "[" << i << "] is " << got[i] << ", expected " << want[i];
    if (!near(got[i], want[i], relative, absolute)) return;  // one is enough
  }
}

}  // namespace pykd::kernels::emulated

#endif  // PYKD_TESTS_EMULATED_H_
