// Tests of the kernels on at::Tensor, in a process without Python: the torch ops, opened with
// dlopen() and called from TorchScript, and pykd/torch_kernels.hpp. Values and gradients are
// compared with the formula in float64 and torch's own autograd.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <torch/csrc/jit/frontend/resolver.h>
#include <torch/csrc/jit/frontend/sugared_value.h>
#include <torch/script.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "pykd/torch_kernels.hpp"
#include "tests/seeded_torch.h"
#include "tests/support.h"

namespace {
thread_local int large_requests = 0;
}  // namespace

// In the place of libpykd's, for the operators as well as for the header: counts, and hands on.
extern "C" void* pykd_allocate(std::size_t bytes) {
  static const auto real = reinterpret_cast<void* (*)(std::size_t)>(dlsym(RTLD_NEXT, "pykd_allocate"));
  if (bytes >= (1 << 20)) ++large_requests;
  return real(bytes);
}

namespace {

using pykd::tests::expect_words;
using torch::autograd::variable_list;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Student and teacher logits and a weight per row. weight · KL(teacher ‖ student) at temperature 2.
struct Case {
  Case(std::int64_t batch, std::int64_t classes, at::ScalarType dtype = at::kFloat)
      : student((3 * torch::randn({batch, classes})).to(dtype).requires_grad_(true)),
        teacher((3 * torch::randn({batch, classes})).to(dtype)),
        weight(torch::rand({batch})) {}

  at::Tensor student, teacher, weight;
  at::Tensor temperature = at::scalar_tensor(2.0);
};

at::Tensor formula(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& weight) {
  const at::Tensor log_p = at::log_softmax(teacher.to(at::kDouble) / 2, 1);
  const at::Tensor log_q = at::log_softmax(student.to(at::kDouble) / 2, 1);
  const at::Tensor p = log_p.exp();
  return (weight.to(at::kDouble) * at::where(p > 0, p * (log_p - log_q), 0.0).sum(1)).sum();
}

double largest(const at::Tensor& difference) { return difference.abs().max().item<double>(); }

// d(upstream · loss)/d(student) of the formula, in float64.
at::Tensor formula_gradient(const Case& data, double upstream = 1.0) {
  const at::Tensor student = data.student.detach().to(at::kDouble).requires_grad_(true);
  return torch::autograd::grad({formula(student, data.teacher, data.weight) * upstream}, {student})[0];
}

// How often `body` allocates a megabyte or more, from torch or from pykd.
int large_allocations(const std::function<void()>& body) {
  struct Watch : public at::MemoryReportingInfoBase {
    void reportMemoryUsage(void*, std::int64_t size, std::size_t, std::size_t, c10::Device) override {
      if (size >= (1 << 20)) ++count;
    }
    bool memoryProfilingEnabled() const override { return true; }
    int count = 0;
  };
  const auto watch = std::make_shared<Watch>();
  large_requests = 0;
  c10::ThreadLocalDebugInfo::_push(c10::DebugInfoKind::PROFILER_STATE, watch);
  body();
  c10::ThreadLocalDebugInfo::_pop(c10::DebugInfoKind::PROFILER_STATE);
  return watch->count + large_requests;
}

std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  } catch (const std::exception& error) {
    return error.what();
  }
  ADD_FAILURE() << "expected an exception, got none";
  return "";
}

const std::vector<std::pair<std::int64_t, std::int64_t>> kShapes = {{4, 10}, {1, 1},   {7, 3},
                                                                    {4, 10}, {33, 65}, {2, 3000}};

// ---- The two ways to the same loss --------------------------------------------------------------

void open_ops() {
  static void* const library = dlopen(PYKD_TORCH_OPS_LIBRARY, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
}

// LibTorch's own resolver knows the name torch and no torch.ops; saved files say ops.pykd, which
// the loader understands.
class PykdResolver final : public torch::jit::Resolver {
 public:
  std::shared_ptr<torch::jit::SugaredValue> resolveValue(const std::string& name, torch::jit::GraphFunction& function,
                                                         const torch::jit::SourceRange& location) override {
    if (name == "pykd") return std::make_shared<torch::jit::BuiltinModule>("pykd");
    return torch::jit::nativeResolver()->resolveValue(name, function, location);
  }
};

torch::jit::Module module_of(const std::string& code) {
  open_ops();
  torch::jit::Module module("distillation");
  module.define(code, std::make_shared<PykdResolver>());
  return module;
}

// From TorchScript, compiled from its source.
at::Tensor scripted(const Case& data) {
  static torch::jit::Module module = module_of(R"(
def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, weight: Tensor):
    return pykd.loss("soft_target", [student, teacher, temperature, weight],
                     "student teacher temperature soft_weight", "form=kl")
)");
  return module.forward({data.student, data.teacher, data.temperature, data.weight}).toTensor();
}

