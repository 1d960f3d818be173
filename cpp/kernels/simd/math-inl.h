// File: kernels/simd/math-inl.h
//
// exp and log of float32 vectors, for kernels compiled once per instruction set (Highway's foreach_target.h). Include
// it after hwy/highway.h, outside any namespace, as Highway's own -inl.h files.
//
//     exp2(d, x)    2^x for x <= 127; exactly 1 at 0, exactly 0 below -126
//     exp2m1(d, x)  2^x - 1 for x <= 127, with the digits of small ones
//     exp(d, x)     e^x for x <= 88; exactly 1 at 0, exactly 0 below about -87.3
//     log(d, x)     ln x for normal x > 0; exactly 0 at 1
//     log1p(d, x)   ln(1 + x) for finite x > -1, with the digits of small ones
//
// NaN stays NaN; exp and exp2 of -inf are 0, and raise no floating-point exception. Relative errors: exp2, exp2m1 and
// log below 2e-7, exp and log1p below 3e-7 (kernels_simd_test.cpp). Results are never subnormal: those are
// slow, and no loss needs them.
#if defined(PYKD_KERNELS_SIMD_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef PYKD_KERNELS_SIMD_MATH_INL_H_
#undef PYKD_KERNELS_SIMD_MATH_INL_H_
#else
#define PYKD_KERNELS_SIMD_MATH_INL_H_
#endif

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace pykd::kernels::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// 2^r for |r| <= 1/2: the polynomial of the smallest relative error (9e-8) that is 1 at 0.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp2_polynomial(D d, V r) {
  V p = hn::MulAdd(hn::Set(d, 1.326472731307149e-03f), r, hn::Set(d, 9.671512991189957e-03f));
  p = hn::MulAdd(p, r, hn::Set(d, 5.550733581185341e-02f));
  p = hn::MulAdd(p, r, hn::Set(d, 2.4022242426872253e-01f));
  p = hn::MulAdd(p, r, hn::Set(d, 6.931470036506653e-01f));
  return hn::MulAdd(p, r, hn::Set(d, 1.0f));
}

// 2^r - 1 for |r| <= 1/2: r times the polynomial of the smallest relative error (1e-8).
template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp2m1_polynomial(D d, V r) {
  V p = hn::MulAdd(hn::Set(d, 1.540351223e-04f), r, hn::Set(d, 1.339073526e-03f));
  p = hn::MulAdd(p, r, hn::Set(d, 9.618237615e-03f));
  p = hn::MulAdd(p, r, hn::Set(d, 5.550357327e-02f));
  p = hn::MulAdd(p, r, hn::Set(d, 2.402264923e-01f));
  p = hn::MulAdd(p, r, hn::Set(d, 6.931471825e-01f));
  return hn::Mul(p, r);
}

// The larger of x and `least`, x where it is NaN. So differences between very low entries stay numbers.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V at_least(D d, float least, V x) {
#if HWY_ARCH_X86 && HWY_TARGET != HWY_SCALAR && HWY_TARGET != HWY_EMU128
  return hn::Max(hn::Set(d, least), x);  // of which x86 takes the second where one is NaN
#else
  return hn::IfThenElse(hn::Lt(x, hn::Set(d, least)), hn::Set(d, least), x);
#endif
}

// Multiplies p in [1/2, 2] by 2^n, n a whole number from -127 as a float; 0 where x, the exponent before rounding, is
// below -126.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V scale_by_power_of_2(D d, V p, V n, V x) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  if constexpr (sizeof(V) == 64) {
    const __mmask16 kept = _mm512_cmp_ps_mask(x.raw, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);  // NaN too
    return V{_mm512_maskz_scalef_ps(kept, p.raw, n.raw)};
  }
#endif
  // A product, not a sum of exponent bits: it keeps NaN what it is.
  const hn::RebindToSigned<D> di;
  const auto power = hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(di, n), hn::Set(di, 127)));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -126.0f)), hn::Mul(p, hn::BitCast(d, power)));
}

template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp2(D d, V x) {
  x = at_least(d, -127.0f, x);
  const V n = hn::Round(x);
  return scale_by_power_of_2(d, exp2_polynomial(d, hn::Sub(x, n)), n, x);
}

template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp2m1(D d, V x) {
  const hn::RebindToSigned<D> di;
  x = at_least(d, -127.0f, x);
  const V n = hn::Round(x), r = hn::Sub(x, n);
  const V power = hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(di, n), hn::Set(di, 127))));
  return hn::MulAdd(exp2m1_polynomial(d, r), power, hn::Sub(power, hn::Set(d, 1.0f)));
}

template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp(D d, V x) {
  x = at_least(d, -88.0f, x);
  // ln 2 in two parts, the first with few bits, so that n times it is exact: x - n ln 2 keeps the digits of x.
  const V y = hn::Mul(x, hn::Set(d, kLog2E));
  const V n = hn::Round(y);
  V r = hn::NegMulAdd(n, hn::Set(d, 0.693359375f), x);
  r = hn::NegMulAdd(n, hn::Set(d, -2.12194440e-4f), r);
  return scale_by_power_of_2(d, exp2_polynomial(d, hn::Mul(r, hn::Set(d, kLog2E))), n, y);
}

template <class D, class V = hn::Vec<D>>
HWY_INLINE V log(D d, V x) {
  const hn::RebindToSigned<D> di;
  // x = 2^n (1 + f), 1 + f in [sqrt(1/2), sqrt(2))
  const auto bits = hn::Sub(hn::BitCast(di, x), hn::Set(di, 0x3f3504f3));
  const V n = hn::ConvertTo(d, hn::ShiftRight<23>(bits));
  const auto mantissa = hn::Add(hn::And(bits, hn::Set(di, 0x7fffff)), hn::Set(di, 0x3f3504f3));
  const V f = hn::Sub(hn::BitCast(d, mantissa), hn::Set(d, 1.0f));
  // ln(1 + f) = f - f^2/2 + f^3 P(f)
  V p = hn::MulAdd(hn::Set(d, 8.700438588857651e-02f), f, hn::Set(d, -1.4267492294311523e-01f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.4914768934249878e-01f));
  p = hn::MulAdd(p, f, hn::Set(d, -1.657758355140686e-01f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.9963063299655914e-01f));
  p = hn::MulAdd(p, f, hn::Set(d, -2.500133812427521e-01f));
  p = hn::MulAdd(p, f, hn::Set(d, 3.333390951156616e-01f));
  const V f2 = hn::Mul(f, f);
  V tail = hn::Mul(hn::Mul(f2, f), p);
  tail = hn::MulAdd(n, hn::Set(d, -2.12194440e-4f), tail);
  tail = hn::NegMulAdd(hn::Set(d, 0.5f), f2, tail);
  const V result = hn::MulAdd(n, hn::Set(d, 0.693359375f), hn::Add(f, tail));
  return hn::IfThenElse(hn::IsNaN(x), x, result);
}

template <class D, class V = hn::Vec<D>>
HWY_INLINE V log1p(D d, V x) {
  const V sum = hn::Add(hn::Set(d, 1.0f), x);
  const V lost = hn::Sub(x, hn::Sub(sum, hn::Set(d, 1.0f)));  // by the rounding of the sum
  return hn::Add(log(d, sum), hn::Div(lost, sum));
}

}  // namespace pykd::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard, once per target
