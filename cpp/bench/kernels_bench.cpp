// File: bench/kernels_bench.cpp
//
// The fused kernels alone, on raw memory: time, bytes per second, and how many times as long as the memory limit. That
// is the time in which the bytes that must move (each input once, each output once) pass at the speed of a copy of
// 256 MiB by the same threads, which reads and writes.
//
//     kernels_bench [threads [kernel]]     the defaults: one thread per core; all kernels with a case below
//
// Each case is compared with a plain float64 formula first. To add a kernel: a function that fills `cases`.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "hwy/aligned_allocator.h"
#include "kernels/host/threads.h"
#include "kernels/kernel.h"
#include "kernels/simd/targets.h"

namespace {

using namespace pykd::kernels;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// The median of at least `least` runs that together take at least half a second, after one to warm up.
double median_seconds(const std::function<void()>& work, int least = 9) {
  work();
  std::vector<double> times;
  double total = 0;
  while (static_cast<int>(times.size()) < least || (total < 0.5 && times.size() < 100000)) {
    const auto start = std::chrono::steady_clock::now();
    work();
    times.push_back(seconds_since(start));
    total += times.back();
  }
  const auto middle = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2);
  std::nth_element(times.begin(), middle, times.end());
  return *middle;
}

using Bytes = hwy::AlignedFreeUniquePtr<unsigned char[]>;

Bytes bytes(std::size_t count) {
  Bytes memory = hwy::AllocateAligned<unsigned char>(count);
  if (!memory) std::abort();
  std::memset(memory.get(), 0, count);  // touched: the pages are there
  return memory;
}

// Bytes read and written per second.
double copy_speed(const Parallel& parallel) {
  const std::size_t size = std::size_t{256} << 20;
  const Bytes from = bytes(size), to = bytes(size);
  const std::size_t share = size / static_cast<std::size_t>(parallel.threads);
  const double seconds = median_seconds([&] {
    parallel.for_each(parallel.threads, [&](std::int64_t i) {
      const std::size_t offset = share * static_cast<std::size_t>(i);
      std::memcpy(to.get() + offset, from.get() + offset, share);
    });
  });
  return 2.0 * static_cast<double>(size) / seconds;
}

std::size_t width(pykd_dtype dtype) { return dtype == PYKD_FLOAT32 ? 4 : 2; }

