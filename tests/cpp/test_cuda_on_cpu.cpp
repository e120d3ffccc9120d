// SPDX-License-Identifier: Apache-2.0
// Compares the CUDA kernels, which cuda_on_cpu/ runs on the CPU, with the CPU kernels. Tensors must
// have the same bits, sums must agree up to rounding, and no order of threads and blocks may change
// a bit. Usage: test_cuda_on_cpu LAW; exit status 0 if the law is true. To add a case, add a row to
// a table: kTypes, kCases, kLargeCases.
#include <cuda_runtime.h>

#include "cases.h"
#include "divide_rows.h"
#include "reduce.cuh"
#include "scaled_dot_cases.h"
#include "vec.cuh"

namespace {

// More than the blocks or threads of a launch handle in one pass, so that they loop.
constexpr struct {
  Case c;
  Kind kind;
} kLargeCases[] = {
    {{{2 * kSomeBlocks + 5, 2, 3}, sequence, compact}, kKinds[0]},  // samples
    {{{kManyBlocks + 5, 2, 3}, sequence, compact}, kKinds[1]},
    {{{1, 3, 500 * 1024}, odd, compact}, kKinds[0]},  // packs
    {{{1, 3, 500 * 1024}, odd, compact}, kKinds[3]},
    {{{kFewBlocks + 5, 2, 40}, sequence, compact}, kKinds[7]},  // segments
    {{{66000, 1, 2}, compact, compact}, kKinds[6]},             // one block for each sample
    // several packs per thread, or rows per warp: the next is loaded before the current one is used
    {{{600, 2, 40}, sequence, compact}, kKinds[0]},
    {{{70, 9, 800}, sequence, compact}, kKinds[1]},
    {{{kFewBlocks + 40, 3, 40}, sequence, compact}, kKinds[2]},
    {{{300, 9, 33}, sequence, compact}, kKinds[3]},
    {{{1000, 9, 40}, sequence, compact}, kKinds[4]},
};
std::vector<unsigned> seeds = {0, 1, 2, 3};  // each gives an order of threads and blocks

// Compares bit for bit, including the bytes between and around the elements. For sums, elements may
// differ by up to `tolerance`.
void check_same(const Tensor& got, const Tensor& wanted, const char* name, double tolerance = 0) {
  const auto size = static_cast<size_t>(item_size(got.dtype));
  for (size_t i = 0; i < got.bytes.size(); i += size) {
    const double a = load(&got.bytes[i], got.dtype), b = load(&wanted.bytes[i], got.dtype);
    CHECK(std::memcmp(&got.bytes[i], &wanted.bytes[i], size) == 0 || std::fabs(a - b) <= tolerance,
          "%s, element %d: %g, not %g", name, int(i / size) - int(kGuard + got.layout.offset), a,
          b);
  }
}

// ---- forward ----

void check_forward(const Call& start) {
  Call wanted = start;
  run_fwd_cpu(wanted.params(/*backward=*/false));
  // a linear gate's logit is a dot product in another order: it differs by some float roundings
  const DType compute = start.types.out == kF64 ? kF64 : kF32;
  const double dot = start.linear ? 400 * epsilon(compute) : 0;
  for (const unsigned seed : seeds) {
    cuda_on_cpu::seed = seed;
    Call got = start;
    CHECK(launch_prompt_gate_fwd(got.params(/*backward=*/false), nullptr) == 0, "launch");
    check_same(got.out, wanted.out, "out", start.linear ? dot + 4 * epsilon(start.types.out) : 0);
    check_same(got.in, wanted.in, "in");
    check_same(got.saved, wanted.saved, "saved");
    check_same(got.gathered, wanted.gathered, "gathered");
    check_same(got.logit, wanted.logit, "logit", dot == 0 ? 0 : dot + 64 * epsilon(start.c.gate));
  }
}

// ---- backward ----

// The kernels' workspace as earlier launches leave it: tickets are 0, partial sums are garbage.
struct Workspace {
  std::vector<double> data = std::vector<double>(kMaxWorkspaceBytes / 8 + 64, double(NAN));
  Workspace() {
    std::memset(data.data(), 0, kTicketBytes);
  }
  void check_ready(size_t bytes) const {
    for (size_t i = 0; i < kTicketBytes / 8; ++i) {
      CHECK(data[i] == 0, "a ticket does not return to 0");
    }
    for (size_t i = (bytes < kTicketBytes ? kTicketBytes : bytes) / 8 + 1; i < data.size(); ++i) {
      CHECK(std::isnan(data[i]), "a partial sum beyond the workspace");
    }
  }
};

// An upper bound for any sum of |saved * T|: the largest sum over all rows of one channel, times D
// unless the gate varies by channel.
double magnitude(const Call& call) {
  double largest = 0;
  for (int64_t d = 0; d < call.c.shape.dim; ++d) {
    double sum = 0;
    for_each_element({call.c.shape.batch, call.c.shape.length, 1},
                     [&](int64_t b, int64_t r, int64_t) {
                       const double c = call.carries ? call.carrier.at(b, r, d) : 0;
                       sum += std::fabs(call.saved.at(b, r, d) * (call.out.at(b, r, d) + c));
                     });
    largest = sum > largest ? sum : largest;
  }
  return call.kind.by_channel ? largest : largest * static_cast<double>(call.c.shape.dim);
}

void check_backward(const Call& start) {
  Call wanted = start;
  run_bwd_cpu(wanted.params(/*backward=*/true));
  const bool elementwise = start.is_streamed() && start.kind.by_channel;
  const DType compute = start.types.out == kF64 ? kF64 : kF32;
  const double bound = 2 * epsilon(compute) * magnitude(start);
  // a small difference may round the sum the other way in its own dtype
  const double rounding = epsilon(start.c.gate) * magnitude(start);
  Workspace workspace;
  Tensor first_logit = start.grad_logit, first_bias = start.grad_bias;
  for (const unsigned seed : seeds) {
    cuda_on_cpu::seed = seed;
    Call got = start;
    const PromptGateParams p = got.params(/*backward=*/true);
    CHECK(launch_prompt_gate_bwd(p, workspace.data.data(), nullptr) == 0, "launch");
    check_same(got.out, wanted.out, "out");
    check_same(got.in, wanted.in, "in");
    check_same(got.saved, start.saved, "saved");
    check_same(got.carrier, start.carrier, "carrier");
    workspace.check_ready(workspace_bytes(p));
    check_same(got.grad_logit, wanted.grad_logit, "grad_logit", elementwise ? 0 : bound + rounding);
    check_same(got.grad_bias, wanted.grad_bias, "grad_bias", bound);
    if (seed == seeds[0]) first_logit = got.grad_logit, first_bias = got.grad_bias;
    check_same(got.grad_logit, first_logit, "grad_logit in another order");
    check_same(got.grad_bias, first_bias, "grad_bias in another order");
  }
}

// ---- scaled_dot ----

void check_dot(const DotCall& start) {
  double wanted = 0, terms = 0;
  start.oracle(&wanted, &terms);
  Workspace workspace;
  Tensor first = start.result;
  for (const unsigned seed : seeds) {
    cuda_on_cpu::seed = seed;
    DotCall got = start, cpu = start;
    const ScaledDotParams p = coalesce(got.params());
    CHECK(launch_scaled_dot(p, workspace.data.data(), nullptr) == 0, "launch");
    workspace.check_ready(workspace_bytes(plan_scaled_dot(p)));
    CHECK(got.a.bytes == start.a.bytes && got.b.bytes == start.b.bytes, "inputs");
    run_dot_cpu(cpu.params());
    check_same(got.result, cpu.result, "result", 2 * start.bound(wanted, terms));
    if (seed == seeds[0]) first = got.result;
    check_same(got.result, first, "result in another order");
  }
}

void test_scaled_dot() {
  for_each_dot(check_dot);
  seeds = {0, 1};
  // more packs than the largest grid handles in one pass: threads loop
  check_dot(DotCall({{8, 600, 32, 14}, packed, heads_first}, {kF32, kBF16}, kF32));
  check_dot(DotCall({{5, 300, 32, 45}, dense, gaps}, {kBF16, kBF16}, kF64));
}

// ---- divide_rows ----

struct DivideCase {
  int64_t rows, columns, divided;  // divided: how many of the rows, from the first on
  int64_t offset;                  // elements from an aligned address
};
constexpr DivideCase kDivideCases[] = {
    {0, 4, 0, 0},     {1, 1, 1, 0},     {6, 8, 2, 0},      {6, 8, 2, 1},
    {6, 8, 6, 0},     {6, 7, 3, 0},     {24, 16, 8, 0},    {24, 16, 0, 0},
    {300, 4, 100, 2}, {192, 64, 64, 0}, {768, 33, 256, 0},
};

// One row, for a weight, a bias or a temperature, `offset` elements after an aligned address.
Tensor flat(int64_t size, int64_t offset, DType dtype, unsigned seed) {
  return Tensor({1, 1, size}, {0, 0, 1, offset}, dtype, seed);
}

void check_divide(const DivideCase& c, DType from, DType to, DType temperature_dtype) {
  context = "divide_rows " + std::to_string(c.rows) + " x " + std::to_string(c.columns) + " from " +
            std::to_string(int(from)) + " to " + std::to_string(int(to));
  const int64_t size = c.rows * c.columns;
  struct Call {
    Tensor weight, bias, temperature, new_weight, new_bias, clamped;
  };
  const Call start{flat(size, c.offset, from, 1),    flat(c.rows, c.offset, from, 2),
                   flat(1, 0, temperature_dtype, 3), flat(size, c.offset, to, 4),
                   flat(c.rows, c.offset, to, 5),    flat(1, 0, temperature_dtype, 6)};
  const auto params = [&](Call& call) {
    DivideParams p{};
    p.weight = {call.weight.rows().data, call.new_weight.rows().data, size, c.divided * c.columns};
    p.bias = {call.bias.rows().data, call.new_bias.rows().data, c.rows, c.divided};
    p.from = from, p.to = to, p.temperature_dtype = temperature_dtype;
    p.temperature = call.temperature.rows().data, p.clamped = call.clamped.rows().data;
    p.low = 0.01, p.high = 10;
    return p;
  };
  Call wanted = start;
  const DivideParams p = params(wanted);
  clamp_cpu(p);
  for (int64_t begin = 0; begin < size + c.rows; begin += 37) {
    divide_rows_cpu(p, begin, smaller(begin + 37, size + c.rows));
  }
  const double t = wanted.clamped.at(0, 0, 0);
  for (int64_t i = 0; i < size; ++i) {
    const double exact = start.weight.at(0, 0, i) / (i < c.divided * c.columns ? t : 1);
    // half an ulp; a 16-bit type adds half an ulp of float32, to which it is rounded first
    const double ulp = epsilon(to) + (item_size(to) == 2 ? epsilon(kF32) : 0);
    const double bound = ulp / 2 * std::fabs(exact) + (to == kF16 ? 0x1.01p-25 : 0);
    CHECK(std::fabs(wanted.new_weight.at(0, 0, i) - exact) <= bound, "element %d: %g, not %g",
          int(i), wanted.new_weight.at(0, 0, i), exact);
  }
  for (const unsigned seed : seeds) {
    cuda_on_cpu::seed = seed;
    Call got = start;
    CHECK(launch_divide_rows(params(got), nullptr) == 0, "launch");
    check_same(got.weight, start.weight, "weight");
    check_same(got.new_weight, wanted.new_weight, "new weight");
    check_same(got.new_bias, wanted.new_bias, "new bias");
    check_same(got.clamped, wanted.clamped, "clamped");
  }
}

void test_divide_rows() {
  constexpr DType kTemperatures[] = {kF32, kF64, kBF16, kF16};
  size_t turn = 0;
  for (const DivideCase& c : kDivideCases) {
    for (const DType type : kTemperatures) check_divide(c, type, type, kTemperatures[turn++ % 4]);
    for (const DType to : {kBF16, kF16}) check_divide(c, kF32, to, kTemperatures[turn++ % 4]);
  }
}

// ---- laws over the tables ----

void test_forward() {
  for_each_forward(check_forward);
}

void test_backward() {
  for_each_backward(check_backward);
}

// Scalar gates with every pair of dtypes.
void test_scalar() {
  for (const Case& c : kCases) {
    for (const Types types : kTypes) {
      check_forward(Call(c, types, kKinds[0], true, /*backward=*/false));
      check_backward(Call(c, types, kKinds[0], true, /*backward=*/true));
    }
  }
}

void test_many_blocks() {
  seeds = {0, 1};  // these launches are large
  for (const auto& [c, kind] : kLargeCases) {
    check_forward(Call(c, {kBF16, kF32}, kind, true, /*backward=*/false));
    Call call(c, {kBF16, kF32}, kind, true, /*backward=*/true);
    call.biased = call.is_streamed();
    check_backward(call);
  }
}

// ---- parts of the kernels, and of cuda_on_cpu ----

template <class Kernel, class... Args>
void run(unsigned blocks, Kernel kernel, Args... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks), config.blockDim = dim3(kThreads);
  cudaLaunchKernelEx(&config, kernel, args...);
  CHECK(cudaGetLastError() == cudaSuccess, "launch");
}

