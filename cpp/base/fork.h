// File: base/fork.h
//
// What fork() does to a library that has threads: the child has the memory of all of them and, but for the one that
// forked, none of them. It must not wait for the others, nor free what they were part of.
#ifndef PYKD_BASE_FORK_H_
#define PYKD_BASE_FORK_H_

#include <mutex>

namespace pykd::internal {

// How many fork()s lie between this process and the one that loaded libpykd. What another number made is a parent's.
unsigned fork_generation() noexcept;

// A mutex for a static object, which no other thread holds while the process forks: the child finds it free.
class StaticMutex {
 public:
  StaticMutex();
  StaticMutex(const StaticMutex&) = delete;
  StaticMutex& operator=(const StaticMutex&) = delete;
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  std::mutex mutex_;
};

}  // namespace pykd::internal

#endif  // PYKD_BASE_FORK_H_
