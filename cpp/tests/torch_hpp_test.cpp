// Tests of pykd/torch.hpp and, through it, of the TorchScript engine: values and gradients against
// formulas written out by hand, on one loaded loss, with shapes that change from call to call.
#include "pykd/torch.hpp"

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <torch/script.h>
#include <torch/torch.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "tests/seeded_torch.h"
#include "tests/support.h"
#include "tests/tiny_model.h"

namespace {

using pykd::tests::expect_words;

// loss = weight · mean over all elements of (student − teacher)², which is also what tiny_model()
// is.
constexpr char kCode[] = R"(
def forward(self, student_logits: Tensor, teacher_logits: Tensor, weight: float) -> Dict[str, Tensor]:
    s = student_logits
    t = teacher_logits.detach()
    if s.dtype != 7:
        s = s.to(6)
        t = t.to(6)
    per_sample = ((s - t) ** 2).mean(1)
    error = per_sample.mean()
    return {"loss": error * weight, "error": error, "loss_per_sample": weight * per_sample.detach()}
)";

std::string metadata() {
  pykd::tests::json result = pykd::tests::tiny_metadata(true);
  result["kind"] = "torchscript";
  for (auto& input : result["inputs"]) input["dtype"] = "float";
  for (auto& output : result["outputs"]) output["dtype"] = "float";
  return result.dump();
}

// The bytes of a TorchScript artefact, with the checksum of docs/artefacts.md as the archive's
// comment.
std::string artefact(const std::string& code) {
  torch::jit::Module module("squares");
  module.define(code);
  std::ostringstream stream;
  module.save(stream, {{"pykd.json", metadata()}});
  std::string bytes = stream.str();
  bytes[bytes.size() - 2] = 19;  // the length of the comment
  return bytes + "pykd.crc32=" + pykd::tests::crc_digits(bytes);
}

// tiny_model() for float16 tensors, as pykd.export writes it: widened first, the gradient rounded last.
std::string halves(bool gradient) {
  using pykd::tests::attribute, pykd::tests::kFloat, pykd::tests::node, pykd::tests::value_info;
  constexpr int kFloat16 = 10;
  const std::vector<std::string> axes = {"batch", "classes"};
  pykd::tests::TinyModel model = pykd::tests::tiny_model(gradient);
  for (auto& input : model.metadata["inputs"]) input["dtype"] = "float16";
  model.inputs[0] = value_info("student_logits", kFloat16, axes);
  model.inputs[1] = value_info("teacher_logits", kFloat16, axes);
  model.nodes[0] = node("Sub", {"student", "teacher"}, "d");
  model.nodes.insert(model.nodes.begin(), {node("Cast", {"student_logits"}, "student", {attribute("to", kFloat)}),
                                           node("Cast", {"teacher_logits"}, "teacher", {attribute("to", kFloat)})});
  if (gradient) {
    model.metadata["outputs"].back()["dtype"] = "float16";
    model.outputs.back() = value_info("grad_student_logits", kFloat16, axes);
    model.nodes.back() = node("Mul", {"d", "scaled"}, "wide");
    model.nodes.push_back(node("Cast", {"wide"}, "grad_student_logits", {attribute("to", kFloat16)}));
  }
  return pykd::tests::sealed(model.bytes());
}

// With ONNX files for halves where a dtype is float16; a TorchScript file takes every dtype.
pykd::TorchLoss load(const std::string& engine, const std::string& device = "cpu", at::ScalarType dtype = at::kFloat) {
  const pykd::tests::TemporaryFolder folder;
  pykd::tests::write_tiny_folder(folder);
  if (dtype == at::kHalf) {
    folder.write("loss.onnx", halves(false));
    folder.write("loss.grad.onnx", halves(true));
  }
  folder.write("loss.pt", artefact(kCode));
  folder.write_manifest();
  pykd::LoadOptions options;
  options.engine = engine;
  options.device = device;
  options.threads = 1;
  return pykd::TorchLoss::load(folder.path(), options);
}

// Tests of both engines, and of TorchScript alone.
class TorchHpp : public testing::TestWithParam<const char*> {
 protected:
  pykd::TorchLoss loss = load(GetParam());
};
INSTANTIATE_TEST_SUITE_P(Engines, TorchHpp, testing::Values("torchscript", "onnxruntime"),
                         [](const auto& engine) { return std::string(engine.param); });

