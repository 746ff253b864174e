// Linear layers of int8: y = x W^T with one scale for each token of x and for each row of W.
//
//   q = round(x / scale of the token)       int8 in [-127, 127]; scale = largest |x| / 127
//   sums = q . w                            int32 by brgemm (oneDNN), exact in any order
//   y = sums * scale of x * scale of w + b  float32, then the epilogue, rounded once
//
// As `Int8Linear` of model/int8.py computes. brgemm multiplies unsigned by signed bytes: q is kept
// as q + 128 and 128 times the sum of each row of W is taken off again. Weights lie in blocks of 64
// outputs, four inputs side by side, [K / 4, 64, 4], as VNNI and AMX take them.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "exp2.h"
#include "rules.h"

namespace {

using at::BFloat16;
using at::Tensor;

constexpr int64_t kLanes = 16;
constexpr int64_t kWide = 64;        // outputs of a block
constexpr int64_t kTokens = 48;      // most tokens of a task
constexpr int64_t kStep = 16;        // tokens of a GEMM are a multiple of it, but for the last ones
constexpr int64_t kTasksAThread = 6; // so that no thread waits long for the last one
constexpr int32_t kZero = 128;

__m512 load(const float* from) { return _mm512_loadu_ps(from); }
__m512 load(const BFloat16* from) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

void store(__m512 x, float* to) { _mm512_storeu_ps(to, x); }
void store(__m512 x, BFloat16* to) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
#else
  alignas(64) std::array<float, kLanes> rounded;
  _mm512_store_ps(rounded.data(), x);
  std::copy(rounded.begin(), rounded.end(), to);
#endif
}

// ---------------------------------------------------------------- tokens

// q [n] of one row; returns its scale. A row without finite numbers gives NaN everywhere.
template <typename T>
float quantize(const T* x, int64_t n, uint8_t* q) {
  __m512 most = _mm512_setzero_ps();
  __mmask16 is_bad = 0;
  for (int64_t j = 0; j < n; j += kLanes) {
    const __m512 part = _mm512_abs_ps(load(x + j));
    is_bad |= _mm512_cmp_ps_mask(part, _mm512_set1_ps(std::numeric_limits<float>::infinity()),
                                 _CMP_NLT_UQ);
    most = _mm512_max_ps(most, part);
  }
  if (is_bad) {
    std::fill(q, q + n, uint8_t(kZero));
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float top = _mm512_reduce_max_ps(most);
  const __m512 factor = _mm512_set1_ps(top > 0.f ? 127.f / top : 0.f);
  const __m512i zero = _mm512_set1_epi32(kZero);
  for (int64_t j = 0; j < n; j += kLanes) {
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(load(x + j), factor));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + j),
                     _mm512_cvtusepi32_epi8(_mm512_add_epi32(rounded, zero)));
  }
  return top / 127.f;
}

struct Tokens {
  std::vector<uint8_t> q;    // [n, k]
  std::vector<float> scale;  // [n]
};

template <typename T>
void quantize(const Tensor& x, Tokens& tokens) {
  const int64_t n = x.size(0), k = x.size(1);
  const T* from = x.const_data_ptr<T>();
  at::parallel_for(0, n, kStep, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      tokens.scale[i] = quantize(from + i * k, k, tokens.q.data() + i * k);
  });
}

// ---------------------------------------------------------------- products

struct Weights {
  const int8_t* blocks;  // [B, K / 4, 64, 4]
  const float* scale;    // [B * 64]
  const int32_t* zero;   // [B * 64], 128 times the sum of a row
  const float* bias;     // [B * 64]
};

// sums [rows, 64] = q [rows, k] . block. oneDNN compiles every shape once, so few are asked for.
void multiply(int64_t rows, int64_t k, const uint8_t* q, const int8_t* block, int32_t* sums) {
  const int64_t whole = rows / kStep * kStep;
  for (auto [low, count] : {std::pair{int64_t(0), whole}, std::pair{whole, rows - whole}})
    if (count)
      at::native::cpublas::brgemm(count, kWide, k, k, kWide, kWide, /*add_C=*/false, q + low * k,
                                  block, sums + low * kWide, /*is_vnni=*/true);
}

// 16 outputs from `column` on, before the epilogue
__m512 scaled(const int32_t* sums, const Weights& w, int64_t column, float row_scale) {
  const __m512i zero = _mm512_loadu_si512(w.zero + column);
  const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(sums), zero));
  const __m512 y = _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_set1_ps(row_scale)),
                                 _mm512_loadu_ps(w.scale + column));
  return _mm512_add_ps(y, _mm512_loadu_ps(w.bias + column));
}

