// SPDX-License-Identifier: Apache-2.0
// Sums over a warp, a block and several blocks, in a fixed order.
#pragma once

#include "launch.h"

namespace gated_prompt {

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

// ---- sums over blocks ----
//
// Such a sum needs no second launch: of the blocks that share a sum, the last one to arrive adds
// the partial sums of all of them, in a fixed order. Then the ticket is 0 again, for the
// next launch.

// atomicInc that releases what the block has written and acquires what other blocks have released.
__device__ __forceinline__ unsigned take_ticket(unsigned* ticket, unsigned limit) {
#ifdef __CUDA_ARCH__
  unsigned old;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(ticket), "r"(limit)
               : "memory");
  return old;
#else  // cuda_on_cpu
  return atomicInc(ticket, limit);
#endif
}

// True if this block is the last of `blocks` blocks to arrive. A block calls it after it has
// written its partial sums.
__device__ __forceinline__ bool arrives_last(unsigned* ticket, unsigned blocks) {
  __shared__ bool is_last;
  __syncthreads();
  // one thread acts for the whole block: release and acquire are cumulative over __syncthreads
  if (threadIdx.x == 0) is_last = take_ticket(ticket, blocks - 1) == blocks - 1;
  __syncthreads();
  return is_last;
}

// Adds `value` over all threads of `blocks` blocks, and calls end.finish(total, end.prepare()) in
// one thread. `block` is the number of this block among them.
template <class A, class End>
__device__ __forceinline__ void sum_over_blocks(A value, unsigned blocks, unsigned block,
                                                unsigned* ticket, double* partials,
                                                const End& end) {
  double total = static_cast<double>(block_sum(value));
  if (blocks == 1) {
    if (threadIdx.x == 0) end.finish(total, end.prepare());
    return;
  }
  if (threadIdx.x == 0) partials[block] = total;
  if (!arrives_last(ticket, blocks)) return;
  constexpr unsigned kAtOnce = 4;
  total = 0;
  double prepared = 0;
  for (unsigned i = threadIdx.x; i < blocks; i += kThreads * kAtOnce) {
    double read[kAtOnce];
#pragma unroll
    for (unsigned k = 0; k < kAtOnce; ++k) {
      const unsigned index = i + k * kThreads;
      read[k] = index < blocks ? __ldcg(partials + index) : 0;
    }
    if (i == 0) prepared = end.prepare();  // while the loads are in flight
#pragma unroll
    for (unsigned k = 0; k < kAtOnce; ++k) total += read[k];
  }
  total = block_sum(total);
  if (threadIdx.x == 0) end.finish(total, prepared);
}

// Like sum_over_blocks, with one sum per warp: over the lanes of the warp and of the warps with the
// same number in the other blocks. A warp without is_there takes part, but does not call `end`.
template <class A, class End>
__device__ __forceinline__ void warp_sum_over_blocks(A value, unsigned blocks, unsigned block,
                                                     unsigned* ticket, double* partials,
                                                     bool is_there, const End& end) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  double total = static_cast<double>(warp_sum(value));
  if (blocks > 1) {
    if (lane == 0) partials[block * kWarps + warp] = total;
    if (!arrives_last(ticket, blocks)) return;
    total = 0;
    for (unsigned i = lane; i < blocks; i += 32) total += __ldcg(partials + i * kWarps + warp);
    total = warp_sum(total);
  }
  if (lane == 0 && is_there) end.finish(total, end.prepare());
}

}  // namespace gated_prompt
