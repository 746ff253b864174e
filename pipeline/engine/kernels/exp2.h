// 2^x for the CPU kernels, lane by lane: what it gives for a number depends on nothing else.

#pragma once

#include <immintrin.h>

#include <initializer_list>

namespace coppice {

// By a polynomial on [-0.5, 0.5] and the exponent; relative error 3e-6, or 2e-7 if kExact. What would
// be no normal number (x < -126) is 0: to round it takes an Intel core some 40 times as long.
template <bool kExact>
inline __m512 exp2(__m512 x) {
  const __mmask16 is_normal =
      _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);  // or NaN
  const __m512 whole = _mm512_roundscale_ps(x, 0);
  const __m512 part = _mm512_sub_ps(x, whole);
  const auto polynomial = [&](std::initializer_list<float> falling) {
    __m512 power = _mm512_setzero_ps();
    for (float next : falling) power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(next));
    return power;
  };
  const __m512 power =
      kExact ? polynomial({1.32764668e-3f, 9.67554129e-3f, 5.55071329e-2f, 2.40221197e-1f,
                           6.93146967e-1f, 1.f})
             : polynomial({9.57009667e-3f, 5.59178599e-2f, 2.40247450e-1f, 6.93121815e-1f, 1.f});
  return _mm512_maskz_scalef_ps(is_normal, power, whole);
}

}  // namespace coppice
