// The C interface of the kernels: named tensors in any order become a kernel's call, whose checks
// are those of kernels::check(). What the functions do is said in kernels.h.
#include "pykd/kernels.h"

#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/struct_size.h"
#include "base/tensor.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/loader.h"
#include "kernels/host/threads.h"
#include "kernels/kernel.h"
#include "kernels/simd/targets.h"

namespace pykd::internal {
namespace {

using kernels::Argument;
using kernels::Array;
using kernels::Attribute;
using kernels::Call;
using kernels::Kernel;
using kernels::Parallel;
using kernels::Role;

constexpr std::size_t kNotFound = static_cast<std::size_t>(-1);

template <class Items>
std::size_t index_of(const Items& items, const char* name) {
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (std::strcmp(items[i].name, name) == 0) return i;
  }
  return kNotFound;
}

const Kernel& kernel_named(const char* name) {
  if (name == nullptr) fail(PYKD_INVALID_VALUE, "the name of a kernel", "NULL", "pass one");
  const Kernel* kernel = kernels::find(name);
  if (kernel == nullptr) unknown_name("a kernel", name, names_of(kernels::all()), "library");
  return *kernel;
}

// ---- Tensors ------------------------------------------------------------------------------------

// The tensors of one side of a call, in the order of the kernel's description.
struct Ordered {
  std::vector<Array> arrays;
  std::vector<const pykd_tensor*> tensors;  // nullptr: left out
};

Array array_of(const pykd_tensor& tensor) {
  if (!is_dtype(tensor.dtype)) {
    fail(PYKD_INVALID_TYPE, std::string(tensor.name) + " of a dtype that pykd knows", given_dtype(tensor),
         "set dtype to a value of pykd_dtype");
  }
  if (tensor.rank > 0 && tensor.shape == nullptr) {
    fail(PYKD_INVALID_VALUE, std::string(tensor.name) + " with its " + std::to_string(tensor.rank) + " lengths",
         "NULL for its shape", "set shape");
  }
  check_axes_pointers(tensor.name, tensor);
  check_data(tensor.name, tensor);
  return {tensor.data, tensor.dtype, tensor.rank, tensor.shape};
}

Ordered order(const std::vector<Argument>& arguments, const pykd_tensor* tensors, std::size_t count, const char* one,
              const char* many) {
  check_list(tensors, count, many);
  Ordered ordered{std::vector<Array>(arguments.size()), std::vector<const pykd_tensor*>(arguments.size(), nullptr)};
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t index = index_of(arguments, tensors[i].name);
    if (index == kNotFound) unknown_name(one, tensors[i].name, names_of(arguments), "kernel");
    if (ordered.tensors[index] != nullptr) given_twice(tensors[i].name);
    ordered.tensors[index] = &tensors[i];
    ordered.arrays[index] = array_of(tensors[i]);
  }
  return ordered;
}

// What kernels::check() cannot see, for tensors whose lengths it has found good.
void check_memory(const Ordered& ordered) {
  for (const pykd_tensor* tensor : ordered.tensors) {
    if (tensor == nullptr) continue;
    check_size(tensor->name, *tensor);
    check_strides(tensor->name, *tensor);
  }
}

void check_no_overlap(const Ordered& inputs, const Ordered& outputs) {
  for (std::size_t i = 0; i < outputs.tensors.size(); ++i) {
    if (outputs.tensors[i] == nullptr) continue;
    const Extent written = extent_of(outputs.tensors[i]->name, *outputs.tensors[i]);
    for (const pykd_tensor* input : inputs.tensors) {
      if (input != nullptr) check_no_overlap(written, extent_of(input->name, *input));
    }
    for (std::size_t j = 0; j < i; ++j) {
      const pykd_tensor* other = outputs.tensors[j];
      if (other != nullptr) check_no_overlap(written, extent_of(other->name, *other));
    }
  }
}

// ---- Devices ------------------------------------------------------------------------------------

void check_on(const Device& device, const pykd_tensor& tensor, const char* because) {
  const bool same = raw(tensor.device) == device.kind && (device.kind == PYKD_CPU || tensor.device_id == device.id);
  if (same) return;
  fail(PYKD_INVALID_TYPE, std::string(tensor.name) + " on " + device_name(device) + because, given_device(tensor),
       "move the tensor");
}

