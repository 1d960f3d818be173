// File: kernels/simd/memory-inl.h
//
// Tensors of float32, float16 (hwy::float16_t) and bfloat16 (hwy::bfloat16_t) as float32 vectors, for kernels compiled
// once per instruction set. Include it as math-inl.h. `d` is the tag of the float32 vector, p points anywhere.
//
//     load(d, p)                 a vector of float32 from Lanes(d) entries at p
//     load(d, p, count, fill)    of the first `count` < Lanes(d) entries; the other lanes are `fill`
//     store(v, d, p)             rounds to nearest, ties to even, and writes Lanes(d) entries
//     store(v, d, p, count)      the first `count` < Lanes(d) of them
//     stream(v, d, p)            as store(), past the caches; p aligned for it (entries_to_alignment)
//     entries_to_alignment(d, p) how many entries lie before the first address that stream() takes
//     finish_streaming()         after the last stream(), before another thread may look
//
// Nothing beyond the entries named is read or written. Infinities and NaN survive both directions on every target;
// Highway's own conversions cut bfloat16 off, and know no infinite float16 where the processor has no instruction.
#if defined(PYKD_KERNELS_SIMD_MEMORY_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef PYKD_KERNELS_SIMD_MEMORY_INL_H_
#undef PYKD_KERNELS_SIMD_MEMORY_INL_H_
#else
#define PYKD_KERNELS_SIMD_MEMORY_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace pykd::kernels::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// ---- Half formats in registers -------------------------------------------------------------------

template <class D>
using BFloat16Vec = hn::Vec<hn::Rebind<hwy::bfloat16_t, D>>;
template <class D>
using Float16Vec = hn::Vec<hn::Rebind<hwy::float16_t, D>>;

template <class D>
HWY_INLINE hn::Vec<D> widen(D d, BFloat16Vec<D> v) {
  return hn::PromoteTo(d, v);
}

template <class D>
HWY_INLINE BFloat16Vec<D> narrow_bfloat16(D d, hn::Vec<D> v) {
  const hn::RebindToUnsigned<D> du;
  const hn::Rebind<hwy::bfloat16_t, D> d16;
  const auto bits = hn::BitCast(du, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fff)));
  const auto quiet_nan = hn::Or(bits, hn::Set(du, 0x400000));
  const auto nan = hn::RebindMask(du, hn::IsNaN(v));
  return hn::DemoteTo(d16, hn::BitCast(d, hn::IfThenElse(nan, quiet_nan, rounded)));
}

#if (HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2 && !defined(HWY_DISABLE_F16C)) || HWY_ARCH_ARM_A64

template <class D>
HWY_INLINE hn::Vec<D> widen(D d, Float16Vec<D> v) {
  return hn::PromoteTo(d, v);
}

template <class D>
HWY_INLINE Float16Vec<D> narrow_float16(D /*d*/, hn::Vec<D> v) {
  return hn::DemoteTo(hn::Rebind<hwy::float16_t, D>(), v);
}

#else  // no instruction for float16

template <class D>
HWY_INLINE hn::Vec<D> widen(D d, Float16Vec<D> v) {
  const hn::RebindToUnsigned<D> du;
  const hn::Rebind<uint16_t, D> du16;
  const auto bits = hn::PromoteTo(du, hn::BitCast(du16, v));
  const auto magnitude = hn::And(bits, hn::Set(du, 0x7fff));
  const auto sign = hn::ShiftLeft<16>(hn::Sub(bits, magnitude));
  // The product moves the exponent's bias from 15 to 127, and makes subnormals normal.
  const auto moved = hn::Mul(hn::BitCast(d, hn::ShiftLeft<13>(magnitude)), hn::Set(d, 0x1p112f));
  const auto special = hn::Gt(magnitude, hn::Set(du, 0x7bff));
  const auto exponent = hn::IfThenElseZero(special, hn::Set(du, 0x7f800000));
  return hn::BitCast(d, hn::Or(hn::Or(hn::BitCast(du, moved), exponent), sign));
}

