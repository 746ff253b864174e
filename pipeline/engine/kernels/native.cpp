// The CPU kernels: attention over a tree of KV ranges, and the element-wise steps around it.
//
// cascade_attention has the meaning of `attend_reference` in rules.py. A task is one tile of queries
// and one KV head; all query heads of a KV head are rows of one GEMM, so K and V are read once:
//
//   for each span of the tile, for each block of its keys:
//     S = Q K^T                  [rows, keys]   float32
//     P = exp(S * scale - m)     running maximum m (base 2, or a little less) and sum l of each
//                                row, float32
//     O = O * shrink + P V       [rows, d]      float32
//   out = O / l
//
// What a model holds as T is multiplied as O: bfloat16 by brgemm (oneDNN), or as half precision or
// float32 where that is faster (bfloat16.cpp), by gemm.h. Scores never leave the core's cache, and
// nothing is padded, copied or merged in memory.

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "exp2.h"
#include "floats.h"
#include "gemm.h"
#include "halves.h"
#include "pool.h"
#include "rules.h"

namespace {

using at::BFloat16;
using at::Half;
using at::Tensor;
using coppice::Kept;
using coppice::kLog2E;
using coppice::kUnseen;
using coppice::load_floats;
using coppice::multiply;
using coppice::Rules;
using coppice::Span;
using coppice::Twice;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLanes = Vec::size();
constexpr int64_t kRows = 48;  // queries of a GEMM; native_kernel.py cuts tiles to fit
constexpr int64_t kFew = 5;    // rows of a GEMM that needs no packed keys
// By so many powers of two m may fall behind, so that O is seldom shrunk (FlashAttention-4). Weights of
// half precision are below 2^5 then, as all of its numbers here.
constexpr float kSlack = coppice::kHalfBits;

// Whether brgemm multiplies, not gemm.h.
template <typename O>
constexpr bool kIsBrgemm = std::is_same_v<O, BFloat16>;
template <typename O>
constexpr bool kIsHalf = std::is_same_v<O, Half>;

// Queries and weights beside keys and values of O; Few: where a GEMM has few rows.
template <typename O>
using Row = std::conditional_t<kIsHalf<O>, Twice, O>;
template <typename O>
using Few = std::conditional_t<kIsHalf<O>, float, O>;

// Keys of a block: V as float32 stays in a core's first cache; a call of brgemm is worth more of them.
template <typename O>
constexpr int64_t kKeys = kIsBrgemm<O> ? 256 : 128;

// ---------------------------------------------------------------- rows of numbers

void load(const float* from, float* to, int64_t n) { std::copy(from, from + n, to); }

void load(const BFloat16* from, float* to, int64_t n) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
    const auto [low, high] =
        at::vec::convert_to_float<BFloat16>(at::vec::Vectorized<BFloat16>::loadu(from + j));
    low.store(to + j);
    high.store(to + j + kLanes);
  }
  for (; j < n; ++j) to[j] = from[j];
}

void load(const BFloat16* from, BFloat16* to, int64_t n) { std::copy(from, from + n, to); }

// Two vectors of 16, rounded to the type of the model.
void store(Vec low, Vec high, float* to) {
  low.store(to);
  high.store(to + kLanes);
}

void store(Vec low, Vec high, BFloat16* to) {
#ifdef __AVX512BF16__
  _mm512_storeu_ps(to, _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(high, low)));
#else
  at::vec::convert_from_float<BFloat16>(low, high).store(to);
#endif
}

void store(Vec low, Vec high, Twice* to) {
  coppice::store_twice(low, to);
  coppice::store_twice(high, to + kLanes);
}

void store(const float* from, float* to, int64_t n) { std::copy(from, from + n, to); }

void store(const float* from, BFloat16* to, int64_t n) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes)
    store(Vec::loadu(from + j), Vec::loadu(from + j + kLanes), to + j);
  for (; j < n; ++j) to[j] = from[j];
}

float sum(Vec x) {
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, x);
}

float largest(Vec x) {
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, x);
}

template <bool kExact>
Vec exp2(Vec x) {
  return coppice::exp2<kExact>(x);
}

// x / rms(x) * weight, in place
void normalize(float* x, const float* weight, int64_t n, float eps) {
  Vec squares(0.f);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vec part = Vec::loadu(x + j);
    squares = at::vec::fmadd(part, part, squares);
  }
  float total = sum(squares);
  for (; j < n; ++j) total += x[j] * x[j];
  const float factor = 1.f / std::sqrt(total / n + eps);
  for (j = 0; j < n; ++j) x[j] *= factor * weight[j];
}