// The device of the first tensor; all the others lie there too, except the numbers.
Device device_of(const Kernel& kernel, const Ordered& inputs, const Ordered& outputs) {
  const pykd_tensor* first = nullptr;
  Device device;
  auto check = [&](const Argument& argument, const pykd_tensor* tensor) {
    if (tensor == nullptr) return;
    if (argument.role == Role::kNumber) {
      check_on({PYKD_CPU, 0}, *tensor, ", where a kernel reads its numbers");
    } else if (first != nullptr) {
      check_on(device, *tensor, (std::string(", as ") + first->name + " is").c_str());
    } else {
      if (raw(tensor->device) != PYKD_CPU && raw(tensor->device) != PYKD_CUDA) {
        fail(PYKD_INVALID_TYPE, std::string(tensor->name) + " on the CPU or on a CUDA device", given_device(*tensor),
             "set device to a value of pykd_device");
      }
      first = tensor;
      device = {tensor->device, tensor->device == PYKD_CPU ? 0 : tensor->device_id};
    }
  };
  for (std::size_t i = 0; i < kernel.inputs.size(); ++i) check(kernel.inputs[i], inputs.tensors[i]);
  for (std::size_t i = 0; i < kernel.outputs.size(); ++i) {
    check(kernel.outputs[i], outputs.tensors[i]);
  }
  return device;
}

pykd_dtype tensor_dtype(const Kernel& kernel, const Ordered& inputs) {
  for (std::size_t i = 0; i < kernel.inputs.size(); ++i) {
    if (kernel.inputs[i].role == Role::kTensor && inputs.arrays[i].given()) {
      return inputs.arrays[i].dtype;
    }
  }
  return PYKD_FLOAT32;  // check() then says which one is missing
}

// ---- Attributes and host ------------------------------------------------------------------------

double value_of(const Attribute& attribute, const pykd_kernel_attribute& given) {
  const std::string name = attribute.name;
  if (attribute.choices.empty()) {
    if (given.choice == nullptr) return given.value;
    fail(PYKD_INVALID_VALUE, "a number for the attribute " + name, in_quotes(given.choice),
         "set value, and choice to NULL");
  }
  const std::vector<std::string> choices(attribute.choices.begin(), attribute.choices.end());
  if (given.choice == nullptr) {
    fail(PYKD_INVALID_VALUE, "one of " + join(choices) + " for the attribute " + name, "NULL for its choice",
         "set choice");
  }
  for (std::size_t i = 0; i < choices.size(); ++i) {
    if (choices[i] == given.choice) return static_cast<double>(i);
  }
  const std::string near = nearest(given.choice, choices);
  fail(PYKD_INVALID_VALUE, "one of " + join(choices) + " for the attribute " + name, in_quotes(given.choice),
       near.empty() ? "correct it" : "did you mean " + in_quotes(near) + "?");
}

std::vector<double> attributes_of(const Kernel& kernel, const pykd_kernel_attribute* given, std::size_t count) {
  check_list(given, count, "attributes");
  std::vector<double> values;
  for (const Attribute& attribute : kernel.attributes) values.push_back(attribute.default_value);
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t index = index_of(kernel.attributes, given[i].name);
    if (index == kNotFound) {
      unknown_name("an attribute", given[i].name, names_of(kernel.attributes), "kernel");
    }
    for (std::size_t j = 0; j < i; ++j) {
      if (std::strcmp(given[j].name, given[i].name) == 0) given_twice(given[i].name);
    }
    values[index] = value_of(kernel.attributes[index], given[i]);
  }
  return values;
}

pykd_kernel_host host_of(const pykd_kernel_host* given) {
  const pykd_kernel_host defaults = PYKD_KERNEL_HOST_INIT;
  if (given == nullptr) return defaults;
  const pykd_kernel_host host =
      copy_sized(*given, defaults, sizeof defaults, "a pykd_kernel_host", "PYKD_KERNEL_HOST_INIT");
  check_threads(host.threads);
  return host;
}

// ---- A call -------------------------------------------------------------------------------------

// The threads of the host, whose exceptions are no mistake of ours.
struct HostThreads {
  const pykd_kernel_host& host;

  static void run(void* self, std::int64_t count, void (*task)(void*, std::int64_t), void* state) {
    const pykd_kernel_host& host = static_cast<const HostThreads*>(self)->host;
    std::string got;
    try {
      return host.parallel(host.pool, count, task, state);
    } catch (const std::exception& error) {
      got = std::string("the exception \"") + error.what() + '"';
    } catch (...) {
      got = "an exception of unknown type";
    }
    fail(PYKD_ENGINE_FAILURE, "parallel() of the pykd_kernel_host to run every task and return", got,
         "mend that function; it may throw nothing");
  }
};

void run_on_cpu(const Kernel& kernel, Call& call, const pykd_kernel_host& host) {
  Parallel parallel = kernels::own_threads(host.threads);
  const HostThreads threads{host};
  if (host.parallel != nullptr) parallel = {parallel.threads, &HostThreads::run, const_cast<HostThreads*>(&threads)};
  call.parallel = &parallel;
  kernel.cpu(call);
}

