// SPDX-License-Identifier: Apache-2.0
// The raw ops of the gate: they check torch tensors, fill in PromptGateParams, and run the kernels
// of a Backend (Cpu in bindings.cpp, Cuda in bindings_cuda.cpp). The constructor of a Backend
// checks the first tensor of a call and makes its device current; forward(params) and
// backward(params) run the kernels. The checks here are for memory safety: no access outside a
// tensor, no race between elements.
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

#include "bindings_checks.h"
#include "prompt_gate.h"

namespace gated_prompt {

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

// The axes of size 2 or more, longest stride first.
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

// Distance in elements from the first to the last element, along the axes from axes[first] on.
inline int64_t reach(const std::vector<Axis>& axes, size_t first) {
  int64_t sum = 0;
  for (size_t i = first; i < axes.size(); ++i) sum += (axes[i].size - 1) * axes[i].stride;
  return sum;
}

// True if delta = sum of k_i * stride_i with |k_i| < size_i, over the axes from axes[first] on. The
// axes must nest: check_overlap tests this first.
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

// The `written` rows must not overlap themselves. They may overlap the `read` rows only if both are
// exactly the same elements.
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

// `rows` (a gate, a carrier, saved) are read while the prompt rows of h are written, so they must
// be outside the memory from the first to the last prompt row.
inline void check_apart(const PromptGateParams& p, const Rows& rows, const char* name) {
  if (rows.data == nullptr) return;
  const auto low = reinterpret_cast<intptr_t>(p.h.data);
  const auto high = low + (reach(axes_of(p, p.h), 0) + 1) * item_size(p.h.dtype);
  const auto first = reinterpret_cast<intptr_t>(rows.data);
  const auto last = first + (reach(axes_of(p, rows), 0) + 1) * item_size(rows.dtype);
  STD_TORCH_CHECK(last <= low || high <= first, "prompt_gate: ", name,
                  " lies among the prompt rows of block_out in memory: pass a copy of it");
}

// The params that every op needs, from the sequence (block_out or its gradient, [B, N, D]) and the
// slice.
inline PromptGateParams make_params(const Tensor& sequence, int64_t start, int64_t length,
                                    bool mix) {
  check_dims(sequence, "block_out", 3);
  check_storage(sequence, "block_out");
  STD_TORCH_CHECK(0 <= start && 0 <= length && start <= sequence.size(1) - length,
                  "prompt_gate: slice of ", length, " rows from ", start,
                  " is outside N=", sequence.size(1));
  PromptGateParams p{};
  p.batch = sequence.size(0);
  p.length = length;
  p.dim = sequence.size(2);
  p.mix = mix;
  p.h = make_rows(sequence, "block_out", start);
  return p;
}

inline bool is_empty(const PromptGateParams& p) {
  return p.batch * p.length * p.dim == 0;
}

// Sets p.logit and, from its shape, by_sample, by_row and by_channel.
inline void set_logit(PromptGateParams& p, const Tensor& logit, const Tensor& sequence) {
  check_device(logit, "gate_logit", sequence);
  check_storage(logit, "gate_logit");
  const int64_t dims = logit.dim(), wanted[3] = {p.batch, p.length, p.dim};
  STD_TORCH_CHECK(dims <= 3, "prompt_gate: gate_logit must have at most 3 dimensions, got ", dims);
  int64_t strides[3] = {};
  bool own[3] = {};
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t k = d + 3 - dims, size = logit.size(d);
    STD_TORCH_CHECK(size == 1 || size == wanted[k],
                    "prompt_gate: gate_logit must broadcast to [B, P, D], got size ", size, " for ",
                    wanted[k]);
    own[k] = size != 1;
    strides[k] = own[k] ? logit.stride(d) : 0;
  }
  p.by_sample = own[0], p.by_row = own[1], p.by_channel = own[2];
  p.logit = {logit.data_ptr(), strides[0], strides[1], strides[2],
             to_dtype(logit.scalar_type(), "gate_logit")};
}

// The Rows of a contiguous tensor with the shape of the logit.
inline Rows contiguous_like_logit(const PromptGateParams& p, void* data, DType dtype) {
  const int64_t channels = p.by_channel ? p.dim : 1, rows = p.by_row ? p.length : 1;
  return {data, p.by_sample ? rows * channels : 0, p.by_row ? channels : 0, p.by_channel ? 1 : 0,
          dtype};
}

