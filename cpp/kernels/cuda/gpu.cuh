// File: kernels/cuda/gpu.cuh
//
// What kernels ask of a GPU, each thing under one name: indices, barriers, shuffles, 16-byte accesses, copies that
// run on their own, clusters of blocks, the two fast functions of the hardware. Kernels written against this file
// alone also compile without CUDA, against a stand-in of the same names in which every GPU thread is a fiber on the
// host: gpu_emulation.h, beside this file. There they are tested, races included, on machines without a GPU.
//
// Logarithms are to the base 2, because that is what the hardware has; callers scale.
#ifndef PYKD_KERNELS_CUDA_GPU_CUH_
#define PYKD_KERNELS_CUDA_GPU_CUH_

#include <cstdint>
#include <cstring>

#include "kernels/cuda/qualifiers.h"

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#define PYKD_GPU __device__ __forceinline__
// A kernel; the numbers are the most threads of a block, and how many blocks a multiprocessor should hold.
#define PYKD_GPU_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

// Before a loop whose indices into an array have to be known when it is compiled; and before one that is better short.
#define PYKD_GPU_UNROLL _Pragma("unroll")
#define PYKD_GPU_NO_UNROLL _Pragma("unroll 1")

#else

#include <cmath>

#define PYKD_GPU inline
#define PYKD_GPU_KERNEL(threads, blocks) void
#define PYKD_GPU_UNROLL
#define PYKD_GPU_NO_UNROLL

#endif

namespace pykd::kernels::gpu {

// 16 bytes: what one thread reads or writes at once.
struct alignas(16) Words {
  std::uint32_t w[4];
};

constexpr int kWarp = 32;

#ifdef __CUDACC__

PYKD_GPU unsigned block() { return blockIdx.x; }
PYKD_GPU unsigned thread() { return threadIdx.x; }
PYKD_GPU unsigned threads() { return blockDim.x; }  // a multiple of kWarp

// Every thread of the block arrives before one goes on, and sees what the others wrote.
PYKD_GPU void block_barrier() { __syncthreads(); }

// The block's dynamic shared memory.
PYKD_GPU unsigned char* shared_memory() {
  extern __shared__ uint4 pykd_shared[];
  return reinterpret_cast<unsigned char*>(pykd_shared);
}

// The value that the lane `lane ^ mask` passes at the same time; all lanes of the warp take part.
template <class T>
PYKD_GPU T shuffle_xor(const T& value, int mask) {
  static_assert(sizeof(T) % 4 == 0, "shuffled word by word");
  unsigned words[sizeof(T) / 4];
  std::memcpy(words, &value, sizeof(T));
  PYKD_GPU_UNROLL
  for (unsigned& word : words) word = __shfl_xor_sync(0xffffffffu, word, mask);
  T result;
  std::memcpy(&result, words, sizeof(T));
  return result;
}

// How the blocks of a cluster tell each other what they have found. A block opens a mailbox in its shared memory for a
// number of bytes, once; then every thread of the cluster announces, and awaits the announcement of all others, so
// that there is something to post to. await_mail() returns when all bytes have come. Nobody looks into another block's
// memory, so a block with no more mail to come may end. No fence in all of this waits for stores to device memory.
// Before compute capability 9.0 no block has company.
struct alignas(8) Mailbox {
  std::uint64_t state;
};

PYKD_GPU unsigned shared_address(const void* shared) { return static_cast<unsigned>(__cvta_generic_to_shared(shared)); }

PYKD_GPU void open_mailbox(Mailbox* mine, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
  const unsigned address = shared_address(mine);
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("mbarrier.arrive.expect_tx.relaxed.cluster.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
               : "memory");
#endif
}
PYKD_GPU void announce_mailboxes() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
PYKD_GPU void await_mailboxes() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}
// Sends `value` to where `slot` is in the shared memory of the cluster's block `rank`, for its mailbox `mailbox`.
template <class S>
PYKD_GPU void post(const S& value, S* slot, Mailbox* mailbox, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  static_assert(sizeof(S) % 16 == 0, "sent 16 bytes at a time");
  unsigned words[sizeof(S) / 4];
  std::memcpy(words, &value, sizeof(S));
  unsigned to, box;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(slot)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(box) : "r"(shared_address(mailbox)), "r"(rank));
  PYKD_GPU_UNROLL
  for (unsigned i = 0; i < sizeof(S) / 4; i += 4) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to + 4 * i),
        "r"(words[i]), "r"(words[i + 1]), "r"(words[i + 2]), "r"(words[i + 3]), "r"(box)
        : "memory");
  }