void run_on_cuda(const Kernel& kernel, const Device& device, const Call& call, const pykd_kernel_host& host) {
  const kernels::CudaKernel* cuda = kernels::find_cuda_kernel(kernel.name);
  const KeptCudaContext kept(device);
  const char* error = cuda->launch(call, device.id, host.cuda_stream);
  if (error != nullptr) {
    throw Failure(PYKD_ENGINE_FAILURE,
                  std::string("the kernel ") + kernel.name + " failed on " + device_name(device) + ": " + error);
  }
}

// ---- Descriptions -------------------------------------------------------------------------------

const char* role_name(Role role) {
  switch (role) {
    case Role::kTensor:
      return "tensor";
    case Role::kFloat32:
      return "float32";
    case Role::kNumber:
      return "number";
    case Role::kIndex:
      return "index";
  }
  return "";  // not reached: those are all the roles
}

nlohmann::json describe(const Argument& argument, bool input) {
  nlohmann::json axes = nlohmann::json::array();
  std::string word;
  for (const char* c = argument.axes;; ++c) {
    if (*c != ' ' && *c != '\0') {
      word += *c;
      continue;
    }
    if (!word.empty()) axes.push_back(word);
    word.clear();
    if (*c == '\0') break;
  }
  nlohmann::json object = {{"name", argument.name}, {"axes", axes}, {"role", role_name(argument.role)}};
  if (input) object["optional"] = argument.optional;
  return object;
}

std::string describe(const Kernel& kernel) {
  nlohmann::json object = {{"name", kernel.name},
                           {"inputs", nlohmann::json::array()},
                           {"outputs", nlohmann::json::array()},
                           {"attributes", nlohmann::json::array()},
                           {"dtypes", nlohmann::json::array()}};
  for (const Argument& input : kernel.inputs) object["inputs"].push_back(describe(input, true));
  for (const Argument& output : kernel.outputs) object["outputs"].push_back(describe(output, false));
  for (const Attribute& attribute : kernel.attributes) {
    nlohmann::json item = {{"name", attribute.name}, {"choices", attribute.choices}};
    if (attribute.choices.empty()) {
      item["default"] = attribute.default_value;
    } else {
      item["default"] = attribute.choices[static_cast<std::size_t>(attribute.default_value)];
    }
    object["attributes"].push_back(std::move(item));
  }
  for (const pykd_dtype dtype : kDtypes) {
    if (kernel.dtypes & dtype_bit(dtype)) object["dtypes"].push_back(dtype_name(dtype));
  }
  return object.dump();
}

// Made once; the strings are handed out.
const std::vector<std::string>& descriptions() {
  static const auto* all = [] {
    auto* made = new std::vector<std::string>;
    for (const Kernel& kernel : kernels::all()) made->push_back(describe(kernel));
    return made;
  }();
  return *all;
}

}  // namespace
}  // namespace pykd::internal

using namespace pykd::internal;

extern "C" {

size_t pykd_num_kernels(void) { return pykd::kernels::all().size(); }

const char* pykd_kernel_description(size_t index) {
  const char* text = nullptr;
  guarded([&] {
    if (index < descriptions().size()) text = descriptions()[index].c_str();
  });
  return text;
}

pykd_status pykd_kernel_run(const char* kernel, const pykd_tensor* inputs, size_t num_inputs,
                            const pykd_kernel_attribute* attributes, size_t num_attributes, const pykd_tensor* outputs,
                            size_t num_outputs, const pykd_kernel_host* host) {
  return guarded([&] {
    const Kernel& found = kernel_named(kernel);
    const Ordered in = order(found.inputs, inputs, num_inputs, "an input", "inputs");
    const Ordered out = order(found.outputs, outputs, num_outputs, "an output", "outputs");
    const std::vector<double> settings = attributes_of(found, attributes, num_attributes);
    const pykd_kernel_host where = host_of(host);
    const Device device = device_of(found, in, out);
    Call call;
    call.inputs = in.arrays.data();
    call.outputs = out.arrays.data();
    call.attributes = settings.data();
    call.dtype = tensor_dtype(found, in);
    pykd::kernels::check(found, call);
    check_memory(in);
    check_memory(out);
    check_no_overlap(in, out);
    if (device.kind == PYKD_CPU) {
      run_on_cpu(found, call, where);
    } else {
      run_on_cuda(found, device, call, where);
    }
  });
}

const char* pykd_kernel_simd(void) {
  static const auto* text = [] {
    auto* made = new std::string;
    for (const std::string& name : pykd::kernels::simd_targets()) {
      *made += (made->empty() ? "" : " ") + name;
    }
    return made;
  }();
  return text->c_str();
}

pykd_status pykd_kernel_use_simd(const char* target) {
  return guarded([&] {
    if (pykd::kernels::use_simd(target)) return;
    const std::vector<std::string> known = pykd::kernels::simd_targets();
    fail(PYKD_INVALID_VALUE, "one of the instruction sets " + join(known), in_quotes(target),
         "use one of them, or NULL for the best");
  });
}

}  // extern "C"