// Two sums in a row: the second must not disturb the first.
__global__ void two_sums(double* sums) {
  const double thread = threadIdx.x;
  const double first = block_sum(thread), second = block_sum(2 * thread);
  if (threadIdx.x == 0) sums[0] = first, sums[1] = second;
}

void test_sums() {
  for (const unsigned seed : seeds) {
    cuda_on_cpu::seed = seed;
    double sums[2] = {};
    run(1, two_sums, sums);
    CHECK(sums[0] == kThreads * (kThreads - 1) / 2, "%g", sums[0]);
    CHECK(sums[1] == kThreads * (kThreads - 1), "%g", sums[1]);
  }
}

__global__ void collectives(unsigned* visits, unsigned* ticket, bool* right) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const unsigned all = 0xffffffffu;
  ++visits[blockIdx.x * blockDim.x + threadIdx.x];
  bool ok = __shfl_down_sync(all, float(thread), 3) == float(lane + 3 < 32 ? thread + 3 : thread);
  ok = ok && __shfl_xor_sync(all, double(thread), 5) == double(thread ^ 5);
  __syncwarp();
  ok = ok && __shfl_sync(all, thread, 7) == thread - lane + 7;
  if (!ok) *right = false;
  atomicInc(ticket, gridDim.x * blockDim.x - 1);
}

