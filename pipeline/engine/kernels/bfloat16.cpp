// Whether products of bfloat16 are computed faster widened to float32.
//
// AMX and most dot products of pairs (dpbf16) do more than FMA of float32 does. But on an Intel Xeon
// (family 6, model 207) a dot product takes as long as four FMA, which are worth two, and no flag of a
// CPU tells. So both are timed, some ten microseconds each.

#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>

namespace {

#if defined(__AMX_BF16__)
bool is_widening_faster() { return false; }
#elif defined(__AVX512BF16__)
constexpr int kSums = 12, kSteps = 2000, kTries = 20;
constexpr double kWorth = 2;  // FMA that do the work of one dot product

// The shortest time of so many steps on independent sums.
template <typename Step>
std::chrono::duration<double> shortest(Step step) {
  auto best = std::chrono::duration<double>::max();
  for (int i = 0; i < kTries; ++i) {
    __m512 sums[kSums] = {};
    const auto begin = std::chrono::steady_clock::now();
    for (int j = 0; j < kSteps; ++j)
#pragma GCC unroll 12
      for (__m512& sum : sums) {
        sum = step(sum);
        asm volatile("" : "+v"(sum));  // nothing is left out
      }
    best = std::min<decltype(best)>(best, std::chrono::steady_clock::now() - begin);
  }
  return best;
}

bool is_widening_faster() {
  const __m512 one = _mm512_set1_ps(1.f);
  const auto dot = shortest([=](__m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(one),
                            (__m512bh)_mm512_castps_si512(one));
  });
  const auto add = shortest([=](__m512 sum) { return _mm512_fmadd_ps(one, one, sum); });
  return dot > kWorth * add;
}
#else
bool is_widening_faster() { return true; }
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(coppice, m) {
  m.def("is_widening_faster() -> bool", [] {
    static const bool is_faster = is_widening_faster();
    return is_faster;
  });
}
