// The C interface of the kernels, with a kernel made for the purpose; and what every kernel of the library has to have.
#include "pykd/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/error.h"
#include "kernels/kernel.h"
#include "tests/described_call.h"
#include "tests/support.h"

namespace pykd::kernels {
namespace {

using nlohmann::json;
using tests::words;

// ---- The kernel: scale * sum(|student - teacher|^p) + offset of each row ------------------------------------------

int runs = 0;
int threads_seen = 0;

void run(const Call& call) {
  ++runs;
  threads_seen = call.parallel->threads;
  const Array& student = call.inputs[0];
  const Array& teacher = call.inputs[1];
  const float scale = call.inputs[2].given() ? call.number(2) : 1.0f;
  const bool squared = call.choice(0) == 0;
  const auto offset = static_cast<float>(call.attributes[1]);
  const std::int64_t features = student.length(1);
  call.parallel->for_each(student.length(0), [&](std::int64_t row) {
    float sum = 0;
    for (std::int64_t i = 0; i < features; ++i) {
      const float target = teacher.given() ? teacher.as<const float>()[row * features + i] : 0.0f;
      const float difference = student.as<const float>()[row * features + i] - target;
      sum += squared ? difference * difference : std::fabs(difference);
      if (!call.outputs[1].given()) continue;
      const float weight = call.inputs[4].as<const float>()[row];
      call.outputs[1].as<float>()[row * features + i] = 2 * difference * weight;
    }
    if (call.outputs[0].given()) call.outputs[0].as<float>()[row] = scale * sum + offset;
  });
}

const char* refuse(const Call& call) {
  if (call.outputs[1].given() && !call.inputs[4].given()) return "the gradient needs weight";
  return nullptr;
}

const bool registered = add({"test_error",
                             {{"student", "batch features", Role::kTensor},
                              {"teacher", "batch features", Role::kTensor, kOptional},
                              {"scale", "", Role::kNumber, kOptional},
                              {"labels", "batch", Role::kIndex, kOptional},
                              {"weight", "batch", Role::kFloat32, kOptional}},
                             {{"value", "batch", Role::kFloat32}, {"grad_student", "batch features", Role::kTensor}},
                             {{"form", 0, {"squared", "absolute"}}, {"offset", 0.5}},
                             kFloat32Alone | 1u << PYKD_BFLOAT16,
                             refuse,
                             run});

class KernelsApi : public testing::Test {
 protected:
  void SetUp() override { runs = 0; }

  pykd_tensor matrix(const char* name, std::vector<float>& data) {
    return {name, data.data(), PYKD_FLOAT32, 2, shape, nullptr, PYKD_CPU, 0};
  }
  pykd_tensor vector(const char* name, std::vector<float>& data) {
    return {name, data.data(), PYKD_FLOAT32, 1, shape, nullptr, PYKD_CPU, 0};
  }
  pykd_tensor number(const char* name, float& scalar) {
    return {name, &scalar, PYKD_FLOAT32, 0, nullptr, nullptr, PYKD_CPU, 0};
  }

  pykd_status call(const std::vector<pykd_tensor>& in, const std::vector<pykd_tensor>& out,
                   const std::vector<pykd_kernel_attribute>& attributes = {}, const pykd_kernel_host* host = nullptr,
                   const char* kernel = "test_error") {
    return pykd_kernel_run(kernel, in.data(), in.size(), attributes.data(), attributes.size(), out.data(), out.size(),
                           host);
  }

  void expect_error(pykd_status expected, pykd_status got, std::initializer_list<const char*> words) {
    EXPECT_EQ(got, expected);
    tests::expect_words(pykd_last_error(), words);
    EXPECT_EQ(runs, 0) << "the kernel ran all the same";
    EXPECT_EQ(value, (std::vector<float>{-7, -7}));
  }

