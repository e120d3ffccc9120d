// SPDX-License-Identifier: Apache-2.0
// gated_prompt._C: schemas of the raw ops, their CPU implementations, and what was built.
#include <pybind11/pybind11.h>

#include "bindings.h"

namespace gated_prompt {
namespace {

// Chunks of about 8192 elements; below some four of them a second thread costs more than it brings.
constexpr int64_t kGrainChunks = 4;

Tensor fwd_cpu(Tensor block_out, const Tensor& block_in, const Tensor& gate_logit, int64_t start,
               int64_t length, bool mix, bool save) {
  return prompt_gate_fwd(
      block_out, block_in, gate_logit, start, length, mix, save, [](const PromptGateParams& p) {
        torch::stable::parallel_for(
            0, num_chunks(p), kGrainChunks,
            [&](int64_t begin, int64_t end) { prompt_gate_fwd_cpu(p, begin, end); });
      });
}

std::tuple<Tensor, Tensor> bwd_cpu(Tensor grad_out, const Tensor& saved, const Tensor& gate_logit,
                                   int64_t start, int64_t length, bool mix, bool need_out,
                                   bool need_in, bool need_logit, ScalarType in_dtype) {
  return prompt_gate_bwd(
      grad_out, saved, gate_logit, start, length, mix, need_out, need_in, need_logit, in_dtype,
      [](const PromptGateParams& p) {
        std::vector<double> partials(p.grad_logit ? static_cast<size_t>(num_chunks(p)) : 0);
        double* const sums = p.grad_logit ? partials.data() : nullptr;
        torch::stable::parallel_for(
            0, num_chunks(p), kGrainChunks,
            [&](int64_t begin, int64_t end) { prompt_gate_bwd_cpu(p, begin, end, sums); });
        if (p.grad_logit != nullptr) prompt_gate_finish_cpu(p, sums);
      });
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = __VERSION__;
  info["torch"] = GP_STRING(GP_BUILD_TORCH);
  info["cpu_instructions"] = cpu_instructions();
  return info;
}

// How the CUDA kernels are launched for contiguous tensors of these shapes, and the bytes they
// move.
pybind11::dict launch_plan_info(int64_t batch, int64_t num_tokens, int64_t dim, int64_t length,
                                const std::string& dtype, bool backward, bool save) {
  PromptGateParams p{};
  p.batch = batch;
  p.length = length;
  p.dim = dim;
  const DType type = dtype == "float64"    ? DType::kFloat64
                     : dtype == "float32"  ? DType::kFloat32
                     : dtype == "bfloat16" ? DType::kBFloat16
                     : dtype == "float16"
                         ? DType::kFloat16
                         : throw pybind11::value_error("launch_plan: unknown dtype " + dtype);
  void* const aligned = reinterpret_cast<void*>(uintptr_t{256});  // stands for a tensor; never read
  const Rows compact{aligned, length * dim, dim, 1, type};
  p.out = {aligned, num_tokens * dim, dim, 1, type};
  p.in = backward ? compact : p.out;
  if (save) p.saved = compact;
  if (backward && save) p.grad_logit = aligned;
  const LaunchPlan plan = plan_launch(p, backward);
  const int64_t slice_bytes = batch * length * dim * item_size(type);
  pybind11::dict info;
  info["grid"] = pybind11::make_tuple(plan.grid_x, plan.grid_y);
  info["block"] = kThreads;
  info["vector_width"] = plan.vector;
  // forward: read h and x, write h and saved; backward: read G and saved, write G and the gradient
  // of x
  info["bytes_moved"] = slice_bytes * (save ? 4 : 3);
  return info;
}

}  // namespace

STABLE_TORCH_LIBRARY(gated_prompt, m) {
  m.def(
      "prompt_gate_fwd_(Tensor(a!) block_out, Tensor block_in, Tensor gate_logit, int start, "
      "int length, bool mix, bool save) -> Tensor");
  m.def(
      "prompt_gate_bwd_(Tensor(a!) grad_out, Tensor saved, Tensor gate_logit, int start, "
      "int length, bool mix, bool need_out, bool need_in, bool need_logit, ScalarType in_dtype) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gated_prompt, CPU, m) {
  m.impl("prompt_gate_fwd_", TORCH_BOX(&fwd_cpu));
  m.impl("prompt_gate_bwd_", TORCH_BOX(&bwd_cpu));
}

}  // namespace gated_prompt

PYBIND11_MODULE(_C, m) {
  m.doc() = "Raw ops of gated_prompt (registered with torch on import) and what was built.";
  m.def("build_info", &gated_prompt::build_info,
        "Compiler, torch and instruction sets of this build.");
  m.def(
      "launch_plan", &gated_prompt::launch_plan_info,
      "CUDA launch and bytes moved for contiguous tensors: grid, block, vector_width, bytes_moved.",
      pybind11::kw_only(), pybind11::arg("batch"), pybind11::arg("num_tokens"),
      pybind11::arg("dim"), pybind11::arg("length"), pybind11::arg("dtype") = "bfloat16",
      pybind11::arg("backward") = false, pybind11::arg("save") = true);
}