#endif
}
PYKD_GPU void await_mail(Mailbox* mine) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t"
      ".reg .pred come;\n"
      "again:\n\t"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 come, [%0], 0;\n\t"
      "@!come bra again;\n\t"
      "}" ::"r"(shared_address(mine))
      : "memory");
#endif
}

PYKD_GPU Words load(const void* aligned) {
  const uint4 v = *static_cast<const uint4*>(aligned);
  return {{v.x, v.y, v.z, v.w}};
}
PYKD_GPU void store(void* aligned, const Words& words) {
  *static_cast<uint4*>(aligned) = make_uint4(words.w[0], words.w[1], words.w[2], words.w[3]);
}
// For results that this kernel does not read again: they leave the cache first.
PYKD_GPU void store_streaming(void* aligned, const Words& words) {
  __stcs(static_cast<uint4*>(aligned), make_uint4(words.w[0], words.w[1], words.w[2], words.w[3]));
}

// Copies 16 bytes into shared memory while the thread goes on. commit() closes a group of them; wait_for_all_but<n>()
// returns when at most the newest n groups of this thread are under way, and the thread may read the others.
PYKD_GPU void copy_to_shared(void* shared, const void* aligned) { __pipeline_memcpy_async(shared, aligned, 16); }
PYKD_GPU void commit() { __pipeline_commit(); }
template <int n>
PYKD_GPU void wait_for_all_but() {
  __pipeline_wait_prior(n);
}

// To within 2 units in the last place; results below 2^-126 are 0.
PYKD_GPU float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// To within 2^-22, relative where x is outside (1/2, 2).
PYKD_GPU float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PYKD_GPU float log2(float x) { return ::log2f(x); }
PYKD_GPU float max(float a, float b) { return fmaxf(a, b); }  // the other one where one is NaN
PYKD_GPU float min(float a, float b) { return fminf(a, b); }
// The greater halves, of two at once; the other one where one is NaN.
PYKD_GPU std::uint32_t max_halves(std::uint32_t a, std::uint32_t b) {
  std::uint32_t greater;
  asm("max.f16x2 %0, %1, %2;" : "=r"(greater) : "r"(a), "r"(b));
  return greater;
}
PYKD_GPU std::uint32_t max_bfloats(std::uint32_t a, std::uint32_t b) {
  std::uint32_t greater;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(greater) : "r"(a), "r"(b));
  return greater;
}
PYKD_GPU float product(float a, float b) { return __fmul_rn(a, b); }  // rounded, whatever comes next
PYKD_GPU float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
PYKD_GPU float infinity() { return __int_as_float(0x7f800000); }
PYKD_GPU float nan() { return __int_as_float(0x7fffffff); }

PYKD_GPU double exp(double x) { return ::exp(x); }
PYKD_GPU double log(double x) { return ::log(x); }
// For sums whose bits do not depend on the order: those of integers.
PYKD_GPU void add(std::int64_t* to, std::int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}
PYKD_GPU std::int64_t nearest_int64(double x) { return __double2ll_rn(x); }

PYKD_GPU int nearest_int(float x) { return __float2int_rn(x); }
PYKD_GPU float bits_to_float(std::uint32_t bits) { return __uint_as_float(bits); }
PYKD_GPU std::uint32_t float_to_bits(float x) { return __float_as_uint(x); }
PYKD_GPU float half_to_float(std::uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
PYKD_GPU std::uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
PYKD_GPU std::uint16_t float_to_bfloat(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
// Two at once, the first in the lower half.
PYKD_GPU std::uint32_t floats_to_halves(float a, float b) {
  const __half2 both = __floats2half2_rn(a, b);
  std::uint32_t bits;
  std::memcpy(&bits, &both, 4);
  return bits;
}
PYKD_GPU std::uint32_t floats_to_bfloats(float a, float b) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
  std::uint32_t bits;
  std::memcpy(&bits, &both, 4);
  return bits;
}

#endif

}  // namespace pykd::kernels::gpu

