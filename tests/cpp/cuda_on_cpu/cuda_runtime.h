// SPDX-License-Identifier: Apache-2.0
// The part of CUDA that the kernels use, on one CPU thread, so that tests run every line of device
// code without a GPU. If this folder comes before the real headers on the include path, any C++17
// compiler with __builtin_LINE (GCC, clang) compiles a .cu that launches by cudaLaunchKernelEx.
//
// Blocks run one after the other. The threads of a block are fibers: each runs until it reaches a
// barrier or a warp collective. A bug such as a missing barrier therefore shows only in some orders
// of the threads, and `seed` chooses the order. The rules are stricter than on a GPU: all threads
// of a block must reach each __syncthreads, and all lanes of a warp each warp collective, in the
// same source line; anything else is reported and ends the program. Shared memory contains garbage
// when a block starts.
//
// Bugs that need threads which really run in parallel are not found: a missing fence, a race
// between blocks.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local  // one block runs at a time; thread_local: in one segment

// ---- types ----

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct CUstream_st*;

// ---- the machine ----

namespace cuda_on_cpu {

// 0: blocks, warps and lanes run in ascending order. Otherwise the order is random; it is drawn at
// each launch, and again after each barrier.
inline unsigned seed = 0;

constexpr unsigned kWarp = 32;

// A source line at which threads wait for each other.
struct Site {
  const char* call;
  bool whole_block;
  const char* file;
  int line;

  // used as a default argument, this gives the line of the call
  static Site of(const char* call, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE()) {
    return {call, false, file, line};
  }
  static Site of_block(const char* call, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
    return {call, true, file, line};
  }
};

void wait(const Site& site);

// Returns the 8 bytes that `lane` passes to the same call.
uint64_t exchange(unsigned mask, uint64_t value, unsigned lane, const Site& site);

template <class T>
T shuffle(unsigned mask, T value, unsigned lane, const Site& site) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move up to 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  word = exchange(mask, word, lane, site);
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

unsigned this_lane();
cudaError_t launch(dim3 grid, dim3 block, const std::function<void()>& thread);

}  // namespace cuda_on_cpu

// ---- device functions ----

inline void __syncthreads(cuda_on_cpu::Site site = cuda_on_cpu::Site::of_block("__syncthreads")) {
  cuda_on_cpu::wait(site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       cuda_on_cpu::Site site = cuda_on_cpu::Site::of("__syncwarp")) {
  cuda_on_cpu::exchange(mask, 0, 0, site);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane,
              cuda_on_cpu::Site site = cuda_on_cpu::Site::of("__shfl_sync")) {
  return cuda_on_cpu::shuffle(mask, value, static_cast<unsigned>(lane) % cuda_on_cpu::kWarp, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta,
                   cuda_on_cpu::Site site = cuda_on_cpu::Site::of("__shfl_down_sync")) {
  const unsigned own = cuda_on_cpu::this_lane(), lane = own + delta;
  return cuda_on_cpu::shuffle(mask, value, lane < cuda_on_cpu::kWarp ? lane : own, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits,
                  cuda_on_cpu::Site site = cuda_on_cpu::Site::of("__shfl_xor_sync")) {
  const unsigned lane = cuda_on_cpu::this_lane() ^ static_cast<unsigned>(bits);
  return cuda_on_cpu::shuffle(mask, value, lane, site);
}

inline void __threadfence() {}

inline unsigned atomicInc(unsigned* address, unsigned limit) {
  const unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  return old;
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address = old + value;
  return old;
}

template <class T>
T __ldg(const T* source) {
  return *source;
}
template <class T>
T __ldcg(const T* source) {
  return *source;
}
template <class T>
void __stwb(T* target, T value) {
  *target = value;
}

// ---- host functions ----

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;  // must be 0
  cudaStream_t stream;
};

namespace cuda_on_cpu {
inline cudaError_t last_error = cudaSuccess;
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  const cudaError_t error =
      config->dynamicSmemBytes != 0
          ? cudaErrorInvalidConfiguration
          : cuda_on_cpu::launch(config->gridDim, config->blockDim, [&] { kernel(args...); });
  if (error != cudaSuccess) cuda_on_cpu::last_error = error;
  return error;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_on_cpu::last_error;
  cuda_on_cpu::last_error = cudaSuccess;
  return error;
}

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                            unsigned long long*) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
