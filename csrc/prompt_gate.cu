// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of the prompt gate. They are memory bound: they read and write each element of the
// prompt rows once (the linear-token kernel reads h twice), in packs of 16 bytes if the tensors
// allow it. They access no other rows.
#include <cuda_runtime.h>

#include "prompt_gate.h"
#include "prompt_gate_math.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace gated_prompt {
namespace {

// Minimum number of blocks per SM, for __launch_bounds__: at most 80 registers per thread.
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

  __device__ __forceinline__ void load(const PromptGateParams& p, int64_t h_at, int64_t x_at) {
    h = Pack<H, kVector>::load(at<const H>(p.h, h_at));
    x = Pack<X, kVector>::load(at<const X>(p.x, x_at));
  }
  // gate(i) returns the Gate of element i.
  template <class G>
  __device__ __forceinline__ void update_and_store(const PromptGateParams& p, int64_t h_at,
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
    h.store(at<H>(p.h, h_at));
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

  __device__ __forceinline__ void load(const PromptGateParams& p, int64_t h_at, int64_t saved_at,
                                       int64_t carrier_at) {
    grad = Pack<H, kVector>::load(at<const H>(p.h, h_at));
    if (p.saved.data != nullptr) saved = Pack<H, kVector>::load(at<const H>(p.saved, saved_at));
    if (p.carrier.data != nullptr) {
      carrier = Pack<H, kVector>::load(at<const H>(p.carrier, carrier_at));
    }
  }
  // gate(i) returns the Gate of element i; sum(i, saved*T) adds element i to the gate's gradient.
  template <class G, class S>
  __device__ __forceinline__ void update_and_store(const PromptGateParams& p, int64_t h_at,
                                                   int64_t x_at, G&& gate, S&& sum) {
    H grad_h[kVector], derivative[kVector], carried[kVector];
    X grad_x[kVector];
    grad.get(grad_h), saved.get(derivative), carrier.get(carried);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      A t = widen(grad_h[i]);
      if (p.carrier.data != nullptr) t += widen(carried[i]);
      if (p.saved.data != nullptr) sum(i, widen(derivative[i]) * t);
      const Gate<A> g = gate(i);
      grad_x[i] = narrow<X>(static_cast<compute_t<X>>(input_weight(g, p.mix) * t));
      grad_h[i] = narrow<H>(g.value * t);
    }
    if (p.x.data != nullptr) {
      Pack<X, kVector> pack;
      pack.set(grad_x);
      pack.store(at<X>(p.x, x_at));
    }
    if (!p.rescale) return;
    grad.set(grad_h);
    grad.store(at<H>(p.h, h_at));
  }
};

// Runs load(pack, index) and use(pack, index) for all packs of one thread whose index is less than
// `end`. It works in stages of kStage packs, with indices start, start + inner, ...; start is
// `first` in the first stage and grows by `step` from stage to stage. All packs of a stage are
// loaded before the first of them is used. kAhead: the packs of the next stage are also loaded
// before the packs of the current stage are used. prepare() runs after the loads of the first stage
// have been issued, so that it does not delay them.
template <int kStage, bool kAhead, class P, class Load, class Prepare, class Use>
__device__ __forceinline__ void pipeline(int64_t first, int64_t inner, int64_t step, int64_t end,
                                         Load&& load, Prepare&& prepare, Use&& use) {
  P now[kStage], next[kStage];
  const auto load_stage = [&](P(&packs)[kStage], int64_t start) {
#pragma unroll
    for (int k = 0; k < kStage; ++k) {
      if (start + k * inner < end) load(packs[k], start + k * inner);
    }
  };
  load_stage(now, first);
  prepare();
  for (int64_t start = first; start < end; start += step) {
    if (kAhead) load_stage(next, start + step);
#pragma unroll
    for (int k = 0; k < kStage; ++k) {
      if (start + k * inner < end) use(now[k], start + k * inner);
      if (kAhead) now[k] = next[k];
    }
    if (!kAhead) load_stage(now, start + step);
  }
}

// ---- sums over blocks: see reduce.cuh ----