  std::int64_t shape[2] = {2, 3};
  std::vector<float> student = {1, 2, 3, 3, 2, 1}, teacher = {0, 2, 4, 4, 2, 0}, gradient = std::vector<float>(6);
  std::vector<float> value = {-7, -7}, weight = {0.5f, 2};
  std::vector<std::int64_t> labels = {0, 1};
  float scale = 10;
};

TEST_F(KernelsApi, RunsWithArgumentsInAnyOrder) {
  ASSERT_EQ(
      call({vector("weight", weight), number("scale", scale), matrix("teacher", teacher), matrix("student", student)},
           {matrix("grad_student", gradient), vector("value", value)}),
      PYKD_OK)
      << pykd_last_error();
  EXPECT_EQ(value, (std::vector<float>{20.5f, 20.5f}));
  EXPECT_EQ(gradient, (std::vector<float>{1, 0, -1, -4, 0, 4}));
}

TEST_F(KernelsApi, LeavesOutWhatIsOptional) {
  ASSERT_EQ(call({matrix("student", student)}, {vector("value", value)}), PYKD_OK) << pykd_last_error();
  EXPECT_EQ(value, (std::vector<float>{14.5f, 14.5f}));
}

TEST_F(KernelsApi, TakesAttributes) {
  ASSERT_EQ(call({matrix("student", student)}, {vector("value", value)},
                 {{"offset", 0.25, nullptr}, {"form", 0, "absolute"}}),
            PYKD_OK)
      << pykd_last_error();
  EXPECT_EQ(value, (std::vector<float>{6.25f, 6.25f}));
}

TEST_F(KernelsApi, RunsOnTheThreadsItIsGiven) {
  struct Count {
    int calls = 0;
    std::int64_t tasks = 0;
  } count;
  pykd_kernel_host host = PYKD_KERNEL_HOST_INIT;
  host.threads = 3;
  host.pool = &count;
  host.parallel = [](void* pool, std::int64_t tasks, void (*task)(void*, std::int64_t), void* state) {
    static_cast<Count*>(pool)->calls += 1;
    for (std::int64_t i = tasks; i-- > 0;) {
      static_cast<Count*>(pool)->tasks += 1;
      task(state, i);
    }
  };
  ASSERT_EQ(call({matrix("student", student)}, {vector("value", value)}, {}, &host), PYKD_OK);
  EXPECT_EQ(value, (std::vector<float>{14.5f, 14.5f}));
  EXPECT_EQ(count.calls, 1);
  EXPECT_EQ(count.tasks, 2);
  EXPECT_EQ(threads_seen, 3);
}

TEST_F(KernelsApi, ChecksNames) {
  const auto in = matrix("student", student);
  const auto out = vector("value", value);
  expect_error(PYKD_INVALID_VALUE, call({in}, {out}, {}, nullptr, "test_eror"), {"test_eror", "\"test_error\"?"});
  expect_error(PYKD_INVALID_VALUE, call({in}, {out}, {}, nullptr, "nothing_like_it"), {"test_error", "library"});
  expect_error(PYKD_INVALID_VALUE, call({in, matrix("teachers", teacher)}, {out}), {"an input among", "\"teacher\"?"});
  expect_error(PYKD_INVALID_VALUE, call({in}, {out, matrix("grad_teacher", gradient)}),
               {"an output among value, grad_student"});
  expect_error(PYKD_INVALID_VALUE, call({in, in}, {out}), {"student once", "twice"});
  expect_error(PYKD_INVALID_VALUE, call({in}, {out, out}), {"value once"});
  expect_error(PYKD_INVALID_VALUE, call({matrix("teacher", teacher)}, {out}),
               {"student for the kernel test_error", "got none"});
  expect_error(PYKD_INVALID_VALUE, call({in}, {}), {"at least one output", "value, grad_student"});
  expect_error(PYKD_INVALID_VALUE, call({in}, {out}, {{"ofset", 1, nullptr}}),
               {"an attribute among form, offset", "\"offset\"?"});
  expect_error(PYKD_INVALID_VALUE, call({in}, {out}, {{"offset", 1, nullptr}, {"offset", 1, nullptr}}),
               {"offset once"});
  expect_error(PYKD_INVALID_VALUE, call({in}, {out}, {{"form", 0, "square"}}),
               {"squared, absolute", "form", "\"squared\"?"});
  expect_error(PYKD_INVALID_VALUE, call({in}, {out}, {{"form", 1, nullptr}}), {"form", "NULL"});
  expect_error(PYKD_INVALID_VALUE, call({in}, {out}, {{"offset", 1, "squared"}}),
               {"a number for the attribute offset"});
  expect_error(PYKD_INVALID_VALUE, call({in}, {out}, {{"offset", NAN, nullptr}}), {"finite", "offset"});
  expect_error(PYKD_INVALID_VALUE, pykd_kernel_run(nullptr, nullptr, 0, nullptr, 0, nullptr, 0, nullptr),
               {"the name of a kernel"});
  expect_error(PYKD_INVALID_VALUE, pykd_kernel_run("test_error", nullptr, 2, nullptr, 0, nullptr, 0, nullptr),
               {"an array of inputs"});
  expect_error(PYKD_INVALID_VALUE, call({matrix(nullptr, student)}, {out}), {"a name for every one of the inputs"});
}

TEST_F(KernelsApi, ChecksShapes) {
  const auto out = vector("value", value);
  auto in = matrix("student", student), other = matrix("teacher", teacher);
  std::int64_t wide[3] = {2, 4, 1}, tall[2] = {3, 3}, empty[2] = {0, 3},
               huge[2] = {std::int64_t{1} << 40, std::int64_t{1} << 40};
  other.shape = wide;
  expect_error(PYKD_INVALID_VALUE, call({in, other}, {out}),
               {"teacher of length 3 along \"features\", as student has", "shape [2, 4]"});
  other.rank = 3;
  expect_error(PYKD_INVALID_VALUE, call({in, other}, {out}),
               {"teacher with axes (batch, features)", "rank 3", "[2, 4, 1]"});
  other.rank = -1;
  expect_error(PYKD_INVALID_VALUE, call({in, other}, {out}), {"teacher with axes (batch, features)", "rank -1"});
  other = matrix("teacher", teacher);
  other.shape = nullptr;
  expect_error(PYKD_INVALID_VALUE, call({in, other}, {out}), {"teacher with its 2 lengths", "NULL"});
  auto gradient_out = matrix("grad_student", gradient);
  gradient_out.shape = tall;
  expect_error(PYKD_INVALID_VALUE, call({in, vector("weight", weight)}, {out, gradient_out}),
               {"grad_student of length 2"});
  in.shape = empty;
  expect_error(PYKD_INVALID_VALUE, call({in}, {out}), {"student of length at least 1 along \"batch\"", "[0, 3]"});
  in.shape = huge;
  auto huge_out = out;
  huge_out.shape = huge;
  expect_error(PYKD_INVALID_VALUE, call({in}, {huge_out}), {"student of a size that fits into memory"});
  auto scalar = number("scale", scale);
  scalar.rank = 1;
  scalar.shape = shape;
  expect_error(PYKD_INVALID_VALUE, call({matrix("student", student), scalar}, {out}),
               {"scale with no axes (a scalar)"});
}

TEST_F(KernelsApi, ChecksLayout) {
  auto in = matrix("student", student);
  const auto out = vector("value", value);
  const std::int64_t transposed[2] = {1, 2}, contiguous[2] = {3, 1};
  in.strides = transposed;
  expect_error(PYKD_INVALID_VALUE, call({in}, {out}), {"student contiguous", "strides [1, 2]"});
  in.data = nullptr;
  expect_error(PYKD_INVALID_VALUE, call({in}, {out}), {"student with a pointer to its data"});
  in = matrix("student", student);
  expect_error(PYKD_INVALID_VALUE, call({in, vector("weight", weight)}, {out, matrix("grad_student", student)}),
               {"grad_student in memory of its own", "student"});
  std::vector<float> both(8);
  auto first = vector("value", both), second = matrix("grad_student", both);
  second.data = both.data() + 1;
  expect_error(PYKD_INVALID_VALUE, call({in, vector("weight", weight)}, {first, second}),
               {"grad_student in memory of its own", "value"});
  in.strides = contiguous;
  EXPECT_EQ(call({in}, {out}), PYKD_OK);
}

TEST_F(KernelsApi, ChecksDtypes) {
  auto in = matrix("student", student), other = matrix("teacher", teacher);
  const auto out = vector("value", value);
  other.dtype = PYKD_BFLOAT16;
  expect_error(PYKD_INVALID_TYPE, call({in, other}, {out}), {"teacher of dtype float32, as student has", "bfloat16"});
  in.dtype = PYKD_FLOAT64;
  expect_error(PYKD_UNAVAILABLE, call({in}, {out}), {"bfloat16 or float32", "test_error", "float64"});
  in.dtype = PYKD_INT64;
  expect_error(PYKD_INVALID_TYPE, call({in}, {out}), {"bfloat16 or float32", "int64"});
  const int unknown = 77;
  std::memcpy(&in.dtype, &unknown, sizeof unknown);
  expect_error(PYKD_INVALID_TYPE, call({in}, {out}), {"student", "unknown dtype (77)"});
  in = matrix("student", student);
  auto index = vector("labels", weight);
  expect_error(PYKD_INVALID_TYPE, call({in, index}, {out}), {"labels of dtype int64", "float32"});
  auto half = vector("weight", weight);
  half.dtype = PYKD_BFLOAT16;
  expect_error(PYKD_INVALID_TYPE, call({in, half}, {out}), {"weight of dtype float32", "whatever the tensors have"});
}

TEST_F(KernelsApi, ChecksDevices) {
  auto in = matrix("student", student), out = vector("value", value);
  auto scalar = number("scale", scale);
  scalar.device = PYKD_CUDA;
  expect_error(PYKD_INVALID_TYPE, call({in, scalar}, {out}), {"scale on cpu", "reads its numbers", "cuda:0"});
  out.device = PYKD_CUDA;
  expect_error(PYKD_INVALID_TYPE, call({in}, {out}), {"value on cpu, as student is", "cuda:0"});
  in.device = PYKD_CUDA;
  out.device_id = 1;
  expect_error(PYKD_INVALID_TYPE, call({in}, {out}), {"value on cuda:0, as student is", "cuda:1"});
  const int unknown = 5;
  std::memcpy(&in.device, &unknown, sizeof unknown);
  expect_error(PYKD_INVALID_TYPE, call({in}, {out}), {"student", "unknown device (5)"});
}

// Whoever has libpykd_cuda and a device has no kernel of that name in it.
TEST_F(KernelsApi, SaysWhatIsMissingForCuda) {
  auto in = matrix("student", student), out = vector("value", value);
  in.device = out.device = PYKD_CUDA;
  expect_error(PYKD_UNAVAILABLE, call({in}, {out}), {"for kernels on CUDA", "; "});
}

TEST_F(KernelsApi, SaysWhatTheKernelRefuses) {
  expect_error(PYKD_INVALID_VALUE, call({matrix("student", student)}, {matrix("grad_student", gradient)}),
               {"rules of the kernel test_error", "correct it: the gradient needs weight"});
}

TEST_F(KernelsApi, ChecksItsHost) {
  pykd_kernel_host host = PYKD_KERNEL_HOST_INIT;
  for (const std::int32_t threads : {-1, 1025, 100000}) {
    host.threads = threads;
    expect_error(PYKD_INVALID_VALUE, call({matrix("student", student)}, {vector("value", value)}, {}, &host),
                 {"from 0 to 1024 threads"});
  }
  for (const std::size_t size : {std::size_t{0}, std::size_t{3}, sizeof host - 4, sizeof host + 4, SIZE_MAX - 3}) {
    host = PYKD_KERNEL_HOST_INIT;
    host.struct_size = size;
    expect_error(PYKD_INVALID_VALUE, call({matrix("student", student)}, {vector("value", value)}, {}, &host),
                 {"pykd_kernel_host", "PYKD_KERNEL_HOST_INIT"});
  }
}

TEST_F(KernelsApi, SaysWhatTheHostsThreadsThrow) {
  pykd_kernel_host host = PYKD_KERNEL_HOST_INIT;
  host.threads = 2;
  host.parallel = [](void*, std::int64_t, void (*)(void*, std::int64_t), void*) {
    throw std::logic_error("no threads");
  };
  EXPECT_EQ(call({matrix("student", student)}, {vector("value", value)}, {}, &host), PYKD_ENGINE_FAILURE);
  tests::expect_words(pykd_last_error(),
                      {"expected parallel() of the pykd_kernel_host", "got the exception \"no threads\""});
  host.parallel = [](void*, std::int64_t, void (*)(void*, std::int64_t), void*) { throw 42; };
  EXPECT_EQ(call({matrix("student", student)}, {vector("value", value)}, {}, &host), PYKD_ENGINE_FAILURE);
  tests::expect_words(pykd_last_error(), {"parallel()", "unknown type"});
}

TEST_F(KernelsApi, ChecksAlignment) {
  alignas(8) char memory[64] = {};
  auto in = matrix("student", student);
  auto out = vector("value", value);
  in.data = memory + 2;
  expect_error(PYKD_INVALID_VALUE, call({in}, {out}), {"student at an address that 4 divides", "2 beyond"});
  in = matrix("student", student);
  auto odd = vector("value", value);
  odd.data = memory + 1;
  expect_error(PYKD_INVALID_VALUE, call({in}, {odd}), {"value at an address that 4 divides"});
  pykd_tensor index = {"labels", memory + 4, PYKD_INT64, 1, shape, nullptr, PYKD_CPU, 0};
  expect_error(PYKD_INVALID_VALUE, call({in, index}, {out}), {"labels at an address that 8 divides"});
  in.shape = reinterpret_cast<const std::int64_t*>(memory + 4);
  expect_error(PYKD_INVALID_VALUE, call({in}, {out}), {"student with its shape"});
}

TEST_F(KernelsApi, TakesNoTemperatureWhoseReciprocalIsInfinite) {
  for (float temperature : {0.0f, -1.0f, 1e-40f, std::numeric_limits<float>::infinity(), std::nanf("")}) {
    EXPECT_EQ(call({matrix("student", student), matrix("teacher", teacher), number("temperature", temperature)},
                   {vector("soft", value)}, {}, nullptr, "soft_target"),
              PYKD_INVALID_VALUE)
        << temperature;
    tests::expect_words(pykd_last_error(), {"correct it: temperature must be a finite number of at least 1.2e-38"});
  }
  float temperature = 2e-38f;
  EXPECT_EQ(call({matrix("student", student), matrix("teacher", teacher), number("temperature", temperature)},
                 {vector("soft", value)}, {}, nullptr, "soft_target"),
            PYKD_OK);
}

// ---- Descriptions -------------------------------------------------------------------------------

json description(const char* name) {
  for (std::size_t i = 0; i < pykd_num_kernels(); ++i) {
    json object = json::parse(pykd_kernel_description(i));
    if (object["name"] == name) return object;
  }
  return nullptr;
}

TEST(KernelDescriptions, SayWhatAKernelIs) {
  const json object = description("test_error");
  EXPECT_EQ(object["inputs"].size(), 5u);
  EXPECT_EQ(object["inputs"][0], json::parse(R"({"name": "student", "axes": ["batch", "features"], "role": "tensor",
                                                 "optional": false})"));
  EXPECT_EQ(object["inputs"][2], json::parse(R"({"name": "scale", "axes": [], "role": "number", "optional": true})"));
  EXPECT_EQ(object["outputs"][0], json::parse(R"({"name": "value", "axes": ["batch"], "role": "float32"})"));
  EXPECT_EQ(object["attributes"][0],
            json::parse(R"({"name": "form", "default": "squared", "choices": ["squared", "absolute"]})"));
  EXPECT_EQ(object["attributes"][1], json::parse(R"({"name": "offset", "default": 0.5, "choices": []})"));
  EXPECT_EQ(object["dtypes"], json::parse(R"(["bfloat16", "float32"])"));
  EXPECT_EQ(pykd_kernel_description(pykd_num_kernels()), nullptr);
}

// What the interfaces rely on without asking.
TEST(KernelDescriptions, AreWhole) {
  EXPECT_TRUE(registered);
  EXPECT_FALSE(add({"test_error", {}, {}, {}, 0, nullptr, run})) << "a name taken twice";
  std::string before;
  for (const Kernel& kernel : all()) {
    SCOPED_TRACE(kernel.name);
    EXPECT_LT(before, kernel.name) << "by name, each once";
    before = kernel.name;
    EXPECT_EQ(find(kernel.name), &kernel);
    EXPECT_NE(kernel.cpu, nullptr);
    EXPECT_NE(kernel.dtypes & kFloat32Alone, 0u);
    EXPECT_EQ(kernel.dtypes & ~kFloatAndHalves, 0u);
    std::set<std::string> names, bound, all_axes;
    bool any_tensor = false;
    for (const Argument& input : kernel.inputs) {
      EXPECT_TRUE(names.insert(input.name).second) << input.name;
      EXPECT_TRUE(input.role != Role::kNumber || words(input.axes).empty()) << input.name;
      any_tensor |= input.role == Role::kTensor && !input.optional;
      for (const std::string& axis : words(input.axes)) {
        all_axes.insert(axis);
        if (!input.optional) bound.insert(axis);
      }
    }
    EXPECT_TRUE(any_tensor) << "the dtype of a call is that of a tensor that is always there";
    EXPECT_LE(all_axes.size(), 16u);
    EXPECT_LE(kernel.inputs.size(), 16u) << "as many as an op of ONNX Runtime has room for";
    EXPECT_LE(kernel.outputs.size(), 16u);
    bool gradients = false;
    for (const Argument& output : kernel.outputs) {
      EXPECT_TRUE(names.insert(output.name).second) << output.name;
      for (const std::string& axis : words(output.axes)) EXPECT_EQ(bound.count(axis), 1u) << output.name << " " << axis;
      const bool gradient = std::strncmp(output.name, "grad_", 5) == 0;
      EXPECT_TRUE(gradient || !gradients) << "values first, gradients last";
      gradients |= gradient;
      if (!gradient) continue;
      const auto input = std::find_if(kernel.inputs.begin(), kernel.inputs.end(),
                                      [&](const Argument& a) { return std::string(a.name) == output.name + 5; });
      ASSERT_NE(input, kernel.inputs.end()) << output.name;
      EXPECT_STREQ(input->axes, output.axes);
      EXPECT_EQ(input->role, output.role);
    }
    for (const Attribute& attribute : kernel.attributes) {
      EXPECT_TRUE(names.insert(attribute.name).second) << attribute.name;
      EXPECT_TRUE(attribute.choices.empty() ||
                  (attribute.default_value >= 0 && attribute.default_value < attribute.choices.size()));
    }
  }
}

// ---- SIMD ----------------------------------------------------------------------------------------------------------

TEST(KernelSimd, ListsWhatThereIsAndUsesIt) {
  const std::vector<std::string> targets = words(pykd_kernel_simd());
  ASSERT_FALSE(targets.empty());
  for (const std::string& target : targets) {
    EXPECT_EQ(pykd_kernel_use_simd(target.c_str()), PYKD_OK) << target;
    EXPECT_EQ(words(pykd_kernel_simd()), targets) << "the list is of what there is, not of what is in use";
  }
  EXPECT_EQ(pykd_kernel_use_simd("ABACUS"), PYKD_INVALID_VALUE);
  tests::expect_words(pykd_last_error(), {targets[0].c_str(), "\"ABACUS\""});
  EXPECT_EQ(pykd_kernel_use_simd(nullptr), PYKD_OK);
}

}  // namespace
}  // namespace pykd::kernels
