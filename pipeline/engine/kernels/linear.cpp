// Linear layers, y = x W^T + b, on blocks of W.
//
// A block is 64 outputs; so many inputs as fill 32 bits lie side by side in it, [K / n, 64, n]. A task
// is a few tokens and one block; threads take the next one that is left.
//
//   float32    sums = x . w                             by chains of FMA (gemm.h), in one order
//              y = sums + b
//   bfloat16   in the way that is fastest here (bfloat16.cpp):
//              by brgemm (oneDNN, so by AVX-512 BF16 or AMX), a piece of the depth after another;
//              as halves (halves.h), by a power of two for each token and each output;
//              or as float32, x and w widened
//   int8       q = round(x / scale of the token)        in [-127, 127]; scale = largest |x| / 127
//              sums = q . w                             int32, exact in any order
//              y = sums * scale of x * scale of w + b
//
// then the epilogue in float32, rounded once. int8 is what `Int8Linear` of model/int8.py computes, by
// brgemm (VNNI or AMX), which multiplies unsigned by signed bytes: q is kept as q + 128, and 128 times
// the sum of each row of W is taken off again.

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <utility>

#include "exp2.h"
#include "floats.h"
#include "gemm.h"
#include "halves.h"
#include "pool.h"
#include "rules.h"

namespace {

using at::BFloat16;
using at::Tensor;
using coppice::Kept;
using coppice::load_floats;
using coppice::store_floats;
using coppice::Twice;

constexpr int64_t kLanes = 16;
constexpr int64_t kWide = 64;         // outputs of a block
constexpr int64_t kTokens = 48;       // most tokens of a task
constexpr int64_t kStep = 16;         // tokens of a brgemm are a multiple of it, but for the last ones
constexpr int64_t kDepth = 1024;      // inputs of a GEMM of bfloat16: its operands stay in the cache
constexpr int64_t kGroup = 1 << 19;   // bytes of x, a part of a core's second cache
constexpr int64_t kTasksAThread = 6;  // so that no thread waits long for the last one
constexpr int32_t kZero = 128;

// ---------------------------------------------------------------- tokens

// q [n] of one row; returns its scale. A row without finite numbers gives NaN everywhere.
template <typename T>
float quantize(const T* x, int64_t n, uint8_t* q) {
  __m512 most = _mm512_setzero_ps();
  __mmask16 is_bad = 0;
  for (int64_t j = 0; j < n; j += kLanes) {
    const __m512 part = _mm512_abs_ps(load_floats(x + j));
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
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(load_floats(x + j), factor));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + j),
                     _mm512_cvtusepi32_epi8(_mm512_add_epi32(rounded, zero)));
  }
  return top / 127.f;
}

float quantize(const BFloat16* x, int64_t n, Twice* q) { return coppice::halve(x, n, q); }

template <typename Q>
struct Tokens {
  Tokens(int64_t n, int64_t k) : q(new Q[n * k]), scale(new float[n]) {}

  std::unique_ptr<Q[]> q;          // [n, k]
  std::unique_ptr<float[]> scale;  // [n]
};

template <typename T, typename Q>
std::shared_ptr<Tokens<Q>> quantize(const Tensor& x) {
  const int64_t n = x.size(0), k = x.size(1);
  auto tokens = std::make_shared<Tokens<Q>>(n, k);
  const T* from = x.const_data_ptr<T>();
  Tokens<Q>* to = tokens.get();
  coppice::in_rows(n, kStep, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      to->scale[i] = quantize(from + i * k, k, to->q.get() + i * k);
  });
  return tokens;
}

// ---------------------------------------------------------------- kinds of layers

// A GEMM of `rows` tokens, given a function of (first token, tokens). oneDNN compiles every shape
// once, so few are asked for.
template <typename Multiply>
void in_steps(int64_t rows, Multiply multiply) {
  const int64_t whole = rows / kStep * kStep;
  if (whole) multiply(0, whole);
  if (whole < rows) multiply(whole, rows - whole);
}

