#include "runtime/signature/call.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"

namespace pykd::internal {
namespace {

// ---- Messages about a call ---------------------------------------------------------------------

std::string axes_text(const TensorSpec& spec) {
  return spec.axes.empty() ? "no axes (a scalar)" : "axes (" + join(spec.axes) + ")";
}

template <class Specs>
[[noreturn]] void unknown_name(const char* what, const char* name, const Specs& specs) {
  internal::unknown_name(what, name, names_of(specs), "artefact");
}

[[noreturn]] void unknown_parameter(const Signature& signature, const pykd_parameter& given) {
  const std::size_t id = find_spec(signature.fixed, given.name);
  if (id == kNone) unknown_name("a parameter", given.name, signature.parameters);
  const ParameterSpec& spec = signature.fixed[id];
  fail(PYKD_INVALID_VALUE,
       "no value for the parameter " + spec.name + ", which is fixed at " + number_text(spec.default_value) + " here",
       number_text(given.value), "leave it out, or export the loss without parameters=\"fixed\"");
}

// Finds `name`, looking first at `guess`: callers give things in the signature's order more often
// than not, and then one comparison is enough.
template <class Specs>
std::size_t find_name(const Specs& specs, const char* name, std::size_t guess) {
  if (guess < specs.size() && specs[guess].name == name) return guess;
  return find_spec(specs, name);
}

// ---- Checks of one tensor -----------------------------------------------------------------------

void check_dtype(const TensorSpec& spec, const pykd_tensor& tensor) {
  if (!is_dtype(tensor.dtype) || (spec.dtypes & dtype_bit(tensor.dtype)) == 0) {
    fail(PYKD_INVALID_TYPE, spec.name + " of dtype " + dtypes_text(spec.dtypes), given_dtype(tensor),
         spec.is_float() && is_dtype(tensor.dtype) ? "cast it, or export the loss for that dtype" : "cast it");
  }
}

void check_device(const TensorSpec& spec, const pykd_tensor& tensor, Device device) {
  const bool same = raw(tensor.device) == device.kind && (device.kind == PYKD_CPU || tensor.device_id == device.id);
  if (!same) {
    fail(PYKD_INVALID_TYPE, spec.name + " on " + device_name(device) + ", where this loss was loaded",
         given_device(tensor), "move the tensor, or load the loss for that device");
  }
}

void check_rank(const TensorSpec& spec, const pykd_tensor& tensor) {
  check_axes_pointers(spec.name, tensor);
  const bool has_shape = tensor.shape != nullptr || tensor.rank == 0;
  if (tensor.rank == static_cast<std::int32_t>(spec.rank()) && has_shape) return;
  std::string got = "rank " + std::to_string(tensor.rank);
  if (!has_shape) {
    got += " with NULL for its shape";
  } else if (tensor.rank > static_cast<std::int32_t>(kMaxRank)) {
    got += ", and 8 is the most that any tensor has";
  } else if (tensor.rank > 0) {
    got += " with shape " + shape_text(tensor.shape, tensor.rank);
  }
  fail(PYKD_INVALID_VALUE, spec.name + " with " + axes_text(spec), got, "give it one length per axis");
}

// ---- Checks of the inputs -----------------------------------------------------------------------

[[noreturn]] void fail_length(const Signature& signature, const InputSpec& input, const pykd_tensor& tensor,
                              std::size_t axis, std::int64_t expected) {
  const std::size_t id = input.axis_ids[axis];
  const InputSpec* first = &input;
  for (const InputSpec& other : signature.inputs) {
    if (std::count(other.axis_ids.begin(), other.axis_ids.end(), id) != 0) {
      first = &other;
      break;
    }
  }
  const std::string owner = first == &input ? "as its other axis of that name has" : "as " + first->name + " has";
  fail(PYKD_INVALID_VALUE,
       input.name + " of length " + std::to_string(expected) + " along " + in_quotes(signature.axes[id]) + ", " + owner,
       std::to_string(tensor.shape[axis]) + " (shape " + shape_text(tensor.shape, tensor.rank) + ")",
       "axes of one name have one length: cut, pad or map one of the tensors");
}

void bind_axes(const Signature& signature, const InputSpec& input, const pykd_tensor& tensor,
               std::vector<std::int64_t>& lengths) {
  for (std::size_t axis = 0; axis < input.axis_ids.size(); ++axis) {
    const std::int64_t length = tensor.shape[axis];
    const std::int64_t least = input.least_lengths[axis], fixed = input.lengths[axis];
    if (fixed != 0 && length != fixed) {
      fail(PYKD_INVALID_VALUE,
           input.name + " of length " + std::to_string(fixed) + " along its axis " + std::to_string(axis) +
               ", as the models have it",
           "shape " + shape_text(tensor.shape, tensor.rank), "give that length, or merge models that leave it free");
    }
    if (length < least) {
      fail(PYKD_INVALID_VALUE,
           input.name + " of length at least " + std::to_string(least) + " along " + in_quotes(input.axes[axis]),
           "shape " + shape_text(tensor.shape, tensor.rank),
           length > 0    ? "give more of them: this loss is not defined for fewer"
           : length == 0 ? "an empty batch has no loss: leave the call out"
                         : "check the shape");
    }
    std::int64_t& bound = lengths[input.axis_ids[axis]];
    if (bound == 0) bound = length;
    if (bound != length) fail_length(signature, input, tensor, axis, bound);
  }
}

// Where element `index` lies, such as "[2, 0]".
std::string position_text(const pykd_tensor& tensor, std::int64_t index) {
  std::int64_t position[kMaxRank];
  for (std::int32_t axis = tensor.rank - 1; axis >= 0; --axis) {
    position[axis] = index % tensor.shape[axis];
    index /= tensor.shape[axis];
  }
  return shape_text(position, tensor.rank);
}

[[noreturn]] void fail_label(const Signature& signature, const InputSpec& input, const pykd_tensor& tensor,
                             std::int64_t index, std::int64_t length) {
  const std::int64_t value = static_cast<const std::int64_t*>(tensor.data)[index];
  std::string allowed = "from 0 to " + std::to_string(length - 1);
  if (input.ignore_index) allowed += " or " + std::to_string(*input.ignore_index) + " (ignored)";
  fail(PYKD_INVALID_VALUE,
       "every entry of " + input.name + " " + allowed + ", as " + in_quotes(signature.axes[input.index_axis]) +
           " has length " + std::to_string(length),
       std::to_string(value) + " at position " + position_text(tensor, index),
       input.ignore_index ? "correct it, or write the ignored value" : "correct it; this loss ignores no entry");
}

void check_labels(const Signature& signature, const InputSpec& input, const pykd_tensor& tensor, std::int64_t length) {
  const auto* labels = static_cast<const std::int64_t*>(tensor.data);
  const auto limit = static_cast<std::uint64_t>(length);
  const std::int64_t ignored = input.ignore_index.value_or(0);  // 0 is in range anyway
  std::int64_t count = 1;
  for (std::int32_t axis = 0; axis < tensor.rank; ++axis) count *= tensor.shape[axis];
  bool bad = false;  // no early exit: the loop vectorises
  for (std::int64_t i = 0; i < count; ++i) {
    bad |= (static_cast<std::uint64_t>(labels[i]) >= limit) & (labels[i] != ignored);
  }
  if (!bad) return;
  for (std::int64_t i = 0; i < count; ++i) {
    if (static_cast<std::uint64_t>(labels[i]) >= limit && labels[i] != ignored) {
      fail_label(signature, input, tensor, i, length);
    }
  }
}

// Puts the given tensors into the order of the signature.
void order_inputs(const Signature& signature, const pykd_tensor* inputs, std::size_t num_inputs,
                  std::vector<pykd_tensor>& ordered) {
  const std::size_t count = signature.inputs.size();
  check_list(inputs, num_inputs, "inputs");
  ordered.assign(count, pykd_tensor{});  // a NULL name marks what has not been given
  for (std::size_t i = 0; i < num_inputs; ++i) {
    const std::size_t id = find_name(signature.inputs, inputs[i].name, i);
    if (id == kNone) unknown_name("an input", inputs[i].name, signature.inputs);
    if (ordered[id].name != nullptr) given_twice(inputs[i].name);
    ordered[id] = inputs[i];
  }
  if (num_inputs == count) return;
  std::vector<std::string> missing;
  for (std::size_t id = 0; id < count; ++id) {
    if (ordered[id].name == nullptr) missing.push_back(signature.inputs[id].name);
  }
  fail(PYKD_INVALID_VALUE, "the inputs " + join(names_of(signature.inputs)), "no " + join(missing), "give every input");
}

void check_same_float(const Signature& signature, const InputSpec& input, const pykd_tensor& tensor,
                      const std::vector<pykd_tensor>& ordered, pykd_dtype float_dtype) {
  if (tensor.dtype == float_dtype) return;
  std::size_t first = 0;
  while (!signature.inputs[first].is_float()) ++first;
  fail(PYKD_INVALID_TYPE, input.name + " of dtype " + dtype_name(float_dtype) + ", as " + ordered[first].name + " has",
       dtype_name(tensor.dtype), "all floating tensors of one call have one dtype: cast one of them");
}

// ---- Checks of the outputs ----------------------------------------------------------------------

std::vector<std::int64_t> output_lengths(const OutputSpec& output, const Binding& binding) {
  std::vector<std::int64_t> shape;
  for (std::size_t id : output.axis_ids) shape.push_back(binding.lengths[id]);
  return shape;
}

void check_output_shape(const OutputSpec& output, const pykd_tensor& tensor, const Binding& binding) {
  check_rank(output, tensor);
  for (std::size_t axis = 0; axis < output.axis_ids.size(); ++axis) {
    if (tensor.shape[axis] == binding.lengths[output.axis_ids[axis]]) continue;
    const std::vector<std::int64_t> shape = output_lengths(output, binding);
    fail(PYKD_INVALID_VALUE, output.name + " with shape " + shape_text(shape.data(), tensor.rank) + " for these inputs",
         "shape " + shape_text(tensor.shape, tensor.rank), "give memory of that shape; pykd_output_shape() tells it");
  }
}

void check_no_overlap(const Signature& signature, const std::vector<pykd_tensor>& inputs, const OutputSpec& output,
                      const pykd_tensor* outputs, std::size_t index, const std::vector<std::size_t>& output_ids) {
  const Extent written = extent_of(output.name, outputs[index]);
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    check_no_overlap(written, extent_of(signature.inputs[i].name, inputs[i]));
  }
  for (std::size_t i = 0; i < index; ++i) {
    check_no_overlap(written, extent_of(signature.outputs[output_ids[i]].name, outputs[i]));
  }
}

}  // namespace

