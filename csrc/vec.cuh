// SPDX-License-Identifier: Apache-2.0
// Packs of up to 16 bytes.
#pragma once

#include "dtypes.h"

namespace gated_prompt {

template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// kCount elements of T, loaded and stored in words of up to 16 bytes. A pack stays in words until
// `get`: nvcc splits a pack of 16-bit elements directly after the load, and the thread would wait
// for the load there (seen in SASS). Stores use __stwb, an ordinary store that stays whole: nvcc
// 13.0 splits some stores that are written as assignments (seen in SASS).
template <class T, int kCount>
struct Pack {
  static constexpr int kWordBytes = sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16;
  static constexpr int kWords = sizeof(T) * kCount / kWordBytes;
  using word_t = typename Word<kWordBytes>::type;

  word_t words[kWords];

  __device__ __forceinline__ static Pack load(const T* source) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < kWords; ++i) pack.words[i] = reinterpret_cast<const word_t*>(source)[i];
    return pack;
  }
  __device__ __forceinline__ void store(T* target) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) __stwb(reinterpret_cast<word_t*>(target) + i, words[i]);
  }
  __device__ __forceinline__ void get(T (&values)[kCount]) const {
    memcpy(values, words, sizeof(words));
  }
  __device__ __forceinline__ void set(const T (&values)[kCount]) {
    memcpy(words, values, sizeof(words));
  }
};

}  // namespace gated_prompt