// ---------------------------------------------------------------- operands of brgemm

// [rows, columns] -> [columns, to_stride]
void transpose(const float* from, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; i += 16)
    for (int64_t j = 0; j < columns; j += 16)
      at::vec::transpose_mxn<float>(
          from + i * columns + j, columns, to + j * to_stride + i, to_stride,
          std::min<int64_t>(16, rows - i), std::min<int64_t>(16, columns - j));
}

// K [n, d] -> K^T [d, stride], zeros from n to `padded`. Here and below: returns what products of what
// is packed are to be multiplied by.
float pack_keys(const float* k, int64_t n, int64_t padded, int64_t d, float* to, int64_t stride) {
  transpose(k, n, d, to, stride);
  if (n < padded)
    for (int64_t j = 0; j < d; ++j) std::fill(to + j * stride + n, to + j * stride + padded, 0.f);
  return 1.f;
}

// bfloat16: neighbours along the summed dimension lie side by side, [d / 2, stride, 2]
float pack_keys(const BFloat16* k, int64_t n, int64_t padded, int64_t d, BFloat16* to,
                int64_t stride) {
  return pack_keys(reinterpret_cast<const float*>(k), n, padded, d / 2,
                   reinterpret_cast<float*>(to), stride);
}

// bfloat16 widened. Pairs are transposed into the lower half of what becomes K^T, and leave it from the
// top on: row j of pairs is read before it is overwritten.
float pack_keys(const BFloat16* k, int64_t n, int64_t padded, int64_t d, float* to, int64_t stride) {
  const float* pairs = to + d / 2 * stride;
  pack_keys(reinterpret_cast<const float*>(k), n, padded, d / 2, to + d / 2 * stride, stride);
  for (int64_t j = 0; j < d / 2; ++j)
    for (int64_t i = 0; i < padded; i += kLanes) {
      const __m512i both = _mm512_loadu_si512(pairs + j * stride + i);
      float* even = to + 2 * j * stride + i;
      _mm512_storeu_ps(even, coppice::widen_one(both, false));
      _mm512_storeu_ps(even + stride, coppice::widen_one(both, true));
    }
  return 1.f;
}