class TorchScript : public testing::Test {
 protected:
  pykd::TorchLoss loss = load("torchscript");
};

at::Tensor expected_gradient(const at::Tensor& student, const at::Tensor& teacher, double factor) {
  return (student.detach().to(at::kDouble) - teacher.to(at::kDouble)) *
         (2.0 * factor / static_cast<double>(student.numel()));
}

double largest(const at::Tensor& difference) { return difference.abs().max().item<double>(); }

// The text and status of the Error that `body` throws.
template <class Body>
std::string error_of(Body&& body, pykd_status status) {
  try {
    body();
  } catch (const pykd::Error& error) {
    EXPECT_EQ(error.status(), status) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "expected a pykd::Error, got none";
  return "";
}

const std::vector<std::vector<std::int64_t>> kShapes = {{4, 10}, {1, 1}, {7, 3}, {4, 10}, {33, 5}, {2, 100}};

void expect_right_gradients(const pykd::TorchLoss& loss, at::ScalarType dtype) {
  double weight = 0.5;
  for (const auto& shape : kShapes) {
    const at::Tensor student = torch::randn(shape, dtype).requires_grad_(true);
    const at::Tensor teacher = torch::randn(shape, dtype);
    weight += 0.5;
    const at::Tensor value = loss({{"student_logits", student}, {"teacher_logits", teacher}}, {{"weight", weight}});
    ASSERT_EQ(value.dim(), 0);
    ASSERT_EQ(value.scalar_type(), dtype);
    ASSERT_TRUE(value.requires_grad());
    (value * 5.0).backward();  // an upstream gradient of 5

    const double tolerance = dtype == at::kDouble ? 1e-13 : 1e-6;
    const double truth = weight * (student.detach() - teacher).to(at::kDouble).square().mean().item<double>();
    EXPECT_NEAR(value.item<double>(), truth, tolerance * (1 + truth));
    const at::Tensor truth_gradient = expected_gradient(student, teacher, 5.0 * weight);
    EXPECT_LE(largest(student.grad() - truth_gradient), tolerance * (1 + largest(truth_gradient)));
  }
}

TEST_P(TorchHpp, SaysThatItWasMovedFrom) {
  const pykd::TorchLoss moved = std::move(loss);
  const at::Tensor x = torch::ones({2, 3});
  const pykd::TorchTensors tensors = {{"student_logits", x}, {"teacher_logits", x}};
  EXPECT_EQ(moved(tensors).item<double>(), 0.0);
  // NOLINTBEGIN(bugprone-use-after-move)
  expect_words(error_of([&] { loss(tensors); }, PYKD_INVALID_VALUE), {"moved from"});
  expect_words(error_of([&] { loss.terms(tensors); }, PYKD_INVALID_VALUE), {"moved from"});
  expect_words(error_of([&] { loss.value_and_gradient(tensors); }, PYKD_INVALID_VALUE), {"moved from"});
  expect_words(error_of([&] { loss.loss(); }, PYKD_INVALID_VALUE), {"moved from"});
  // NOLINTEND(bugprone-use-after-move)
}

TEST_P(TorchHpp, GradientsMatchTheFormulaInEveryCallWhateverTheShapes) { expect_right_gradients(loss, at::kFloat); }

TEST_F(TorchScript, GradientsMatchTheFormulaInFloat64) {
  expect_right_gradients(loss, at::kDouble);
  expect_right_gradients(loss, at::kFloat);
}

TEST_P(TorchHpp, GradientsFlowOnThroughTheStudent) {
  const at::Tensor weights = torch::randn({6, 3}).requires_grad_(true), inputs = torch::randn({5, 6});
  const at::Tensor teacher = torch::randn({5, 3});
  loss({{"student_logits", inputs.mm(weights)}, {"teacher_logits", teacher}}).backward();
  const at::Tensor truth = inputs.t().to(at::kDouble).mm(expected_gradient(inputs.mm(weights), teacher, 1.5));
  EXPECT_LE(largest(weights.grad() - truth), 1e-6 * (1 + largest(truth)));
}

TEST_P(TorchHpp, TheTeacherIsAConstant) {
  const at::Tensor student = torch::randn({2, 3}).requires_grad_(true);
  const at::Tensor teacher = torch::randn({2, 3}).requires_grad_(true);
  loss({{"student_logits", student}, {"teacher_logits", teacher}}).backward();
  EXPECT_TRUE(student.grad().defined());
  EXPECT_FALSE(teacher.grad().defined());
  EXPECT_FALSE(loss({{"student_logits", student.detach()}, {"teacher_logits", teacher}}).requires_grad());
}

TEST_P(TorchHpp, WithoutGradModeThereIsTheValueAlone) {
  const at::Tensor student = torch::randn({2, 3}).requires_grad_(true), teacher = torch::randn({2, 3});
  {
    const at::NoGradGuard no_grad;
    EXPECT_FALSE(loss({{"student_logits", student}, {"teacher_logits", teacher}}).requires_grad());
  }
  const c10::InferenceMode inference;
  const at::Tensor value = loss({{"student_logits", torch::zeros({2, 3})}, {"teacher_logits", torch::ones({2, 3})}});
  EXPECT_FLOAT_EQ(value.item<float>(), 1.5f);
  const auto result =
      loss.value_and_gradient({{"student_logits", torch::zeros({2, 3})}, {"teacher_logits", torch::ones({2, 3})}});
  EXPECT_LE(largest(result.at("grad_student_logits") + 0.5), 1e-7);
}

TEST_P(TorchHpp, TermsAreDetachedAndTheLossIsNot) {
  const at::Tensor student = torch::randn({4, 3}).requires_grad_(true), teacher = torch::randn({4, 3});
  const pykd::TorchTensors terms = loss.terms({{"student_logits", student}, {"teacher_logits", teacher}});
  ASSERT_EQ(terms.size(), 3u);
  EXPECT_TRUE(terms.at("loss").requires_grad());
  EXPECT_FALSE(terms.at("error").requires_grad());
  const at::Tensor per_sample = (student.detach() - teacher).square().mean(1);
  EXPECT_LE(largest(terms.at("loss_per_sample") - 1.5 * per_sample), 1e-6);
  terms.at("loss").backward();
  EXPECT_LE(largest(student.grad() - expected_gradient(student, teacher, 1.5)), 1e-6);
}

TEST_P(TorchHpp, ValueAndGradientIsDetached) {
  const at::Tensor student = torch::randn({4, 3}).requires_grad_(true), teacher = torch::randn({4, 3});
  const auto result =
      loss.value_and_gradient({{"student_logits", student}, {"teacher_logits", teacher}}, {{"grad_scale", 8.0}});
  for (const auto& entry : result) EXPECT_FALSE(entry.second.requires_grad()) << entry.first;
  EXPECT_LE(largest(result.at("grad_student_logits") - expected_gradient(student, teacher, 12.0)), 1e-5);
}

TEST_F(TorchScript, HalfPrecisionKeepsItsDtypeAndLossScalingWorks) {
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16}) {
    const at::Tensor student = (torch::randn({64, 64}) * 1e-3).to(dtype).requires_grad_(true);
    const at::Tensor teacher = torch::zeros({64, 64}, dtype);
    const at::Tensor value =
        loss({{"student_logits", student}, {"teacher_logits", teacher}}, {{"grad_scale", 65536.0}});
    EXPECT_EQ(value.scalar_type(), at::kFloat);
    value.backward();
    EXPECT_EQ(student.grad().scalar_type(), dtype);
    const at::Tensor truth = expected_gradient(student, teacher, 1.5 * 65536.0);
    EXPECT_LE(largest(student.grad() - truth),
              0.005 * largest(truth));  // underflows without scaling
  }
}

