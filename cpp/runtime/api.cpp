// The C interface: every function checks its pointers, calls the library and turns what it throws
// into a status. What the functions do is said in pykd.h.
#include <cstddef>
#include <iterator>
#include <memory>
#include <string>

#include "base/error.h"
#include "base/struct_size.h"
#include "kernels/host/hooks.h"
#include "kernels/host/memory.h"
#include "pykd/pykd.h"
#include "runtime/artefact/checksum.h"
#include "runtime/artefact/onnx_scan.h"
#include "runtime/loss.h"
#include "runtime/scoring.h"
#include "runtime/signature/call.h"

using pykd::internal::copy_sized;
using pykd::internal::fail;
using pykd::internal::guarded;
using pykd::internal::InputSpec;
using pykd::internal::Loss;
using pykd::internal::OutputSpec;
using pykd::internal::ParameterSpec;
using pykd::internal::Signature;
using pykd::internal::TensorSpec;
using pykd::internal::write_sized;

struct pykd_loss {
  std::unique_ptr<const Loss> loss;
};

namespace {

template <class T>
void check_pointer(const T* pointer, const char* what) {
  if (pointer == nullptr) fail(PYKD_INVALID_VALUE, what, "NULL", "pass a pointer to one");
}

const Signature& signature_of(const pykd_loss* loss) {
  check_pointer(loss, "a loss");
  return loss->loss->signature();
}

template <class Specs>
const typename Specs::value_type& item_at(const Specs& specs, std::size_t index, const char* what) {
  if (index >= specs.size()) {
    fail(PYKD_INVALID_VALUE, std::string("the index of one of ") + std::to_string(specs.size()) + " " + what,
         std::to_string(index), "count from 0 and ask for their number first");
  }
  return specs[index];
}

void write_tensor_info(const TensorSpec& spec, std::size_t partner, pykd_tensor_info* info) {
  check_pointer(info, "a pykd_tensor_info to write to");
  const pykd_tensor_info value = {sizeof value,
                                  spec.name.c_str(),
                                  static_cast<std::int32_t>(spec.rank()),
                                  spec.axis_names.data(),
                                  spec.dtypes,
                                  partner == pykd::internal::kNone ? 0 : 1,
                                  spec.least_lengths.data(),
                                  spec.lengths.data()};
  write_sized(value, *info, offsetof(pykd_tensor_info, least_lengths), "a pykd_tensor_info", "PYKD_TENSOR_INFO_INIT");
}

std::unique_ptr<Loss> load_path(const char* path, const pykd::internal::LoadOptions& options) {
  // An export may replace the folder while it is read; then it is read again.
  for (int attempt = 1;; ++attempt) {
    pykd::internal::Artefact artefact = pykd::internal::read_artefact(path);
    try {
      return Loss::load(artefact, options);
    } catch (const pykd::internal::Failure&) {
      constexpr int kAttempts = 10;
      if (attempt == kAttempts || !was_replaced(artefact)) throw;
    }
  }
}

std::unique_ptr<Loss> load_bytes(const void* bytes, std::size_t size, const pykd::internal::LoadOptions& options) {
  pykd::internal::Artefact artefact = pykd::internal::wrap_artefact(bytes, size);
  return Loss::load(artefact, options);
}

pykd_loss* wrap_loss(std::unique_ptr<Loss> loss) {
  auto result = std::make_unique<pykd_loss>();
  const Loss& loaded = *loss;
  pykd::kernels::log(PYKD_LOG_INFO, "pykd: a loss on " + loaded.engine() + " " + loaded.engine_version() + ", device " +
                                        loaded.device_name() +
                                        ", kernels: " + (loaded.kernels().empty() ? "none" : loaded.kernels()));
  if (!loaded.passed_over().empty()) {
    pykd::kernels::log(PYKD_LOG_WARNING, "pykd: passed over " + loaded.passed_over());
  }
  result->loss = std::move(loss);
  return result.release();
}

}  // namespace

