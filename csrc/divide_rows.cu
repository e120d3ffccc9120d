// SPDX-License-Identifier: Apache-2.0
// CUDA kernel of divide_rows. It is memory bound: each element is read and written once, in packs
// of 16 bytes of the wider dtype where the tensors allow.
#include <cuda_runtime.h>

#include "divide_rows.h"
#include "vec.cuh"

namespace gated_prompt {
namespace {

template <class T, class U, int kVector>
__global__ void __launch_bounds__(kThreads)
    divide_rows_kernel(const DivideParams p, const DividePlan plan) {
  using A = compute_t<T>;
  A divisor = A(1);
  visit(p.temperature_dtype, [&](auto type) {
    using R = decltype(type);
    const R clamped = clamp_temperature(*static_cast<const R*>(p.temperature), p.low, p.high);
    if (blockIdx.x == 0 && threadIdx.x == 0) *static_cast<R*>(p.clamped) = clamped;
    divisor = static_cast<A>(widen(clamped));
  });
  const int64_t block = blockIdx.x;
  if (block >= plan.weight_grid) {
    const int64_t i = (block - plan.weight_grid) * kThreads + threadIdx.x;
    if (i >= p.bias.size) return;
    const T value = static_cast<const T*>(p.bias.source)[i];
    static_cast<U*>(p.bias.target)[i] = divided<U>(value, i < p.bias.divided ? divisor : A(1));
    return;
  }
  const int64_t first = block * kThreads * kDividePacks + threadIdx.x;
  Pack<T, kVector> in[kDividePacks];
#pragma unroll
  for (int k = 0; k < kDividePacks; ++k) {
    const int64_t index = first + k * kThreads;
    if (index < plan.packs) {
      in[k] = Pack<T, kVector>::load(static_cast<const T*>(p.weight.source) + index * kVector);
    }
  }
#pragma unroll
  for (int k = 0; k < kDividePacks; ++k) {
    const int64_t start = (first + k * kThreads) * kVector;
    if (start >= p.weight.size) break;
    const A own = start < p.weight.divided ? divisor : A(1);
    T before[kVector];
    U after[kVector];
    in[k].get(before);
#pragma unroll
    for (int i = 0; i < kVector; ++i) after[i] = divided<U>(before[i], own);
    Pack<U, kVector> out;
    out.set(after);
    out.store(static_cast<U*>(p.weight.target) + start);
  }
}

// ---- launchers ----

template <class T, class U, int kVector>
int launch(const DivideParams& p, const DividePlan& plan, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.grid));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  cudaLaunchKernelEx(&config, divide_rows_kernel<T, U, kVector>, p, plan);
  return static_cast<int>(cudaGetLastError());
}

template <class T, class U>
int launch(const DivideParams& p, void* stream) {
  const DividePlan plan = plan_divide_rows(p);
  constexpr int kWide = 16 / sizeof(T);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (plan.vector == kWide) return launch<T, U, kWide>(p, plan, cuda_stream);
  return launch<T, U, 1>(p, plan, cuda_stream);
}

}  // namespace

int launch_divide_rows(const DivideParams& params, void* stream) {
  switch (params.from) {
    case DType::kFloat64: return launch<double, double>(params, stream);
    case DType::kBFloat16: return launch<BFloat16, BFloat16>(params, stream);
    case DType::kFloat16: return launch<Half, Half>(params, stream);
    default:
      return params.to == DType::kBFloat16  ? launch<float, BFloat16>(params, stream)
             : params.to == DType::kFloat16 ? launch<float, Half>(params, stream)
                                            : launch<float, float>(params, stream);
  }
}

}  // namespace gated_prompt
