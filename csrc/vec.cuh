// SPDX-License-Identifier: Apache-2.0
// Packs of up to 16 bytes, and sums over a warp and a block.
#pragma once

#include "prompt_gate.h"

namespace gated_prompt {

// kCount elements of T moved by as few instructions as possible: 16 bytes each, or all at once.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T value[kCount];

  __device__ __forceinline__ static Pack load(const T* source) {
    return *reinterpret_cast<const Pack*>(source);
  }
  __device__ __forceinline__ void store(T* target) const {
    *reinterpret_cast<Pack*>(target) = *this;
  }
};

// Sum over the block's threads in a fixed order; the result is valid in thread 0.
template <class A>
__device__ __forceinline__ A block_sum(A value) {
  __shared__ A warp_sums[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  __syncthreads();  // the previous call's sums have been read
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  A sum = A(0);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += warp_sums[warp];
  }
  return sum;
}

}  // namespace gated_prompt