// Turns a sum into the gradient of a logit, or of a bias (is_bias), and writes it.
struct SumEnd {
  const PromptGateParams& p;
  bool is_bias;
  RowIndex row;
  int64_t channel;

  // Computes what does not depend on the sum; called while partial sums are being loaded.
  __device__ __forceinline__ double prepare() const {
    if (is_bias) return 0;
    const int64_t logit = offset_of(p.logit, row) + channel * p.logit.channel_stride;
    return make_gate(read<double>(p.logit, logit)).slope;
  }
  __device__ __forceinline__ void finish(double sum, double slope) const {
    if (is_bias) {
      if (p.h.dtype == DType::kFloat64) {
        static_cast<double*>(p.grad_bias)[channel] = sum;
      } else {
        static_cast<float*>(p.grad_bias)[channel] = static_cast<float>(sum);
      }
      return;
    }
    write(p.grad_logit, offset_of(p.grad_logit, row) + channel * p.grad_logit.channel_stride,
          logit_gradient(slope, sum, p.mix));
  }
};

// Sums `values` separately for each channel of a strip, over the warps of `blocks` blocks. The last
// block to arrive adds the partial sums of all blocks. Each group of its threads adds the sums of
// some of the blocks, and a thread loads 16 bytes at a time. If one thread added all sums of a
// channel, it would wait for hundreds of loads, one after the other.
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
  const SumEnd end{p, is_bias, row, first_channel + column};
  double total = 0, slope = 0;
  if (is_there) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += static_cast<double>(warp_sums[w][column]);
  }
  if (blocks == 1) {
    if (is_there) slope = end.prepare();
  } else {
    if (is_there) partials[int64_t(block) * kColumns + column] = static_cast<A>(total);
    if (!arrives_last(ticket, blocks)) return;
    constexpr int kWide = 16 / sizeof(A), kGroups = kThreads / (kColumns / kWide), kAtOnce = 8;
    __shared__ double group_sums[kGroups][kColumns];
    const int group = column / (kColumns / kWide), start = column % (kColumns / kWide) * kWide;
    double sums[kWide] = {};
    for (unsigned first = 0; first < blocks; first += kGroups * kAtOnce) {
      Pack<A, kWide> packs[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const unsigned i = first + j * kGroups + group;
        const auto* words =
            reinterpret_cast<const Word<16>::type*>(partials + int64_t(i) * kColumns + start);
        packs[j] = {};
        if (i < blocks) packs[j].words[0] = __ldcg(words);
      }
      if (is_there && first == 0) slope = end.prepare();  // while the loads are in flight
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        A values_j[kWide];
        packs[j].get(values_j);
#pragma unroll
        for (int k = 0; k < kWide; ++k) sums[k] += static_cast<double>(values_j[k]);
      }
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
  if (is_there) end.finish(total, slope);
}

// ---- by pack: threads take packs in memory order ----
//
// Forward and backward of one gate per sample, or one gate for all samples. kOneRun: the P rows of
// a sample are one contiguous run in every tensor, and packs have their full width.

// Offset of a pack of sample b, in elements.
template <int kVector, bool kOneRun>
__device__ __forceinline__ int64_t place(const LaunchPlan& plan, const Rows& rows, int64_t b,
                                         int64_t index) {
  if (kOneRun) return b * rows.batch_stride + index * kVector;
  return b * rows.batch_stride + pack_offset(plan, rows, index);
}

template <class H, class X, int kVector, bool kOneRun>
__global__ void __launch_bounds__(kForwardThreads, kOneRun ? 8 : 6)
    prompt_gate_fwd_kernel(const PromptGateParams p, const LaunchPlan plan) {
  using A = compute_t<H>;
  using Packs = ForwardPack<H, X, kVector>;
  const int64_t packs = kOneRun ? plan.packs_per_row : plan.rows * plan.packs_per_row;
  constexpr int kTile = kForwardThreads * kPacksInFlight;
  for (int64_t b = blockIdx.y; b < p.batch; b += plan.grid_y) {
    Gate<A> gate;
    pipeline<kPacksInFlight, false, Packs>(
        int64_t(blockIdx.x) * kTile + threadIdx.x, kForwardThreads, plan.grid_x * kTile, packs,
        [&](Packs& pack, int64_t index) {
          pack.load(p, place<kVector, kOneRun>(plan, p.h, b, index),
                    place<kVector, kOneRun>(plan, p.x, b, index));
        },
        [&] { gate = make_gate(read<A>(p.logit, b * p.logit.batch_stride)); },
        [&](Packs& pack, int64_t index) {
          pack.update_and_store(p, place<kVector, kOneRun>(plan, p.h, b, index),
                                place<kVector, kOneRun>(plan, p.saved, b, index),
                                [&](int) { return gate; });
        });
  }
}

