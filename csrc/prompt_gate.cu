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

// ---- elements of any dtype: logits, weights, their gradients ----

template <class A>
__device__ __forceinline__ A read(const Rows& rows, int64_t offset) {
  A value{};
  visit(rows.dtype, [&](auto type) {
    value = static_cast<A>(widen(static_cast<const decltype(type)*>(rows.data)[offset]));
  });
  return value;
}

template <class A>
__device__ __forceinline__ void write(const Rows& rows, int64_t offset, A value) {
  visit(rows.dtype, [&](auto type) {
    using T = decltype(type);
    static_cast<T*>(rows.data)[offset] = narrow<T>(static_cast<compute_t<T>>(value));
  });
}

template <class A, int kVector>
__device__ __forceinline__ void read_pack(const Rows& rows, int64_t offset, A (&values)[kVector]) {
  visit(rows.dtype, [&](auto type) {
    using T = decltype(type);
    T stored[kVector];
    Pack<T, kVector>::load(static_cast<const T*>(rows.data) + offset).get(stored);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = static_cast<A>(widen(stored[i]));
  });
}

template <class A, int kVector>
__device__ __forceinline__ void write_pack(const Rows& rows, int64_t offset,
                                           const A (&values)[kVector]) {
  visit(rows.dtype, [&](auto type) {
    using T = decltype(type);
    T stored[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) stored[i] = narrow<T>(static_cast<compute_t<T>>(values[i]));
    Pack<T, kVector> pack;
    pack.set(stored);
    pack.store(static_cast<T*>(rows.data) + offset);
  });
}

template <class T>
__device__ __forceinline__ T* at(const Rows& rows, int64_t offset) {
  return static_cast<T*>(rows.data) + offset;
}

// ---- one pack ----

template <class H, class X, int kVector>
struct ForwardPack {
  Pack<H, kVector> h;
  Pack<X, kVector> x;

  __device__ __forceinline__ void load(const PromptGateParams& p, int64_t out, int64_t in) {
    h = Pack<H, kVector>::load(at<const H>(p.out, out));
    x = Pack<X, kVector>::load(at<const X>(p.in, in));
  }
  // gate(i) is the Gate of element i.
  template <class G>
  __device__ __forceinline__ void update_and_store(const PromptGateParams& p, int64_t out,
                                                   int64_t saved, G&& gate) {
    using A = compute_t<H>;
    H new_h[kVector], derivative[kVector];
    X old_x[kVector];
    h.get(new_h), x.get(old_x);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const A h_i = widen(new_h[i]), x_i = widen(old_x[i]);
      const Gate<A> g = gate(i);
      derivative[i] = narrow<H>(saved_derivative(p.mix, h_i, x_i));
      new_h[i] = narrow<H>(update(g.value, h_i, input_weight(g, p.mix), x_i));
    }
    h.set(new_h);
    h.store(at<H>(p.out, out));
    if (p.saved.data == nullptr) return;
    h.set(derivative);
    h.store(at<H>(p.saved, saved));
  }
};

template <class H, class X, int kVector>
struct BackwardPack {
  using A = compute_t<H>;
  Pack<H, kVector> grad;
  Pack<H, kVector> saved;
  Pack<H, kVector> carrier;

  __device__ __forceinline__ void load(const PromptGateParams& p, int64_t out, int64_t saved_at,
                                       int64_t carrier_at) {
    grad = Pack<H, kVector>::load(at<const H>(p.out, out));
    if (p.saved.data != nullptr) saved = Pack<H, kVector>::load(at<const H>(p.saved, saved_at));
    if (p.carrier.data != nullptr) {
      carrier = Pack<H, kVector>::load(at<const H>(p.carrier, carrier_at));
    }
  }
  // gate(i) is the Gate of element i; sum(i, saved*T) is told what its gradient is made of.
  template <class G, class S>
  __device__ __forceinline__ void update_and_store(const PromptGateParams& p, int64_t out,
                                                   int64_t in, G&& gate, S&& sum) {
    H of_out[kVector], derivative[kVector], of_carrier[kVector];
    X of_in[kVector];
    grad.get(of_out), saved.get(derivative), carrier.get(of_carrier);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      A t = widen(of_out[i]);
      if (p.carrier.data != nullptr) t += widen(of_carrier[i]);
      if (p.saved.data != nullptr) sum(i, widen(derivative[i]) * t);
      const Gate<A> g = gate(i);
      of_in[i] = narrow<X>(static_cast<compute_t<X>>(input_weight(g, p.mix) * t));
      of_out[i] = narrow<H>(g.value * t);
    }
    if (p.in.data != nullptr) {
      Pack<X, kVector> pack;
      pack.set(of_in);
      pack.store(at<X>(p.in, in));
    }
    if (!p.rescale) return;
    grad.set(of_out);
    grad.store(at<H>(p.out, out));
  }
};