// bfloat16 as halves. A row of pairs becomes two rows in its own place, once all of it is read.
float pack_keys(const BFloat16* k, int64_t n, int64_t padded, int64_t d, Half* to, int64_t stride) {
  pack_keys(k, n, padded, d, reinterpret_cast<BFloat16*>(to), stride);
  const coppice::Halving halving(k, n * d);
  for (int64_t j = 0; j < d; j += 2) {
    __m512i pairs[kKeys<Half> / kLanes];
    for (int64_t i = 0; i < padded; i += kLanes)
      pairs[i / kLanes] = halving(_mm512_loadu_si512(to + j * stride + 2 * i));
    for (int64_t i = 0; i < padded; i += kLanes) {
      const __m512i both = pairs[i / kLanes];
      auto* even = reinterpret_cast<__m256i*>(to + j * stride + i);
      auto* odd = reinterpret_cast<__m256i*>(to + (j + 1) * stride + i);
      _mm256_storeu_si256(even, _mm512_cvtepi32_epi16(both));
      _mm256_storeu_si256(odd, _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
    }
  }
  return halving.scale;
}

// V [n, d], as gemm.h wants it
template <typename T>
float pack_values(const T* v, int64_t n, int64_t, int64_t d, float* to) {
  load(v, to, n * d);
  return 1.f;
}

float pack_values(const BFloat16* v, int64_t n, int64_t, int64_t d, Half* to) {
  return coppice::halve(v, n * d, to);
}

// Rows of d numbers -> pairs of neighbours (even, odd), [d, 2]
void interleave(const uint16_t* even, const uint16_t* odd, int64_t d, uint16_t* to) {
  alignas(64) static constexpr auto kOrder = [] {
    std::array<uint16_t, 64> order{};
    for (int i = 0; i < 64; ++i) order[i] = i / 2 + 32 * (i % 2);
    return order;
  }();
  const __m512i front = _mm512_load_si512(kOrder.data());
  const __m512i back = _mm512_load_si512(kOrder.data() + 32);
  int64_t j = 0;
  for (; j + 32 <= d; j += 32) {
    const __m512i a = _mm512_loadu_si512(even + j), b = _mm512_loadu_si512(odd + j);
    _mm512_storeu_si512(to + 2 * j, _mm512_permutex2var_epi16(a, front, b));
    _mm512_storeu_si512(to + 2 * j + 32, _mm512_permutex2var_epi16(a, back, b));
  }
  for (; j < d; ++j) {
    to[2 * j] = even[j];
    to[2 * j + 1] = odd[j];
  }
}

// bfloat16: [padded / 2, d, 2], zeros beyond n
float pack_values(const BFloat16* v, int64_t n, int64_t padded, int64_t d, BFloat16* to) {
  const auto* from = reinterpret_cast<const uint16_t*>(v);
  auto* pairs = reinterpret_cast<uint16_t*>(to);
  for (int64_t i = 0; i + 1 < n; i += 2)
    interleave(from + i * d, from + (i + 1) * d, d, pairs + i * d);
  if (n % 2)
    for (int64_t j = 0; j < 2 * d; ++j)
      pairs[(n - 1) * d + j] = j % 2 ? 0 : from[(n - 1) * d + j / 2];
  const int64_t filled = (n + 1) / 2 * 2;
  std::fill(pairs + filled * d, pairs + padded * d, 0);
  return 1.f;
}

// C = A B (+ C), as gemm.h has it of float32; the scale is 1. oneDNN compiles every shape once, so only
// few shapes are asked for.
void multiply(int64_t m, int64_t n, int64_t k, const BFloat16* a, int64_t lda, const BFloat16* b,
              int64_t ldb, float* c, int64_t ldc, bool add, float) {
  const int64_t whole = m / 16 * 16;
  for (auto [low, count] : {std::pair{int64_t(0), whole}, std::pair{whole, m - whole}})
    if (count)
      at::native::cpublas::brgemm(count, n, k, lda, ldb, ldc, add, a + low * lda, b,
                                  c + low * ldc, /*is_vnni=*/true);
}

// Of brgemm; our own GEMMs take any number.
int64_t padded_keys(int64_t n) { return (n + 31) / 32 * 32; }

// ---------------------------------------------------------------- GEMMs of few rows

// A row's own keys serve the `rep` queries of one token: to bring them into the order of brgemm
// would cost more than the GEMM. They come from memory, so the next ones are asked for early,
// and a few at a time: a core waits where it has asked for many.

template <typename T>
void ask_for(const T* from, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(from + i);
}

// The part-th of `parts` shares of n numbers
template <typename T>
void ask_for_part(const T* from, int64_t n, int64_t part, int64_t parts) {
  const int64_t low = n * part / parts;
  ask_for(from + low, n * (part + 1) / parts - low);
}

// n numbers as O: themselves, or widened into `room`
template <typename O>
const O* as(const O* from, int64_t, O*) {
  return from;
}

const float* as(const BFloat16* from, int64_t n, float* room) {
  load(from, room, n);
  return room;
}

// sum + a . b, lane by lane; a step is one vector of T
__m512 multiply_add(const float* a, const float* b, __m512 sum) {
  return _mm512_fmadd_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b), sum);
}

#ifdef __AVX512BF16__
constexpr bool kHasDots = true;
__m512 multiply_add(const BFloat16* a, const BFloat16* b, __m512 sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
}
#else
constexpr bool kHasDots = false;
__m512 multiply_add(const BFloat16*, const BFloat16*, __m512 sum) { return sum; }
#endif

