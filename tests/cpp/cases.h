// SPDX-License-Identifier: Apache-2.0
// Shared by the C++ tests: tensors of any layout and dtype with guards around them, and calls.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "prompt_gate.h"
#include "prompt_gate_math.h"

using namespace gated_prompt;

inline std::string context;  // the case that runs, for messages

#define CHECK(condition, ...)                                                          \
  do {                                                                                 \
    if (!(condition)) {                                                                \
      std::printf("%s:%d: %s: %s: ", __FILE__, __LINE__, context.c_str(), #condition); \
      std::printf(__VA_ARGS__);                                                        \
      std::printf("\n");                                                               \
      std::exit(1);                                                                    \
    }                                                                                  \
  } while (0)

// ---- tables: to add a case, add a row ----

struct Shape {
  int64_t batch, length, dim;
};
struct Layout {
  int64_t batch, row, channel, offset;  // element strides, and elements before the first one
};

inline Layout compact(Shape s) {
  return {s.length * s.dim, s.dim, 1, 0};
}
inline Layout shared(Shape s) {  // the same rows for every sample
  return {0, s.dim, 1, 0};
}
inline Layout sequence(Shape s) {  // rows of a longer sequence
  return {(s.length + 4) * s.dim, s.dim, 1, 2 * s.dim};
}
inline Layout odd(Shape s) {  // one element after an aligned address
  return {s.length * s.dim, s.dim, 1, 1};
}
inline Layout padded(Shape s) {  // gaps between rows that break the alignment
  return {s.length * (s.dim + 3), s.dim + 3, 1, 1};
}
inline Layout padded16(Shape s) {  // gaps that keep the alignment
  return {s.length * (s.dim + 16), s.dim + 16, 1, 16};
}
inline Layout padded_pairs(Shape s) {  // 16-bit types are aligned to 4 bytes only
  return {s.length * (s.dim + 2), s.dim + 2, 1, 2};
}
inline Layout transposed(Shape s) {
  return {s.dim * (s.length + 4), 1, s.length + 4, 3};
}
inline Layout every_second(Shape s) {
  return {2 * s.length * s.dim, 2 * s.dim, 2, 1};
}

struct Types {
  DType out, in;
};
constexpr DType kF64 = DType::kFloat64, kF32 = DType::kFloat32, kBF16 = DType::kBFloat16,
                kF16 = DType::kFloat16;
constexpr Types kTypes[] = {{kF64, kF64},  {kF32, kF32}, {kBF16, kBF16}, {kF16, kF16},
                            {kF32, kBF16}, {kF32, kF16}, {kBF16, kF32},  {kF16, kF32}};

struct Kind {
  const char* name;
  bool by_sample, by_row, by_channel;
};
constexpr Kind kKinds[] = {{"scalar", false, false, false},
                           {"sample", true, false, false},
                           {"token", false, true, false},
                           {"channel", false, false, true},
                           {"row", true, true, false},
                           {"token-channel", false, true, true},
                           {"sample-channel", true, false, true},
                           {"full", true, true, true}};

struct Case {
  Shape shape;
  Layout (*out)(Shape);
  Layout (*in)(Shape);
  DType gate = kF32;
};

constexpr Case kCases[] = {
    {{1, 1, 1}, compact, compact},
    {{2, 3, 5}, sequence, compact},
    {{2, 3, 5}, odd, odd},
    {{3, 7, 64}, sequence, sequence, kF64},
    {{3, 7, 64}, sequence, shared, kBF16},
    {{3, 7, 64}, odd, sequence, kF16},
    {{3, 7, 64}, sequence, odd},
    {{3, 7, 64}, padded16, sequence},
    {{3, 7, 64}, sequence, padded16},
    {{3, 7, 64}, padded_pairs, padded_pairs},
    {{3, 7, 64}, transposed, sequence},
    {{3, 7, 64}, compact, transposed},
    {{4, 5, 33}, padded, padded},
    {{4, 5, 33}, every_second, transposed},
    {{4, 5, 33}, transposed, every_second},
    {{2, 9, 1000}, sequence, compact},
    {{2, 9, 1500}, sequence, sequence},
    {{2, 9, 1500}, padded, compact},
    {{2, 9, 1500}, padded16, padded16},
    {{40, 3, 264}, sequence, compact, kBF16},
};

// ---- tensors ----

inline double load(const char* at, DType dtype) {
  const auto as = [&](auto value) {
    std::memcpy(&value, at, sizeof(value));
    return static_cast<double>(widen(value));
  };
  switch (dtype) {
    case DType::kFloat64: return as(double{});
    case DType::kFloat32: return as(float{});
    case DType::kBFloat16: return as(BFloat16{});
    default: return as(Half{});
  }
}

inline void store(char* at, DType dtype, double value) {
  const auto put = [&](auto stored) { std::memcpy(at, &stored, sizeof(stored)); };
  switch (dtype) {
    case DType::kFloat64: return put(value);
    case DType::kFloat32: return put(static_cast<float>(value));
    case DType::kBFloat16: return put(narrow<BFloat16>(static_cast<float>(value)));
    default: return put(narrow<Half>(static_cast<float>(value)));
  }
}

inline double epsilon(DType dtype) {
  return dtype == kF64 ? 2.3e-16 : dtype == kF32 ? 1.2e-7 : dtype == kBF16 ? 7.9e-3 : 9.8e-4;
}

// Elements before and after a tensor, which show writes outside it; a multiple of 16 bytes. None
// under the address sanitizer, which also detects reads, but only beyond the allocated memory.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kGuard = 0;
#else
constexpr int64_t kGuard = 1024;
#endif

struct Tensor {
  std::vector<char> bytes;
  Shape shape;
  Layout layout;
  DType dtype;

  Tensor(Shape s, Layout l, DType type, unsigned seed) : shape(s), layout(l), dtype(type) {
    const int64_t extent =
        l.offset + (s.batch - 1) * l.batch + (s.length - 1) * l.row + (s.dim - 1) * l.channel + 1;
    bytes.resize(static_cast<size_t>((extent + 2 * kGuard) * item_size(type)));
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    const auto size = static_cast<size_t>(item_size(type));
    for (size_t i = 0; i < bytes.size(); i += size) store(&bytes[i], type, normal(random));
  }
  // Strides are 0 along dimensions of size 1, as in a tensor that broadcasts.
  Rows rows() {
    return {bytes.data() + (kGuard + layout.offset) * item_size(dtype),
            shape.batch > 1 ? layout.batch : 0, shape.length > 1 ? layout.row : 0,
            shape.dim > 1 ? layout.channel : 0, dtype};
  }
  size_t position(int64_t b, int64_t p, int64_t d) const {  // in bytes
    const int64_t element = kGuard + layout.offset + (shape.batch > 1 ? b * layout.batch : 0) +
                            (shape.length > 1 ? p * layout.row : 0) +
                            (shape.dim > 1 ? d * layout.channel : 0);
    return static_cast<size_t>(element * item_size(dtype));
  }
  double at(int64_t b, int64_t p, int64_t d) const {
    return load(&bytes[position(b, p, d)], dtype);
  }
};

template <class F>
void for_each_element(Shape s, F&& f) {
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t p = 0; p < s.length; ++p) {
      for (int64_t d = 0; d < s.dim; ++d) f(b, p, d);
    }
  }
}

