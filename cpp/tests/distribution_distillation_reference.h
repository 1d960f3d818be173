// distribution_distillation by its formula in float64, pair by pair and node by node; and data for it.
#ifndef PYKD_TESTS_DISTRIBUTION_DISTILLATION_REFERENCE_H_
#define PYKD_TESTS_DISTRIBUTION_DISTILLATION_REFERENCE_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "kernels/distribution_distillation/distribution_distillation_grid.h"

namespace pykd::tests::pairs {

using kernels::ddl::kAll;
using kernels::ddl::kHardest;
using kernels::ddl::Mining;

constexpr float kGuard = -12345.0f;

struct Samples {
  std::int64_t n, d;
  std::vector<float> x, y;
  std::vector<std::int64_t> labels;
};

struct Settings {
  double bins = 1000;
  double width = 0.1;
  Mining mining = kHardest;
  std::vector<float> weights = {0.7f, 0.3f, -0.4f};  // upstream, of the three values
};

// ---- The definition ----------------------------------------------------------------------------------

template <class T>
struct Answer {
  T values[3] = {0, 0, 0};
  std::vector<T> gradient;
  T slopes[2] = {0, 0};  // sum over pairs of |d divergence / d similarity|
};

// A similarity that counts, and the pairs that it is the similarity of: one, or those that are equally similar.
template <class T>
struct Similarity {
  T value;
  std::vector<std::pair<std::int64_t, std::int64_t>> pairs;
};

template <class T>
T product(const std::vector<float>& rows, std::int64_t i, std::int64_t j, std::int64_t d) {
  T sum = 0;
  for (std::int64_t k = 0; k < d; ++k) sum += T{rows[i * d + k]} * T{rows[j * d + k]};
  return sum;
}

template <class T>
std::vector<Similarity<T>> positives(const Samples& s, const std::vector<float>& rows) {
  std::vector<Similarity<T>> found;
  for (std::int64_t i = 0; i < s.n; ++i) {
    for (std::int64_t j = 0; j < i; ++j) {
      if (s.labels[i] == s.labels[j]) found.push_back({product<T>(rows, i, j, s.d), {{i, j}}});
    }
  }
  return found;
}

template <class T>
std::vector<Similarity<T>> negatives(const Samples& s, const std::vector<float>& rows, Mining mining) {
  std::vector<Similarity<T>> found;
  for (std::int64_t i = 0; i < s.n; ++i) {
    Similarity<T> hardest{-2, {}};
    for (std::int64_t j = 0; j < s.n; ++j) {
      if (s.labels[i] == s.labels[j]) continue;
      const T value = product<T>(rows, i, j, s.d);
      if (mining == kAll && j < i) found.push_back({value, {{i, j}}});
      if (value > hardest.value) hardest = {value, {}};
      if (value == hardest.value) hardest.pairs.push_back({i, j});
    }
    if (mining == kHardest && !hardest.pairs.empty()) found.push_back(hardest);
  }
  return found;
}

template <class T>
T bell(T s, std::size_t r, const Settings& settings) {
  const T distance = s - (T{-1} + T{2} * static_cast<T>(r) / static_cast<T>(settings.bins - 1));
  return -distance * distance / (T{2} * static_cast<T>(settings.width * settings.width));
}

template <class T>
T log_sum(const std::vector<T>& exponents) {
  const T largest = *std::max_element(exponents.begin(), exponents.end());
  T sum = 0;
  for (const T exponent : exponents) sum += std::exp(exponent - largest);
  return largest + std::log(sum);
}

// Logarithms of what the nodes sum up to; the last entry is that of their total.
template <class T>
std::vector<T> log_histogram(const std::vector<Similarity<T>>& similarities, const Settings& settings) {
  std::vector<T> logs;
  for (std::size_t r = 0; r < static_cast<std::size_t>(settings.bins); ++r) {
    std::vector<T> exponents;
    exponents.reserve(similarities.size());
    for (const Similarity<T>& s : similarities) exponents.push_back(bell(s.value, r, settings));
    logs.push_back(log_sum(exponents));
  }
  logs.push_back(log_sum(logs));
  return logs;
}

template <class T>
T mean(const std::vector<Similarity<T>>& similarities) {
  T sum = 0;
  for (const Similarity<T>& s : similarities) sum += s.value;
  return similarities.empty() ? 0 : sum / static_cast<T>(similarities.size());
}

template <class T>
Answer<T> reference(const Samples& s, const Settings& settings, bool with_gradient = true) {
  Answer<T> answer;
  answer.gradient.assign(s.x.size(), 0);
  for (int sort = 0; sort < 2; ++sort) {
    const auto student = sort == 0 ? positives<T>(s, s.x) : negatives<T>(s, s.x, settings.mining);
    const auto teacher = sort == 0 ? positives<T>(s, s.y) : negatives<T>(s, s.y, settings.mining);
    answer.values[2] += (sort == 0 ? -2 : 2) * (mean(student) + mean(teacher));
    if (student.empty()) continue;
    const std::vector<T> p = log_histogram(teacher, settings), q = log_histogram(student, settings);
    for (std::size_t r = 0; r + 1 < p.size(); ++r) {
      answer.values[sort] += std::exp(p[r] - p.back()) * ((p[r] - p.back()) - (q[r] - q.back()));
    }
    for (const Similarity<T>& pair : student) {
      if (!with_gradient) break;
      T slope = 0;
      for (std::size_t r = 0; r + 1 < p.size(); ++r) {
        const T node = T{-1} + T{2} * static_cast<T>(r) / static_cast<T>(settings.bins - 1);
        const T share = std::exp(bell(pair.value, r, settings) - q[r]);  // of this pair in the node
        const T pull = std::exp(q[r] - q.back()) - std::exp(p[r] - p.back());
        slope -= pull * share * (pair.value - node) / static_cast<T>(settings.width * settings.width);
      }
      answer.slopes[sort] += std::abs(slope);
      T weight = static_cast<T>(settings.weights[sort]) * slope;
      weight += static_cast<T>(settings.weights[2]) * (sort == 0 ? -2 : 2) / static_cast<T>(student.size());
      weight /= static_cast<T>(pair.pairs.size());
      for (const auto& [i, j] : pair.pairs) {
        for (std::int64_t k = 0; k < s.d; ++k) {
          answer.gradient[i * s.d + k] += weight * s.x[j * s.d + k];
          answer.gradient[j * s.d + k] += weight * s.x[i * s.d + k];
        }
      }
    }
  }
  return answer;
}

struct Result {
  std::array<float, 3> values = {kGuard, kGuard, kGuard};
  std::vector<float> gradient;
};

// ---- Data ------------------------------------------------------------------------------------------------

inline void normalise(std::vector<float>& rows, std::int64_t d) {
  for (std::size_t begin = 0; begin < rows.size(); begin += static_cast<std::size_t>(d)) {
    double squared = 0.0;
    for (std::int64_t k = 0; k < d; ++k) squared += double{rows[begin + k]} * double{rows[begin + k]};
    for (std::int64_t k = 0; k < d; ++k) rows[begin + k] /= static_cast<float>(std::sqrt(squared));
  }
}

// Samples around the centres of `people`, the student's further away from them.
inline Samples draw(std::int64_t n, std::int64_t d, std::int64_t people, unsigned seed = 1, float noise = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> centres(people * d);
  for (float& entry : centres) entry = normal(generator);
  Samples s{n, d, {}, {}, {}};
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t person = i * 7 % people;
    s.labels.push_back(person * 1'000'000'000'000 - 3);
    for (std::int64_t k = 0; k < d; ++k) {
      s.x.push_back(centres[person * d + k] + noise * normal(generator));
      s.y.push_back(centres[person * d + k] + 0.5f * noise * normal(generator));
    }
  }
  normalise(s.x, d);
  normalise(s.y, d);
  return s;
}

inline double largest(const std::vector<double>& values) {
  double most = 0.0;
  for (const double value : values) most = std::max(most, std::abs(value));
  return most;
}

template <class T>
double largest_error(const std::vector<T>& got, const std::vector<double>& want) {
  double most = 0.0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double error = std::abs(static_cast<double>(got[i]) - want[i]);
    most = error <= most ? most : error;  // NaN stays
  }
  return most;
}

// float32 similarities are known to some 1e-7; what a divergence makes of that is not the kernel's doing.
inline double margin(const Answer<double>& want, int value) {
  const double sensitivity = value < 2 ? want.slopes[value] : 1.0;
  return 1e-6 * (1 + std::abs(want.values[value])) + 3e-7 * sensitivity;
}

inline void expect_right(const Result& got, const Answer<double>& want) {
  for (int i = 0; i < 3; ++i) EXPECT_NEAR(got.values[i], want.values[i], margin(want, i)) << "value " << i;
  EXPECT_LE(largest_error(got.gradient, want.gradient), 5e-6 * largest(want.gradient) + 1e-7);
}

}  // namespace pykd::tests::pairs

#endif  // PYKD_TESTS_DISTRIBUTION_DISTILLATION_REFERENCE_H_
