// File: tests/every_target.h
//
// A test of a kernel on every instruction set of this machine.
#ifndef PYKD_TESTS_EVERY_TARGET_H_
#define PYKD_TESTS_EVERY_TARGET_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "kernels/simd/targets.h"

namespace pykd::tests {

// Runs the statement on every instruction set, the best one last.
template <class Statement>
void on_every_target(const Statement& statement) {
  std::vector<std::string> names = kernels::simd_targets();
  ASSERT_FALSE(names.empty());
  std::reverse(names.begin(), names.end());
  for (const std::string& name : names) {
    SCOPED_TRACE(name);
    ASSERT_TRUE(kernels::use_simd(name.c_str()));
    statement();
  }
  kernels::use_simd(nullptr);
}

}  // namespace pykd::tests

#endif  // PYKD_TESTS_EVERY_TARGET_H_
