// SPDX-License-Identifier: Apache-2.0
// The arithmetic of the prompt gate, one scalar at a time: the only place where its formulas stand
// in C++. CPU and CUDA kernels call the same functions. No multiply-add is contracted (g++
// -ffp-contract=off, nvcc -fmad=false), so every path rounds alike and gives the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define GP_HD __host__ __device__ __forceinline__
#else
#define GP_HD inline
#endif

namespace gated_prompt {

// Storage types: what a bfloat16 or float16 tensor holds. Arithmetic is done in compute_t.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

template <class To, class From>
GP_HD To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of one size");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// ---- storage -> compute, exact ----

GP_HD double widen(double value) {
  return value;
}
GP_HD float widen(float value) {
  return value;
}
GP_HD float widen(BFloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
GP_HD float widen(Half value) {
#ifdef __CUDA_ARCH__
  return __half2float(bit_cast<__half>(value.bits));
#else
  // Shift exponent and mantissa into place, then correct the bias (2^112) by a product, which also
  // normalises subnormals. Exponent 31 (inf, NaN) becomes exponent 255 afterwards.
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return bit_cast<float>(finite | special | sign);
#endif
}

// ---- compute -> storage, rounded once to nearest even ----

template <class T>
GP_HD T narrow(compute_t<T> value) {
  return value;  // float and double
}
template <>
GP_HD BFloat16 narrow<BFloat16>(float value) {
#ifdef __CUDA_ARCH__
  return {bit_cast<uint16_t>(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(value != value ? 0x7fffu : rounded)};
#endif
}
template <>
GP_HD Half narrow<Half>(float value) {
#ifdef __CUDA_ARCH__
  return {bit_cast<uint16_t>(__float2half_rn(value))};
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal result: rebias the exponent by -112, round away 13 bits; a carry runs into the exponent,
  // as it should. Subnormal result: adding 0.5 leaves multiples of 2^-24, rounded by the hardware.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;  // below 2^-14
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;            // rounds beyond 65504: inf
  result = magnitude > 0x7f800000u ? 0x7fffu : result;             // NaN
  return {static_cast<uint16_t>(result | sign)};
#endif
}

// ---- the gate ----

template <class A>
struct Gate {
  A value;       // g = sigmoid(logit)
  A complement;  // 1 - g, free of cancellation; exactly 0 where g rounds to 1, as in eager
                 // arithmetic
  A slope;       // dg/dlogit = g * (1 - g)
};

// 2^n for a normal result (of NaN's n, anything).
GP_HD float power_of_two(int32_t n) {
  return bit_cast<float>((static_cast<uint32_t>(n) + 127u) << 23);
}

// exp(-t) for t >= 0. In float by its own series, 2^n * exp(r) with |r| <= ln(2)/2, so that host
// and device give the same bits (their expf differ), that loops over it vectorise, and that no
// thread evaluates a double exp, slow on most GPUs.
GP_HD double exp_of_negative(double t) {
  return exp(-t);
}
GP_HD float exp_of_negative(float t) {
  t = t > 110.0f ? 110.0f : t;      // exp(-104) is already 0; NaN passes through
  const float kRound = 0x1.8p+23f;  // adding it rounds to an integer, kept in the low bits
  const float shifted = t * -0x1.715476p+0f + kRound;  // 1/ln(2)
  const int32_t n = bit_cast<int32_t>(shifted) - bit_cast<int32_t>(kRound);
  const float n_float = shifted - kRound;
  const float r = (-t - n_float * 0x1.62e4p-1f) - n_float * 0x1.7f7d1cp-20f;  // ln(2), two parts
  float series = 1.0f / 5040 * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = (series * r) * r + r + 1.0f;
  const int32_t first = n < -100 ? -100 : n;  // 2^n by two factors, so that a subnormal result is
  return series * power_of_two(first) * power_of_two(n - first);  // rounded once
}

template <class A>
GP_HD Gate<A> make_gate(A logit) {
  const A e = exp_of_negative(logit < A(0) ? -logit : logit);  // in [0, 1]: never overflows
  const A large = A(1) / (A(1) + e);
  const A small = e * large;  // a second division would cost as much as all the rest
  const A g = logit > A(0) ? large : small;
  const A complement = logit > A(0) ? small : large;
  return {g, g == A(1) ? A(0) : complement, large * small};
}

// mix: g*h + (1-g)*x; residual: g*h + 1*x. Two products and a sum: x + g*(h-x) is NaN where h = x =
// inf.
template <class A>
GP_HD A input_weight(const Gate<A>& gate, bool mix) {
  return mix ? gate.complement : A(1);
}
template <class A>
GP_HD A update(A g, A h, A input_weight, A x) {
  return g * h + input_weight * x;
}

// What the gradient of the gate needs of h and x, d(update)/dg up to a factor: (h - x) / 2 (mix) or
// h (residual). Halved since the difference of two float16 values may be twice the largest one;
// halving is exact.
template <class A>
GP_HD A saved_derivative(bool mix, A h, A x) {
  return mix ? A(0.5) * h - A(0.5) * x : h;
}

// Gradient of a logit whose gate has this slope, from the sum of saved_derivative * G.
template <class A>
GP_HD A logit_gradient(A slope, A sum, bool mix) {
  return (mix ? A(2) : A(1)) * slope * sum;
}

// ---- a temperature ----

template <class A>
GP_HD A clamp(A value, A low, A high) {
  return value < low ? low : value > high ? high : value;  // NaN stays
}

// The temperature within [low, high], rounded to its own dtype T as a tensor of it would be.
template <class T>
GP_HD T clamp_temperature(T temperature, double low, double high) {
  using A = compute_t<T>;
  return narrow<T>(clamp(widen(temperature), static_cast<A>(low), static_cast<A>(high)));
}

// A weight of T over the temperature, in T's arithmetic, rounded once to U.
template <class U, class T>
GP_HD U divided(T weight, compute_t<T> temperature) {
  return narrow<U>(static_cast<compute_t<U>>(widen(weight) / temperature));
}

// Gradient of a temperature by which q was divided, from dot = sum of q / temperature times its
// gradient.
template <class A>
GP_HD A temperature_gradient(A temperature, A dot) {
  return -dot / temperature;
}

}  // namespace gated_prompt
