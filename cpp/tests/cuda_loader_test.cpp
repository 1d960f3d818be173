// Opening libpykd_cuda: where it is looked for, what is said where it cannot be had, and a call through it, with
// stand-ins for the library (fake_cuda.cpp).
//
// A library that has been opened stays for the life of the process. So every test that opens a whole one runs in a
// process of its own (a death test of its whole body), and the others come in any order.
#include "kernels/cuda/loader.h"

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "tests/support.h"

namespace pykd::kernels {
namespace {

using internal::Failure;

#define EXPECT_UNAVAILABLE(statement, ...) EXPECT_FAILS_WITH(Failure, PYKD_UNAVAILABLE, statement, __VA_ARGS__)

// Runs `body` in a child process, and fails where it does.
template <class Body>
void in_a_process_of_its_own(const Body& body) {
  const auto run = [&] {
    body();
    std::_Exit(testing::Test::HasFailure() ? 1 : 0);
  };
  EXPECT_EXIT(run(), testing::ExitedWithCode(0), "");
}

void use(const std::string& library) { setenv("PYKD_CUDA_LIBRARY", library.c_str(), 1); }

std::string temporary(const std::string& name) {
  return (std::filesystem::temp_directory_path() / ("pykd_cuda_loader_" + std::to_string(getpid()) + "_" + name))
      .string();
}

TEST(CudaLoader, SaysThatTheLibraryIsNotThere) {
  use("/nowhere/libpykd_cuda.so");
  EXPECT_UNAVAILABLE(find_cuda_kernel("soft_target"), "no file at /nowhere/libpykd_cuda.so", "PYKD_CUDA=ON",
                     "PYKD_CUDA_LIBRARY");
  tests::expect_words(cuda_status(), {"no file at /nowhere/libpykd_cuda.so"});
}

TEST(CudaLoader, LooksBesideItselfUnlessToldOtherwise) {
  unsetenv("PYKD_CUDA_LIBRARY");
  // The loader is linked into this program, which lies in no folder with a libpykd_cuda.
  const std::string folder = std::filesystem::read_symlink("/proc/self/exe").parent_path().filename();
  tests::expect_words(cuda_status(), {"no file at ", (folder + "/libpykd_cuda.so").c_str()});
}

TEST(CudaLoader, SaysThatTheLibraryCannotBeOpened) {
  const std::string path = temporary("damaged.so");
  std::ofstream(path) << "not a library";
  use(path);
  EXPECT_UNAVAILABLE(find_cuda_kernel("soft_target"), ("to open " + path).c_str(), "build libpykd_cuda");
  std::filesystem::remove(path);
}

TEST(CudaLoader, SaysThatItIsAnotherLibrary) {
  use(FAKE_CUDA_EMPTY);
  EXPECT_UNAVAILABLE(find_cuda_kernel("soft_target"), FAKE_CUDA_EMPTY,
                     "without the function pykd_cuda_interface_version");
}

TEST(CudaLoader, SaysThatHalfOfTheLibraryIsMissing) {
  use(FAKE_CUDA_HALF);
  EXPECT_UNAVAILABLE(find_cuda_kernel("soft_target"), "without the function pykd_cuda_interface;", "one build");
}

TEST(CudaLoader, NamesBothVersions) {
  use(FAKE_CUDA_OTHER_VERSION);
  const std::string ours = std::to_string(kCudaInterfaceVersion), other = std::to_string(kCudaInterfaceVersion + 41);
  EXPECT_UNAVAILABLE(find_cuda_kernel("soft_target"), ("interface version " + ours).c_str(),
                     ("got version " + other).c_str(), "one build");
}

TEST(CudaLoader, SaysWhatTheLibrarySays) {
  in_a_process_of_its_own([] {
    unsetenv("FAKE_CUDA_AWAKE");
    use(FAKE_CUDA_REFUSING);
    EXPECT_UNAVAILABLE(find_cuda_kernel("row_sums"), "a CUDA device", "the fake device is asleep", "run on the CPU");
    tests::expect_words(cuda_status(), {"the fake device is asleep"});
    // Refusals are not remembered.
    setenv("FAKE_CUDA_AWAKE", "1", 1);
    EXPECT_EQ(cuda_status(), "usable");
    EXPECT_STREQ(find_cuda_kernel("row_sums")->name, "row_sums");
  });
}

TEST(CudaLoader, ForgetsWhatCouldNotBeOpened) {
  in_a_process_of_its_own([] {
    use("/nowhere/libpykd_cuda.so");
    EXPECT_UNAVAILABLE(find_cuda_kernel("row_sums"), "no file");
    use(FAKE_CUDA_OTHER_VERSION);
    EXPECT_UNAVAILABLE(find_cuda_kernel("row_sums"), "interface version");
    use(FAKE_CUDA_GOOD);
    EXPECT_EQ(cuda_status(), "usable");
    use("/nowhere/libpykd_cuda.so");  // an opened one stays
    EXPECT_EQ(cuda_status(), "usable");
  });
}

TEST(CudaLoader, RunsAKernel) {
  in_a_process_of_its_own([] {
    use(FAKE_CUDA_GOOD);
    const CudaKernel* kernel = find_cuda_kernel("row_sums");
    ASSERT_NE(kernel, nullptr);

    std::vector<float> x = {1, 2, 3, 4, 5, 6};
    std::vector<float> sums(2);
    float number = 10;
    const std::int64_t shape[2] = {2, 3};
    const Array inputs[2] = {{x.data(), PYKD_FLOAT32, 2, shape}, {&number, PYKD_FLOAT32, 0, nullptr}};
    const Array outputs[1] = {{sums.data(), PYKD_FLOAT32, 1, shape}};
    Call call;
    call.inputs = inputs;
    call.outputs = outputs;
    int somewhere = 0;
    EXPECT_EQ(kernel->launch(call, 3, &somewhere), nullptr);
    EXPECT_EQ(sums, (std::vector<float>{60, 150}));

    struct Record {
      int device;
      void* stream;
    };
    void* library = dlopen(FAKE_CUDA_GOOD, RTLD_NOW | RTLD_NOLOAD);
    ASSERT_NE(library, nullptr);
    const auto record = reinterpret_cast<Record* (*)()>(dlsym(library, "fake_cuda_record"));
    EXPECT_EQ(record()->device, 3);
    EXPECT_EQ(record()->stream, &somewhere);

    call.dtype = PYKD_FLOAT16;
    EXPECT_STREQ(kernel->launch(call, 0, nullptr), "the fake kernel takes float32 alone");
  });
}

TEST(CudaLoader, NamesTheKernelsThatThereAre) {
  in_a_process_of_its_own([] {
    use(FAKE_CUDA_GOOD);
    EXPECT_UNAVAILABLE(find_cuda_kernel("mk_mmd"), "the kernel \"mk_mmd\"", "other, row_sums", "run it on the CPU");
    EXPECT_STREQ(find_cuda_kernel("other")->name, "other");
  });
}

TEST(CudaLoader, OpensOnceForAllThreads) {
  in_a_process_of_its_own([] {
    use(FAKE_CUDA_GOOD);
    std::vector<const CudaKernel*> found(16);
    std::vector<std::thread> threads;
    threads.reserve(found.size());
    for (const CudaKernel*& kernel : found) threads.emplace_back([&kernel] { kernel = find_cuda_kernel("row_sums"); });
    for (std::thread& thread : threads) thread.join();
    for (const CudaKernel* kernel : found) EXPECT_EQ(kernel, found[0]);
  });
}

#ifdef PYKD_CUDA_LIBRARY_PATH
// The library itself, on whatever machine this is: it opens without CUDA, and either works or says why it does not.
TEST(CudaLoader, OpensTheRealLibrary) {
  in_a_process_of_its_own([] {
    use(PYKD_CUDA_LIBRARY_PATH);
    const std::string status = cuda_status();
    if (status == "usable") {
      EXPECT_STREQ(find_cuda_kernel("soft_target")->name, "soft_target");
    } else {
      tests::expect_words(status, {"expected a CUDA device for kernels on CUDA, got "});
    }
  });
}

// Each .cu beside a kernel's description has registered the kernel of its folder, and nobody keeps a list.
TEST(CudaLoader, FindsEveryKernelInTheRealLibrary) {
  void* library = dlopen(PYKD_CUDA_LIBRARY_PATH, RTLD_NOW | RTLD_LOCAL);
  ASSERT_NE(library, nullptr) << dlerror();
  const auto interface = reinterpret_cast<decltype(&pykd_cuda_interface)>(dlsym(library, "pykd_cuda_interface"));
  ASSERT_NE(interface, nullptr);
  std::string names;
  for (std::size_t i = 0; i < interface()->count; ++i) {
    const std::string name = interface()->kernels[i].name;
    EXPECT_NE(find(name), nullptr) << name << " has no description";
    names += (i == 0 ? "" : " ") + name;
  }
  EXPECT_EQ(names, PYKD_CUDA_KERNELS);
}
#endif

}  // namespace
}  // namespace pykd::kernels
