// SPDX-License-Identifier: Apache-2.0
// CPU kernels: plain loops over the elements of a row, which the compiler vectorises for the
// instruction sets of vec_cpu.h. The loops work on rows in place if they can. A row whose dtype or
// stride they do not support is widened into a buffer of the compute type A (float or double) and
// rounded from there; the buffer stays in the nearest cache. Memory is read and written once.
#include "prompt_gate.h"
#include "prompt_gate_math.h"
#include "vec_cpu.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

namespace gated_prompt {
namespace {

// ---- loops over n elements, in addition to the loops of vec_cpu.h ----

// A target may be the same array as a source. Even then no iteration depends on another one, and
// `ivdep` tells the compiler this. V is the type of a row's elements: a storage type, or A.
#define GP_LOOP _Pragma("GCC ivdep") _Pragma("GCC unroll 4")

template <class T, class A, bool kUnit>  // source [n] -> target [n], rounded
GP_TARGET_CLONES void store(const A* source, int64_t n, T* target, int64_t stride) {
  GP_LOOP for (int64_t i = 0; i < n; ++i) {
    target[at<kUnit>(i, stride)] = narrow<T>(static_cast<compute_t<T>>(source[i]));
  }
}

// The type G of a gate is A (one value for all elements) or const A* (one value per element).
template <class A>
inline A element(A value, int64_t) {
  return value;
}
template <class A>
inline A element(const A* values, int64_t i) {
  return values[i];
}

template <class V, class G>  // target <- g*h + w*x
GP_TARGET_CLONES void update_row(const V* h, const V* x, G g, G w, int64_t n, V* target) {
  GP_LOOP for (int64_t i = 0; i < n; ++i) {
    target[i] = narrow<V>(update(element(g, i), widen(h[i]), element(w, i), widen(x[i])));
  }
}

// update_row, and saved <- (h - x)/2 (kMix) or h. The rule is a template parameter, because the
// compiler would not vectorise a loop that chooses between them.
template <bool kMix, class V, class G>
GP_TARGET_CLONES void update_and_save_row(const V* h, const V* x, G g, G w, int64_t n, V* target,
                                          V* saved) {
  GP_LOOP for (int64_t i = 0; i < n; ++i) {
    const auto old = widen(h[i]), into = widen(x[i]);  // read before the target is written
    saved[i] = narrow<V>(saved_derivative(kMix, old, into));
    target[i] = narrow<V>(update(element(g, i), old, element(w, i), into));
  }
}

template <class V, class A, class G>  // grad_h <- g*t, grad_x <- w*t
GP_TARGET_CLONES void scale_row(const A* t, G g, G w, int64_t n, V* grad_h, V* grad_x) {
  GP_LOOP for (int64_t i = 0; i < n; ++i) {
    const A value = t[i];  // read before `grad_h` is written
    grad_h[i] = narrow<V>(element(g, i) * value);
    grad_x[i] = narrow<V>(element(w, i) * value);
  }
}

// Like scale_row; also returns the sum of s*t, with the same bits as dot_row.
template <class V, class A>
GP_TARGET_CLONES double scale_and_dot_row(const V* s, const A* t, A g, A w, int64_t n, V* grad_h,
                                          V* grad_x) {
  A lanes[kLanes] = {};
  int64_t i = 0;
  // three inner loops: g++ does not vectorise a single one for float16
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += widen(s[i + k]) * t[i + k];
    _Pragma("GCC ivdep") for (int64_t k = 0; k < kLanes; ++k) grad_x[i + k] =
        narrow<V>(w * t[i + k]);
    _Pragma("GCC ivdep") for (int64_t k = 0; k < kLanes; ++k) grad_h[i + k] =
        narrow<V>(g * t[i + k]);
  }
  for (int64_t k = 0; i < n; ++i, ++k) {
    lanes[k] += widen(s[i]) * t[i];
    grad_x[i] = narrow<V>(w * t[i]);
    grad_h[i] = narrow<V>(g * t[i]);  // written last, because t may be the same row as grad_h
  }
  return sum_of_lanes(lanes);
}

// Computes g, w and slope [n] from logits [n]. w and logits may be the same array.
template <class A>
GP_TARGET_CLONES void gates(const A* logits, int64_t n, bool mix, A* g, A* w, A* slope) {
  GP_LOOP for (int64_t i = 0; i < n; ++i) {
    const Gate<A> gate = make_gate(logits[i]);
    g[i] = gate.value;
    w[i] = gate.complement;
    slope[i] = gate.slope;
  }
  if (!mix) std::fill(w, w + n, A(1));  // in the loop, this choice would prevent vectorisation
}

template <class A>  // sum <- a + b; sum may be a or b
GP_TARGET_CLONES void add_row(const A* a, const A* b, int64_t n, A* sum) {
  GP_LOOP for (int64_t i = 0; i < n; ++i) sum[i] = a[i] + b[i];
}

template <class V, class A>  // grad <- gradient of the logit, from s*t
GP_TARGET_CLONES void logit_row(const A* slope, const V* s, const A* t, int64_t n, bool mix,
                                A* __restrict__ grad) {
  for (int64_t i = 0; i < n; ++i) grad[i] = logit_gradient(slope[i], widen(s[i]) * t[i], mix);
}

template <class V, class A>  // sum <- sum + s*t
GP_TARGET_CLONES void multiply_add_row(const V* __restrict__ s, const A* __restrict__ t, int64_t n,
                                       A* __restrict__ sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += widen(s[i]) * t[i];
}

// ---- rows of any dtype and stride <-> contiguous rows of V, for the loops ----

// True if the loops can work on `rows` in place, as elements of type V.
template <class V>
bool is_run_of(const Rows& rows) {
  bool is_v = false;
  visit(rows.dtype, [&](auto type) { is_v = std::is_same_v<decltype(type), V>; });
  return is_v && rows.data != nullptr && rows.channel_stride == 1;
}

// Returns the values of a row: the row itself, or `buffer` with the widened values.
template <class V>
const V* load_row(const Rows& rows, RowIndex row, int64_t n, V* buffer) {
  return load_any(rows.data, rows.dtype, offset_of(rows, row), rows.channel_stride, n, buffer);
}

// Returns where a loop writes a row: the row itself, or `buffer`, which store_row then stores.
template <class V>
V* place_of(const Rows& rows, RowIndex row, V* buffer) {
  return is_run_of<V>(rows) ? static_cast<V*>(rows.data) + offset_of(rows, row) : buffer;
}

// Stores `source` in a row, unless `source` is the row itself.
template <class V>
void store_row(const V* source, int64_t n, const Rows& rows, RowIndex row) {
  const int64_t stride = rows.channel_stride;
  visit(rows.dtype, [&](auto type) {
    using T = decltype(type);
    T* target = static_cast<T*>(rows.data) + offset_of(rows, row);
    if constexpr (std::is_same_v<T, V>) {
      if (source == target) return;
    }
    if constexpr (std::is_floating_point_v<V>) {
      stride == 1 ? store<T, V, true>(source, n, target, 1)
                  : store<T, V, false>(source, n, target, stride);
    } else if constexpr (std::is_same_v<T, V>) {
      std::copy(source, source + n, target);
    }
  });
}

// Calls f with a value of the type V that the loops work on: the dtype of h if x has this dtype,
// too (or is not needed), and the channels of both are contiguous; otherwise the compute type.
template <class F>
void visit_work(const PromptGateParams& p, F&& f) {
  visit(p.h.dtype, [&](auto type) {
    using T = decltype(type);
    const bool in_place = is_run_of<T>(p.h) && (p.x.data == nullptr || is_run_of<T>(p.x));
    in_place ? f(type) : f(compute_t<T>{});
  });
}

// The gate of one row.
template <class A>
struct GateRow {
  A *g, *w, *slope;  // [width]
  int64_t width;     // of the row's logit: D or 1

