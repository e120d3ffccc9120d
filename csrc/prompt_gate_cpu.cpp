// SPDX-License-Identifier: Apache-2.0
// CPU kernels. Each row is widened into buffers of the compute type A (float or double), which stay
// in the nearest cache, unless it holds values of A already; plain loops work on it, which the
// compiler vectorises for the instruction sets of vec_cpu.h. Memory is read and written once.
#include "prompt_gate.h"
#include "prompt_gate_math.h"
#include "vec_cpu.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace gated_prompt {
namespace {

// ---- loops over n elements, beside those of vec_cpu.h ----

// Results go to target [n] as they are made, rounded. A target may be a source, at the same
// elements: no element depends on another, which is what ivdep says.
#define GP_LOOP _Pragma("GCC ivdep") _Pragma("GCC unroll 4")

template <class T, class A, bool kUnit>  // source [n] -> target [n]
GP_TARGET_CLONES void store(const A* source, int64_t n, T* target, int64_t stride) {
  GP_LOOP for (int64_t i = 0; i < n; ++i) {
    target[at<kUnit>(i, stride)] = narrow<T>(static_cast<compute_t<T>>(source[i]));
  }
}

// A gate G is one value for all elements, A, or one for each, const A*.
template <class A>
inline A element(A value, int64_t) {
  return value;
}
template <class A>
inline A element(const A* values, int64_t i) {
  return values[i];
}

template <class T, class A, bool kUnit, class G>  // g*h + w*x
GP_TARGET_CLONES void store_update(const A* h, const A* x, G g, G w, int64_t n, T* target,
                                   int64_t stride) {
  GP_LOOP for (int64_t i = 0; i < n; ++i) {
    target[at<kUnit>(i, stride)] =
        narrow<T>(static_cast<compute_t<T>>(update(element(g, i), h[i], element(w, i), x[i])));
  }
}

template <class T, class A, bool kUnit, class G>  // that, and saved [n] <- (h - x)/2 or h
GP_TARGET_CLONES void store_both(const A* h, const A* x, G g, G w, bool mix, int64_t n, T* target,
                                 int64_t stride, T* saved) {
  GP_LOOP for (int64_t i = 0; i < n; ++i) {
    const A old = h[i];  // where the target may be
    const A into = x[i];
    saved[i] = narrow<T>(static_cast<compute_t<T>>(saved_derivative(mix, old, into)));
    target[at<kUnit>(i, stride)] =
        narrow<T>(static_cast<compute_t<T>>(update(element(g, i), old, element(w, i), into)));
  }
}

template <class T, class A, bool kUnit, class G>  // g*t
GP_TARGET_CLONES void store_product(G g, const A* t, int64_t n, T* target, int64_t stride) {
  GP_LOOP for (int64_t i = 0; i < n; ++i) {
    target[at<kUnit>(i, stride)] = narrow<T>(static_cast<compute_t<T>>(element(g, i) * t[i]));
  }
}

// From logits [n] (w may be the same array): g [n], w [n], slope [n].
template <class A>
GP_TARGET_CLONES void gates(const A* logits, int64_t n, bool mix, A* g, A* w, A* slope) {
  GP_LOOP for (int64_t i = 0; i < n; ++i) {
    const Gate<A> gate = make_gate(logits[i]);
    g[i] = gate.value;
    w[i] = gate.complement;
    slope[i] = gate.slope;
  }
  if (!mix) std::fill(w, w + n, A(1));  // chosen within the loop, it would not be vectorised
}

template <class A>  // sum <- a + b; may be one of them
GP_TARGET_CLONES void add_row(const A* a, const A* b, int64_t n, A* sum) {
  GP_LOOP for (int64_t i = 0; i < n; ++i) sum[i] = a[i] + b[i];
}

template <class A>  // grad <- gradient of the logit, from s*t
GP_TARGET_CLONES void logit_row(const A* slope, const A* s, const A* t, int64_t n, bool mix,
                                A* __restrict__ grad) {
  for (int64_t i = 0; i < n; ++i) grad[i] = logit_gradient(slope[i], s[i] * t[i], mix);
}

template <class A>  // sum <- sum + s*t
GP_TARGET_CLONES void multiply_add_row(const A* __restrict__ s, const A* __restrict__ t, int64_t n,
                                       A* __restrict__ sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += s[i] * t[i];
}

// ---- rows of any dtype and stride <-> buffers ----

// The values of a row: where they lie, or widened in `buffer`.
template <class A>
const A* load_row(const Rows& rows, RowIndex row, int64_t n, A* buffer) {
  return load_any(rows.data, rows.dtype, offset_of(rows, row), rows.channel_stride, n, buffer);
}

// Calls store(target, stride, unit stride?) with the row, in its dtype.
template <class F>
void with_target(const Rows& rows, RowIndex row, F&& store) {
  visit(rows.dtype, [&](auto type) {
    auto* target = static_cast<decltype(type)*>(rows.data) + offset_of(rows, row);
    rows.channel_stride == 1 ? store(target, 1, std::true_type{})
                             : store(target, rows.channel_stride, std::false_type{});
  });
}

template <class A>
void store_row(const A* source, int64_t n, const Rows& rows, RowIndex row) {
  with_target(rows, row, [&](auto* target, int64_t stride, auto unit) {
    store<std::remove_pointer_t<decltype(target)>, A, unit.value>(source, n, target, stride);
  });
}

// The gate of one row.
template <class A>
struct GateRow {
  A *g, *w, *slope;  // [width]
  int64_t width;     // of its logit: D or 1