// x[i] summed over its lanes, into lane i
__m512 sum_each(__m512 (&x)[16]) {
  for (int i = 0; i < 8; ++i) {  // lanes (0, 1), (2, 3), .. of two sums side by side
    const __m512 a = x[2 * i], b = x[2 * i + 1];
    x[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(x[2 * i]), b = _mm512_castps_pd(x[2 * i + 1]);
    x[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i)
    x[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x88),
                       _mm512_shuffle_f32x4(x[0], x[1], 0xdd));
}

// `call` with the size of a head; usual sizes as constants, so that loops over them are unrolled.
template <typename Call>
void with_size(int64_t d, Call call) {
  if (d == 64) return call(std::integral_constant<int64_t, 64>());
  if (d == 128) return call(std::integral_constant<int64_t, 128>());
  call(d);
}

// scores [m, kKeys] = q [m, d] . k [n, d]; `room` for 16 keys
template <typename Size, typename T, typename O>
void score_few(int64_t m, int64_t n, Size d, const O* q, const T* k, const T* v, O* room,
               float* scores) {
  constexpr int64_t step = 64 / sizeof(O);
  for (int64_t first = 0; first < n; first += 16) {
    const int64_t count = std::min<int64_t>(16, n - first);
    ask_for(v + first * d, count * d);
    const O* keys = as(k + first * d, count * d, room);
    for (int64_t r = 0; r < m; ++r) {
      __m512 sums[16];
      for (int64_t i = 0; i < 16; ++i) {
        const O *query = q + r * d, *key = keys + std::min(i, count - 1) * d;
        sums[i] = _mm512_setzero_ps();
        for (int64_t j = 0; j < d; j += step) sums[i] = multiply_add(query + j, key + j, sums[i]);
      }
      _mm512_storeu_ps(scores + r * kKeys<O> + first, sum_each(sums));
    }
  }
}

// out [m, d] += weights [m, kKeys] . v [n, d]; `next` are keys that will be wanted soon
template <typename Size, typename T, typename O>
void add_few(int64_t m, int64_t n, Size d, const O* weights, const T* v, const T* next,
             int64_t num_next, O* room, float* out) {
  for (int64_t first = 0; first < n; first += 16) {
    const int64_t count = std::min<int64_t>(16, n - first);
    if (first < num_next) ask_for(next + first * d, std::min<int64_t>(16, num_next - first) * d);
    const O* values = as(v + first * d, count * d, room);
    for (int64_t r = 0; r < m; ++r)
      for (int64_t j = 0; j < d; j += 32) {
        __m512 low = _mm512_loadu_ps(out + r * d + j);
        __m512 high = _mm512_loadu_ps(out + r * d + j + 16);
        for (int64_t i = 0; i < count; ++i) {
          const __m512 weight = _mm512_set1_ps(float(weights[r * kKeys<O> + first + i]));
          low = _mm512_fmadd_ps(weight, load_floats(values + i * d + j), low);
          high = _mm512_fmadd_ps(weight, load_floats(values + i * d + j + 16), high);
        }
        _mm512_storeu_ps(out + r * d + j, low);
        _mm512_storeu_ps(out + r * d + j + 16, high);
      }
  }
}

// ---------------------------------------------------------------- cascade attention

struct Tile {
  int64_t q_lo, q_hi, span_lo, span_hi;
};

// Where results of a task go: rounded to the model's type, or as they are, float32, with their
// log-sum-exps of base 2, to be joined with others of their tokens (views.cpp).
template <typename T>
struct Results {
  T* out;        // [V, Hq, d]
  float* parts;  // [V, Hq, d] if not null
  float* lse;    // [V, Hq]
};

// Keys `[slot, slot + n)` of one span, for `count` rows from row `state` of the task.
struct Block {
  const Span* span;
  int64_t state, count, offset, slot, n;
};

// The state of one task: `rows` queries of one KV head and their running results.
template <typename O>
struct Task {
  std::vector<Row<O>> q;
  std::vector<Few<O>> few;  // q, where it is another type
  std::vector<O> k, v, p;
  std::vector<float> s, o, m, l, scale;
  std::vector<Block> blocks;
  int64_t d;

  ~Task() {
    if (kIsBrgemm<O>) at::native::cpublas::brgemm_release(/*is_vnni=*/true);
  }

  Task(int64_t max_rows, int64_t head_dim)
      : q(max_rows * head_dim), few(kIsHalf<O> ? max_rows * head_dim : 0), k(kKeys<O> * head_dim),
        v(kKeys<O> * head_dim), p(kIsBrgemm<O> ? kRows * kKeys<O> : 0), s(kRows * kKeys<O>),
        o(max_rows * head_dim), m(max_rows), l(max_rows), scale(max_rows, 1.f), d(head_dim) {}

  // Queries from `row` on, and weights of row r: if no wider than scores, in their place.
  template <typename P>
  const P* queries(int64_t row) const {
    if constexpr (std::is_same_v<P, Row<O>>) return q.data() + row * d;
    else return few.data() + row * d;
  }

  template <typename P>
  P* weights(int64_t r = 0) {
    if constexpr (kIsBrgemm<O>) return p.data() + r * kKeys<O>;
    else return reinterpret_cast<P*>(s.data()) + r * kKeys<O>;
  }

  // Turn scores [0, n) of row r into weights; keys [lo, hi) are seen. `unit`: what a score is worth.
  template <typename P>
  void weigh(int64_t r, int64_t state, int64_t lo, int64_t hi, int64_t padded, float unit,
             const Rules& rules) {
    float* x = s.data() + r * kKeys<O>;
    P* to = weights<P>(r);
    if (hi <= lo) {
      std::fill(to, to + padded, P(0));
      return;
    }
    float scale = unit * rules.scale * kLog2E;  // powers of two are cheaper than of e
    if (rules.softcap > 0) {
      const Vec inward(unit * rules.scale / rules.softcap), outward(rules.softcap * kLog2E);
      for (int64_t j = 0; j < padded; j += kLanes)
        ((Vec::loadu(x + j) * inward).tanh() * outward).store(x + j);
      scale = 1.f;
    }
    std::fill(x, x + lo, kUnseen);
    std::fill(x + hi, x + padded, kUnseen);
    __m512 best = _mm512_set1_ps(kUnseen), other = best;
    for (int64_t j = 0; j < padded; j += 2 * kLanes) {
      best = _mm512_max_ps(best, _mm512_loadu_ps(x + j));
      other = _mm512_max_ps(other, _mm512_loadu_ps(x + j + kLanes));
    }
    const float top = _mm512_reduce_max_ps(_mm512_max_ps(best, other)) * scale;
    if (!(top <= m[state] + kSlack)) {  // a NaN that no maximum shows makes its weight NaN
      const float factor = std::exp2(m[state] - top);
      const Vec shrink(factor);
      float* row = o.data() + state * d;
      for (int64_t j = 0; j < d; j += kLanes) (Vec::loadu(row + j) * shrink).store(row + j);
      l[state] *= factor;
      m[state] = top;
    }
    constexpr bool kExact = std::is_same_v<O, float>;
    const Vec factor(scale), base(-m[state]);
    Vec total(0.f), more(0.f);
    for (int64_t j = 0; j < padded; j += 2 * kLanes) {
      const Vec low = exp2<kExact>(at::vec::fmadd(Vec::loadu(x + j), factor, base));
      const Vec high = exp2<kExact>(at::vec::fmadd(Vec::loadu(x + j + kLanes), factor, base));
      total = total + low;
      more = more + high;
      store(low, high, to + j);
    }
    l[state] += sum(total + more);
  }
};

// All tiles of a forward; task i is KV head i % kv_heads of tile i / kv_heads.
template <typename T, typename O>
struct Attention {
  Results<T> results;
  const T *query, *keys, *values;
  int64_t q_stride, h_stride, k_stride, v_stride;  // of tokens and heads of queries, of KV heads
  const int64_t* positions;
  const Span* spans;
  const Tile* tiles;
  int64_t heads, kv_heads, rep, d;
  Rules rules;

  int64_t rows(const Tile& tile) const { return (tile.q_hi - tile.q_lo) * rep; }

  void compute(Task<O>& task, int64_t i) const {
    const Tile& tile = tiles[i / kv_heads];
    const int64_t h = i % kv_heads;
    start(task, tile, h);
    find_blocks(task, tile);
    for (size_t b = 0; b < task.blocks.size(); ++b)
      add(task, task.blocks[b], task.blocks[std::min(b + 1, task.blocks.size() - 1)], h);
  }

  void start(Task<O>& task, const Tile& tile, int64_t h) const {
    for (int64_t r = 0; r < rows(tile); ++r) {
      const int64_t head = h * rep + r % rep;
      const T* from = query + (tile.q_lo + r / rep) * q_stride + head * h_stride;
      if constexpr (kIsHalf<O>) {
        load(from, task.few.data() + r * d, d);
        task.scale[r] = coppice::halve(from, d, task.q.data() + r * d);
      } else {
        load(from, task.q.data() + r * d, d);
      }
      task.m[r] = rules.sinks ? rules.sinks[head] * kLog2E : kUnseen;
      task.l[r] = rules.sinks ? 1.f : 0.f;
    }
    std::fill_n(task.o.data(), rows(tile) * d, 0.f);
  }

  void find_blocks(Task<O>& task, const Tile& tile) const {
    task.blocks.clear();
    for (const Span* g = spans + tile.span_lo; g != spans + tile.span_hi; ++g) {
      const auto [first, last] = std::minmax_element(positions + g->q_lo, positions + g->q_hi);
      const int64_t offset = g->kv_lo - g->position;  // slot of prompt position 0
      const int64_t stop = std::min(g->kv_hi, offset + *last + 1);
      const int64_t start =
          rules.window ? std::max(g->kv_lo, offset + *first - rules.window + 1) : g->kv_lo;
      const int64_t state = (g->q_lo - tile.q_lo) * rep, count = (g->q_hi - g->q_lo) * rep;
      for (int64_t slot = start; slot < stop; slot += kKeys<O>)
        task.blocks.push_back({g, state, count, offset, slot, std::min(kKeys<O>, stop - slot)});
    }
  }

  void add(Task<O>& task, const Block& block, const Block& next, int64_t h) const {
    const T *k_next = keys + h * k_stride + next.slot * d, *k = keys + h * k_stride + block.slot * d;
    const T *v_next = values + h * v_stride + next.slot * d;
    const T* v = values + h * v_stride + block.slot * d;
    float* o = task.o.data() + block.state * d;
    const int64_t n = block.n, padded = padded_keys(n);
    const auto weigh = [&]<typename P>(int64_t row, int64_t place, int64_t width, float unit, P) {
      const int64_t now =
          block.offset + positions[block.span->q_lo + row / rep] - block.slot;
      const int64_t lo = rules.window ? std::max<int64_t>(0, now - rules.window + 1) : 0;
      task.template weigh<P>(place, block.state + row, lo, std::min(n, now + 1), width, unit, rules);
    };
    if (block.count <= kFew && d % 32 == 0 && (!kIsBrgemm<O> || kHasDots)) {
      using P = Few<O>;
      const auto* q = task.template queries<P>(block.state);
      with_size(d, [&](auto d) {
        score_few(block.count, n, d, q, k, v, reinterpret_cast<P*>(task.k.data()), task.s.data());
        for (int64_t r = 0; r < block.count; ++r) weigh(r, r, padded, 1.f, P());
        add_few(block.count, n, d, task.template weights<P>(), v, k_next, next.n,
                reinterpret_cast<P*>(task.v.data()), o);
      });
      return;
    }
    using P = Row<O>;
    const P* q = task.template queries<P>(block.state);
    const float k_scale = pack_keys(k, n, padded, d, task.k.data(), kKeys<O>);
    const float v_scale = pack_values(v, n, padded, d, task.v.data());
    for (int64_t low = 0; low < block.count; low += kRows) {
      const int64_t m = std::min(kRows, block.count - low);
      const int64_t* at = positions + block.span->q_lo + low / rep;
      const int64_t last = *std::max_element(at, at + (low + m - 1) / rep - low / rep + 1);
      // keys behind the last of these queries are not computed for them
      const int64_t seen = std::min(n, block.offset + last - block.slot + 1);
      if (seen <= 0) continue;
      const int64_t count = kIsBrgemm<O> ? padded_keys(seen) : seen;
      multiply(m, count, d, q + low * d, d, task.k.data(), kKeys<O>, task.s.data(), kKeys<O>, false,
               k_scale);
      for (int64_t r = 0; r < m; ++r) {
        if (block.count <= kRows) {
          ask_for_part(k_next, next.n * d, r, m);
          ask_for_part(v_next, next.n * d, r, m);
        }
        weigh(low + r, r, padded_keys(seen), task.scale[block.state + low + r], P());
      }
      multiply(m, d, count, task.template weights<P>(), kKeys<O>, task.v.data(), d, o + low * d, d,
               true, v_scale);
    }
  }

  void write(Task<O>& task, int64_t i) const {
    const Tile& tile = tiles[i / kv_heads];
    for (int64_t r = 0; r < rows(tile); ++r) {
      float* row = task.o.data() + r * d;
      const Vec share(task.l[r] == 0.f ? 0.f : 1.f / task.l[r]);
      for (int64_t j = 0; j < d; j += kLanes) (Vec::loadu(row + j) * share).store(row + j);
      const int64_t place = (tile.q_lo + r / rep) * heads + i % kv_heads * rep + r % rep;
      if (!results.parts) {
        store(row, results.out + place * d, d);
        continue;
      }
      store(row, results.parts + place * d, d);
      results.lse[place] = task.l[r] == 0.f ? kUnseen : task.m[r] + std::log2(task.l[r]);
    }
  }
};

template <typename T, typename O>
void attend(const Attention<T, O>& attention, int64_t num_tiles, const Kept& kept) {
  int64_t max_rows = 0;
  for (const Tile* t = attention.tiles; t != attention.tiles + num_tiles; ++t)
    max_rows = std::max(max_rows, attention.rows(*t));
  using Own = std::unique_ptr<Task<O>>;
  coppice::in_parallel(
      num_tiles * attention.kv_heads, kept,
      [=] { return std::make_unique<Task<O>>(max_rows, attention.d); },
      [=](Own& task, int64_t i) { attention.compute(*task, i); },
      [=](Own& task, int64_t i) { attention.write(*task, i); });
}

void attend(void* out, float* parts, float* lse, const Tensor& query, const Tensor& keys,
            const Tensor& values, const Tensor& positions, const Tensor& spans,
            const Tensor& tiles, const Rules& rules, const std::optional<Tensor>& sinks,
            c10::string_view way) {
  const int64_t heads = query.size(1), d = query.size(2), kv_heads = keys.size(0);
  TORCH_CHECK(d % kLanes == 0, "head size must be a multiple of ", kLanes);
  Kept kept{query.storage(), keys.storage(), values.storage(), positions.storage(),
            spans.storage(), tiles.storage()};
  if (sinks) kept.push_back(sinks->storage());
  const auto run = [&]<typename T, typename O>(T* to, O) {
    attend<T, O>({{to, parts, lse}, query.const_data_ptr<T>(), keys.const_data_ptr<T>(),
                  values.const_data_ptr<T>(), query.stride(0), query.stride(1), keys.stride(0),
                  values.stride(0), positions.const_data_ptr<int64_t>(),
                  reinterpret_cast<const Span*>(spans.const_data_ptr<int64_t>()),
                  reinterpret_cast<const Tile*>(tiles.const_data_ptr<int64_t>()), heads, kv_heads,
                  heads / kv_heads, d, rules},
                 tiles.size(0), kept);
  };
  if (query.scalar_type() != at::kBFloat16) return run(static_cast<float*>(out), 0.f);
  auto* to = static_cast<BFloat16*>(out);
  if (way == "widened") return run(to, 0.f);
#ifdef __AVX512FP16__
  if (way == "half") return run(to, Half());
#endif
  TORCH_CHECK(way == "bfloat16", "no such way of bfloat16: ", way);
  run(to, BFloat16());
}

// query [N, Hq, d] (last dimension dense); keys, values [Hkv, capacity, d], each head dense;
// positions [N], spans [S, 5], tiles [T, 4] int64. Returns [N, Hq, d].
Tensor cascade_attention(const Tensor& query, const Tensor& keys, const Tensor& values,
                         const Tensor& positions, const Tensor& spans, const Tensor& tiles,
                         double scale, int64_t window, double softcap,
                         const std::optional<Tensor>& sinks, c10::string_view way) {
  Tensor out = at::empty(query.sizes(), query.options());
  const Rules rules{float(scale), window, float(softcap),
                    sinks ? sinks->const_data_ptr<float>() : nullptr};
  attend(out.mutable_data_ptr(), nullptr, nullptr, query, keys, values, positions, spans, tiles,
         rules, sinks, way);
  return out;
}

// As cascade_attention, not yet joined by token and without sinks: parts [V, Hq, d] float32, and
// their log-sum-exps of base 2, [V, Hq] float32.
std::tuple<Tensor, Tensor> attend_views(const Tensor& query, const Tensor& keys,
                                        const Tensor& values, const Tensor& positions,
                                        const Tensor& spans, const Tensor& tiles, double scale,
                                        int64_t window, double softcap, c10::string_view way) {
  const auto options = query.options().dtype(at::kFloat);
  Tensor parts = at::empty(query.sizes(), options);
  Tensor lse = at::empty({query.size(0), query.size(1)}, options);
  attend(nullptr, parts.mutable_data_ptr<float>(), lse.mutable_data_ptr<float>(), query, keys,
         values, positions, spans, tiles, {float(scale), window, float(softcap), nullptr},
         std::nullopt, way);
  return {parts, lse};
}

// ---------------------------------------------------------------- around attention

template <typename T>
void norm_rows(const Tensor& x, const float* weight, float eps, const Tensor& out) {
  const int64_t n = x.size(1);
  const T* from = x.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  coppice::in_rows(x.size(0), 16, [=](int64_t begin, int64_t end) {
    std::vector<float> row(n);
    for (int64_t i = begin; i < end; ++i) {
      load(from + i * n, row.data(), n);
      normalize(row.data(), weight, n, eps);
      store(row.data(), to + i * n, n);
    }
  });
}

// x [N, n] dense, weight [n] float32 -> x / rms(x) * weight
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  Tensor out = at::empty_like(x);
  const float* w = weight.const_data_ptr<float>();
  x.scalar_type() == at::kBFloat16 ? norm_rows<BFloat16>(x, w, eps, out)
                                   : norm_rows<float>(x, w, eps, out);
  return out;
}

