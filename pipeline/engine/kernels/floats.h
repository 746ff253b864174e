// 16 numbers of the model's type as floats.

#pragma once

#include <c10/util/BFloat16.h>
#include <immintrin.h>

namespace coppice {

inline __m512 load_floats(const float* from) { return _mm512_loadu_ps(from); }

inline __m512 load_floats(const c10::BFloat16* from) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

}  // namespace coppice
