// File: kernels/host/rows.h
//
// Kernels that take a matrix row by row: how many rows a thread takes at once, and when gradients go past the caches.
#ifndef PYKD_KERNELS_HOST_ROWS_H_
#define PYKD_KERNELS_HOST_ROWS_H_

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

#include "kernels/kernel.h"

namespace pykd::kernels {

// Entries of a task: enough that handing it to another thread costs little.
constexpr std::size_t kTaskEntries = 32768;
// Tasks per thread: a thread that is held up leaves its share to the others.
constexpr std::size_t kTasksPerThread = 4;
// Bytes of gradient from which it is written past the caches: it would not stay there until somebody reads it, and a
// line that is written as a whole need not be read before.
constexpr std::size_t kStreamedBytes = std::size_t{8} << 20;

// Entries of scratch for a row: whole vectors, and one to spare.
inline std::size_t padded(std::size_t entries) { return (entries + 63) / 64 * 64 + 64; }

// Whether a gradient of that many entries, float32 or halves, is written past the caches.
inline bool is_streamed(std::size_t entries, pykd_dtype dtype) {
  return entries * (dtype == PYKD_FLOAT32 ? 4 : 2) >= kStreamedBytes;
}

// work(first, last) for consecutive rows, all of them in the end, on the threads of the call. It may throw
// std::bad_alloc, and nothing else; what it had begun on other threads ends before.
template <class Work>
void for_rows(const Call& call, std::size_t rows, std::size_t entries, const Work& work) {
  const auto threads = static_cast<std::size_t>(std::max(call.parallel == nullptr ? 1 : call.parallel->threads, 1));
  const std::size_t tasks =
      threads == 1 ? 1 : std::max<std::size_t>(1, std::min({rows, threads * kTasksPerThread, entries / kTaskEntries}));
  if (tasks == 1) return work(0, rows);
  std::atomic<bool> out_of_memory{false};
  call.parallel->for_each(static_cast<std::int64_t>(tasks), [&](std::int64_t index) {
    const auto task = static_cast<std::size_t>(index);
    try {
      work(rows * task / tasks, rows * (task + 1) / tasks);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace pykd::kernels

#endif  // PYKD_KERNELS_HOST_ROWS_H_