// ---- sums over blocks: see vec.cuh ----

// What becomes of the sum of a gate, or (streamed) of a bias.
__device__ __forceinline__ void finish_sum(const PromptGateParams& p, bool is_bias, RowIndex row,
                                           int64_t channel, double sum) {
  if (is_bias) {
    if (p.out.dtype == DType::kFloat64) {
      static_cast<double*>(p.grad_bias)[channel] = sum;
    } else {
      static_cast<float*>(p.grad_bias)[channel] = static_cast<float>(sum);
    }
    return;
  }
  const int64_t logit = offset_of(p.logit, row) + channel * p.logit.channel_stride;
  const double slope = make_gate(read<double>(p.logit, logit)).slope;
  write(p.grad_logit, offset_of(p.grad_logit, row) + channel * p.grad_logit.channel_stride,
        logit_gradient(slope, sum, p.mix));
}

// One sum, of `value` over the threads of `blocks` blocks; this is number `block` of them.
template <class A>
__device__ __forceinline__ void gate_sum_over_blocks(const PromptGateParams& p, bool is_bias,
                                                     RowIndex row, A value, unsigned blocks,
                                                     unsigned block, unsigned* ticket,
                                                     double* partials) {
  sum_over_blocks(value, blocks, block, ticket, partials,
                  [&](double total) { finish_sum(p, is_bias, row, 0, total); });
}

// A sum for each channel of a strip, of the threads in the same lane of the warps of `blocks`
// blocks. The last block reads their partial sums 16 bytes a thread, in groups of threads that take
// turns: one thread a channel would wait for hundreds of loads one after the other.
template <class A, int kVector>
__device__ __forceinline__ void strip_sum_over_blocks(const PromptGateParams& p, bool is_bias,
                                                      RowIndex row, int64_t first_channel,
                                                      const A (&values)[kVector], unsigned blocks,
                                                      unsigned block, unsigned* ticket,
                                                      A* partials) {
  constexpr int kColumns = 32 * kVector;
  __shared__ A warp_sums[kWarps][kColumns];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();  // the previous call's sums have been read
#pragma unroll
  for (int i = 0; i < kVector; ++i) warp_sums[warp][lane * kVector + i] = values[i];
  __syncthreads();
  const int column = static_cast<int>(threadIdx.x);  // kColumns <= kThreads
  const bool is_there = column < kColumns && first_channel + column < p.dim;
  double total = 0;
  if (is_there) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += static_cast<double>(warp_sums[w][column]);
  }
  if (blocks > 1) {
    if (is_there) partials[int64_t(block) * kColumns + column] = static_cast<A>(total);
    if (!arrives_last(ticket, blocks)) return;
    constexpr int kWide = 16 / sizeof(A), kGroups = kThreads / (kColumns / kWide);
    __shared__ double group_sums[kGroups][kColumns];
    const int group = column / (kColumns / kWide), start = column % (kColumns / kWide) * kWide;
    double sums[kWide] = {};
    for (unsigned i = group; i < blocks; i += kGroups) {
      const auto* words =
          reinterpret_cast<const Word<16>::type*>(partials + int64_t(i) * kColumns + start);
      Pack<A, kWide> pack{{__ldcg(words)}};
      A values_i[kWide];
      pack.get(values_i);
#pragma unroll
      for (int k = 0; k < kWide; ++k) sums[k] += static_cast<double>(values_i[k]);
    }
#pragma unroll
    for (int k = 0; k < kWide; ++k) group_sums[group][start + k] = sums[k];
    __syncthreads();
    total = 0;
    if (is_there) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) total += group_sums[g][column];
    }
  }
  if (is_there) finish_sum(p, is_bias, row, first_channel + column, total);
}

