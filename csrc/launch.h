// SPDX-License-Identifier: Apache-2.0
// Shared by the launches of all CUDA kernels: constants, and plain functions that run (and are
// tested) on any machine.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtypes.h"

namespace gated_prompt {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPacksInFlight = 2;  // packs of each tensor that a thread loads before it computes
// kFewBlocks and kSomeBlocks: two and four blocks on each of the 132 SMs of an H100 or H200.
// kManyBlocks: for long work, which is faster in several waves. See docs/optimisation-log.md.
constexpr int64_t kFewBlocks = 264, kSomeBlocks = 528, kManyBlocks = 1024;

inline int64_t at_least_one(int64_t value) {
  return value > 0 ? value : 1;
}
inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
GP_HD int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct Division {
  int64_t quotient, remainder;
};

// Divides in 32 bits if possible: a 64-bit division costs about 100 instructions on a GPU.
GP_HD Division divide(int64_t index, int64_t size) {
  int64_t quotient;
  if (((index | size) >> 32) == 0) {
    quotient = static_cast<uint32_t>(index) / static_cast<uint32_t>(size);
  } else {
    quotient = index / size;
  }
  return {quotient, index - quotient * size};
}

// The workspace is device memory for sums over blocks: tickets, then partial sums. Each group of
// blocks that shares a sum has one ticket. Tickets must be 0 before the first launch and are 0
// again after each launch, so launches on one stream may share a workspace.
constexpr int64_t kMaxTickets = 1024;
constexpr size_t kTicketBytes = kMaxTickets * sizeof(uint32_t);
constexpr size_t kMaxWorkspaceBytes =
    kTicketBytes + kFewBlocks * 256 * sizeof(float);  // 256: most columns of a strip

}  // namespace gated_prompt
