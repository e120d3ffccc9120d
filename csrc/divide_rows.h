// SPDX-License-Identifier: Apache-2.0
// The interface between bindings, CPU kernels and CUDA kernels of divide_rows. No torch or CUDA
// header here.
//
//   weight' = weight / t in the first rows, weight in the other rows; bias' likewise; t' = t
//
// with t = clamp(temperature, low, high). This folds a temperature into the weights of a linear
// layer whose first outputs are the queries. Quotients are computed in float32 (float64 for
// float64) and rounded once to the dtype of the result, which may differ from the dtype of weight.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "launch.h"

namespace gated_prompt {

template <class A>
GP_HD A clamp(A value, A low, A high) {
  return value < low ? low : value > high ? high : value;  // NaN stays
}

// Clamps the temperature to [low, high] and rounds the result to T, the temperature's dtype.
template <class T>
GP_HD T clamp_temperature(T temperature, double low, double high) {
  using A = compute_t<T>;
  return narrow<T>(clamp(widen(temperature), static_cast<A>(low), static_cast<A>(high)));
}

// weight / temperature, computed in the compute type of T and rounded once to U.
template <class U, class T>
GP_HD U divided(T weight, compute_t<T> temperature) {
  return narrow<U>(static_cast<compute_t<U>>(widen(weight) / temperature));
}

// A contiguous tensor and its contiguous result.
struct DivideOperand {
  const void* source;
  void* target;
  int64_t size;     // elements
  int64_t divided;  // the first `divided` elements are divided, the others only converted
};

struct DivideParams {
  DivideOperand weight, bias;  // bias.size == 0: none
  DType from, to;              // float32 to a 16-bit type, or equal
  const void* temperature;     // one element
  void* clamped;               // one element, in the dtype of temperature: t
  DType temperature_dtype;
  double low, high;
};

// ---- CPU ----

// Writes elements [begin, end) of weight followed by bias.
void divide_rows_cpu(const DivideParams& params, int64_t begin, int64_t end);
// Writes params.clamped.
void clamp_cpu(const DivideParams& params);

// ---- CUDA ----

constexpr int kDividePacks = 4;  // per thread, loaded together

struct DividePlan {
  int64_t packs;        // of weight
  int64_t weight_grid;  // blocks for weight; in later blocks a thread takes one element of bias
  int64_t grid;         // blocks in all
  int vector;           // elements in a pack: 16 bytes of the wider dtype, or one element
};

inline DividePlan plan_divide_rows(const DivideParams& p) {
  const int wide = static_cast<int>(16 / item_size(p.from));
  const auto fits = [&](const void* data, DType dtype) {
    return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(wide * item_size(dtype)) == 0;
  };
  const DivideOperand& w = p.weight;
  const bool packs =
      w.size % wide == 0 && w.divided % wide == 0 && fits(w.source, p.from) && fits(w.target, p.to);
  DividePlan plan{0, 0, 0, packs ? wide : 1};
  plan.packs = w.size / plan.vector;
  plan.weight_grid = ceil_div(plan.packs, kThreads * kDividePacks);
  plan.grid = at_least_one(plan.weight_grid + ceil_div(p.bias.size, kThreads));
  return plan;
}

// Returns a cudaError_t as int (0: success). stream is a cudaStream_t.
int launch_divide_rows(const DivideParams& params, void* stream);

}  // namespace gated_prompt