// ---- by pack: one gate for a whole sample ----
//
// kOneRun: the P rows of a sample are one contiguous run in every tensor, and packs are the widest.
// The gate is read behind the loads of the packs, so that these are the first to be under way.

// Position of pack `index` of sample b within Rows, in elements.
template <int kVector, bool kOneRun>
__device__ __forceinline__ int64_t place(const LaunchPlan& plan, const Rows& rows, int64_t b,
                                         int64_t index) {
  if (kOneRun) return b * rows.batch_stride + index * kVector;
  return b * rows.batch_stride + pack_offset(plan, rows, index);
}

template <class H, class X, int kVector, bool kOneRun>
__global__ void __launch_bounds__(kThreads, kOneRun ? 4 : kMinBlocks)
    prompt_gate_fwd_kernel(const PromptGateParams p, const LaunchPlan plan) {
  using A = compute_t<H>;
  const int64_t packs = kOneRun ? plan.packs_per_row : plan.rows * plan.packs_per_row;
  const int64_t step = plan.grid_x * kThreads * kPacksInFlight;
  for (int64_t b = blockIdx.y; b < p.batch; b += plan.grid_y) {
    for (int64_t first = int64_t(blockIdx.x) * kThreads * kPacksInFlight + threadIdx.x;
         first < packs; first += step) {
      ForwardPack<H, X, kVector> pack[kPacksInFlight];
#pragma unroll
      for (int k = 0; k < kPacksInFlight; ++k) {
        const int64_t index = first + k * kThreads;
        if (index < packs) {
          pack[k].load(p, place<kVector, kOneRun>(plan, p.out, b, index),
                       place<kVector, kOneRun>(plan, p.in, b, index));
        }
      }
      const Gate<A> gate = make_gate(read<A>(p.logit, b * p.logit.batch_stride));
#pragma unroll
      for (int k = 0; k < kPacksInFlight; ++k) {
        const int64_t index = first + k * kThreads;
        if (index >= packs) break;
        pack[k].update_and_store(p, place<kVector, kOneRun>(plan, p.out, b, index),
                                 place<kVector, kOneRun>(plan, p.saved, b, index),
                                 [&](int) { return gate; });
      }
    }
  }
}

// As many blocks an SM as ptxas 13.0 fits without spills (make resources). Not yet tuned on a GPU.
template <class H, int kVector, bool kOneRun>
constexpr int kMinBlocksBackward = kOneRun && sizeof(H) * kVector == 16 ? 4 : 2;

template <class H, class X, int kVector, bool kOneRun>
__global__ void __launch_bounds__(kThreads, kMinBlocksBackward<H, kVector, kOneRun>)
    prompt_gate_bwd_kernel(const PromptGateParams p, const LaunchPlan plan, unsigned* tickets,
                           double* partials) {
  using A = compute_t<H>;
  const int64_t packs = kOneRun ? plan.packs_per_row : plan.rows * plan.packs_per_row;
  const int64_t step = plan.grid_x * kThreads * kPacksInFlight;
  const bool reduces = p.grad_logit.data != nullptr;
  A sum = A(0);
  for (int64_t b = blockIdx.y; b < p.batch; b += plan.grid_y) {
    for (int64_t first = int64_t(blockIdx.x) * kThreads * kPacksInFlight + threadIdx.x;
         first < packs; first += step) {
      BackwardPack<H, X, kVector> pack[kPacksInFlight];
#pragma unroll
      for (int k = 0; k < kPacksInFlight; ++k) {
        const int64_t index = first + k * kThreads;
        if (index < packs) {
          pack[k].load(p, place<kVector, kOneRun>(plan, p.out, b, index),
                       place<kVector, kOneRun>(plan, p.saved, b, index),
                       place<kVector, kOneRun>(plan, p.carrier, b, index));
        }
      }
      const Gate<A> gate = make_gate(read<A>(p.logit, b * p.logit.batch_stride));
#pragma unroll
      for (int k = 0; k < kPacksInFlight; ++k) {
        const int64_t index = first + k * kThreads;
        if (index >= packs) break;
        pack[k].update_and_store(
            p, place<kVector, kOneRun>(plan, p.out, b, index),
            place<kVector, kOneRun>(plan, p.in, b, index), [&](int) { return gate; },
            [&](int, A product) { sum += product; });
      }
    }
    if (reduces && p.by_sample) {
      gate_sum_over_blocks(p, false, {b, 0}, sum, gridDim.x, blockIdx.x, tickets + b,
                           partials + b * gridDim.x);
      sum = A(0);
    }
  }
  if (reduces && !p.by_sample) {
    gate_sum_over_blocks(p, false, {0, 0}, sum, gridDim.x * gridDim.y,
                         blockIdx.y * gridDim.x + blockIdx.x, tickets, partials);
  }
}