extern "C" {

uint32_t pykd_abi_version(void) { return PYKD_ABI_VERSION; }

const char* pykd_version(void) { return PYKD_VERSION; }

pykd_status pykd_load(const char* path, const pykd_load_options* options, pykd_loss** loss) {
  return guarded([&] {
    check_pointer(path, "the path of an artefact");
    if (*path == '\0') fail(PYKD_NOT_FOUND, "the path of an artefact", "an empty one", "name a folder or a file");
    check_pointer(loss, "a pykd_loss* to write to");
    *loss = wrap_loss(load_path(path, pykd::internal::read_options(options)));
  });
}

pykd_status pykd_check_onnx(const void* bytes, size_t size) {
  return guarded([&] {
    check_pointer(bytes, "the bytes of an ONNX file");
    const pykd::internal::Artefact artefact = pykd::internal::wrap_artefact(bytes, size);
    if (artefact.merged) refuse_merged(*artefact.merged);
    if (!artefact.value) {
      pykd::internal::fail(PYKD_BAD_ARTEFACT, "an ONNX file", "a ZIP archive", "give the bytes of an ONNX file");
    }
    check_integrity(*artefact.value);
    scan_onnx(*artefact.value);
  });
}

pykd_status pykd_load_bytes(const void* bytes, size_t size, const pykd_load_options* options, pykd_loss** loss) {
  return guarded([&] {
    check_pointer(bytes, "the bytes of an artefact");
    check_pointer(loss, "a pykd_loss* to write to");
    *loss = wrap_loss(load_bytes(bytes, size, pykd::internal::read_options(options)));
  });
}

void pykd_free(pykd_loss* loss) {
  // In a child of fork() its engine would wait for threads that are not there: what the parent made is left alone.
  if (loss != nullptr && loss->loss->of_this_process()) delete loss;
}

void* pykd_allocate(size_t bytes) { return pykd::kernels::KeptMemory::instance().allocate(bytes); }

void pykd_deallocate(void* memory) { pykd::kernels::KeptMemory::instance().deallocate(memory); }

pykd_status pykd_set_hooks(const pykd_hooks* hooks) {
  return guarded([&] {
    const pykd_hooks none = PYKD_HOOKS_INIT;
    const pykd_hooks given =
        hooks == nullptr ? none : copy_sized(*hooks, none, sizeof none, "hooks", "PYKD_HOOKS_INIT");
    if ((given.allocate == nullptr) != (given.deallocate == nullptr)) {
      fail(PYKD_INVALID_VALUE, "allocate and deallocate, or neither", "one of them", "set both");
    }
    pykd::kernels::set_hooks(given);
  });
}

void pykd_trim_memory(void) { pykd::kernels::KeptMemory::instance().trim(); }

const char* pykd_metadata(const pykd_loss* loss) {
  return loss == nullptr ? "" : loss->loss->signature().metadata.c_str();
}
const char* pykd_engine(const pykd_loss* loss) { return loss == nullptr ? "" : loss->loss->engine().c_str(); }
const char* pykd_engine_version(const pykd_loss* loss) {
  return loss == nullptr ? "" : loss->loss->engine_version().c_str();
}
const char* pykd_device_name(const pykd_loss* loss) { return loss == nullptr ? "" : loss->loss->device_name().c_str(); }

const char* pykd_kernels_in_use(const pykd_loss* loss) { return loss == nullptr ? "" : loss->loss->kernels().c_str(); }

const char* pykd_passed_over(const pykd_loss* loss) { return loss == nullptr ? "" : loss->loss->passed_over().c_str(); }

size_t pykd_num_inputs(const pykd_loss* loss) { return loss == nullptr ? 0 : loss->loss->signature().inputs.size(); }
size_t pykd_num_outputs(const pykd_loss* loss) { return loss == nullptr ? 0 : loss->loss->signature().outputs.size(); }
size_t pykd_num_parameters(const pykd_loss* loss) {
  return loss == nullptr ? 0 : loss->loss->signature().parameters.size();
}

pykd_status pykd_input_info(const pykd_loss* loss, size_t index, pykd_tensor_info* info) {
  return guarded([&] {
    const InputSpec& input = item_at(signature_of(loss).inputs, index, "inputs");
    write_tensor_info(input, input.gradient_output, info);
  });
}

pykd_status pykd_output_info(const pykd_loss* loss, size_t index, pykd_tensor_info* info) {
  return guarded([&] {
    const OutputSpec& output = item_at(signature_of(loss).outputs, index, "outputs");
    write_tensor_info(output, output.gradient_of, info);
  });
}

pykd_status pykd_get_parameter_info(const pykd_loss* loss, size_t index, pykd_parameter_info* info) {
  return guarded([&] {
    const ParameterSpec& parameter = item_at(signature_of(loss).parameters, index, "parameters");
    check_pointer(info, "a pykd_parameter_info to write to");
    const pykd_parameter_info value = {sizeof value,
                                       parameter.name.c_str(),
                                       parameter.default_value,
                                       parameter.minimum,
                                       parameter.minimum_exclusive ? 1 : 0,
                                       parameter.maximum};
    write_sized(value, *info, offsetof(pykd_parameter_info, maximum), "a pykd_parameter_info",
                "PYKD_PARAMETER_INFO_INIT");
  });
}

pykd_status pykd_output_shape(const pykd_loss* loss, const pykd_tensor* inputs, size_t num_inputs, const char* name,
                              int64_t* shape, int32_t* rank, pykd_dtype* dtype) {
  return guarded([&] {
    const Signature& signature = signature_of(loss);
    check_pointer(name, "the name of an output");
    check_pointer(shape, "room for 8 lengths");
    check_pointer(rank, "a rank to write to");
    check_pointer(dtype, "a dtype to write to");
    const OutputSpec& output = signature.outputs[find_output(signature, name)];
    std::vector<pykd_tensor> ordered;
    const pykd::internal::Binding binding = loss->loss->check_inputs(inputs, num_inputs, ordered);
    for (std::size_t axis = 0; axis < output.rank(); ++axis) {
      shape[axis] = binding.lengths[output.axis_ids[axis]];
    }
    *rank = static_cast<int32_t>(output.rank());
    *dtype = output_dtype(output, binding.float_dtype);
  });
}

pykd_status pykd_run(const pykd_loss* loss, const pykd_tensor* inputs, size_t num_inputs,
                     const pykd_parameter* parameters, size_t num_parameters, const pykd_tensor* outputs,
                     size_t num_outputs) {
  return guarded([&] {
    check_pointer(loss, "a loss");
    loss->loss->run(inputs, num_inputs, parameters, num_parameters, outputs, num_outputs);
  });
}

pykd_status pykd_score(const pykd_loss* loss, const pykd_tensor* inputs, size_t num_inputs,
                       const pykd_parameter* parameters, size_t num_parameters, const pykd_tensor* outputs,
                       size_t num_outputs, uint8_t* status, pykd_score_summary* summary) {
  return guarded([&] {
    check_pointer(loss, "a loss");
    pykd::internal::score_rows(*loss->loss, inputs, num_inputs, parameters, num_parameters, outputs, num_outputs,
                               status, summary);
  });
}

const char* pykd_row_status_name(int32_t status) {
  static const char* const names[] = {"ok", "nan", "infinite", "infinite_score", "label_out_of_range", "ignored"};
  return status >= 0 && status < static_cast<int32_t>(std::size(names)) ? names[status] : "";
}

}  // extern "C"
