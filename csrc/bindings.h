// SPDX-License-Identifier: Apache-2.0
// From torch tensors to PromptGateParams: what the CPU and the CUDA registration of an op share.
// Checks here are for memory safety (no read or write outside a tensor, no race between elements);
// the meaning of arguments is checked, with better messages, in gated_prompt/functional.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "prompt_gate.h"

// Build facts come as bare words (-DGP_NVCC=13.0): no quotes to get through shells.
#define GP_STRING_OF(...) #__VA_ARGS__
#define GP_STRING(...) GP_STRING_OF(__VA_ARGS__)

namespace gated_prompt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType to_dtype(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "prompt_gate: ", name,
                      " must be float64, float32, bfloat16 or float16, got scalar type ",
                      static_cast<int>(type));
      return DType::kFloat32;
  }
}

inline void check_dims(const Tensor& tensor, const char* name, int64_t wanted) {
  STD_TORCH_CHECK(tensor.dim() == wanted, "prompt_gate: ", name, " must have ", wanted,
                  " dimensions, got ", tensor.dim());
}

// The storage holds every element that sizes and strides reach (a freed storage holds none).
inline void check_storage(const Tensor& tensor, const char* name) {
  if (tensor.numel() == 0) return;
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  int64_t last = tensor.storage_offset();
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const int64_t needed = (last + 1) * static_cast<int64_t>(tensor.element_size());
  STD_TORCH_CHECK(needed <= bytes, "prompt_gate: ", name, " reaches ", needed,
                  " bytes into a storage of ", bytes, " bytes (was it freed or resized?)");
}

inline void check_device(const Tensor& tensor, const char* name, const Tensor& reference) {
  STD_TORCH_CHECK(tensor.is_cuda() == reference.is_cuda() &&
                      tensor.get_device_index() == reference.get_device_index(),
                  "prompt_gate: ", name, " is not on the device of block_out");
}

// Rows [start, start + length) of a [B, N, D] tensor.
inline Rows make_rows(const Tensor& tensor, const char* name, int64_t start) {
  const int64_t row = tensor.stride(1);
  const DType dtype = to_dtype(tensor.scalar_type(), name);
  return {static_cast<char*>(tensor.data_ptr()) + start * row * item_size(dtype), tensor.stride(0),
          row, tensor.stride(2), dtype};
}

struct Axis {
  int64_t stride, size;
};

// Axes with more than one index, the longest stride first.
inline std::vector<Axis> axes_of(const PromptGateParams& p, const Rows& rows) {
  std::vector<Axis> axes;
  for (const Axis axis : {Axis{rows.batch_stride, p.batch}, Axis{rows.row_stride, p.length},
                          Axis{rows.channel_stride, p.dim}}) {
    if (axis.size < 2) continue;
    auto place = axes.begin();
    while (place != axes.end() && place->stride >= axis.stride) ++place;
    axes.insert(place, axis);
  }
  return axes;
}

// Elements from the first to the last one that axes [first, end) reach.
inline int64_t reach(const std::vector<Axis>& axes, size_t first) {
  int64_t sum = 0;
  for (size_t i = first; i < axes.size(); ++i) sum += (axes[i].size - 1) * axes[i].stride;
  return sum;
}

// Whether delta = sum of k_i * stride_i with |k_i| < size_i, for axes that nest (see below).
inline bool is_reached(const std::vector<Axis>& axes, size_t first, int64_t delta) {
  if (first == axes.size()) return delta == 0;
  const Axis axis = axes[first];
  const int64_t rest = reach(axes, first + 1);
  for (int64_t k = (delta - rest) / axis.stride - 1; k <= (delta + rest) / axis.stride + 1; ++k) {
    if (k > -axis.size && k < axis.size && is_reached(axes, first + 1, delta - k * axis.stride)) {
      return true;
    }
  }
  return false;
}

// `written` rows never overlap themselves, and overlap `read` rows only where both are the same
// elements.
inline void check_overlap(const PromptGateParams& p, const Rows& written,
                          const Rows* read = nullptr, const char* name = nullptr) {
  const std::vector<Axis> axes = axes_of(p, written);
  for (size_t i = 0; i < axes.size(); ++i) {
    STD_TORCH_CHECK(axes[i].stride > reach(axes, i + 1),
                    "prompt_gate: the rows to be written overlap themselves in memory (an expanded "
                    "tensor?): call .clone() first");
  }
  if (read == nullptr) return;
  const auto low = reinterpret_cast<intptr_t>(written.data);
  const auto other = reinterpret_cast<intptr_t>(read->data);
  const int64_t size = item_size(written.dtype);
  const std::vector<Axis> other_axes = axes_of(p, *read);
  const bool apart = low + (reach(axes, 0) + 1) * size <= other ||
                     other + (reach(other_axes, 0) + 1) * item_size(read->dtype) <= low;
  const auto same = [](int64_t axis_size, int64_t a, int64_t b) { return axis_size < 2 || a == b; };
  const bool same_strides = written.dtype == read->dtype &&
                            same(p.batch, written.batch_stride, read->batch_stride) &&
                            same(p.length, written.row_stride, read->row_stride) &&
                            same(p.dim, written.channel_stride, read->channel_stride);
  const bool interleaved =
      same_strides && (other - low) % size == 0 && !is_reached(axes, 0, (other - low) / size);
  STD_TORCH_CHECK(apart || interleaved || (same_strides && low == other), "prompt_gate: ", name,
                  " overlaps the prompt rows of block_out in memory: pass a copy of one of them");
}