// ---- by segment: every other gate ----
//
// A warp takes row after row of a segment. Where the gate varies by channel it works on one strip,
// 32 packs of each row, else on whole rows. kStreamed: the gate is read row by row.

// Position of a pack within rows.
__device__ __forceinline__ int64_t pack_at(const Rows& rows, RowIndex row, int64_t channel) {
  return offset_of(rows, row) + channel * rows.channel_stride;
}

// The gate of a strip's pack.
template <class A, int kVector>
__device__ __forceinline__ void read_gates(const PromptGateParams& p, bool streamed, RowIndex row,
                                           int64_t channel, Gate<A> (&gates)[kVector]) {
  A logits[kVector];
  const int64_t offset = pack_at(p.logit, row, channel);
  if (streamed) {  // plan_launch has checked that it may be read in packs
    read_pack(p.logit, offset, logits);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      logits[i] = read<A>(p.logit, offset + i * p.logit.channel_stride);
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) gates[i] = make_gate(logits[i]);
}

template <class H, class X, int kVector, bool kByChannel>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    prompt_gate_segment_fwd_kernel(const PromptGateParams p, const LaunchPlan plan) {
  using A = compute_t<H>;
  const Segments segments = segments_of(p);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t step = kByChannel ? plan.packs_per_row : 32;  // packs; a strip has one a lane
  for (int64_t segment = blockIdx.y; segment < segments.count; segment += gridDim.y) {
    for (int64_t first = int64_t(blockIdx.z) * 32; first < plan.packs_per_row;
         first += kByChannel ? int64_t(gridDim.z) * 32 : plan.packs_per_row) {
      Gate<A> gates[kByChannel ? kVector : 1];
      bool has_gates = false;
      for (int64_t i = int64_t(blockIdx.x) * kWarps + warp; i < segments.rows;
           i += int64_t(gridDim.x) * kWarps) {
        const RowIndex row = row_of_segment(p, segments, segment, i);
        for (int64_t pack = first + lane; pack < plan.packs_per_row; pack += step) {
          const int64_t channel = pack * kVector;
          ForwardPack<H, X, kVector> values;
          values.load(p, pack_at(p.out, row, channel), pack_at(p.in, row, channel));
          if constexpr (kByChannel) {
            if (segments.streamed || !has_gates) {
              read_gates(p, segments.streamed, row, channel, gates);
              has_gates = true;
            }
          } else {
            gates[0] = make_gate(read<A>(p.logit, offset_of(p.logit, row)));
          }
          values.update_and_store(p, pack_at(p.out, row, channel), pack_at(p.saved, row, channel),
                                  [&](int k) { return gates[kByChannel ? k : 0]; });
        }
      }
    }
  }
}

