// A program may let the processor trap what is not a number (feenableexcept): ordinary calls must raise nothing, in
// lanes that hold no entry as little as in the others. Every kernel, with whatever it takes, on every instruction set.
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "kernels/kernel.h"
#include "kernels/simd/targets.h"
#include "tests/described_call.h"
#include "tests/half_numbers.h"
#include "tests/support.h"

namespace pykd::kernels {
namespace {

using tests::words;

// Ordinary tensors: of moderate numbers; equal ones; constants; some entries far below, as masked classes are.
enum class Draw { kModerate, kEqual, kConstant, kMasked };

float draw_number(Draw draw, std::size_t index, std::mt19937& random) {
  const float number = std::normal_distribution<float>(0, 3)(random);
  switch (draw) {
    case Draw::kConstant:
      return 0.5f;
    case Draw::kMasked:
      return index % 3 == 1 ? -6e4f : number;
    default:
      return number;
  }
}

// The memory and the lengths of one argument.
struct Room {
  std::vector<std::uint64_t> memory;
  std::vector<std::int64_t> shape;
  Array array;

  void make(const Argument& argument, pykd_dtype dtype, const std::map<std::string, std::int64_t>& lengths) {
    shape.clear();
    for (const std::string& axis : words(argument.axes)) shape.push_back(lengths.at(axis));
    array = {nullptr, dtype, static_cast<std::int32_t>(shape.size()), shape.data()};
    memory.assign(static_cast<std::size_t>(array.elements()), 0);  // 8 bytes for each are enough
    array.data = memory.data();
  }

  void set(std::size_t index, float value) {
    if (array.dtype == PYKD_FLOAT32) {
      array.as<float>()[index] = value;
    } else {
      array.as<std::uint16_t>()[index] = tests::to_half(array.dtype, value);
    }
  }

  void fill(const Argument& argument, Draw draw, std::int64_t classes, unsigned seed) {
    const bool probabilities = std::string(argument.name) == "label_probs";
    std::mt19937 random(seed);
    for (std::size_t i = 0; i < memory.size(); ++i) {
      if (argument.role == Role::kIndex) {
        array.as<std::int64_t>()[i] = static_cast<std::int64_t>(i) % std::min<std::int64_t>(classes, 3);
      } else if (argument.role != Role::kTensor) {
        set(i, argument.role == Role::kNumber ? 2.0f : 0.5f);
      } else {
        set(i, probabilities ? static_cast<float>(i % 5) / 8 : draw_number(draw, i, random));
      }
    }
  }
};

std::string flags() {
  std::string text;
  if (std::fetestexcept(FE_INVALID) != 0) text += " FE_INVALID";
  if (std::fetestexcept(FE_DIVBYZERO) != 0) text += " FE_DIVBYZERO";
  if (std::fetestexcept(FE_OVERFLOW) != 0) text += " FE_OVERFLOW";
  return text;
}

class FloatingPoint : public testing::TestWithParam<std::size_t> {
 protected:
  void TearDown() override { use_simd(nullptr); }

  // Every set of optional inputs and every choice that the kernel takes, for tensors of these lengths.
  void run_all(const Kernel& kernel, pykd_dtype dtype, const std::map<std::string, std::int64_t>& lengths,
               std::int64_t classes, Draw draw) {
    std::vector<Room> rooms(kernel.inputs.size() + kernel.outputs.size());
    std::vector<std::size_t> optional;
    for (std::size_t i = 0; i < kernel.inputs.size(); ++i) {
      if (kernel.inputs[i].optional) optional.push_back(i);
      rooms[i].make(kernel.inputs[i], dtype_of(kernel.inputs[i].role, dtype), lengths);
      rooms[i].fill(kernel.inputs[i], draw, classes, draw == Draw::kEqual ? 1 : static_cast<unsigned>(i));
    }
    for (std::size_t i = 0; i < kernel.outputs.size(); ++i) {
      rooms[kernel.inputs.size() + i].make(kernel.outputs[i], dtype_of(kernel.outputs[i].role, dtype), lengths);
    }
    std::size_t choices = 1;
    for (const Attribute& attribute : kernel.attributes) {
      choices *= std::max<std::size_t>(1, attribute.choices.size());
    }
    for (std::size_t subset = 0; subset < std::size_t{1} << optional.size(); ++subset) {
      for (std::size_t choice = 0; choice < choices; ++choice) {
        for (std::size_t wanted = 1; wanted < std::size_t{1} << kernel.outputs.size(); ++wanted) {
          run_one(kernel, dtype, rooms, optional, subset, choice, wanted);
        }
      }
    }
  }

