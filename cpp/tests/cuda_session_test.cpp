// What pykd says to ONNX Runtime's CUDA provider, with stand-ins for it (fake_onnxruntime_cuda.cpp) and for the CUDA
// driver (fake_libcuda.c): the stream, what each run is given, and whose device is current afterwards. The numbers are
// the real ONNX Runtime's, on the CPU.
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "pykd/pykd.hpp"
#include "tests/support.h"
#include "tests/tiny_model.h"

namespace pykd::tests {
namespace {

template <class Function>
Function symbol(const char* library, const char* name) {
  const auto found = reinterpret_cast<Function>(dlsym(dlopen(library, RTLD_NOW), name));
  EXPECT_NE(found, nullptr) << name << " in " << library;
  return found;
}

std::string last_run() { return symbol<const char* (*)()>(FAKE_ONNXRUNTIME_CUDA, "fake_last_run")(); }
std::string provider() { return symbol<const char* (*)()>(FAKE_ONNXRUNTIME_CUDA, "fake_provider")(); }

std::uintptr_t current_context() {
  void* context = nullptr;
  symbol<int (*)(void**)>(FAKE_LIBCUDA, "cuCtxGetCurrent")(&context);
  return reinterpret_cast<std::uintptr_t>(context);
}
void make_current(std::uintptr_t context) {
  symbol<int (*)(void*)>(FAKE_LIBCUDA, "cuCtxSetCurrent")(reinterpret_cast<void*>(context));
}

class CudaSession : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    const char* real = std::getenv("PYKD_ONNXRUNTIME_LIBRARY");
    ASSERT_NE(real, nullptr) << "set PYKD_ONNXRUNTIME_LIBRARY";
    setenv("PYKD_TEST_REAL_ONNXRUNTIME", real, 0);
    setenv("PYKD_ONNXRUNTIME_LIBRARY", FAKE_ONNXRUNTIME_CUDA, 1);
    ASSERT_NE(dlopen(FAKE_LIBCUDA, RTLD_NOW), nullptr) << dlerror();
  }

  void SetUp() override {
    write_tiny_folder(folder);
    options.engine = "onnxruntime";
    options.device = "cuda:1";
    options.threads = 1;
  }

  Loss load() { return Loss::load(folder.path(), options); }

  // The value, with its parameters: the tensors of the device are the host's.
  double run(const Loss& loss, const Parameters& parameters = {}, pykd_device result_on = PYKD_CUDA) {
    const std::int64_t shape[2] = {2, 3};
    const pykd_tensor in[] = {{"student_logits", student.data(), PYKD_FLOAT32, 2, shape, nullptr, PYKD_CUDA, 1},
                              {"teacher_logits", teacher.data(), PYKD_FLOAT32, 2, shape, nullptr, PYKD_CUDA, 1}};
    float value = -1, gradient[6];
    const pykd_tensor out[] = {
        {"loss", &value, PYKD_FLOAT32, 0, nullptr, nullptr, result_on, result_on == PYKD_CUDA ? 1 : 0},
        {"grad_student_logits", gradient, PYKD_FLOAT32, 2, shape, nullptr, PYKD_CUDA, 1}};
    std::vector<pykd_parameter> given;
    for (const auto& entry : parameters) given.push_back({entry.first.c_str(), entry.second});
    EXPECT_EQ(pykd_run(loss.c(), in, 2, given.data(), given.size(), out, 2), PYKD_OK) << pykd_last_error();
    return static_cast<double>(value);
  }

  TemporaryFolder folder;
  LoadOptions options;
  std::vector<float> student = {1, 2, 3, 3, 2, 1}, teacher = {0, 2, 4, 4, 2, 0};
};

