// SPDX-License-Identifier: Apache-2.0
// The raw ops of a temperature: they check torch tensors, fill in ScaledDotParams or DivideParams,
// and run the kernels of a Backend with its dot(params) or divide(params). Backends and the purpose
// of the checks: see bindings.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "bindings_checks.h"
#include "divide_rows.h"
#include "scaled_dot.h"

namespace gated_prompt {

inline void check_temperature(const Tensor& temperature, const Tensor& like, const char* like_name,
                              const char* op) {
  STD_TORCH_CHECK(temperature.numel() == 1, op, ": temperature must have one element, got ",
                  temperature.numel());
  check_device(temperature, "temperature", like, like_name, op);
  check_storage(temperature, "temperature", op);
}

// ---- scaled_dot ----

inline DotOperand make_operand(const Tensor& tensor, const char* name, const Tensor& like) {
  const int64_t dims = tensor.dim();
  STD_TORCH_CHECK(dims <= kDotDims, "scaled_dot: ", name, " must have at most ", kDotDims,
                  " dimensions, got ", dims);
  STD_TORCH_CHECK(dims == like.dim(), "scaled_dot: b must have the shape of a, got ", dims,
                  " dimensions, not ", like.dim());
  check_device(tensor, name, like, "a", "scaled_dot");
  check_storage(tensor, name, "scaled_dot");
  DotOperand operand{tensor.data_ptr(), {}, to_dtype(tensor.scalar_type(), name, "scaled_dot")};
  for (int64_t d = 0; d < dims; ++d) {
    STD_TORCH_CHECK(tensor.size(d) == like.size(d), "scaled_dot: b must have the shape of a, got ",
                    tensor.size(d), " in dimension ", d, ", not ", like.size(d));
    operand.stride[kDotDims - dims + d] = tensor.stride(d);
  }
  return operand;
}

// a and b have the same shape and any strides. Returns -(1/temperature) * sum(a * b) in the shape
// and dtype of temperature.
template <class Backend>
Tensor scaled_dot(const Tensor& a, const Tensor& b, const Tensor& temperature) {
  const Backend backend(a, "a", "scaled_dot");
  ScaledDotParams p{};
  p.a = make_operand(a, "a", a);
  p.b = make_operand(b, "b", a);
  STD_TORCH_CHECK(have_kernel(p.a.dtype, p.b.dtype),
                  "scaled_dot: a and b must have one dtype, or one of them float32 and the other "
                  "bfloat16 or float16");
  for (int64_t d = 0; d < kDotDims; ++d) {
    const int64_t own = d - (kDotDims - a.dim());
    p.size[d] = own < 0 ? 1 : a.size(own);
  }
  check_temperature(temperature, a, "a", "scaled_dot");
  p.temperature = temperature.data_ptr();
  p.temperature_dtype = to_dtype(temperature.scalar_type(), "temperature", "scaled_dot");
  const std::vector<int64_t> shape(static_cast<size_t>(temperature.dim()), 1);
  // a sum over no elements is 0
  if (a.numel() == 0) return torch::stable::new_zeros(temperature, shape);
  Tensor result = torch::stable::new_empty(temperature, shape);
  p.result = result.data_ptr();
  backend.dot(coalesce(p));
  return result;
}

// ---- divide_rows ----

// Returns the result for a contiguous tensor whose first `rows` rows are divided, and sets *operand
// to the tensor and the result.
inline Tensor make_divided(const Tensor& tensor, const char* name, const Tensor& weight,
                           int64_t rows, ScalarType dtype, DivideOperand* operand) {
  check_device(tensor, name, weight, "weight", "divide_rows");
  check_storage(tensor, name, "divide_rows");
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == weight.scalar_type() &&
                      tensor.size(0) == weight.size(0),
                  "divide_rows: ", name,
                  " must be contiguous, of weight's dtype, with as many rows as weight");
  Tensor result = torch::stable::new_empty(tensor, tensor.sizes(), dtype);
  const int64_t size = tensor.numel(), all = tensor.size(0);
  *operand = {tensor.data_ptr(), result.data_ptr(), size, all == 0 ? 0 : size / all * rows};
  return result;
}

// Clamps the temperature to [low, high] and divides the first `rows` rows of weight [R, C] and bias
// [R] by it. Returns the new weight and bias in `dtype`, and the clamped temperature. Without a
// bias, the second result is [0].
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> divide_rows(const Tensor& weight,
                                               const std::optional<Tensor>& bias,
                                               const Tensor& temperature, int64_t rows, double low,
                                               double high, ScalarType dtype) {
  const char* const op = "divide_rows";
  const Backend backend(weight, "weight", op);
  DivideParams p{};
  STD_TORCH_CHECK(weight.dim() == 2, "divide_rows: weight must have 2 dimensions, got ",
                  weight.dim());
  STD_TORCH_CHECK(0 <= rows && rows <= weight.size(0), "divide_rows: rows must be in [0, ",
                  weight.size(0), "], got ", rows);
  p.from = to_dtype(weight.scalar_type(), "weight", op);
  p.to = to_dtype(dtype, "the result", op);
  STD_TORCH_CHECK(p.from == p.to || (p.from == DType::kFloat32 && item_size(p.to) == 2),
                  "divide_rows: no kernel for these dtypes of weight and result");
  check_temperature(temperature, weight, "weight", op);
  p.temperature_dtype = to_dtype(temperature.scalar_type(), "temperature", op);
  p.temperature = temperature.data_ptr();
  p.low = low, p.high = high;
  Tensor new_weight = make_divided(weight, "weight", weight, rows, dtype, &p.weight);
  Tensor new_bias = torch::stable::new_empty(weight, {0}, dtype);
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1, "divide_rows: bias must have 1 dimension, got ", bias->dim());
    new_bias = make_divided(*bias, "bias", weight, rows, dtype, &p.bias);
  }
  const std::vector<int64_t> shape(static_cast<size_t>(temperature.dim()), 1);
  Tensor clamped = torch::stable::new_empty(temperature, shape);
  p.clamped = clamped.data_ptr();
  backend.divide(p);
  return {new_weight, new_bias, clamped};
}

}  // namespace gated_prompt
