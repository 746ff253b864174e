// How products of bfloat16 are computed fastest on this CPU.
//
// AMX and most dot products of pairs (dpbf16) do more than FMA of float32 does. But on an Intel Xeon
// (family 6, model 207) a dot product takes as long as four FMA, which are worth two, and no flag of a
// CPU tells. So both are timed, some ten microseconds each. Where FMA wins, FMA of half precision does
// twice the work of one of float32.

#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>
#include <vector>

namespace {

#if defined(__AMX_BF16__)
bool is_dot_faster() { return true; }
#elif defined(__AVX512BF16__)
constexpr int kSteps = 2000, kTries = 20;
constexpr double kWorth = 2;  // FMA that do the work of one dot product

// The shortest time of so many steps on independent sums. They must stay in registers: a sum that is
// stored takes as long as the slower step.
template <typename Step, int... I>
std::chrono::duration<double> shortest(Step step, std::integer_sequence<int, I...>) {
  const auto add = [=](__m512& sum) {
    sum = step(sum);
    asm volatile("" : "+v"(sum));  // nothing is left out
  };
  auto best = std::chrono::duration<double>::max();
  for (int i = 0; i < kTries; ++i) {
    __m512 sums[sizeof...(I)] = {};
    const auto begin = std::chrono::steady_clock::now();
    for (int j = 0; j < kSteps; ++j) (add(sums[I]), ...);
    best = std::min<decltype(best)>(best, std::chrono::steady_clock::now() - begin);
  }
  return best;
}

bool is_dot_faster() {
  constexpr std::make_integer_sequence<int, 12> kSums;
  const __m512 one = _mm512_set1_ps(1.f);
  const auto dot = shortest([=](__m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(one),
                            (__m512bh)_mm512_castps_si512(one));
  }, kSums);
  const auto add = shortest([=](__m512 sum) { return _mm512_fmadd_ps(one, one, sum); }, kSums);
  return dot <= kWorth * add;
}
#endif

// "bfloat16" (dot products), "half" and "widened" (to float32), those that this CPU has.
std::vector<std::string> ways() {
  std::vector<std::string> ways{"widened"};
#ifdef __AVX512FP16__
  ways.insert(ways.begin(), "half");
#endif
#ifdef __AVX512BF16__
  ways.insert(is_dot_faster() ? ways.begin() : ways.end(), "bfloat16");
#endif
  return ways;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(coppice, m) {
  m.def("ways_of_bfloat16() -> str[]", &ways);
}
