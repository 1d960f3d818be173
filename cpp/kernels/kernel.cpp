#include "kernels/kernel.h"

#include <algorithm>
#include <cmath>
#include <string_view>
#include <utility>

#include "base/tensor.h"

namespace pykd::kernels {
namespace {

using internal::dtype_bit;
using internal::dtype_name;
using internal::dtypes_text;
using internal::fail;
using internal::in_quotes;
using internal::shape_text;

// Made by the first kernel that registers, whichever that is, and never destroyed: whoever calls a
// kernel while the process ends still finds it.
std::vector<Kernel>& registry() {
  static auto* kernels = new std::vector<Kernel>;
  return *kernels;
}

std::vector<Kernel>& unlisted() {
  static auto* kernels = new std::vector<Kernel>;
  return *kernels;
}

// The next word of `rest`; empty at the end.
std::string_view next_word(std::string_view& rest) {
  while (!rest.empty() && rest.front() == ' ') rest.remove_prefix(1);
  const std::size_t length = std::min(rest.find(' '), rest.size());
  const std::string_view word = rest.substr(0, length);
  rest.remove_prefix(length);
  return word;
}

std::string axes_text(const char* axes) {
  std::string text;
  std::string_view rest = axes;
  for (std::string_view word = next_word(rest); !word.empty(); word = next_word(rest)) {
    text += (text.empty() ? "axes (" : ", ") + std::string(word);
  }
  return text.empty() ? "no axes (a scalar)" : text + ")";
}

// The lengths of the axes that have been seen. A call has few of them: looking them up in an array
// costs less than any map, and allocates nothing.
class Lengths {
 public:
  void bind(const Argument& argument, const Array& array) {
    std::string_view names[internal::kMaxRank];
    std::string_view rest = argument.axes;
    std::int32_t rank = 0;
    for (std::string_view word = next_word(rest); !word.empty(); word = next_word(rest)) {
      if (rank == internal::kMaxRank) fail_description("8 axes for one argument");
      names[rank++] = word;
    }
    if (rank != array.rank) fail_rank(argument, array);
    for (std::int32_t axis = 0; axis < rank; ++axis) bind(argument, array, axis, names[axis]);
  }

 private:
  struct Axis {
    std::string_view name;
    std::int64_t length;
    const char* owner;
  };

  void bind(const Argument& argument, const Array& array, std::int32_t axis, std::string_view name) {
    const std::int64_t length = array.shape[axis];
    for (std::size_t i = 0; i < count_; ++i) {
      if (axes_[i].name != name) continue;
      if (axes_[i].length != length) fail_length(argument, array, axes_[i]);
      return;
    }
    if (length < 1) {
      fail(PYKD_INVALID_VALUE, std::string(argument.name) + " of length at least 1 along " + in_quotes(name),
           "shape " + shape_text(array.shape, array.rank),
           length == 0 ? "an empty batch has no loss: leave the call out" : "check the shape");
    }
    if (count_ == kMaxAxes) fail_description("16 axes for all arguments");
    axes_[count_++] = {name, length, argument.name};
  }

  [[noreturn]] static void fail_description(const char* at_most) {
    fail(PYKD_INTERNAL, std::string("the description of a kernel to have at most ") + at_most, "more",
         "this is a mistake in pykd, please report it");
  }

  [[noreturn]] static void fail_rank(const Argument& argument, const Array& array) {
    std::string got = "rank " + std::to_string(array.rank);
    if (array.rank > 0) got += " with shape " + shape_text(array.shape, array.rank);
    fail(PYKD_INVALID_VALUE, std::string(argument.name) + " with " + axes_text(argument.axes), got,
         "give it one length per axis");
  }

  [[noreturn]] static void fail_length(const Argument& argument, const Array& array, const Axis& bound) {
    fail(PYKD_INVALID_VALUE,
         std::string(argument.name) + " of length " + std::to_string(bound.length) + " along " + in_quotes(bound.name) +
             ", as " + (bound.owner == argument.name ? "its other axis of that name" : bound.owner) + " has",
         "shape " + shape_text(array.shape, array.rank),
         "axes of one name have one length: cut, pad or map one of the tensors");
  }