  void read(const PromptGateParams& p, RowIndex row) {
    gates(load_row(p.logit, row, width, w), width, p.mix, g, w, slope);
  }
  // Calls f(g, w) with values, or with arrays [D].
  template <class F>
  void visit(F&& f) const {
    width == 1 ? f(*g, *w) : f(static_cast<const A*>(g), static_cast<const A*>(w));
  }
};

template <class A, class G>
void store_product_row(G g, const A* t, int64_t n, const Rows& rows, RowIndex row) {
  with_target(rows, row, [&](auto* target, int64_t stride, auto unit) {
    store_product<std::remove_pointer_t<decltype(target)>, A, unit.value>(g, t, n, target, stride);
  });
}

// Calls f(task, segment, first row, end row) with the rows of each task.
template <class F>
void for_each_task(const PromptGateParams& p, int64_t begin, int64_t end, F&& f) {
  const Segments segments = segments_of(p);
  const Tasks tasks = tasks_of(p);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t segment = task / tasks.per_segment;
    const int64_t first = task % tasks.per_segment * tasks.rows;
    f(task, segment, first, std::min(first + tasks.rows, segments.rows));
  }
}

// ---- forward, backward, the sums ----

template <class A>
void forward(const PromptGateParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.dim;
  const Segments segments = segments_of(p);
  std::vector<A> memory(static_cast<size_t>(6 * n + 1));
  A *h_buffer = memory.data(), *x_buffer = h_buffer + n, *bias = x_buffer + 2 * n;
  GateRow<A> gate{bias + 1, bias + 1 + n, bias + 1 + 2 * n, tasks_of(p).width};
  const bool is_linear = p.weight.data != nullptr;
  const A* weight = is_linear ? load_row(p.weight, {0, 0}, n, x_buffer + n) : nullptr;
  if (p.bias.data != nullptr) *bias = *load_row(p.bias, {0, 0}, 1, bias);
  for_each_task(p, begin, end, [&](int64_t, int64_t segment, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const RowIndex row = row_of_segment(p, segments, segment, i);
      const A* h = load_row(p.out, row, n, h_buffer);
      const A* x = load_row(p.in, row, n, x_buffer);
      if (is_linear) {
        const A logit = static_cast<A>(dot_row(h, weight, n)) + *bias;
        if (p.logit.data != nullptr) store_row(&logit, 1, p.logit, row);
        gates(&logit, 1, p.mix, gate.g, gate.w, gate.slope);
        if (p.gathered.data != nullptr) store_row(h, n, p.gathered, row);
      } else if (segments.streamed || i == first) {
        gate.read(p, row);
      }
      gate.visit([&](auto g, auto w) {
        with_target(p.out, row, [&](auto* target, int64_t stride, auto unit) {
          using T = std::remove_pointer_t<decltype(target)>;
          T* saved = static_cast<T*>(p.saved.data);  // its rows are contiguous, of this dtype
          if (saved == nullptr) {
            store_update<T, A, unit.value>(h, x, g, w, n, target, stride);
          } else {
            saved += offset_of(p.saved, row);
            store_both<T, A, unit.value>(h, x, g, w, p.mix, n, target, stride, saved);
          }
        });
      });
    }
  });
}