TEST_F(CudaSession, GivesTheProviderTheDeviceAndTheStream) {
  load();
  EXPECT_EQ(provider(), "device_id=1");
  options.cuda_stream = reinterpret_cast<void*>(std::uintptr_t{4096});
  load();
  EXPECT_EQ(provider(), "device_id=1, user_compute_stream=4096");
  options.cuda_stream = reinterpret_cast<void*>(std::uintptr_t{1});  // cudaStreamLegacy
  load();
  EXPECT_EQ(provider(), "device_id=1, user_compute_stream=1");
}

// A parameter that is given lies on the host, and is copied to the device in every run.
TEST_F(CudaSession, FeedsTheParametersThatDifferFromTheFileAlone) {
  const Loss loss = load();
  EXPECT_NEAR(run(loss), 1.0, 1e-6);
  EXPECT_EQ(last_run(), "student_logits, teacher_logits, waits");
  EXPECT_NEAR(run(loss, {{"weight", 1.5}, {"grad_scale", 1.0}}), 1.0, 1e-6);
  EXPECT_EQ(last_run(), "student_logits, teacher_logits, waits");
  EXPECT_NEAR(run(loss, {{"weight", 3.0}}), 2.0, 1e-6);
  EXPECT_EQ(last_run(), "student_logits, teacher_logits, weight, waits");
  EXPECT_NEAR(run(loss, {{"grad_scale", 8.0}}), 1.0, 1e-6);
  EXPECT_EQ(last_run(), "student_logits, teacher_logits, grad_scale, waits");
  // The next call has the file's again.
  EXPECT_NEAR(run(loss), 1.0, 1e-6);
  // What differs by less than the file's dtype can tell does not differ.
  EXPECT_NEAR(run(loss, {{"weight", 1.5 + 1e-9}}), 1.0, 1e-6);
  EXPECT_EQ(last_run(), "student_logits, teacher_logits, waits");
}

TEST_F(CudaSession, SaysWhereMemoryIsLacking) {
  const char* const words = "expected enough memory for this call, got too little";
  const Loss loss = load();
  {
    const Variable variable("PYKD_TEST_NO_MEMORY_TO_LOAD", "1");
    EXPECT_FAILS_WITH(Error, PYKD_UNAVAILABLE, load(), words);
  }
  {
    const Variable variable("PYKD_TEST_NO_MEMORY_TO_RUN", "1");
    const std::int64_t shape[2] = {2, 3};
    const pykd_tensor in[] = {{"student_logits", student.data(), PYKD_FLOAT32, 2, shape, nullptr, PYKD_CUDA, 1},
                              {"teacher_logits", teacher.data(), PYKD_FLOAT32, 2, shape, nullptr, PYKD_CUDA, 1}};
    float value = -1;
    const pykd_tensor out = {"loss", &value, PYKD_FLOAT32, 0, nullptr, nullptr, PYKD_CUDA, 1};
    EXPECT_EQ(pykd_run(loss.c(), in, 2, nullptr, 0, &out, 1), PYKD_UNAVAILABLE);
    expect_words(pykd_last_error(), {words});
  }
  EXPECT_NEAR(run(loss), 1.0, 1e-6);
}

TEST_F(CudaSession, WaitsWhereSomethingIsReadOnTheHostAlone) {
  options.cuda_stream = reinterpret_cast<void*>(std::uintptr_t{4096});
  const Loss loss = load();
  run(loss);
  EXPECT_EQ(last_run(), "student_logits, teacher_logits, does not wait");
  run(loss, {}, PYKD_CPU);
  EXPECT_EQ(last_run(), "student_logits, teacher_logits, waits");
}

TEST_F(CudaSession, LeavesTheThreadsDeviceAsItWas) {
  for (const std::uintptr_t before : {std::uintptr_t{100}, std::uintptr_t{0}}) {
    make_current(before);
    {
      const Loss loss = load();
      EXPECT_EQ(current_context(), before) << "after load()";
      run(loss);
      EXPECT_EQ(current_context(), before) << "after a run";
    }
    EXPECT_EQ(current_context(), before) << "after the end of the loss";
  }
}

}  // namespace
}  // namespace pykd::tests
