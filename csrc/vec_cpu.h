// SPDX-License-Identifier: Apache-2.0
// What CPU kernels share: elements of any dtype widened into buffers, and sums of products over
// them.
#pragma once

#include <type_traits>

#include "prompt_gate.h"
#include "prompt_gate_math.h"

// One build serves every x86-64: the loader picks the widest version that the processor has.
#if defined(__x86_64__) && defined(__GNUC__) && defined(__ELF__)
#define GP_HAS_CLONES 1
#define GP_TARGET_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define GP_HAS_CLONES 0
#define GP_TARGET_CLONES
#endif

namespace gated_prompt {
namespace {  // here too: versions of a function for several processors belong to one object file

// ---- loops over n elements; strides in elements, kUnit: 1, known at compile time ----

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

// Sum of s*t in kLanes interleaved sums, which are the same lanes whatever the instruction set.
template <class A>
GP_TARGET_CLONES double dot_row(const A* s, const A* t, int64_t n) {
  constexpr int64_t kLanes = 32;
  A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += s[i + k] * t[i + k];
  }
  for (int64_t k = 0; i + k < n; ++k) lanes[k] += s[i + k] * t[i + k];
  double sum = 0;
  for (int64_t k = 0; k < kLanes; ++k) sum += static_cast<double>(lanes[k]);
  return sum;
}

// ---- elements of any dtype ----

// Calls f with a value of the C++ type that stands for dtype.
template <class F>
void visit(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64: f(double{}); break;
    case DType::kFloat32: f(float{}); break;
    case DType::kBFloat16: f(BFloat16{}); break;
    case DType::kFloat16: f(Half{}); break;
  }
}

// n elements from data[offset] on: where they lie, or widened in `buffer`.
template <class A>
const A* load_any(const void* data, DType dtype, int64_t offset, int64_t stride, int64_t n,
                  A* buffer) {
  const A* values = buffer;
  visit(dtype, [&](auto type) {
    using T = decltype(type);
    const T* source = static_cast<const T*>(data) + offset;
    if constexpr (std::is_same_v<T, A>) {
      if (stride == 1) {
        values = source;
        return;
      }
    }
    stride == 1 ? load<T, A, true>(source, 1, n, buffer)
                : load<T, A, false>(source, stride, n, buffer);
  });
  return values;
}

}  // namespace
}  // namespace gated_prompt