// What brgemm holds of a thread.
struct Brgemm {
  ~Brgemm() { at::native::cpublas::brgemm_release(/*is_vnni=*/true); }
};

struct Nothing {};

struct Biased {
  using Sum = float;
  const float* bias;  // [B, 64]

  // 16 outputs of a token, from `column` on, before the epilogue
  __m512 outputs(const float* sums, int64_t, int64_t column) const {
    return _mm512_add_ps(_mm512_loadu_ps(sums), _mm512_loadu_ps(bias + column));
  }
};

struct Scaled {
  const float* scale;  // [B, 64]
  const float* bias;   // [B, 64]

  __m512 outputs(__m512 sums, float of_token, int64_t column) const {
    const __m512 y = _mm512_mul_ps(_mm512_mul_ps(sums, _mm512_set1_ps(of_token)),
                                   _mm512_loadu_ps(scale + column));
    return _mm512_add_ps(y, _mm512_loadu_ps(bias + column));
  }
};

// sums [rows, 64] of x [rows, k] and one block by gemm.h; block `next` will be wanted soon
template <typename W>
void multiply_block(const typename coppice::Block<W>::Factor* x, int64_t rows, int64_t k,
                    const W* blocks, int64_t block, int64_t next, float* sums) {
  coppice::multiply(rows, kWide, k, x, k, blocks + block * k * kWide, kWide, sums, kWide,
                    /*add=*/false, /*scale=*/1.f,
                    next == block ? nullptr : blocks + next * k * kWide);
}

// W: float or BFloat16
template <typename W>
struct FloatLayer : Biased {
  using Library = Nothing;
  static constexpr int64_t kLeast = coppice::Block<W>::kRows;  // tokens of a task, or a multiple
  std::shared_ptr<float[]> widened;  // what x is, unless it was float32
  const float* x;                    // [N, K]
  int64_t k;
  const W* blocks;  // [B, K / n, 64, n], n = 1 or 2

  int64_t bytes_a_token() const { return k * sizeof(float); }

  // sums [rows, 64] of tokens from `low` on and one block; block `next` will be wanted soon
  void multiply(int64_t low, int64_t rows, int64_t block, int64_t next, float* sums) const {
    multiply_block(x + low * k, rows, k, blocks, block, next, sums);
  }
};

struct BFloat16Layer : Biased {
  using Library = Brgemm;
  static constexpr int64_t kLeast = kStep;
  const BFloat16* x;  // [N, K]
  int64_t k;
  const BFloat16* blocks;  // [B, K / 2, 64, 2]

  int64_t bytes_a_token() const { return k * sizeof(BFloat16); }

  void multiply(int64_t low, int64_t rows, int64_t block, int64_t, float* sums) const {
    const BFloat16 *from = x + low * k, *w = blocks + block * k * kWide;
    for (int64_t d = 0; d < k; d += kDepth)
      in_steps(rows, [&](int64_t first, int64_t count) {
        at::native::cpublas::brgemm(count, kWide, std::min(kDepth, k - d), k, kWide, kWide,
                                    /*add_C=*/d > 0, from + first * k + d, w + d * kWide,
                                    sums + first * kWide, /*is_vnni=*/true);
      });
  }
};

#ifdef __AVX512FP16__
struct HalfLayer : Scaled {
  using Sum = float;
  using Library = Nothing;
  static constexpr int64_t kLeast = coppice::Block<at::Half>::kRows;
  std::shared_ptr<Tokens<Twice>> tokens;
  int64_t k;
  const at::Half* blocks;  // [B, K, 64]

  int64_t bytes_a_token() const { return k * sizeof(Twice); }

  void multiply(int64_t low, int64_t rows, int64_t block, int64_t next, float* sums) const {
    multiply_block(tokens->q.get() + low * k, rows, k, blocks, block, next, sums);
  }

