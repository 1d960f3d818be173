// File: tests/row_results.h
//
// Runs kernels that have a value per row and the student's gradient, and compares both with a reference.
#ifndef PYKD_TESTS_ROW_RESULTS_H_
#define PYKD_TESTS_ROW_RESULTS_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "kernels/kernel.h"
#include "tests/every_target.h"
#include "tests/half_numbers.h"
#include "tests/kernel_threads.h"

namespace pykd::tests {

struct RowResults {
  std::vector<double> value, gradient;  // of rows, and of the entries of the student
};

// What a kernel makes of its inputs, in the order of its description, of which the first is the student: a matrix.
// `before` fills the bytes of the gradient.
inline RowResults run_rows(const char* name, pykd_dtype dtype, const std::vector<kernels::Array>& inputs,
                           const std::vector<double>& attributes, int thread_count, unsigned char before = 0xFF) {
  const kernels::Kernel* kernel = kernels::find(name);
  const std::int64_t* shape = inputs[0].shape;
  Bytes gradient(static_cast<std::size_t>(shape[0] * shape[1]) * (dtype == PYKD_FLOAT32 ? 4 : 2), before);
  std::vector<float> value(static_cast<std::size_t>(shape[0]), -1.0f);
  const kernels::Array outputs[] = {{value.data(), PYKD_FLOAT32, 1, shape}, {gradient.data(), dtype, 2, shape}};
  const kernels::Parallel parallel = threads(&thread_count);
  kernels::Call call;
  call.inputs = inputs.data();
  call.outputs = outputs;
  call.attributes = attributes.data();
  call.dtype = dtype;
  call.parallel = &parallel;
  check(*kernel, call);
  kernel->cpu(call);
  const std::vector<float> gradients = decode(dtype, gradient);
  return {{value.begin(), value.end()}, {gradients.begin(), gradients.end()}};
}

// Values to `exactness` of the larger of 1 and themselves; gradients of the largest entry of their row, or of `least`,
// and to the rounding of their type.
inline void expect_rows_close(const RowResults& got, const RowResults& want, pykd_dtype dtype, const std::string& where,
                              double exactness, double least) {
  const std::size_t rows = want.value.size(), entries = want.gradient.size() / rows;
  for (std::size_t row = 0; row < rows; ++row) {
    const double value = want.value[row];
    EXPECT_LE(std::abs(got.value[row] - value), exactness * std::max(1.0, std::abs(value))) << where << ", row " << row;
    double largest = least, worst = 0;
    for (std::size_t i = row * entries; i < (row + 1) * entries; ++i) {
      largest = std::max(largest, std::abs(want.gradient[i]));
      const double unit = dtype == PYKD_FLOAT32 ? 0 : dtype == PYKD_FLOAT16 ? 0x1p-11 : 0x1p-8;
      const double error = std::abs(got.gradient[i] - want.gradient[i]) - unit * std::abs(want.gradient[i]);
      worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(worst, error);
    }
    EXPECT_LE(worst, exactness * largest + (dtype == PYKD_FLOAT16 ? 0x1p-25 : 0)) << where << ", row " << row;
  }
}

// On every instruction set of this machine, of every form.
template <class Forms, class Check>
void for_every_form(const Forms& forms, const Check& check) {
  on_every_target([&] {
    for (const auto form : forms) check(form);
  });
}

}  // namespace pykd::tests

#endif  // PYKD_TESTS_ROW_RESULTS_H_