pykd::TorchTensors inputs_of(const Case& data) {
  return {{"student", data.student},
          {"teacher", data.teacher},
          {"temperature", data.temperature},
          {"soft_weight", data.weight}};
}

at::Tensor header_only(const Case& data) { return pykd::fused_loss("soft_target", inputs_of(data), {{"form", "kl"}}); }

struct Way {
  const char* name;
  at::Tensor (*loss)(const Case&);
};

class TorchOps : public testing::TestWithParam<Way> {
 protected:
  at::Tensor loss(const Case& data) const { return GetParam().loss(data); }
};
INSTANTIATE_TEST_SUITE_P(Ways, TorchOps, testing::Values(Way{"TorchScript", scripted}, Way{"Header", header_only}),
                         [](const auto& way) { return std::string(way.param.name); });

TEST_P(TorchOps, GradientsMatchTheFormulaInEveryCallWhateverTheShapes) {
  double upstream = 0.3;
  for (const auto& shape : kShapes) {
    const Case data(shape.first, shape.second);
    const at::Tensor value = loss(data);
    ASSERT_EQ(value.dim(), 0);
    ASSERT_EQ(value.scalar_type(), at::kFloat);
    const double truth = formula(data.student.detach(), data.teacher, data.weight).item<double>();
    EXPECT_NEAR(value.item<double>(), truth, 2e-6 * (1 + truth));
    (value * upstream).backward();
    EXPECT_LE(largest(data.student.grad() - formula_gradient(data, upstream)), 1e-6 * (1 + upstream));
    upstream += 1.7;
  }
}

TEST_P(TorchOps, UpstreamOneMatchesAsWell) {
  const Case data(5, 9);
  loss(data).backward();
  EXPECT_LE(largest(data.student.grad() - formula_gradient(data)), 1e-6);
}

TEST_P(TorchOps, GradientsFlowOnThroughTheStudent) {
  const at::Tensor layer = torch::randn({6, 3}).requires_grad_(true), features = torch::randn({5, 6});
  Case data(5, 3);
  data.student = features.mm(layer);
  loss(data).backward();
  EXPECT_LE(largest(layer.grad() - features.t().to(at::kDouble).mm(formula_gradient(data))), 1e-5);
}

TEST_P(TorchOps, HalfPrecisionKeepsItsDtype) {
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16}) {
    const Case data(16, 64, dtype);
    const at::Tensor value = loss(data);
    EXPECT_EQ(value.scalar_type(), at::kFloat);
    (value * 3.0).backward();
    EXPECT_EQ(data.student.grad().scalar_type(), dtype);
    const at::Tensor truth = formula_gradient(data, 3.0);
    const double step = dtype == at::kHalf ? 0x1p-10 : 0x1p-7;
    EXPECT_LE(largest(data.student.grad() - truth), 1.5 * step * largest(truth));
  }
}

// Without its factor the gradient is too small for float16, or too large.
TEST_P(TorchOps, AFloat16GradientMeetsTheFactorOfAScaledLossBeforeItIsRounded) {
  for (const double factor : {65536.0, -196608.0, 0x1p-40}) {
    Case data(16, 64, at::kHalf);
    data.weight *= 0x1p-10 / factor;
    (loss(data) * factor).backward();
    const at::Tensor truth = formula_gradient(data, factor);
    EXPECT_LE(largest(data.student.grad() - truth), 0x1p-10 * largest(truth)) << factor;
  }
}

TEST_P(TorchOps, AFloat16LossGoesBackwardAsOftenAsOneLikes) {
  const Case data(5, 9, at::kHalf);
  const at::Tensor value = loss(data);
  value.backward({}, /*retain_graph=*/true);
  value.backward();
  const at::Tensor truth = formula_gradient(data, 2.0);
  EXPECT_LE(largest(data.student.grad() - truth), 0x1p-9 * largest(truth));
  EXPECT_THROW(value.backward(), std::exception);
}