  __m512 outputs(const float* sums, int64_t token, int64_t column) const {
    return Scaled::outputs(_mm512_loadu_ps(sums), tokens->scale[token], column);
  }
};
#endif

struct Int8Layer : Scaled {
  using Sum = int32_t;
  using Library = Brgemm;
  static constexpr int64_t kLeast = kStep;
  std::shared_ptr<Tokens<uint8_t>> tokens;
  int64_t k;
  const int8_t* blocks;  // [B, K / 4, 64, 4]
  const int32_t* zero;   // [B, 64], 128 times the sum of a row

  int64_t bytes_a_token() const { return k; }

  void multiply(int64_t low, int64_t rows, int64_t block, int64_t, int32_t* sums) const {
    in_steps(rows, [&](int64_t first, int64_t count) {
      at::native::cpublas::brgemm(count, kWide, k, k, kWide, kWide, /*add_C=*/false,
                                  tokens->q.get() + (low + first) * k, blocks + block * k * kWide,
                                  sums + first * kWide, /*is_vnni=*/true);
    });
  }

  __m512 outputs(const int32_t* sums, int64_t token, int64_t column) const {
    const __m512i whole =
        _mm512_sub_epi32(_mm512_loadu_si512(sums), _mm512_loadu_si512(zero + column));
    return Scaled::outputs(_mm512_cvtepi32_ps(whole), tokens->scale[token], column);
  }
};

// ---------------------------------------------------------------- tasks

__m512 silu(__m512 x) {
  const __m512 power = coppice::exp2<true>(_mm512_mul_ps(x, _mm512_set1_ps(-coppice::kLog2E)));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.f), power));
}

enum class Epilogue { kNone, kPlus, kGated };

// Of a task: the block of its outputs and where its weights are, its tokens [low, low + rows).
struct Part {
  int64_t block, place, low, rows;
};

// The sums of a task.
template <typename Layer>
struct Sums {
  alignas(64) std::array<typename Layer::Sum, kTokens * kWide> sums, gates;
  typename Layer::Library library;
};

// out [n, m] of T; `other` [n, m] is added by kPlus. kGated: blocks of gate and up take turns.
template <Epilogue kEpilogue, typename Layer, typename T>
void run(const Layer& layer, const T* other, T* out, int64_t n, int64_t m, const Kept& kept) {
  constexpr bool kGated = kEpilogue == Epilogue::kGated;
  constexpr int64_t kLeast = Layer::kLeast;
  if (!n) return;
  const int64_t blocks = (m + kWide - 1) / kWide, threads = coppice::num_threads();
  int64_t tall = kTokens;
  while (tall > kLeast && blocks * ((n + tall - 1) / tall) < kTasksAThread * threads) tall -= kLeast;
  const int64_t stacks = (n + tall - 1) / tall, tasks = blocks * stacks;
  tall = ((n + stacks - 1) / stacks + kLeast - 1) / kLeast * kLeast;  // of like height
  // A group of stacks, which stay in a core's cache, meets all blocks before the next one does.
  const int64_t most = std::max<int64_t>(1, kGroup / (tall * layer.bytes_a_token()));
  const auto part_of = [=](int64_t task) {
    const int64_t first = task / (blocks * most) * most, together = std::min(most, stacks - first);
    const int64_t place = task - first * blocks, b = place / together;
    const int64_t low = (first + place % together) * tall;
    return Part{b, kGated ? 2 * b + 1 : b, low, std::min(tall, n - low)};
  };
  using Own = Sums<Layer>;
  coppice::in_parallel(
      tasks, kept, [] { return std::make_unique<Own>(); },
      [=](std::unique_ptr<Own>& own, int64_t task) {
        const auto [b, place, low, rows] = part_of(task);
        const int64_t next = part_of(std::min(task + threads, tasks - 1)).place;
        if (kGated) layer.multiply(low, rows, place - 1, next - 1, own->gates.data());
        layer.multiply(low, rows, place, next, own->sums.data());
      },
      [=](std::unique_ptr<Own>& own, int64_t task) {
        const auto [b, place, low, rows] = part_of(task);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < std::min(kWide, m - b * kWide); c += kLanes) {
            const int64_t count = m - b * kWide - c;
            const int64_t to = (low + r) * m + b * kWide + c, column = place * kWide + c;
            __m512 y = layer.outputs(own->sums.data() + r * kWide + c, low + r, column);
            if (kEpilogue == Epilogue::kPlus) y = _mm512_add_ps(y, load_floats(other + to, count));
            if (kGated)
              y = _mm512_mul_ps(y, silu(layer.outputs(own->gates.data() + r * kWide + c, low + r,
                                                      column - kWide)));
            store_floats(y, out + to, count);
          }
      });
}

