// SPDX-License-Identifier: Apache-2.0
// The interface between bindings, CPU kernels and CUDA kernels of scaled_dot. No torch or CUDA
// header here.
//
//   result = -(1/temperature) * sum over all elements of a*b
//
// This is the gradient of a temperature that divides the queries: a are the divided queries, b is
// the gradient of a. Products are added in float32 (float64 for float64) within a task (CPU) or
// block (CUDA); these partial sums are added in float64.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "dtypes.h"
#include "launch.h"

namespace gated_prompt {

// Gradient of a temperature that divides q. dot: the sum of a * (gradient of a), a = q/temperature.
template <class A>
GP_HD A temperature_gradient(A temperature, A dot) {
  return -dot / temperature;
}

constexpr int kDotDims = 4;

struct DotOperand {
  const void* data;
  int64_t stride[kDotDims];  // in elements; 0 along a dimension that broadcasts
  DType dtype;
};

struct ScaledDotParams {
  int64_t size[kDotDims];  // of a and b; the last dimension is "columns", the others "rows"
  DotOperand a, b;
  const void* temperature;  // one element
  void* result;             // one element, in the dtype of temperature
  DType temperature_dtype;
};

GP_HD int64_t rows_of(const ScaledDotParams& p) {
  return p.size[0] * p.size[1] * p.size[2];
}
GP_HD int64_t columns_of(const ScaledDotParams& p) {
  return p.size[kDotDims - 1];
}

// Returns the same sum over as few dimensions as possible. Drops dimensions of size 1, sorts the
// others by stride (longest first) and merges neighbours that are contiguous in both tensors. The
// remaining dimensions are the last of the four. Swaps a and b if b has the wider dtype.
inline ScaledDotParams coalesce(ScaledDotParams p) {
  if (item_size(p.a.dtype) < item_size(p.b.dtype)) std::swap(p.a, p.b);
  struct Dimension {
    int64_t size, a, b;
  };
  Dimension dims[kDotDims];
  int count = 0;
  for (int d = 0; d < kDotDims; ++d) {
    const Dimension dim{p.size[d], p.a.stride[d], p.b.stride[d]};
    if (dim.size == 1) continue;
    int place = count++;
    for (; place > 0 && dims[place - 1].a + dims[place - 1].b < dim.a + dim.b; --place) {
      dims[place] = dims[place - 1];
    }
    dims[place] = dim;
  }
  for (int d = 0; d < kDotDims; ++d) p.size[d] = 1, p.a.stride[d] = p.b.stride[d] = 0;
  int first = kDotDims;
  while (count > 0) {
    const Dimension& dim = dims[--count];
    const bool merges = first < kDotDims && dim.a == p.size[first] * p.a.stride[first] &&
                        dim.b == p.size[first] * p.b.stride[first];
    if (merges) {
      p.size[first] *= dim.size;
    } else {
      --first;
      p.size[first] = dim.size, p.a.stride[first] = dim.a, p.b.stride[first] = dim.b;
    }
  }
  return p;
}

struct DotOffsets {
  int64_t a, b;  // in elements
};

// Offsets of the first element of row `row`.
GP_HD DotOffsets row_offsets(const ScaledDotParams& p, int64_t row) {
  DotOffsets offsets{0, 0};
  for (int d = kDotDims - 2; d >= 0; --d) {
    // after coalesce() the first case is the usual one, and needs no division
    const Division i = row < p.size[d] ? Division{0, row} : divide(row, p.size[d]);
    offsets.a += i.remainder * p.a.stride[d];
    offsets.b += i.remainder * p.b.stride[d];
    row = i.quotient;
  }
  return offsets;
}

// ---- CPU ----
//
// A task is some whole rows, or a part of one row. Its size depends only on the shapes and strides
// of the tensors, and the sums of the tasks are added in order. Params must be coalesced.

constexpr int64_t kDotTaskElements = 1024;  // per tensor; both tensors, widened: 8 to 16 KiB

struct DotTasks {
  int64_t rows;     // per task; the last task may have fewer
  int64_t columns;  // per task; the last task of a row may have fewer
  int64_t per_row;  // tasks per row; 1 if a task has several rows
  int64_t count;
};

inline DotTasks dot_tasks_of(const ScaledDotParams& p) {
  const int64_t rows = rows_of(p), columns = columns_of(p);
  if (rows * columns == 0) return {};
  const int64_t per_row = ceil_div(columns, kDotTaskElements);
  const int64_t of_rows = per_row > 1 ? 1 : smaller(rows, kDotTaskElements / columns);
  return {of_rows, ceil_div(columns, per_row), per_row, per_row * ceil_div(rows, of_rows)};
}

// partials: one sum per task
void scaled_dot_cpu(const ScaledDotParams& params, int64_t task_begin, int64_t task_end,
                    double* partials);
void scaled_dot_finish_cpu(const ScaledDotParams& params, const double* partials);

// ---- CUDA ----

constexpr int64_t kMaxPartials = 2048;  // blocks: two waves

struct DotPlan {
  int64_t grid;  // blocks
  int vector;    // elements in a pack: 16 bytes of the narrower dtype, or 4 bytes, or one element
  int64_t packs_per_row;
  int64_t packs;
};

// True if a row is a whole number of packs, and each pack is contiguous and aligned (to its size,
// at most 16 bytes) in both tensors.
inline bool dot_packs_fit(const ScaledDotParams& p, int vector) {
  if (columns_of(p) % vector != 0) return false;
  for (const DotOperand* x : {&p.a, &p.b}) {
    const int64_t item = item_size(x->dtype), bytes = smaller(vector * item, 16);
    if (x->stride[kDotDims - 1] != 1) return false;
    if (reinterpret_cast<uintptr_t>(x->data) % static_cast<uintptr_t>(bytes) != 0) return false;
    for (int d = 0; d < kDotDims - 1; ++d) {
      if (x->stride[d] * item % bytes != 0) return false;
    }
  }
  return true;
}

inline DotPlan plan_scaled_dot(const ScaledDotParams& p) {
  DotPlan plan{0, 1, 0, 0};
  if (rows_of(p) * columns_of(p) == 0) return plan;  // nothing to launch
  const int64_t narrower = item_size(p.b.dtype);
  for (const int64_t bytes : {16, 4}) {
    const int vector = static_cast<int>(bytes / narrower);
    if (vector > 1 && dot_packs_fit(p, vector)) {
      plan.vector = vector;
      break;
    }
  }
  plan.packs_per_row = columns_of(p) / plan.vector;
  plan.packs = rows_of(p) * plan.packs_per_row;
  plan.grid = smaller(ceil_div(plan.packs, kThreads * kPacksInFlight), kMaxPartials);
  return plan;
}

// Offsets of the first element of pack `index`.
GP_HD DotOffsets dot_pack_offsets(const ScaledDotParams& p, const DotPlan& plan, int64_t index) {
  const Division i =
      index < plan.packs_per_row ? Division{0, index} : divide(index, plan.packs_per_row);
  const int64_t column = i.remainder * plan.vector;
  const DotOffsets row = row_offsets(p, i.quotient);
  return {row.a + column * p.a.stride[kDotDims - 1], row.b + column * p.b.stride[kDotDims - 1]};
}

// Bytes of the workspace (see launch.h) that the launch needs. The gate uses the same workspace.
inline size_t workspace_bytes(const DotPlan& plan) {
  return plan.grid > 1 ? kTicketBytes + static_cast<size_t>(plan.grid) * sizeof(double) : 0;
}

// Returns a cudaError_t as int (0: success). stream is a cudaStream_t.
int launch_scaled_dot(const ScaledDotParams& params, void* workspace, void* stream);

}  // namespace gated_prompt
