// SPDX-License-Identifier: Apache-2.0
// The interface between bindings, CPU kernels and CUDA kernels. No torch or CUDA header here.
//
// Shapes: B samples, N tokens, D channels. Each sample has P = length prompt rows, the first one at
// row `start`. h: the prompt rows of block_out; x: the prompt rows of block_in. The gate's logit
// broadcasts to [B, P, D].
//
// Forward, on the prompt rows only, with g = sigmoid(logit), w = 1 - g (mix) or 1 (residual):
//   saved <- (h - x) / 2 (mix) or h (residual)
//   h <- g*h + w*x
//
// Backward, with T = G + C. G is the part of the gradient of the updated rows that arrives through
// the sequence. C is the part that arrives through the carrier, 0 without a carrier.
//   gradient of x <- w*T
//   gradient of the logit <- k * g * (1-g) * saved*T, k = 2 (mix) or 1 (residual), summed over the
//                            dimensions along which the logit broadcasts
//   gradient of a bias in the logit <- the gradient of the logit, summed over all rows
//   G <- g*T, the gradient of h
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "dtypes.h"
#include "launch.h"

namespace gated_prompt {

// The prompt rows of one tensor, [B, P, D]. Strides are in elements, 0 along a dimension that
// broadcasts. data == nullptr: there is no such tensor, or no kernel needs it.
struct Rows {
  void* data;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t channel_stride;
  DType dtype;
};

struct PromptGateParams {
  int64_t batch;                       // B
  int64_t length;                      // P
  int64_t dim;                         // D
  bool mix;                            // true: mix; false: residual
  bool by_sample, by_row, by_channel;  // the dimensions along which the logit does not broadcast
  Rows logit;
  Rows h;           // forward: h, updated. backward: G, updated if rescale
  Rows x;           // forward: x, read. backward: the gradient of x, written
  Rows saved;       // [B, P, D] contiguous, dtype of h
  Rows carrier;     // backward: C, dtype of h
  Rows grad_logit;  // backward: contiguous, with the shape of the logit
  void* grad_bias;  // backward: [D] if by_channel, otherwise [1]; float32 (float64 if h is)
  bool rescale;     // backward: overwrite G with g*T