pykd_dtype output_dtype(const OutputSpec& output, pykd_dtype float_dtype) {
  if (!output.is_any_float()) {
    for (pykd_dtype dtype : kAllDtypes) {
      if (output.dtypes == dtype_bit(dtype)) return dtype;
    }
  }
  if (output.gradient_of != kNone) return float_dtype;
  return float_dtype == PYKD_FLOAT64 ? PYKD_FLOAT64 : PYKD_FLOAT32;
}

Binding check_inputs(const Signature& signature, Device device, const pykd_tensor* inputs, std::size_t num_inputs,
                     std::vector<pykd_tensor>& ordered, LabelCheck labels) {
  order_inputs(signature, inputs, num_inputs, ordered);
  Binding binding;
  binding.lengths = signature.fixed_lengths;
  binding.lengths.resize(signature.axes.size(), 0);
  bool float_seen = false;
  for (std::size_t id = 0; id < ordered.size(); ++id) {
    const InputSpec& input = signature.inputs[id];
    const pykd_tensor& tensor = ordered[id];
    check_rank(input, tensor);
    check_dtype(input, tensor);
    check_device(input, tensor, device);
    bind_axes(signature, input, tensor, binding.lengths);
    check_size(input.name, tensor);
    check_strides(input.name, tensor);
    check_data(input.name, tensor);
    if (!input.is_float()) continue;
    if (!float_seen) binding.float_dtype = tensor.dtype;
    float_seen = true;
    if (input.is_any_float()) {
      check_same_float(signature, input, tensor, ordered, binding.float_dtype);
    }
  }
  if (signature.merged) binding.float_dtype = signature.parameter_dtype;  // the models' inputs say nothing of the loss
  for (std::size_t id = 0; id < ordered.size() && labels == LabelCheck::kRange; ++id) {
    const InputSpec& input = signature.inputs[id];
    if (input.index_axis == kNone || ordered[id].device != PYKD_CPU) continue;
    if (binding.lengths[input.index_axis] == 0) continue;  // the models alone know how many classes there are
    check_labels(signature, input, ordered[id], binding.lengths[input.index_axis]);
  }
  return binding;
}

