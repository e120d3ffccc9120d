// SPDX-License-Identifier: Apache-2.0
// CPU kernel of scaled_dot.
#include "scaled_dot.h"

#include <algorithm>
#include <vector>

#include "vec_cpu.h"

namespace gated_prompt {
namespace {

// Columns [column, column + columns) of rows [row, row + rows).
struct Block {
  int64_t row, rows, column, columns;
};

// A block with several rows has short rows. They are copied into one buffer first, because a loop
// over the products of one short row would do too little work.
template <class A>
double dot_block(const ScaledDotParams& p, const Block& block, A* a_buffer, A* b_buffer) {
  const int64_t n = block.columns;
  const auto load = [&](const DotOperand& x, int64_t row_start, A* buffer) {
    const int64_t stride = x.stride[kDotDims - 1];
    return load_any(x.data, x.dtype, row_start + block.column * stride, stride, n, buffer);
  };
  if (block.rows == 1) {
    const DotOffsets start = row_offsets(p, block.row);
    return dot_row(load(p.a, start.a, a_buffer), load(p.b, start.b, b_buffer), n);
  }
  const auto gather = [&](const DotOperand& x, int64_t row_start, A* target) {
    const A* values = load(x, row_start, target);
    if (values != target) std::copy(values, values + n, target);
  };
  for (int64_t i = 0; i < block.rows; ++i) {
    const DotOffsets start = row_offsets(p, block.row + i);
    gather(p.a, start.a, a_buffer + i * n);
    gather(p.b, start.b, b_buffer + i * n);
  }
  return dot_row(a_buffer, b_buffer, block.rows * n);
}

template <class A>
void dot(const ScaledDotParams& p, int64_t begin, int64_t end, double* partials) {
  const DotTasks tasks = dot_tasks_of(p);
  const int64_t size = tasks.rows * tasks.columns;
  std::vector<A> memory(static_cast<size_t>(2 * size));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / tasks.per_row * tasks.rows;
    const int64_t column = task % tasks.per_row * tasks.columns;
    const Block block{row, std::min(tasks.rows, rows_of(p) - row), column,
                      std::min(tasks.columns, columns_of(p) - column)};
    partials[task] = dot_block(p, block, memory.data(), memory.data() + size);
  }
}

}  // namespace

void scaled_dot_cpu(const ScaledDotParams& params, int64_t task_begin, int64_t task_end,
                    double* partials) {
  params.a.dtype == DType::kFloat64 ? dot<double>(params, task_begin, task_end, partials)
                                    : dot<float>(params, task_begin, task_end, partials);
}

void scaled_dot_finish_cpu(const ScaledDotParams& params, const double* partials) {
  double sum = 0;
  for (int64_t task = 0; task < dot_tasks_of(params).count; ++task) sum += partials[task];
  visit(params.temperature_dtype, [&](auto type) {
    using T = decltype(type);
    const double temperature = widen(*static_cast<const T*>(params.temperature));
    const double result = temperature_gradient(temperature, sum);
    *static_cast<T*>(params.result) = narrow<T>(static_cast<compute_t<T>>(result));
  });
}

}  // namespace gated_prompt
