// File: tests/described_call.h
//
// Calls of a kernel that its description alone tells: tensors, optional inputs, choices and dtypes, for tests of what
// every kernel promises (kernels/kernel.h).
//
//     for (const DescribedCall& call : described_calls(kernel, dtype, {3, 2, 17}, Draw::kOrdinary)) {
//       const Outcome all = run(call);
//       …
//     }
#ifndef PYKD_TESTS_DESCRIBED_CALL_H_
#define PYKD_TESTS_DESCRIBED_CALL_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/dtypes.h"
#include "kernels/kernel.h"
#include "pykd/kernels.h"
#include "tests/half_numbers.h"

namespace pykd::tests {

inline std::vector<std::string> words(const char* text) {
  std::vector<std::string> all(1);
  for (; *text != '\0'; ++text) {
    if (*text == ' ') {
      all.emplace_back();
    } else {
      all.back() += *text;
    }
  }
  if (all.back().empty()) all.pop_back();
  return all;
}

// ---- What goes in ---------------------------------------------------------------------------------------------------

enum class Draw {
  kOrdinary,  // rows of length 1, as embeddings have them; every kernel takes those
  kWide,      // rows of length 30
  kEqual,     // all tensors of the same axes have the same rows
  kMasked,    // the same entries of all tensors are -inf
};

// Of the first axis, the last, and those between. An axis keeps its length in every argument.
struct Lengths {
  std::int64_t first, between, last;
};

struct DescribedCall {
  const kernels::Kernel* kernel = nullptr;
  pykd_dtype dtype = PYKD_FLOAT32;
  std::map<std::string, std::int64_t> lengths;
  std::vector<std::vector<float>> inputs;  // by the kernel's inputs; empty: left out
  std::vector<double> attributes;
  std::vector<std::size_t> outputs;  // those that the kernel computes from these inputs

  bool given(std::size_t input) const { return !inputs[input].empty(); }
  std::vector<std::int64_t> shape(const kernels::Argument& argument) const {
    std::vector<std::int64_t> all;
    for (const std::string& axis : words(argument.axes)) all.push_back(lengths.at(axis));
    return all;
  }
  std::size_t elements(const kernels::Argument& argument) const {
    std::size_t count = 1;
    for (const std::int64_t length : shape(argument)) count *= static_cast<std::size_t>(length);
    return count;
  }
  std::string text() const {
    std::string all = std::string(kernel->name) + ", " + internal::dtype_name(dtype);
    for (const auto& [axis, length] : lengths) all += ", " + axis + " " + std::to_string(length);
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      if (given(i) && kernel->inputs[i].optional) all += std::string(", with ") + kernel->inputs[i].name;
    }
    for (std::size_t i = 0; i < attributes.size(); ++i) {
      const kernels::Attribute& attribute = kernel->attributes[i];
      all += std::string(", ") + attribute.name + " ";
      all += attribute.choices.empty() ? std::to_string(attributes[i])
                                       : attribute.choices[static_cast<std::size_t>(attributes[i])];
    }
    return all;
  }
};

inline bool is_gradient(const kernels::Argument& output) { return std::strncmp(output.name, "grad_", 5) == 0; }

inline std::vector<float> draw(const DescribedCall& call, const kernels::Argument& argument, Draw how, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> numbers(call.elements(argument));
  const std::vector<std::int64_t> shape = call.shape(argument);
  if (argument.role == kernels::Role::kNumber) {
    numbers[0] = 2.0f;
  } else if (argument.role == kernels::Role::kFloat32) {
    for (float& number : numbers) number = std::uniform_real_distribution<float>(0.25f, 1.25f)(random);
  } else if (argument.role == kernels::Role::kIndex) {
    std::int64_t most = 3;  // that every axis has
    for (const auto& [axis, length] : call.lengths) most = std::min(most, length);
    for (float& number : numbers) number = static_cast<float>(random() % static_cast<unsigned>(most));
  } else {
    const std::size_t row = shape.empty() ? 1 : static_cast<std::size_t>(shape.back());
    for (std::size_t begin = 0; begin < numbers.size(); begin += row) {
      float squares = 0.0f;
      for (std::size_t i = begin; i < begin + row; ++i) {
        numbers[i] = normal(random);
        squares += numbers[i] * numbers[i];
      }
      const float factor = (how == Draw::kWide ? 30.0f : 1.0f) / std::sqrt(squares);
      for (std::size_t i = begin; i < begin + row; ++i) {
        numbers[i] = rounded(call.dtype, numbers[i] * factor);
        if (how == Draw::kMasked && (i - begin) % 5 == 1) numbers[i] = -std::numeric_limits<float>::infinity();
      }
    }
  }
  return numbers;
}

// ---- Running --------------------------------------------------------------------------------------------------------