template <typename T, typename Layer>
void apply(const Layer& layer, const std::optional<Tensor>& other, bool is_gated, Tensor& out,
           const Kept& kept) {
  const int64_t n = out.size(0), m = out.size(1);
  T* to = out.mutable_data_ptr<T>();
  if (is_gated) return run<Epilogue::kGated, Layer, T>(layer, nullptr, to, n, m, kept);
  if (!other) return run<Epilogue::kNone, Layer, T>(layer, nullptr, to, n, m, kept);
  run<Epilogue::kPlus, Layer, T>(layer, other->const_data_ptr<T>(), to, n, m, kept);
}

// x [n] bfloat16 as float32
std::shared_ptr<float[]> widen(const Tensor& x) {
  auto widened = std::make_shared_for_overwrite<float[]>(x.numel());
  const BFloat16* from = x.const_data_ptr<BFloat16>();
  const int64_t k = x.size(1);
  coppice::in_rows(x.size(0), kStep, [=, to = widened.get()](int64_t begin, int64_t end) {
    for (int64_t j = begin * k; j < end * k; j += kLanes)
      _mm512_storeu_ps(to + j, load_floats(from + j));
  });
  return widened;
}

template <typename T>
void apply_int8(const Tensor& x, const Tensor& blocks, const Tensor& scale, const Tensor& zero,
                const Tensor& bias, const std::optional<Tensor>& other, bool is_gated,
                Tensor& out) {
  const Int8Layer layer{{scale.const_data_ptr<float>(), bias.const_data_ptr<float>()},
                        quantize<T, uint8_t>(x),
                        x.size(1),
                        blocks.const_data_ptr<int8_t>(),
                        zero.const_data_ptr<int32_t>()};
  apply<T>(layer, other, is_gated, out, {blocks.storage()});
}

Tensor make_out(const Tensor& x, const Tensor& blocks, int64_t outputs,
                const std::optional<Tensor>& other) {
  TORCH_CHECK(x.is_contiguous() && x.size(1) == blocks.size(1) * blocks.size(3),
              "x does not fit the weights");
  TORCH_CHECK(x.size(1) % kLanes == 0, "inputs are no multiple of 16");
  TORCH_CHECK(!other || other->is_contiguous(), "other must be dense");
  return at::empty({x.size(0), outputs}, x.options());
}

// x [N, K] and other [N, outputs], dense; blocks [B, K / n, 64, n], n = 2 of bfloat16 and 1 of
// float32; bias [B, 64] float32. Returns [N, outputs]: y, y + other, or silu(gate) * up.
[[maybe_unused]] Tensor bfloat16_linear(const Tensor& x, const Tensor& blocks, const Tensor& bias,
                                        int64_t outputs, const std::optional<Tensor>& other,
                                        bool is_gated) {
  Tensor out = make_out(x, blocks, outputs, other);
  const BFloat16Layer layer{{bias.const_data_ptr<float>()}, x.const_data_ptr<BFloat16>(), x.size(1),
                            blocks.const_data_ptr<BFloat16>()};
  apply<BFloat16>(layer, other, is_gated, out, {x.storage(), blocks.storage()});
  return out;
}