// Without its factor the gradient is too small for float16, or too large.
TEST_P(TorchHpp, AFloat16GradientMeetsTheFactorOfAScaledLossBeforeItIsRounded) {
  loss = load(GetParam(), "cpu", at::kHalf);
  const at::Tensor data = torch::randn({64, 64}).to(at::kHalf), teacher = torch::zeros({64, 64}, at::kHalf);
  for (const double factor : {65536.0, 196608.0, 0x1p-30}) {
    const at::Tensor student = data.clone().requires_grad_(true);
    const double weight = 64.0 / factor;
    const at::Tensor value = loss({{"student_logits", student}, {"teacher_logits", teacher}}, {{"weight", weight}});
    EXPECT_NEAR(value.item<double>(), weight * data.to(at::kDouble).square().mean().item<double>(),
                1e-3 * std::abs(weight));
    (value * factor).backward({}, /*retain_graph=*/true);
    const at::Tensor truth = expected_gradient(student, teacher, 64.0);
    EXPECT_LE(largest(student.grad() - truth), 0x1p-10 * largest(truth)) << factor;
    (value * factor).backward();  // once more
    EXPECT_LE(largest(student.grad() - 2 * truth), 0x1p-9 * largest(truth)) << factor;
  }
  const at::Tensor student = data.clone().requires_grad_(true);
  const at::Tensor value = loss({{"student_logits", student}, {"teacher_logits", teacher}});
  (value * std::numeric_limits<float>::infinity()).backward();
  EXPECT_FALSE(student.grad().isfinite().any().item<bool>());
}

