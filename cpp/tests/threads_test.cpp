// One Loss, many threads: each gets the numbers that it would get alone, bit for bit.
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <random>
#include <thread>

#include "pykd/kernels.h"
#include "pykd/pykd.hpp"
#include "tests/child.h"
#include "tests/support.h"
#include "tests/tiny_model.h"

namespace pykd::tests {
namespace {

constexpr int kThreads = 8, kCalls = 1000;

// Inputs of a size of their own for every thread, and room for the outputs.
struct Work {
  explicit Work(int index) : shape{1 + index * 5, 3 + index} {
    std::mt19937 random(static_cast<unsigned>(index));
    std::normal_distribution<float> normal;
    const std::size_t count = static_cast<std::size_t>(shape[0] * shape[1]);
    for (std::vector<float>* values : {&student, &teacher}) {
      for (std::size_t i = 0; i < count; ++i) values->push_back(normal(random));
    }
    gradient.resize(count);
    per_sample.resize(static_cast<std::size_t>(shape[0]));
    weight.value = 0.5 + index;
  }

  pykd_status run(const pykd_loss* loss) {
    const pykd_tensor in[] = {tensor("student_logits", student.data(), 2), tensor("teacher_logits", teacher.data(), 2)};
    const pykd_tensor out[] = {tensor("loss", &value, 0), tensor("loss_per_sample", per_sample.data(), 1),
                               tensor("grad_student_logits", gradient.data(), 2)};
    return pykd_run(loss, in, 2, &weight, 1, out, 3);
  }

  bool same_outputs(const Work& other) const {
    return value == other.value && gradient == other.gradient && per_sample == other.per_sample;
  }
  void clear() {
    value = -1;
    std::fill(gradient.begin(), gradient.end(), -1.0f);
    std::fill(per_sample.begin(), per_sample.end(), -1.0f);
  }

  pykd_tensor tensor(const char* name, float* data, int rank) const {
    return {name, data, PYKD_FLOAT32, rank, shape, nullptr, PYKD_CPU, 0};
  }

  std::int64_t shape[2];
  std::vector<float> student, teacher, gradient, per_sample;
  float value = -1;
  pykd_parameter weight = {"weight", 1.0};
};

TEST(Threads, ShareOneLoss) {
  TemporaryFolder folder;
  write_tiny_folder(folder);
  const Loss loss = Loss::load(folder.path());
  std::vector<Work> alone;
  for (int i = 0; i < kThreads; ++i) {
    alone.emplace_back(i);
    ASSERT_EQ(alone.back().run(loss.c()), PYKD_OK) << pykd_last_error();
  }
  std::atomic<int> different{0}, failed{0}, wrong_error{0};
  auto body = [&](int index) {
    Work work(index);
    const std::string name = "thread_" + std::to_string(index);
    for (int call = 0; call < kCalls; ++call) {
      work.clear();
      if (work.run(loss.c()) != PYKD_OK) ++failed;
      if (!work.same_outputs(alone[static_cast<std::size_t>(index)])) ++different;
      // A call that fails tells its own thread, and no other.
      std::int64_t shape[8];
      std::int32_t rank;
      pykd_dtype dtype;
      pykd_output_shape(loss.c(), nullptr, 0, name.c_str(), shape, &rank, &dtype);
      if (std::string(pykd_last_error()).find(name) == std::string::npos) ++wrong_error;
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failed, 0);
  EXPECT_EQ(different, 0);
  EXPECT_EQ(wrong_error, 0);
}

TEST(Threads, LoadAtTheSameTime) {
  TemporaryFolder folder;
  write_tiny_folder(folder);
  std::atomic<int> failed{0};
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      for (int round = 0; round < 5; ++round) {
        pykd_loss* loss = nullptr;
        if (pykd_load(folder.path().c_str(), nullptr, &loss) != PYKD_OK) ++failed;
        if (loss != nullptr && Work(i).run(loss) != PYKD_OK) ++failed;
        pykd_free(loss);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failed, 0);
}

// The last of all that runs at the end of a process, registered before the first library is initialised: then every
// static object of theirs has been destroyed, and threads that are at work meet what is left.
std::atomic<bool> lingers{false};
[[maybe_unused]] void linger() {
  if (lingers) std::this_thread::sleep_for(std::chrono::milliseconds(50));
}
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // these come first themselves
__attribute__((section(".preinit_array"), used)) void (*const register_linger)() = [] { std::atexit(linger); };
#endif

// A kernel on the library's own threads, which sleep afterwards.
pykd_status run_kernel() {
  constexpr std::int64_t kShape[2] = {64, 2048};
  static const std::vector<float> logits(static_cast<std::size_t>(kShape[0] * kShape[1]), 1.0f);
  float temperature = 2.0f, soft[kShape[0]];
  auto* const data = const_cast<float*>(logits.data());  // an input
  const pykd_tensor in[] = {{"student", data, PYKD_FLOAT32, 2, kShape, nullptr, PYKD_CPU, 0},
                            {"teacher", data, PYKD_FLOAT32, 2, kShape, nullptr, PYKD_CPU, 0},
                            {"temperature", &temperature, PYKD_FLOAT32, 0, nullptr, nullptr, PYKD_CPU, 0}};
  const pykd_tensor out = {"soft", soft, PYKD_FLOAT32, 1, kShape, nullptr, PYKD_CPU, 0};
  return pykd_kernel_run("soft_target", in, 3, nullptr, 0, &out, 1, nullptr);
}

// Threads that run a loss, and take and give back memory, for ever, and the end of the process once all of them do.
[[noreturn]] void end_while_threads_run(const pykd_loss* loss) {
  alarm(30);  // a process that hangs ends in another way
  if (run_kernel() != PYKD_OK) std::exit(1);
  std::atomic<int> at_work{0};
  for (int i = 0; i < kThreads; ++i) {
    std::thread([&at_work, loss, i] {
      Work work(i);
      for (int call = 0;; ++call) {
        work.run(loss);
        pykd_deallocate(pykd_allocate(std::size_t{1} << 20));
        if (call == 10) ++at_work;
      }
    }).detach();
  }
  while (at_work < kThreads) std::this_thread::yield();
  lingers = true;
  std::exit(0);
}

TEST(ThreadsDeathTest, MayBeAtWorkWhenTheProcessEnds) {
  PYKD_SKIP_WHERE_CHILDREN_HANG();
  TemporaryFolder folder;
  write_tiny_folder(folder);
  for (int round = 0; round < 10; ++round) {
    ASSERT_EXIT(end_while_threads_run(Loss::load(folder.path()).c()), testing::ExitedWithCode(0), "^$");
  }
}

}  // namespace
}  // namespace pykd::tests
