// pykd_set_hooks(): a host's own allocator and log.
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "pykd/kernels.h"
#include "pykd/pykd.hpp"
#include "tests/support.h"
#include "tests/tiny_model.h"

namespace pykd::tests {
namespace {

// Counts what it hands out.
struct Host {
  std::mutex mutex;
  std::map<void*, std::size_t> in_use;
  std::size_t requests = 0;
  bool none_left = false;
  std::vector<std::pair<pykd_log_level, std::string>> lines;

  static void* allocate(void* state, std::size_t bytes, std::size_t alignment) {
    Host& host = *static_cast<Host*>(state);
    const std::lock_guard<std::mutex> lock(host.mutex);
    if (host.none_left) return nullptr;
    void* memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    host.in_use[memory] = bytes;
    ++host.requests;
    return memory;
  }
  static void deallocate(void* state, void* memory, std::size_t bytes) {
    Host& host = *static_cast<Host*>(state);
    const std::lock_guard<std::mutex> lock(host.mutex);
    EXPECT_EQ(host.in_use.at(memory), bytes);
    host.in_use.erase(memory);
    std::free(memory);
  }
  static void log(void* state, pykd_log_level level, const char* line) {
    Host& host = *static_cast<Host*>(state);
    const std::lock_guard<std::mutex> lock(host.mutex);
    host.lines.emplace_back(level, line);
  }
};

class Hooks : public testing::Test {
 protected:
  void SetUp() override {
    hooks.state = &host;
    hooks.allocate = Host::allocate;
    hooks.deallocate = Host::deallocate;
    hooks.log = Host::log;
  }
  void TearDown() override { EXPECT_EQ(pykd_set_hooks(nullptr), PYKD_OK); }

  Host host;
  pykd_hooks hooks = PYKD_HOOKS_INIT;
};

TEST_F(Hooks, AllocateResults) {
  void* ours = pykd_allocate(100);
  ASSERT_EQ(pykd_set_hooks(&hooks), PYKD_OK) << pykd_last_error();
  TemporaryFolder folder;
  write_tiny_folder(folder);
  const Loss loss = Loss::load(folder.path());
  const std::vector<float> x = {1, 2, 3, 3, 2, 1};
  {
    const Result result =
        loss.value_and_gradient({{"student_logits", view(x, {2, 3})}, {"teacher_logits", view(x, {2, 3})}});
    EXPECT_EQ(host.in_use.size(), 4u);  // loss, error, loss_per_sample, gradient
  }
  EXPECT_TRUE(host.in_use.empty());
  const std::size_t before = host.requests;
  void* large = pykd_allocate(std::size_t{1} << 20);
  EXPECT_EQ(host.requests, before + 1);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(large) % 256, 0u);
  pykd_deallocate(ours);  // which does not go to the host
  ASSERT_EQ(pykd_set_hooks(nullptr), PYKD_OK);
  EXPECT_EQ(host.in_use.size(), 1u);
  pykd_deallocate(large);  // which does
  EXPECT_TRUE(host.in_use.empty());
}

TEST_F(Hooks, AreToldWhatHappensAtALoad) {
  ASSERT_EQ(pykd_set_hooks(&hooks), PYKD_OK);
  TemporaryFolder folder;
  write_tiny_folder(folder);
  const Loss loss = Loss::load(folder.path());
  ASSERT_FALSE(host.lines.empty());
  EXPECT_EQ(host.lines.back().first, PYKD_LOG_INFO);
  expect_words(host.lines.back().second, {"onnxruntime", loss.engine_version().c_str(), "cpu", "kernels: none"});
}

TEST_F(Hooks, MayHaveNoMemoryLeft) {
  ASSERT_EQ(pykd_set_hooks(&hooks), PYKD_OK);
  host.none_left = true;
  EXPECT_EQ(pykd_allocate(100), nullptr);
  EXPECT_EQ(pykd_allocate(std::size_t{1} << 20), nullptr);
}

TEST_F(Hooks, AreWholeOrNone) {
  hooks.deallocate = nullptr;
  EXPECT_EQ(pykd_set_hooks(&hooks), PYKD_INVALID_VALUE);
  expect_words(pykd_last_error(), {"allocate and deallocate", "set both"});
  hooks = PYKD_HOOKS_INIT;
  hooks.struct_size = 3;
  EXPECT_EQ(pykd_set_hooks(&hooks), PYKD_INVALID_VALUE);
}

}  // namespace
}  // namespace pykd::tests