// The same through a kernel, which rounds the gradient itself: against the formula on the same numbers as float32.
TEST(TorchHppVectors, AFloat16GradientOfAKernelMeetsTheFactorToo) {
  const char* root = std::getenv("PYKD_TEST_VECTORS");
  ASSERT_NE(root, nullptr) << "PYKD_TEST_VECTORS names no folder";
  const auto of = [&](const char* dtype, const char* kernels) {
    pykd::LoadOptions options;
    options.engine = "onnxruntime";
    options.kernels = kernels;
    return pykd::TorchLoss::load(std::string(root) + "/soft_target[temperature=2.0]-" + dtype, options);
  };
  const pykd::TorchLoss wide = of("float32", "off");
  const at::Tensor teacher = torch::randn({256, 4096}).to(at::kHalf);
  const at::Tensor data = (teacher + 0.1 * torch::randn({256, 4096})).to(at::kHalf);
  const auto gradient = [&](const pykd::TorchLoss& one, at::ScalarType dtype, double factor) {
    const at::Tensor student = data.to(dtype).clone().requires_grad_(true);
    (one({{"student_logits", student}, {"teacher_logits", teacher.to(dtype)}}) * factor).backward();
    return student.grad();
  };
  const at::Tensor truth = gradient(wide, at::kFloat, 65536.0);
  ASSERT_LT(largest(truth) / 65536, 0x1p-14) << "float16 could hold the gradient without its factor";
  for (const char* kernels : {"on", "off"}) {
    const at::Tensor got = gradient(of("float16", kernels), at::kHalf, 65536.0);
    EXPECT_EQ(got.scalar_type(), at::kHalf);
    EXPECT_LE(largest(got - truth), 0x1p-10 * largest(truth)) << kernels;
  }
}

TEST_P(TorchHpp, BackwardTwiceAddsUp) {
  const at::Tensor student = torch::randn({3, 2}).requires_grad_(true), teacher = torch::randn({3, 2});
  const at::Tensor value = loss({{"student_logits", student}, {"teacher_logits", teacher}});
  value.backward({}, /*retain_graph=*/true);
  value.backward({}, /*retain_graph=*/true);
  loss({{"student_logits", student}, {"teacher_logits", teacher}}).backward();
  EXPECT_LE(largest(student.grad() - expected_gradient(student, teacher, 4.5)), 1e-6);
}

TEST_P(TorchHpp, DoubleBackwardIsAClearError) {
  const at::Tensor student = torch::randn({3, 2}).requires_grad_(true);
  const at::Tensor value = loss({{"student_logits", student}, {"teacher_logits", torch::randn({3, 2})}});
  try {
    torch::autograd::grad(torch::autograd::variable_list{value}, {student}, {}, true,
                          /*create_graph=*/true);
    FAIL() << "expected an exception";
  } catch (const std::exception& error) {
    EXPECT_NE(std::string(error.what()).find("first derivatives only"), std::string::npos) << error.what();
  }
}

