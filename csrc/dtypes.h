// SPDX-License-Identifier: Apache-2.0
// The dtypes of tensors: the types that elements are stored in and computed in. No torch or CUDA
// header here, except the headers of CUDA's 16-bit types if nvcc compiles.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define GP_HD __host__ __device__ __forceinline__
#define GP_DEVICE __device__ __forceinline__  // for a function that is passed device code
#else
#define GP_HD inline
#define GP_DEVICE inline
#endif

namespace gated_prompt {

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

constexpr int64_t item_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Storage types: an element of a bfloat16 or float16 tensor. Arithmetic is done in compute_t.
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
  // Shift exponent and mantissa into place, then multiply by 2^112 to correct the bias; this also
  // normalises subnormals. Exponent 31 (inf, NaN) is set to 255 afterwards.
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
  // Normal result: rebias the exponent by -112 and round away 13 bits; a carry into the exponent is
  // right. Subnormal result: adding 0.5 leaves multiples of 2^-24, rounded by the hardware.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;  // below 2^-14
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // would round to more than 65504: inf
  result = magnitude > 0x7f800000u ? 0x7fffu : result;   // NaN
  return {static_cast<uint16_t>(result | sign)};
#endif
}

// Calls f with a value of the storage type of dtype.
template <class F>
GP_DEVICE void visit(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64: f(double{}); break;
    case DType::kFloat32: f(float{}); break;
    case DType::kBFloat16: f(BFloat16{}); break;
    default: f(Half{}); break;
  }
}

}  // namespace gated_prompt
