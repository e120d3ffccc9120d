// SPDX-License-Identifier: Apache-2.0
// CPU kernels: plain loops over one row, which the compiler vectorises for the instruction sets
// below.
#include "prompt_gate.h"
#include "prompt_gate_math.h"

#include <algorithm>
#include <type_traits>

// One build serves every x86-64: the loader picks the widest version that the processor has.
#if defined(__x86_64__) && defined(__GNUC__) && defined(__ELF__)
#define GP_HAS_CLONES 1
#define GP_TARGET_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define GP_HAS_CLONES 0
#define GP_TARGET_CLONES
#endif

namespace gated_prompt {
namespace {

// ---- kernels over one row of n elements ----
// Strides are in elements. kUnit: all are 1, known at compile time, so that the loop vectorises.
// h and x may be the same row: each element is read before it is written, so no iteration depends
// on another, which is what ivdep says.

template <bool kUnit>
inline int64_t at(int64_t i, int64_t stride) {
  return kUnit ? i : i * stride;
}

// h <- g*h + w*x                                              h [n], x [n]
template <class H, class X, bool kUnit>
GP_TARGET_CLONES void update_row(H* h, int64_t h_stride, const X* x, int64_t x_stride, int64_t n,
                                 compute_t<H> g, compute_t<H> w) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    H& out = h[at<kUnit>(i, h_stride)];
    out = narrow<H>(update<compute_t<H>>(g, widen(out), w, widen(x[at<kUnit>(i, x_stride)])));
  }
}

// saved <- (h - x)/2 or h/2                                      h [n], x [n], saved [n] contiguous
template <class H, class X, bool kUnit>
GP_TARGET_CLONES void save_row(const H* h, int64_t h_stride, const X* x, int64_t x_stride,
                               int64_t n, bool mix, H* saved) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const compute_t<H> h_i = widen(h[at<kUnit>(i, h_stride)]);
    const compute_t<H> x_i = widen(x[at<kUnit>(i, x_stride)]);
    saved[i] = narrow<H>(half_derivative(mix, h_i, x_i));
  }
}

// y <- a*t                                                    t [n], y [n]
template <class T, class Y, bool kUnit>
GP_TARGET_CLONES void scale_row(const T* t, int64_t t_stride, Y* y, int64_t y_stride, int64_t n,
                                compute_t<T> a) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    y[at<kUnit>(i, y_stride)] =
        narrow<Y>(static_cast<compute_t<Y>>(a * widen(t[at<kUnit>(i, t_stride)])));
  }
}

// sum s*t in kLanes interleaved sums, which are the same lanes whatever the instruction set
template <class T, bool kUnit>  // s [n] contiguous, t [n]
GP_TARGET_CLONES double dot_row(const T* s, const T* t, int64_t t_stride, int64_t n) {
  constexpr int64_t kLanes = 32;
  compute_t<T> lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) {
      lanes[k] += widen(s[i + k]) * widen(t[at<kUnit>(i + k, t_stride)]);
    }
  }
  for (int64_t k = 0; i + k < n; ++k) {
    lanes[k] += widen(s[i + k]) * widen(t[at<kUnit>(i + k, t_stride)]);
  }
  double sum = 0;
  for (int64_t k = 0; k < kLanes; ++k) sum += static_cast<double>(lanes[k]);
  return sum;
}

// ---- over the rows of some chunks ----

template <class F>
auto visit(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64: return f(double{});
    case DType::kFloat32: return f(float{});
    case DType::kBFloat16: return f(BFloat16{});
    default: return f(Half{});
  }
}

template <class A>
Gate<A> read_gate(const PromptGateParams& p) {
  const double logit = visit(p.gate_dtype, [&](auto type) {
    return static_cast<double>(widen(*static_cast<const decltype(type)*>(p.gate_logit)));
  });
  return make_gate(static_cast<A>(logit));
}

template <class T>
T* row_of(const Rows& rows, int64_t b, int64_t r) {
  return static_cast<T*>(rows.data) + b * rows.batch_stride + r * rows.row_stride;
}

