// bfloat16 as numbers of half precision (AVX512-FP16).
//
// Half precision has three bits more of a number and three fewer of its size. So the largest of some
// numbers is brought to [2^4, 2^5) by a power of two; those smaller than it by 2^19 become 0, and all
// others are exact. 32 products of two such numbers are below 2^15, which half precision can hold.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace coppice {

constexpr int kHalfBits = 5;

// A half in both halves, so that one load of 32 bits fills a vector with it.
enum class Twice : uint32_t {};

// Lanes j to n of numbers, n a multiple of 16
inline __mmask32 lanes_left(int64_t n, int64_t j) { return n - j < 32 ? 0xffff : ~__mmask32(0); }

// How some numbers become halves. `scale`: what these are to be multiplied by; NaN where a number is
// not finite.
class Halving {
 public:
  Halving(const c10::BFloat16* x, int64_t n) {
    const int exponent = largest(x, n) >> 7;
    const int shift = std::max(exponent - kBias - kHalfBits + 1, 0);
    shift_ = _mm512_set1_epi16(shift << 7);
    least_ = _mm512_set1_epi16((shift + 1) << 7);
    const bool is_finite = exponent < 255;
    scale = is_finite ? std::ldexp(1.f, shift + kBias - 127) : std::numeric_limits<float>::quiet_NaN();
  }

  // 32 of them
  __m512i operator()(__m512i x) const {
    const __m512i size = _mm512_and_si512(x, _mm512_set1_epi16(kSize));
    const __m512i half = _mm512_maskz_slli_epi16(_mm512_cmpge_epu16_mask(size, least_),
                                                 _mm512_sub_epi16(size, shift_), 3);
    return _mm512_or_si512(half, _mm512_andnot_si512(_mm512_set1_epi16(kSize), x));
  }

  float scale;

 private:
  static constexpr int kBias = 15;  // of a half's exponent
  static constexpr int16_t kSize = 0x7fff;

  static uint32_t largest(const c10::BFloat16* x, int64_t n) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t j = 0; j < n; j += 32) {
      const __m512i some = _mm512_maskz_loadu_epi16(lanes_left(n, j), x + j);
      most = _mm512_max_epu16(most, _mm512_and_si512(some, _mm512_set1_epi16(kSize)));
    }
    return _mm512_reduce_max_epu32(_mm512_max_epu32(
        _mm512_srli_epi32(most, 16), _mm512_and_si512(most, _mm512_set1_epi32(0xffff))));
  }

  __m512i shift_, least_;
};

inline void store_halves(__m512i halves, __mmask32 lanes, c10::Half* to) {
  _mm512_mask_storeu_epi16(to, lanes, halves);
}

inline void store_twice(__m256i halves, Twice* to) {
  const __m512i half = _mm512_cvtepu16_epi32(halves);
  _mm512_storeu_si512(to, _mm512_or_si512(half, _mm512_slli_epi32(half, 16)));
}

inline void store_halves(__m512i halves, __mmask32 lanes, Twice* to) {
  store_twice(_mm512_castsi512_si256(halves), to);
  if (lanes >> 16) store_twice(_mm512_extracti64x4_epi64(halves, 1), to + 16);
}

// x [n] as halves, once or twice each, n a multiple of 16; returns what they are to be multiplied by.
template <typename To>
float halve(const c10::BFloat16* x, int64_t n, To* to) {
  const Halving halving(x, n);
  for (int64_t j = 0; j < n; j += 32) {
    const __mmask32 lanes = lanes_left(n, j);
    store_halves(halving(_mm512_maskz_loadu_epi16(lanes, x + j)), lanes, to + j);
  }
  return halving.scale;
}

// 16 floats below 2^5
inline void store_twice(__m512 x, Twice* to) {
  store_twice(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT), to);
}

}  // namespace coppice