struct Variant {
  std::vector<std::size_t> outputs;  // empty: all that the call computes
  int threads = 1;
  std::size_t offset = 0;       // of every array, in elements beyond a cache line
  unsigned char before = 0xFF;  // what outputs hold beforehand, and the memory around every array
};

struct Outcome {
  pykd_status status = PYKD_OK;
  std::string error;
  std::vector<Bytes> outputs;  // by the kernel's outputs; empty: not asked for
  std::string complaint;       // empty: nothing was written but outputs, nor outputs where there was an error
};

// An array between two guards.
class Room {
 public:
  Room(const kernels::Argument& argument, pykd_dtype dtype, std::vector<std::int64_t> shape, const Variant& variant)
      : name_(argument.name), dtype_(dtype), shape_(std::move(shape)), before_(variant.before) {
    bytes_ = internal::dtype_size(dtype);
    for (const std::int64_t length : shape_) bytes_ *= static_cast<std::size_t>(length);
    memory_.assign(bytes_ + 4 * kGuard, before_);
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data()) + kGuard;
    begin_ = kGuard + (kGuard - address % kGuard) % kGuard + variant.offset * internal::dtype_size(dtype);
  }

  void fill(const Bytes& content) { std::copy(content.begin(), content.end(), &memory_[begin_]); }
  Bytes content() const {
    const auto first = memory_.begin() + static_cast<std::ptrdiff_t>(begin_);
    return {first, first + static_cast<std::ptrdiff_t>(bytes_)};
  }
  bool guards_are_whole() const {
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      if ((i < begin_ || i >= begin_ + bytes_) && memory_[i] != before_) return false;
    }
    return true;
  }
  bool untouched() const { return content() == Bytes(bytes_, before_); }
  pykd_tensor view() {
    return {name_, &memory_[begin_], dtype_, static_cast<std::int32_t>(shape_.size()), shape_.data(), nullptr, PYKD_CPU,
            0,     nullptr};
  }
  const char* name() const { return name_; }

 private:
  static constexpr std::size_t kGuard = 64;
  const char* name_;
  pykd_dtype dtype_;
  std::vector<std::int64_t> shape_;
  unsigned char before_;
  std::size_t bytes_, begin_;
  Bytes memory_;
};

// The arguments of one call of the C interface.
struct Arguments {
  std::vector<pykd_tensor> inputs, outputs;
  std::vector<pykd_kernel_attribute> attributes;
};

// `change` may spoil them.
template <class Change>
Outcome run(const DescribedCall& call, const Variant& variant, const Change& change) {
  const kernels::Kernel& kernel = *call.kernel;
  const std::vector<std::size_t> wanted = variant.outputs.empty() ? call.outputs : variant.outputs;
  std::vector<Room> rooms;
  std::vector<Bytes> content;
  rooms.reserve(kernel.inputs.size() + kernel.outputs.size());
  for (std::size_t i = 0; i < kernel.inputs.size(); ++i) {
    if (!call.given(i)) continue;
    const pykd_dtype dtype = kernels::dtype_of(kernel.inputs[i].role, call.dtype);
    content.push_back(encode(dtype, call.inputs[i]));
    rooms.emplace_back(kernel.inputs[i], dtype, call.shape(kernel.inputs[i]), variant);
    rooms.back().fill(content.back());
  }
  Arguments arguments;
  for (Room& room : rooms) arguments.inputs.push_back(room.view());
  const std::size_t inputs = rooms.size();
  for (const std::size_t output : wanted) {
    const kernels::Argument& described = kernel.outputs[output];
    rooms.emplace_back(described, kernels::dtype_of(described.role, call.dtype), call.shape(described), variant);
    arguments.outputs.push_back(rooms.back().view());
  }
  for (std::size_t i = 0; i < kernel.attributes.size(); ++i) {
    const kernels::Attribute& attribute = kernel.attributes[i];
    const bool number = attribute.choices.empty();
    arguments.attributes.push_back(
        {attribute.name, call.attributes[i],
         number ? nullptr : attribute.choices[static_cast<std::size_t>(call.attributes[i])]});
  }
  change(arguments);

  pykd_kernel_host host = PYKD_KERNEL_HOST_INIT;
  int threads = variant.threads;
  host.threads = threads;
  host.pool = &threads;
  host.parallel = [](void* pool, std::int64_t tasks, void (*task)(void*, std::int64_t), void* state) {
    std::atomic<std::int64_t> left{tasks};
    const auto work = [&] {
      for (std::int64_t i = --left; i >= 0; i = --left) task(state, i);  // the last first
    };
    std::vector<std::thread> helpers(static_cast<std::size_t>(*static_cast<int*>(pool) - 1));
    for (std::thread& helper : helpers) helper = std::thread(work);
    work();
    for (std::thread& helper : helpers) helper.join();
  };
  Outcome outcome;
  outcome.status =
      pykd_kernel_run(kernel.name, arguments.inputs.data(), arguments.inputs.size(), arguments.attributes.data(),
                      arguments.attributes.size(), arguments.outputs.data(), arguments.outputs.size(), &host);
  if (outcome.status != PYKD_OK) outcome.error = pykd_last_error();
  outcome.outputs.resize(kernel.outputs.size());
  for (std::size_t i = 0; i < rooms.size(); ++i) {
    if (!rooms[i].guards_are_whole()) outcome.complaint = std::string("memory around ") + rooms[i].name() + " changed";
    if (i < inputs) {
      if (rooms[i].content() != content[i]) outcome.complaint = std::string(rooms[i].name()) + ", an input, changed";
      continue;
    }
    outcome.outputs[wanted[i - inputs]] = rooms[i].content();
    if (outcome.status != PYKD_OK && !rooms[i].untouched()) {
      outcome.complaint = std::string(rooms[i].name()) + " was written in spite of the error";
    }
  }
  return outcome;
}

