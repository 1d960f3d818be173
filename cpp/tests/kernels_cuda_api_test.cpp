// The C interface on CUDA tensors, with a stand-in for libpykd_cuda (fake_cuda.cpp) whose device is the host.
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "kernels/kernel.h"
#include "pykd/kernels.h"
#include "tests/support.h"

namespace pykd::kernels {
namespace {

void never(const Call&) { ADD_FAILURE() << "the CPU version ran"; }

// As the stand-in knows it; and one that it has, but always fails; and one that it lacks.
bool add_row_sums(const char* name) {
  return add({name,
              {{"x", "rows columns", Role::kTensor}, {"factor", "", Role::kNumber}},
              {{"sums", "rows", Role::kFloat32}},
              {},
              kFloatAndHalves,
              nullptr,
              never});
}
const bool registered = add_row_sums("row_sums") && add_row_sums("other") && add_row_sums("row_means");

pykd_status run(const char* kernel, std::vector<float>& sums, pykd_dtype dtype = PYKD_FLOAT32, void* stream = nullptr) {
  float x[6] = {1, 2, 3, 4, 5, 6}, factor = 10;
  const std::int64_t shape[2] = {2, 3};
  const pykd_tensor in[] = {{"x", x, dtype, 2, shape, nullptr, PYKD_CUDA, 3},
                            {"factor", &factor, PYKD_FLOAT32, 0, nullptr, nullptr, PYKD_CPU, 0}};
  const pykd_tensor out[] = {{"sums", sums.data(), PYKD_FLOAT32, 1, shape, nullptr, PYKD_CUDA, 3}};
  pykd_kernel_host host = PYKD_KERNEL_HOST_INIT;
  host.cuda_stream = stream;
  return pykd_kernel_run(kernel, in, 2, nullptr, 0, out, 1, &host);
}

class KernelsCuda : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    ASSERT_TRUE(registered);
    setenv("PYKD_CUDA_LIBRARY", FAKE_CUDA_GOOD, 1);
    ASSERT_NE(dlopen(FAKE_LIBCUDA, RTLD_NOW), nullptr) << dlerror();  // before the driver is looked for
  }
};

TEST_F(KernelsCuda, RunOnTheDeviceAndStreamOfTheCall) {
  std::vector<float> sums(2);
  int stream = 0;
  ASSERT_EQ(run("row_sums", sums, PYKD_FLOAT32, &stream), PYKD_OK) << pykd_last_error();
  EXPECT_EQ(sums, (std::vector<float>{60, 150}));
  struct Record {
    int device;
    void* stream;
  };
  void* library = dlopen(FAKE_CUDA_GOOD, RTLD_NOW | RTLD_NOLOAD);
  ASSERT_NE(library, nullptr);
  const auto record = reinterpret_cast<Record* (*)()>(dlsym(library, "fake_cuda_record"));
  ASSERT_NE(record, nullptr);
  EXPECT_EQ(record()->device, 3);
  EXPECT_EQ(record()->stream, &stream);
}

TEST_F(KernelsCuda, LeaveTheThreadsDeviceAsItWas) {
  void* driver = dlopen(FAKE_LIBCUDA, RTLD_NOW);
  ASSERT_NE(driver, nullptr) << dlerror();
  const auto get = reinterpret_cast<int (*)(void**)>(dlsym(driver, "cuCtxGetCurrent"));
  const auto set = reinterpret_cast<int (*)(void*)>(dlsym(driver, "cuCtxSetCurrent"));
  for (const std::uintptr_t before : {std::uintptr_t{101}, std::uintptr_t{0}}) {
    set(reinterpret_cast<void*>(before));
    std::vector<float> sums(2);
    ASSERT_EQ(run("row_sums", sums), PYKD_OK) << pykd_last_error();
    void* after = nullptr;
    get(&after);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(after), before);
  }
}

TEST_F(KernelsCuda, SayWhatTheDeviceSays) {
  std::vector<float> sums = {-7, -7};
  EXPECT_EQ(run("row_sums", sums, PYKD_FLOAT16), PYKD_ENGINE_FAILURE);
  tests::expect_words(pykd_last_error(), {"row_sums failed on cuda:3", "the fake kernel takes float32 alone"});
  EXPECT_EQ(run("other", sums), PYKD_ENGINE_FAILURE);
  tests::expect_words(pykd_last_error(), {"other failed on cuda:3", "not this one"});
}

TEST_F(KernelsCuda, AreUnavailableWhereTheLibraryHasNone) {
  std::vector<float> sums = {-7, -7};
  EXPECT_EQ(run("row_means", sums), PYKD_UNAVAILABLE);
  tests::expect_words(pykd_last_error(), {"\"row_means\"", "other, row_sums"});
  EXPECT_EQ(sums, (std::vector<float>{-7, -7}));
}

}  // namespace
}  // namespace pykd::kernels
