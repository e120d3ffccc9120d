// SPDX-License-Identifier: Apache-2.0
// Packs of up to 16 bytes, and sums over a warp and a block.
#pragma once

#include "prompt_gate.h"

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

// kCount elements of T, moved in words of up to 16 bytes. Stores go through __stwb, an ordinary
// store that stays whole: nvcc 13.0 splits some of what is written as an assignment (seen in SASS).
template <class T, int kCount>
struct Pack {
  static constexpr int kWordBytes = sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16;
  static constexpr int kWords = sizeof(T) * kCount / kWordBytes;
  using word_t = typename Word<kWordBytes>::type;

  T value[kCount];

  __device__ __forceinline__ static Pack load(const T* source) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const word_t word = reinterpret_cast<const word_t*>(source)[i];
      memcpy(reinterpret_cast<char*>(pack.value) + i * kWordBytes, &word, kWordBytes);
    }
    return pack;
  }
  __device__ __forceinline__ void store(T* target) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      word_t word;
      memcpy(&word, reinterpret_cast<const char*>(value) + i * kWordBytes, kWordBytes);
      __stwb(reinterpret_cast<word_t*>(target) + i, word);
    }
  }
};

// Sum over the warp's lanes in a fixed order; the result is valid in lane 0.
template <class A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  return value;
}

// Sum over the block's threads in a fixed order; the result is valid in thread 0.
template <class A>
__device__ __forceinline__ A block_sum(A value) {
  __shared__ A warp_sums[kWarps];
  value = warp_sum(value);
  __syncthreads();  // the previous call's sums have been read
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  A sum = A(0);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp];
  }
  return sum;
}

}  // namespace gated_prompt
