// File: kernels/cuda/gpu_emulation.h
//
// The names of gpu.cuh without a GPU: every GPU thread is a fiber of one thread (fibers.h). Slow, and good for what a
// GPU does not show: results of the kernels themselves on any machine, accesses out of bounds under the address
// sanitizer, missing barriers under the thread sanitizer.
//
//     gpu::Launch launch{blocks, blocks_per_cluster, threads, shared_bytes};
//     launch.run([&] { some_kernel<gpu::Float32>(arguments); });
//
// Clusters run one after the other, in an order that run() can turn around; the threads of one in any order between
// two barriers. Uninitialised shared memory holds NaN, and copies to shared memory arrive when they are waited for, not
// before.
#ifndef PYKD_KERNELS_CUDA_GPU_EMULATION_H_
#define PYKD_KERNELS_CUDA_GPU_EMULATION_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/fibers.h"

namespace pykd::kernels::gpu {

// ---- A cluster that is running -----------------------------------------------------------------------

struct EmulatedThread;
inline thread_local EmulatedThread* self = nullptr;
inline thread_local Fibers* fibers = nullptr;

inline void turn_to(EmulatedThread* thread) {
  const Aside aside;
  self = thread;
}
inline void sleep_among(Fibers::Sleepers& sleepers) {
  EmulatedThread* const me = self;
  fibers->sleep(sleepers);
  turn_to(me);
}

class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads), missing_(threads) {}
  void wait() {
    const Aside aside;
    std::uint64_t* const event = &events_[times_ % 2];
    happens_before(event);
    if (--missing_ > 0) {
      sleep_among(sleepers_);
    } else {
      missing_ = threads_;
      ++times_;
      fibers->wake(sleepers_);
    }
    happens_after(event);
  }

 private:
  unsigned threads_, missing_, times_ = 0;
  std::uint64_t events_[2] = {};  // in turn: who goes on may come to the next before all have woken from this one
  Fibers::Sleepers sleepers_;
};

struct EmulatedWarp {
  Barrier barrier{kWarp};
  unsigned char lanes[2][kWarp][64];  // in turn: a lane may pass the next value before all have read this one
};

// In bytes.
struct EmulatedMail {
  unsigned expected, come;
};

struct EmulatedBlock {
  EmulatedBlock(unsigned threads, std::size_t shared_bytes)
      : barrier(threads), warps(threads / kWarp), shared(shared_bytes / sizeof(Words)) {
    forget();
  }
  void forget() {
    if (!shared.empty()) std::memset(static_cast<void*>(shared.data()), 0xff, shared.size() * sizeof(Words));
    mail.clear();
  }
  Barrier barrier;
  std::vector<EmulatedWarp> warps;
  std::vector<Words> shared;
  std::map<std::ptrdiff_t, EmulatedMail> mail;  // by where the mailbox is
  Fibers::Sleepers await_mail;
};

// Where something lies in a block's shared memory.
inline std::ptrdiff_t offset_in(EmulatedBlock& block, const void* p) {
  return static_cast<const unsigned char*>(p) - reinterpret_cast<const unsigned char*>(block.shared.data());
}

struct EmulatedThread {
  unsigned block = 0, rank = 0, thread = 0, threads = 0;
  EmulatedBlock* own = nullptr;
  std::deque<EmulatedBlock>* cluster = nullptr;
  Barrier* cluster_barrier = nullptr;
  bool announced = false;
  unsigned shuffles = 0;
  // Copies that were begun: those of groups that are closed, and those of the group that is open.
  std::deque<std::vector<std::pair<void*, const void*>>> groups;
  std::vector<std::pair<void*, const void*>> open;
};

struct Launch {
  unsigned blocks = 1, cluster = 1, threads = kWarp;
  std::size_t shared_bytes = 0;

