// File: pykd/kernels.hpp
//
// C++17 over pykd/kernels.h: what a fused kernel takes and returns, and a call of one whose output
// shapes follow from its inputs. For those who connect the kernels to a tensor library
// (pykd/torch_kernels.hpp does); needs the standard library alone.
//
// Two naming rules of the kernels become functions here: the gradient of an input is the output
// "grad_<input>", and the weight of a value is the input "<value>_weight", or "weight" where the
// value is called "value".
#ifndef PYKD_KERNELS_HPP_
#define PYKD_KERNELS_HPP_

#include <charconv>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "pykd/kernels.h"
#include "pykd/pykd.hpp"

namespace pykd {

// An input or output of a kernel.
struct KernelArgument {
  std::string name;
  std::vector<std::string> axes;  // equal names mean equal lengths
  std::string role;               // "tensor", "float32", "number" or "index": see kernels.h
};

// What a kernel is.
struct KernelDescription {
  std::string name;
  std::vector<KernelArgument> inputs;
  std::vector<KernelArgument> outputs;   // values first, gradients last
  std::vector<std::string> with_choice;  // the attributes whose value is a word

  const KernelArgument* input(const std::string& wanted) const { return find(inputs, wanted); }
  const KernelArgument* output(const std::string& wanted) const { return find(outputs, wanted); }

  // The gradient of an input; nullptr for an input that has none.
  const KernelArgument* gradient_of(const std::string& input) const { return output("grad_" + input); }
  // The weight of a value; nullptr where it has none.
  const KernelArgument* weight_of(const std::string& value) const {
    return input(value == "value" ? "weight" : value + "_weight");
  }

 private:
  static const KernelArgument* find(const std::vector<KernelArgument>& all, const std::string& wanted) {
    for (const KernelArgument& argument : all) {
      if (argument.name == wanted) return &argument;
    }
    return nullptr;
  }
};

namespace internal {

// Reads the JSON that pykd_kernel_description() writes.
class KernelDescriptionReader {
 public:
  explicit KernelDescriptionReader(const char* text) : at_(text) {}

  KernelDescription read() {
    KernelDescription kernel;
    object([&](const std::string& key) {
      if (key == "name") {
        kernel.name = string();
      } else if (key == "inputs") {
        arguments(kernel.inputs);
      } else if (key == "outputs") {
        arguments(kernel.outputs);
      } else if (key == "attributes") {
        list([&] { attribute(kernel); });
      } else {
        skip();
      }
    });
    return kernel;
  }

 private:
  void arguments(std::vector<KernelArgument>& all) {
    list([&] {
      KernelArgument argument;
      object([&](const std::string& key) {
        if (key == "name") {
          argument.name = string();
        } else if (key == "role") {
          argument.role = string();
        } else if (key == "axes") {
          list([&] { argument.axes.push_back(string()); });
        } else {
          skip();
        }
      });
      all.push_back(std::move(argument));
    });
  }

  void attribute(KernelDescription& kernel) {
    std::string name;
    bool choices = false;
    object([&](const std::string& key) {
      if (key == "name") {
        name = string();
      } else if (key == "choices") {
        list([&] {
          choices = true;
          skip();
        });
      } else {
        skip();
      }
    });
    if (choices) kernel.with_choice.push_back(name);
  }

  // The next character that is no white space.
  char peek() {
    while (*at_ == ' ' || *at_ == '\n' || *at_ == '\r' || *at_ == '\t') ++at_;
    return *at_;
  }
  bool take(char wanted) {
    if (peek() != wanted) return false;
    ++at_;
    return true;
  }
  void expect(char wanted) {
    if (!take(wanted)) {
      throw Error(PYKD_INTERNAL, std::string("expected the description of a kernel as JSON, got text without '") +
                                     wanted + "' at " + std::string(at_).substr(0, 20) +
                                     "; this is a mistake in pykd, please report it");
    }
  }
  template <class Value>
  void object(const Value& value) {
    sequence('{', '}', [&] {
      const std::string key = string();
      expect(':');
      value(key);
    });
  }
  template <class Item>
  void list(const Item& item) {
    sequence('[', ']', item);
  }
  template <class Item>
  void sequence(char open, char close, const Item& item) {
    expect(open);
    if (take(close)) return;
    do item();
    while (take(','));
    expect(close);
  }
  std::string string() {  // names are plain words: nothing in them is escaped
    expect('"');
    std::string text;
    while (*at_ != '"' && *at_ != '\0') text += *at_++;
    expect('"');
    return text;
  }
  void skip() {
    switch (peek()) {
      case '"':
        string();
        return;
      case '{':
        object([&](const std::string&) { skip(); });
        return;
      case '[':
        list([&] { skip(); });
        return;
      default:  // a number, true, false or null
        while (*at_ != '\0' && *at_ != ',' && *at_ != '}' && *at_ != ']') ++at_;
    }
  }