void check_parameters(const Signature& signature, const Binding& binding, const pykd_parameter* parameters,
                      std::size_t num_parameters, std::vector<double>& ordered) {
  check_list(parameters, num_parameters, "parameters");
  ordered.resize(signature.parameters.size());
  for (std::size_t id = 0; id < ordered.size(); ++id) {
    ordered[id] = signature.parameters[id].default_value;
  }
  for (std::size_t i = 0; i < num_parameters; ++i) {
    const pykd_parameter& given = parameters[i];
    const std::size_t id = find_name(signature.parameters, given.name, i);
    if (id == kNone) unknown_parameter(signature, given);
    for (std::size_t j = 0; j < i; ++j) {
      if (std::strcmp(parameters[j].name, given.name) == 0) given_twice(given.name);
    }
    const ParameterSpec& spec = signature.parameters[id];
    const double value = given.value;
    check_number("the parameter " + spec.name, value, binding.float_dtype);
    if (spec.is_low(value)) {
      fail(PYKD_INVALID_VALUE,
           "the parameter " + spec.name + (spec.minimum_exclusive ? " greater than " : " at least ") +
               number_text(spec.minimum),
           number_text(given.value), "give a larger value");
    }
    if (spec.is_high(value)) {
      fail(PYKD_INVALID_VALUE, "the parameter " + spec.name + " at most " + number_text(spec.maximum),
           number_text(given.value), "give a smaller value");
    }
    ordered[id] = given.value;
  }
}