inline Outcome run(const DescribedCall& call, const Variant& variant = {}) {
  return run(call, variant, [](Arguments&) {});
}

// ---- The calls that a kernel takes ----------------------------------------------------------------------------------

inline std::vector<std::size_t> computed(const DescribedCall& call) {
  std::vector<std::size_t> outputs;
  for (std::size_t i = 0; i < call.kernel->outputs.size(); ++i) {
    Variant alone;
    alone.outputs = {i};
    if (run(call, alone).status == PYKD_OK) outputs.push_back(i);
  }
  return outputs;
}

inline bool contains(const DescribedCall& all, const DescribedCall& some) {
  for (std::size_t i = 0; i < all.inputs.size(); ++i) {
    if (some.given(i) && !all.given(i)) return false;
  }
  return std::includes(all.outputs.begin(), all.outputs.end(), some.outputs.begin(), some.outputs.end());
}

// With every set of optional inputs and every choice of which something is computed. `largest`: without those that
// another one has all of.
inline std::vector<DescribedCall> described_calls(const kernels::Kernel& kernel, pykd_dtype dtype, Lengths lengths,
                                                  Draw how, bool largest = false) {
  std::vector<std::size_t> optional;
  std::size_t choices = 1;
  for (std::size_t i = 0; i < kernel.inputs.size(); ++i) {
    if (kernel.inputs[i].optional) optional.push_back(i);
  }
  for (const kernels::Attribute& attribute : kernel.attributes) {
    choices *= std::max<std::size_t>(1, attribute.choices.size());
  }
  DescribedCall call;
  call.kernel = &kernel;
  call.dtype = dtype;
  const std::int64_t few = std::min<std::int64_t>(lengths.last, 40);  // of what is chosen along the last axis
  for (const kernels::Argument& input : kernel.inputs) {
    const std::vector<std::string> axes = words(input.axes);
    for (std::size_t i = 0; i < axes.size(); ++i) {
      const std::int64_t last = &input == &kernel.inputs[0] ? lengths.last : few;
      call.lengths.emplace(axes[i], i == 0 ? lengths.first : i + 1 == axes.size() ? last : lengths.between);
    }
  }
  std::vector<std::vector<float>> all_inputs;
  for (std::size_t i = 0; i < kernel.inputs.size(); ++i) {
    all_inputs.push_back(draw(call, kernel.inputs[i], how, how == Draw::kEqual ? 1u : 1u + static_cast<unsigned>(i)));
  }
  std::vector<DescribedCall> calls;
  for (std::size_t choice = 0; choice < choices; ++choice) {
    std::size_t rest = choice;
    call.attributes.clear();
    for (const kernels::Attribute& attribute : kernel.attributes) {
      const std::size_t count = std::max<std::size_t>(1, attribute.choices.size());
      call.attributes.push_back(attribute.choices.empty() ? attribute.default_value
                                                          : static_cast<double>(rest % count));
      rest /= count;
    }
    std::vector<DescribedCall> of_choice;
    for (std::size_t subset = 0; subset < std::size_t{1} << optional.size(); ++subset) {
      call.inputs = all_inputs;
      for (std::size_t i = 0; i < optional.size(); ++i) {
        if ((subset >> i & 1) == 0) call.inputs[optional[i]].clear();
      }
      call.outputs = computed(call);
      if (!call.outputs.empty()) of_choice.push_back(call);
    }
    for (std::size_t i = 0; i < of_choice.size(); ++i) {
      bool kept = true;
      for (std::size_t j = 0; largest && j < of_choice.size(); ++j) {
        kept = kept && (i == j || !contains(of_choice[j], of_choice[i]));
      }
      if (kept) calls.push_back(of_choice[i]);
    }
  }
  return calls;
}

}  // namespace pykd::tests

#endif  // PYKD_TESTS_DESCRIBED_CALL_H_
