// SPDX-License-Identifier: Apache-2.0
// CPU kernel of divide_rows.
#include "divide_rows.h"

#include <algorithm>
#include <type_traits>

#include "vec_cpu.h"

namespace gated_prompt {
namespace {

template <class T, class U>
GP_TARGET_CLONES void divide(const T* source, compute_t<T> divisor, int64_t n,
                             U* __restrict__ target) {
  for (int64_t i = 0; i < n; ++i) target[i] = divided<U>(source[i], divisor);
}

// Writes elements [begin, end) of an operand's result.
template <class T, class U>
void divide_part(const DivideOperand& x, compute_t<T> divisor, int64_t begin, int64_t end) {
  const T* const source = static_cast<const T*>(x.source);
  U* const target = static_cast<U*>(x.target);
  const int64_t border = std::clamp(x.divided, begin, end);
  if (begin < border) divide(source + begin, divisor, border - begin, target + begin);
  if (border < end) divide(source + border, compute_t<T>(1), end - border, target + border);
}

}  // namespace

void divide_rows_cpu(const DivideParams& p, int64_t begin, int64_t end) {
  double divisor = 1;
  visit(p.temperature_dtype, [&](auto type) {
    using T = decltype(type);
    divisor = widen(clamp_temperature(*static_cast<const T*>(p.temperature), p.low, p.high));
  });
  const int64_t size = p.weight.size;
  visit(p.from, [&](auto from) {
    using T = decltype(from);
    const auto run = [&](auto to) {
      using U = decltype(to);
      const auto t = static_cast<compute_t<T>>(divisor);
      divide_part<T, U>(p.weight, t, std::min(begin, size), std::min(end, size));
      divide_part<T, U>(p.bias, t, std::max(begin, size) - size, std::max(end, size) - size);
    };
    if (p.to == p.from) return run(from);
    if constexpr (std::is_same_v<T, float>) {
      p.to == DType::kBFloat16 ? run(BFloat16{}) : run(Half{});
    }
  });
}

void clamp_cpu(const DivideParams& p) {
  visit(p.temperature_dtype, [&](auto type) {
    using T = decltype(type);
    *static_cast<T*>(p.clamped) =
        clamp_temperature(*static_cast<const T*>(p.temperature), p.low, p.high);
  });
}

}  // namespace gated_prompt