// The gate is read while rows are written, so it may not lie between the first and the last of
// them.
inline void check_gate_apart(const PromptGateParams& p) {
  const auto low = reinterpret_cast<intptr_t>(p.out.data);
  const auto gate = reinterpret_cast<intptr_t>(p.gate_logit);
  const auto high = low + (reach(axes_of(p, p.out), 0) + 1) * item_size(p.out.dtype);
  STD_TORCH_CHECK(
      gate + item_size(p.gate_dtype) <= low || high <= gate,
      "prompt_gate: gate_logit lies among the prompt rows of block_out in memory: pass a "
      "copy of it");
}

// Checks of block_out or its gradient [B, N, D], the slice and the gate.
inline PromptGateParams make_params(const Tensor& sequence, const Tensor& gate_logit, int64_t start,
                                    int64_t length, bool mix) {
  check_dims(sequence, "block_out", 3);
  check_dims(gate_logit, "gate_logit", 0);
  check_device(gate_logit, "gate_logit", sequence);
  check_storage(sequence, "block_out");
  check_storage(gate_logit, "gate_logit");
  STD_TORCH_CHECK(0 <= start && 0 <= length && start <= sequence.size(1) - length,
                  "prompt_gate: slice of ", length, " rows from ", start,
                  " is outside N=", sequence.size(1));
  PromptGateParams p{};
  p.batch = sequence.size(0);
  p.length = length;
  p.dim = sequence.size(2);
  p.mix = mix;
  p.gate_logit = gate_logit.data_ptr();
  p.gate_dtype = to_dtype(gate_logit.scalar_type(), "gate_logit");
  p.out = make_rows(sequence, "block_out", start);
  return p;
}

inline void check_rows(const PromptGateParams& p, const Tensor& tensor, const char* name,
                       const Tensor& sequence) {
  check_dims(tensor, name, 3);
  check_device(tensor, name, sequence);
  check_storage(tensor, name);
  STD_TORCH_CHECK(
      tensor.size(0) == p.batch && tensor.size(1) == p.length && tensor.size(2) == p.dim,
      "prompt_gate: ", name, " must be [", p.batch, ", ", p.length, ", ", p.dim, "], got [",
      tensor.size(0), ", ", tensor.size(1), ", ", tensor.size(2), "]");
}

// The kernels know float32 beside a 16-bit type, and equal dtypes.
inline void check_dtypes(DType sequence, DType block_in) {
  const bool mixed = (sequence == DType::kFloat32 && item_size(block_in) == 2) ||
                     (block_in == DType::kFloat32 && item_size(sequence) == 2);
  STD_TORCH_CHECK(sequence == block_in || mixed,
                  "prompt_gate: these dtypes of block_out and block_in have no kernel");
}

// block_out [B, N, D] is updated in place; returns saved [B, P, D], or [0] unless save.
// launch(params) runs the kernel.
template <class Launch>
Tensor prompt_gate_fwd(Tensor& block_out, const Tensor& block_in, const Tensor& gate_logit,
                       int64_t start, int64_t length, bool mix, bool save, Launch launch) {
  PromptGateParams p = make_params(block_out, gate_logit, start, length, mix);
  check_rows(p, block_in, "block_in", block_out);
  p.in = make_rows(block_in, "block_in", 0);
  check_dtypes(p.out.dtype, p.in.dtype);
  const bool empty = p.batch * p.length * p.dim == 0;
  if (!empty) check_overlap(p, p.out, &p.in, "block_in");
  if (!empty) check_gate_apart(p);
  Tensor saved = save ? torch::stable::new_empty(block_out, {p.batch, p.length, p.dim})
                      : torch::stable::new_empty(block_out, {0});
  if (empty) return saved;
  if (save) p.saved = make_rows(saved, "saved", 0);
  launch(p);
  return saved;
}

// grad_out [B, N, D]: its prompt rows are rescaled in place if need_out. Returns the gradients of
// the rows of block_in [B, P, D] and of gate_logit [], or [0] for one that is not needed.
template <class Launch>
std::tuple<Tensor, Tensor> prompt_gate_bwd(Tensor& grad_out, const Tensor& saved,
                                           const Tensor& gate_logit, int64_t start, int64_t length,
                                           bool mix, bool need_out, bool need_in, bool need_logit,
                                           ScalarType in_dtype, Launch launch) {
  PromptGateParams p = make_params(grad_out, gate_logit, start, length, mix);
  check_dtypes(p.out.dtype, to_dtype(in_dtype, "block_in"));
  const bool empty = p.batch * p.length * p.dim == 0;
  p.rescale = need_out;
  check_device(saved, "saved", grad_out);
  if (need_out && !empty) check_overlap(p, p.out);
  if (need_out && !empty) check_gate_apart(p);
  Tensor grad_in = need_in
                       ? torch::stable::new_empty(grad_out, {p.batch, p.length, p.dim}, in_dtype)
                       : torch::stable::new_empty(grad_out, {0}, in_dtype);
  p.in = need_in ? make_rows(grad_in, "grad_in", 0)
                 : Rows{nullptr, 0, 0, 0, to_dtype(in_dtype, "block_in")};
  Tensor grad_logit = !need_logit ? torch::stable::new_empty(gate_logit, {0})
                      : empty     ? torch::stable::new_zeros(gate_logit, {})
                                  : torch::stable::new_empty(gate_logit, {});
  if (need_logit) {
    check_rows(p, saved, "saved", grad_out);
    STD_TORCH_CHECK(saved.is_contiguous() && saved.scalar_type() == grad_out.scalar_type(),
                    "prompt_gate: saved must be contiguous and of the dtype of the gradient");
    p.saved = make_rows(saved, "saved", 0);
    p.grad_logit = grad_logit.data_ptr();
    if (need_out && !empty) check_overlap(p, p.out, &p.saved, "saved");
  }
  if (!empty && (need_out || need_in || need_logit)) launch(p);
  return {grad_in, grad_logit};
}

}  // namespace gated_prompt
