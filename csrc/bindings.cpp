// SPDX-License-Identifier: Apache-2.0
// gated_prompt._C: schemas of the raw ops, their CPU implementations, and what was built.
#include <pybind11/pybind11.h>

#include <memory>

#include "bindings.h"
#include "bindings_temperature.h"

namespace gated_prompt {
namespace {

// A thread gets at least 4 * kTaskElements elements: with fewer, a second thread costs more time
// than it saves.
template <class Run>
void in_parallel(const PromptGateParams& p, Run run) {
  const Tasks tasks = tasks_of(p);
  const int64_t grain = at_least_one(4 * kTaskElements / (tasks.rows * p.dim));
  torch::stable::parallel_for(0, tasks.count, grain, run);
}

// The Backend of bindings.h and bindings_temperature.h. It need not check the device: its ops are
// registered only for CPU tensors.
struct Cpu {
  Cpu(const Tensor&, const char*, const char*) {}

  void forward(const PromptGateParams& params) const {
    const PromptGateParams p = join_rows(params);
    in_parallel(p, [&](int64_t begin, int64_t end) { prompt_gate_fwd_cpu(p, begin, end); });
  }

  void backward(const PromptGateParams& params) const {
    const PromptGateParams p = join_rows(params);
    const Tasks tasks = tasks_of(p);
    const auto item = static_cast<size_t>(item_size(to_dtype(compute_type(p), "partial sums")));
    const auto size = static_cast<size_t>(tasks.count * tasks.width) * item;
    const std::unique_ptr<double[]> memory(reduces(p) ? new double[size / 8 + 1] : nullptr);
    void* const partials = memory.get();
    in_parallel(p,
                [&](int64_t begin, int64_t end) { prompt_gate_bwd_cpu(p, begin, end, partials); });
    if (reduces(p)) prompt_gate_finish_cpu(p, partials);
  }

  void dot(const ScaledDotParams& p) const {
    const DotTasks tasks = dot_tasks_of(p);
    const std::unique_ptr<double[]> partials(new double[static_cast<size_t>(tasks.count)]);
    const int64_t grain = 4 * kTaskElements / kDotTaskElements;  // as in in_parallel
    torch::stable::parallel_for(0, tasks.count, grain, [&](int64_t begin, int64_t end) {
      scaled_dot_cpu(p, begin, end, partials.get());
    });
    scaled_dot_finish_cpu(p, partials.get());
  }

  void divide(const DivideParams& p) const {
    clamp_cpu(p);
    torch::stable::parallel_for(
        0, p.weight.size + p.bias.size, 4 * kTaskElements,
        [&](int64_t begin, int64_t end) { divide_rows_cpu(p, begin, end); });
  }
};

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = __VERSION__;
  info["torch"] = GP_STRING(GP_BUILD_TORCH);
  info["cpu_instructions"] = cpu_instructions();
  return info;
}

// Returns how the CUDA kernels are launched for contiguous tensors of these shapes, and how many
// bytes they move.
pybind11::dict launch_plan_info(int64_t batch, int64_t num_tokens, int64_t dim, int64_t length,
                                const std::string& dtype, const std::string& gate, bool backward,
                                bool save) {
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
  const bool linear = gate == "linear" || gate == "linear-token";
  if (gate == "scalar" || gate == "channel" || gate == "token" || gate == "sample" ||
      gate == "full" || linear) {
    p.by_sample = gate == "sample" || gate == "full" || linear;
    p.by_row = gate == "token" || gate == "full" || linear;
    p.by_channel = gate == "channel" || gate == "full" || gate == "linear";
  } else {
    throw pybind11::value_error("launch_plan: unknown gate " + gate);
  }
  void* const aligned = reinterpret_cast<void*>(uintptr_t{256});  // any aligned address, never read
  const Rows compact{aligned, length * dim, dim, 1, type};
  p.h = {aligned, num_tokens * dim, dim, 1, type};
  p.x = backward ? compact : p.h;
  if (save) p.saved = compact;
  p.logit = contiguous_like_logit(p, aligned, linear ? type : DType::kFloat32);
  if (backward && save) p.grad_logit = p.logit;
  const LaunchPlan plan = plan_launch(p, backward);
  // forward: reads h and x, writes h and saved. backward: reads G and saved, writes G and the
  // gradient of x. The logit and its gradient matter if they have a value per element.
  int64_t bytes = batch * length * dim * item_size(type) * (save ? 4 : 3);
  int64_t logits = (p.by_sample ? batch : 1) * (p.by_row ? length : 1) * (p.by_channel ? dim : 1);
  bytes += logits * item_size(p.logit.dtype) * (backward && save ? 2 : 1);
  pybind11::dict info;
  info["grid"] = pybind11::make_tuple(plan.grid_x, plan.grid_y, plan.grid_z);
  info["block"] = plan.threads;
  info["vector_width"] = plan.vector;
  info["bytes_moved"] = bytes;
  return info;
}

}  // namespace

STABLE_TORCH_LIBRARY(gated_prompt, m) {
  m.def(
      "prompt_gate_fwd_(Tensor(a!) block_out, Tensor block_in, Tensor gate_logit, int start, "
      "int length, bool mix, bool save) -> Tensor");
  m.def(
      "prompt_gate_linear_token_fwd_(Tensor(a!) block_out, Tensor block_in, Tensor weight, "
      "Tensor? bias, int start, int length, bool mix, bool save_logit, "
      "bool save_derivative, bool save_rows) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "prompt_gate_bwd_(Tensor(a!) grad_out, Tensor saved, Tensor gate_logit, "
      "Tensor? grad_carrier, int start, int length, bool mix, bool need_out, bool need_in, "
      "bool need_logit, bool need_bias, ScalarType in_dtype) -> (Tensor, Tensor, Tensor)");
  m.def("scaled_dot(Tensor a, Tensor b, Tensor temperature) -> Tensor");
  m.def(
      "divide_rows(Tensor weight, Tensor? bias, Tensor temperature, int rows, float low, "
      "float high, ScalarType dtype) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gated_prompt, CPU, m) {
  m.impl("prompt_gate_fwd_", TORCH_BOX(&prompt_gate_fwd<Cpu>));
  m.impl("prompt_gate_linear_token_fwd_", TORCH_BOX(&prompt_gate_linear_token_fwd<Cpu>));
  m.impl("prompt_gate_bwd_", TORCH_BOX(&prompt_gate_bwd<Cpu>));
  m.impl("scaled_dot", TORCH_BOX(&scaled_dot<Cpu>));
  m.impl("divide_rows", TORCH_BOX(&divide_rows<Cpu>));
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
      pybind11::arg("gate") = "scalar", pybind11::arg("backward") = false,
      pybind11::arg("save") = true);
}