// Checks a [B, P, D] tensor on the sequence's device and returns its rows.
inline Rows make_full_rows(const PromptGateParams& p, const Tensor& tensor, const char* name,
                           const Tensor& sequence) {
  check_dims(tensor, name, 3);
  check_device(tensor, name, sequence);
  check_storage(tensor, name);
  STD_TORCH_CHECK(
      tensor.size(0) == p.batch && tensor.size(1) == p.length && tensor.size(2) == p.dim,
      "prompt_gate: ", name, " must be [", p.batch, ", ", p.length, ", ", p.dim, "], got [",
      tensor.size(0), ", ", tensor.size(1), ", ", tensor.size(2), "]");
  return make_rows(tensor, name, 0);
}

inline void check_dtypes(DType sequence, DType block_in) {
  STD_TORCH_CHECK(have_kernel(sequence, block_in),
                  "prompt_gate: these dtypes of block_out and block_in have no kernel");
}

inline ScalarType compute_type(const PromptGateParams& p) {
  return p.h.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// If `wanted`, returns a new [B, P, D] tensor and sets *rows to its rows; otherwise returns [0].
inline Tensor new_rows(const PromptGateParams& p, const Tensor& like, bool wanted, Rows* rows,
                       std::optional<ScalarType> dtype = std::nullopt) {
  if (!wanted) return torch::stable::new_empty(like, {0}, dtype);
  Tensor tensor = torch::stable::new_empty(like, {p.batch, p.length, p.dim}, dtype);
  *rows = make_rows(tensor, "result", 0);
  return tensor;
}

// Updates block_out [B, N, D] in place. Returns saved [B, P, D], or [0] if not save.
template <class Backend>
Tensor prompt_gate_fwd(Tensor block_out, const Tensor& block_in, const Tensor& gate_logit,
                       int64_t start, int64_t length, bool mix, bool save) {
  const Backend backend(block_out, "block_out", "prompt_gate");
  PromptGateParams p = make_params(block_out, start, length, mix);
  set_logit(p, gate_logit, block_out);
  p.x = make_full_rows(p, block_in, "block_in", block_out);
  check_dtypes(p.h.dtype, p.x.dtype);
  if (!is_empty(p)) {
    check_overlap(p, p.h, &p.x, "block_in");
    check_apart(p, p.logit, "gate_logit");
  }
  Tensor saved = new_rows(p, block_out, save, &p.saved);
  if (!is_empty(p)) backend.forward(p);
  return saved;
}

// The same with logit = h . weight + bias, weight [D], bias [1]. Returns logit [B, P, 1], saved
// [B, P, D] and a copy of h before the update [B, P, D]; [0] for each that is not to be saved.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> prompt_gate_linear_token_fwd(
    Tensor block_out, const Tensor& block_in, const Tensor& weight,
    const std::optional<Tensor>& bias, int64_t start, int64_t length, bool mix, bool save_logit,
    bool save_derivative, bool save_rows) {
  const Backend backend(block_out, "block_out", "prompt_gate");
  PromptGateParams p = make_params(block_out, start, length, mix);
  p.by_sample = p.by_row = true;
  p.x = make_full_rows(p, block_in, "block_in", block_out);
  check_dtypes(p.h.dtype, p.x.dtype);
  const auto vector_of = [&](const Tensor& tensor, const char* name, int64_t size) {
    check_dims(tensor, name, 1);
    check_device(tensor, name, block_out);
    check_storage(tensor, name);
    STD_TORCH_CHECK(tensor.size(0) == size, "prompt_gate: ", name, " must be [", size, "], got [",
                    tensor.size(0), "]");
    const int64_t stride = size == 1 ? 0 : tensor.stride(0);  // as in set_logit
    return Rows{tensor.data_ptr(), 0, 0, stride, to_dtype(tensor.scalar_type(), name)};
  };
  p.weight = vector_of(weight, "weight", p.dim);
  if (bias.has_value()) p.bias = vector_of(*bias, "bias", 1);
  if (!is_empty(p)) {
    check_overlap(p, p.h, &p.x, "block_in");
    check_apart(p, p.weight, "weight");
    check_apart(p, p.bias, "bias");
  }
  Tensor logit = save_logit
                     ? torch::stable::new_empty(block_out, {p.batch, p.length, 1}, compute_type(p))
                     : torch::stable::new_empty(block_out, {0}, compute_type(p));
  p.logit = contiguous_like_logit(p, save_logit ? logit.data_ptr() : nullptr,
                                  to_dtype(compute_type(p), "logit"));
  Tensor saved = new_rows(p, block_out, save_derivative, &p.saved);
  Tensor rows = new_rows(p, block_out, save_rows, &p.gathered);
  if (!is_empty(p)) backend.forward(p);
  return {logit, saved, rows};
}

