// SPDX-License-Identifier: Apache-2.0
// gated_prompt._C_cuda: the CUDA implementations of the raw ops that _C declares.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>
#include <string>

#include "bindings.h"

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
  STD_TORCH_CHECK(false, "prompt_gate: ", message);
}

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

// Zeroed memory for the gate gradient. One buffer per stream serves all launches there, one after
// the other. A captured graph may be replayed beside anything, so it gets memory of its own, zeroed
// by the graph; so does cudaStreamPerThread, one handle for a stream in each thread. The buffers
// are never freed: at exit the CUDA context may be gone before them.
Tensor workspace(const Tensor& reference, void* stream) {
  const auto make = [&] {
    return torch::stable::new_zeros(reference, {static_cast<int64_t>(kWorkspaceBytes)},
                                    ScalarType::Byte);
  };
  bool capturing = false;
  check_cuda(is_stream_capturing(stream, &capturing));
  if (capturing || stream == kStreamPerThread) return make();
  static std::mutex mutex;
  static auto& buffers = *new std::map<std::pair<int32_t, void*>, Tensor>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(reference.get_device_index(), stream);
  const auto found = buffers.find(key);
  return found != buffers.end() ? found->second : buffers.emplace(key, make()).first->second;
}

Tensor fwd_cuda(Tensor block_out, const Tensor& block_in, const Tensor& gate_logit, int64_t start,
                int64_t length, bool mix, bool save) {
  STD_TORCH_CHECK(block_out.is_cuda(), "prompt_gate: block_out must be on CUDA");
  const DeviceGuard guard(block_out.get_device_index());
  return prompt_gate_fwd(block_out, block_in, gate_logit, start, length, mix, save,
                         [&](const PromptGateParams& p) {
                           check_cuda(launch_prompt_gate_fwd(p, current_stream(block_out)));
                         });
}

std::tuple<Tensor, Tensor> bwd_cuda(Tensor grad_out, const Tensor& saved, const Tensor& gate_logit,
                                    int64_t start, int64_t length, bool mix, bool need_out,
                                    bool need_in, bool need_logit, ScalarType in_dtype) {
  STD_TORCH_CHECK(grad_out.is_cuda(), "prompt_gate: grad_out must be on CUDA");
  const DeviceGuard guard(grad_out.get_device_index());
  return prompt_gate_bwd(grad_out, saved, gate_logit, start, length, mix, need_out, need_in,
                         need_logit, in_dtype, [&](const PromptGateParams& p) {
                           void* const stream = current_stream(grad_out);
                           if (p.grad_logit == nullptr) {
                             check_cuda(launch_prompt_gate_bwd(p, nullptr, stream));
                           } else {
                             const Tensor memory = workspace(grad_out, stream);
                             check_cuda(launch_prompt_gate_bwd(p, memory.data_ptr(), stream));
                           }
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
  m.impl("prompt_gate_bwd_", TORCH_BOX(&bwd_cuda));
}

}  // namespace gated_prompt

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() =
      "CUDA implementations of the raw ops of gated_prompt (registered with torch on import).";
  m.def("build_info", &gated_prompt::build_info, "nvcc and the GPU architectures of this build.");
}
