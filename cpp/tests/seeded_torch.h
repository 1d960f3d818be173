// File: tests/seeded_torch.h
//
// The same random tensors in every run: torch begins a process in C++ with other ones each time, and a bound that holds
// for most of them fails now and then. PYKD_TEST_SEED takes others, to try a bound with many.
#ifndef PYKD_TESTS_SEEDED_TORCH_H_
#define PYKD_TESTS_SEEDED_TORCH_H_

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdlib>

namespace pykd::tests {

class SeededTorch : public testing::EmptyTestEventListener {
  void OnTestStart(const testing::TestInfo& /*test*/) override {
    const char* seed = std::getenv("PYKD_TEST_SEED");
    torch::manual_seed(seed == nullptr ? 0 : std::strtoull(seed, nullptr, 10));
  }
};

// The one who includes this file has it: gtest_main's tests start afterwards.
inline const bool kTorchIsSeeded = [] {
  testing::UnitTest::GetInstance()->listeners().Append(new SeededTorch);
  return true;
}();

}  // namespace pykd::tests

#endif  // PYKD_TESTS_SEEDED_TORCH_H_