template <class H, class X, bool kUnit>
void forward(const PromptGateParams& p, int64_t row_begin, int64_t row_end) {
  using A = compute_t<H>;
  const Gate<A> gate = read_gate<A>(p);
  const A w = input_weight(gate, p.mix);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t b = row / p.length, r = row % p.length;
    H* h = row_of<H>(p.out, b, r);
    const X* x = row_of<const X>(p.in, b, r);
    if (p.saved.data != nullptr) {
      save_row<H, X, kUnit>(h, p.out.channel_stride, x, p.in.channel_stride, p.dim, p.mix,
                            row_of<H>(p.saved, b, r));
    }
    update_row<H, X, kUnit>(h, p.out.channel_stride, x, p.in.channel_stride, p.dim, gate.value, w);
  }
}

template <class H, class X, bool kUnit>
double backward(const PromptGateParams& p, int64_t row_begin, int64_t row_end) {
  using A = compute_t<H>;
  const Gate<A> gate = read_gate<A>(p);
  const A w = input_weight(gate, p.mix);
  double sum = 0;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t b = row / p.length, r = row % p.length;
    H* grad = row_of<H>(p.out, b, r);
    const int64_t stride = p.out.channel_stride;
    if (p.grad_logit != nullptr) {
      sum += dot_row<H, kUnit>(row_of<const H>(p.saved, b, r), grad, stride, p.dim);
    }
    if (p.in.data != nullptr) {
      scale_row<H, X, kUnit>(grad, stride, row_of<X>(p.in, b, r), p.in.channel_stride, p.dim, w);
    }
    if (p.rescale) scale_row<H, H, kUnit>(grad, stride, grad, stride, p.dim, gate.value);
  }
  return sum;
}

// Calls f(H{}, X{}, unit strides?) for the dtypes of out and in. Mixed pairs are float32 beside a
// 16-bit type; the bindings admit no other.
template <class F>
auto visit_types(const PromptGateParams& p, F&& f) {
  const bool unit = p.out.channel_stride == 1 && (p.in.data == nullptr || p.in.channel_stride == 1);
  return visit(p.out.dtype, [&](auto h) {
    using H = decltype(h);
    auto call = [&](auto x) {
      return unit ? f(h, x, std::true_type{}) : f(h, x, std::false_type{});
    };
    if constexpr (sizeof(H) == 2) {
      return p.in.dtype == DType::kFloat32 ? call(float{}) : call(h);
    } else if constexpr (sizeof(H) == 4) {
      return p.in.dtype == DType::kBFloat16  ? call(BFloat16{})
             : p.in.dtype == DType::kFloat16 ? call(Half{})
                                             : call(h);
    } else {
      return call(h);
    }
  });
}

}  // namespace

void prompt_gate_fwd_cpu(const PromptGateParams& params, int64_t chunk_begin, int64_t chunk_end) {
  const int64_t step = rows_per_chunk(params), rows = params.batch * params.length;
  visit_types(params, [&](auto h, auto x, auto unit) {
    forward<decltype(h), decltype(x), unit.value>(params, chunk_begin * step,
                                                  std::min(chunk_end * step, rows));
  });
}

void prompt_gate_bwd_cpu(const PromptGateParams& params, int64_t chunk_begin, int64_t chunk_end,
                         double* partials) {
  const int64_t step = rows_per_chunk(params), rows = params.batch * params.length;
  visit_types(params, [&](auto h, auto x, auto unit) {
    for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
      const double sum = backward<decltype(h), decltype(x), unit.value>(
          params, chunk * step, std::min((chunk + 1) * step, rows));
      if (partials != nullptr) partials[chunk] = sum;
    }
  });
}

void prompt_gate_finish_cpu(const PromptGateParams& params, const double* partials) {
  double sum = 0;
  for (int64_t chunk = 0; chunk < num_chunks(params); ++chunk) sum += partials[chunk];
  const double grad = logit_gradient(read_gate<double>(params), sum);
  visit(params.gate_dtype, [&](auto type) {
    using G = decltype(type);
    *static_cast<G*>(params.grad_logit) = narrow<G>(static_cast<compute_t<G>>(grad));
  });
}

const char* cpu_instructions() {
#if GP_HAS_CLONES
  if (__builtin_cpu_supports("avx512f")) return "avx512f";
  if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
  return "baseline";
}

}  // namespace gated_prompt