TEST_P(TorchHpp, ErrorsSayWhatToDo) {
  const at::Tensor good = torch::randn({3, 4});
  const auto call = [&](const at::Tensor& student) {
    return [&, student] { loss({{"student_logits", student}, {"teacher_logits", good}}); };
  };
  expect_words(error_of(call(torch::randn({4, 3}).t()), PYKD_INVALID_VALUE), {".contiguous()"});
  expect_words(error_of(call(at::Tensor()), PYKD_INVALID_VALUE), {"undefined"});
  expect_words(error_of(call(good.to(at::kInt)), PYKD_INVALID_TYPE), {"Int"});
  expect_words(error_of(call(good.to_sparse()), PYKD_INVALID_TYPE), {"sparse"});
  expect_words(error_of(call(good.to("meta")), PYKD_INVALID_TYPE), {"meta"});
  expect_words(error_of(call(good.to(at::kDouble)), PYKD_INVALID_TYPE), {"float64"});
  expect_words(error_of(call(torch::randn({2, 4})), PYKD_INVALID_VALUE), {"batch"});
  expect_words(error_of([&] { loss({{"student_logits", good}}); }, PYKD_INVALID_VALUE), {"teacher_logits"});
  if (!torch::cuda::is_available()) {
    expect_words(error_of([] { load("torchscript", "cuda"); }, PYKD_UNAVAILABLE), {"cuda:0", "CUDA", "cpu"});
  }
}

TEST_F(TorchScript, ALossThatIgnoresItsInputIsAnErrorAndNotZeros) {
  std::string code = kCode;
  code.replace(code.find("s = student_logits"), 18, "s = student_logits.detach()");
  const std::string bytes = artefact(code);
  const pykd::Loss broken = pykd::Loss::load_bytes(bytes.data(), bytes.size());
  const std::vector<float> zeros(6);
  const pykd::Tensors tensors = {{"student_logits", pykd::view(zeros, {2, 3})},
                                 {"teacher_logits", pykd::view(zeros, {2, 3})}};
  EXPECT_EQ(broken.value(tensors).value("loss"), 0.0);
  expect_words(error_of([&] { broken.value_and_gradient(tensors); }, PYKD_INTERNAL), {"student_logits"});
}

TEST_P(TorchHpp, DependsOnNoLocale) {
  const pykd::tests::CommaLocale comma;
  expect_right_gradients(load(GetParam()), at::kFloat);
  const at::Tensor tall = torch::ones({1234, 3}), wide = torch::ones({3, 1234});
  const auto call = [&] { loss({{"student_logits", tall}, {"teacher_logits", wide}}); };
  expect_words(error_of(call, PYKD_INVALID_VALUE), {"1234"});
  const auto strided = [&] { loss({{"student_logits", wide.t()}, {"teacher_logits", tall}}); };
  expect_words(error_of(strided, PYKD_INVALID_VALUE), {"1234"});
}

// The address space that a process may use, for the length of a scope.
class MemoryLimit {
 public:
  explicit MemoryLimit(std::size_t more) {
    EXPECT_EQ(getrlimit(RLIMIT_AS, &before_), 0);
    std::size_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    rlimit limit = before_;
    limit.rlim_cur = pages * static_cast<std::size_t>(sysconf(_SC_PAGESIZE)) + more;
    EXPECT_EQ(setrlimit(RLIMIT_AS, &limit), 0);
  }
  MemoryLimit(const MemoryLimit&) = delete;
  MemoryLimit& operator=(const MemoryLimit&) = delete;
  ~MemoryLimit() { setrlimit(RLIMIT_AS, &before_); }

 private:
  rlimit before_;
};

TEST_P(TorchHpp, SaysThatThereIsTooLittleMemoryAndNothingElse) {
  const at::Tensor large = torch::zeros({1 << 13, 1 << 13});  // 256 MiB
  loss({{"student_logits", at::ones({2, 3})}, {"teacher_logits", at::ones({2, 3})}});
  std::string text;
  {
    const MemoryLimit limit(std::size_t{64} << 20);
    text = error_of([&] { loss({{"student_logits", large}, {"teacher_logits", large}}); }, PYKD_UNAVAILABLE);
  }
  EXPECT_EQ(text, "expected enough memory for this call, got too little; free some or use smaller tensors");
  EXPECT_EQ(loss({{"student_logits", at::ones({2, 3})}, {"teacher_logits", at::ones({2, 3})}}).item<double>(), 0.0);
}