// One gate per sample needs one sum per sample: a thread takes packs of one sample, then of the
// next. With one gate for all samples, a thread takes the same pack of sample after sample.
template <class H, class X, int kVector, bool kOneRun>
__global__ void __launch_bounds__(kThreads, kOneRun && sizeof(H) * kVector == 16 ? 4 : 2)
    prompt_gate_bwd_kernel(const PromptGateParams p, const LaunchPlan plan, unsigned* tickets,
                           double* partials) {
  using A = compute_t<H>;
  using Packs = BackwardPack<H, X, kVector>;
  const int64_t packs = kOneRun ? plan.packs_per_row : plan.rows * plan.packs_per_row;
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = plan.grid_x * kThreads;
  const bool reduces = p.grad_logit.data != nullptr;
  A sum = A(0);
  Gate<A> gate;
  const auto prepare = [&](int64_t b) {
    gate = make_gate(read<A>(p.logit, b * p.logit.batch_stride));
  };
  const auto load = [&](Packs& pack, int64_t b, int64_t index) {
    pack.load(p, place<kVector, kOneRun>(plan, p.h, b, index),
              place<kVector, kOneRun>(plan, p.saved, b, index),
              place<kVector, kOneRun>(plan, p.carrier, b, index));
  };
  const auto use = [&](Packs& pack, int64_t b, int64_t index) {
    pack.update_and_store(
        p, place<kVector, kOneRun>(plan, p.h, b, index),
        place<kVector, kOneRun>(plan, p.x, b, index), [&](int) { return gate; },
        [&](int, A product) { sum += product; });
  };
  if (p.by_sample) {
    for (int64_t b = blockIdx.y; b < p.batch; b += plan.grid_y) {
      pipeline<1, true, Packs>(
          first, 0, step, packs, [&](Packs& pack, int64_t index) { load(pack, b, index); },
          [&] { prepare(b); }, [&](Packs& pack, int64_t index) { use(pack, b, index); });
      if (reduces) {
        sum_over_blocks(sum, gridDim.x, blockIdx.x, tickets + b, partials + b * gridDim.x,
                        SumEnd{p, false, {b, 0}, 0});
      }
      sum = A(0);
    }
    return;
  }
  for (int64_t index = first; index < packs; index += step) {
    pipeline<1, true, Packs>(
        blockIdx.y, 0, plan.grid_y, p.batch, [&](Packs& pack, int64_t b) { load(pack, b, index); },
        [&] { prepare(0); }, [&](Packs& pack, int64_t b) { use(pack, b, index); });
  }
  if (!reduces) return;
  sum_over_blocks(sum, gridDim.x * gridDim.y, blockIdx.y * gridDim.x + blockIdx.x, tickets,
                  partials, SumEnd{p, false, {0, 0}, 0});
}

// ---- by row and by prompt ----

// Offset of the pack that starts at `channel`, in elements.
__device__ __forceinline__ int64_t pack_at(const Rows& rows, RowIndex row, int64_t channel) {
  return offset_of(rows, row) + channel * rows.channel_stride;
}

// Number of packs of one row that a lane loads before it uses the first. With 3, a warp loads a
// whole row of 768 16-bit elements. A pack of more than 16 bytes takes more registers, so only one
// is loaded at a time; otherwise registers spill (make guard).
template <class H, class X, int kVector>
constexpr int kRowPacks = (sizeof(H) > sizeof(X) ? sizeof(H) : sizeof(X)) * kVector > 16 ? 1 : 3;

