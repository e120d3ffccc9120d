// SPDX-License-Identifier: Apache-2.0
// The formulas of the prompt gate, for one element. They are written only here; CPU and CUDA
// kernels call the same functions. The compilers must not fuse a multiplication with an addition
// (g++ -ffp-contract=off, nvcc -fmad=false), so every path rounds alike and gives the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"

namespace gated_prompt {

template <class A>
struct Gate {
  A value;       // g = sigmoid(logit)
  A complement;  // 1 - g, without cancellation; exactly 0 if g rounds to 1, as 1 - g would be
  A slope;       // dg/dlogit = g * (1 - g)
};

// 2^n, which must be a normal number. For an n that comes from NaN, the result does not matter.
GP_HD float power_of_two(int32_t n) {
  return bit_cast<float>((static_cast<uint32_t>(n) + 127u) << 23);
}

// exp(-t) for t >= 0. The float version evaluates 2^n * exp(r), |r| <= ln(2)/2, with a series for
// exp(r). Host and device then give the same bits (their expf differ), loops that call it
// vectorise, and no thread evaluates a double exp, which is slow on most GPUs.
GP_HD double exp_of_negative(double t) {
  return exp(-t);
}
GP_HD float exp_of_negative(float t) {
  t = t > 110.0f ? 110.0f : t;      // exp(-104) is already 0; NaN passes through
  const float kRound = 0x1.8p+23f;  // adding it rounds to an integer, which is in the low bits
  const float shifted = t * -0x1.715476p+0f + kRound;  // -1/ln(2)
  const int32_t n = bit_cast<int32_t>(shifted) - bit_cast<int32_t>(kRound);
  const float n_float = shifted - kRound;
  const float r = (-t - n_float * 0x1.62e4p-1f) - n_float * 0x1.7f7d1cp-20f;  // ln(2) in two parts
  float series = 1.0f / 5040 * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = (series * r) * r + r + 1.0f;
  // 2^n in two factors, so that a subnormal result is rounded only once
  const int32_t first = n < -100 ? -100 : n;
  return series * power_of_two(first) * power_of_two(n - first);
}

template <class A>
GP_HD Gate<A> make_gate(A logit) {
  const A e = exp_of_negative(logit < A(0) ? -logit : logit);  // in [0, 1]: never overflows
  const A large = A(1) / (A(1) + e);
  // not e / (1 + e): a second division would cost as much as all other operations together
  const A small = e * large;
  const A g = logit > A(0) ? large : small;
  const A complement = logit > A(0) ? small : large;
  return {g, g == A(1) ? A(0) : complement, large * small};
}

// mix: g*h + (1-g)*x; residual: g*h + 1*x. Not x + g*(h-x), which is NaN where h = x = inf.
template <class A>
GP_HD A input_weight(const Gate<A>& gate, bool mix) {
  return mix ? gate.complement : A(1);
}
template <class A>
GP_HD A update(A g, A h, A input_weight, A x) {
  return g * h + input_weight * x;
}

// The derivative d(update)/dg, halved for mix: (h - x) / 2 (mix) or h (residual). The gradient of
// the gate needs it. It is halved because the difference of two float16 values may be twice the
// largest float16; halving is exact.
template <class A>
GP_HD A saved_derivative(bool mix, A h, A x) {
  return mix ? A(0.5) * h - A(0.5) * x : h;
}

// The gradient of a logit. slope: of its gate; sum: of saved_derivative * T over the elements that
// share the gate.
template <class A>
GP_HD A logit_gradient(A slope, A sum, bool mix) {
  return (mix ? A(2) : A(1)) * slope * sum;
}

}  // namespace gated_prompt
