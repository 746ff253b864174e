// Attention whose bits do not depend on what is computed beside it (strict mode), float32.
//
// strict_attention has the meaning of `attend_reference` in rules.py. What is fixed is the order of
// roundings: a query's result is a function of its keys and values in the order of their positions,
// whatever ranges hold them and whichever other queries share the call.
//
//   for each key tile [64 i, 64 i + 64) of prompt positions:
//     s_j = q . k_j              one chain of fused multiply-adds over the head, for each key apart
//     m   = max(m, max s_j)      once a tile, exact in any order
//     l   = l * shrink + e^(s_j - m)           by lane: position modulo 16; the lanes join last
//     o   = o * shrink + e^(s_j - m) v_j       one chain over the positions
//   out = o / l
//
// A chain may be stored and loaded at any place, so a tile may be scattered over ranges, and keys
// that a query does not see add exact zeros. All arithmetic is in intrinsics: no loop of it is left
// to the compiler, which rounds a remainder otherwise than a body.

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "exp2.h"
#include "gemm.h"
#include "pool.h"
#include "rules.h"

namespace {

using at::Tensor;
using coppice::Kept;
using coppice::kLog2E;
using coppice::kUnseen;
using coppice::multiply;
using coppice::Rules;
using coppice::Span;

constexpr int64_t kLanes = 16;
constexpr int64_t kGrid = 64;       // positions of a key tile
constexpr int64_t kVectors = kGrid / kLanes;
constexpr int64_t kTaskRows = 192;  // of one task: its state stays in a core's cache
constexpr int64_t kTasksAThread = 4;

// ---------------------------------------------------------------- attention

// k [n, d] -> [d, kGrid]; columns from n on keep what they held.
void transpose_keys(const float* k, int64_t n, int64_t d, float* to) {
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t j = 0; j < d; j += kLanes)
      at::vec::transpose_mxn<float>(k + i * d + j, d, to + j * kGrid + i, kGrid,
                                    std::min(kLanes, n - i), kLanes);
}

// Rows `[row, row + count)` of a task see slots `[slot, slot + n)`, columns `[column, column + n)`
// of the key tile.
struct Piece {
  int64_t row, count, slot, column, n;
};

// Of all tokens, with the strides of tokens and heads.
struct Queries {
  const float* data;
  int64_t stride, h_stride;
};

// Queries `[q_lo, q_hi)` of one KV head with their running results.
struct Task {
  std::vector<float> q, s, o, l, m, k;
  std::vector<Span> spans;
  std::vector<Piece> pieces;
  int64_t d, rep;
  int64_t q_lo = 0, q_hi = 0;

  Task(int64_t max_rows, int64_t head_dim, int64_t rep)
      : q(max_rows * head_dim), s(max_rows * kGrid), o(max_rows * head_dim), l(max_rows * kLanes),
        m(max_rows), k(head_dim * kGrid), d(head_dim), rep(rep) {}

  int64_t rows() const { return (q_hi - q_lo) * rep; }

  void start(const Queries& queries, int64_t head, const float* sinks) {
    std::fill_n(o.data(), rows() * d, 0.f);
    std::fill_n(l.data(), rows() * kLanes, 0.f);
    for (int64_t r = 0; r < rows(); ++r) {
      const int64_t h = head * rep + r % rep;
      const float* from = queries.data + (q_lo + r / rep) * queries.stride + h * queries.h_stride;
      std::copy(from, from + d, q.data() + r * d);
      m[r] = sinks ? sinks[h] * kLog2E : kUnseen;
      if (sinks) l[r * kLanes] = 1.f;
    }
  }

