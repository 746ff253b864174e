// GEMMs in registers, c [rows, n] = a [rows, depth] b [depth, n] (+ c), c float32.
//
// Of float32 every number is one chain of fused multiply-adds over the depth, so neither what is
// computed beside it nor a cut of the depth changes a bit. b may be bfloat16 of which two inputs lie
// side by side, [depth / 2, n, 2]: it is widened in registers, so that the products are exact.
//
// Of halves (halves.h) a chain is 32 inputs long; what it gives is added to c in float32. A sum of 32
// loses half of what rounding a factor to bfloat16 did (LOG.md). Nothing beside it changes a bit.

#pragma once

#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <utility>

#include "floats.h"
#include "halves.h"

namespace coppice {

constexpr int64_t kLine = 64;  // bytes of a cache line

// How a block of c is computed, kRows x kVectors of kLanes columns at a time: they fill the registers,
// and the wider is a row, the fewer are loaded again; pairs cost more to widen than rows to load. A step
// loads kStep inputs; a chain has kChain of them.
struct FloatBlock {
  using Factor = float;
  using Vector = __m512;
  static constexpr int64_t kLanes = 16, kChain = std::numeric_limits<int64_t>::max();

  static __m512 begin(const float* c, __mmask32 lanes, bool add) {
    return add ? _mm512_maskz_loadu_ps(__mmask16(lanes), c) : _mm512_setzero_ps();
  }
  static __m512 repeat(float a) { return _mm512_set1_ps(a); }
  static __m512 multiply_add(__m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }
  static void end(__m512 sum, float* c, __mmask32 lanes, bool, float) {
    _mm512_mask_storeu_ps(c, __mmask16(lanes), sum);
  }
};

template <typename B>
struct Block;

template <>
struct Block<float> : FloatBlock {
  static constexpr int kRows = 6, kVectors = 4;
  static constexpr int64_t kStep = 1;

  static __m512 load(const float* b, int64_t) { return _mm512_loadu_ps(b); }
};

template <>
struct Block<c10::BFloat16> : FloatBlock {
  static constexpr int kRows = 12, kVectors = 2;
  static constexpr int64_t kStep = 2;

  static __m512 load(const c10::BFloat16* b, int64_t part) {
    return widen_one(_mm512_loadu_si512(b), part);
  }
};

#ifdef __AVX512FP16__
template <>
struct Block<c10::Half> {
  using Factor = Twice;
  using Vector = __m512h;
  static constexpr int kRows = 12, kVectors = 2;
  static constexpr int64_t kLanes = 32, kStep = 1, kChain = 32;

  static __m512h load(const c10::Half* b, int64_t) { return _mm512_loadu_ph(b); }
  static __m512h begin(const float*, __mmask32, bool) { return _mm512_setzero_ph(); }
  static __m512h repeat(Twice a) { return (__m512h)_mm512_set1_epi32(int32_t(a)); }
  static __m512h multiply_add(__m512h a, __m512h b, __m512h sum) {
    return _mm512_fmadd_ph(a, b, sum);
  }
  static void end(__m512h sum, float* c, __mmask32 lanes, bool add, float scale) {
    const __m512i both = (__m512i)sum;
    end(_mm512_castsi512_si256(both), c, __mmask16(lanes), add, scale);
    end(_mm512_extracti64x4_epi64(both, 1), c + 16, __mmask16(lanes >> 16), add, scale);
  }

 private:
  static void end(__m256i sum, float* c, __mmask16 lanes, bool add, float scale) {
    const __m512 there = add ? _mm512_maskz_loadu_ps(lanes, c) : _mm512_setzero_ps();
    _mm512_mask_storeu_ps(
        c, lanes, _mm512_fmadd_ps(_mm512_cvtph_ps(sum), _mm512_set1_ps(scale), there));
  }
};
#endif

// R rows and V vectors; only lanes `last` of the last vector count. `ldb`: columns of b. `soon`: what
// will be wanted from memory. A line of it is asked for in each step: a core that asks for many waits.
template <int R, int V, typename B>
void multiply_block(int64_t depth, const typename Block<B>::Factor* a, int64_t lda, const B* b,
                    int64_t ldb, float* c, int64_t ldc, __mmask32 last, bool add, float scale,
                    const char* soon) {
  using Kind = Block<B>;
  using Vector = typename Kind::Vector;
  const auto lanes = [&](int j) { return j + 1 < V ? __mmask32(-1) : last; };
  int64_t k = 0;
  do {
    Vector sum[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j)
        sum[r][j] = Kind::begin(c + r * ldc + j * Kind::kLanes, lanes(j), add);
    const int64_t end = depth - k > Kind::kChain ? k + Kind::kChain : depth;
    for (; k < end; k += Kind::kStep, b += Kind::kStep * ldb, soon += kLine) {
      _mm_prefetch(soon, _MM_HINT_T1);
#pragma GCC unroll 2
      for (int64_t part = 0; part < Kind::kStep; ++part) {
        Vector row[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) row[j] = Kind::load(b + j * Kind::kLanes * Kind::kStep, part);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const Vector factor = Kind::repeat(a[r * lda + k + part]);
#pragma GCC unroll 4
          for (int j = 0; j < V; ++j) sum[r][j] = Kind::multiply_add(factor, row[j], sum[r][j]);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j)
        Kind::end(sum[r][j], c + r * ldc + j * Kind::kLanes, lanes(j), add, scale);
    add = true;
  } while (k < depth);
}

template <typename B, int... I>
constexpr auto make_blocks(std::integer_sequence<int, I...>) {
  constexpr int V = Block<B>::kVectors;
  return std::array{&multiply_block<I / V + 1, I % V + 1, B>...};
}

// b has whole vectors of columns; of pairs, an even depth. `scale`: what a b is multiplied by; 1 but for
// halves. `next`: the b of a later call, all columns of it, to be asked for; null: none.
template <typename B>
void multiply(int64_t rows, int64_t n, int64_t depth, const typename Block<B>::Factor* a,
              int64_t lda, const B* b, int64_t ldb, float* c, int64_t ldc, bool add,
              float scale = 1.f, const B* next = nullptr) {
  constexpr int64_t R = Block<B>::kRows, V = Block<B>::kVectors, kLanes = Block<B>::kLanes;
  static constexpr auto kBlocks = make_blocks<B>(std::make_integer_sequence<int, R * V>{});
  const auto* here = reinterpret_cast<const char*>(b);  // to ask for what is there costs nothing
  const auto *soon = next ? reinterpret_cast<const char*>(next) : here, *end = soon;
  if (next) end += depth * ldb * sizeof(B);
  for (int64_t column = 0; column < n; column += kLanes * V)
    for (int64_t row = 0; row < rows; row += R) {
      const int64_t count = std::min(R, rows - row), width = std::min(kLanes * V, n - column);
      const int64_t vectors = (width + kLanes - 1) / kLanes;
      kBlocks[(count - 1) * V + vectors - 1](
          depth, a + row * lda, lda, b + column * Block<B>::kStep, ldb, c + row * ldc + column, ldc,
          __mmask32((uint64_t(1) << (width - (vectors - 1) * kLanes)) - 1), add, scale,
          soon < end ? soon : here);
      soon += depth / Block<B>::kStep * kLine;
    }
}

}  // namespace coppice
