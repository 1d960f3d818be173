#include "bindings/kernel_call.h"

#include <cstdint>
#include <utility>

#include "bindings/arguments.h"

namespace pykd::bindings {
namespace {

namespace py = pybind11;

// A borrowed tensor of float32 without gaps.
const float* floats_of(const pykd_tensor& tensor, std::size_t* count) {
  const std::string name = tensor.name;
  if (tensor.dtype != PYKD_FLOAT32 || tensor.device != PYKD_CPU || tensor.rank != 1 ||
      (tensor.strides != nullptr && tensor.shape[0] > 1 && tensor.strides[0] != 1)) {
    throw py::type_error("expected " + name +
                         " as one contiguous axis of float32 on the CPU, got another tensor; pass that");
  }
  *count = static_cast<std::size_t>(tensor.shape[0]);
  return static_cast<const float*>(tensor.data);
}

std::vector<float> copy_of(const char* name, py::handle tensor) {
  const BorrowedTensor borrowed(name, tensor, false);
  std::size_t count = 0;
  const float* data = floats_of(borrowed.view(), &count);
  return std::vector<float>(data, data + count);
}

// NaN stays NaN.
double sum(const float* weights, const float* values, std::size_t count, bool at_least_0) {
  double total = 0.0;
  for (std::size_t i = 0; i < count; ++i) {
    const double value = at_least_0 && values[i] < 0.0F ? 0.0 : static_cast<double>(values[i]);
    total += static_cast<double>(weights[i]) * value;
  }
  return total;
}

pykd_tensor view_of(const std::string& name, const float* data, const std::vector<std::int64_t>& shape) {
  return {name.c_str(), const_cast<float*>(data),
          PYKD_FLOAT32, static_cast<std::int32_t>(shape.size()),
          shape.data(), nullptr,
          PYKD_CPU,     0,
          nullptr};
}

void expect_count(std::size_t got, std::size_t wanted, const char* what) {
  if (got == wanted) return;
  throw py::value_error("expected " + std::to_string(wanted) + " " + what + " for a prepared kernel call, got " +
                        std::to_string(got) + "; give those that it was made for");
}

}  // namespace

double weighted_sum(const py::object& weights, const py::object& values, bool at_least_0) {
  const BorrowedTensor first("weights", weights, false), second("values", values, false);
  std::size_t count = 0, other = 0;
  const float* weight = floats_of(first.view(), &count);
  const float* value = floats_of(second.view(), &other);
  expect_count(other, count, "values");
  return sum(weight, value, count, at_least_0);
}

KernelCall::KernelCall(const py::str& kernel, const py::dict& numbers, const py::tuple& inputs,
                       const py::dict& attributes, const py::dict& weights, const py::tuple& values,
                       const py::tuple& gradients, const py::tuple& sums)
    : kernel_(text_of(kernel, "the name of a kernel")) {
  for (const Item& item : items_of(numbers, "the name of a number")) {
    numbers_.push_back({item.name, {static_cast<float>(number_of(item.value, item.name))}, {}});
  }
  for (const Item& item : items_of(weights, kNameOfTensor)) {
    std::vector<float> data = copy_of(item.name, item.value);
    std::vector<std::int64_t> shape = {static_cast<std::int64_t>(data.size())};
    weights_.push_back({item.name, std::move(data), std::move(shape)});
  }
  for (const Item& item : items_of(attributes, "the name of an attribute")) {
    const bool is_choice = PyUnicode_Check(item.value.ptr());
    attributes_.push_back({item.name, is_choice ? 0.0 : number_of(item.value, item.name),
                           is_choice ? text_of(item.value, item.name) : "", is_choice});
  }
  for (const py::handle name : inputs) inputs_.emplace_back(text_of(name, kNameOfTensor));
  for (const py::handle name : gradients) gradients_.emplace_back(text_of(name, kNameOfTensor));
  for (const py::handle entry : values) {
    const auto [name, rows] = entry.cast<std::pair<std::string, std::int64_t>>();
    values_.push_back({name, {}, {rows}});
    rows_ += static_cast<std::size_t>(rows);
  }
  for (const py::handle entry : sums) {
    const auto parts = entry.cast<py::tuple>();
    Sum one{parts[0].cast<std::size_t>(), copy_of("weights", parts[1]), parts[2].cast<bool>()};
    expect_count(one.weights.size(), static_cast<std::size_t>(values_.at(one.value).shape[0]), "weights");
    sums_.push_back(std::move(one));
  }
}

py::tuple KernelCall::run(const py::tuple& inputs, const py::tuple& gradients, int threads) const {
  expect_count(inputs.size(), inputs_.size(), "inputs");
  if (gradients.size() != 0) expect_count(gradients.size(), gradients_.size(), "gradients");
  Borrowed in, out;
  in.reserve(inputs_.size());
  out.reserve(gradients_.size());
  for (std::size_t i = 0; i < inputs_.size(); ++i) in.add(inputs_[i].c_str(), inputs[i], false);
  for (std::size_t i = 0; i < gradients.size(); ++i) out.add(gradients_[i].c_str(), gradients[i], true);

  std::vector<pykd_tensor> read(in.data(), in.data() + in.size()), written(out.data(), out.data() + out.size());
  for (const Named& number : numbers_) read.push_back(view_of(number.name, number.data.data(), number.shape));
  if (gradients.size() != 0) {
    for (const Named& weight : weights_) read.push_back(view_of(weight.name, weight.data.data(), weight.shape));
  }
  std::vector<float> values(rows_);
  float* next = values.data();
  for (const Named& value : values_) {
    written.push_back(view_of(value.name, next, value.shape));
    next += value.shape[0];
  }
  std::vector<pykd_kernel_attribute> attributes;
  attributes.reserve(attributes_.size());
  for (const Attribute& attribute : attributes_) {
    attributes.push_back(
        {attribute.name.c_str(), attribute.value, attribute.is_choice ? attribute.choice.c_str() : nullptr});
  }
  pykd_kernel_host host = PYKD_KERNEL_HOST_INIT;
  host.threads = threads;
  std::vector<double> found(sums_.size());
  pykd_status status = PYKD_INTERNAL;
  without_gil([&] {
    status = pykd_kernel_run(kernel_.c_str(), read.data(), read.size(), attributes.data(), attributes.size(),
                             written.data(), written.size(), &host);
    if (status != PYKD_OK) return;
    for (std::size_t i = 0; i < sums_.size(); ++i) {
      const float* start = values.data();
      for (std::size_t value = 0; value < sums_[i].value; ++value) start += values_[value].shape[0];
      found[i] = sum(sums_[i].weights.data(), start, sums_[i].weights.size(), sums_[i].at_least_0);
    }
  });
  check(status);
  py::tuple results(found.size());
  for (std::size_t i = 0; i < found.size(); ++i) results[i] = py::float_(found[i]);
  return results;
}

}  // namespace pykd::bindings