  static constexpr std::size_t kMaxAxes = 16;  // no kernel comes near
  Axis axes_[kMaxAxes];
  std::size_t count_ = 0;
};

void check_dtype(const Kernel& kernel, const Argument& argument, const Array& array, const Call& call) {
  const pykd_dtype expected = dtype_of(argument.role, call.dtype);
  if (array.dtype == expected) return;
  std::string who;
  if (argument.role == Role::kTensor) {
    const auto first = std::find_if(kernel.inputs.begin(), kernel.inputs.end(),
                                    [](const Argument& a) { return a.role == Role::kTensor; });
    who = std::string(", as ") + first->name + " has";
  }
  fail(PYKD_INVALID_TYPE, std::string(argument.name) + " of dtype " + dtype_name(expected) + who,
       dtype_name(array.dtype),
       argument.role == Role::kTensor ? "all tensors of one call have one dtype: cast one of them"
                                      : "cast it; it has that dtype whatever the tensors have");
}

// A dtype that no kernel was written for is nothing the caller got wrong.
void check_covered(const Kernel& kernel, pykd_dtype dtype) {
  if ((kernel.dtypes & dtype_bit(dtype)) != 0) return;
  const bool floating = (internal::kAnyFloat & dtype_bit(dtype)) != 0;
  fail(floating ? PYKD_UNAVAILABLE : PYKD_INVALID_TYPE,
       std::string("tensors of dtype ") + dtypes_text(kernel.dtypes) + " for the kernel " + kernel.name,
       dtype_name(dtype), "cast them, or use the loss without the kernel");
}

void check_attributes(const Kernel& kernel, const double* values) {
  for (std::size_t i = 0; i < kernel.attributes.size(); ++i) {
    const Attribute& attribute = kernel.attributes[i];
    const double value = values[i];
    const auto count = static_cast<double>(attribute.choices.size());
    const bool good =
        attribute.choices.empty() ? std::isfinite(value) : value >= 0 && value < count && value == std::floor(value);
    if (good) continue;
    fail(PYKD_INVALID_VALUE,
         (attribute.choices.empty() ? std::string("a finite number")
                                    : "the index of one of " + std::to_string(attribute.choices.size()) + " choices") +
             " for the attribute " + attribute.name,
         internal::number_text(value), "correct it");
  }
}

}  // namespace

bool add(Kernel kernel) {
  std::vector<Kernel>& kernels = registry();
  const auto place = std::lower_bound(kernels.begin(), kernels.end(), std::string_view(kernel.name),
                                      [](const Kernel& known, std::string_view name) { return known.name < name; });
  if (place != kernels.end() && std::string_view(place->name) == kernel.name) return false;
  kernels.insert(place, std::move(kernel));
  return true;
}

bool add_unlisted(Kernel kernel) {
  unlisted().push_back(std::move(kernel));
  return true;
}

const std::vector<Kernel>& all() { return registry(); }

const Kernel* find(const std::string& name) {
  for (const std::vector<Kernel>* kernels : {&registry(), &unlisted()}) {
    for (const Kernel& kernel : *kernels) {
      if (name == kernel.name) return &kernel;
    }
  }
  return nullptr;
}

pykd_dtype dtype_of(Role role, pykd_dtype tensors) {
  if (role == Role::kTensor) return tensors;
  return role == Role::kIndex ? PYKD_INT64 : PYKD_FLOAT32;
}

void check(const Kernel& kernel, const Call& call) {
  check_covered(kernel, call.dtype);
  Lengths lengths;
  for (std::size_t i = 0; i < kernel.inputs.size(); ++i) {
    const Argument& argument = kernel.inputs[i];
    const Array& array = call.inputs[i];
    if (!array.given()) {
      if (argument.optional) continue;
      fail(PYKD_INVALID_VALUE, std::string(argument.name) + " for the kernel " + kernel.name, "none",
           "give every input that is not optional");
    }
    check_dtype(kernel, argument, array, call);
    internal::check_alignment(argument.name, array.data, array.dtype);
    lengths.bind(argument, array);
  }
  bool any = false;
  for (std::size_t i = 0; i < kernel.outputs.size(); ++i) {
    const Array& array = call.outputs[i];
    if (!array.given()) continue;
    any = true;
    check_dtype(kernel, kernel.outputs[i], array, call);
    internal::check_alignment(kernel.outputs[i].name, array.data, array.dtype);
    lengths.bind(kernel.outputs[i], array);
  }
  if (!any) {
    std::vector<std::string> names;
    for (const Argument& output : kernel.outputs) names.emplace_back(output.name);
    fail(PYKD_INVALID_VALUE, std::string("at least one output of the kernel ") + kernel.name, "none",
         "ask for some of " + internal::join(names));
  }
  check_attributes(kernel, call.attributes);
  const char* reason = kernel.refuse == nullptr ? nullptr : kernel.refuse(call);
  if (reason != nullptr) {
    fail(PYKD_INVALID_VALUE, std::string("a call by the rules of the kernel ") + kernel.name, "one against them",
         std::string("correct it: ") + reason);
  }
}

}  // namespace pykd::kernels