template <typename T>
void find_largest(const Tensor& x, float* best, int64_t* place) {
  const int64_t n = x.size(1);
  const T* from = x.const_data_ptr<T>();
  coppice::in_rows(x.size(0), 1, [=](int64_t begin, int64_t end) {
    std::vector<float> row(n);
    for (int64_t i = begin; i < end; ++i) {
      load(from + i * n, row.data(), n);
      Vec top(kUnseen);
      int64_t j = 0;
      for (; j + kLanes <= n; j += kLanes) top = at::vec::maximum(top, Vec::loadu(row.data() + j));
      best[i] = largest(top);
      for (; j < n && !std::isnan(best[i]); ++j)
        if (!(row[j] <= best[i])) best[i] = row[j];  // larger, or NaN
      place[i] = std::find(row.begin(), row.end(), best[i]) - row.begin();
      if (place[i] == n) place[i] = 0;  // NaN equals nothing
    }
  });
}

// x [N, n] dense -> (the largest of each row [N] float32, where it stands first [N] int64)
std::tuple<Tensor, Tensor> largest_of_rows(const Tensor& x) {
  Tensor best = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
  Tensor place = at::empty({x.size(0)}, x.options().dtype(at::kLong));
  auto* values = best.mutable_data_ptr<float>();
  auto* places = place.mutable_data_ptr<int64_t>();
  x.scalar_type() == at::kBFloat16 ? find_largest<BFloat16>(x, values, places)
                                   : find_largest<float>(x, values, places);
  return {best, place};
}