  const char* at_;
};

}  // namespace internal

// Every kernel of the library that is running.
inline const std::vector<KernelDescription>& kernels() {
  static const std::vector<KernelDescription> all = [] {
    internal::check_version();
    std::vector<KernelDescription> read;
    for (std::size_t i = 0; i < pykd_num_kernels(); ++i) {
      read.push_back(internal::KernelDescriptionReader(pykd_kernel_description(i)).read());
    }
    return read;
  }();
  return all;
}

namespace internal {
[[noreturn]] inline void fail_as_library_does(pykd_status status) {
  check(status);
  throw Error(PYKD_INTERNAL,
              "expected the library to refuse a call that it describes otherwise, got a result; this is a "
              "mistake in pykd, please report it");
}
}  // namespace internal

// The kernel of that name. Throws Error.
inline const KernelDescription& kernel(const std::string& name) {
  for (const KernelDescription& known : kernels()) {
    if (known.name == name) return known;
  }
  internal::fail_as_library_does(pykd_kernel_run(internal::c_text(name), nullptr, 0, nullptr, 0, nullptr, 0, nullptr));
}

// One call on its way: inputs and attributes go in, then shape_of() tells the shape of each output
// that is wanted, output() takes the memory for it, and run() runs. Names are copied; memory and
// shapes are views that must outlive run().
class KernelCall {
 public:
  explicit KernelCall(const KernelDescription& called) : kernel_(called) {}
  KernelCall(const KernelCall&) = delete;
  KernelCall& operator=(const KernelCall&) = delete;

  const KernelDescription& description() const { return kernel_; }

  // `tensor.name` is not looked at.
  void input(const std::string& name, pykd_tensor tensor) { inputs_.push_back(named(name, tensor)); }
  void output(const std::string& name, pykd_tensor tensor) { outputs_.push_back(named(name, tensor)); }

  // A number or the word of a choice, as text.
  void attribute(const std::string& name, const std::string& text) {
    pykd_kernel_attribute given = {keep(name), 0.0, nullptr};
    const char* end = text.data() + text.size();
    const auto parsed = std::from_chars(text.data(), end, given.value);
    if (has_choices(name) || text.empty() || parsed.ec != std::errc() || parsed.ptr != end) {
      given.choice = keep(text);
    }
    attributes_.push_back(given);
  }
  void attribute(const std::string& name, double value) { attributes_.push_back({keep(name), value, nullptr}); }

  // What an output will have, from the inputs given so far. Throws Error, the library's own where
  // there is no such output or an input that it depends on is missing.
  std::vector<std::int64_t> shape_of(const std::string& output) const {
    const KernelArgument* wanted = kernel_.output(output);
    std::vector<std::int64_t> shape;
    for (std::size_t i = 0; wanted != nullptr && i < wanted->axes.size(); ++i) {
      const std::int64_t length = length_of(wanted->axes[i]);
      if (length < 0) wanted = nullptr;
      shape.push_back(length);
    }
    if (wanted == nullptr) refuse(output);
    return shape;
  }
  pykd_dtype dtype_of(const std::string& output) const {
    const KernelArgument* wanted = kernel_.output(output);
    if (wanted == nullptr || wanted->role != "tensor") return PYKD_FLOAT32;
    for (const pykd_tensor& given : inputs_) {
      const KernelArgument* argument = kernel_.input(given.name);
      if (argument != nullptr && argument->role == "tensor") return given.dtype;
    }
    return PYKD_FLOAT32;
  }

  // Throws Error.
  void run(const pykd_kernel_host& host) const {
    internal::check(pykd_kernel_run(kernel_.name.c_str(), inputs_.data(), inputs_.size(), attributes_.data(),
                                    attributes_.size(), outputs_.data(), outputs_.size(), &host));
  }

 private:
  const char* keep(const std::string& text) { return internal::c_text(texts_.emplace_back(text)); }

  pykd_tensor named(const std::string& name, pykd_tensor tensor) {
    tensor.name = keep(name);
    return tensor;
  }

  bool has_choices(const std::string& attribute) const {
    for (const std::string& name : kernel_.with_choice) {
      if (name == attribute) return true;
    }
    return false;
  }

  std::int64_t length_of(const std::string& axis) const {
    for (const pykd_tensor& given : inputs_) {
      const KernelArgument* argument = kernel_.input(given.name);
      if (argument == nullptr || argument->axes.size() != static_cast<std::size_t>(given.rank)) continue;
      for (std::size_t i = 0; i < argument->axes.size(); ++i) {
        if (argument->axes[i] == axis) return given.shape[i];
      }
    }
    return -1;
  }

  // The library knows best how to say what is wrong with a call: it is asked, with a scalar where
  // an output of unknown shape would be.
  [[noreturn]] void refuse(const std::string& output) const {
    double unused = 0.0;
    pykd_tensor wanted = {
        internal::c_text(output), &unused, dtype_of(output), 0, nullptr, nullptr, PYKD_CPU, 0, nullptr};
    for (const pykd_tensor& given : inputs_) {
      const KernelArgument* argument = kernel_.input(given.name);
      if (argument == nullptr || argument->role == "number") continue;
      wanted.device = given.device;
      wanted.device_id = given.device_id;
      break;
    }
    internal::fail_as_library_does(pykd_kernel_run(kernel_.name.c_str(), inputs_.data(), inputs_.size(),
                                                   attributes_.data(), attributes_.size(), &wanted, 1, nullptr));
  }

  const KernelDescription& kernel_;
  std::deque<std::string> texts_;  // a deque: its elements stay where they are
  std::vector<pykd_tensor> inputs_, outputs_;
  std::vector<pykd_kernel_attribute> attributes_;
};

}  // namespace pykd

#endif  // PYKD_KERNELS_HPP_