// Packs first, first + 32, ... of a row, up to `end` (exclusive).
template <class H, class X, int kVector>
struct BackwardRow {
  static constexpr int kPacks = kRowPacks<H, X, kVector>;
  BackwardPack<H, X, kVector> packs[kPacks];

  __device__ __forceinline__ void load(const PromptGateParams& p, RowIndex row, int64_t first,
                                       int64_t end) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t channel = (first + 32 * k) * kVector;
      if (first + 32 * k < end) {
        packs[k].load(p, pack_at(p.h, row, channel), pack_at(p.saved, row, channel),
                      pack_at(p.carrier, row, channel));
      }
    }
  }
  template <class A>
  __device__ __forceinline__ void update_and_store(const PromptGateParams& p, RowIndex row,
                                                   int64_t first, int64_t end, const Gate<A>& gate,
                                                   A& sum) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t channel = (first + 32 * k) * kVector;
      if (first + 32 * k < end) {
        packs[k].update_and_store(
            p, pack_at(p.h, row, channel), pack_at(p.x, row, channel), [&](int) { return gate; },
            [&](int, A product) { sum += product; });
      }
    }
  }
};

template <class H, class X, int kVector>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    prompt_gate_row_fwd_kernel(const PromptGateParams p, const LaunchPlan plan) {
  using A = compute_t<H>;
  constexpr int kPacks = kRowPacks<H, X, kVector>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t i = int64_t(blockIdx.x) * kWarps + warp; i < p.batch * p.length;
       i += int64_t(gridDim.x) * kWarps) {
    const Division at = divide(i, p.length);
    const RowIndex row{at.quotient, at.remainder};
    Gate<A> gate;
    pipeline<kPacks, false, ForwardPack<H, X, kVector>>(
        lane, 32, 32 * kPacks, plan.packs_per_row,
        [&](ForwardPack<H, X, kVector>& pack, int64_t index) {
          pack.load(p, pack_at(p.h, row, index * kVector), pack_at(p.x, row, index * kVector));
        },
        [&] { gate = make_gate(read<A>(p.logit, offset_of(p.logit, row))); },
        [&](ForwardPack<H, X, kVector>& pack, int64_t index) {
          pack.update_and_store(p, pack_at(p.h, row, index * kVector),
                                pack_at(p.saved, row, index * kVector), [&](int) { return gate; });
        });
  }
}

// The warps of a block take neighbouring prompts, whose rows are next to each other in memory.
template <class H, class X, int kVector>
__global__ void __launch_bounds__(kThreads, 2)
    prompt_gate_prompt_bwd_kernel(const PromptGateParams p, const LaunchPlan plan,
                                  unsigned* tickets, double* partials) {
  using A = compute_t<H>;
  using Row = BackwardRow<H, X, kVector>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t groups = ceil_div(p.length, kWarps);
  for (int64_t group = blockIdx.y; group < groups; group += gridDim.y) {
    const RowIndex own{0, group * kWarps + warp};
    const bool is_there = own.p < p.length;
    A sum = A(0);
    Gate<A> gate;
    for (int64_t part = lane; part < plan.packs_per_row; part += 32 * Row::kPacks) {
      pipeline<1, true, Row>(
          blockIdx.x, 0, gridDim.x, is_there ? p.batch : 0,
          [&](Row& packs, int64_t b) { packs.load(p, {b, own.p}, part, plan.packs_per_row); },
          [&] {
            if (is_there) gate = make_gate(read<A>(p.logit, offset_of(p.logit, own)));
          },
          [&](Row& packs, int64_t b) {
            packs.update_and_store(p, {b, own.p}, part, plan.packs_per_row, gate, sum);
          });
    }
    if (p.grad_logit.data == nullptr) continue;
    warp_sum_over_blocks(sum, gridDim.x, blockIdx.x, tickets + group,
                         partials + group * gridDim.x * kWarps, is_there, SumEnd{p, false, own, 0});
  }
}

