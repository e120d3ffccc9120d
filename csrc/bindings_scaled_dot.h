// SPDX-License-Identifier: Apache-2.0
// From torch tensors to ScaledDotParams, for memory safety as in bindings.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "bindings.h"
#include "scaled_dot.h"

namespace gated_prompt {

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

// a and b of one shape, with any strides; returns -(1/temperature) * sum(a * b) in the shape and
// dtype of temperature. launch(params) runs the kernel.
template <class Launch>
Tensor scaled_dot(const Tensor& a, const Tensor& b, const Tensor& temperature, Launch launch) {
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
  STD_TORCH_CHECK(temperature.numel() == 1, "scaled_dot: temperature must have one element, got ",
                  temperature.numel());
  check_device(temperature, "temperature", a, "a", "scaled_dot");
  check_storage(temperature, "temperature", "scaled_dot");
  p.temperature = temperature.data_ptr();
  p.temperature_dtype = to_dtype(temperature.scalar_type(), "temperature", "scaled_dot");
  const std::vector<int64_t> shape(static_cast<size_t>(temperature.dim()), 1);
  // a sum over nothing is 0
  if (a.numel() == 0) return torch::stable::new_zeros(temperature, shape);
  Tensor result = torch::stable::new_empty(temperature, shape);
  p.result = result.data_ptr();
  launch(coalesce(p));
  return result;
}

}  // namespace gated_prompt
