// SPDX-License-Identifier: Apache-2.0
// Tensors and calls of scaled_dot for the C++ tests, as in cases.h for the gate.
#pragma once

#include <array>

#include "cases.h"
#include "scaled_dot.h"

struct DotShape {
  int64_t batch, tokens, heads, dim;
  std::array<int64_t, 4> sizes() const {
    return {batch, tokens, heads, dim};
  }
};
struct DotLayout {
  std::array<int64_t, 4> stride;
  int64_t offset;
};

inline DotLayout dense(DotShape s) {
  return {{s.tokens * s.heads * s.dim, s.heads * s.dim, s.dim, 1}, 0};
}
inline DotLayout packed(DotShape s) {  // q in a packed qkv
  return {{3 * s.tokens * s.heads * s.dim, 3 * s.heads * s.dim, s.dim, 1}, 0};
}
inline DotLayout heads_first(DotShape s) {  // [B, H, N, d]
  return {{s.tokens * s.heads * s.dim, s.dim, s.tokens * s.dim, 1}, 0};
}
inline DotLayout tokens_first(DotShape s) {  // [N, B, H, d]
  return {{s.heads * s.dim, s.batch * s.heads * s.dim, s.dim, 1}, 0};
}
inline DotLayout channels_first(DotShape s) {  // [B, H, d, N]
  return {{s.tokens * s.heads * s.dim, 1, s.tokens * s.dim, s.tokens}, 0};
}
inline DotLayout one_off(DotShape s) {
  return {dense(s).stride, 1};
}
inline DotLayout gaps(DotShape s) {  // they break the alignment
  return {{s.tokens * s.heads * (s.dim + 3), s.heads * (s.dim + 3), s.dim + 3, 1}, 2};
}
inline DotLayout even_gaps(DotShape s) {  // 16-bit types are aligned to 4 bytes only
  return {{s.tokens * s.heads * (s.dim + 2), s.heads * (s.dim + 2), s.dim + 2, 1}, 2};
}
inline DotLayout second_channels(DotShape s) {
  return {{2 * s.tokens * s.heads * s.dim, 2 * s.heads * s.dim, 2 * s.dim, 2}, 1};
}
inline DotLayout one_sample(DotShape s) {  // the same for every sample
  return {{0, s.heads * s.dim, s.dim, 1}, 0};
}
inline DotLayout one_element(DotShape) {
  return {{0, 0, 0, 0}, 0};
}

struct DotCase {
  DotShape shape;
  DotLayout (*a)(DotShape);
  DotLayout (*b)(DotShape);
};

constexpr DotCase kDotCases[] = {
    {{1, 1, 1, 1}, dense, dense},
    {{1, 1, 1, 1}, one_element, one_off},
    {{2, 5, 3, 7}, packed, dense},
    {{2, 5, 3, 7}, dense, heads_first},
    {{2, 5, 3, 7}, channels_first, gaps},
    {{3, 7, 4, 16}, packed, dense},
    {{3, 7, 4, 16}, packed, heads_first},
    {{3, 7, 4, 16}, packed, packed},
    {{3, 7, 4, 16}, heads_first, heads_first},
    {{3, 7, 4, 16}, tokens_first, packed},
    {{3, 7, 4, 16}, channels_first, channels_first},
    {{3, 7, 4, 16}, channels_first, packed},
    {{3, 7, 4, 16}, one_off, packed},
    {{3, 7, 4, 16}, dense, gaps},
    {{3, 7, 4, 16}, even_gaps, dense},
    {{3, 7, 4, 16}, second_channels, dense},
    {{3, 7, 4, 16}, dense, one_sample},
    {{3, 7, 4, 16}, one_element, dense},
    {{3, 7, 4, 16}, one_element, one_element},
    {{2, 37, 12, 64}, packed, heads_first},
    {{2, 37, 12, 64}, packed, dense},
    {{2, 37, 12, 64}, dense, dense},
    {{2, 37, 12, 33}, dense, gaps},
    {{5, 1, 1, 1500}, dense, packed},  // rows longer than a task
    {{300, 9, 1, 1}, packed, dense},   // every third element
};

struct DotTensor {
  std::vector<char> bytes;
  DotShape shape;
  DotLayout layout;
  DType dtype;