// Overwrites G, the prompt rows of grad_out [B, N, D], with g*T if need_out. Returns the gradients
// of x [B, P, D], of gate_logit, and of a bias that was added to gate_logit ([D] or [1], float32 or
// float64); [0] for each that is not needed.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> prompt_gate_bwd(Tensor grad_out, const Tensor& saved,
                                                   const Tensor& gate_logit,
                                                   const std::optional<Tensor>& grad_carrier,
                                                   int64_t start, int64_t length, bool mix,
                                                   bool need_out, bool need_in, bool need_logit,
                                                   bool need_bias, ScalarType in_dtype) {
  const Backend backend(grad_out, "grad_out", "prompt_gate");
  PromptGateParams p = make_params(grad_out, start, length, mix);
  set_logit(p, gate_logit, grad_out);
  const DType in = to_dtype(in_dtype, "block_in");
  check_dtypes(p.h.dtype, in);
  p.rescale = need_out;
  p.x.dtype = in;
  if (need_bias) {  // sizes of 1 do not broadcast here: the logit has its own element per row
    STD_TORCH_CHECK(
        gate_logit.dim() == 3 && gate_logit.size(0) == p.batch && gate_logit.size(1) == p.length,
        "prompt_gate: a bias needs a gate_logit [B, P, D] or [B, P, 1]");
    p.by_sample = p.by_row = true;
  }
  if (grad_carrier.has_value()) {
    p.carrier = make_full_rows(p, *grad_carrier, "grad_carrier", grad_out);
    STD_TORCH_CHECK(p.carrier.dtype == p.h.dtype,
                    "prompt_gate: grad_carrier must have the dtype of the gradient");
  }
  check_device(saved, "saved", grad_out);
  if (need_logit || need_bias) {
    p.saved = make_full_rows(p, saved, "saved", grad_out);
    STD_TORCH_CHECK(saved.is_contiguous() && saved.scalar_type() == grad_out.scalar_type(),
                    "prompt_gate: saved must be contiguous and of the dtype of the gradient");
  }
  if (need_out && !is_empty(p)) {
    check_overlap(p, p.h);
    check_apart(p, p.logit, "gate_logit");
    check_apart(p, p.carrier, "grad_carrier");
    check_apart(p, p.saved, "saved");
  }
  Tensor grad_in = new_rows(p, grad_out, need_in, &p.x, in_dtype);
  // a sum over no elements is 0
  Tensor grad_logit = !need_logit   ? torch::stable::new_empty(gate_logit, {0})
                      : is_empty(p) ? torch::stable::new_zeros(gate_logit, gate_logit.sizes())
                                    : torch::stable::new_empty(gate_logit, gate_logit.sizes());
  if (need_logit) {
    p.grad_logit = contiguous_like_logit(p, grad_logit.data_ptr(), p.logit.dtype);
  }
  const int64_t width = !need_bias ? 0 : p.by_channel ? p.dim : 1;
  Tensor grad_bias = is_empty(p) ? torch::stable::new_zeros(grad_out, {width}, compute_type(p))
                                 : torch::stable::new_empty(grad_out, {width}, compute_type(p));
  if (need_bias) p.grad_bias = grad_bias.data_ptr();
  if (!is_empty(p) && (need_out || need_in || need_logit || need_bias)) backend.backward(p);
  return {grad_in, grad_logit, grad_bias};
}

}  // namespace gated_prompt