Tensor widened_linear(const Tensor& x, const Tensor& blocks, const Tensor& bias, int64_t outputs,
                      const std::optional<Tensor>& other, bool is_gated) {
  Tensor out = make_out(x, blocks, outputs, other);
  const auto widened = widen(x);
  const FloatLayer<BFloat16> layer{{bias.const_data_ptr<float>()}, widened, widened.get(),
                                   x.size(1), blocks.const_data_ptr<BFloat16>()};
  apply<BFloat16>(layer, other, is_gated, out, {blocks.storage()});
  return out;
}

#ifdef __AVX512FP16__
// As above; blocks [B, K, 64] of half precision, scale [B, 64] float32.
Tensor half_linear(const Tensor& x, const Tensor& blocks, const Tensor& scale, const Tensor& bias,
                   int64_t outputs, const std::optional<Tensor>& other, bool is_gated) {
  Tensor out = make_out(x, blocks, outputs, other);
  const HalfLayer layer{{scale.const_data_ptr<float>(), bias.const_data_ptr<float>()},
                        quantize<BFloat16, Twice>(x),
                        x.size(1),
                        blocks.const_data_ptr<at::Half>()};
  apply<BFloat16>(layer, other, is_gated, out, {blocks.storage()});
  return out;
}
#endif

Tensor float32_linear(const Tensor& x, const Tensor& blocks, const Tensor& bias, int64_t outputs,
                      const std::optional<Tensor>& other, bool is_gated) {
  Tensor out = make_out(x, blocks, outputs, other);
  const FloatLayer<float> layer{{bias.const_data_ptr<float>()}, nullptr, x.const_data_ptr<float>(),
                                x.size(1), blocks.const_data_ptr<float>()};
  apply<float>(layer, other, is_gated, out, {x.storage(), blocks.storage()});
  return out;
}

// x [N, K] bfloat16 or float32; blocks [B, K / 4, 64, 4] int8; scale and bias float32 and zero int32
// [B, 64]. Else as above.
[[maybe_unused]] Tensor int8_linear(const Tensor& x, const Tensor& blocks, const Tensor& scale,
                                    const Tensor& zero, const Tensor& bias, int64_t outputs,
                                    const std::optional<Tensor>& other, bool is_gated) {
  Tensor out = make_out(x, blocks, outputs, other);
  const auto apply_any = x.scalar_type() == at::kBFloat16 ? apply_int8<BFloat16> : apply_int8<float>;
  apply_any(x, blocks, scale, zero, bias, other, is_gated, out);
  return out;
}

}  // namespace

#define COPPICE_SCHEMA(name)                                                                     \
  name                                                                                           \
      "(Tensor x, Tensor blocks, Tensor bias, int outputs, Tensor? other, bool is_gated) -> Tensor"

TORCH_LIBRARY_FRAGMENT(coppice, m) {
  m.def(COPPICE_SCHEMA("float32_linear"), &float32_linear);
  m.def(COPPICE_SCHEMA("widened_linear"), &widened_linear);
#ifdef __AVX512BF16__  // without it, oneDNN's bfloat16 is slow
  m.def(COPPICE_SCHEMA("bfloat16_linear"), &bfloat16_linear);
#endif
#ifdef __AVX512FP16__
  m.def(
      "half_linear(Tensor x, Tensor blocks, Tensor scale, Tensor bias, int outputs, Tensor? other, "
      "bool is_gated) -> Tensor",
      &half_linear);
#endif
#ifdef __AVX512VNNI__  // without it, brgemm knows no bytes
  m.def(
      "int8_linear(Tensor x, Tensor blocks, Tensor scale, Tensor zero, Tensor bias, int outputs, "
      "Tensor? other, bool is_gated) -> Tensor",
      &int8_linear);
#endif
}