float read_entry(const unsigned char* p, pykd_dtype dtype, std::size_t i) {
  if (dtype == PYKD_FLOAT32) return reinterpret_cast<const float*>(p)[i];
  const std::uint32_t bits = std::uint32_t{reinterpret_cast<const std::uint16_t*>(p)[i]} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

void write_entry(unsigned char* p, pykd_dtype dtype, std::size_t i, float value) {
  if (dtype == PYKD_FLOAT32) {
    reinterpret_cast<float*>(p)[i] = value;
    return;
  }
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  reinterpret_cast<std::uint16_t*>(p)[i] = static_cast<std::uint16_t>(bits >> 16);
}

struct SoftTargetCase {
  const char* form;
  std::int64_t rows, classes;
  pykd_dtype dtype;  // float32 or bfloat16
  bool labels;
  bool gradient = true;
};

// cross_entropy (and labels) of one row in float64, with the gradient.
double reference_row(const unsigned char* student, const unsigned char* teacher, pykd_dtype dtype, std::size_t classes,
                     double temperature, double weight, std::int64_t label, double hard_weight,
                     std::vector<double>* gradient) {
  const auto softmax = [&](const unsigned char* logits, double t, double* log_sum) {
    double top = -HUGE_VAL, sum = 0;
    for (std::size_t j = 0; j < classes; ++j) top = std::max(top, read_entry(logits, dtype, j) / t);
    for (std::size_t j = 0; j < classes; ++j) sum += std::exp(read_entry(logits, dtype, j) / t - top);
    *log_sum = top + std::log(sum);
  };
  double log_s, log_t, log_h, value = 0;
  softmax(student, temperature, &log_s);
  softmax(teacher, temperature, &log_t);
  softmax(student, 1.0, &log_h);
  gradient->resize(classes);
  for (std::size_t j = 0; j < classes; ++j) {
    const double s = read_entry(student, dtype, j), t = read_entry(teacher, dtype, j);
    const double p = std::exp(t / temperature - log_t), log_q = s / temperature - log_s;
    value -= p * log_q;
    (*gradient)[j] = weight * (std::exp(log_q) - p) / temperature;
    if (label >= 0) {
      (*gradient)[j] += hard_weight * (std::exp(s - log_h) - (static_cast<std::int64_t>(j) == label ? 1.0 : 0.0));
    }
  }
  return value;
}

void soft_target(const Parallel& parallel, double speed) {
  const Kernel* kernel = find("soft_target");
  if (kernel == nullptr) return;
  const std::vector<SoftTargetCase> cases = {
      {"cross_entropy", 8, 10, PYKD_FLOAT32, false},
      {"cross_entropy", 256, 1000, PYKD_FLOAT32, false},
      {"cross_entropy", 256, 32000, PYKD_FLOAT32, false},
      {"cross_entropy", 64, 128000, PYKD_FLOAT32, false},
      {"cross_entropy", 256, 32000, PYKD_FLOAT32, true},
      {"cross_entropy", 256, 32000, PYKD_BFLOAT16, false},
      {"cross_entropy", 256, 32000, PYKD_FLOAT32, false, false},
      {"kl", 256, 32000, PYKD_FLOAT32, false},
      {"reverse_kl", 256, 32000, PYKD_FLOAT32, false},
      {"symmetric_kl", 256, 32000, PYKD_FLOAT32, false},
      {"jsd", 256, 32000, PYKD_FLOAT32, false},
  };
  for (const SoftTargetCase& c : cases) {
    const std::size_t classes = static_cast<std::size_t>(c.classes);
    const std::size_t entries = static_cast<std::size_t>(c.rows) * classes;
    const Bytes student = bytes(entries * width(c.dtype)), teacher = bytes(entries * width(c.dtype));
    const Bytes gradient = bytes(entries * width(c.dtype));
    std::mt19937 random(7);
    std::normal_distribution<float> normal(0.0f, 3.0f);
    for (std::size_t i = 0; i < entries; ++i) {
      write_entry(student.get(), c.dtype, i, normal(random));
      write_entry(teacher.get(), c.dtype, i, normal(random));
    }
    std::vector<float> weight(static_cast<std::size_t>(c.rows), 0.5f), soft(weight.size()), hard(weight.size());
    std::vector<std::int64_t> labels(weight.size());
    for (std::int64_t& label : labels) label = static_cast<std::int64_t>(random() % classes);
    float temperature = 2.0f;
    const std::int64_t matrix[2] = {c.rows, c.classes}, vector[1] = {c.rows};
    Array inputs[7], outputs[3];
    inputs[0] = {student.get(), c.dtype, 2, matrix};
    inputs[1] = {teacher.get(), c.dtype, 2, matrix};
    inputs[2] = {&temperature, PYKD_FLOAT32, 0, nullptr};
    if (c.gradient) inputs[3] = {weight.data(), PYKD_FLOAT32, 1, vector};
    if (c.labels) inputs[4] = {labels.data(), PYKD_INT64, 1, vector};
    if (c.labels && c.gradient) inputs[6] = {weight.data(), PYKD_FLOAT32, 1, vector};
    outputs[0] = {soft.data(), PYKD_FLOAT32, 1, vector};
    if (c.labels) outputs[1] = {hard.data(), PYKD_FLOAT32, 1, vector};
    if (c.gradient) outputs[2] = {gradient.get(), c.dtype, 2, matrix};
    double attributes[3] = {0, 1, 0.5};
    for (std::size_t i = 0; i < kernel->attributes[0].choices.size(); ++i) {
      if (std::strcmp(kernel->attributes[0].choices[i], c.form) == 0) attributes[0] = static_cast<double>(i);
    }
    const Call call{inputs, outputs, attributes, c.dtype, &parallel};
    if (kernel->refuse(call) != nullptr) std::abort();
    kernel->cpu(call);
    if (std::strcmp(c.form, "cross_entropy") == 0) {
      for (const std::size_t row : {std::size_t{0}, static_cast<std::size_t>(c.rows) - 1}) {
        const std::size_t offset = row * classes * width(c.dtype);
        std::vector<double> expected;
        const double value = reference_row(student.get() + offset, teacher.get() + offset, c.dtype, classes,
                                           temperature, 0.5, c.labels ? labels[row] : -1, 0.5, &expected);
        bool right = std::abs(value - soft[row]) <= 1e-6 * std::max(1.0, value);
        double largest = 0;
        for (const double g : expected) largest = std::max(largest, std::abs(g));
        for (std::size_t j = 0; c.gradient && j < classes; ++j) {
          const double error = std::abs(read_entry(gradient.get() + offset, c.dtype, j) - expected[j]);
          right = right && error <= (c.dtype == PYKD_FLOAT32 ? 1e-6 : 1.0 / 256) * largest;
        }
        if (!right) {
          std::fprintf(stderr, "soft_target %s: row %zu is wrong\n", c.form, row);
          std::exit(1);
        }
      }
    }
    const int calls = entries < 10000 ? 1000 : 1;
    const double seconds = median_seconds([&] {
                             for (int i = 0; i < calls; ++i) kernel->cpu(call);
                           }) /
                           calls;
    const double moved = static_cast<double>(entries * width(c.dtype)) * (c.gradient ? 3 : 2);
    std::printf("soft_target  %-13s %4lldx%-6lld %-8s %-11s %-8s %9.4f ms %7.1f GB/s %6.2f x the limit\n", c.form,
                static_cast<long long>(c.rows), static_cast<long long>(c.classes),
                c.dtype == PYKD_FLOAT32 ? "float32" : "bfloat16", c.labels ? "soft + hard" : "soft",
                c.gradient ? "gradient" : "value", seconds * 1e3, moved / seconds * 1e-9, seconds * speed / moved);
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 0;
  const std::string wanted = argc > 2 ? argv[2] : "";
  const Parallel parallel = own_threads(threads);
  const double speed = copy_speed(parallel);
  std::printf("%d threads, %s, copy of 256 MiB: %.1f GB/s read and written\n", parallel.threads,
              simd_targets().front().c_str(), speed * 1e-9);
  if (wanted.empty() || wanted == "soft_target") soft_target(parallel, speed);
  return 0;
}
