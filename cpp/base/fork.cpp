#include "base/fork.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>

namespace pykd::internal {
namespace {

std::atomic<unsigned> generation{0};

// The mutexes, in the order in which they were made; they live as long as the process.
constexpr int kMost = 8;
std::atomic<StaticMutex*> mutexes[kMost];
std::atomic<int> made{0};

// Those that the fork at hand has locked: one more may be made meanwhile.
StaticMutex* locked[kMost];

void lock_all() {
  StaticMutex* found[kMost];
  for (int i = 0; i < kMost; ++i) {
    found[i] = mutexes[i].load();
    if (found[i] != nullptr) found[i]->lock();
  }
  std::copy_n(found, kMost, locked);
}
void unlock_all() {
  StaticMutex* found[kMost];
  std::copy_n(locked, kMost, found);
  for (int i = kMost; i-- > 0;) {
    if (found[i] != nullptr) found[i]->unlock();
  }
}

const int registered = pthread_atfork(lock_all, unlock_all, [] {
  unlock_all();
  ++generation;
});

}  // namespace

unsigned fork_generation() noexcept {
  static_cast<void>(registered);
  return generation.load(std::memory_order_relaxed);
}

StaticMutex::StaticMutex() {
  const int index = made++;
  if (index < kMost) mutexes[index].store(this);
}

}  // namespace pykd::internal