// Two blocks an SM: it keeps more in registers, and held to 80 of them, 11 of its instances spill.
template <class H, class X, int kVector, bool kByChannel>
__global__ void __launch_bounds__(kThreads, 2)
    prompt_gate_segment_bwd_kernel(const PromptGateParams p, const LaunchPlan plan,
                                   unsigned* tickets, void* partials) {
  using A = compute_t<H>;
  constexpr int kGates = kByChannel ? kVector : 1;
  const Segments segments = segments_of(p);
  const bool is_bias = segments.streamed;  // what is summed over blocks
  const bool reduces = is_bias ? p.grad_bias != nullptr : p.grad_logit.data != nullptr;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t step = kByChannel ? plan.packs_per_row : 32;
  for (int64_t segment = blockIdx.y; segment < segments.count; segment += gridDim.y) {
    for (int64_t first = int64_t(blockIdx.z) * 32; first < plan.packs_per_row;
         first += kByChannel ? int64_t(gridDim.z) * 32 : plan.packs_per_row) {
      Gate<A> gates[kGates];
      bool has_gates = false;
      A sums[kGates] = {};
      for (int64_t i = int64_t(blockIdx.x) * kWarps + warp; i < segments.rows;
           i += int64_t(gridDim.x) * kWarps) {
        const RowIndex row = row_of_segment(p, segments, segment, i);
        A row_sum = A(0);  // of this lane
        for (int64_t pack = first + lane; pack < plan.packs_per_row; pack += step) {
          const int64_t channel = pack * kVector;
          BackwardPack<H, X, kVector> values;
          values.load(p, pack_at(p.out, row, channel), pack_at(p.saved, row, channel),
                      pack_at(p.carrier, row, channel));
          const auto store = [&](auto&& sum) {
            values.update_and_store(
                p, pack_at(p.out, row, channel), pack_at(p.in, row, channel),
                [&](int k) { return gates[kByChannel ? k : 0]; }, sum);
          };
          if constexpr (!kByChannel) {
            gates[0] = make_gate(read<A>(p.logit, offset_of(p.logit, row)));
            store([&](int, A product) { row_sum += product; });
          } else if (segments.streamed) {
            read_gates(p, true, row, channel, gates);
            A grads[kVector];
            store([&](int k, A product) {
              grads[k] = logit_gradient(gates[k].slope, product, p.mix);
              sums[k] += grads[k];
            });
            if (p.grad_logit.data != nullptr) {
              write_pack(p.grad_logit, pack_at(p.grad_logit, row, channel), grads);
            }
          } else {
            if (!has_gates) read_gates(p, false, row, channel, gates);
            has_gates = true;
            store([&](int k, A product) { sums[k] += product; });
          }
        }
        if constexpr (!kByChannel) {
          if (segments.streamed && p.saved.data != nullptr) {
            const A total = warp_sum(row_sum);  // lane 0
            if (lane == 0) {
              const A slope = make_gate(read<A>(p.logit, offset_of(p.logit, row))).slope;
              const A grad = logit_gradient(slope, total, p.mix);
              if (p.grad_logit.data != nullptr) {
                write(p.grad_logit, offset_of(p.grad_logit, row), grad);
              }
              sums[0] += grad;
            }
          } else {
            sums[0] += row_sum;
          }
        }
      }
      if (!reduces) continue;
      const RowIndex row = row_of_segment(p, segments, segment, 0);
      const int64_t group = segment * gridDim.z + blockIdx.z;  // blocks that share a sum
      if constexpr (kByChannel) {
        strip_sum_over_blocks(p, is_bias, row, first * kVector, sums, gridDim.x, blockIdx.x,
                              tickets + group,
                              static_cast<A*>(partials) + group * gridDim.x * 32 * kVector);
      } else {
        gate_sum_over_blocks(p, is_bias, row, sums[0], gridDim.x, blockIdx.x, tickets + group,
                             static_cast<double*>(partials) + group * gridDim.x);
      }
    }
  }
}

