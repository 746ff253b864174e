// What the CPU kernels are told, as `AttentionRules` and `KVSpans` of rules.py.

#pragma once

#include <cstdint>
#include <limits>

namespace coppice {

constexpr float kLog2E = 1.44269504f;
constexpr float kUnseen = -std::numeric_limits<float>::infinity();

struct Rules {
  float scale;
  int64_t window;
  float softcap;
  const float* sinks;
};

struct Span {
  int64_t q_lo, q_hi, kv_lo, kv_hi, position;
};

}  // namespace coppice