  // Those of the call that lie in this task, in the order of their positions.
  void take_spans(const Span* from, int64_t count) {
    spans.clear();
    for (const Span* g = from; g != from + count; ++g)
      if (g->q_lo < q_hi && g->q_hi > q_lo)
        spans.push_back({std::max(g->q_lo, q_lo), std::min(g->q_hi, q_hi), g->kv_lo, g->kv_hi,
                            g->position});
    std::stable_sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) {
      return a.position < b.position;
    });
  }

  // What of the key tile from position `first` on some query of its span sees.
  void take_pieces(int64_t first, const int64_t* positions, int64_t window) {
    pieces.clear();
    for (const Span& g : spans) {
      const int64_t from = std::max(g.position, first);
      int64_t to = std::min(g.position + g.kv_hi - g.kv_lo, first + kGrid);
      const auto sees = [&](int64_t i) {
        return from <= positions[i] && (!window || positions[i] - window < to - 1);
      };
      int64_t low = g.q_lo, high = g.q_hi;
      while (low < high && !sees(low)) ++low;
      while (low < high && !sees(high - 1)) --high;
      if (from >= to || low == high) continue;
      to = std::min(to, *std::max_element(positions + low, positions + high) + 1);
      pieces.push_back({(low - q_lo) * rep, (high - low) * rep, g.kv_lo + from - g.position,
                        from - first, to - from});
    }
  }

  // Scores of row r become weights: of columns [lo, hi), zero elsewhere.
  void weigh(int64_t r, int64_t lo, int64_t hi, const Rules& rules) {
    float* row = s.data() + r * kGrid;
    lo = std::max<int64_t>(lo, 0);
    hi = std::min(hi, kGrid);
    if (hi <= lo) {
      std::fill(row, row + kGrid, 0.f);
      return;
    }
    const uint64_t seen = ~uint64_t(0) >> (kGrid - hi) & ~uint64_t(0) << lo;
    at::vec::Vectorized<float> best(kUnseen);
    const __m512 unseen = _mm512_set1_ps(kUnseen);
    __m512 x[kVectors];
    for (int64_t j = 0; j < kVectors; ++j) {
      x[j] = _mm512_loadu_ps(row + j * kLanes);
      const auto mask = _mm512_mask_cmp_ps_mask(__mmask16(seen >> (j * kLanes)), x[j], unseen,
                                                _CMP_NEQ_UQ);  // true for a NaN
      if (rules.softcap > 0) {
        const at::vec::Vectorized<float> inward(rules.scale / rules.softcap);
        const at::vec::Vectorized<float> outward(rules.softcap * kLog2E);
        x[j] = (at::vec::Vectorized<float>(x[j]) * inward).tanh() * outward;
      } else {
        x[j] = _mm512_mul_ps(x[j], _mm512_set1_ps(rules.scale * kLog2E));
      }
      x[j] = _mm512_mask_blend_ps(mask, unseen, x[j]);
      best = at::vec::maximum(best, at::vec::Vectorized<float>(x[j]));  // keeps a NaN
    }
    const bool is_broken = _mm512_cmp_ps_mask(best, best, _CMP_UNORD_Q) != 0;
    const float top =
        is_broken ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(best);
    if (top == kUnseen) {
      std::fill(row, row + kGrid, 0.f);
      return;
    }
    if (!(top <= m[r])) shrink(r, top);
    const __m512 base = _mm512_set1_ps(m[r]);
    for (int64_t j = 0; j < kVectors; ++j) {
      x[j] = coppice::exp2<true>(_mm512_sub_ps(x[j], base));
      _mm512_storeu_ps(row + j * kLanes, x[j]);
    }
    __m512 total = _mm512_loadu_ps(l.data() + r * kLanes);
    for (int64_t j = 0; j < kVectors; ++j) total = _mm512_add_ps(total, x[j]);
    _mm512_storeu_ps(l.data() + r * kLanes, total);
  }

  // Row r so far counts against a larger score from now on.
  void shrink(int64_t r, float top) {
    const __m512 factor = _mm512_set1_ps(std::exp2(m[r] - top));
    m[r] = top;
    float* sums = l.data() + r * kLanes;
    _mm512_storeu_ps(sums, _mm512_mul_ps(_mm512_loadu_ps(sums), factor));
    float* row = o.data() + r * d;
    for (int64_t j = 0; j < d; j += kLanes)
      _mm512_storeu_ps(row + j, _mm512_mul_ps(_mm512_loadu_ps(row + j), factor));
  }

  // The key tile from position `first` on; keys, values [capacity, d] of this KV head.
  void attend_tile(int64_t first, const float* keys, const float* values, const int64_t* positions,
                   const Rules& rules) {
    take_pieces(first, positions, rules.window);
    if (pieces.empty()) return;
    std::fill_n(s.data(), rows() * kGrid, kUnseen);
    for (const Piece& piece : pieces) {
      transpose_keys(keys + piece.slot * d, piece.n, d, k.data());
      multiply(piece.count, piece.n, d, q.data() + piece.row * d, d, k.data(), kGrid,
               s.data() + piece.row * kGrid + piece.column, kGrid, false);
    }
    for (int64_t r = 0; r < rows(); ++r) {
      const int64_t now = positions[q_lo + r / rep] - first;
      weigh(r, rules.window ? now - rules.window + 1 : 0, now + 1, rules);
    }
    for (const Piece& piece : pieces)
      multiply(piece.count, d, piece.n, s.data() + piece.row * kGrid + piece.column, kGrid,
               values + piece.slot * d, d, o.data() + piece.row * d, d, true);
  }

  void finish(float* out, int64_t heads, int64_t head) {
    for (int64_t r = 0; r < rows(); ++r) {
      const float total = _mm512_reduce_add_ps(_mm512_loadu_ps(l.data() + r * kLanes));
      const __m512 share = _mm512_set1_ps(total == 0.f ? 0.f : 1.f / total);
      float* to = out + ((q_lo + r / rep) * heads + head * rep + r % rep) * d;
      for (int64_t j = 0; j < d; j += kLanes)
        _mm512_storeu_ps(to + j, _mm512_mul_ps(_mm512_loadu_ps(o.data() + r * d + j), share));
    }
  }
};

