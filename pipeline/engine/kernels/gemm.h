// GEMMs of float32 in registers, c [rows, n] = a [rows, depth] b [depth, n] (+ c).
//
// Every number is one chain of fused multiply-adds over the depth, so neither what is computed beside
// it nor a cut of the depth changes a bit. b may be bfloat16 of which two inputs lie side by side,
// [depth / 2, n, 2]: it is widened in registers, so that the products are exact.

#pragma once

#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "floats.h"

namespace coppice {

constexpr int64_t kLine = 64;  // bytes of a cache line

// How many rows and vectors of 16 columns are summed at a time: they fill the registers, and the
// wider is a row, the fewer are loaded again; pairs cost more to widen than rows to load.
template <typename B>
struct Block;

template <>
struct Block<float> {
  static constexpr int kRows = 6, kVectors = 4;
  static constexpr int64_t kStep = 1;  // inputs of one load

  static __m512 load(const float* b, int64_t) { return _mm512_loadu_ps(b); }
};

template <>
struct Block<c10::BFloat16> {
  static constexpr int kRows = 12, kVectors = 2;
  static constexpr int64_t kStep = 2;

  static __m512 load(const c10::BFloat16* b, int64_t part) {
    return widen_one(_mm512_loadu_si512(b), part);
  }
};

// R rows and V vectors; only lanes `last` of the last vector count. `ldb`: columns of b. `soon`: what
// will be wanted from memory. A line of it is asked for in each step: a core that asks for many waits.
template <int R, int V, typename B>
void multiply_block(int64_t depth, const float* a, int64_t lda, const B* b, int64_t ldb, float* c,
                    int64_t ldc, __mmask16 last, bool add, const char* soon) {
  constexpr int64_t kStep = Block<B>::kStep;
  const auto lanes = [&](int j) { return j + 1 < V ? __mmask16(0xffff) : last; };
  __m512 sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j)
      sum[r][j] = add ? _mm512_maskz_loadu_ps(lanes(j), c + r * ldc + j * 16) : _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k += kStep, b += kStep * ldb, soon += kLine) {
    _mm_prefetch(soon, _MM_HINT_T1);
#pragma GCC unroll 2
    for (int64_t part = 0; part < kStep; ++part) {
      __m512 row[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) row[j] = Block<B>::load(b + j * 16 * kStep, part);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512 factor = _mm512_set1_ps(a[r * lda + k + part]);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sum[r][j] = _mm512_fmadd_ps(factor, row[j], sum[r][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j)
      _mm512_mask_storeu_ps(c + r * ldc + j * 16, lanes(j), sum[r][j]);
}

template <typename B, int... I>
constexpr auto make_blocks(std::integer_sequence<int, I...>) {
  constexpr int V = Block<B>::kVectors;
  return std::array{&multiply_block<I / V + 1, I % V + 1, B>...};
}

// b has whole vectors of columns; of pairs, an even depth. `next`: the b of a later call, all columns of
// it, to be asked for; null: none.
template <typename B>
void multiply(int64_t rows, int64_t n, int64_t depth, const float* a, int64_t lda, const B* b,
              int64_t ldb, float* c, int64_t ldc, bool add, const B* next = nullptr) {
  constexpr int64_t R = Block<B>::kRows, V = Block<B>::kVectors;
  static constexpr auto kBlocks = make_blocks<B>(std::make_integer_sequence<int, R * V>{});
  const auto* here = reinterpret_cast<const char*>(b);  // to ask for what is there costs nothing
  const auto *soon = next ? reinterpret_cast<const char*>(next) : here, *end = soon;
  if (next) end += depth * ldb * sizeof(B);
  for (int64_t column = 0; column < n; column += 16 * V)
    for (int64_t row = 0; row < rows; row += R) {
      const int64_t count = std::min(R, rows - row), width = std::min(16 * V, n - column);
      const int64_t vectors = (width + 15) / 16;
      kBlocks[(count - 1) * V + vectors - 1](
          depth, a + row * lda, lda, b + column * Block<B>::kStep, ldb, c + row * ldc + column, ldc,
          __mmask16(0xffff >> (vectors * 16 - width)), add,
          soon < end ? soon : here);
      soon += depth / Block<B>::kStep * kLine;
    }
}

}  // namespace coppice