// A warp takes row after row: the logit is a dot product of the row, which is in the nearest cache
// when it is read again for the update.
template <class H, class X, int kVector>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    prompt_gate_linear_token_fwd_kernel(const PromptGateParams p, const LaunchPlan plan) {
  using A = compute_t<H>;
  const Segments segments = segments_of(p);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const A bias = p.bias.data == nullptr ? A(0) : read<A>(p.bias, 0);
  for (int64_t i = int64_t(blockIdx.x) * kWarps + warp; i < segments.rows;
       i += int64_t(gridDim.x) * kWarps) {
    const RowIndex row = row_of_segment(p, segments, 0, i);
    A dot = A(0);
    for (int64_t pack = lane; pack < plan.packs_per_row; pack += 32) {
      const int64_t channel = pack * kVector;
      H h[kVector];
      Pack<H, kVector>::load(at<const H>(p.out, pack_at(p.out, row, channel))).get(h);
      A weights[kVector];
      read_pack(p.weight, channel * p.weight.channel_stride, weights);
#pragma unroll
      for (int k = 0; k < kVector; ++k) dot += widen(h[k]) * weights[k];
    }
    const A logit = __shfl_sync(0xffffffffu, warp_sum(dot), 0) + bias;
    if (lane == 0 && p.logit.data != nullptr) write(p.logit, offset_of(p.logit, row), logit);
    const Gate<A> gate = make_gate(logit);
    for (int64_t pack = lane; pack < plan.packs_per_row; pack += 32) {
      const int64_t channel = pack * kVector;
      ForwardPack<H, X, kVector> values;
      values.load(p, pack_at(p.out, row, channel), pack_at(p.in, row, channel));
      if (p.gathered.data != nullptr) {
        values.h.store(at<H>(p.gathered, pack_at(p.gathered, row, channel)));
      }
      values.update_and_store(p, pack_at(p.out, row, channel), pack_at(p.saved, row, channel),
                              [&](int) { return gate; });
    }
  }
}

// ---- launchers ----

template <class H, class X, int kVector>
int launch(const PromptGateParams& p, const LaunchPlan& plan, bool backward, void* workspace,
           cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.grid_x), static_cast<unsigned>(plan.grid_y),
                        static_cast<unsigned>(plan.grid_z));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  constexpr int kNarrowest = sizeof(H) < sizeof(X) ? sizeof(H) : sizeof(X);
  constexpr bool kIsWidest = kVector == 16 / kNarrowest;
  const bool is_one_run = kIsWidest && plan.rows == 1;
  auto* const tickets = static_cast<unsigned*>(workspace);
  void* const partials =
      workspace == nullptr ? nullptr : static_cast<char*>(workspace) + kTicketBytes;
  if (p.weight.data != nullptr) {
    cudaLaunchKernelEx(&config, prompt_gate_linear_token_fwd_kernel<H, X, kVector>, p, plan);
  } else if (!plan.by_segment && !backward) {
    cudaLaunchKernelEx(&config,
                       is_one_run ? prompt_gate_fwd_kernel<H, X, kVector, kIsWidest>
                                  : prompt_gate_fwd_kernel<H, X, kVector, false>,
                       p, plan);
  } else if (!plan.by_segment) {
    cudaLaunchKernelEx(&config,
                       is_one_run ? prompt_gate_bwd_kernel<H, X, kVector, kIsWidest>
                                  : prompt_gate_bwd_kernel<H, X, kVector, false>,
                       p, plan, tickets, static_cast<double*>(partials));
  } else if (!backward) {
    cudaLaunchKernelEx(&config,
                       p.by_channel ? prompt_gate_segment_fwd_kernel<H, X, kVector, true>
                                    : prompt_gate_segment_fwd_kernel<H, X, kVector, false>,
                       p, plan);
  } else {
    cudaLaunchKernelEx(&config,
                       p.by_channel ? prompt_gate_segment_bwd_kernel<H, X, kVector, true>
                                    : prompt_gate_segment_bwd_kernel<H, X, kVector, false>,
                       p, plan, tickets, partials);
  }
  return static_cast<int>(cudaGetLastError());
}

template <class H, class X>
int launch(const PromptGateParams& p, bool backward, void* workspace, void* stream) {
  const LaunchPlan plan = plan_launch(p);
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
  if (error != cudaSuccess) cudaGetLastError();  // it is reported here, not at the next launch
  *capturing = status != cudaStreamCaptureStatusNone;
  return static_cast<int>(error);
}

}  // namespace gated_prompt