TEST_P(TorchHpp, ManyThreadsShareOneLoss) {
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  threads.reserve(6);
  for (int thread = 0; thread < 6; ++thread) {
    threads.emplace_back([&, thread] {
      for (int call = 0; call < 50; ++call) {
        const at::Tensor student = torch::randn({1 + (thread + call) % 5, 1 + call % 7}).requires_grad_(true);
        const at::Tensor teacher = torch::randn_like(student);
        loss({{"student_logits", student}, {"teacher_logits", teacher}}, {{"weight", 1.0 + thread}}).backward();
        const at::Tensor truth = expected_gradient(student, teacher, 1.0 + thread);
        if (largest(student.grad() - truth) > 1e-5) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

// ---- Streams, with a stand-in for libtorch_cuda -----------------------------------------------------

template <class Function>
Function fake(const char* name) {
  return reinterpret_cast<Function>(dlsym(dlopen(FAKE_LIBTORCH_CUDA, RTLD_NOW), name));
}

void* stream_number(std::uintptr_t number) { return reinterpret_cast<void*>(number); }

// What happens when work is put on the stream `given` of cuda:1 while torch's current stream is another.
std::string calls_of(std::uintptr_t given, std::uintptr_t current, int current_device = 0) {
  fake<void (*)(void*, int, int)>("fake_reset")(stream_number(current), current_device, 0);
  pykd::internal::on_stream(1, stream_number(given), [] { fake<void (*)(const char*)>("fake_note")("work"); });
  EXPECT_EQ(fake<int (*)()>("fake_leaked_events")(), 0);
  EXPECT_EQ(fake<int (*)()>("fake_current_device")(), current_device);
  return fake<const char* (*)()>("fake_calls")();
}

TEST(TorchHppStreams, PutTheLossInOrderWithTorch) {
  if (torch::cuda::is_available()) GTEST_SKIP() << "the real libtorch_cuda is there";
  EXPECT_EQ(calls_of(64, 32),
            "record 32 on cuda:1, wait 64, work, "
            "record 64 on cuda:1, wait 32");
  EXPECT_EQ(calls_of(64, 32, 1), calls_of(64, 32, 0));
  EXPECT_EQ(calls_of(32, 32), "work");
  // CUDA's default stream has two names.
  EXPECT_EQ(calls_of(1, 0), "work");
  EXPECT_EQ(calls_of(1, 32), "record 32 on cuda:1, wait 1, work, record 1 on cuda:1, wait 32");
  EXPECT_EQ(calls_of(32, 0), "record 0 on cuda:1, wait 32, work, record 32 on cuda:1, wait 0");
}

TEST(TorchHppStreams, HaveNoNameThatSaysThatThereIsNone) {
  if (torch::cuda::is_available()) GTEST_SKIP() << "the real libtorch_cuda is there";
  fake<void (*)(void*, int, int)>("fake_reset")(nullptr, 0, 0);
  EXPECT_EQ(pykd::torch_stream(), stream_number(1));
  fake<void (*)(void*, int, int)>("fake_reset")(stream_number(32), 0, 0);
  EXPECT_EQ(pykd::torch_stream(), stream_number(32));
}

TEST(TorchHppStreams, SayWhatCudaSays) {
  if (torch::cuda::is_available()) GTEST_SKIP() << "the real libtorch_cuda is there";
  fake<void (*)(void*, int, int)>("fake_reset")(stream_number(32), 0, 1);
  expect_words(
      error_of([] { pykd::internal::put_in_order(1, stream_number(32), stream_number(64)); }, PYKD_ENGINE_FAILURE),
      {"error 700", "cuda:1"});
  EXPECT_EQ(fake<int (*)()>("fake_leaked_events")(), 0);
  EXPECT_EQ(fake<int (*)()>("fake_current_device")(), 0);
}

TEST_F(TorchScript, Cuda) {
  if (!torch::cuda::is_available()) GTEST_SKIP() << "no CUDA device";
  const pykd::TorchLoss on_gpu = load("torchscript", "cuda");
  for (const auto& shape : kShapes) {
    const at::Tensor student = torch::randn(shape, at::kCUDA).requires_grad_(true);
    const at::Tensor teacher = torch::randn(shape, at::kCUDA);
    const at::Tensor value = on_gpu({{"student_logits", student}, {"teacher_logits", teacher}});
    EXPECT_TRUE(value.is_cuda());
    (value * 2.0).backward();
    EXPECT_LE(largest(student.grad() - expected_gradient(student, teacher, 3.0)), 1e-5);
  }
}

}  // namespace