// Checks that only the elements of the tensor differ from `before`, not the bytes around them.
inline void check_untouched(const Tensor& after, const Tensor& before, const char* name) {
  const auto size = static_cast<size_t>(item_size(after.dtype));
  std::vector<bool> inside(after.bytes.size());
  for_each_element(after.shape, [&](int64_t b, int64_t p, int64_t d) {
    inside[after.position(b, p, d)] = true;
  });
  for (size_t i = 0; i < after.bytes.size(); i += size) {
    CHECK(inside[i] || std::memcmp(&after.bytes[i], &before.bytes[i], size) == 0,
          "%s: element %d was written", name, int(i / size));
  }
}

// ---- calls ----

inline Shape shape_of_logit(Shape s, Kind kind) {
  return {kind.by_sample ? s.batch : 1, kind.by_row ? s.length : 1, kind.by_channel ? s.dim : 1};
}

// The tensors of one call. A copy of a Call has its own tensors.
struct Call {
  Case c;
  Types types;
  Kind kind;
  bool mix;
  bool wants_in = true, wants_saved = true, rescale = true, carries = false, biased = false,
       linear = false;
  Tensor out, in, saved, carrier, logit, grad_logit, grad_bias, weight, gathered;

  Call(const Case& case_, Types types_, Kind kind_, bool mix_, bool backward)
      : c(case_),
        types(types_),
        kind(kind_),
        mix(mix_),
        out(c.shape, c.out(c.shape), types.out, 1),
        // backward writes `in`, so its layout must not overlap itself
        in(c.shape, (backward && c.in == shared ? compact : c.in)(c.shape), types.in, 2),
        saved(c.shape, compact(c.shape), types.out, 3),
        carrier(c.shape, (c.in == shared ? compact : c.in)(c.shape), types.out, 4),
        logit(logit_shape(), compact(logit_shape()), c.gate, 5),
        grad_logit(logit_shape(), compact(logit_shape()), c.gate, 6),
        grad_bias({1, 1, kind.by_channel ? c.shape.dim : 1}, {0, 0, 1, 0},
                  types.out == kF64 ? kF64 : kF32, 7),
        weight({1, 1, c.shape.dim}, {0, 0, 1, 0}, c.gate, 8),
        gathered(c.shape, compact(c.shape), types.out, 9) {
    context = std::string(kind.name) + (mix ? ", mix, " : ", residual, ");
    for (const int64_t n : {c.shape.batch, c.shape.length, c.shape.dim}) {
      context += std::to_string(n) + " ";
    }
    for (const Tensor* t : {&out, &in}) {
      context += "[" + std::to_string(t->layout.batch) + "," + std::to_string(t->layout.row) + "," +
                 std::to_string(t->layout.channel) + "]+" + std::to_string(t->layout.offset) +
                 " of type " + std::to_string(int(t->dtype)) + " ";
    }
  }

