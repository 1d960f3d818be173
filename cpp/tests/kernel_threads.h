// File: tests/kernel_threads.h
//
// Threads to run a kernel on in a test: as many as asked for, whatever the machine has.
#ifndef PYKD_TESTS_KERNEL_THREADS_H_
#define PYKD_TESTS_KERNEL_THREADS_H_

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "kernels/kernel.h"

namespace pykd::tests {

// `*count` threads, this one among them, each of which takes the last task that is left. `count` outlives the result.
inline kernels::Parallel threads(int* count) {
  kernels::Parallel parallel;
  parallel.threads = *count;
  parallel.pool = count;
  parallel.run = [](void* pool, std::int64_t tasks, void (*task)(void*, std::int64_t), void* state) {
    std::atomic<std::int64_t> left{tasks};
    const auto work = [&] {
      for (std::int64_t i = --left; i >= 0; i = --left) task(state, i);
    };
    std::vector<std::thread> helpers(static_cast<std::size_t>(*static_cast<int*>(pool) - 1));
    for (std::thread& helper : helpers) helper = std::thread(work);
    work();
    for (std::thread& helper : helpers) helper.join();
  };
  return parallel;
}

}  // namespace pykd::tests

#endif  // PYKD_TESTS_KERNEL_THREADS_H_
