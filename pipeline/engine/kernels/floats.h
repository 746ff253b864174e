// 16 numbers of the model's type as floats, and back.

#pragma once

#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>

namespace coppice {

inline __m512 load_floats(const float* from) { return _mm512_loadu_ps(from); }

inline __m512 load_floats(const c10::BFloat16* from) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

// Of 16 pairs of bfloat16, all first ones or all second ones as floats.
inline __m512 widen_one(__m512i pairs, bool second) {
  return _mm512_castsi512_ps(second ? _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000))
                                    : _mm512_slli_epi32(pairs, 16));
}

inline void store_floats(__m512 x, float* to) { _mm512_storeu_ps(to, x); }

inline void store_floats(__m512 x, c10::BFloat16* to) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
#else
  alignas(64) std::array<float, 16> rounded;
  _mm512_store_ps(rounded.data(), x);
  std::copy(rounded.begin(), rounded.end(), to);
#endif
}

// The first n <= 16 of them.
template <typename T>
__m512 load_floats(const T* from, int64_t n) {
  if (n >= 16) return load_floats(from);
  std::array<T, 16> some{};
  std::copy_n(from, n, some.begin());
  return load_floats(some.data());
}

template <typename T>
void store_floats(__m512 x, T* to, int64_t n) {
  if (n >= 16) return store_floats(x, to);
  std::array<T, 16> all;
  store_floats(x, all.data());
  std::copy_n(all.begin(), n, to);
}

}  // namespace coppice