template <bool kBarrier>
__global__ void reverse(int* data) {
  __shared__ int copy[kThreads];
  copy[threadIdx.x] = data[threadIdx.x];
  if (kBarrier) __syncthreads();
  data[threadIdx.x] = copy[kThreads - 1 - threadIdx.x];
}

template <bool kBarrier>
bool reverses() {
  std::vector<int> data(kThreads);
  for (int i = 0; i < kThreads; ++i) data[static_cast<size_t>(i)] = i + 1;
  run(1, reverse<kBarrier>, data.data());
  for (int i = 0; i < kThreads; ++i) {
    if (data[static_cast<size_t>(i)] != kThreads - i) return false;
  }
  return true;
}

void test_machine() {
  for (const unsigned seed : seeds) {
    cuda_on_cpu::seed = seed;
    std::vector<unsigned> visits(3 * kThreads);
    unsigned ticket = 0;
    bool right = true;
    run(3, collectives, visits.data(), &ticket, &right);
    for (const unsigned count : visits) CHECK(count == 1, "a thread runs %u times", count);
    CHECK(right && ticket == 0, "collectives");
    CHECK(!reverses<false>(), "a missing barrier passes");
    CHECK(reverses<true>(), "barrier");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1, 65536), config.blockDim = dim3(kThreads);
  cudaLaunchKernelEx(&config, reverse<true>, nullptr);
  CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration, "a grid too high");
  CHECK(cudaGetLastError() == cudaSuccess, "an error is reported once");
}

__global__ void diverge() {
  if (threadIdx.x != 40) __syncthreads();
}

void test_divergence() {
  run(1, diverge);
}

}  // namespace

int main(int argc, char** argv) {
  return run_law(argc, argv,
                 {
                     {"machine", test_machine},
                     {"divergence", test_divergence},  // must fail, with a message
                     {"sums", test_sums},
                     {"forward", test_forward},
                     {"backward", test_backward},
                     {"scalar", test_scalar},
                     {"many_blocks", test_many_blocks},
                     {"scaled_dot", test_scaled_dot},
                     {"divide_rows", test_divide_rows},
                 });
}