  template <class Kernel>
  void run(const Kernel& kernel, bool backwards = false) const {
    if (threads % kWarp != 0 || blocks % cluster != 0 || shared_bytes % sizeof(Words) != 0) {
      throw std::logic_error("a launch in whole warps, whole clusters and 16 bytes");
    }
    // The same fibers serve one cluster after the other.
    std::deque<EmulatedBlock> running;
    for (unsigned rank = 0; rank < cluster; ++rank) running.emplace_back(threads, shared_bytes);
    Barrier all(cluster * threads);
    Fibers workers;
    fibers = &workers;
    for (unsigned rank = 0; rank < cluster; ++rank) {
      for (unsigned thread = 0; thread < threads; ++thread) {
        workers.add([&, rank, thread] {
          for (unsigned i = 0; i < blocks / cluster; ++i) {
            const unsigned first = (backwards ? blocks / cluster - 1 - i : i) * cluster;
            EmulatedThread state{first + rank, rank, thread, threads, &running[rank], &running, &all, false, 0, {}, {}};
            turn_to(&state);
            kernel();
            running[rank].barrier.wait();
            if (thread == 0) running[rank].forget();  // the block is over, whoever of the cluster still reads there
            all.wait();
          }
        });
      }
    }
    workers.run();
  }
};

// ---- The names ---------------------------------------------------------------------------------------

inline unsigned block() { return self->block; }
inline unsigned thread() { return self->thread; }
inline unsigned threads() { return self->threads; }
inline void block_barrier() { self->own->barrier.wait(); }
inline unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(self->own->shared.data()); }

template <class T>
T shuffle_xor(const T& value, int mask) {
  static_assert(sizeof(T) <= sizeof(EmulatedWarp::lanes[0][0]));
  EmulatedWarp& warp = self->own->warps[self->thread / kWarp];
  auto& lanes = warp.lanes[self->shuffles++ % 2];
  const unsigned lane = self->thread % kWarp;
  std::memcpy(lanes[lane], &value, sizeof(T));
  warp.barrier.wait();
  T result;
  std::memcpy(&result, lanes[lane ^ static_cast<unsigned>(mask)], sizeof(T));
  return result;
}

struct alignas(8) Mailbox {
  std::uint64_t state;
};

inline void open_mailbox(Mailbox* mine, unsigned bytes) {
  EmulatedBlock& block = *self->own;
  const Aside aside;
  if (self->announced || !block.mail.emplace(offset_in(block, mine), EmulatedMail{bytes, 0}).second) std::abort();
}
inline void announce_mailboxes() { self->announced = true; }
inline void await_mailboxes() {
  if (!self->announced) std::abort();  // on a GPU it would hang
  self->cluster_barrier->wait();
}
// Mail for a box that is not open, or more than it expects, is lost on a GPU.
template <class S>
void post(const S& value, S* slot, Mailbox* mailbox, unsigned rank) {
  static_assert(sizeof(S) % 16 == 0, "sent 16 bytes at a time");
  EmulatedBlock& to = (*self->cluster)[rank];
  std::memcpy(reinterpret_cast<unsigned char*>(to.shared.data()) + offset_in(*self->own, slot), &value, sizeof(S));
  happens_before(&to.mail);
  const Aside aside;
  const auto mail = to.mail.find(offset_in(*self->own, mailbox));
  if (mail == to.mail.end() || mail->second.come + sizeof(S) > mail->second.expected) std::abort();
  mail->second.come += static_cast<unsigned>(sizeof(S));
  fibers->wake(to.await_mail);
}
inline void await_mail(Mailbox* mine) {
  EmulatedBlock& block = *self->own;
  const Aside aside;
  const EmulatedMail& mail = block.mail.at(offset_in(block, mine));
  while (mail.come != mail.expected) sleep_among(block.await_mail);
  happens_after(&block.mail);
}

