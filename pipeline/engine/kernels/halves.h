// Numbers of half precision in place of bfloat16 (`AVX512-FP16`).
//
// Half precision has three bits more of a number and fewer of its size. So numbers are brought below
// 2^5 by a power of two, and then bfloat16 down to 2^-22 of the largest one is exact. 32 products of two
// such numbers are below 2^15, which half precision can hold.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "floats.h"

namespace coppice {

constexpr int kHalfBits = 5;

// A half in both halves, so that one load of 32 bits fills a vector with it.
enum class Twice : uint32_t {};

// The power of two that takes numbers up to `top` below 2^5. Of what is not finite: 1.
inline float half_scale(float top) {
  if (!std::isfinite(top)) return 1.f;
  return std::ldexp(1.f, std::max(std::ilogb(top), -100) + 1 - kHalfBits);
}

inline __m256i to_halves(__m512 x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

inline void store_twice(__m512 x, Twice* to) {
  const __m512i half = _mm512_cvtepu16_epi32(to_halves(x));
  _mm512_storeu_si512(to, _mm512_or_si512(half, _mm512_slli_epi32(half, 16)));
}

// x [n] as halves; returns what they are to be multiplied by.
inline float halve(const c10::BFloat16* x, int64_t n, c10::Half* to) {
  const float scale = half_scale(find_largest(x, n));
  const __m512 factor = _mm512_set1_ps(1.f / scale);
  for (int64_t j = 0; j < n; j += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j),
                        to_halves(_mm512_mul_ps(load_floats(x + j), factor)));
  return scale;
}

// As above. NaN where a number is not finite.
inline float halve(const c10::BFloat16* x, int64_t n, Twice* to) {
  const float top = find_largest(x, n), scale = half_scale(top);
  const __m512 factor = _mm512_set1_ps(1.f / scale);
  for (int64_t j = 0; j < n; j += 16) store_twice(_mm512_mul_ps(load_floats(x + j), factor), to + j);
  return std::isnan(top) ? top : scale;
}

}  // namespace coppice
