// SPDX-License-Identifier: Apache-2.0
// What bindings, CPU kernels and CUDA kernels agree on. No torch and no CUDA header here.
//
// Shapes: B samples, N tokens, D channels; P = length prompt rows of each sample, from row `start`
// on.
//
// Forward, on the prompt rows only, with g = sigmoid(logit), w = 1 - g (mix) or 1 (residual):
//   h <- g*h + w*x
//   saved <- (h - x) / 2 (mix) or h / 2 (residual), of the h before
//
// Backward, with G the gradient at the updated rows:
//   gradient of x <- w*G
//   gradient of the logit <- 2 * g * (1-g) * sum(saved*G)
//   G <- g*G, the gradient of h
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#ifdef __CUDACC__
#define GP_INDEX __host__ __device__ __forceinline__
#else
#define GP_INDEX inline
#endif

namespace gated_prompt {

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

constexpr int64_t item_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// The prompt rows of one tensor, [B, P, D]; strides in elements. data == nullptr: not wanted.
struct Rows {
  void* data;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t channel_stride;
  DType dtype;
};

struct PromptGateParams {
  int64_t batch;           // B
  int64_t length;          // P
  int64_t dim;             // D
  bool mix;                // rule: mix or residual
  const void* gate_logit;  // []
  DType gate_dtype;
  Rows out;          // forward: block_out, updated. backward: its gradient G
  Rows in;           // forward: block_in, read. backward: its gradient, written
  Rows saved;        // [B, P, D] contiguous, dtype of out
  bool rescale;      // backward: write g*G over G
  void* grad_logit;  // backward: [], gate_dtype
};

// ---- CPU ----
//
// Work is cut into chunks of rows whose size depends on D alone, and the sum over chunks is taken
// in order, so results are the same bits for any number of threads. Threads belong to the caller.

constexpr int64_t kChunkElements = 8192;  // 16 to 64 KiB: a chunk stays in the nearest caches

inline int64_t rows_per_chunk(const PromptGateParams& p) {
  return p.dim >= kChunkElements ? 1 : kChunkElements / (p.dim > 0 ? p.dim : 1);
}
inline int64_t num_chunks(const PromptGateParams& p) {
  const int64_t rows = p.batch * p.length;
  return p.dim == 0 ? 0 : (rows + rows_per_chunk(p) - 1) / rows_per_chunk(p);
}

void prompt_gate_fwd_cpu(const PromptGateParams& params, int64_t chunk_begin, int64_t chunk_end);
// partials: [num_chunks] sums of saved*G, one per chunk; nullptr when grad_logit is
void prompt_gate_bwd_cpu(const PromptGateParams& params, int64_t chunk_begin, int64_t chunk_end,
                         double* partials);
void prompt_gate_finish_cpu(const PromptGateParams& params, const double* partials);
const char* cpu_instructions();  // which version of the kernels this processor runs

// ---- CUDA ----
//
// Launch shape and index map, as plain functions that run (and are tested) on any machine.

constexpr int kThreads = 256;
constexpr int kPacksInFlight = 2;  // packs of each tensor that one thread loads before it computes
constexpr int64_t kMaxGridX = 1 << 20;
constexpr int64_t kMaxGridY = 65535;
constexpr int64_t kMaxPartials = 2048;  // blocks of a backward launch that reduces: about two waves

struct LaunchPlan {
  int64_t grid_x;  // blocks over the packs of one sample
  int64_t grid_y;  // blocks over samples
  int vector;    // elements in a pack: 16 bytes of the narrowest tensor, or 4 bytes, or one element
  int64_t rows;  // 1 where the P rows of a sample are one contiguous run
  int64_t packs_per_row;
};

// What the kernels are instantiated for, whether or not `in` is wanted.
inline int64_t narrowest_item(const PromptGateParams& p) {
  const int64_t out = item_size(p.out.dtype), in = item_size(p.in.dtype);
  return out < in ? out : in;
}

// Elements that one pack may hold in every tensor at once: pointers and the strides that a pack
// steps over must be multiples of its bytes (up to 16), and packs must tile a run exactly.
inline bool packs_fit(const PromptGateParams& p, int64_t run, int vector) {
  if (run % vector != 0) return false;
  for (const Rows* rows : {&p.out, &p.in, &p.saved}) {
    if (rows->data == nullptr || vector == 1) continue;
    const int64_t bytes = vector * item_size(rows->dtype);
    const int64_t step = (bytes < 16 ? bytes : 16) / item_size(rows->dtype);  // elements
    const auto address = reinterpret_cast<uintptr_t>(rows->data);
    if (rows->channel_stride != 1 ||
        address % static_cast<uintptr_t>(bytes < 16 ? bytes : 16) != 0 ||
        rows->batch_stride % step != 0 || (run == p.dim && rows->row_stride % step != 0)) {
      return false;
    }
  }
  return true;
}

inline LaunchPlan plan_launch(const PromptGateParams& p, bool backward) {
  bool one_run = true;  // rows follow each other without a gap in every tensor
  for (const Rows* rows : {&p.out, &p.in, &p.saved}) {
    if (rows->data == nullptr) continue;
    one_run = one_run && rows->row_stride == p.dim * rows->channel_stride;
  }
  const int64_t narrowest = narrowest_item(p);
  LaunchPlan plan{};
  plan.rows = one_run ? 1 : p.length;
  const int64_t run = one_run ? p.length * p.dim : p.dim;
  plan.vector = 1;
  for (int vector : {static_cast<int>(16 / narrowest), static_cast<int>(4 / narrowest)}) {
    if (vector > 1 && packs_fit(p, run, vector)) {
      plan.vector = vector;
      break;
    }
  }
  plan.packs_per_row = run / plan.vector;
  const int64_t packs = plan.rows * plan.packs_per_row;
  const int64_t per_block = kThreads * kPacksInFlight;
  const int64_t blocks = (packs + per_block - 1) / per_block;
  const bool reduces = backward && p.grad_logit != nullptr;
  const int64_t max_x = reduces ? kMaxPartials : kMaxGridX;
  plan.grid_x = blocks < max_x ? blocks : max_x;
  const int64_t max_y = reduces ? kMaxPartials / (plan.grid_x > 0 ? plan.grid_x : 1) : kMaxGridY;
  plan.grid_y = p.batch < max_y ? p.batch : max_y;
  return plan;
}

// Position of pack `index` of a sample within Rows, in elements from the sample's first element.
GP_INDEX int64_t pack_offset(const LaunchPlan& plan, const Rows& rows, int64_t index) {
  if (plan.rows == 1) return index * plan.vector * rows.channel_stride;
  int64_t row;
  if (((index | plan.packs_per_row) >> 32) == 0) {  // a 64-bit division costs some 100 instructions
    row = static_cast<uint32_t>(index) / static_cast<uint32_t>(plan.packs_per_row);
  } else {
    row = index / plan.packs_per_row;
  }
  const int64_t column = (index - row * plan.packs_per_row) * plan.vector;
  return row * rows.row_stride + column * rows.channel_stride;
}

// Device memory for the gate gradient: a ticket, then one partial sum per block. The ticket must be
// 0 before the first launch and is 0 again after each, so launches on one stream may share it.
constexpr size_t kWorkspaceBytes = 16 + kMaxPartials * sizeof(double);

// Both return a cudaError_t as int (0: success). stream is a cudaStream_t.
int launch_prompt_gate_fwd(const PromptGateParams& params, void* stream);
int launch_prompt_gate_bwd(const PromptGateParams& params, void* workspace, void* stream);
int is_stream_capturing(void* stream, bool* capturing);

}  // namespace gated_prompt