// Rotate `x` [d] by cos, sin [rotary]: pairs (j, j + rotary / 2), as in Llama.
void rotate(float* x, const float* cos, const float* sin, int64_t rotary) {
  const int64_t half = rotary / 2;
  for (int64_t j = 0; j < half; ++j) {
    const float a = x[j], b = x[j + half];
    x[j] = a * cos[j] - b * sin[j];
    x[j + half] = b * cos[j + half] + a * sin[j + half];
  }
}

template <typename T>
void rotate_rows(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& slots,
                 const Tensor& keys, const Tensor& values, const float* q_norm,
                 const float* k_norm, float eps) {
  const int64_t width = qkv.size(1), kv_heads = keys.size(0), d = keys.size(2);
  const int64_t q_heads = width / d - 2 * kv_heads, rotary = cos.size(1);
  T* rows = qkv.mutable_data_ptr<T>();
  T *k_data = keys.mutable_data_ptr<T>(), *v_data = values.mutable_data_ptr<T>();
  const T *cos_data = cos.const_data_ptr<T>(), *sin_data = sin.const_data_ptr<T>();
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  const auto k_stride = keys.stride(0), v_stride = values.stride(0);
  coppice::in_rows(qkv.size(0), 8, [=](int64_t begin, int64_t end) {
    std::vector<float> x(d), c(rotary), s(rotary);
    for (int64_t i = begin; i < end; ++i) {
      load(cos_data + i * rotary, c.data(), rotary);
      load(sin_data + i * rotary, s.data(), rotary);
      for (int64_t h = 0; h < q_heads + kv_heads; ++h) {
        const bool is_key = h >= q_heads;
        T* head = rows + i * width + h * d;
        load(head, x.data(), d);
        if (q_norm) normalize(x.data(), is_key ? k_norm : q_norm, d, eps);
        rotate(x.data(), c.data(), s.data(), rotary);
        if (is_key) head = k_data + (h - q_heads) * k_stride + slot[i] * d;
        store(x.data(), head, d);
      }
      for (int64_t h = 0; h < kv_heads; ++h) {
        const T* from = rows + i * width + (q_heads + kv_heads + h) * d;
        std::copy(from, from + d, v_data + h * v_stride + slot[i] * d);
      }
    }
  });
}