TEST_P(TorchOps, MaskedLogitsPoisonNeitherValueNorGradient) {
  const Case data(3, 4);
  {
    const at::NoGradGuard no_grad;
    data.student.select(1, 2).fill_(-kInfinity);
  }
  data.teacher.select(1, 2).fill_(-kInfinity);
  const at::Tensor value = loss(data);
  (value * 2.0).backward();
  const at::Tensor log_p = at::log_softmax(data.teacher.to(at::kDouble) / 2, 1);
  const at::Tensor log_q = at::log_softmax(data.student.detach().to(at::kDouble) / 2, 1);
  const at::Tensor p = log_p.exp();
  const at::Tensor rows = at::where(p > 0, p * (log_p - log_q), 0.0).sum(1);
  EXPECT_NEAR(value.item<double>(), (rows * data.weight).sum().item<double>(), 1e-5);
  const at::Tensor truth = 2.0 * data.weight.unsqueeze(1) * (log_q.exp() - p) / 2.0;
  EXPECT_LE(largest(data.student.grad() - truth), 1e-6);
}

TEST_P(TorchOps, RowsOfWeightZeroCountAsZeroWhateverTheyHold) {
  Case data(3, 4);
  {
    const at::NoGradGuard no_grad;
    data.student.select(0, 1).fill_(kNan);
  }
  data.weight.select(0, 1).fill_(0);
  const at::Tensor value = loss(data);
  value.backward();
  Case others = data;
  const at::Tensor kept = torch::tensor({0, 2});
  others.student = data.student.detach().index_select(0, kept);
  others.teacher = data.teacher.index_select(0, kept);
  others.weight = data.weight.index_select(0, kept);
  EXPECT_NEAR(value.item<double>(), formula(others.student, others.teacher, others.weight).item<double>(), 1e-5);
  EXPECT_EQ(largest(data.student.grad().select(0, 1)), 0.0);
  EXPECT_LE(largest(data.student.grad().index_select(0, kept) - formula_gradient(others)), 1e-6);
}

TEST_P(TorchOps, TheOthersAreConstants) {
  Case data(2, 3);
  data.teacher.requires_grad_(true);
  data.weight.requires_grad_(true);
  loss(data).backward();
  EXPECT_TRUE(data.student.grad().defined());
  EXPECT_FALSE(data.teacher.grad().defined());
  EXPECT_FALSE(data.weight.grad().defined());
  data.student = data.student.detach();
  EXPECT_FALSE(loss(data).requires_grad());
}

TEST_P(TorchOps, WithoutGradModeThereIsTheValueAlone) {
  const Case data(2, 3);
  const double truth = formula(data.student.detach(), data.teacher, data.weight).item<double>();
  {
    const at::NoGradGuard no_grad;
    const at::Tensor value = loss(data);
    EXPECT_FALSE(value.requires_grad());
    EXPECT_NEAR(value.item<double>(), truth, 1e-6);
  }
  const c10::InferenceMode inference;
  EXPECT_NEAR(loss(data).item<double>(), truth, 1e-6);
}

TEST_P(TorchOps, TheGradientIsComputedWhereItIsWanted) {
  Case data(256, 2048);  // a gradient of two megabytes
  loss(data);
  EXPECT_EQ(large_allocations([&] { loss(data); }), 1);
  {
    const at::NoGradGuard no_grad;
    EXPECT_EQ(large_allocations([&] { loss(data); }), 0);
  }
  data.student = data.student.detach();
  EXPECT_EQ(large_allocations([&] { loss(data); }), 0);
}

// ---- Backward more than once --------------------------------------------------------------------

TEST_P(TorchOps, BackwardTwiceAddsUp) {
  const Case data(3, 5);
  const at::Tensor value = loss(data);
  value.backward({}, /*retain_graph=*/true);
  value.backward();
  EXPECT_LE(largest(data.student.grad() - formula_gradient(data, 2.0)), 1e-6);
}

// What backward() gave out belongs to whoever got it: what they write there must not come back.
TEST_P(TorchOps, WritingToAGradientDoesNotReachTheNextBackward) {
  const Case data(3, 5);
  const at::Tensor value = loss(data);
  for (int pass = 0; pass < 3; ++pass) {
    const bool keep = pass < 2;
    const at::Tensor gradient = torch::autograd::grad({value}, {data.student}, {}, keep)[0];
    EXPECT_LE(largest(gradient - formula_gradient(data)), 1e-6) << "pass " << pass;
    gradient.fill_(100.0);
  }
  const Case other(3, 5);
  const at::Tensor hooked = loss(other);
  other.student.register_hook([](const at::Tensor& gradient) { gradient.mul_(-1); });
  hooked.backward({}, /*retain_graph=*/true);
  hooked.backward();
  EXPECT_LE(largest(other.student.grad() - formula_gradient(other, -2.0)), 1e-6);
}