#ifndef __CUDACC__
#include "kernels/cuda/gpu_emulation.h"
#endif

namespace pykd::kernels::gpu {

// ---- The three dtypes: 16 bytes are kLanes floats -------------------------------------------------

struct Float32 {
  using Storage = float;
  static constexpr int kLanes = 4;
  static PYKD_GPU float widen(Storage x) { return x; }
  static PYKD_GPU Storage narrow(float x) { return x; }
  static PYKD_GPU void unpack(const Words& words, float (&x)[kLanes]) {
    PYKD_GPU_UNROLL
    for (int i = 0; i < 4; ++i) x[i] = bits_to_float(words.w[i]);
  }
  // The largest that is not NaN.
  static PYKD_GPU float greatest(const Words& words) {
    return max(max(bits_to_float(words.w[0]), bits_to_float(words.w[1])),
               max(bits_to_float(words.w[2]), bits_to_float(words.w[3])));
  }
  static PYKD_GPU Words pack(const float (&x)[kLanes]) {
    Words words;
    PYKD_GPU_UNROLL
    for (int i = 0; i < 4; ++i) words.w[i] = float_to_bits(x[i]);
    return words;
  }
};

struct Float16 {
  using Storage = std::uint16_t;
  static constexpr int kLanes = 8;
  static PYKD_GPU float widen(Storage x) { return half_to_float(x); }
  static PYKD_GPU Storage narrow(float x) { return float_to_half(x); }
  static PYKD_GPU void unpack(const Words& words, float (&x)[kLanes]) {
    PYKD_GPU_UNROLL
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = half_to_float(static_cast<Storage>(words.w[i] & 0xffffu));
      x[2 * i + 1] = half_to_float(static_cast<Storage>(words.w[i] >> 16));
    }
  }
  static PYKD_GPU float greatest(const Words& words) {
    const std::uint32_t both = max_halves(max_halves(words.w[0], words.w[1]), max_halves(words.w[2], words.w[3]));
    return max(half_to_float(static_cast<Storage>(both & 0xffffu)), half_to_float(static_cast<Storage>(both >> 16)));
  }
  static PYKD_GPU Words pack(const float (&x)[kLanes]) {
    Words words;
    PYKD_GPU_UNROLL
    for (int i = 0; i < 4; ++i) words.w[i] = floats_to_halves(x[2 * i], x[2 * i + 1]);
    return words;
  }
};

struct Bfloat16 {
  using Storage = std::uint16_t;
  static constexpr int kLanes = 8;
  static PYKD_GPU float widen(Storage x) { return bits_to_float(static_cast<std::uint32_t>(x) << 16); }
  static PYKD_GPU Storage narrow(float x) { return float_to_bfloat(x); }
  static PYKD_GPU void unpack(const Words& words, float (&x)[kLanes]) {
    PYKD_GPU_UNROLL
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = bits_to_float(words.w[i] << 16);
      x[2 * i + 1] = bits_to_float(words.w[i] & 0xffff0000u);
    }
  }
  static PYKD_GPU float greatest(const Words& words) {
    const std::uint32_t both = max_bfloats(max_bfloats(words.w[0], words.w[1]), max_bfloats(words.w[2], words.w[3]));
    return max(bits_to_float(both << 16), bits_to_float(both & 0xffff0000u));
  }
  static PYKD_GPU Words pack(const float (&x)[kLanes]) {
    Words words;
    PYKD_GPU_UNROLL
    for (int i = 0; i < 4; ++i) words.w[i] = floats_to_bfloats(x[2 * i], x[2 * i + 1]);
    return words;
  }
};

}  // namespace pykd::kernels::gpu

#endif  // PYKD_KERNELS_CUDA_GPU_CUH_
