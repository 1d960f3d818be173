// Memory for results: what is kept, for whom, and for how long.
#include "kernels/host/memory.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "tests/child.h"

namespace pykd::kernels {
namespace {

constexpr std::size_t kLarge = std::size_t{1} << 20;

TEST(KeptMemory, IsAlignedAndWritable) {
  KeptMemory memory;
  for (const std::size_t bytes :
       {std::size_t{0}, std::size_t{1}, std::size_t{63}, kLarge - 1, kLarge, 3 * kLarge + 7}) {
    void* block = memory.allocate(bytes);
    ASSERT_NE(block, nullptr);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(block) % KeptMemory::kAlignment, 0u);
    std::memset(block, 0x5A, bytes);
    memory.deallocate(block);
  }
  memory.deallocate(nullptr);
  EXPECT_EQ(memory.allocate(SIZE_MAX - 8), nullptr);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // whose allocators end the process instead
  EXPECT_EQ(memory.allocate(SIZE_MAX / 2), nullptr);
#endif
}

TEST(KeptMemory, GivesAgainWhatCameBack) {
  KeptMemory memory;
  void* first = memory.allocate(kLarge);
  void* second = memory.allocate(kLarge);
  EXPECT_NE(first, second);
  memory.deallocate(first);
  memory.deallocate(second);
  EXPECT_EQ(memory.bytes_kept(), 2 * kLarge);
  EXPECT_EQ(memory.allocate(kLarge), second);  // the one that was in use last
  EXPECT_EQ(memory.allocate(kLarge - 100), first);
  EXPECT_EQ(memory.bytes_kept(), 0u);
  memory.deallocate(first);
  memory.deallocate(second);
}

TEST(KeptMemory, GivesTheSmallestThatFitsAndNoneOfMoreThanTwice) {
  KeptMemory memory;
  void* small = memory.allocate(kLarge);
  void* large = memory.allocate(3 * kLarge / 2);
  memory.deallocate(small);
  memory.deallocate(large);
  EXPECT_EQ(memory.allocate(kLarge), small);
  EXPECT_EQ(memory.allocate(kLarge), large);
  memory.deallocate(large);
  void* tiny = memory.allocate(kLarge / 2);
  EXPECT_NE(tiny, large);
  memory.deallocate(tiny);
  memory.deallocate(small);
}

TEST(KeptMemory, HoldsNoMoreThanTwiceWhatWasInUse) {
  KeptMemory memory;
  for (std::size_t i = 1; i <= 8; ++i) {  // growing batches: no block fits the next one
    memory.deallocate(memory.allocate(i * kLarge));
    EXPECT_LE(memory.bytes_kept(), 2 * i * kLarge);
  }
  EXPECT_EQ(memory.bytes_kept(), (7 + 8) * kLarge);
}

TEST(KeptMemory, KeepsNoSmallBlocksAndNoMoreThanItsLimit) {
  KeptMemory memory;
  memory.deallocate(memory.allocate(KeptMemory::kSmallest - KeptMemory::kAlignment));
  EXPECT_EQ(memory.bytes_kept(), 0u);
  const std::size_t half = KeptMemory::kMostKept / 2 + kLarge;  // never touched, so that it takes no memory
  void* first = memory.allocate(half);
  void* second = memory.allocate(half);
  memory.deallocate(first);
  memory.deallocate(second);
  EXPECT_EQ(memory.bytes_kept(), half);
  memory.trim();
  EXPECT_EQ(memory.bytes_kept(), 0u);
}

TEST(KeptMemory, LetsGoWhatNobodyAsksFor) {
  KeptMemory memory;
  void* large = memory.allocate(8 * kLarge);
  memory.deallocate(large);
  for (std::uint64_t i = 0; i < KeptMemory::kKeptFor; ++i) memory.deallocate(memory.allocate(kLarge));
  EXPECT_EQ(memory.bytes_kept(), 9 * kLarge);
  memory.deallocate(memory.allocate(kLarge));
  EXPECT_EQ(memory.bytes_kept(), kLarge);
}

TEST(KeptMemory, ServesManyThreads) {
  KeptMemory memory;
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  threads.reserve(8);
  for (int number = 0; number < 8; ++number) {
    threads.emplace_back([&, number] {
      for (int round = 0; round < 300; ++round) {
        const std::size_t bytes = KeptMemory::kSmallest + static_cast<std::size_t>(round % 5) * 4096;
        auto* block = static_cast<unsigned char*>(memory.allocate(bytes));
        block[0] = block[bytes - 1] = static_cast<unsigned char>(number);
        std::this_thread::yield();
        wrong += block[0] != number || block[bytes - 1] != number;
        memory.deallocate(block);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(KeptMemory, WorksInAChildOfFork) {
  PYKD_SKIP_WHERE_CHILDREN_HANG();
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) KeptMemory::instance().deallocate(KeptMemory::instance().allocate(kLarge));
  });
  for (int round = 0; round < 50; ++round) {
    EXPECT_EQ(tests::status_of_child([] {
                void* block = KeptMemory::instance().allocate(kLarge);
                KeptMemory::instance().deallocate(block);
                return block != nullptr;
              }),
              0);
    if (HasFailure()) break;
  }
  stop = true;
  busy.join();
}

#if defined(__SANITIZE_ADDRESS__)
TEST(KeptMemoryDeathTest, IsOutOfBoundsWhileNobodyHasIt) {
  KeptMemory memory;
  auto* block = static_cast<unsigned char*>(memory.allocate(kLarge));
  memory.deallocate(block);
  EXPECT_DEATH(block[5] = 1, "use-after-poison");
}
#endif

}  // namespace
}  // namespace pykd::kernels
