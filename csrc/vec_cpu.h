// SPDX-License-Identifier: Apache-2.0
// Shared by the CPU kernels: loads that widen elements of any dtype into a buffer, and sums of
// products.
#pragma once

#include <type_traits>

#include "dtypes.h"

// One build is good for every x86-64 processor: functions are compiled for several instruction
// sets, and the loader picks the widest version that the processor supports.
#if defined(__x86_64__) && defined(__GNUC__) && defined(__ELF__)
#define GP_HAS_CLONES 1
#if __GNUC__ >= 12             // g++ 12 or later (clang calls itself 4)
#define GP_WIDEST "x86-64-v4"  // AVX-512 with its instructions for 16-bit elements
#define GP_TARGET_CLONES __attribute__((target_clones("arch=" GP_WIDEST, "avx2", "default")))
#else
#define GP_WIDEST "avx512f"
#define GP_TARGET_CLONES __attribute__((target_clones(GP_WIDEST, "avx2", "default")))
#endif
#else
#define GP_HAS_CLONES 0
#define GP_TARGET_CLONES
#endif

namespace gated_prompt {
// Unnamed also in a header: all versions of a function must be in one object file.
namespace {

// ---- loops over n elements; strides in elements; kUnit: stride 1, known at compile time ----

template <bool kUnit>
inline int64_t at(int64_t i, int64_t stride) {
  return kUnit ? i : i * stride;
}

template <class T, class A, bool kUnit>  // source [n] -> target [n]
GP_TARGET_CLONES void load(const T* source, int64_t stride, int64_t n, A* __restrict__ target) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < n; ++i) {
    target[i] = static_cast<A>(widen(source[at<kUnit>(i, stride)]));
  }
}

// Sums have kLanes interleaved lanes with every instruction set, so that all give the same bits.
constexpr int64_t kLanes = 32;

template <class A>
inline double sum_of_lanes(const A* lanes) {
  double sum = 0;
  for (int64_t k = 0; k < kLanes; ++k) sum += static_cast<double>(lanes[k]);
  return sum;
}

template <class V, class A>  // sum of s*t
GP_TARGET_CLONES double dot_row(const V* s, const A* t, int64_t n) {
  A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += widen(s[i + k]) * t[i + k];
  }
  for (int64_t k = 0; i + k < n; ++k) lanes[k] += widen(s[i + k]) * t[i + k];
  return sum_of_lanes(lanes);
}

// ---- elements of any dtype ----

// Returns n elements, starting at data[offset], as V: a pointer into data, or `buffer` with the
// widened elements. If V is a 16-bit type, the data must be contiguous elements of V.
template <class V>
const V* load_any(const void* data, DType dtype, int64_t offset, int64_t stride, int64_t n,
                  V* buffer) {
  const V* values = buffer;
  visit(dtype, [&](auto type) {
    using T = decltype(type);
    const T* source = static_cast<const T*>(data) + offset;
    if constexpr (std::is_same_v<T, V>) {
      if (stride == 1) {
        values = source;
        return;
      }
    }
    if constexpr (std::is_floating_point_v<V>) {
      stride == 1 ? load<T, V, true>(source, 1, n, buffer)
                  : load<T, V, false>(source, stride, n, buffer);
    }
  });
  return values;
}

}  // namespace
}  // namespace gated_prompt
