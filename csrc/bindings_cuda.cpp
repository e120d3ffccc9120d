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

// Returns a workspace (see launch.h), with its tickets 0. Each stream has its own slot; launches on
// a stream run one after the other and share the slot. Each capture of a stream also has its own
// slot, because its graph may be replayed at the same time as anything else. Slots are never freed:
// a graph may live as long as the process, and at exit the CUDA context may be destroyed before
// them. Slots for captures are allocated outside of captures: memory that is allocated during a
// capture belongs to its graph. A launch gets its own memory, zeroed on its stream, if a capture
// finds no spare slot, and on cudaStreamPerThread, which is one handle for a different stream in
// each thread.
Tensor workspace(const Tensor& reference, void* stream, size_t bytes) {
  constexpr size_t kMostSlots = 64, kMadeAtOnce = 8;  // per device
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
    check_cuda(synchronize(stream));  // so that other streams see zeros
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

// The Backend of bindings.h and bindings_temperature.h. It launches on the current stream of the
// tensor's device.
struct Cuda {
  const Tensor& tensor;
  DeviceGuard guard;
  void* stream;

  Cuda(const Tensor& tensor, const char* name, const char* op)
      : tensor(on_cuda(tensor, name, op)),
        guard(tensor.get_device_index()),
        stream(current_stream(tensor)) {}

  static const Tensor& on_cuda(const Tensor& tensor, const char* name, const char* op) {
    STD_TORCH_CHECK(tensor.is_cuda(), op, ": ", name, " must be on CUDA");
    return tensor;
  }

  void forward(const PromptGateParams& p) const {
    check_cuda(launch_prompt_gate_fwd(p, stream));
  }

  void backward(const PromptGateParams& p) const {
    with_workspace(workspace_bytes(p),
                   [&](void* memory) { return launch_prompt_gate_bwd(p, memory, stream); });
  }

  void dot(const ScaledDotParams& p) const {
    with_workspace(workspace_bytes(plan_scaled_dot(p)),
                   [&](void* memory) { return launch_scaled_dot(p, memory, stream); });
  }

  void divide(const DivideParams& p) const {
    check_cuda(launch_divide_rows(p, stream));
  }

  // Calls launch(memory) with at least `bytes` of workspace, or with nullptr if bytes is 0.
  template <class Launch>
  void with_workspace(size_t bytes, Launch launch) const {
    if (bytes == 0) return check_cuda(launch(nullptr));
    const Tensor memory = workspace(tensor, stream, bytes);
    check_cuda(launch(memory.data_ptr()));
  }
};

pybind11::dict build_info() {
  pybind11::dict info;
  info["nvcc"] = GP_STRING(GP_NVCC);
  info["architectures"] = GP_STRING(GP_ARCHITECTURES);
  return info;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gated_prompt, CUDA, m) {
  m.impl("prompt_gate_fwd_", TORCH_BOX(&prompt_gate_fwd<Cuda>));
  m.impl("prompt_gate_linear_token_fwd_", TORCH_BOX(&prompt_gate_linear_token_fwd<Cuda>));
  m.impl("prompt_gate_bwd_", TORCH_BOX(&prompt_gate_bwd<Cuda>));
  m.impl("scaled_dot", TORCH_BOX(&scaled_dot<Cuda>));
  m.impl("divide_rows", TORCH_BOX(&divide_rows<Cuda>));
}

}  // namespace gated_prompt

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() =
      "CUDA implementations of the raw ops of gated_prompt (registered with torch on import).";
  m.def("build_info", &gated_prompt::build_info, "nvcc and the GPU architectures of this build.");
}
