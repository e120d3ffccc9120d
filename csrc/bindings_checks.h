// SPDX-License-Identifier: Apache-2.0
// Checks of torch tensors, shared by all raw ops. They are for memory safety. The meaning of
// arguments is checked, with better messages, in gated_prompt/checks.py.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "dtypes.h"

// Facts about the build are passed as bare words (-DGP_NVCC=13.0), which need no quoting in shells.
#define GP_STRING_OF(...) #__VA_ARGS__
#define GP_STRING(...) GP_STRING_OF(__VA_ARGS__)

namespace gated_prompt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType to_dtype(ScalarType type, const char* name, const char* op = "prompt_gate") {
  switch (type) {
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name,
                      " must be float64, float32, bfloat16 or float16, got scalar type ",
                      static_cast<int>(type));
      return DType::kFloat32;
  }
}

// There are kernels for equal dtypes, and for float32 together with a 16-bit type.
inline bool have_kernel(DType a, DType b) {
  return a == b || (a == DType::kFloat32 && item_size(b) == 2) ||
         (b == DType::kFloat32 && item_size(a) == 2);
}

inline void check_dims(const Tensor& tensor, const char* name, int64_t wanted) {
  STD_TORCH_CHECK(tensor.dim() == wanted, "prompt_gate: ", name, " must have ", wanted,
                  " dimensions, got ", tensor.dim());
}

// The storage must contain every element that sizes and strides reach. A freed storage has 0 bytes.
inline void check_storage(const Tensor& tensor, const char* name, const char* op = "prompt_gate") {
  if (tensor.numel() == 0) return;
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  int64_t last = tensor.storage_offset();
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const int64_t needed = (last + 1) * static_cast<int64_t>(tensor.element_size());
  STD_TORCH_CHECK(needed <= bytes, op, ": ", name, " reaches ", needed, " bytes into a storage of ",
                  bytes, " bytes (was it freed or resized?)");
}

inline void check_device(const Tensor& tensor, const char* name, const Tensor& reference,
                         const char* reference_name = "block_out", const char* op = "prompt_gate") {
  STD_TORCH_CHECK(tensor.is_cuda() == reference.is_cuda() &&
                      tensor.get_device_index() == reference.get_device_index(),
                  op, ": ", name, " is not on the device of ", reference_name);
}

}  // namespace gated_prompt