template <class H, class X, int kVector>
__global__ void __launch_bounds__(kThreads, 2)
    prompt_gate_row_bwd_kernel(const PromptGateParams p, const LaunchPlan plan, unsigned* tickets,
                               double* partials) {
  using A = compute_t<H>;
  using Row = BackwardRow<H, X, kVector>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  A sum = A(0);  // over the rows of this warp; only lane 0 has it
  for (int64_t i = int64_t(blockIdx.x) * kWarps + warp; i < p.batch * p.length;
       i += int64_t(gridDim.x) * kWarps) {
    const Division at = divide(i, p.length);
    const RowIndex row{at.quotient, at.remainder};
    Gate<A> gate;
    A row_sum = A(0);  // of this lane
    pipeline<1, false, Row>(
        lane, 0, 32 * Row::kPacks, plan.packs_per_row,
        [&](Row& packs, int64_t first) { packs.load(p, row, first, plan.packs_per_row); },
        [&] { gate = make_gate(read<A>(p.logit, offset_of(p.logit, row))); },
        [&](Row& packs, int64_t first) {
          packs.update_and_store(p, row, first, plan.packs_per_row, gate, row_sum);
        });
    if (p.saved.data == nullptr) continue;
    const A grad = logit_gradient(gate.slope, warp_sum(row_sum), p.mix);
    if (lane == 0) {
      if (p.grad_logit.data != nullptr) write(p.grad_logit, offset_of(p.grad_logit, row), grad);
      sum += grad;
    }
  }
  if (p.grad_bias == nullptr) return;
  sum_over_blocks(sum, gridDim.x, blockIdx.x, tickets, partials, SumEnd{p, true, {0, 0}, 0});
}

// ---- by strip ----
//
// kStreamed: each row has its own gates. Otherwise the rows of a segment share the gates, and a
// block computes them once per strip.

// Computes the gates of a strip, one channel per thread, and gives each lane the gates of its pack
// through shared memory.
template <class A, int kVector>
__device__ __forceinline__ void share_gates(const PromptGateParams& p, RowIndex row,
                                            int64_t first_channel, Gate<A> (&gates)[kVector]) {
  constexpr int kColumns = 32 * kVector;
  __shared__ Gate<A> strip[kColumns];
  __syncthreads();  // the gates of the previous strip have been read
  const int column = static_cast<int>(threadIdx.x);  // kColumns <= kThreads
  if (column < kColumns && first_channel + column < p.dim) {
    strip[column] = make_gate(read<A>(p.logit, pack_at(p.logit, row, first_channel + column)));
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kVector; ++i) gates[i] = strip[threadIdx.x % 32 * kVector + i];
}

// Computes the gates of a pack if each row has its own. plan_launch has checked that the logits can
// be read as a pack.
template <class A, int kVector>
__device__ __forceinline__ void read_gates(const PromptGateParams& p, RowIndex row, int64_t channel,
                                           Gate<A> (&gates)[kVector]) {
  A logits[kVector];
  read_pack(p.logit, pack_at(p.logit, row, channel), logits);
#pragma unroll
  for (int i = 0; i < kVector; ++i) gates[i] = make_gate(logits[i]);
}

template <class H, class X, int kVector, bool kStreamed>
__global__ void __launch_bounds__(kThreads, kStreamed ? kMinBlocks : 2)
    prompt_gate_strip_fwd_kernel(const PromptGateParams p, const LaunchPlan plan) {
  using A = compute_t<H>;
  constexpr int kStage = kStreamed ? 1 : kPacksInFlight;
  const Segments segments = segments_of(p);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t segment = blockIdx.y; segment < segments.count; segment += gridDim.y) {
    for (int64_t first = int64_t(blockIdx.z) * 32; first < plan.packs_per_row;
         first += int64_t(gridDim.z) * 32) {
      const int64_t channel = (first + lane) * kVector;
      Gate<A> gates[kVector];
      pipeline<kStage, !kStreamed, ForwardPack<H, X, kVector>>(
          int64_t(blockIdx.x) * kWarps + warp, int64_t(gridDim.x) * kWarps,
          int64_t(gridDim.x) * kWarps * kStage,
          first + lane < plan.packs_per_row ? segments.rows : 0,
          [&](ForwardPack<H, X, kVector>& pack, int64_t i) {
            const RowIndex row = row_of_segment(p, segments, segment, i);
            pack.load(p, pack_at(p.h, row, channel), pack_at(p.x, row, channel));
          },
          [&] {
            if (kStreamed) return;
            share_gates(p, row_of_segment(p, segments, segment, 0), first * kVector, gates);
          },
          [&](ForwardPack<H, X, kVector>& pack, int64_t i) {
            const RowIndex row = row_of_segment(p, segments, segment, i);
            if (kStreamed) read_gates(p, row, channel, gates);
            pack.update_and_store(p, pack_at(p.h, row, channel), pack_at(p.saved, row, channel),
                                  [&](int k) { return gates[k]; });
          });
    }
  }
}