template <class D>
HWY_INLINE Float16Vec<D> narrow_float16(D d, hn::Vec<D> v) {
  const hn::RebindToUnsigned<D> du;
  const hn::RebindToSigned<D> di;
  const hn::Rebind<uint16_t, D> du16;
  const auto bits = hn::BitCast(du, v);
  const auto magnitude = hn::And(bits, hn::Set(du, 0x7fffffff));
  const auto sign = hn::ShiftRight<16>(hn::Sub(bits, magnitude));
  // The exponent's bias from 127 to 15 and half a unit of the last place, less one bit where that place is even.
  const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(du, 1));
  const auto normal = hn::ShiftRight<13>(hn::Add(hn::Add(magnitude, odd), hn::Set(du, 0xc8000fffu)));
  // Below 2^-14 the sum with 1/2 makes the processor round at the last place of a subnormal.
  const auto sum = hn::Add(hn::BitCast(d, magnitude), hn::Set(d, 0.5f));
  const auto subnormal = hn::Sub(hn::BitCast(du, sum), hn::Set(du, 0x3f000000));
  auto result = hn::IfThenElse(hn::Lt(magnitude, hn::Set(du, 0x38800000)), subnormal, normal);
  const auto nan = hn::Gt(magnitude, hn::Set(du, 0x7f800000));
  const auto special = hn::IfThenElse(nan, hn::Set(du, 0x7e00), hn::Set(du, 0x7c00));
  result = hn::IfThenElse(hn::Lt(magnitude, hn::Set(du, 0x47800000)), result, special);
  const auto narrow = hn::DemoteTo(du16, hn::BitCast(di, hn::Or(result, sign)));
  return hn::BitCast(hn::Rebind<hwy::float16_t, D>(), narrow);
}

#endif

template <class D>
HWY_INLINE hn::Vec<D> narrow(D /*d*/, hn::Vec<D> v, const float* /*of this type*/) {
  return v;
}
template <class D>
HWY_INLINE Float16Vec<D> narrow(D d, hn::Vec<D> v, const hwy::float16_t* /*of this type*/) {
  return narrow_float16(d, v);
}
template <class D>
HWY_INLINE BFloat16Vec<D> narrow(D d, hn::Vec<D> v, const hwy::bfloat16_t* /*of this type*/) {
  return narrow_bfloat16(d, v);
}

// ---- Loads ---------------------------------------------------------------------------------------

template <class D>
HWY_INLINE hn::Vec<D> load(D d, const float* p) {
  return hn::LoadU(d, p);
}
template <class D, class T>
HWY_INLINE hn::Vec<D> load(D d, const T* p) {
  return widen(d, hn::LoadU(hn::Rebind<T, D>(), p));
}

template <class D, class T>
HWY_INLINE hn::Vec<D> load(D d, const T* p, size_t count, float fill) {
  const auto present = hn::FirstN(d, count);
#if !HWY_MEM_OPS_MIGHT_FAULT
  if constexpr (sizeof(T) == sizeof(float)) {
    return hn::IfThenElse(present, hn::MaskedLoad(present, d, p), hn::Set(d, fill));
  }
#endif
  T entries[hn::MaxLanes(D())] = {};
  std::memcpy(entries, p, count * sizeof(T));
  return hn::IfThenElse(present, load(d, entries), hn::Set(d, fill));
}

// ---- Stores --------------------------------------------------------------------------------------

template <class D, class T>
HWY_INLINE void store(hn::Vec<D> v, D d, T* p) {
  hn::StoreU(narrow(d, v, p), hn::Rebind<T, D>(), p);
}

template <class D, class T>
HWY_INLINE void store(hn::Vec<D> v, D d, T* p, size_t count) {
#if !HWY_MEM_OPS_MIGHT_FAULT
  if constexpr (sizeof(T) == sizeof(float)) {
    hn::BlendedStore(v, hn::FirstN(d, count), d, p);
    return;
  }
#endif
  T entries[hn::MaxLanes(D())];
  store(v, d, entries);
  std::memcpy(p, entries, count * sizeof(T));
}

template <class D, class T>
HWY_INLINE void stream(hn::Vec<D> v, D d, T* p) {
  const hn::Rebind<T, D> dt;
  if constexpr (hn::MaxLanes(D()) * sizeof(T) >= 16) {
    hn::Stream(narrow(d, v, p), dt, p);
  } else {  // Highway would write 16 bytes
    hn::StoreU(narrow(d, v, p), dt, p);
  }
}

template <class D, class T>
HWY_INLINE size_t entries_to_alignment(D d, const T* p) {
  const size_t bytes = hn::Lanes(d) * sizeof(T);
  return (bytes - reinterpret_cast<uintptr_t>(p) % bytes) % bytes / sizeof(T);
}

HWY_INLINE void finish_streaming() { hwy::FlushStream(); }

}  // namespace pykd::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard, once per target