__m512 silu(__m512 x) {
  const __m512 power = coppice::exp2<true>(_mm512_mul_ps(x, _mm512_set1_ps(-coppice::kLog2E)));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.f), power));
}

enum class Epilogue { kNone, kPlus, kGated };

// out [n, m] of T; `other` [n, m] is added by kPlus. kGated: blocks of gate and up take turns.
template <typename T, Epilogue kEpilogue>
void multiply(const Tokens& tokens, int64_t k, const Weights& w, const T* other, T* out, int64_t n,
              int64_t m) {
  constexpr bool kGated = kEpilogue == Epilogue::kGated;
  const int64_t blocks = (m + kWide - 1) / kWide, threads = at::get_num_threads();
  int64_t tall = kTokens;
  while (tall > kStep && blocks * ((n + tall - 1) / tall) < kTasksAThread * threads) tall -= kStep;
  const int64_t stacks = (n + tall - 1) / tall;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    alignas(64) std::array<int32_t, kTokens * kWide> sums, gates;
    for (int64_t task; (task = next++) < blocks * stacks;) {
      const int64_t b = task / stacks, low = task % stacks * tall, rows = std::min(tall, n - low);
      const int64_t place = kGated ? 2 * b + 1 : b;
      const uint8_t* q = tokens.q.data() + low * k;
      if (kGated) multiply(rows, k, q, w.blocks + (place - 1) * k * kWide, gates.data());
      multiply(rows, k, q, w.blocks + place * k * kWide, sums.data());
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < std::min(kWide, m - b * kWide); c += kLanes) {
          const float scale = tokens.scale[low + r];
          const int64_t to = (low + r) * m + b * kWide + c, column = place * kWide + c;
          __m512 y = scaled(sums.data() + r * kWide + c, w, column, scale);
          if (kEpilogue == Epilogue::kPlus) y = _mm512_add_ps(y, load(other + to));
          if (kGated)
            y = _mm512_mul_ps(
                y, silu(scaled(gates.data() + r * kWide + c, w, column - kWide, scale)));
          store(y, out + to);
        }
    }
    at::native::cpublas::brgemm_release(/*is_vnni=*/true);
  });
}

template <typename T>
void apply(const Tensor& x, const Weights& w, const std::optional<Tensor>& other, bool is_gated,
           Tensor& out) {
  const int64_t n = x.size(0), k = x.size(1), m = out.size(1);
  Tokens tokens{std::vector<uint8_t>(n * k), std::vector<float>(n)};
  quantize<T>(x, tokens);
  T* to = out.mutable_data_ptr<T>();
  if (is_gated) return multiply<T, Epilogue::kGated>(tokens, k, w, nullptr, to, n, m);
  if (!other) return multiply<T, Epilogue::kNone>(tokens, k, w, nullptr, to, n, m);
  multiply<T, Epilogue::kPlus>(tokens, k, w, other->const_data_ptr<T>(), to, n, m);
}

// x [N, K] and other [N, outputs], dense; blocks [B, K / 4, 64, 4] int8; scale, zero and bias for
// each row of them. Returns [N, outputs] of x's type: y, y + other, or silu(gate) * up.
Tensor int8_linear(const Tensor& x, const Tensor& blocks, const Tensor& scale, const Tensor& zero,
                   const Tensor& bias, int64_t outputs,
                   const std::optional<Tensor>& other, bool is_gated) {
  TORCH_CHECK(x.is_contiguous() && x.size(1) == blocks.size(1) * 4, "x does not fit the weights");
  TORCH_CHECK(x.size(1) % kLanes == 0 && outputs % kLanes == 0, "sizes are no multiples of 16");
  TORCH_CHECK(!other || other->is_contiguous(), "other must be dense");
  Tensor out = at::empty({x.size(0), outputs}, x.options());
  const Weights w{blocks.const_data_ptr<int8_t>(), scale.const_data_ptr<float>(),
                  zero.const_data_ptr<int32_t>(), bias.const_data_ptr<float>()};
  x.scalar_type() == at::kBFloat16 ? apply<BFloat16>(x, w, other, is_gated, out)
                                   : apply<float>(x, w, other, is_gated, out);
  return out;
}

}  // namespace

#ifdef __AVX512VNNI__  // or brgemm knows no bytes
TORCH_LIBRARY_FRAGMENT(coppice, m) {
  m.def(
      "int8_linear(Tensor x, Tensor blocks, Tensor scale, Tensor zero, Tensor bias, int outputs, "
      "Tensor? other, bool is_gated) -> Tensor",
      &int8_linear);
}
#endif
