// SPDX-License-Identifier: Apache-2.0
// The scheduler behind cuda_runtime.h.
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 256 * 1024;  // uses memory only where it is touched

// Runs one CUDA thread after the other, forever. ucontext starts a fiber. From then on setjmp and
// longjmp switch to and from it, because swapcontext makes a system call each time and is ten times
// slower here. The address sanitizer knows only one stack; it warns once and continues.
struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool started = false;
  jmp_buf resume_point;
  uint3 index;  // threadIdx
  Site stop;    // where it waits; call == nullptr: the CUDA thread has returned
};

std::deque<Fiber> fibers;  // one for each thread of a block, used again by later blocks
Fiber* running;
jmp_buf scheduler;
ucontext_t start_context;
const std::function<void()>* thread_body;
std::mt19937 random;

// Values that the lanes of the running warp exchange. There are two sets, because a lane may post
// its next value before other lanes have read the current one.
uint64_t posted[2][kWarp];
unsigned round_of_warp;

[[noreturn]] void fail(const char* format, ...) {
  std::printf("block (%u,%u,%u): ", blockIdx.x, blockIdx.y, blockIdx.z);
  va_list args;
  va_start(args, format);
  std::vprintf(format, args);
  va_end(args);
  std::printf("\n");
  std::fflush(stdout);
  std::_Exit(1);  // no destructors: this may run on a fiber's stack
}

// ---- fibers ----

void stop_at(const Site& site) {
  running->stop = site;
  if (_setjmp(running->resume_point) == 0) _longjmp(scheduler, 1);
}

void run_threads() {
  for (;;) {
    (*thread_body)();
    stop_at({nullptr, false, nullptr, 0});
  }
}

void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(scheduler) != 0) return;  // the fiber has stopped
  if (fiber.started) _longjmp(fiber.resume_point, 1);
  fiber.started = true;
  getcontext(&start_context);
  start_context.uc_stack.ss_sp = fiber.stack.get();
  start_context.uc_stack.ss_size = kStackBytes;
  start_context.uc_link = nullptr;
  makecontext(&start_context, run_threads, 0);
  setcontext(&start_context);
}

// ---- warps, blocks, grids ----

// 0 .. count-1, in the order in which to run them.
std::vector<unsigned> draw_order(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (seed != 0) std::shuffle(order.begin(), order.end(), random);
  return order;
}

std::string describe(unsigned thread) {
  const Site& site = fibers[thread].stop;
  const std::string name = "thread " + std::to_string(thread);
  if (site.call == nullptr) return name + " has returned";
  return name + " waits in " + site.file + ":" + std::to_string(site.line) + ", " + site.call;
}

void check_same_stop(unsigned thread, unsigned other) {
  const Site &a = fibers[thread].stop, &b = fibers[other].stop;
  if (a.call == b.call && a.file == b.file && a.line == b.line) return;
  fail("%s; %s", describe(thread).c_str(), describe(other).c_str());
}

// Overwrites shared memory, so that a block can't use what an earlier one left there. Shared memory
// is everything thread_local in the executable.
void spoil_shared_memory() {
  const auto spoil = [](dl_phdr_info* info, size_t, void*) {
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& segment = info->dlpi_phdr[i];
      if (segment.p_type == PT_TLS) std::memset(info->dlpi_tls_data, 0xff, segment.p_memsz);
    }
    return 1;  // stop after the executable, which comes first
  };
  dl_iterate_phdr(spoil, nullptr);
}

// Runs a warp until its lanes return or wait for the block.
void run_warp(unsigned first) {
  do {
    ++round_of_warp;
    for (const unsigned lane : draw_order(kWarp)) resume(fibers[first + lane]);
    for (unsigned lane = 1; lane < kWarp; ++lane) check_same_stop(first, first + lane);
  } while (fibers[first].stop.call != nullptr && !fibers[first].stop.whole_block);
}

void run_block(unsigned threads) {
  spoil_shared_memory();
  do {
    for (const unsigned warp : draw_order(threads / kWarp)) run_warp(warp * kWarp);
    for (unsigned i = kWarp; i < threads; i += kWarp) check_same_stop(0, i);
  } while (fibers[0].stop.call != nullptr);
}

}  // namespace

unsigned this_lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarp;
}

void wait(const Site& site) {
  stop_at(site);
}

uint64_t exchange(unsigned mask, uint64_t value, unsigned lane, const Site& site) {
  if (mask != 0xffffffffu)
    fail("%s:%d, %s: the mask leaves lanes out", site.file, site.line, site.call);
  if (lane >= kWarp) fail("%s:%d, %s: there is no lane %u", site.file, site.line, site.call, lane);
  const unsigned round = round_of_warp % 2;
  posted[round][this_lane()] = value;
  stop_at(site);
  return posted[round][lane];
}

cudaError_t launch(dim3 grid, dim3 block, const std::function<void()>& thread) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
      threads > 1024 || block.z > 64 || threads % kWarp != 0) {
    return cudaErrorInvalidConfiguration;  // partial warps: not an error in CUDA, but here
  }
  gridDim = grid, blockDim = block, thread_body = &thread;
  random.seed(seed);
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  }
  for (const unsigned i : draw_order(static_cast<unsigned>(blocks))) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    run_block(static_cast<unsigned>(threads));
  }
  return cudaSuccess;
}

}  // namespace cuda_on_cpu