inline void check_aligned(const void* p) {
  if (reinterpret_cast<std::uintptr_t>(p) % sizeof(Words) != 0) std::abort();  // as a GPU would
}
inline Words load(const void* aligned) {
  check_aligned(aligned);
  Words words;
  std::memcpy(&words, aligned, sizeof words);
  return words;
}
inline void store(void* aligned, const Words& words) {
  check_aligned(aligned);
  std::memcpy(aligned, &words, sizeof words);
}
inline void store_streaming(void* aligned, const Words& words) { store(aligned, words); }

inline void copy_to_shared(void* shared, const void* aligned) {
  check_aligned(shared);
  check_aligned(aligned);
  self->open.emplace_back(shared, aligned);
}
inline void commit() {
  self->groups.push_back(std::move(self->open));
  self->open.clear();
}
template <int n>
void wait_for_all_but() {
  while (self->groups.size() > n) {
    for (const auto& [to, from] : self->groups.front()) std::memcpy(to, from, sizeof(Words));
    self->groups.pop_front();
  }
}

inline float exp2(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;
}
inline float log2_fast(float x) { return std::log2(x); }
inline float log2(float x) { return std::log2(x); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float product(float a, float b) {
  volatile float result = a * b;  // rounded, whatever comes next
  return result;
}
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float infinity() { return std::numeric_limits<float>::infinity(); }
inline float nan() { return std::numeric_limits<float>::quiet_NaN(); }

inline double exp(double x) { return std::exp(x); }
inline double log(double x) { return std::log(x); }
inline void add(std::int64_t* to, std::int64_t value) { __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }
inline std::int64_t nearest_int64(double x) { return std::llrint(x); }

inline int nearest_int(float x) { return static_cast<int>(std::lrint(x)); }
inline float bits_to_float(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline std::uint32_t float_to_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float half_to_float(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  const float sign = (bits & 0x8000) != 0 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction == 0 ? sign * infinity() : nan();
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                               : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25));
}
inline std::uint16_t float_to_half(float x) {
  const auto sign = static_cast<std::uint16_t>(std::signbit(x) ? 0x8000 : 0);
  if (std::isnan(x)) return 0x7fff;
  x = std::fabs(x);
  if (x >= 65520.0f) return sign | 0x7c00;
  if (x == 0.0f) return sign;
  int exponent;
  std::frexp(x, &exponent);
  exponent = std::max(exponent, -13);  // of the lowest normal number, in frexp's counting
  const auto units = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(x, 11 - exponent)));  // 0 … 2048
  // A carry into the next binade, or from the subnormal numbers into the normal, is one in the bits as well.
  return static_cast<std::uint16_t>(sign | (units + static_cast<std::uint32_t>(exponent + 13) * 1024));
}
inline std::uint16_t float_to_bfloat(float x) {
  if (std::isnan(x)) return 0x7fff;
  const std::uint32_t bits = float_to_bits(x);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline std::uint32_t floats_to_halves(float a, float b) {
  return float_to_half(a) | static_cast<std::uint32_t>(float_to_half(b)) << 16;
}
inline std::uint32_t floats_to_bfloats(float a, float b) {
  return float_to_bfloat(a) | static_cast<std::uint32_t>(float_to_bfloat(b)) << 16;
}
inline std::uint32_t max_halves(std::uint32_t a, std::uint32_t b) {
  const auto greater = [](std::uint32_t x, std::uint32_t y) {
    return max(half_to_float(static_cast<std::uint16_t>(x)), half_to_float(static_cast<std::uint16_t>(y)));
  };
  return floats_to_halves(greater(a & 0xffffu, b & 0xffffu), greater(a >> 16, b >> 16));
}
inline std::uint32_t max_bfloats(std::uint32_t a, std::uint32_t b) {
  return floats_to_bfloats(max(bits_to_float(a << 16), bits_to_float(b << 16)),
                           max(bits_to_float(a & 0xffff0000u), bits_to_float(b & 0xffff0000u)));
}

}  // namespace pykd::kernels::gpu

#endif  // PYKD_KERNELS_CUDA_GPU_EMULATION_H_
