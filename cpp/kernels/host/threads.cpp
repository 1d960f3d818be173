#include "kernels/host/threads.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace pykd::kernels {
namespace {

using Clock = std::chrono::steady_clock;

// How long a thread looks for work, or for the end of it, before it sleeps. Waking a thread costs a few microseconds;
// looking longer than a few times that would take cores from the training loop around us.
constexpr auto kPatience = std::chrono::microseconds(20);

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits a little for `done()`; false where it did not come.
template <class Done>
bool watch(const Done& done) {
  const Clock::time_point end = Clock::now() + kPatience;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      relax();
    }
  } while (Clock::now() < end);
  return done();
}

int cores() {
  static const int count = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return count;
}

class Pool {
 public:
  // Runs the tasks with up to `threads` threads, or alone where the pool is busy.
  void run(int threads, std::int64_t count, void (*task)(void*, std::int64_t), void* state) {
    const auto helpers = static_cast<std::uint64_t>(std::min<std::int64_t>(std::min(threads, cores()), count) - 1);
    if (helpers == 0 || busy_.exchange(true, std::memory_order_acquire)) {
      for (std::int64_t i = 0; i < count; ++i) task(state, i);
      return;
    }
    start();
    task_ = task;
    state_ = state;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    gate_.store(helpers * kSeat, std::memory_order_release);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (sleepers_ > 0) wake_.notify_all();
    }
    work();
    // Nobody may come any more; those who came are waited for.
    gate_.fetch_and(kSeat - 1, std::memory_order_acq_rel);
    const auto all_left = [this] { return gate_.load(std::memory_order_acquire) == 0; };
    if (!watch(all_left)) {
      std::unique_lock<std::mutex> lock(mutex_);
      left_.wait(lock, all_left);
    }
    busy_.store(false, std::memory_order_release);
  }

 private:
  // The gate holds how many helpers are at work (below kSeat) and how many more may come (above), in one number: coming
  // in and closing the gate are then one step each, and a helper that wakes too late stays out.
  static constexpr std::uint64_t kSeat = std::uint64_t{1} << 32;

  // Called by the one thread that holds busy_.
  void start() {
    if (started_) return;
    started_ = true;
    // Signals belong to the program's own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (int i = 1; i < cores(); ++i) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // Fewer helpers than cores: slower, and nothing else.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  [[noreturn]] void serve() {
    const auto open = [this] { return gate_.load(std::memory_order_relaxed) >= kSeat; };
    for (;;) {
      if (!watch(open)) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleepers_;
        wake_.wait(lock, open);
        --sleepers_;
      }
      std::uint64_t gate = gate_.load(std::memory_order_relaxed);
      while (gate >= kSeat && !gate_.compare_exchange_weak(gate, gate - kSeat + 1, std::memory_order_acquire,
                                                           std::memory_order_relaxed)) {
      }
      if (gate < kSeat) continue;
      work();
      if (gate_.fetch_sub(1, std::memory_order_acq_rel) == 1) {  // the last, and the gate is closed
        const std::lock_guard<std::mutex> lock(mutex_);
        left_.notify_one();
      }
    }
  }

  void work() {
    for (;;) {
      const std::int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= count_) return;
      task_(state_, index);
    }
  }

  std::atomic<bool> busy_{false};
  bool started_ = false;

  // The work at hand; written while the gate is closed.
  void (*task_)(void*, std::int64_t) = nullptr;
  void* state_ = nullptr;
  std::int64_t count_ = 0;

  alignas(64) std::atomic<std::int64_t> next_{0};
  alignas(64) std::atomic<std::uint64_t> gate_{0};
  std::mutex mutex_;
  std::condition_variable wake_, left_;
  int sleepers_ = 0;
};

// Never destroyed: its threads may outlive whatever else ends.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  Pool* found = the_pool.load(std::memory_order_acquire);
  if (found != nullptr) return *found;
  auto* made = new Pool;
  if (the_pool.compare_exchange_strong(found, made, std::memory_order_acq_rel)) return *made;
  delete made;  // another thread was faster; this one has no threads yet
  return *found;
}

// A child of fork() has the memory of the threads, and not the threads: it makes new ones. Of the old pool nothing is
// touched, because it may have been in any state.
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr, std::memory_order_release); });

void run(void* threads, std::int64_t count, void (*task)(void*, std::int64_t), void* state) {
  pool().run(static_cast<int>(reinterpret_cast<std::intptr_t>(threads)), count, task, state);
}

}  // namespace

Parallel own_threads(int threads) {
  if (threads <= 0) threads = cores();
  return {threads, &run, reinterpret_cast<void*>(static_cast<std::intptr_t>(threads))};
}

}  // namespace pykd::kernels
