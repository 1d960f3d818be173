// File: runtime/signature/call.h
//
// The checks of a call against the signature of a loss. Every check happens before an engine runs, so
// that an engine may rely on names, ranks, lengths, dtypes, devices and labels.
#ifndef PYKD_RUNTIME_SIGNATURE_CALL_H_
#define PYKD_RUNTIME_SIGNATURE_CALL_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/device.h"
#include "pykd/pykd.h"
#include "runtime/signature/signature.h"

namespace pykd::internal {

// What the inputs of a call determine.
struct Binding {
  std::vector<std::int64_t> lengths;      // by Signature::axes
  pykd_dtype float_dtype = PYKD_FLOAT32;  // of the first floating input
};

// Whether labels on the CPU are compared with the number of classes.
enum class LabelCheck { kSkip, kRange };

// Each of these throws Failure(PYKD_INVALID_VALUE or PYKD_INVALID_TYPE) with a message that names
// the argument. `ordered` is filled in the order of the signature.
Binding check_inputs(const Signature& signature, Device device, const pykd_tensor* inputs, std::size_t num_inputs,
                     std::vector<pykd_tensor>& ordered, LabelCheck labels = LabelCheck::kRange);
void check_parameters(const Signature& signature, const Binding& binding, const pykd_parameter* parameters,
                      std::size_t num_parameters, std::vector<double>& ordered);
void check_outputs(const Signature& signature, Device device, const Binding& binding,
                   const std::vector<pykd_tensor>& inputs, const pykd_tensor* outputs, std::size_t num_outputs,
                   std::vector<std::size_t>& output_ids);

// The index of the output `name`; throws Failure(PYKD_INVALID_VALUE) where there is none.
std::size_t find_output(const Signature& signature, const char* name);
// The dtype that an output has in a call with these inputs.
pykd_dtype output_dtype(const OutputSpec& output, pykd_dtype float_dtype);

}  // namespace pykd::internal

#endif  // PYKD_RUNTIME_SIGNATURE_CALL_H_
