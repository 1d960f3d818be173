#include "kernels/host/memory.h"

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <new>

#include "kernels/host/hooks.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(start, bytes) (static_cast<void>(start), static_cast<void>(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(start, bytes) (static_cast<void>(start), static_cast<void>(bytes))
#endif

namespace pykd::kernels {
namespace {

// Before every block, as long as the alignment: how many bytes follow, and whose memory it is.
struct Header {
  std::size_t bytes;
  const pykd_hooks* owner;  // null: ours
};
constexpr std::size_t kHeader = KeptMemory::kAlignment;
static_assert(sizeof(Header) <= kHeader);

void* contents_of(void* start) { return static_cast<char*>(start) + kHeader; }
Header& header_of(void* start) { return *static_cast<Header*>(start); }

// The start of a new block; nullptr: there is no such memory.
void* new_block(std::size_t bytes) {
  void* start = std::aligned_alloc(KeptMemory::kAlignment, kHeader + bytes);
  if (start != nullptr) header_of(start) = {bytes, nullptr};
  return start;
}

// The same from the host's allocator.
void* new_block_of(const pykd_hooks& owner, std::size_t bytes) {
  void* start = owner.allocate(owner.state, kHeader + bytes, KeptMemory::kAlignment);
  if (start != nullptr) header_of(start) = {bytes, &owner};
  return start;
}

// Made when the library is loaded, and not by the first request, which a fork() might interrupt.
KeptMemory* const the_memory = [] {
  pthread_atfork([] { the_memory->lock(); }, [] { the_memory->unlock(); }, [] { the_memory->unlock(); });
  return new KeptMemory;
}();

}  // namespace

KeptMemory& KeptMemory::instance() { return *the_memory; }

KeptMemory::~KeptMemory() { trim(); }

void* KeptMemory::allocate(std::size_t bytes) {
  // Rounded up to whole lines, as aligned_alloc() wants it.
  if (bytes > SIZE_MAX - 2 * kAlignment) return nullptr;
  bytes = (std::max<std::size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  const pykd_hooks& host = hooks();
  if (bytes < kSmallest || host.allocate != nullptr) {
    void* start = host.allocate != nullptr ? new_block_of(host, bytes) : new_block(bytes);
    return start == nullptr ? nullptr : contents_of(start);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  ++requests_;
  auto best = kept_.end();
  for (auto block = kept_.begin(); block != kept_.end(); ++block) {
    const bool fits = block->bytes >= bytes && block->bytes / 2 <= bytes;
    if (fits && (best == kept_.end() || block->bytes <= best->bytes)) best = block;  // of equals the warmest
  }
  void* start = nullptr;
  if (best != kept_.end()) {
    start = best->start;
    bytes = best->bytes;
    bytes_kept_ -= bytes;
    kept_.erase(best);
    ASAN_UNPOISON_MEMORY_REGION(contents_of(start), bytes);
  } else {
    start = new_block(bytes);
    if (start == nullptr) return nullptr;
  }
  bytes_in_use_ += bytes;
  peak_ = std::max(peak_, bytes_in_use_);
  drop_what_is_too_much();
  return contents_of(start);
}

void KeptMemory::deallocate(void* memory) {
  if (memory == nullptr) return;
  void* start = static_cast<char*>(memory) - kHeader;
  const auto [bytes, owner] = header_of(start);
  if (owner != nullptr) {
    owner->deallocate(owner->state, start, kHeader + bytes);
    return;
  }
  if (bytes < kSmallest) {
    std::free(start);
    return;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  bytes_in_use_ -= bytes;
  try {
    kept_.push_back({start, bytes, requests_});
  } catch (const std::bad_alloc&) {
    std::free(start);
    return;
  }
  bytes_kept_ += bytes;
  ASAN_POISON_MEMORY_REGION(memory, bytes);
  drop_what_is_too_much();
}

void KeptMemory::trim() {
  const std::lock_guard<std::mutex> lock(mutex_);
  while (!kept_.empty()) drop(kept_.begin());
}

std::size_t KeptMemory::bytes_kept() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return bytes_kept_;
}

void KeptMemory::drop(std::vector<Block>::iterator block) {
  ASAN_UNPOISON_MEMORY_REGION(contents_of(block->start), block->bytes);
  bytes_kept_ -= block->bytes;
  std::free(block->start);
  kept_.erase(block);
}

void KeptMemory::drop_what_is_too_much() {
  while (!kept_.empty() && (bytes_in_use_ + bytes_kept_ > 2 * peak_ || bytes_kept_ > kMostKept ||
                            requests_ - kept_.front().given_back > kKeptFor)) {
    drop(kept_.begin());
  }
}

}  // namespace pykd::kernels