  Shape logit_shape() const {
    return shape_of_logit(c.shape, kind);
  }
  bool is_streamed() const {
    return kind.by_sample && kind.by_row;
  }

  PromptGateParams params(bool backward) {
    PromptGateParams p{};
    p.batch = c.shape.batch, p.length = c.shape.length, p.dim = c.shape.dim, p.mix = mix;
    p.by_sample = kind.by_sample, p.by_row = kind.by_row, p.by_channel = kind.by_channel;
    p.logit = logit.rows(), p.h = out.rows(), p.x = in.rows(), p.saved = saved.rows();
    if (!wants_in) p.x.data = nullptr;
    if (!wants_saved) p.saved.data = nullptr;
    p.rescale = rescale;
    if (backward && wants_saved) p.grad_logit = grad_logit.rows();
    if (backward && carries) p.carrier = carrier.rows();
    if (backward && biased) p.grad_bias = grad_bias.rows().data;
    if (linear) {
      p.weight = weight.rows(), p.weight.channel_stride = 1;
      p.bias = grad_bias.rows(), p.gathered = gathered.rows();
    }
    return p;
  }
};

inline void run_fwd_cpu(const PromptGateParams& params) {
  const PromptGateParams p = join_rows(params);
  prompt_gate_fwd_cpu(p, 0, tasks_of(p).count);
}
inline void run_bwd_cpu(const PromptGateParams& params, int64_t step = 1 << 30) {
  const PromptGateParams p = join_rows(params);
  const Tasks tasks = tasks_of(p);
  std::vector<double> partials(static_cast<size_t>(tasks.count * tasks.width));
  void* const memory = reduces(p) ? partials.data() : nullptr;
  for (int64_t begin = 0; begin < tasks.count; begin += step) {
    prompt_gate_bwd_cpu(p, begin, smaller(begin + step, tasks.count), memory);
  }
  if (reduces(p)) prompt_gate_finish_cpu(p, memory);
}

// Every case with every kind and both rules. Types change with each call, so that every case and
// every kind is run with all types.
template <class F>
void for_each_call(bool backward, F&& check) {
  size_t turn = 0;
  for (const Case& c : kCases) {
    for (const Kind& kind : kKinds) {
      for (const bool mix : {true, false}) check(Call(c, kTypes[turn++ % 8], kind, mix, backward));
    }
    ++turn;
  }
}

// The same calls, with and without optional tensors; forward also with linear gates.
template <class F>
void for_each_forward(F&& check) {
  for_each_call(/*backward=*/false, [&](Call call) {
    check(call);
    call.wants_saved = false;
    check(call);
    call.linear = call.is_streamed() && !call.kind.by_channel;
    if (call.linear) check(call);
  });
}

template <class F>
void for_each_backward(F&& check) {
  for_each_call(/*backward=*/true, [&](Call call) {
    call.biased = call.is_streamed();
    check(call);
    call.carries = true;
    check(call);
    call.biased = call.wants_in = false;
    check(call);
    call.wants_in = true, call.rescale = call.wants_saved = false;
    check(call);
  });
}

// Runs the law that the command line names and returns the exit status.
inline int run_law(int argc, char** argv,
                   const std::map<std::string, std::function<void()>>& laws) {
  const auto law = laws.find(argc == 2 ? argv[1] : "");
  if (law == laws.end()) {
    std::printf("usage: %s LAW, one of:", argv[0]);
    for (const auto& [name, function] : laws) std::printf(" %s", name.c_str());
    std::printf("\n");
    return 2;
  }
  law->second();
  std::printf("%s: holds\n", law->first.c_str());
  return 0;
}