template <class H, class X, int kVector, bool kStreamed>
__global__ void __launch_bounds__(kThreads, 2)
    prompt_gate_strip_bwd_kernel(const PromptGateParams p, const LaunchPlan plan, unsigned* tickets,
                                 compute_t<H>* partials) {
  using A = compute_t<H>;
  // Wide packs spill unless they are loaded one at a time (benchmarks/lab/kernel_resources.py).
  constexpr bool kIsWide = sizeof(H) * kVector > 16;
  constexpr int kStage = kStreamed || kIsWide ? 1 : kPacksInFlight;
  const Segments segments = segments_of(p);
  const bool reduces = kStreamed ? p.grad_bias != nullptr : p.grad_logit.data != nullptr;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t segment = blockIdx.y; segment < segments.count; segment += gridDim.y) {
    for (int64_t first = int64_t(blockIdx.z) * 32; first < plan.packs_per_row;
         first += int64_t(gridDim.z) * 32) {
      const int64_t channel = (first + lane) * kVector;
      Gate<A> gates[kVector];
      A sums[kVector] = {};
      pipeline<kStage, !kStreamed && !kIsWide, BackwardPack<H, X, kVector>>(
          int64_t(blockIdx.x) * kWarps + warp, int64_t(gridDim.x) * kWarps,
          int64_t(gridDim.x) * kWarps * kStage,
          first + lane < plan.packs_per_row ? segments.rows : 0,
          [&](BackwardPack<H, X, kVector>& pack, int64_t i) {
            const RowIndex row = row_of_segment(p, segments, segment, i);
            pack.load(p, pack_at(p.h, row, channel), pack_at(p.saved, row, channel),
                      pack_at(p.carrier, row, channel));
          },
          [&] {
            if (kStreamed) return;
            share_gates(p, row_of_segment(p, segments, segment, 0), first * kVector, gates);
          },
          [&](BackwardPack<H, X, kVector>& pack, int64_t i) {
            const RowIndex row = row_of_segment(p, segments, segment, i);
            if (kStreamed) read_gates(p, row, channel, gates);
            A grads[kVector];
            pack.update_and_store(
                p, pack_at(p.h, row, channel), pack_at(p.x, row, channel),
                [&](int k) { return gates[k]; },
                [&](int k, A product) {
                  if (kStreamed)
                    product = grads[k] = logit_gradient(gates[k].slope, product, p.mix);
                  sums[k] += product;
                });
            if (kStreamed && p.grad_logit.data != nullptr) {
              write_pack(p.grad_logit, pack_at(p.grad_logit, row, channel), grads);
            }
          });
      if (!reduces) continue;
      const int64_t group = segment * gridDim.z + blockIdx.z;  // blocks that share a sum
      strip_sum_over_blocks(p, kStreamed, row_of_segment(p, segments, segment, 0), first * kVector,
                            sums, gridDim.x, blockIdx.x, tickets + group,
                            partials + group * gridDim.x * 32 * kVector);
    }
  }
}

