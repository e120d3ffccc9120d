// SPDX-License-Identifier: Apache-2.0
// gated_prompt._C_cuda: the CUDA implementations of the raw ops that _C declares.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "bindings_temperature.h"

namespace gated_prompt {
namespace {

using torch::stable::accelerator::DeviceGuard;

void* const kStreamPerThread = reinterpret_cast<void*>(uintptr_t{2});  // cudaStreamPerThread

void check_cuda(int error) {
  char* text = nullptr;
  torch_c10_cuda_check_msg(error, __FILE__, __func__, __LINE__, true, &text);
  if (text == nullptr) return;
  const std::string message(text);
  torch_c10_cuda_free_error_msg(text);
  STD_TORCH_CHECK(false, "gated_prompt: ", message);
}

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

// Memory for sums over blocks, its tickets zero. Each stream has a slot, which serves all launches
// there, one after the other; so has each capture of a stream, since its graph may be replayed
// beside anything. A slot is never given back: a graph may live as long as the process, and at exit
// the CUDA context may be gone before it. Slots for captures are made outside of them, where memory
// would be the graph's. Where none is left, and for cudaStreamPerThread, one handle for a stream in
// each thread, a launch gets memory of its own, zeroed on its stream.
Tensor workspace(const Tensor& reference, void* stream, size_t bytes) {
  constexpr size_t kMostSlots = 64, kMadeAtOnce = 8;  // of a device
  struct Slots {
    std::map<std::pair<void*, unsigned long long>, Tensor> used;  // by stream and capture
    std::vector<Tensor> spare;
  };
  const auto make = [&](size_t size) {
    return torch::stable::new_zeros(reference, {static_cast<int64_t>(size)}, ScalarType::Byte);
  };
  unsigned long long capture = 0;  // none
  check_cuda(capture_of(stream, &capture));
  if (stream == kStreamPerThread) return make(bytes);
  static std::mutex mutex;
  static auto& devices = *new std::map<int32_t, Slots>;
  const std::lock_guard<std::mutex> lock(mutex);
  Slots& slots = devices[reference.get_device_index()];
  const auto key = std::make_pair(stream, capture);
  if (capture == 0 && slots.spare.empty() && slots.used.size() < kMostSlots) {
    for (size_t i = 0; i < kMadeAtOnce; ++i) slots.spare.push_back(make(kMaxWorkspaceBytes));
    check_cuda(synchronize(stream));  // other streams find them zeroed
  }
  const auto found = slots.used.find(key);
  if (found != slots.used.end()) return found->second;
  if (slots.spare.empty()) {
    if (capture != 0) return make(bytes);
    slots.spare.push_back(make(kMaxWorkspaceBytes));
  }
  const Tensor slot = slots.spare.back();
  slots.spare.pop_back();
  return slots.used.emplace(key, slot).first->second;
}

// launch(memory, stream) runs a kernel that needs `bytes` of the workspace, or no memory.
template <class Launch>
void launch_with_workspace(const Tensor& reference, size_t bytes, Launch launch) {
  void* const stream = current_stream(reference);
  if (bytes == 0) return check_cuda(launch(nullptr, stream));
  const Tensor memory = workspace(reference, stream, bytes);
  check_cuda(launch(memory.data_ptr(), stream));
}

void check_on_cuda(const Tensor& tensor, const char* name, const char* op = "prompt_gate") {
  STD_TORCH_CHECK(tensor.is_cuda(), op, ": ", name, " must be on CUDA");
}

Tensor fwd_cuda(Tensor block_out, const Tensor& block_in, const Tensor& gate_logit, int64_t start,
                int64_t length, bool mix, bool save) {
  check_on_cuda(block_out, "block_out");
  const DeviceGuard guard(block_out.get_device_index());
  return prompt_gate_fwd(block_out, block_in, gate_logit, start, length, mix, save,
                         [&](const PromptGateParams& p) {
                           check_cuda(launch_prompt_gate_fwd(p, current_stream(block_out)));
                         });
}

std::tuple<Tensor, Tensor, Tensor> linear_token_fwd_cuda(Tensor block_out, const Tensor& block_in,
                                                         const Tensor& weight,
                                                         const std::optional<Tensor>& bias,
                                                         int64_t start, int64_t length, bool mix,
                                                         bool save_logit, bool save_derivative,
                                                         bool save_rows) {
  check_on_cuda(block_out, "block_out");
  const DeviceGuard guard(block_out.get_device_index());
  return prompt_gate_linear_token_fwd(
      block_out, block_in, weight, bias, start, length, mix, save_logit, save_derivative, save_rows,
      [&](const PromptGateParams& p) {
        check_cuda(launch_prompt_gate_fwd(p, current_stream(block_out)));
      });
}

std::tuple<Tensor, Tensor, Tensor> bwd_cuda(Tensor grad_out, const Tensor& saved,
                                            const Tensor& gate_logit,
                                            const std::optional<Tensor>& grad_carrier,
                                            int64_t start, int64_t length, bool mix, bool need_out,
                                            bool need_in, bool need_logit, bool need_bias,
                                            ScalarType in_dtype) {
  check_on_cuda(grad_out, "grad_out");
  const DeviceGuard guard(grad_out.get_device_index());
  return prompt_gate_bwd(grad_out, saved, gate_logit, grad_carrier, start, length, mix, need_out,
                         need_in, need_logit, need_bias, in_dtype, [&](const PromptGateParams& p) {
                           launch_with_workspace(grad_out, workspace_bytes(p),
                                                 [&](void* memory, void* stream) {
                                                   return launch_prompt_gate_bwd(p, memory, stream);
                                                 });
                         });
}

Tensor dot_cuda(const Tensor& a, const Tensor& b, const Tensor& temperature) {
  check_on_cuda(a, "a", "scaled_dot");
  const DeviceGuard guard(a.get_device_index());
  return scaled_dot(a, b, temperature, [&](const ScaledDotParams& p) {
    launch_with_workspace(a, workspace_bytes(plan_scaled_dot(p)), [&](void* memory, void* stream) {
      return launch_scaled_dot(p, memory, stream);
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> divide_cuda(const Tensor& weight,
                                               const std::optional<Tensor>& bias,
                                               const Tensor& temperature, int64_t rows, double low,
                                               double high, ScalarType dtype) {
  check_on_cuda(weight, "weight", "divide_rows");
  const DeviceGuard guard(weight.get_device_index());
  return divide_rows(weight, bias, temperature, rows, low, high, dtype, [&](const DivideParams& p) {
    check_cuda(launch_divide_rows(p, current_stream(weight)));
  });
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["nvcc"] = GP_STRING(GP_NVCC);
  info["architectures"] = GP_STRING(GP_ARCHITECTURES);
  return info;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gated_prompt, CUDA, m) {
  m.impl("prompt_gate_fwd_", TORCH_BOX(&fwd_cuda));
  m.impl("prompt_gate_linear_token_fwd_", TORCH_BOX(&linear_token_fwd_cuda));
  m.impl("prompt_gate_bwd_", TORCH_BOX(&bwd_cuda));
  m.impl("scaled_dot", TORCH_BOX(&dot_cuda));
  m.impl("divide_rows", TORCH_BOX(&divide_cuda));
}

}  // namespace gated_prompt

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() =
      "CUDA implementations of the raw ops of gated_prompt (registered with torch on import).";
  m.def("build_info", &gated_prompt::build_info, "nvcc and the GPU architectures of this build.");
}
