// File: bench/timing.h
//
// What the benchmark programs share: the median time of a call, and lengths from the command line.
#ifndef PYKD_BENCH_TIMING_H_
#define PYKD_BENCH_TIMING_H_

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace pykd::bench {

// Median time of one call, in seconds: nine rounds long enough for the clock, after some calls to warm up.
template <class Work>
double median_seconds(const Work& work, double budget = 1.0) {
  using clock = std::chrono::steady_clock;
  const auto round_of = [&](long count) {
    const auto start = clock::now();
    for (long i = 0; i < count; ++i) work();
    return std::chrono::duration<double>(clock::now() - start).count() / static_cast<double>(count);
  };
  round_of(3);
  const long count = std::max(1L, static_cast<long>(budget / 9 / std::max(round_of(3), 1e-8)));
  std::vector<double> rounds;
  for (int i = 0; i < 9; ++i) rounds.push_back(round_of(count));
  std::nth_element(rounds.begin(), rounds.begin() + 4, rounds.end());
  return rounds[4];
}

// "batch=8", "classes=10" → lengths by axis name. "labels=4": four samples in a row have the same label; else all have
// 0.
inline std::map<std::string, std::int64_t> lengths_from(int count, char** words) {
  std::map<std::string, std::int64_t> lengths;
  for (int i = 0; i < count; ++i) {
    const char* equals = std::strchr(words[i], '=');
    if (equals == nullptr) throw std::invalid_argument(std::string("expected axis=length, got ") + words[i]);
    lengths[std::string(words[i], static_cast<std::size_t>(equals - words[i]))] = std::atoll(equals + 1);
  }
  return lengths;
}

}  // namespace pykd::bench

#endif  // PYKD_BENCH_TIMING_H_
