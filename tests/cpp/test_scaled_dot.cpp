// SPDX-License-Identifier: Apache-2.0
// Tests of scaled_dot's torch-free code: formula, merged dimensions, CPU kernel on strided data,
// CUDA launch shape and index map. Usage: test_scaled_dot LAW; exit status 0 if the law holds.
#include <algorithm>
#include <utility>

#include "scaled_dot_cases.h"

namespace {

// The gradient equals finite differences of sum(g * q / temperature).
void test_formula() {
  const double q = 1.7, g = -0.6, step = 1e-6;
  for (const double t : {0.01, 0.7, 1.0, -2.0, 10.0}) {
    const double difference = (g * q / (t + step * t) - g * q / (t - step * t)) / (2 * step * t);
    const double got = temperature_gradient(t, g * (q / t));
    CHECK(std::fabs(got - difference) <= 1e-8 * std::fabs(difference), "%g: %g, not %g", t, got,
          difference);
  }
}

// ---- merged dimensions ----

using Pairs = std::vector<std::pair<int64_t, int64_t>>;  // offsets of elements of a and b

Pairs pairs_of(const ScaledDotParams& p) {
  Pairs pairs;
  for_each_index({p.size[0], p.size[1], p.size[2], p.size[3]}, [&](std::array<int64_t, 4> i) {
    int64_t a = 0, b = 0;
    for (size_t d = 0; d < 4; ++d) a += i[d] * p.a.stride[d], b += i[d] * p.b.stride[d];
    pairs.emplace_back(a, b);
  });
  std::sort(pairs.begin(), pairs.end());
  return pairs;
}

int dimensions_of(const ScaledDotParams& p) {
  return static_cast<int>(std::count_if(p.size, p.size + 4, [](int64_t n) { return n != 1; }));
}

// For all layouts the same elements are multiplied; known layouts merge to known dimensions.
void test_coalesce() {
  for_each_dot([](DotCall call) {
    ScaledDotParams before = call.params();
    const ScaledDotParams after = coalesce(before);
    CHECK(item_size(after.a.dtype) >= item_size(after.b.dtype), "the wider dtype first");
    if (after.a.data != before.a.data) std::swap(before.a, before.b);
    CHECK(after.a.data == before.a.data && after.b.data == before.b.data, "operands");
    CHECK(pairs_of(before) == pairs_of(after), "other elements meet");
    for (int d = 1; d < 4; ++d) {
      CHECK(after.size[d] != 1 || after.size[d - 1] == 1, "sizes of 1 come first");
      CHECK(after.size[d] != 1 || after.a.stride[d] + after.b.stride[d] == 0, "their strides");
    }
  });
  const struct {
    DotLayout (*a)(DotShape);
    DotLayout (*b)(DotShape);
    int dimensions;
    int64_t columns;
  } known[] = {
      {dense, dense, 1, 3 * 7 * 4 * 16},
      {heads_first, heads_first, 1, 3 * 7 * 4 * 16},
      {channels_first, channels_first, 1, 3 * 7 * 4 * 16},
      {one_element, one_element, 1, 3 * 7 * 4 * 16},
      {packed, dense, 2, 4 * 16},
      {packed, packed, 2, 4 * 16},
      {dense, one_sample, 2, 7 * 4 * 16},
      {second_channels, dense, 1, 3 * 7 * 4 * 16},
      {tokens_first, packed, 3, 4 * 16},
      {packed, heads_first, 4, 16},
      {gaps, gaps, 2, 16},
  };
  for (const auto& k : known) {
    for (const bool swapped : {false, true}) {
      DotCall call({{3, 7, 4, 16}, swapped ? k.b : k.a, swapped ? k.a : k.b}, {kF32, kF32}, kF32);
      const ScaledDotParams p = coalesce(call.params());
      CHECK(dimensions_of(p) == k.dimensions, "%d dimensions, not %d", dimensions_of(p),
            k.dimensions);
      CHECK(columns_of(p) == k.columns, "%d columns", int(columns_of(p)));
    }
  }
}

// ---- CPU kernel ----

void test_values() {
  for_each_dot([](const DotCall& start) {
    DotCall call = start;
    run_dot_cpu(call.params());
    double wanted = 0, terms = 0;
    start.oracle(&wanted, &terms);
    const double got = call.result.at(0, 0, 0);
    CHECK(std::fabs(got - wanted) <= start.bound(wanted, terms), "%g, not %g", got, wanted);
    check_untouched(call.result, start.result, "result");
  });
}

// Tasks are small, and any split of them gives the same bits.
void test_tasks() {
  for_each_dot([](const DotCall& start) {
    std::vector<DotCall> calls;
    for (const int64_t step : {1, 3, 1000}) {
      calls.push_back(start);
      run_dot_cpu(calls.back().params(), step);
    }
    const DotTasks tasks = dot_tasks_of(coalesce(calls[0].params()));
    CHECK(tasks.count >= 1 && tasks.rows * tasks.columns <= kDotTaskElements, "large tasks");
    for (const DotCall& call : calls) CHECK(call.result.bytes == calls[0].result.bytes, "bits");
  });
  ScaledDotParams empty{};
  empty.size[0] = empty.size[1] = empty.size[2] = 1;
  CHECK(dot_tasks_of(empty).count == 0 && plan_scaled_dot(empty).grid == 0, "nothing to do");
}

// ---- CUDA launch shape and index map ----

// The packs cover each element once, and are aligned.
void test_plan() {
  for_each_dot([](DotCall call) {
    const ScaledDotParams p = coalesce(call.params());
    const DotPlan plan = plan_scaled_dot(p);
    CHECK(plan.grid >= 1 && plan.grid <= kMaxPartials, "grid %d", int(plan.grid));
    CHECK(workspace_bytes(plan) <= kMaxWorkspaceBytes, "workspace");
    Pairs pairs;
    for (int64_t index = 0; index < plan.packs; ++index) {
      const DotOffsets start = dot_pack_offsets(p, plan, index);
      for (int i = 0; i < plan.vector; ++i) {
        pairs.emplace_back(start.a + i * p.a.stride[3], start.b + i * p.b.stride[3]);
      }
      const auto is_aligned = [&](const DotOperand& x, int64_t offset) {
        const int64_t size = item_size(x.dtype), bytes = smaller(plan.vector * size, 16);
        const auto address = reinterpret_cast<intptr_t>(x.data) + offset * size;
        return plan.vector == 1 || (x.stride[3] == 1 && address % bytes == 0);
      };
      CHECK(is_aligned(p.a, start.a) && is_aligned(p.b, start.b), "a misaligned pack");
    }
    std::sort(pairs.begin(), pairs.end());
    CHECK(pairs == pairs_of(p), "packs cover other elements");
  });
  const struct {
    DotLayout (*a)(DotShape);
    DotLayout (*b)(DotShape);
    Types types;
    int64_t dim;
    int vector;
  } known[] = {
      {packed, dense, {kF32, kF32}, 16, 4},          {packed, heads_first, {kBF16, kBF16}, 64, 8},
      {packed, dense, {kBF16, kF32}, 16, 8},         {packed, dense, {kF32, kF16}, 16, 8},
      {packed, dense, {kF64, kF64}, 16, 2},          {packed, one_off, {kF16, kF16}, 16, 1},
      {packed, even_gaps, {kF16, kF16}, 16, 2},      {packed, gaps, {kBF16, kBF16}, 16, 1},
      {packed, heads_first, {kF32, kF32}, 6, 1},     {packed, heads_first, {kBF16, kBF16}, 6, 2},
      {dense, second_channels, {kF32, kF32}, 16, 1}, {dense, one_element, {kF32, kF32}, 16, 1},
      {packed, one_sample, {kBF16, kBF16}, 8, 8},
  };
  for (const auto& k : known) {
    DotCall call({{3, 7, 4, k.dim}, k.a, k.b}, k.types, kF32);
    ScaledDotParams p = call.params();
    for (DotOperand* x : {&p.a, &p.b}) {  // an address that is never read
      const int64_t offset = x == &p.a ? call.a.layout.offset : call.b.layout.offset;
      x->data = reinterpret_cast<void*>(256 + offset * item_size(x->dtype));
    }
    CHECK(plan_scaled_dot(coalesce(p)).vector == k.vector, "vector %d, not %d",
          plan_scaled_dot(coalesce(p)).vector, k.vector);
  }
  // positions beyond 2^32, by a large stride, many packs, many rows
  const int64_t big = (int64_t{1} << 33) + 1;
  ScaledDotParams p{};
  p.size[0] = 2, p.size[1] = 3, p.size[2] = big, p.size[3] = 8;
  p.a.stride[0] = 24 * big, p.a.stride[1] = 8 * big, p.a.stride[2] = 8, p.a.stride[3] = 1;
  p.b.stride[0] = 0, p.b.stride[1] = 1, p.b.stride[2] = 0, p.b.stride[3] = big;
  const DotOffsets row = row_offsets(p, (3 + 2) * big + big - 1);
  CHECK(row.a == 8 * (6 * big - 1) && row.b == 2, "row");
  const DotOffsets pack = dot_pack_offsets(p, {1, 4, 2, 12 * big}, 12 * big - 1);
  CHECK(pack.a == 48 * big - 4 && pack.b == 2 + 4 * big, "pack");
}

}  // namespace

int main(int argc, char** argv) {
  return run_law(argc, argv,
                 {
                     {"formula", test_formula},
                     {"coalesce", test_coalesce},
                     {"values", test_values},
                     {"tasks", test_tasks},
                     {"plan", test_plan},
                 });
}
