// What every kernel promises (kernels/kernel.h), tested for every kernel of the registry by its description alone, on
// every instruction set of this machine. What a kernel computes is tested beside it, against its formula.
//
// The checks complain rather than fail, and a kernel with faults of every sort shows at the end that each of them does.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <ostream>
#include <set>
#include <string>
#include <vector>

#include "kernels/kernel.h"
#include "kernels/simd/targets.h"
#include "pykd/kernels.h"
#include "tests/described_call.h"

namespace pykd::tests {
namespace {

using kernels::Argument;
using kernels::Attribute;
using kernels::Kernel;
using kernels::Role;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr Lengths kSmall[] = {{1, 1, 1}, {2, 1, 2}, {3, 2, 7}, {5, 3, 17}, {2, 2, 33}};
constexpr Lengths kLarge = {160, 3, 601};  // enough work for several threads, in every kernel

class Complaints {
 public:
  void add(const DescribedCall& call, const std::string& what) {
    ++count_;
    if (count_ <= 5) text_ += "\n  " + what + " (" + call.text() + ")";
  }
  std::size_t count() const { return count_; }
  std::string text() const { return std::to_string(count_) + " complaints" + text_; }

 private:
  std::size_t count_ = 0;
  std::string text_;
};

std::vector<pykd_dtype> dtypes_of(const Kernel& kernel) {
  std::vector<pykd_dtype> all;
  for (const pykd_dtype dtype : internal::kDtypes) {
    if ((kernel.dtypes & internal::dtype_bit(dtype)) != 0) all.push_back(dtype);
  }
  return all;
}

std::vector<float> numbers(const DescribedCall& call, std::size_t output, const Outcome& outcome) {
  return decode(kernels::dtype_of(call.kernel->outputs[output].role, call.dtype), outcome.outputs[output]);
}

// Where two outcomes have other numbers; any NaN is like any other, and so are zeros. Empty: nowhere.
std::string difference(const DescribedCall& call, std::size_t output, const Outcome& a, const Outcome& b) {
  if (a.outputs[output] == b.outputs[output]) return "";
  const std::vector<float> x = numbers(call, output, a), y = numbers(call, output, b);
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (x[i] == y[i] || (std::isnan(x[i]) && std::isnan(y[i]))) continue;
    char text[100];
    std::snprintf(text, sizeof text, ": entry %zu is %.9g, not %.9g", i, double{y[i]}, double{x[i]});
    return text;
  }
  return "";
}

// Whether a call has the same results in another variant.
void compare(const DescribedCall& call, const Outcome& expected, const Variant& variant, const std::string& what,
             Complaints& complaints) {
  const Outcome outcome = run(call, variant);
  if (outcome.status != PYKD_OK) return complaints.add(call, what + ": " + outcome.error);
  if (!outcome.complaint.empty()) complaints.add(call, what + ": " + outcome.complaint);
  for (const std::size_t output : variant.outputs.empty() ? call.outputs : variant.outputs) {
    const std::string where = difference(call, output, expected, outcome);
    if (!where.empty())
      complaints.add(
          call, std::string(what).append(" gives another ").append(call.kernel->outputs[output].name).append(where));
  }
}

template <class Check>
void for_small_calls(const Kernel& kernel, std::initializer_list<Draw> draws, const Check& check) {
  for (const pykd_dtype dtype : dtypes_of(kernel)) {
    for (const Lengths& lengths : kSmall) {
      for (const Draw how : draws) {
        for (const DescribedCall& call : described_calls(kernel, dtype, lengths, how)) check(call);
      }
    }
  }
}

// ---- The checks -----------------------------------------------------------------------------------------------------

// Every output is written, all of it and nothing else, whatever lies there before and around; each alone as with the
// others; at any address that its dtype allows.
void check_memory(const Kernel& kernel, Complaints& complaints) {
  for_small_calls(kernel, {Draw::kOrdinary, Draw::kWide, Draw::kEqual, Draw::kMasked}, [&](const DescribedCall& call) {
    const Outcome all = run(call);
    if (all.status != PYKD_OK) return complaints.add(call, "all outputs together: " + all.error);
    if (!all.complaint.empty()) complaints.add(call, all.complaint);
    Variant zeros;
    zeros.before = 0;
    compare(call, all, zeros, "memory that holds zeros", complaints);
    for (const std::size_t output : call.outputs) {
      Variant alone;
      alone.outputs = {output};
      compare(call, all, alone, "alone", complaints);
    }
    for (const std::size_t offset : {1, 2, 3, 5}) {
      Variant moved;
      moved.offset = offset;
      compare(call, all, moved, std::to_string(offset) + " entries beyond a cache line", complaints);
    }
  });
}

// The result does not depend on the number of threads, nor, where it is large, on what else is wanted.
void check_threads(const Kernel& kernel, Complaints& complaints) {
  for (const pykd_dtype dtype : dtypes_of(kernel)) {
    for (const DescribedCall& call : described_calls(kernel, dtype, kLarge, Draw::kOrdinary, /*largest=*/true)) {
      const Outcome all = run(call);
      for (const int threads : {2, 5}) {
        Variant shared;
        shared.threads = threads;
        compare(call, all, shared, std::to_string(threads) + " threads", complaints);
      }
      for (const std::size_t output : call.outputs) {
        Variant alone;
        alone.threads = 2;
        alone.outputs = {output};
        compare(call, all, alone, "alone on 2 threads", complaints);
      }
    }
  }
}

// It computes in float32 whatever the dtype of the tensors, and rounds gradients once.
void check_dtypes(const Kernel& kernel, Complaints& complaints) {
  for_small_calls(kernel, {Draw::kOrdinary}, [&](const DescribedCall& call) {
    if (call.dtype == PYKD_FLOAT32) return;
    DescribedCall wide = call;
    wide.dtype = PYKD_FLOAT32;
    const Outcome narrow_outcome = run(call), wide_outcome = run(wide);
    for (const std::size_t output : call.outputs) {
      const std::vector<float> got = numbers(call, output, narrow_outcome), exact = numbers(wide, output, wide_outcome);
      const bool rounds = kernel.outputs[output].role == Role::kTensor;
      const double unit = !rounds ? 0.0 : call.dtype == PYKD_FLOAT16 ? 0x1p-11 : 0x1p-8;
      const double smallest = rounds && call.dtype == PYKD_FLOAT16 ? 0x1p-25 : 0.0;
      double largest = 0.0;
      for (const float number : exact) largest = std::max(largest, std::abs(double{number}));
      for (std::size_t i = 0; i < exact.size(); ++i) {
        if (got[i] == exact[i]) continue;  // both may be infinite
        const double error = std::abs(double{got[i]} - double{exact[i]});
        if (error <= unit * std::abs(double{exact[i]}) + smallest + 2e-6 * largest) continue;
        complaints.add(call, std::string(kernel.outputs[output].name) + " is " + std::to_string(got[i]) + ", and " +
                                 std::to_string(exact[i]) + " from float32");
        break;
      }
    }
  });
}

// A gradient comes out multiplied by the weights that go in, exactly 0 for weights of 0; values know nothing of them.
void check_weights(const Kernel& kernel, Complaints& complaints) {
  for_small_calls(kernel, {Draw::kOrdinary, Draw::kEqual}, [&](const DescribedCall& call) {
    const Outcome once = run(call);
    for (const float factor : {0.0f, 2.0f}) {
      DescribedCall weighted = call;
      for (std::size_t i = 0; i < kernel.inputs.size(); ++i) {
        if (kernel.inputs[i].role != Role::kFloat32) continue;
        for (float& weight : weighted.inputs[i]) weight *= factor;
      }
      const Outcome outcome = run(weighted);
      for (const std::size_t output : call.outputs) {
        const std::string name = kernel.outputs[output].name;
        if (!is_gradient(kernel.outputs[output])) {
          if (!difference(call, output, once, outcome).empty()) complaints.add(call, "weights change " + name);
          continue;
        }
        const std::vector<float> before = numbers(call, output, once), after = numbers(call, output, outcome);
        for (std::size_t i = 0; i < before.size(); ++i) {
          if (after[i] == rounded(call.dtype, factor * before[i]) || std::abs(before[i]) < 1e-4f) continue;
          complaints.add(call, name + " is " + std::to_string(before[i]) + ", and " + std::to_string(after[i]) +
                                   " for " + std::to_string(factor) + " times the weights");
          break;
        }
        for (std::size_t i = 0; i < before.size() && factor == 0.0f; ++i) {
          if (after[i] == 0.0f) continue;
          complaints.add(call, name + " is not 0 where the weights are");
          break;
        }
      }
    }
  });
}

// NaN in a tensor reaches a value or a gradient.
void check_nan(const Kernel& kernel, Complaints& complaints) {
  for (const pykd_dtype dtype : dtypes_of(kernel)) {
    for (const DescribedCall& call : described_calls(kernel, dtype, {5, 3, 17}, Draw::kOrdinary, /*largest=*/true)) {
      for (std::size_t input = 0; input < kernel.inputs.size(); ++input) {
        if (kernel.inputs[input].role != Role::kTensor || !call.given(input)) continue;
        DescribedCall spoilt = call;
        // In the second place of a row: among those that indices name, where a kernel looks at no others.
        std::vector<float>& entries = spoilt.inputs[input];
        const auto row = static_cast<std::size_t>(call.shape(kernel.inputs[input]).back());
        entries[entries.size() / 2 / row * row + 1] = kNaN;
        const Outcome outcome = run(spoilt);
        if (!outcome.complaint.empty()) complaints.add(call, outcome.complaint);
        bool any = false;
        for (const std::size_t output : call.outputs) {
          for (const float number : numbers(spoilt, output, outcome)) any = any || std::isnan(number);
        }
        if (!any) complaints.add(call, std::string("NaN in ") + kernel.inputs[input].name + " leaves no trace");
      }
    }
  }
}

// Late in a training the student is the teacher but for the last digits: what it learns from them must not be lost.
// All tensors of the same axes are equal but for a step of the one with the gradient, and how the gradient changes with
// it is compared with a large step in the same direction. A step of 1e-7 must not vanish, since float32 can tell the
// student from the teacher. It cannot tell the difference of two softmaxes: only from 1e-6 on the change has to point
// where that of the large step points, roughly, and from 1e-5 on closely.
void check_near(const Kernel& kernel, Complaints& complaints) {
  for (const DescribedCall& call : described_calls(kernel, PYKD_FLOAT32, {9, 2, 33}, Draw::kEqual, /*largest=*/true)) {
    for (const std::size_t output : call.outputs) {
      if (!is_gradient(kernel.outputs[output])) continue;
      const std::string name = kernel.outputs[output].name;
      std::size_t input = 0;
      while (name.substr(5) != kernel.inputs[input].name) ++input;
      const std::vector<float> direction = draw(call, kernel.inputs[input], Draw::kOrdinary, 99);
      const auto gradient = [&](float step) {
        DescribedCall moved = call;
        for (std::size_t i = 0; i < kernel.inputs.size();
             ++i) {  // shorter, so that rows are not too long after the step
          for (float& number : moved.inputs[i]) number *= kernel.inputs[i].role == Role::kTensor ? 0.9f : 1.0f;
        }
        for (std::size_t i = 0; i < direction.size(); ++i) moved.inputs[input][i] += step * direction[i];
        return numbers(call, output, run(moved));
      };
      const std::vector<float> zero = gradient(0.0f);
      const auto without = [](std::vector<float> from, const std::vector<float>& what) {
        for (std::size_t i = 0; i < from.size(); ++i) from[i] -= what[i];
        return from;
      };
      const auto product = [](const std::vector<float>& a, const std::vector<float>& b) {
        double sum = 0.0;
        for (std::size_t i = 0; i < a.size(); ++i) sum += double{a[i]} * double{b[i]};
        return sum;
      };
      const std::vector<float> far_change = without(gradient(1e-2f), zero);
      if (product(far_change, far_change) == 0.0) complaints.add(call, name + " does not depend on the student");
      for (const float step : {1e-7f, 1e-6f, 1e-5f, 1e-4f, 1e-3f}) {
        const std::vector<float> change = without(gradient(step), zero);
        const double alike =
            product(change, far_change) / std::sqrt(product(change, change) * product(far_change, far_change));
        if (product(change, change) == 0.0) {
          complaints.add(call, name + " is that of an equal teacher for a step of " + std::to_string(step));
        } else if (step > 5e-7f && !(alike > (step < 5e-6f ? 0.3 : 0.9))) {
          complaints.add(call, name + " points elsewhere for a step of " + std::to_string(step) + ": cosine " +
                                   std::to_string(alike));
        }
      }
    }
  }
}

// What does not fit the description is an error that names the argument, and nothing is computed.
void check_refusals(const Kernel& kernel, Complaints& complaints) {
  for (const pykd_dtype dtype : dtypes_of(kernel)) {
    for (const DescribedCall& call : described_calls(kernel, dtype, {3, 2, 5}, Draw::kOrdinary, /*largest=*/true)) {
      const auto refused = [&](const std::string& what, const std::string& name,
                               const std::function<void(Arguments&)>& change) {
        const Outcome outcome = run(call, {}, change);
        if (outcome.status == PYKD_OK) complaints.add(call, what + " is accepted");
        if (!outcome.complaint.empty()) complaints.add(call, what + ": " + outcome.complaint);
        if (outcome.error.find(name) == std::string::npos) {
          complaints.add(
              call,
              std::string(what).append(": the message does not name ").append(name).append(": ").append(outcome.error));
        }
      };
      std::size_t given = 0;
      std::vector<const Argument*> arguments;  // as run() lists them
      for (std::size_t i = 0; i < kernel.inputs.size(); ++i) {
        if (!call.given(i)) continue;
        arguments.push_back(&kernel.inputs[i]);
        ++given;
      }
      for (const std::size_t output : call.outputs) arguments.push_back(&kernel.outputs[output]);

      for (std::size_t i = 0; i < arguments.size(); ++i) {
        const Argument& argument = *arguments[i];
        const std::string name = argument.name;
        const bool input = i < given;
        const auto spoilt = [&](const std::string& what, const std::function<void(pykd_tensor&)>& change) {
          refused(std::string(name).append(" ").append(what), name,
                  [&](Arguments& all) { change(input ? all.inputs[i] : all.outputs[i - given]); });
        };
        static std::int64_t shape[9];  // of the tensor that is passed
        const auto reshape = [&](pykd_tensor& tensor, std::size_t axis, std::int64_t length) {
          std::copy_n(tensor.shape, tensor.rank, shape);
          shape[axis] = length;
          tensor.shape = shape;
        };
        for (int other = PYKD_FLOAT16 - 1; other <= PYKD_INT64 + 1; ++other) {
          if (other == kernels::dtype_of(argument.role, dtype)) continue;
          // Another dtype that the kernel has, for all that decides it, is another call.
          const bool decides = &argument == &kernel.inputs[0] && argument.role == Role::kTensor;
          const std::string whose = decides ? "dtype" : name;
          refused(name + " of dtype " + std::to_string(other), whose, [&](Arguments& all) {
            std::memcpy(&(input ? all.inputs[i] : all.outputs[i - given]).dtype, &other, sizeof other);
          });
        }
        spoilt("with one axis more", [&](pykd_tensor& tensor) {
          std::copy_n(tensor.shape, tensor.rank, shape);
          shape[tensor.rank++] = 1;
          tensor.shape = shape;
        });
        spoilt("of rank -1", [&](pykd_tensor& tensor) { tensor.rank = -1; });
        spoilt("without data", [&](pykd_tensor& tensor) { tensor.data = nullptr; });
        spoilt("at an odd address",
               [&](pykd_tensor& tensor) { tensor.data = static_cast<unsigned char*>(tensor.data) + 1; });
        spoilt("on another device", [&](pykd_tensor& tensor) {
          const int none = 7;
          std::memcpy(&tensor.device, &none, sizeof none);
        });
        const std::vector<std::string> axes = words(argument.axes);
        if (!axes.empty()) {
          spoilt("without a shape", [&](pykd_tensor& tensor) { tensor.shape = nullptr; });
          spoilt("with steps of 2", [&](pykd_tensor& tensor) {
            static const std::int64_t steps[8] = {2, 2, 2, 2, 2, 2, 2, 2};
            tensor.strides = steps;
          });
        }
        for (std::size_t axis = 0; axis < axes.size(); ++axis) {
          spoilt("empty along " + axes[axis], [&](pykd_tensor& tensor) { reshape(tensor, axis, 0); });
          spoilt("negative along " + axes[axis], [&](pykd_tensor& tensor) { reshape(tensor, axis, -3); });
          std::size_t shared = 0;
          for (const Argument* other : arguments) {
            const std::vector<std::string> theirs = words(other->axes);
            shared += static_cast<std::size_t>(std::count(theirs.begin(), theirs.end(), axes[axis]));
          }
          if (shared < 2) continue;
          // One of two lengths is wrong; the message names the later one.
          refused(name + " shorter along " + axes[axis], axes[axis],
                  [&](Arguments& all) { reshape(input ? all.inputs[i] : all.outputs[i - given], axis, 1); });
        }
        if (!input) {
          refused(name + " in the memory of an input", name,
                  [&](Arguments& all) { all.outputs[i - given].data = all.inputs[0].data; });
        }
        refused(name + " twice", name, [&](Arguments& all) {
          std::vector<pykd_tensor>& list = input ? all.inputs : all.outputs;
          list.push_back(list[input ? i : i - given]);
        });
        if (input && !argument.optional) {
          refused("a call without " + name, name,
                  [&](Arguments& all) { all.inputs.erase(all.inputs.begin() + static_cast<std::ptrdiff_t>(i)); });
        }
      }
      for (const bool input : {true, false}) {
        refused("an unknown tensor", "nobodys_tensor",
                [&](Arguments& all) { (input ? all.inputs : all.outputs)[0].name = "nobodys_tensor"; });
      }
      refused("a call without outputs", "output", [](Arguments& all) { all.outputs.clear(); });
      refused("an unknown attribute", "nobodys_setting", [](Arguments& all) {
        all.attributes.push_back({"nobodys_setting", 1.0, nullptr});
      });
      for (std::size_t i = 0; i < kernel.attributes.size(); ++i) {
        const std::string name = kernel.attributes[i].name;
        const bool chooses = !kernel.attributes[i].choices.empty();
        refused(name + " twice", name, [&](Arguments& all) { all.attributes.push_back(all.attributes[i]); });
        refused(name + " of the other kind", name,
                [&](Arguments& all) { all.attributes[i].choice = chooses ? nullptr : "number"; });
        refused(name + " of no meaning", name, [&](Arguments& all) {
          if (chooses) {
            all.attributes[i].choice = "nobodys_choice";
          } else {
            all.attributes[i].value = double{kNaN};
          }
        });
      }
    }
  }
}

struct Check {
  const char* name;
  void (*check)(const Kernel&, Complaints&);
};

constexpr Check kChecks[] = {{"Memory", check_memory},    {"Threads", check_threads}, {"Dtypes", check_dtypes},
                             {"Weights", check_weights},  {"NaN", check_nan},         {"NearTheTeacher", check_near},
                             {"Refusals", check_refusals}};

// ---- Every kernel on every instruction set --------------------------------------------------------------------------

constexpr char kFaulty[] = "faulty";

struct Subject {
  std::string kernel, target;
  Check check;
};

void PrintTo(const Subject& subject, std::ostream* stream) {
  *stream << subject.kernel << " on " << subject.target << ": " << subject.check.name;
}

// Those of losses, and the one that is of none.
std::vector<std::string> names() {
  std::vector<std::string> all = {"row_scores"};
  for (const Kernel& kernel : kernels::all()) {
    if (std::string(kernel.name) != kFaulty) all.emplace_back(kernel.name);
  }
  return all;
}

std::vector<Subject> subjects() {
  std::vector<Subject> all;
  for (const std::string& name : names()) {
    for (const std::string& target : kernels::simd_targets()) {
      for (const Check& check : kChecks) all.push_back({name, target, check});
    }
  }
  return all;
}

class EveryKernel : public testing::TestWithParam<Subject> {
 protected:
  void SetUp() override { ASSERT_TRUE(kernels::use_simd(GetParam().target.c_str())); }
  void TearDown() override { kernels::use_simd(nullptr); }
};

TEST_P(EveryKernel, KeepsItsPromises) {
  const Kernel& kernel = *kernels::find(GetParam().kernel);
  Complaints complaints;
  GetParam().check.check(kernel, complaints);
  EXPECT_EQ(complaints.count(), 0u) << complaints.text();
}

INSTANTIATE_TEST_SUITE_P(Kernels, EveryKernel, testing::ValuesIn(subjects()), [](const auto& subject) {
  return subject.param.kernel + "_" + subject.param.target + "_" + subject.param.check.name;
});

// No check is empty: of every kernel every optional input, choice and output is in some call.
TEST(DescribedCalls, ReachEverythingThatADescriptionNames) {
  for (const std::string& name : names()) {
    const Kernel& kernel = *kernels::find(name);
    std::set<std::string> reached, described;
    for (const DescribedCall& call : described_calls(kernel, PYKD_FLOAT32, {3, 2, 5}, Draw::kOrdinary, true)) {
      for (std::size_t i = 0; i < kernel.inputs.size(); ++i) {
        if (call.given(i)) reached.insert(kernel.inputs[i].name);
      }
      for (const std::size_t output : call.outputs) reached.insert(kernel.outputs[output].name);
      for (std::size_t i = 0; i < kernel.attributes.size(); ++i) {
        const Attribute& attribute = kernel.attributes[i];
        reached.insert(attribute.choices.empty() ? attribute.name
                                                 : attribute.choices[static_cast<std::size_t>(call.attributes[i])]);
      }
    }
    for (const Argument& input : kernel.inputs) described.insert(input.name);
    for (const Argument& output : kernel.outputs) described.insert(output.name);
    for (const Attribute& attribute : kernel.attributes) {
      if (attribute.choices.empty()) described.insert(attribute.name);
      described.insert(attribute.choices.begin(), attribute.choices.end());
    }
    EXPECT_EQ(reached, described) << kernel.name;
  }
}

// ---- A kernel with faults -------------------------------------------------------------------------------------------

enum class Fault {
  kNone,
  kWritesTooFar,
  kWritesTooLittle,
  kChangesAnInput,
  kReadsItsOutput,
  kNeedsTheOtherOutput,
  kNeedsAlignment,
  kCountsThreads,
  kComputesInHalf,
  kForgetsTheWeight,
  kWeighsTheValue,
  kSwallowsNaN,
  kLosesSmallSteps,
  kTurnsSmallSteps,
};

Fault fault = Fault::kNone;

float entry(const kernels::Array& array, std::int64_t i) {
  return array.dtype == PYKD_FLOAT32 ? array.as<const float>()[i]
                                     : from_half(array.dtype, array.as<const std::uint16_t>()[i]);
}

void set_entry(const kernels::Array& array, std::int64_t i, float value) {
  if (array.dtype == PYKD_FLOAT32) {
    array.as<float>()[i] = value;
  } else {
    array.as<std::uint16_t>()[i] = to_half(array.dtype, value);
  }
}

// The mean over features of the squared differences, per row.
void run_faulty(const kernels::Call& call) {
  const kernels::Array &student = call.inputs[0], &teacher = call.inputs[1], &weight = call.inputs[2];
  const kernels::Array &value = call.outputs[0], &gradient = call.outputs[1];
  const std::int64_t rows = student.length(0), features = student.length(1);
  const auto misaligned = static_cast<float>(reinterpret_cast<std::uintptr_t>(student.data) % 64 != 0);
  call.parallel->for_each(rows, [&](std::int64_t row) {
    float sum = 0.0f, largest = 0.0f;
    for (std::int64_t k = 0; k < features; ++k) {
      float difference = entry(student, row * features + k) - entry(teacher, row * features + k);
      if (fault == Fault::kSwallowsNaN && std::isnan(difference)) difference = 0.0f;
      if (fault == Fault::kComputesInHalf) difference = rounded(call.dtype, difference * 0.7f) / 0.7f;
      largest = std::max(largest, std::abs(difference));
      sum += difference * difference;
    }
    for (std::int64_t k = 0; gradient.given() && k < features; ++k) {
      float difference = entry(student, row * features + k) - entry(teacher, row * features + k);
      if (fault == Fault::kSwallowsNaN && std::isnan(difference)) difference = 0.0f;
      if (fault == Fault::kLosesSmallSteps && largest < 1e-6f) difference = 0.0f;
      if (fault == Fault::kTurnsSmallSteps && largest < 1e-4f) difference = (k % 2 == 0 ? 1.0f : -1.0f) * difference;
      float slope = 2.0f * difference / static_cast<float>(features);
      if (fault == Fault::kNeedsAlignment) slope += misaligned;
      if (fault == Fault::kNeedsTheOtherOutput && !value.given()) slope = 1.0f;
      if (fault == Fault::kReadsItsOutput) slope += entry(gradient, row * features + k);
      if (fault != Fault::kForgetsTheWeight) slope *= weight.as<const float>()[row];
      if (fault == Fault::kWritesTooLittle && row == rows - 1 && k == features - 1) continue;
      set_entry(gradient, row * features + k, slope);
    }
    if (fault == Fault::kCountsThreads) sum += static_cast<float>(call.parallel->threads);
    if (fault == Fault::kWeighsTheValue && weight.given()) sum *= weight.as<const float>()[row];
    if (value.given()) value.as<float>()[row] = sum / static_cast<float>(features);
  });
  if (fault == Fault::kWritesTooFar && value.given()) value.as<float>()[rows] = 0.0f;
  if (fault == Fault::kChangesAnInput) set_entry(teacher, 0, 0.5f);
}

const bool registered =
    kernels::add({kFaulty,
                  {{"student", "batch features", Role::kTensor},
                   {"teacher", "batch features", Role::kTensor},
                   {"weight", "batch", Role::kFloat32, kernels::kOptional}},
                  {{"value", "batch", Role::kFloat32}, {"grad_student", "batch features", Role::kTensor}},
                  {{"unused", 1.0}, {"form", 0, {"squared", "the_same"}}},
                  kernels::kFloatAndHalves,
                  [](const kernels::Call& call) {
                    return call.outputs[1].given() && !call.inputs[2].given() ? "grad_student needs weight" : nullptr;
                  },
                  run_faulty});

// Which of the checks complain.
std::string complaining(Fault of) {
  fault = of;
  std::string names;
  for (const Check& check : kChecks) {
    Complaints complaints;
    check.check(*kernels::find(kFaulty), complaints);
    if (complaints.count() > 0) names += std::string(names.empty() ? "" : " ") + check.name;
    if (of == Fault::kNone) {
      EXPECT_EQ(complaints.count(), 0u) << check.name << ": " << complaints.text();
    }
  }
  fault = Fault::kNone;
  return names;
}

TEST(AKernelWithAFault, IsComplainedOf) {
  ASSERT_TRUE(registered);
  EXPECT_EQ(complaining(Fault::kNone), "");
  const auto found = [](Fault of, const std::string& check) {
    const std::string names = complaining(of);
    EXPECT_NE(names.find(check), std::string::npos) << "fault " << static_cast<int>(of) << ": " << names;
  };
  for (const Fault of : {Fault::kWritesTooFar, Fault::kWritesTooLittle, Fault::kChangesAnInput, Fault::kReadsItsOutput,
                         Fault::kNeedsTheOtherOutput, Fault::kNeedsAlignment}) {
    found(of, "Memory");
  }
  found(Fault::kCountsThreads, "Threads");
  found(Fault::kComputesInHalf, "Dtypes");
  found(Fault::kForgetsTheWeight, "Weights");
  found(Fault::kWeighsTheValue, "Weights");
  found(Fault::kSwallowsNaN, "NaN");
  found(Fault::kLosesSmallSteps, "NearTheTeacher");
  found(Fault::kTurnsSmallSteps, "NearTheTeacher");
}

}  // namespace
}  // namespace pykd::tests