  DotTensor(DotShape s, DotLayout l, DType type, unsigned seed) : shape(s), layout(l), dtype(type) {
    int64_t extent = l.offset + 1;
    for (size_t d = 0; d < 4; ++d) extent += (s.sizes()[d] - 1) * l.stride[d];
    bytes.resize(static_cast<size_t>(extent * item_size(type)));
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    const auto size = static_cast<size_t>(item_size(type));
    for (size_t i = 0; i < bytes.size(); i += size) store(&bytes[i], type, normal(random));
  }
  DotOperand operand() const {
    DotOperand x{bytes.data() + layout.offset * item_size(dtype), {}, dtype};
    for (size_t d = 0; d < 4; ++d) x.stride[d] = layout.stride[d];
    return x;
  }
  double at(std::array<int64_t, 4> i) const {
    int64_t element = layout.offset;
    for (size_t d = 0; d < 4; ++d) element += i[d] * layout.stride[d];
    return load(&bytes[static_cast<size_t>(element * item_size(dtype))], dtype);
  }
};

template <class F>
void for_each_index(DotShape s, F&& f) {
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t n = 0; n < s.tokens; ++n) {
      for (int64_t h = 0; h < s.heads; ++h) {
        for (int64_t d = 0; d < s.dim; ++d) f(std::array<int64_t, 4>{b, n, h, d});
      }
    }
  }
}

// The tensors of one call. A copy of a DotCall has its own tensors.
struct DotCall {
  DotCase c;
  DotTensor a, b;
  Tensor temperature, result;

  DotCall(const DotCase& case_, Types types, DType dtype)
      : c(case_),
        a(c.shape, c.a(c.shape), types.out, 1),
        b(c.shape, c.b(c.shape), types.in, 2),
        temperature({1, 1, 1}, {0, 0, 0, 0}, dtype, 3),
        result({1, 1, 1}, {0, 0, 0, 0}, dtype, 4) {
    context = "types " + std::to_string(int(types.out)) + " and " + std::to_string(int(types.in));
    for (const int64_t n : c.shape.sizes()) context += " " + std::to_string(n);
    for (const DotTensor* t : {&a, &b}) {
      context += " [";
      for (const int64_t stride : t->layout.stride) context += std::to_string(stride) + ",";
      context += "]+" + std::to_string(t->layout.offset);
    }
  }

  ScaledDotParams params() {  // not yet coalesced
    ScaledDotParams p{};
    for (size_t d = 0; d < 4; ++d) p.size[d] = c.shape.sizes()[d];
    p.a = a.operand(), p.b = b.operand();
    p.temperature = temperature.rows().data, p.result = result.rows().data;
    p.temperature_dtype = temperature.dtype;
    return p;
  }
  // The exact result, and the sum of the terms' absolute values, the scale of rounding errors.
  void oracle(double* wanted, double* terms) const {
    double sum = 0, size = 0;
    for_each_index(c.shape, [&](std::array<int64_t, 4> i) {
      sum += a.at(i) * b.at(i), size += std::fabs(a.at(i) * b.at(i));
    });
    const double t = temperature.at(0, 0, 0);
    *wanted = -(1 / t) * sum, *terms = size / std::fabs(t);
  }
  // Covers float32 sums of up to about 50 terms per lane or thread, then rounding the result.
  double bound(double wanted, double terms) const {
    const DType compute = a.dtype == kF64 ? kF64 : kF32;
    const double subnormal = result.dtype == kF16 ? 0x1p-24 : 0;
    return 8 * epsilon(compute) * terms + epsilon(result.dtype) * std::fabs(wanted) + subnormal;
  }
};

// Every case with every pair of dtypes; the dtype of the temperature changes with each call.
template <class F>
void for_each_dot(F&& check) {
  size_t turn = 0;
  constexpr DType kTemperatures[] = {kF32, kF64, kBF16, kF16, kF32};
  for (const DotCase& c : kDotCases) {
    for (const Types types : kTypes) check(DotCall(c, types, kTemperatures[turn++ % 5]));
  }
}

inline void run_dot_cpu(const ScaledDotParams& params, int64_t step = 1 << 30) {
  const ScaledDotParams p = coalesce(params);
  const int64_t count = dot_tasks_of(p).count;
  std::vector<double> partials(static_cast<size_t>(count), NAN);
  for (int64_t begin = 0; begin < count; begin += step) {
    scaled_dot_cpu(p, begin, smaller(begin + step, count), partials.data());
  }
  scaled_dot_finish_cpu(p, partials.data());
}