// Tokens of a task: its size changes no bit, so it only keeps all threads busy.
int64_t task_tokens(int64_t tokens, int64_t rep, int64_t kv_heads) {
  const int64_t most = std::max<int64_t>(1, kTaskRows / rep);
  const int64_t wanted = kTasksAThread * coppice::num_threads();
  return std::clamp<int64_t>(tokens * kv_heads / wanted, std::min<int64_t>(8, most), most);
}

// query [N, Hq, d] (last dimension dense); keys, values [Hkv, capacity, d], each head dense;
// positions [N], spans [S, 5] int64. Returns [N, Hq, d].
Tensor strict_attention(const Tensor& query, const Tensor& keys, const Tensor& values,
                        const Tensor& positions, const Tensor& spans, double scale,
                        int64_t window, double softcap, const std::optional<Tensor>& sinks) {
  const int64_t tokens = query.size(0), heads = query.size(1), d = query.size(2);
  const int64_t kv_heads = keys.size(0), rep = heads / kv_heads;
  TORCH_CHECK(query.scalar_type() == at::kFloat && d % kLanes == 0,
              "strict attention takes float32 and heads of a multiple of ", kLanes);
  const Rules rules{float(scale), window, float(softcap),
                    sinks ? sinks->const_data_ptr<float>() : nullptr};
  const auto* at = positions.const_data_ptr<int64_t>();
  const auto* all = reinterpret_cast<const Span*>(spans.const_data_ptr<int64_t>());
  const Queries queries{query.const_data_ptr<float>(), query.stride(0), query.stride(1)};
  Tensor out = at::empty(query.sizes(), query.options());
  const int64_t step = task_tokens(tokens, rep, kv_heads);
  const int64_t num_tasks = (tokens + step - 1) / step * kv_heads;
  const auto *key = keys.const_data_ptr<float>(), *value = values.const_data_ptr<float>();
  const auto k_stride = keys.stride(0), v_stride = values.stride(0), count = spans.size(0);
  float* to = out.mutable_data_ptr<float>();
  Kept kept{query.storage(), keys.storage(), values.storage(), positions.storage(),
            spans.storage()};
  if (sinks) kept.push_back(sinks->storage());
  using Own = std::unique_ptr<Task>;
  coppice::in_parallel(
      num_tasks, kept, [=] { return std::make_unique<Task>(step * rep, d, rep); },
      [=](Own& task, int64_t i) {
        const int64_t head = i % kv_heads;
        task->q_lo = i / kv_heads * step;
        task->q_hi = std::min(tokens, task->q_lo + step);
        task->start(queries, head, rules.sinks);
        task->take_spans(all, count);
        const auto [low, high] = std::minmax_element(at + task->q_lo, at + task->q_hi);
        const int64_t oldest = window ? std::max<int64_t>(0, *low - window + 1) : 0;
        for (int64_t first = oldest / kGrid * kGrid; first <= *high; first += kGrid)
          task->attend_tile(first, key + head * k_stride, value + head * v_stride, at, rules);
      },
      [=](Own& task, int64_t i) { task->finish(to, heads, i % kv_heads); });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(coppice, m) {
  m.def(
      "strict_attention(Tensor query, Tensor keys, Tensor values, Tensor positions, "
      "Tensor spans, float scale, int window, float softcap, Tensor? sinks) -> Tensor",
      &strict_attention);
}
