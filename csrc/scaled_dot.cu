// SPDX-License-Identifier: Apache-2.0
// CUDA kernel of scaled_dot. It is memory bound: each element is read once, in packs of 16 bytes
// where both tensors allow.
#include <cuda_runtime.h>

#include "reduce.cuh"
#include "scaled_dot.h"
#include "vec.cuh"

namespace gated_prompt {
namespace {

// Turns the sum into the gradient of the temperature, and writes it.
struct TemperatureEnd {
  const ScaledDotParams& p;

  __device__ __forceinline__ double prepare() const {
    double temperature = 0;
    visit(p.temperature_dtype, [&](auto type) {
      temperature = widen(*static_cast<const decltype(type)*>(p.temperature));
    });
    return temperature;
  }
  __device__ __forceinline__ void finish(double sum, double temperature) const {
    visit(p.temperature_dtype, [&](auto type) {
      using R = decltype(type);
      const double result = temperature_gradient(temperature, sum);
      *static_cast<R*>(p.result) = narrow<R>(static_cast<compute_t<R>>(result));
    });
  }
};

template <class T, class U, int kVector>
__global__ void __launch_bounds__(kThreads)
    scaled_dot_kernel(const ScaledDotParams p, const DotPlan plan, unsigned* ticket,
                      double* partials) {
  using A = compute_t<T>;
  const int64_t step = plan.grid * kThreads * kPacksInFlight;
  A sum = A(0);
  for (int64_t first = int64_t(blockIdx.x) * kThreads * kPacksInFlight + threadIdx.x;
       first < plan.packs; first += step) {
    Pack<T, kVector> a[kPacksInFlight];
    Pack<U, kVector> b[kPacksInFlight];
#pragma unroll
    for (int k = 0; k < kPacksInFlight; ++k) {
      const int64_t index = first + k * kThreads;
      if (index < plan.packs) {
        const DotOffsets start = dot_pack_offsets(p, plan, index);
        a[k] = Pack<T, kVector>::load(static_cast<const T*>(p.a.data) + start.a);
        b[k] = Pack<U, kVector>::load(static_cast<const U*>(p.b.data) + start.b);
      }
    }
#pragma unroll
    for (int k = 0; k < kPacksInFlight; ++k) {
      if (first + k * kThreads >= plan.packs) break;
      T of_a[kVector];
      U of_b[kVector];
      a[k].get(of_a), b[k].get(of_b);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += widen(of_a[i]) * widen(of_b[i]);
    }
  }
  sum_over_blocks(sum, gridDim.x, blockIdx.x, ticket, partials, TemperatureEnd{p});
}

// ---- launchers ----

template <class T, class U, int kVector>
int launch(const ScaledDotParams& p, const DotPlan& plan, void* workspace, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.grid));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  char* const partials =
      workspace == nullptr ? nullptr : static_cast<char*>(workspace) + kTicketBytes;
  cudaLaunchKernelEx(&config, scaled_dot_kernel<T, U, kVector>, p, plan,
                     static_cast<unsigned*>(workspace), reinterpret_cast<double*>(partials));
  return static_cast<int>(cudaGetLastError());
}

template <class T, class U>
int launch(const ScaledDotParams& p, void* workspace, void* stream) {
  const DotPlan plan = plan_scaled_dot(p);
  if (plan.grid == 0) return 0;
  constexpr int kWidest = 16 / sizeof(U);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (plan.vector == kWidest) return launch<T, U, kWidest>(p, plan, workspace, cuda_stream);
  if constexpr (sizeof(U) == 2) {
    if (plan.vector == 2) return launch<T, U, 2>(p, plan, workspace, cuda_stream);
  }
  if (plan.vector != 1) return static_cast<int>(cudaErrorInvalidConfiguration);
  return launch<T, U, 1>(p, plan, workspace, cuda_stream);
}

}  // namespace

// The bindings allow only equal dtypes, and float32 together with a 16-bit type; coalesce() has
// made float32 the dtype of a.
int launch_scaled_dot(const ScaledDotParams& params, void* workspace, void* stream) {
  switch (params.a.dtype) {
    case DType::kFloat64: return launch<double, double>(params, workspace, stream);
    case DType::kBFloat16: return launch<BFloat16, BFloat16>(params, workspace, stream);
    case DType::kFloat16: return launch<Half, Half>(params, workspace, stream);
    default:
      return params.b.dtype == DType::kBFloat16 ? launch<float, BFloat16>(params, workspace, stream)
             : params.b.dtype == DType::kFloat16 ? launch<float, Half>(params, workspace, stream)
                                                 : launch<float, float>(params, workspace, stream);
  }
}

}  // namespace gated_prompt