template <class A>
void backward(const PromptGateParams& p, int64_t begin, int64_t end, A* partials) {
  const int64_t n = p.dim;
  const Segments segments = segments_of(p);
  const bool needs_sum = p.grad_logit.data != nullptr || p.grad_bias != nullptr;
  std::vector<A> memory(static_cast<size_t>(6 * n));
  A *t_buffer = memory.data(), *s_buffer = t_buffer + n, *grad = s_buffer + n;
  GateRow<A> gate{grad + n, grad + 2 * n, grad + 3 * n, tasks_of(p).width};
  for_each_task(p, begin, end, [&](int64_t task, int64_t segment, int64_t first, int64_t last) {
    A* const sums = partials == nullptr ? nullptr : partials + task * gate.width;
    double sum = 0;  // where the logit has one element a row
    if (sums != nullptr) std::fill(sums, sums + gate.width, A(0));
    for (int64_t i = first; i < last; ++i) {
      const RowIndex row = row_of_segment(p, segments, segment, i);
      if (segments.streamed || i == first) gate.read(p, row);
      const A* t = load_row(p.out, row, n, t_buffer);
      if (p.carrier.data != nullptr) {
        add_row(t, load_row(p.carrier, row, n, s_buffer), n, t_buffer);
        t = t_buffer;
      }
      if (needs_sum) {
        const A* s = load_row(p.saved, row, n, s_buffer);
        if (!segments.streamed) {
          p.by_channel ? multiply_add_row(s, t, n, sums) : void(sum += dot_row(s, t, n));
        } else {
          if (p.by_channel) {
            logit_row(gate.slope, s, t, n, p.mix, grad);
            if (sums != nullptr) add_row<A>(sums, grad, n, sums);
          } else {
            grad[0] = logit_gradient(gate.slope[0], static_cast<A>(dot_row(s, t, n)), p.mix);
            sum += static_cast<double>(grad[0]);
          }
          if (p.grad_logit.data != nullptr) store_row(grad, gate.width, p.grad_logit, row);
        }
      }
      gate.visit([&](auto g, auto w) {
        if (p.in.data != nullptr) store_product_row(w, t, n, p.in, row);
        if (p.rescale) store_product_row(g, t, n, p.out, row);
      });
    }
    if (sums != nullptr && !p.by_channel) *sums = static_cast<A>(sum);
  });
}

template <class A>
void finish(const PromptGateParams& p, const A* partials) {
  const Segments segments = segments_of(p);
  const Tasks tasks = tasks_of(p);
  std::vector<double> sums(static_cast<size_t>(tasks.width));
  std::vector<double> memory(static_cast<size_t>(3 * tasks.width));
  GateRow<double> gate{memory.data(), memory.data() + tasks.width, memory.data() + 2 * tasks.width,
                       tasks.width};
  for (int64_t segment = 0; segment < segments.count; ++segment) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t task = 0; task < tasks.per_segment; ++task, partials += tasks.width) {
      for (size_t k = 0; k < sums.size(); ++k) sums[k] += static_cast<double>(partials[k]);
    }
    if (segments.streamed) {
      const Rows bias{p.grad_bias, 0, 0, 1,
                      std::is_same_v<A, double> ? DType::kFloat64 : DType::kFloat32};
      store_row(sums.data(), tasks.width, bias, {0, 0});
      return;
    }
    const RowIndex row = row_of_segment(p, segments, segment, 0);
    gates(load_row(p.logit, row, tasks.width, gate.w), tasks.width, p.mix, gate.g, gate.w,
          gate.slope);
    for (size_t k = 0; k < sums.size(); ++k) {
      sums[k] = logit_gradient(gate.slope[k], sums[k], p.mix);
    }
    store_row(sums.data(), tasks.width, p.grad_logit, row);
  }
}

}  // namespace

void prompt_gate_fwd_cpu(const PromptGateParams& params, int64_t task_begin, int64_t task_end) {
  params.out.dtype == DType::kFloat64 ? forward<double>(params, task_begin, task_end)
                                      : forward<float>(params, task_begin, task_end);
}

void prompt_gate_bwd_cpu(const PromptGateParams& params, int64_t task_begin, int64_t task_end,
                         void* partials) {
  params.out.dtype == DType::kFloat64
      ? backward(params, task_begin, task_end, static_cast<double*>(partials))
      : backward(params, task_begin, task_end, static_cast<float*>(partials));
}

void prompt_gate_finish_cpu(const PromptGateParams& params, const void* partials) {
  params.out.dtype == DType::kFloat64 ? finish(params, static_cast<const double*>(partials))
                                      : finish(params, static_cast<const float*>(partials));
}

const char* cpu_instructions() {
#if GP_HAS_CLONES
  if (__builtin_cpu_supports("avx512f")) return "avx512f";
  if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
  return "baseline";
}

}  // namespace gated_prompt