  int calls_ = 0, failures_ = 0;

 private:
  void run_one(const Kernel& kernel, pykd_dtype dtype, const std::vector<Room>& rooms,
               const std::vector<std::size_t>& optional, std::size_t subset, std::size_t choice, std::size_t wanted) {
    std::vector<Array> inputs, outputs;
    for (std::size_t i = 0; i < kernel.inputs.size(); ++i) inputs.push_back(rooms[i].array);
    for (std::size_t i = 0; i < optional.size(); ++i) {
      if ((subset >> i & 1) == 0) inputs[optional[i]] = Array();
    }
    for (std::size_t i = 0; i < kernel.outputs.size(); ++i) {
      outputs.push_back((wanted >> i & 1) != 0 ? rooms[kernel.inputs.size() + i].array : Array());
    }
    std::vector<double> attributes;
    for (const Attribute& attribute : kernel.attributes) {
      const std::size_t count = attribute.choices.size();
      attributes.push_back(count == 0 ? attribute.default_value : static_cast<double>(choice % count));
      choice /= std::max<std::size_t>(1, count);
    }
    Call call;
    const Parallel alone;
    call.inputs = inputs.data();
    call.outputs = outputs.data();
    call.attributes = attributes.data();
    call.dtype = dtype;
    call.parallel = &alone;
    if (kernel.refuse != nullptr && kernel.refuse(call) != nullptr) return;
    std::feclearexcept(FE_ALL_EXCEPT);
    kernel.cpu(call);
    ++calls_;
    const std::string raised = flags();
    if (raised.empty() || ++failures_ > 5) return;
    std::string what = std::string(kernel.name) + " raised" + raised + " at";
    for (const std::int64_t length : rooms[0].shape) what += " " + std::to_string(length);
    for (std::size_t i = 0; i < attributes.size(); ++i) {
      what += std::string(", ") + kernel.attributes[i].name + " " + std::to_string(attributes[i]);
    }
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      if (inputs[i].given()) what += std::string(", ") + kernel.inputs[i].name;
    }
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      if (outputs[i].given()) what += std::string(", ") + kernel.outputs[i].name;
    }
    ADD_FAILURE() << what << ", dtype " << static_cast<int>(dtype);
  }
};

// Whether some of its inputs are of entries that are chosen along the last axis of the first.
bool chooses(const Kernel& kernel) {
  const std::string last = words(kernel.inputs[0].axes).back();
  for (const Argument& input : kernel.inputs) {
    for (const std::string& axis : words(input.axes)) {
      if (!input.optional && axis != "batch" && axis != "tokens" && axis != last) return true;
    }
  }
  return false;
}

TEST_P(FloatingPoint, OrdinaryCallsRaiseNothing) {
  const std::string target = simd_targets()[GetParam()];
  ASSERT_TRUE(use_simd(target.c_str()));
  std::vector<std::int64_t> sizes;
  for (std::int64_t size = 1; size <= 35; ++size) sizes.push_back(size);
  for (std::int64_t size : {63, 65, 1023, 1025, 1031}) sizes.push_back(size);
  for (const Kernel& kernel : all()) {
    if (chooses(kernel)) continue;  // top_k, whose logarithms of 0 are not covered by this test yet
    for (const pykd_dtype dtype : {PYKD_FLOAT32, PYKD_FLOAT16, PYKD_BFLOAT16}) {
      if ((kernel.dtypes & 1u << dtype) == 0) continue;
      for (const std::int64_t size : sizes) {
        for (const std::int64_t batch : {1, 2, 5, 18}) {
          if (batch * size > 2100 && batch > 2) continue;
          for (const Draw draw : {Draw::kModerate, Draw::kEqual, Draw::kConstant, Draw::kMasked}) {
            std::map<std::string, std::int64_t> lengths = {{"batch", batch}, {"tokens", 2}};
            const std::vector<std::string> axes = words(kernel.inputs[0].axes);
            lengths[axes.back()] = size;
            run_all(kernel, dtype, lengths, size, draw);
          }
        }
      }
    }
    EXPECT_GT(calls_, 1000) << kernel.name;
    calls_ = 0;
  }
  EXPECT_EQ(failures_, 0) << "calls on " << target;
}

INSTANTIATE_TEST_SUITE_P(EveryTarget, FloatingPoint, testing::Range<std::size_t>(0, simd_targets().size()));

}  // namespace
}  // namespace pykd::kernels