  // Forward of a gate that is a linear map of the row, logit = h . weight + bias, with by_sample
  // and by_row. The kernel writes `logit`, in float32 (float64 if h is), unless its data is
  // nullptr.
  Rows weight;    // [D]; data == nullptr for every other gate
  Rows bias;      // [1]; data == nullptr: none
  Rows gathered;  // [B, P, D] contiguous, dtype of h: a copy of h before the update
};

// A segment is the set of rows that share a gate (or, with by_channel, the gates of all channels).
// The gradient of a gate is a sum over the rows of its segment. If every row has its own gates
// ("streamed"), all rows are one segment: gates are read, and their gradients are written, row by
// row. The only sum over rows is then the gradient of a bias.
struct Segments {
  int64_t count;
  int64_t rows;  // per segment
  bool streamed;
};

GP_HD Segments segments_of(const PromptGateParams& p) {
  const bool streamed = p.by_sample && p.by_row;
  const int64_t count = streamed ? 1 : p.by_sample ? p.batch : p.by_row ? p.length : 1;
  return {count, count == 0 ? 0 : p.batch * p.length / count, streamed};
}

struct RowIndex {
  int64_t b, p;
};

// Row i of a segment.
GP_HD RowIndex row_of_segment(const PromptGateParams& p, const Segments& segments, int64_t segment,
                              int64_t i) {
  if (p.by_row && !segments.streamed) return {i, segment};
  if (p.by_sample && !segments.streamed) return {segment, i};
  // not divide(): it computes the remainder in 64 bits, which takes more registers
  if (((i | p.length) >> 32) == 0) {
    const uint32_t b = static_cast<uint32_t>(i) / static_cast<uint32_t>(p.length);
    return {b, static_cast<uint32_t>(i) - b * static_cast<uint32_t>(p.length)};
  }
  return {i / p.length, i % p.length};
}

GP_HD int64_t offset_of(const Rows& rows, RowIndex row) {
  return row.b * rows.batch_stride + row.p * rows.row_stride;
}

// ---- CPU ----
//
// Work is cut into tasks. A task is some rows of one segment; its size depends only on the shapes
// and strides of the tensors. The sums of the tasks are added in order, so the number of threads
// does not change any bit of a result. The caller distributes the tasks over its threads.

constexpr int64_t kTaskElements = 8192;  // 16 to 64 KiB: a task stays in the nearest caches
// largest joined row: it is still in the cache in a second pass over it
constexpr int64_t kRowElements = 4096;

// True if all elements of a sample share one gate, and the rows of a sample follow each other
// without a gap in every tensor. Such rows can be cut anywhere.
inline bool rows_are_one_run(const PromptGateParams& p) {
  if (p.by_row || p.by_channel) return false;
  for (const Rows* rows : {&p.h, &p.x, &p.saved, &p.carrier}) {
    if (rows->data != nullptr && rows->row_stride != p.dim * rows->channel_stride) return false;
  }
  return true;
}

// Returns the same problem with fewer and longer rows if possible, to pay the fixed cost of a row
// less often.
inline PromptGateParams join_rows(PromptGateParams p) {
  int64_t joined = p.dim > 0 && rows_are_one_run(p) ? kRowElements / p.dim : 1;
  while (joined > 1 && p.length % joined != 0) --joined;
  if (joined <= 1) return p;
  p.length /= joined;
  p.dim *= joined;
  for (Rows* rows : {&p.h, &p.x, &p.saved, &p.carrier}) rows->row_stride *= joined;
  return p;
}

struct Tasks {
  int64_t rows;         // per task; the last task of a segment may have fewer
  int64_t per_segment;  // tasks per segment
  int64_t count;
  int64_t width;  // sums per task: D if by_channel, otherwise 1
};

inline Tasks tasks_of(const PromptGateParams& p) {
  if (p.batch * p.length * p.dim == 0) return {};
  const Segments segments = segments_of(p);
  const int64_t wanted = p.dim >= kTaskElements ? 1 : kTaskElements / p.dim;
  const int64_t rows = segments.rows < wanted ? segments.rows : wanted;
  const int64_t per_segment = (segments.rows + rows - 1) / rows;
  return {rows, per_segment, per_segment * segments.count, p.by_channel ? p.dim : 1};
}

inline bool reduces(const PromptGateParams& p) {
  return p.grad_bias != nullptr || (p.grad_logit.data != nullptr && !(p.by_sample && p.by_row));
}

void prompt_gate_fwd_cpu(const PromptGateParams& params, int64_t task_begin, int64_t task_end);
// partials: [tasks, width] sums, float32 (float64 if h is); nullptr unless reduces(params)
void prompt_gate_bwd_cpu(const PromptGateParams& params, int64_t task_begin, int64_t task_end,
                         void* partials);
void prompt_gate_finish_cpu(const PromptGateParams& params, const void* partials);
const char* cpu_instructions();  // the instruction set that the kernels use on this processor

// ---- CUDA ----
//
// Launch shapes and index maps are plain functions, which run (and are tested) on any machine. A
// launch with sums has few blocks, which loop, because each block costs a barrier and a ticket. The
// number of blocks depends only on the tensors, so a sum has the same bits on every GPU.

constexpr int kForwardThreads = 128;  // per block, for Mapping::kPacks in forward
constexpr int64_t kMaxGridX = 1 << 20;
constexpr int64_t kMaxGridYZ = 65535;

// How the elements are distributed over threads and warps.
enum class Mapping : int32_t {
  kPacks,    // one gate per sample, or one for all: threads take packs of a sample in memory order;
             // if the P rows are one contiguous run, packs may cross from one row to the next
  kRows,     // one gate per row, or (forward) per prompt: a warp takes a whole row
  kPrompts,  // one gate per prompt, backward: a warp takes one prompt in sample after sample
  kStrips,   // gates that vary by channel: a warp takes 32 packs (a "strip") of row after row
};

inline Mapping mapping_of(const PromptGateParams& p, bool backward) {
  if (p.by_channel) return Mapping::kStrips;
  if (p.weight.data != nullptr) return Mapping::kRows;
  if (!p.by_row) return Mapping::kPacks;
  return backward && !p.by_sample ? Mapping::kPrompts : Mapping::kRows;
}

struct LaunchPlan {
  Mapping mapping;
  int threads;  // per block
  // blocks along the packs of a sample (kPacks), samples (kPrompts), rows (kRows, kStrips)
  int64_t grid_x;
  // blocks along samples (kPacks), groups of kWarps prompts (kPrompts), segments (kStrips)
  int64_t grid_y;
  int64_t grid_z;  // blocks along strips
  int vector;      // elements in a pack: 16 or 4 bytes of the narrower of h and x, or one element
  int64_t rows;    // P; 1 if rows_are_one_run (then "row" means all prompt rows of a sample)
  int64_t packs_per_row;
};

// Bytes per element of the narrower of h and x. The dtype of x counts even if its data is nullptr,
// because the kernels are instantiated for both dtypes.
inline int64_t narrowest_item(const PromptGateParams& p) {
  const int64_t h = item_size(p.h.dtype), x = item_size(p.x.dtype);
  return h < x ? h : x;
}

// True if every tensor can be read and written in packs of `vector` elements: a run is a whole
// number of packs, channels are contiguous, and addresses and the strides between packs are
// multiples of the pack's bytes (of 16 for a larger pack).
inline bool packs_fit(const PromptGateParams& p, int64_t run, int vector) {
  if (run % vector != 0) return false;
  const bool logit_in_packs = p.by_channel && segments_of(p).streamed;
  for (const Rows* rows :
       {&p.h, &p.x, &p.saved, &p.carrier, &p.gathered, &p.weight, &p.logit, &p.grad_logit}) {
    if (rows->data == nullptr || vector == 1) continue;
    if ((rows == &p.logit || rows == &p.grad_logit) && !logit_in_packs) continue;
    const int64_t bytes = vector * item_size(rows->dtype);
    const int64_t step = (bytes < 16 ? bytes : 16) / item_size(rows->dtype);  // in elements
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
  LaunchPlan plan{};
  plan.mapping = mapping_of(p, backward);
  plan.threads = plan.mapping == Mapping::kPacks && !backward ? kForwardThreads : kThreads;
  const bool one_run = rows_are_one_run(p);
  const int64_t narrowest = narrowest_item(p);
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
  plan.grid_y = plan.grid_z = 1;
  if (p.batch * p.length * p.dim == 0) return plan;  // grid_x = 0: nothing to launch
  const Segments segments = segments_of(p);
  switch (plan.mapping) {
    case Mapping::kPacks: {
      const int64_t packs = plan.rows * plan.packs_per_row, blocks = ceil_div(packs, kThreads);
      if (!backward) {
        plan.grid_x = smaller(ceil_div(packs, kForwardThreads * kPacksInFlight), kMaxGridX);
        plan.grid_y = smaller(p.batch, kMaxGridYZ);
      } else if (p.by_sample) {  // one sum per sample
        const int64_t wanted = blocks > 32 ? kManyBlocks : kFewBlocks;
        plan.grid_x = smaller(blocks, at_least_one(wanted / p.batch));
        plan.grid_y = smaller(p.batch, kMaxGridYZ);
      } else {
        const int64_t wanted = p.batch * blocks > 32 * kSomeBlocks ? kManyBlocks : kSomeBlocks;
        plan.grid_x = smaller(blocks, wanted);
        plan.grid_y = ceil_div(p.batch, ceil_div(p.batch * plan.grid_x, wanted));
      }
      break;
    }
    case Mapping::kRows: {
      const bool loops = backward || p.weight.data != nullptr;
      plan.grid_x = smaller(ceil_div(p.batch * p.length, kWarps), loops ? kManyBlocks : kMaxGridX);
      break;
    }
    case Mapping::kPrompts: {
      const int64_t groups = ceil_div(p.length, kWarps);
      plan.grid_x = smaller(p.batch, at_least_one(kFewBlocks / groups));
      plan.grid_y = smaller(groups, kMaxGridYZ);
      break;
    }
    case Mapping::kStrips: {
      const int64_t strips = ceil_div(plan.packs_per_row, 32);
      const int64_t wanted = segments.streamed && !backward ? kManyBlocks : kFewBlocks;
      plan.grid_x = smaller(ceil_div(segments.rows, kWarps),
                            at_least_one(wanted / (segments.count * strips)));
      plan.grid_y = smaller(segments.count, kMaxGridYZ);
      plan.grid_z = smaller(strips, kMaxGridYZ);
      break;
    }
  }
  return plan;
}

// Offset of pack `index` of a sample, in elements from the first prompt row of that sample.
GP_HD int64_t pack_offset(const LaunchPlan& plan, const Rows& rows, int64_t index) {
  if (plan.rows == 1) return index * plan.vector * rows.channel_stride;
  const Division pack = divide(index, plan.packs_per_row);
  const int64_t column = pack.remainder * plan.vector;
  return pack.quotient * rows.row_stride + column * rows.channel_stride;
}

// Bytes of the workspace (see launch.h) that backward needs; 0 if no sum is over several blocks.
inline size_t workspace_bytes(const PromptGateParams& p) {
  const LaunchPlan plan = plan_launch(p, /*backward=*/true);
  const bool is_one_sum = plan.mapping == Mapping::kPacks && !p.by_sample;
  if (!reduces(p) || plan.grid_x * (is_one_sum ? plan.grid_y : 1) <= 1) return 0;
  const int64_t sums = plan.mapping == Mapping::kStrips    ? 32 * plan.vector  // per block
                       : plan.mapping == Mapping::kPrompts ? kWarps
                                                           : 1;
  const bool is_float = plan.mapping == Mapping::kStrips && p.h.dtype != DType::kFloat64;
  const int64_t blocks = plan.grid_x * plan.grid_y * plan.grid_z;
  return kTicketBytes + static_cast<size_t>(blocks * sums * (is_float ? 4 : 8));
}

// All return a cudaError_t as int (0: success). stream is a cudaStream_t.
int launch_prompt_gate_fwd(const PromptGateParams& params, void* stream);
int launch_prompt_gate_bwd(const PromptGateParams& params, void* workspace, void* stream);
int capture_of(void* stream, unsigned long long* id);  // *id = 0: no capture
int synchronize(void* stream);

}  // namespace gated_prompt