TEST_P(TorchOps, AFreedGraphIsNotUsedAgain) {
  const Case data(3, 5);
  const at::Tensor value = loss(data);
  value.backward();
  expect_words(error_of([&] { value.backward(); }), {"second time"});
}

// Beside a term that can be differentiated twice, a loss that cannot would be left out without a
// word.
TEST_P(TorchOps, DifferentiatingTwiceIsAnErrorAndNotHalfAnAnswer) {
  const Case data(3, 2);
  const std::string text = error_of([&] {
    const at::Tensor value = loss(data) + data.student.pow(3).sum();
    const at::Tensor gradient = torch::autograd::grad({value}, {data.student}, {}, true, /*create_graph=*/true)[0];
    torch::autograd::grad({gradient.square().sum()}, {data.student});
  });
  if (std::string(GetParam().name) == "Header") {
    expect_words(text, {"first derivatives only"});
  } else {
    expect_words(text, {"derivative", "_cdist_backward", "not implemented"});
  }
}

TEST_P(TorchOps, ManyThreadsAtOnce) {
  loss(Case(1, 1));
  std::vector<std::thread> threads;
  std::vector<double> errors(4, 1.0);
  for (std::size_t i = 0; i < errors.size(); ++i) {
    threads.emplace_back([&, i] {
      double worst = 0.0;
      for (std::int64_t call = 1; call <= 20; ++call) {
        const Case data(call, 7 + static_cast<std::int64_t>(i));
        (loss(data) * 2.0).backward();
        worst = std::max(worst, largest(data.student.grad() - formula_gradient(data, 2.0)));
      }
      errors[i] = worst;
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const double error : errors) EXPECT_LE(error, 1e-5);
}

// ---- The ops alone ------------------------------------------------------------------------------

at::Tensor call_op(const char* name, const std::vector<at::Tensor>& inputs, const char* names, const char* outputs) {
  open_ops();
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  torch::jit::Stack stack;
  torch::jit::push(stack, "soft_target", inputs, names, "form=kl", outputs);
  op.callBoxed(stack);
  return stack[0].toTensorVector().at(0);
}

TEST(TorchOp, KernelReturnsRows) {
  const Case data(4, 6);
  const at::Tensor soft = call_op("pykd::kernel", {data.student.detach(), data.teacher, data.temperature},
                                  "student teacher temperature", "soft");
  ASSERT_EQ(soft.sizes(), at::IntArrayRef({4}));
  const at::Tensor truth = formula(data.student.detach(), data.teacher, data.weight);
  EXPECT_NEAR((soft * data.weight).sum().item<double>(), truth.item<double>(), 1e-6);
}

// Autograd would say that the result requires a gradient, and then leave it out.
TEST(TorchOp, AnInputThatRequiresAGradientIsAnError) {
  const Case data(4, 6);
  const std::vector<at::Tensor> inputs = {data.student, data.teacher, data.temperature};
  const char* names = "student teacher temperature";
  expect_words(error_of([&] { call_op("pykd::kernel", inputs, names, "soft"); }),
               {"pykd::kernel", "student", "detach"});
  const std::vector<at::Tensor> hidden = {data.student * 2, data.teacher, data.temperature};
  expect_words(error_of([&] { call_op("pykd::kernel", hidden, names, "soft"); }), {"student"});
  expect_words(error_of([&] { call_op("pykd::value_and_gradient", inputs, names, "student"); }),
               {"pykd::value_and_gradient", "student"});
  const at::NoGradGuard no_grad;
  EXPECT_FALSE(call_op("pykd::kernel", inputs, names, "soft").requires_grad());
}

TEST(TorchOp, MetaTensorsGetShapes) {
  const at::Tensor student = torch::empty({4, 6}, at::TensorOptions(at::kBFloat16).device(at::kMeta));
  const at::Tensor gradient = call_op("pykd::kernel", {student}, "student", "grad_student");
  EXPECT_TRUE(gradient.is_meta());
  EXPECT_EQ(gradient.scalar_type(), at::kBFloat16);
  EXPECT_EQ(gradient.sizes(), student.sizes());
  const at::Tensor soft = call_op("pykd::kernel", {student}, "student", "soft");
  EXPECT_EQ(soft.scalar_type(), at::kFloat);
  EXPECT_EQ(soft.sizes(), at::IntArrayRef({4}));
}

TEST(TorchOp, AModuleSavedAndLoadedStillTrains) {
  torch::jit::Module module = module_of(R"(
def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, weight: Tensor):
    loss = pykd.loss("soft_target", [student, teacher, temperature, weight],
                     "student teacher temperature soft_weight", "form=kl")
    return loss * 2.0
)");
  std::stringstream file;
  module.save(file);
  torch::jit::Module loaded = torch::jit::load(file);
  for (const auto& shape : kShapes) {
    const Case data(shape.first, shape.second);
    loaded.forward({data.student, data.teacher, data.temperature, data.weight}).toTensor().backward();
    EXPECT_LE(largest(data.student.grad() - formula_gradient(data, 2.0)), 2e-6);
  }
}

TEST(TorchOp, ErrorsAreTheLibrarysOwn) {
  const at::Tensor good = torch::randn({3, 4});
  const auto of = [](const std::vector<at::Tensor>& inputs, const char* names, const char* outputs) {
    return error_of([&] { call_op("pykd::kernel", inputs, names, outputs); });
  };
  expect_words(of({torch::randn({4, 3}).t(), good, torch::ones({})}, "student teacher temperature", "soft"),
               {"student", "contiguous"});
  expect_words(of({good}, "studnt", "soft"), {"studnt", "student"});
  expect_words(of({good}, "student", "sof"), {"\"sof\"", "soft"});
  expect_words(of({good}, "teacher", "soft"), {"student", "none"});
  expect_words(of({}, "", "soft"), {"student", "none"});
  expect_words(of({good}, "student teacher", "soft"), {"one name for each"});
  expect_words(of({good, good}, "student student", "soft"), {"student"});
  expect_words(of({good, good[0]}, "student teacher", "soft"), {"teacher", "batch, classes"});
  expect_words(of({good.slice(0, 0, 0)}, "student", "soft"), {"student", "at least 1", "batch"});
  expect_words(of({good.to(at::kInt)}, "student", "soft"), {"student", "Int"});
  expect_words(of({good.to_sparse()}, "student", "soft"), {"student", "sparse"});
  expect_words(of({at::Tensor()}, "student", "soft"), {"student", "undefined"});
}

// ---- The header alone ---------------------------------------------------------------------------

TEST(TorchKernels, HardAndSoftTogether) {
  const Case data(4, 6);
  const at::Tensor labels = torch::tensor({0, 5, 2, 2});
  const at::Tensor hard_weight = torch::rand({4});
  pykd::TorchTensors inputs = inputs_of(data);
  inputs["labels"] = labels;
  inputs["hard_weight"] = hard_weight;
  const at::Tensor value = pykd::fused_loss("soft_target", inputs, {{"form", "kl"}});
  (value * 0.5).backward();

  const at::Tensor student = data.student.detach().to(at::kDouble).requires_grad_(true);
  const at::Tensor hard = -at::log_softmax(student, 1).gather(1, labels.unsqueeze(1)).squeeze(1);
  const at::Tensor truth = formula(student, data.teacher, data.weight) + (hard * hard_weight).sum();
  EXPECT_NEAR(value.item<double>(), truth.item<double>(), 1e-5);
  EXPECT_LE(largest(data.student.grad() - torch::autograd::grad({truth * 0.5}, {student})[0]), 1e-6);
}

TEST(TorchKernels, SettingsAreNumbersOrWords) {
  const Case data(4, 6);
  const auto rows = [&](const pykd::KernelSettings& settings) {
    return pykd::fused_call("soft_target", inputs_of(data), settings, {"soft"}).at("soft");
  };
  const at::Tensor half = rows({{"form", std::string("jsd")}, {"beta", 0.5}}),
                   fifth = rows({{"form", "jsd"}, {"beta", 0.2}});
  const at::Tensor p = at::softmax(data.teacher.to(at::kDouble) / 2, 1),
                   q = at::softmax(data.student.detach().to(at::kDouble) / 2, 1);
  const at::Tensor mean = 0.2 * p + 0.8 * q;
  const at::Tensor truth = 0.2 * (p * (p / mean).log()).sum(1) + 0.8 * (q * (q / mean).log()).sum(1);
  EXPECT_LE(largest(fifth - truth), 1e-6);
  EXPECT_GT(largest(fifth - half), 1e-4);
}

TEST(TorchKernels, CallReturnsDetachedOutputs) {
  const Case data(4, 6);
  const auto results = pykd::fused_call("soft_target", inputs_of(data), {{"form", "kl"}}, {"grad_student", "soft"});
  ASSERT_EQ(results.size(), 2u);
  for (const auto& entry : results) EXPECT_FALSE(entry.second.requires_grad());
  EXPECT_LE(largest(results.at("grad_student") - formula_gradient(data)), 1e-6);
}

// The last backward() of a graph passes the kernel's own memory on, times the upstream gradient.
TEST(TorchKernels, NoCopyOfTheGradientIsMade) {
  const Case data(256, 2048);  // two megabytes
  for (const double upstream : {1.0, 3.0}) {
    data.student.mutable_grad() = at::Tensor();
    const at::Tensor value = header_only(data) * upstream;
    EXPECT_EQ(large_allocations([&] { value.backward(); }), 0) << upstream;
    EXPECT_LE(largest(data.student.grad() - formula_gradient(data, upstream)), 1e-6);
  }
}

TEST(TorchKernels, ErrorsHaveAStatus) {
  const Case data(3, 4);
  pykd::TorchTensors inputs = inputs_of(data);
  EXPECT_FAILS_WITH(pykd::Error, PYKD_INVALID_VALUE, pykd::fused_loss("soft_targe", inputs), "soft_target");
  EXPECT_FAILS_WITH(pykd::Error, PYKD_INVALID_VALUE, pykd::fused_loss("soft_target", inputs, {{"form", "kkl"}}), "kl");
  EXPECT_FAILS_WITH(pykd::Error, PYKD_INVALID_VALUE, pykd::fused_loss("soft_target", inputs, {{"form", 1}}), "form");
  EXPECT_FAILS_WITH(pykd::Error, PYKD_INVALID_VALUE, pykd::fused_loss("soft_target", inputs, {{"form", "1"}}), "form",
                    "\"1\"");
  EXPECT_FAILS_WITH(pykd::Error, PYKD_INVALID_VALUE, pykd::fused_loss("soft_target", inputs, {{"beta", "x"}}), "beta");
  inputs["student"] = torch::randn({4, 3}).t();
  EXPECT_FAILS_WITH(pykd::Error, PYKD_INVALID_VALUE, pykd::fused_loss("soft_target", inputs), ".contiguous()");
  inputs["student"] = torch::randn({0, 4});
  EXPECT_FAILS_WITH(pykd::Error, PYKD_INVALID_VALUE, pykd::fused_loss("soft_target", inputs), "at least 1");
  inputs["student"] = at::Tensor();
  EXPECT_FAILS_WITH(pykd::Error, PYKD_INVALID_VALUE, pykd::fused_loss("soft_target", inputs), "undefined");
  inputs.erase("soft_weight");
  EXPECT_FAILS_WITH(pykd::Error, PYKD_INVALID_VALUE, pykd::fused_loss("soft_target", inputs),
                    "soft_weight, hard_weight");
}

TEST(TorchKernels, EveryKernelIsDescribed) {
  ASSERT_EQ(pykd::kernels().size(), pykd_num_kernels());
  for (const pykd::KernelDescription& kernel : pykd::kernels()) {
    EXPECT_FALSE(kernel.name.empty());
    EXPECT_FALSE(kernel.inputs.empty()) << kernel.name;
    bool weighted = false, differentiable = false;
    for (const pykd::KernelArgument& output : kernel.outputs) {
      weighted = weighted || kernel.weight_of(output.name) != nullptr;
      EXPECT_TRUE(output.role == "tensor" || output.role == "float32") << output.name;
    }
    for (const pykd::KernelArgument& input : kernel.inputs) {
      differentiable = differentiable || kernel.gradient_of(input.name) != nullptr;
    }
    EXPECT_TRUE(weighted && differentiable) << kernel.name << " has no value with a weight, or no gradient";
  }
  const pykd::KernelDescription& soft = pykd::kernel("soft_target");
  EXPECT_EQ(soft.input("student")->axes, (std::vector<std::string>{"batch", "classes"}));
  EXPECT_EQ(soft.with_choice, std::vector<std::string>{"form"});
}

}  // namespace
