// Views: queries turned into the frames of documents (`Rotary.apply`), and their results joined.
//
// The results of a token's views become one (`owner` of rules.py).
// Each view saw other keys. Softmax over all of them weighs the parts by 2^lse, so
//
//   out = sum 2^(lse_v - m) part_v / (sum 2^(lse_v - m) + 2^(sink - m))     m: the largest of all
//
// A view that saw nothing has an lse of -inf and weighs 0.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "floats.h"
#include "pool.h"
#include "rules.h"

namespace {

using at::BFloat16;
using at::Tensor;
using coppice::kLog2E;
using coppice::kUnseen;

constexpr int64_t kLanes = 16;
constexpr int64_t kGrain = 1 << 14;  // numbers of parts that a thread reads at least

// Parts of one token, [d] each, into `out`; weights [n] come as lse and are overwritten.
template <typename T>
void join(const float* const* parts, float* weights, int64_t n, const float* sink, int64_t d,
          T* out) {
  float most = sink ? *sink * kLog2E : kUnseen;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, weights[i]);
  float total = sink ? std::exp2(*sink * kLog2E - most) : 0.f;
  for (int64_t i = 0; i < n; ++i)
    total += weights[i] = weights[i] == kUnseen ? 0.f : std::exp2(weights[i] - most);
  const __m512 share = _mm512_set1_ps(total == 0.f ? 0.f : 1.f / total);
  for (int64_t j = 0; j < d; j += kLanes) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; ++i)
      sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[i]), _mm512_loadu_ps(parts[i] + j), sum);
    coppice::store_floats(_mm512_mul_ps(sum, share), out + j);
  }
}

template <typename T>
void join_all(const Tensor& parts, const Tensor& lse, const int64_t* offsets, const int64_t* views,
              const float* sinks, const Tensor& out) {
  const int64_t tokens = out.size(0), heads = out.size(1), d = out.size(2);
  const auto *from = parts.const_data_ptr<float>(), *weight = lse.const_data_ptr<float>();
  T* to = out.mutable_data_ptr<T>();
  const int64_t numbers = std::max<int64_t>(1, parts.numel() / std::max<int64_t>(1, tokens));
  coppice::in_rows(tokens, 1 + kGrain / numbers, [=](int64_t begin, int64_t end) {
    std::vector<const float*> rows;
    std::vector<float> weights;
    for (int64_t token = begin; token < end; ++token) {
      const int64_t* first = views + offsets[token];
      const int64_t n = offsets[token + 1] - offsets[token];
      rows.resize(n);
      weights.resize(n);
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t i = 0; i < n; ++i) {
          rows[i] = from + (first[i] * heads + h) * d;
          weights[i] = weight[first[i] * heads + h];
        }
        join(rows.data(), weights.data(), n, sinks ? sinks + h : nullptr, d,
             to + (token * heads + h) * d);
      }
    }
  });
}

// parts [V, Hq, d], lse [V, Hq] float32 of `attend_views`; the views of token t are
// views[offsets[t] .. offsets[t + 1]), int64. Returns [N, Hq, d], bfloat16 or float32.
Tensor join_views(const Tensor& parts, const Tensor& lse, const Tensor& offsets,
                  const Tensor& views, const std::optional<Tensor>& sinks, bool is_bfloat16) {
  const auto type = is_bfloat16 ? at::kBFloat16 : at::kFloat;
  Tensor out = at::empty({offsets.size(0) - 1, parts.size(1), parts.size(2)},
                         parts.options().dtype(type));
  const auto *bounds = offsets.const_data_ptr<int64_t>(), *those = views.const_data_ptr<int64_t>();
  const float* sink = sinks ? sinks->const_data_ptr<float>() : nullptr;
  is_bfloat16 ? join_all<BFloat16>(parts, lse, bounds, those, sink, out)
              : join_all<float>(parts, lse, bounds, those, sink, out);
  return out;
}

// `head` [d] turned by cos, sin [pairs]: pairs (j, j + pairs), as in Llama; the rest stays.
template <typename T>
void turn(const T* head, const float* cos, const float* sin, int64_t pairs, int64_t d, float* x,
          T* to) {
  for (int64_t j = 0; j < d; j += kLanes) _mm512_storeu_ps(x + j, coppice::load_floats(head + j));
  for (int64_t j = 0; j < pairs; ++j) {
    const float a = x[j], b = x[j + pairs];
    x[j] = a * cos[j] - b * sin[j];
    x[j + pairs] = b * cos[j] + a * sin[j];
  }
  for (int64_t j = 0; j < d; j += kLanes) coppice::store_floats(_mm512_loadu_ps(x + j), to + j);
}

template <typename T>
void turn_all(const Tensor& query, const Tensor& owner, const Tensor& cos, const Tensor& sin,
              const Tensor& out) {
  const int64_t tokens = query.size(0), heads = query.size(1), d = query.size(2);
  const int64_t pairs = cos.size(1), size = heads * d;
  const T* from = query.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  const int64_t* of = owner.const_data_ptr<int64_t>();
  const auto *cosines = cos.const_data_ptr<float>(), *sines = sin.const_data_ptr<float>();
  const int64_t q_stride = query.stride(0), h_stride = query.stride(1);
  coppice::in_rows(out.size(0), 1 + kGrain / size, [=](int64_t begin, int64_t end) {
    std::vector<float> x(d);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t view = row - tokens, token = view < 0 ? row : of[view];
      for (int64_t h = 0; h < heads; ++h) {
        const T* head = from + token * q_stride + h * h_stride;
        T* there = to + row * size + h * d;
        if (view < 0)
          std::copy(head, head + d, there);
        else
          turn(head, cosines + view * pairs, sines + view * pairs, pairs, d, x.data(), there);
      }
    }
  });
}

// query [N, Hq, d] (last dimension dense); owner [W]; cos, sin [W, pairs] float32 -> [N + W, Hq, d]:
// the queries, and then those of `owner`, turned.
Tensor turn_views(const Tensor& query, const Tensor& owner, const Tensor& cos, const Tensor& sin) {
  TORCH_CHECK(query.size(2) % kLanes == 0, "head size must be a multiple of ", kLanes);
  Tensor out = at::empty({query.size(0) + owner.size(0), query.size(1), query.size(2)},
                         query.options());
  query.scalar_type() == at::kBFloat16 ? turn_all<BFloat16>(query, owner, cos, sin, out)
                                       : turn_all<float>(query, owner, cos, sin, out);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(coppice, m) {
  m.def(
      "join_views(Tensor parts, Tensor lse, Tensor offsets, Tensor views, Tensor? sinks, "
      "bool is_bfloat16) -> Tensor",
      &join_views);
  m.def("turn_views(Tensor query, Tensor owner, Tensor cos, Tensor sin) -> Tensor", &turn_views);
}
