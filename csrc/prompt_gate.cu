// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of the prompt gate. Memory bound: each element of the prompt rows is read and
// written once, in packs of 16 bytes; nothing outside the rows is touched.
#include <cuda_runtime.h>

#include "prompt_gate.h"
#include "prompt_gate_math.h"
#include "vec.cuh"

namespace gated_prompt {
namespace {

// Blocks that an SM must be able to hold: at most 85 registers a thread. Left free, ptxas 13.0
// spills in one kernel; held to 4 blocks, in two (make resources). Not yet tuned on a GPU.
constexpr int kMinBlocks = 3;

template <class A>
__device__ __forceinline__ Gate<A> read_gate(const PromptGateParams& p) {
  double logit;
  switch (p.gate_dtype) {
    case DType::kFloat64: logit = *static_cast<const double*>(p.gate_logit); break;
    case DType::kFloat32: logit = *static_cast<const float*>(p.gate_logit); break;
    case DType::kBFloat16: logit = widen(*static_cast<const BFloat16*>(p.gate_logit)); break;
    default: logit = widen(*static_cast<const Half*>(p.gate_logit)); break;
  }
  return make_gate(static_cast<A>(logit));
}

template <class T>
__device__ __forceinline__ T* sample(const Rows& rows, int64_t b) {
  return static_cast<T*>(rows.data) + b * rows.batch_stride;
}

// ---- forward ----

template <class H, class X, int kVector>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    prompt_gate_fwd_kernel(const PromptGateParams p, const LaunchPlan plan) {
  using A = compute_t<H>;
  const Gate<A> gate = read_gate<A>(p);
  const A w = input_weight(gate, p.mix);
  const int64_t packs = plan.rows * plan.packs_per_row;
  const int64_t step = plan.grid_x * kThreads * kPacksInFlight;
  for (int64_t b = blockIdx.y; b < p.batch; b += plan.grid_y) {
    H* const h_sample = sample<H>(p.out, b);             // [P, D]
    const X* const x_sample = sample<const X>(p.in, b);  // [P, D]
    H* const saved_sample = sample<H>(p.saved, b);       // [P, D] or null
    for (int64_t first = int64_t(blockIdx.x) * kThreads * kPacksInFlight + threadIdx.x;
         first < packs; first += step) {
      Pack<H, kVector> h[kPacksInFlight];
      Pack<X, kVector> x[kPacksInFlight];
#pragma unroll
      for (int k = 0; k < kPacksInFlight; ++k) {
        const int64_t index = first + k * kThreads;
        if (index < packs) {
          h[k] = Pack<H, kVector>::load(h_sample + pack_offset(plan, p.out, index));
          x[k] = Pack<X, kVector>::load(x_sample + pack_offset(plan, p.in, index));
        }
      }
#pragma unroll
      for (int k = 0; k < kPacksInFlight; ++k) {
        const int64_t index = first + k * kThreads;
        if (index >= packs) break;
        Pack<H, kVector> saved;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const A h_i = widen(h[k].value[i]);
          const A x_i = widen(x[k].value[i]);
          saved.value[i] = narrow<H>(half_derivative(p.mix, h_i, x_i));
          h[k].value[i] = narrow<H>(update(gate.value, h_i, w, x_i));
        }
        h[k].store(h_sample + pack_offset(plan, p.out, index));
        if (p.saved.data != nullptr) saved.store(saved_sample + pack_offset(plan, p.saved, index));
      }
    }
  }
}

// ---- backward ----
//
// One launch: the block that arrives last adds the partial sums of all blocks, in a fixed order.

template <class H, class X, int kVector>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    prompt_gate_bwd_kernel(const PromptGateParams p, const LaunchPlan plan, unsigned* ticket,
                           double* partials) {
  using A = compute_t<H>;
  const Gate<A> gate = read_gate<A>(p);
  const A w = input_weight(gate, p.mix);
  const int64_t packs = plan.rows * plan.packs_per_row;
  const int64_t step = plan.grid_x * kThreads * kPacksInFlight;
  const bool reduces = p.grad_logit != nullptr;
  A sum = A(0);
  for (int64_t b = blockIdx.y; b < p.batch; b += plan.grid_y) {
    H* const grad_sample = sample<H>(p.out, b);                 // [P, D]
    X* const grad_in_sample = sample<X>(p.in, b);               // [P, D] or null
    const H* const saved_sample = sample<const H>(p.saved, b);  // [P, D] or null
    for (int64_t first = int64_t(blockIdx.x) * kThreads * kPacksInFlight + threadIdx.x;
         first < packs; first += step) {
      Pack<H, kVector> grad[kPacksInFlight];
      Pack<H, kVector> saved[kPacksInFlight];
#pragma unroll
      for (int k = 0; k < kPacksInFlight; ++k) {
        const int64_t index = first + k * kThreads;
        if (index < packs) {
          grad[k] = Pack<H, kVector>::load(grad_sample + pack_offset(plan, p.out, index));
          if (reduces) {
            saved[k] = Pack<H, kVector>::load(saved_sample + pack_offset(plan, p.saved, index));
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kPacksInFlight; ++k) {
        const int64_t index = first + k * kThreads;
        if (index >= packs) break;
        Pack<X, kVector> grad_in;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const A grad_i = widen(grad[k].value[i]);
          if (reduces) sum += widen(saved[k].value[i]) * grad_i;
          grad_in.value[i] = narrow<X>(static_cast<compute_t<X>>(w * grad_i));
          grad[k].value[i] = narrow<H>(gate.value * grad_i);
        }
        if (p.in.data != nullptr) grad_in.store(grad_in_sample + pack_offset(plan, p.in, index));
        if (p.rescale) grad[k].store(grad_sample + pack_offset(plan, p.out, index));
      }
    }
  }
  if (!reduces) return;

  const unsigned blocks = gridDim.x * gridDim.y;
  __shared__ bool is_last;
  const A block_total = block_sum(sum);
  if (threadIdx.x == 0) {
    partials[blockIdx.y * gridDim.x + blockIdx.x] = static_cast<double>(block_total);
    __threadfence();                                        // the partial before the ticket
    is_last = atomicInc(ticket, blocks - 1) == blocks - 1;  // wraps to 0 for the next launch
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();  // the tickets before the partials
  double total = 0;
  for (unsigned i = threadIdx.x; i < blocks; i += kThreads) total += __ldcg(partials + i);
  total = block_sum(total);
  if (threadIdx.x == 0) {
    const double result = logit_gradient(read_gate<double>(p), total);
    switch (p.gate_dtype) {
      case DType::kFloat64: *static_cast<double*>(p.grad_logit) = result; break;
      case DType::kFloat32: *static_cast<float*>(p.grad_logit) = static_cast<float>(result); break;
      case DType::kBFloat16:
        *static_cast<BFloat16*>(p.grad_logit) = narrow<BFloat16>(static_cast<float>(result));
        break;
      default: *static_cast<Half*>(p.grad_logit) = narrow<Half>(static_cast<float>(result)); break;
    }
  }
}

// ---- launchers ----

template <class H, class X, int kVector>
int launch(const PromptGateParams& p, const LaunchPlan& plan, bool backward, void* workspace,
           cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.grid_x), static_cast<unsigned>(plan.grid_y));
  if (backward) {
    auto* const bytes = static_cast<char*>(workspace);
    prompt_gate_bwd_kernel<H, X, kVector><<<grid, kThreads, 0, stream>>>(
        p, plan, reinterpret_cast<unsigned*>(bytes), reinterpret_cast<double*>(bytes + 16));
  } else {
    prompt_gate_fwd_kernel<H, X, kVector><<<grid, kThreads, 0, stream>>>(p, plan);
  }
  return static_cast<int>(cudaGetLastError());
}

template <class H, class X>
int launch(const PromptGateParams& p, bool backward, void* workspace, void* stream) {
  const LaunchPlan plan = plan_launch(p, backward);
  if (plan.grid_x == 0 || plan.grid_y == 0) return 0;
  constexpr int kNarrowest = sizeof(H) < sizeof(X) ? sizeof(H) : sizeof(X);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (plan.vector == 16 / kNarrowest) {
    return launch<H, X, 16 / kNarrowest>(p, plan, backward, workspace, cuda_stream);
  }
  if constexpr (kNarrowest == 2) {
    if (plan.vector == 2) return launch<H, X, 2>(p, plan, backward, workspace, cuda_stream);
  }
  if (plan.vector != 1) return static_cast<int>(cudaErrorInvalidConfiguration);
  return launch<H, X, 1>(p, plan, backward, workspace, cuda_stream);
}

// Mixed pairs are float32 beside a 16-bit type; the bindings admit no other.
int launch(const PromptGateParams& p, bool backward, void* workspace, void* stream) {
  const bool in_float = p.in.dtype == DType::kFloat32;
  switch (p.out.dtype) {
    case DType::kFloat64: return launch<double, double>(p, backward, workspace, stream);
    case DType::kBFloat16:
      return in_float ? launch<BFloat16, float>(p, backward, workspace, stream)
                      : launch<BFloat16, BFloat16>(p, backward, workspace, stream);
    case DType::kFloat16:
      return in_float ? launch<Half, float>(p, backward, workspace, stream)
                      : launch<Half, Half>(p, backward, workspace, stream);
    default:
      return p.in.dtype == DType::kBFloat16
                 ? launch<float, BFloat16>(p, backward, workspace, stream)
             : p.in.dtype == DType::kFloat16 ? launch<float, Half>(p, backward, workspace, stream)
                                             : launch<float, float>(p, backward, workspace, stream);
  }
}

}  // namespace

int launch_prompt_gate_fwd(const PromptGateParams& params, void* stream) {
  return launch(params, /*backward=*/false, /*workspace=*/nullptr, stream);
}

int launch_prompt_gate_bwd(const PromptGateParams& params, void* workspace, void* stream) {
  return launch(params, /*backward=*/true, workspace, stream);
}

int is_stream_capturing(void* stream, bool* capturing) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  *capturing = status != cudaStreamCaptureStatusNone;
  return static_cast<int>(error);
}

}  // namespace gated_prompt
