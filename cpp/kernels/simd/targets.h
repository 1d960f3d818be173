// File: kernels/simd/targets.h
//
// Which SIMD instruction set the kernels use. Highway chooses when a kernel first runs; tests and measurements may
// want another one.
#ifndef PYKD_KERNELS_SIMD_TARGETS_H_
#define PYKD_KERNELS_SIMD_TARGETS_H_

#include <string>
#include <vector>

namespace pykd::kernels {

// What the kernels were compiled for and this processor has, best first.
std::vector<std::string> simd_targets();

// Uses the one of that name from now on; nullptr: the best. False where it is not in the list. Not while a kernel runs.
bool use_simd(const char* name);

}  // namespace pykd::kernels

#endif  // PYKD_KERNELS_SIMD_TARGETS_H_