  void read(const PromptGateParams& p, RowIndex row) {
    gates(load_row(p.logit, row, width, w), width, p.mix, g, w, slope);
  }
  // Calls f(g, w) with two values (width 1) or two arrays [D].
  template <class F>
  void visit(F&& f) const {
    width == 1 ? f(*g, *w) : f(static_cast<const A*>(g), static_cast<const A*>(w));
  }
};

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

template <class T>  // uninitialised
std::unique_ptr<T[]> buffer_of(int64_t size) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(size)]);
}

// ---- forward, backward, the sums ----

template <class V>
void forward(const PromptGateParams& p, int64_t begin, int64_t end) {
  using A = compute_t<V>;
  const int64_t n = p.dim, width = tasks_of(p).width;
  const Segments segments = segments_of(p);
  const bool is_linear = p.weight.data != nullptr, saves = p.saved.data != nullptr;
  const std::unique_ptr<V[]> rows = buffer_of<V>(3 * n);
  V *h_buffer = rows.get(), *x_buffer = h_buffer + n, *saved_buffer = x_buffer + n;
  const std::unique_ptr<A[]> memory = buffer_of<A>(3 * width + (is_linear ? n : 0));
  GateRow<A> gate{memory.get(), memory.get() + width, memory.get() + 2 * width, width};
  const A* weight = is_linear ? load_row(p.weight, {0, 0}, n, memory.get() + 3 * width) : nullptr;
  A bias = 0;
  if (p.bias.data != nullptr) bias = *load_row(p.bias, {0, 0}, 1, &bias);
  for_each_task(p, begin, end, [&](int64_t, int64_t segment, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const RowIndex row = row_of_segment(p, segments, segment, i);
      const V* h = load_row(p.h, row, n, h_buffer);
      const V* x = load_row(p.x, row, n, x_buffer);
      if (is_linear) {
        const A logit = static_cast<A>(dot_row(h, weight, n)) + bias;
        if (p.logit.data != nullptr) store_row(&logit, 1, p.logit, row);
        gates(&logit, 1, p.mix, gate.g, gate.w, gate.slope);
        if (p.gathered.data != nullptr) store_row(h, n, p.gathered, row);
      } else if (segments.streamed || i == first) {
        gate.read(p, row);
      }
      V* const target = place_of(p.h, row, h_buffer);
      V* const saved = place_of(p.saved, row, saved_buffer);
      gate.visit([&](auto g, auto w) {
        !saves  ? update_row(h, x, g, w, n, target)
        : p.mix ? update_and_save_row<true>(h, x, g, w, n, target, saved)
                : update_and_save_row<false>(h, x, g, w, n, target, saved);
      });
      store_row(target, n, p.h, row);
      if (saves) store_row(saved, n, p.saved, row);
    }
  });
}