std::size_t find_output(const Signature& signature, const char* name) {
  const std::size_t id = find_spec(signature.outputs, name);
  if (id != kNone) return id;
  const bool is_gradient = std::strncmp(name, "grad_", 5) == 0;
  if (signature.kind == ArtefactKind::kScore && (is_gradient || std::strcmp(name, "loss") == 0)) {
    fail(PYKD_INVALID_VALUE, "an artefact with " + in_quotes(name),
         "scores of samples (kind \"score\"), which have none",
         "ask for \"loss_per_sample\", or export the loss with kind \"loss\"");
  }
  const auto& shapeless = signature.shapeless;
  if (std::find(shapeless.begin(), shapeless.end(), name) != shapeless.end()) {
    fail(PYKD_INVALID_VALUE, "an output whose lengths follow from those of the inputs",
         in_quotes(name) + ", of which the run alone tells them",
         "run the file in a session of ONNX Runtime's for it, or merge models that fix them");
  }
  if (is_gradient && signature.kind == ArtefactKind::kValue) {
    fail(PYKD_INVALID_VALUE, "an artefact with gradients for " + in_quotes(name), "one that holds the value alone",
         "load loss.grad.onnx, loss.pt or their folder");
  }
  unknown_name("an output", name, signature.outputs);
}

void check_outputs(const Signature& signature, Device device, const Binding& binding,
                   const std::vector<pykd_tensor>& inputs, const pykd_tensor* outputs, std::size_t num_outputs,
                   std::vector<std::size_t>& output_ids) {
  check_list(outputs, num_outputs, "outputs");
  if (num_outputs == 0) {
    fail(PYKD_INVALID_VALUE, "at least one output", "none", "ask for some of " + join(names_of(signature.outputs)));
  }
  output_ids.clear();
  output_ids.reserve(num_outputs);
  for (std::size_t i = 0; i < num_outputs; ++i) {
    const pykd_tensor& tensor = outputs[i];
    const std::size_t id = find_output(signature, tensor.name);
    if (std::find(output_ids.begin(), output_ids.end(), id) != output_ids.end()) {
      given_twice(tensor.name);
    }
    const OutputSpec& output = signature.outputs[id];
    output_ids.push_back(id);
    check_output_shape(output, tensor, binding);
    const pykd_dtype expected = output_dtype(output, binding.float_dtype);
    if (raw(tensor.dtype) != expected) {
      fail(PYKD_INVALID_TYPE, output.name + " of dtype " + dtype_name(expected), given_dtype(tensor),
           "give memory of that dtype; pykd_output_shape() tells it");
    }
    const bool scalar_on_cpu = output.rank() == 0 && raw(tensor.device) == PYKD_CPU;
    if (!scalar_on_cpu) check_device(output, tensor, device);
    check_strides(output.name, tensor);
    check_data(output.name, tensor);
    check_no_overlap(signature, inputs, output, outputs, i, output_ids);
  }
}

}  // namespace pykd::internal
