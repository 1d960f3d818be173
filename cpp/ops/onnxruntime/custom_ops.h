// File: ops/onnxruntime/custom_ops.h
//
// The kernels as custom ops of ONNX Runtime: for every kernel and every dtype that its tensors may have, one op named
// <kernel>_<dtype> ("soft_target_bfloat16") in domain "pykd", and the same with _2, _3 and _4 behind it, for files that
// need it with several function bodies. The dtype is in the name because ONNX Runtime prefers a
// registered op to the function of the same name in the file without asking whether it fits: a dtype or device that no
// kernel covers has no op, and there ONNX Runtime runs the function.
//
// Inputs and outputs of a node follow the kernel's description; optional inputs, and outputs that are not wanted, are
// left out: an empty name, or nothing at the end. (A node with a function as its body must name every output, "" those
// that are not wanted: where the body runs, ONNX Runtime takes no fewer than the function has.) Attributes with choices
// are strings, the others floats; one that is missing has its default. The work runs on the threads of ONNX Runtime's
// session, or on its CUDA stream.
//
// The ops and their domains live until the process ends, as sessions do not own them.
#ifndef PYKD_OPS_ONNXRUNTIME_CUSTOM_OPS_H_
#define PYKD_OPS_ONNXRUNTIME_CUSTOM_OPS_H_

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "base/device.h"

namespace pykd::internal {

// The oldest ONNX Runtime is 1.21, whose interface has this number; later ones offer it, too.
constexpr std::uint32_t kOrtApiVersion = 21;
static_assert(ORT_API_VERSION >= kOrtApiVersion, "pykd needs the headers of ONNX Runtime 1.21 or newer");

// Asked for more than it has, OrtApiBase::GetApi() prints: so the version is compared first.
inline bool is_new_enough(const std::string& version) {
  int major = 0, minor = 0;
  if (std::sscanf(version.c_str(), "%d.%d", &major, &minor) != 2) return false;
  return major > 1 || (major == 1 && minor >= static_cast<int>(kOrtApiVersion));
}

// The names of the ops for sessions on that device. Throws Failure(PYKD_UNAVAILABLE) where it can have none, such as
// on a CUDA device without libpykd_cuda.
const std::vector<std::string>& kernel_ops(Device device);

// Adds them to the session options; the same Failure. `api` is that of the ONNX Runtime of these options.
void register_kernels(const OrtApi& api, OrtSessionOptions* options, Device device);

}  // namespace pykd::internal

// What every ONNX Runtime calls in a library of custom ops: the ops for the CPU.
//
//     options = onnxruntime.SessionOptions()
//     options.register_custom_ops_library(pykd.onnxruntime_ops_path())
extern "C" PYKD_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base);

#endif  // PYKD_OPS_ONNXRUNTIME_CUSTOM_OPS_H_