// A warp takes row after row. It reads a row twice: for the dot product that gives the logit, and
// for the update. The row is still in the nearest cache then.
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
      Pack<H, kVector>::load(at<const H>(p.h, pack_at(p.h, row, channel))).get(h);
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
      values.load(p, pack_at(p.h, row, channel), pack_at(p.x, row, channel));
      if (p.gathered.data != nullptr) {
        values.h.store(at<H>(p.gathered, pack_at(p.gathered, row, channel)));
      }
      values.update_and_store(p, pack_at(p.h, row, channel), pack_at(p.saved, row, channel),
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
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.stream = stream;
  constexpr int kNarrowest = sizeof(H) < sizeof(X) ? sizeof(H) : sizeof(X);
  constexpr bool kIsWidest = kVector == 16 / kNarrowest;
  const bool is_one_run = kIsWidest && plan.rows == 1;
  auto* const tickets = static_cast<unsigned*>(workspace);
  void* const partials =
      workspace == nullptr ? nullptr : static_cast<char*>(workspace) + kTicketBytes;
  const bool streamed = segments_of(p).streamed;
  if (p.weight.data != nullptr) {
    cudaLaunchKernelEx(&config, prompt_gate_linear_token_fwd_kernel<H, X, kVector>, p, plan);
  } else if (plan.mapping == Mapping::kPacks && !backward) {
    cudaLaunchKernelEx(&config,
                       is_one_run ? prompt_gate_fwd_kernel<H, X, kVector, kIsWidest>
                                  : prompt_gate_fwd_kernel<H, X, kVector, false>,
                       p, plan);
  } else if (plan.mapping == Mapping::kPacks) {
    cudaLaunchKernelEx(&config,
                       is_one_run ? prompt_gate_bwd_kernel<H, X, kVector, kIsWidest>
                                  : prompt_gate_bwd_kernel<H, X, kVector, false>,
                       p, plan, tickets, static_cast<double*>(partials));
  } else if (plan.mapping == Mapping::kPrompts) {
    cudaLaunchKernelEx(&config, prompt_gate_prompt_bwd_kernel<H, X, kVector>, p, plan, tickets,
                       static_cast<double*>(partials));
  } else if (plan.mapping == Mapping::kRows && !backward) {
    cudaLaunchKernelEx(&config, prompt_gate_row_fwd_kernel<H, X, kVector>, p, plan);
  } else if (plan.mapping == Mapping::kRows) {
    cudaLaunchKernelEx(&config, prompt_gate_row_bwd_kernel<H, X, kVector>, p, plan, tickets,
                       static_cast<double*>(partials));
  } else if (!backward) {
    cudaLaunchKernelEx(&config,
                       streamed ? prompt_gate_strip_fwd_kernel<H, X, kVector, true>
                                : prompt_gate_strip_fwd_kernel<H, X, kVector, false>,
                       p, plan);
  } else {
    cudaLaunchKernelEx(&config,
                       streamed ? prompt_gate_strip_bwd_kernel<H, X, kVector, true>
                                : prompt_gate_strip_bwd_kernel<H, X, kVector, false>,
                       p, plan, tickets, static_cast<compute_t<H>*>(partials));
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

// The bindings allow only equal dtypes, and float32 together with a 16-bit type.
int launch(const PromptGateParams& p, bool backward, void* workspace, void* stream) {
  const bool in_float = p.x.dtype == DType::kFloat32;
  switch (p.h.dtype) {
    case DType::kFloat64: return launch<double, double>(p, backward, workspace, stream);
    case DType::kBFloat16:
      return in_float ? launch<BFloat16, float>(p, backward, workspace, stream)
                      : launch<BFloat16, BFloat16>(p, backward, workspace, stream);
    case DType::kFloat16:
      return in_float ? launch<Half, float>(p, backward, workspace, stream)
                      : launch<Half, Half>(p, backward, workspace, stream);
    default:
      return p.x.dtype == DType::kBFloat16 ? launch<float, BFloat16>(p, backward, workspace, stream)
             : p.x.dtype == DType::kFloat16 ? launch<float, Half>(p, backward, workspace, stream)
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

int capture_of(void* stream, unsigned long long* id) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error =
      cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, id);
  // Clears the error, which is returned below; otherwise the next launch would report it.
  if (error != cudaSuccess) cudaGetLastError();
  if (status == cudaStreamCaptureStatusNone) *id = 0;
  return static_cast<int>(error);
}

int synchronize(void* stream) {
  return static_cast<int>(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
}

}  // namespace gated_prompt