// qkv [N, (Hq + 2 Hkv) d]: queries are normalized and rotated in place, keys likewise but written
// to slots [N] of keys [Hkv, capacity, d]; values are copied. cos, sin [N, rotary].
void rotate_and_store(Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& slots,
                      Tensor& keys, Tensor& values, const std::optional<Tensor>& q_norm,
                      const std::optional<Tensor>& k_norm, double eps) {
  const float* q = q_norm ? q_norm->const_data_ptr<float>() : nullptr;
  const float* k = k_norm ? k_norm->const_data_ptr<float>() : nullptr;
  qkv.scalar_type() == at::kBFloat16
      ? rotate_rows<BFloat16>(qkv, cos, sin, slots, keys, values, q, k, eps)
      : rotate_rows<float>(qkv, cos, sin, slots, keys, values, q, k, eps);
}

}  // namespace

TORCH_LIBRARY(coppice, m) {
  m.def(
      "cascade_attention(Tensor query, Tensor keys, Tensor values, Tensor positions, Tensor spans, "
      "Tensor tiles, float scale, int window, float softcap, Tensor? sinks, str way) -> Tensor",
      &cascade_attention);
  m.def(
      "attend_views(Tensor query, Tensor keys, Tensor values, Tensor positions, Tensor spans, "
      "Tensor tiles, float scale, int window, float softcap, str way) -> (Tensor, Tensor)",
      &attend_views);
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", &rms_norm);
  m.def("largest_of_rows(Tensor x) -> (Tensor, Tensor)", &largest_of_rows);
  m.def(
      "rotate_and_store(Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor slots, Tensor(b!) keys, "
      "Tensor(c!) values, Tensor? q_norm, Tensor? k_norm, float eps) -> ()",
      &rotate_and_store);
}