template <class V>
void backward(const PromptGateParams& p, int64_t begin, int64_t end, compute_t<V>* partials) {
  using A = compute_t<V>;
  const int64_t n = p.dim, width = tasks_of(p).width;
  const Segments segments = segments_of(p);
  const bool needs_sum = p.grad_logit.data != nullptr || p.grad_bias != nullptr;
  const std::unique_ptr<V[]> rows = buffer_of<V>(3 * n);
  V *s_buffer = rows.get(), *grad_h_buffer = s_buffer + n, *grad_x_buffer = grad_h_buffer + n;
  const std::unique_ptr<A[]> memory = buffer_of<A>(2 * n + 3 * width);
  A *t_buffer = memory.get(), *grad = t_buffer + n;
  GateRow<A> gate{grad + n, grad + n + width, grad + n + 2 * width, width};
  for_each_task(p, begin, end, [&](int64_t task, int64_t segment, int64_t first, int64_t last) {
    A* const sums = partials == nullptr ? nullptr : partials + task * width;
    double sum = 0;  // used unless by_channel
    if (sums != nullptr) std::fill(sums, sums + width, A(0));
    for (int64_t i = first; i < last; ++i) {
      const RowIndex row = row_of_segment(p, segments, segment, i);
      if (segments.streamed || i == first) gate.read(p, row);
      const A* t = load_row(p.h, row, n, t_buffer);
      if (p.carrier.data != nullptr) {
        add_row(t, load_row(p.carrier, row, n, grad), n, t_buffer);
        t = t_buffer;
      }
      V* const grad_h = p.rescale ? place_of(p.h, row, grad_h_buffer) : grad_h_buffer;
      V* const grad_x = place_of(p.x, row, grad_x_buffer);
      const V* s = needs_sum ? load_row(p.saved, row, n, s_buffer) : nullptr;
      if (needs_sum && p.by_channel) {
        if (!segments.streamed) {
          multiply_add_row(s, t, n, sums);
        } else {
          logit_row(gate.slope, s, t, n, p.mix, grad);
          if (sums != nullptr) add_row<A>(sums, grad, n, sums);
        }
      }
      if (needs_sum && !p.by_channel) {
        const double dot = scale_and_dot_row(s, t, *gate.g, *gate.w, n, grad_h, grad_x);
        grad[0] = logit_gradient(*gate.slope, static_cast<A>(dot), p.mix);
        sum += segments.streamed ? static_cast<double>(grad[0]) : dot;
      } else {
        gate.visit([&](auto g, auto w) { scale_row(t, g, w, n, grad_h, grad_x); });
      }
      if (segments.streamed && p.grad_logit.data != nullptr) {
        store_row(grad, width, p.grad_logit, row);
      }
      if (p.rescale) store_row(grad_h, n, p.h, row);
      if (p.x.data != nullptr) store_row(grad_x, n, p.x, row);
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
  visit_work(params, [&](auto type) { forward<decltype(type)>(params, task_begin, task_end); });
}

void prompt_gate_bwd_cpu(const PromptGateParams& params, int64_t task_begin, int64_t task_end,
                         void* partials) {
  visit_work(params, [&](auto type) {
    using V = decltype(type);
    backward<V>(params, task_begin, task_end, static_cast<compute_t<V>*>(partials));
  });
}

void prompt_gate_finish_cpu(const PromptGateParams& params, const void* partials) {
  params.h.dtype == DType::kFloat64 ? finish(params, static_cast<const double*>(partials))
                                    : finish(params, static_cast<const float*>(partials));
}

const char* cpu_instructions() {
#if GP_HAS_CLONES
  if (__builtin_cpu_supports(GP_WIDEST)) return GP_WIDEST;
  if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
  return "baseline";
}

}  // namespace gated_prompt
