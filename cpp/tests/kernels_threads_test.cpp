// pykd's own threads: every task once, from many callers at once, after fork(), and never more than asked for.
#include "kernels/host/threads.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <numeric>
#include <set>
#include <thread>
#include <vector>

#include "tests/child.h"

namespace pykd::kernels {
namespace {

int cores() { return static_cast<int>(std::max(1u, std::thread::hardware_concurrency())); }

std::int64_t sum_of_squares(const Parallel& parallel, std::int64_t count) {
  std::vector<std::int64_t> squares(static_cast<std::size_t>(count), 0);  // plain memory: the pool must order it
  parallel.for_each(count, [&](std::int64_t i) { squares[static_cast<std::size_t>(i)] += i * i; });
  return std::accumulate(squares.begin(), squares.end(), std::int64_t{0});
}

std::int64_t expected(std::int64_t n) { return (n - 1) * n * (2 * n - 1) / 6; }

TEST(Threads, RunEveryTaskOnce) {
  for (int threads : {0, 1, 2, 7}) {
    const Parallel parallel = own_threads(threads);
    for (std::int64_t count = 0; count < 40; ++count) EXPECT_EQ(sum_of_squares(parallel, count), expected(count));
    for (int round = 0; round < 500; ++round) ASSERT_EQ(sum_of_squares(parallel, 100), expected(100));
  }
}

TEST(Threads, SayHowManyTheyAre) {
  EXPECT_EQ(own_threads(3).threads, 3);
  EXPECT_EQ(own_threads(0).threads, cores());
}

// Each task waits for the others, so that all arrive only if as many threads work at once.
bool work_at_once() {
  std::atomic<int> arrived{0};
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  own_threads(0).for_each(cores(), [&](std::int64_t) {
    ++arrived;
    while (arrived < cores() && std::chrono::steady_clock::now() < end) std::this_thread::yield();
  });
  return std::chrono::steady_clock::now() < end;
}

TEST(Threads, WorkAtOnce) { EXPECT_TRUE(work_at_once()); }

// One of two tasks takes far longer than anybody's patience, on a thread that is not the caller's.
TEST(Threads, AreWaitedForToTheEnd) {
  if (cores() < 2) GTEST_SKIP() << "one core: there is nobody to wait for";
  const std::thread::id caller = std::this_thread::get_id();
  for (int round = 0; round < 5; ++round) {
    std::atomic<int> arrived{0};
    bool finished = false;  // plain memory, written by the helper alone
    own_threads(2).for_each(2, [&](std::int64_t) {
      ++arrived;
      const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
      while (arrived < 2 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
      if (std::this_thread::get_id() == caller) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      finished = true;
    });
    EXPECT_TRUE(finished);
  }
}

TEST(Threads, AreNeverMoreThanAskedFor) {
  for (int threads : {1, 2}) {
    struct Seen {
      std::mutex mutex;
      std::set<std::thread::id> threads;
    } seen;
    const Parallel parallel = own_threads(threads);
    // Not by for_each(), which asks nobody where one thread is enough.
    parallel.run(
        parallel.pool, 200,
        [](void* state, std::int64_t) {
          Seen& all = *static_cast<Seen*>(state);
          std::this_thread::sleep_for(std::chrono::microseconds(50));  // time enough for others to come
          const std::lock_guard<std::mutex> lock(all.mutex);
          all.threads.insert(std::this_thread::get_id());
        },
        &seen);
    EXPECT_LE(static_cast<int>(seen.threads.size()), threads);
  }
}

TEST(Threads, ServeManyCallersAtOnce) {
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  callers.reserve(8);
  for (int caller = 0; caller < 8; ++caller) {
    callers.emplace_back([&, caller] {
      const Parallel parallel = own_threads(caller % 4);
      for (int round = 0; round < 300; ++round) {
        const std::int64_t count = 1 + (caller * 37 + round) % 64;
        wrong += sum_of_squares(parallel, count) != expected(count);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
}

TEST(Threads, MayBeAskedFromWithinATask) {
  const Parallel parallel = own_threads(0);
  std::vector<std::int64_t> sums(16);
  parallel.for_each(16, [&](std::int64_t i) { sums[static_cast<std::size_t>(i)] = sum_of_squares(parallel, 20 + i); });
  for (std::int64_t i = 0; i < 16; ++i) EXPECT_EQ(sums[static_cast<std::size_t>(i)], expected(20 + i));
}

TEST(Threads, WakeAfterTheySlept) {
  const Parallel parallel = own_threads(0);
  for (int round = 0; round < 20; ++round) {
    EXPECT_EQ(sum_of_squares(parallel, 50), expected(50));
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // far beyond their patience
  }
}

void expect_new_threads_in_children(const Parallel& parallel) {
  for (int round = 0; round < 20; ++round) {
    ASSERT_EQ(tests::status_of_child([&] { return sum_of_squares(parallel, 100) == expected(100) && work_at_once(); }),
              0);
  }
}

TEST(Threads, AreMadeAnewInAChild) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "ThreadSanitizer follows no fork() of a process with threads";
#endif
  ASSERT_TRUE(work_at_once());  // so that every thread has begun, and none allocates any more
  expect_new_threads_in_children(own_threads(0));
}

TEST(Threads, AreMadeAnewInAChildOfAPoolAtWork) {
  PYKD_SKIP_WHERE_CHILDREN_HANG();
  const Parallel parallel = own_threads(0);
  std::atomic<bool> stop{false};
  std::thread other([&] {
    while (!stop) sum_of_squares(parallel, 64);
  });
  expect_new_threads_in_children(parallel);
  stop = true;
  other.join();
}

}  // namespace
}  // namespace pykd::kernels
