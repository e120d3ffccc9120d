// SPDX-License-Identifier: Apache-2.0
// Tests of the torch-free code: arithmetic, CPU kernels on strided data, CUDA launch shape and
// index map. Usage: test_prompt_gate LAW; exit status 0 if the law holds.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "prompt_gate.h"
#include "prompt_gate_math.h"

using namespace gated_prompt;

namespace {

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
      std::exit(1);                                               \
    }                                                             \
  } while (0)

// ---- oracles, in double ----

// A 16-bit float with `exponent_bits` and the rest mantissa, from its definition.
double decode(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits & 0x7fff) >> mantissa_bits;
  const double fraction = std::ldexp(bits & ((1 << mantissa_bits) - 1), -mantissa_bits);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return fraction == 0 ? sign * INFINITY : std::numeric_limits<double>::quiet_NaN();
  }
  return sign * (exponent == 0 ? std::ldexp(fraction, 1 - bias)
                               : std::ldexp(1 + fraction, exponent - bias));
}

double sigmoid(double z) {
  return 1 / (1 + std::exp(-z));
}

template <class T>
double value(T x) {
  return static_cast<double>(widen(x));
}

// ---- conversions ----

template <class T, int kExponentBits>
void check_conversions() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T stored{static_cast<uint16_t>(bits)};
    const double wanted = decode(stored.bits, kExponentBits), got = value(stored);
    if (std::isnan(wanted)) {
      CHECK(std::isnan(got) && std::isnan(value(narrow<T>(widen(stored)))), "%04x", bits);
      continue;
    }
    CHECK(got == wanted && std::signbit(got) == std::signbit(wanted), "%04x: %g, not %g", bits, got,
          wanted);
    CHECK(narrow<T>(widen(stored)).bits == bits, "%04x does not come back", bits);
  }
  // between neighbours a < b: the midpoint goes to the even one, what lies beside it to the nearer
  // one
  for (uint32_t bits = 0; decode(static_cast<uint16_t>(bits), kExponentBits) < INFINITY; ++bits) {
    const double a = decode(static_cast<uint16_t>(bits), kExponentBits);
    double b = decode(static_cast<uint16_t>(bits + 1), kExponentBits);
    if (std::isinf(b)) b = a + (a - decode(static_cast<uint16_t>(bits - 1), kExponentBits));
    const auto middle = static_cast<float>((a + b) / 2);
    if (static_cast<double>(middle) != (a + b) / 2)
      continue;  // float32 can't tell (bfloat16 subnormals)
    const uint32_t even = bits % 2 == 0 ? bits : bits + 1;
    for (const float sign : {1.0f, -1.0f}) {
      const uint32_t sign_bit = sign < 0 ? 0x8000u : 0u;
      CHECK(narrow<T>(sign * middle).bits == (even | sign_bit), "midpoint above %04x", bits);
      CHECK(narrow<T>(sign * std::nextafter(middle, 0.0f)).bits == (bits | sign_bit),
            "below it, %04x", bits);
      CHECK(narrow<T>(sign * std::nextafter(middle, INFINITY)).bits == ((bits + 1) | sign_bit),
            "above it, %04x", bits);
    }
  }
}

void test_conversions() {
  check_conversions<BFloat16, 8>();
  check_conversions<Half, 5>();
}

// ---- gate ----

template <class A>
void check_gate(double tolerance) {
  for (double z = -80; z <= 80; z += 0.173) {
    const A logit = static_cast<A>(z);
    const Gate<A> gate = make_gate(logit);
    const double g = sigmoid(static_cast<double>(logit)), c = sigmoid(-static_cast<double>(logit));
    CHECK(std::fabs(static_cast<double>(gate.value) - g) <= tolerance * g, "g(%g) = %g", z,
          double(gate.value));
    const double slope = static_cast<double>(gate.slope);
    CHECK(std::fabs(slope - g * c) <= 2 * tolerance * g * c, "slope(%g) = %g", z, slope);
    if (gate.value == A(1)) {
      CHECK(gate.complement == A(0), "1 - g(%g) = %g", z, double(gate.complement));
    } else {
      CHECK(std::fabs(static_cast<double>(gate.complement) - c) <= tolerance * c, "1 - g(%g)", z);
    }
    const double step = 1e-6;  // slope is the derivative of value
    const double difference =
        (double(make_gate(z + step).value) - double(make_gate(z - step).value)) / (2 * step);
    CHECK(std::fabs(make_gate(z).slope - difference) <= 1e-8, "slope at %g", z);
  }
  for (const A z : {A(1e4), std::numeric_limits<A>::infinity()}) {
    const Gate<A> open = make_gate(z), closed = make_gate(-z);
    CHECK(open.value == A(1) && open.complement == A(0) && open.slope == A(0), "open");
    CHECK(closed.value == A(0) && closed.complement == A(1) && closed.slope == A(0), "closed");
  }
  CHECK(make_gate(A(0)).value == A(0.5) && make_gate(A(0)).complement == A(0.5), "logit 0");
  CHECK(std::isnan(make_gate(std::numeric_limits<A>::quiet_NaN()).value), "NaN stays NaN");
}

void test_gate() {
  check_gate<float>(4 * 1.2e-7);
  check_gate<double>(4 * 2.3e-16);
}

// The derivatives that backward uses, by finite differences of update().
void test_update() {
  const double step = 1e-5, h = 0.7, x = -1.3, z = 0.4;
  for (const bool mix : {true, false}) {
    const auto out = [&](double h_, double x_, double z_) {
      const Gate<double> gate = make_gate(z_);
      return update(gate.value, h_, input_weight(gate, mix), x_);
    };
    const Gate<double> gate = make_gate(z);
    const double dh = (out(h + step, x, z) - out(h - step, x, z)) / (2 * step);
    const double dx = (out(h, x + step, z) - out(h, x - step, z)) / (2 * step);
    const double dz = (out(h, x, z + step) - out(h, x, z - step)) / (2 * step);
    CHECK(std::fabs(dh - gate.value) < 1e-9, "mix=%d", mix);
    CHECK(std::fabs(dx - input_weight(gate, mix)) < 1e-9, "mix=%d", mix);
    CHECK(std::fabs(dz - logit_gradient(gate, half_derivative(mix, h, x))) < 1e-9, "mix=%d", mix);
  }
  const double inf = INFINITY;
  const float large = 3e38f;
  CHECK(half_derivative(true, large, -large) == large, "the halved difference does not overflow");
  CHECK(update(0.25, inf, 0.75, inf) == inf, "inf mixed with inf is inf");
}

// ---- CPU kernels on strided data ----

struct Layout {
  int64_t batch, row, channel, offset;  // element strides, and elements before the first one
};

struct Shape {
  int64_t batch, length, dim;
};

template <class T>
struct Buffer {
  std::vector<T> data;
  Layout layout;

  Buffer(Shape s, Layout l, uint32_t seed) : layout(l) {
    data.resize(static_cast<size_t>(l.offset + s.batch * l.batch + s.length * l.row +
                                    s.dim * l.channel + 8));
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (T& element : data) element = narrow<T>(static_cast<compute_t<T>>(normal(random)));
  }
  size_t position(int64_t b, int64_t p, int64_t d) const {
    return static_cast<size_t>(layout.offset + b * layout.batch + p * layout.row +
                               d * layout.channel);
  }
  double at(int64_t b, int64_t p, int64_t d) const {
    return value(data[position(b, p, d)]);
  }
  Rows rows(DType dtype) {
    return {data.data() + layout.offset, layout.batch, layout.row, layout.channel, dtype};
  }
};

template <class T>
constexpr DType dtype_of() {
  return std::is_same_v<T, double>     ? DType::kFloat64
         : std::is_same_v<T, float>    ? DType::kFloat32
         : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                                       : DType::kFloat16;
}

template <class T>
constexpr double epsilon() {
  return std::is_same_v<T, double>     ? 2.3e-16
         : std::is_same_v<T, float>    ? 1.2e-7
         : std::is_same_v<T, BFloat16> ? 7.9e-3
                                       : 9.8e-4;
}

struct Case {
  Shape shape;
  Layout out, in;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const Shape s :
       {Shape{2, 3, 5}, Shape{3, 7, 64}, Shape{1, 1, 1}, Shape{4, 5, 33}, Shape{2, 9, 1500}}) {
    const int64_t n = s.length + 4;
    const Layout sequence{n * s.dim, s.dim, 1, 2 * s.dim}, compact{s.length * s.dim, s.dim, 1, 0};
    const Layout padded{n * (s.dim + 3), s.dim + 3, 1, 1}, transposed{s.dim * n, 1, n, 3};
    const Layout every_second{2 * n * s.dim, 2 * s.dim, 2, 1}, shared{0, s.dim, 1, 0};
    for (const Layout& out : {sequence, padded, transposed, every_second}) {
      for (const Layout& in : {sequence, compact, padded, transposed, shared})
        all.push_back({s, out, in});
    }
  }
  return all;
}

template <class F>
void for_each_element(Shape s, F&& f) {
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t p = 0; p < s.length; ++p) {
      for (int64_t d = 0; d < s.dim; ++d) f(b, p, d);
    }
  }
}

// Nothing but the elements of the shape differs from `before`.
template <class T>
void check_untouched(Shape s, const Buffer<T>& after, const Buffer<T>& before, const char* name) {
  std::vector<bool> inside(after.data.size());
  for_each_element(
      s, [&](int64_t b, int64_t r, int64_t d) { inside[after.position(b, r, d)] = true; });
  for (size_t i = 0; i < after.data.size(); ++i) {
    CHECK(inside[i] || std::memcmp(&after.data[i], &before.data[i], sizeof(T)) == 0,
          "%s: element %zu was written", name, i);
  }
}

template <class H, class X>
PromptGateParams make_params(Shape s, bool mix, const float& logit) {
  PromptGateParams p{};
  p.batch = s.batch, p.length = s.length, p.dim = s.dim, p.mix = mix;
  p.gate_logit = &logit, p.gate_dtype = DType::kFloat32;
  p.in.dtype = dtype_of<X>();
  return p;
}

template <class H, class X>
void check_forward() {
  const float logit = -0.3f;
  const double g = sigmoid(static_cast<double>(logit)),
               bound = 4 * (epsilon<H>() + epsilon<float>());
  for (const Case& c : cases()) {
    for (const bool mix : {true, false}) {
      Buffer<H> h(c.shape, c.out, 1), before = h;
      Buffer<X> x(c.shape, c.in, 2), x_before = x;
      const int64_t row = c.shape.dim;
      Buffer<H> saved(c.shape, {c.shape.length * row, row, 1, 0}, 3), saved_before = saved;
      PromptGateParams p = make_params<H, X>(c.shape, mix, logit);
      p.out = h.rows(dtype_of<H>()), p.in = x.rows(dtype_of<X>()),
      p.saved = saved.rows(dtype_of<H>());
      prompt_gate_fwd_cpu(p, 0, num_chunks(p));
      for_each_element(c.shape, [&](int64_t b, int64_t r, int64_t d) {
        const double h_i = before.at(b, r, d), x_i = x.at(b, r, d);
        const double wanted = g * h_i + (mix ? 1 - g : 1) * x_i, half = (mix ? h_i - x_i : h_i) / 2;
        const double scale = std::fabs(h_i) + std::fabs(x_i);
        CHECK(std::fabs(h.at(b, r, d) - wanted) <= bound * scale, "[%d,%d,%d]", int(b), int(r),
              int(d));
        CHECK(std::fabs(saved.at(b, r, d) - half) <= bound * scale, "saved");
      });
      check_untouched(c.shape, h, before, "h");
      check_untouched(c.shape, x, x_before, "x");
      check_untouched(c.shape, saved, saved_before, "saved");
    }
  }
}

template <class H, class X>
void check_backward() {
  const float logit = 0.6f;
  const double g = sigmoid(static_cast<double>(logit)),
               bound = 4 * (epsilon<H>() + epsilon<X>() + epsilon<float>());
  for (const Case& c : cases()) {
    for (const bool mix : {true, false}) {
      const int64_t row = c.shape.dim;
      const Layout compact{c.shape.length * row, row, 1, 0};
      Buffer<H> grad(c.shape, c.out, 4), before = grad, saved(c.shape, compact, 5);
      Buffer<X> grad_in(c.shape, compact, 6), grad_in_before = grad_in;
      float grad_logit = NAN;
      PromptGateParams p = make_params<H, X>(c.shape, mix, logit);
      p.out = grad.rows(dtype_of<H>()), p.in = grad_in.rows(dtype_of<X>());
      p.saved = saved.rows(dtype_of<H>()), p.rescale = true, p.grad_logit = &grad_logit;
      std::vector<double> partials(static_cast<size_t>(num_chunks(p)));
      prompt_gate_bwd_cpu(p, 0, num_chunks(p), partials.data());
      prompt_gate_finish_cpu(p, partials.data());
      double sum = 0, magnitude = 0;
      for_each_element(c.shape, [&](int64_t b, int64_t r, int64_t d) {
        const double t = before.at(b, r, d);
        sum += saved.at(b, r, d) * t, magnitude += std::fabs(saved.at(b, r, d) * t);
        CHECK(std::fabs(grad.at(b, r, d) - g * t) <= bound * std::fabs(t), "grad of h");
        CHECK(std::fabs(grad_in.at(b, r, d) - (mix ? 1 - g : 1) * t) <= bound * std::fabs(t),
              "grad of x");
      });
      CHECK(std::fabs(static_cast<double>(grad_logit) - 2 * g * (1 - g) * sum) <=
                8 * epsilon<float>() * magnitude,
            "grad of logit %g, not %g", double(grad_logit), 2 * g * (1 - g) * sum);
      check_untouched(c.shape, grad, before, "grad");
      check_untouched(c.shape, grad_in, grad_in_before, "grad of x");
    }
  }
}

template <template <class, class> class Check>
void for_each_dtype_pair() {
  Check<double, double>::run(), Check<float, float>::run(), Check<BFloat16, BFloat16>::run();
  Check<Half, Half>::run(), Check<float, BFloat16>::run(), Check<float, Half>::run();
  Check<BFloat16, float>::run(), Check<Half, float>::run();
}
template <class H, class X>
struct Forward {
  static void run() {
    check_forward<H, X>();
  }
};
template <class H, class X>
struct Backward {
  static void run() {
    check_backward<H, X>();
  }
};

// Any split of the chunks gives the same bits.
void test_chunks() {
  const Shape s{5, 11, 777};
  const Layout sequence{20 * s.dim, s.dim, 1, 3};
  const float logit = 0.1f;
  std::vector<float> sums;
  std::vector<std::vector<BFloat16>> results;
  for (const int64_t step : {int64_t{1}, int64_t{3}, int64_t{1000}}) {
    Buffer<BFloat16> grad(s, sequence, 7), saved(s, {s.length * s.dim, s.dim, 1, 0}, 8);
    float grad_logit = NAN;
    PromptGateParams p = make_params<BFloat16, BFloat16>(s, true, logit);
    p.out = grad.rows(DType::kBFloat16), p.saved = saved.rows(DType::kBFloat16);
    p.rescale = true, p.grad_logit = &grad_logit;
    const int64_t chunks = num_chunks(p);
    CHECK(chunks > 4, "%d chunks", int(chunks));
    std::vector<double> partials(static_cast<size_t>(chunks));
    for (int64_t begin = 0; begin < chunks; begin += step) {
      prompt_gate_bwd_cpu(p, begin, std::min(begin + step, chunks), partials.data());
    }
    prompt_gate_finish_cpu(p, partials.data());
    sums.push_back(grad_logit), results.push_back(grad.data);
  }
  for (size_t i = 1; i < sums.size(); ++i) {
    CHECK(std::memcmp(&sums[i], &sums[0], sizeof(float)) == 0, "%g and %g", double(sums[i]),
          double(sums[0]));
    CHECK(std::memcmp(results[i].data(), results[0].data(), results[0].size() * 2) == 0,
          "rows differ");
  }
}

// ---- CUDA launch shape and index map ----

struct View {
  Layout layout;
  uintptr_t address;
};

Rows rows_of(const View& view, DType dtype) {
  return {reinterpret_cast<void*>(view.address), view.layout.batch, view.layout.row,
          view.layout.channel, dtype};
}

// Every pack of every sample is visited once, lies at the elements it stands for in each tensor,
// and is aligned there.
void check_plan(const PromptGateParams& p, int wanted_vector) {
  const bool backward = p.grad_logit != nullptr;
  const LaunchPlan plan = plan_launch(p, backward);
  CHECK(plan.vector == wanted_vector, "D=%d: vector %d, not %d", int(p.dim), plan.vector,
        wanted_vector);
  CHECK(plan.grid_x >= 1 && plan.grid_x <= kMaxGridX, "grid_x %d", int(plan.grid_x));
  CHECK(plan.grid_y >= 1 && plan.grid_y <= kMaxGridY, "grid_y %d", int(plan.grid_y));
  CHECK(!backward || plan.grid_x * plan.grid_y <= kMaxPartials, "too many partials");
  const int64_t packs = plan.rows * plan.packs_per_row, tile = int64_t{kThreads} * kPacksInFlight;
  CHECK(packs * plan.vector == p.length * p.dim, "packs tile the sample");
  std::vector<int> visits(static_cast<size_t>(packs));  // the loop of the kernels
  for (int64_t thread = 0; thread < plan.grid_x * kThreads; ++thread) {
    for (int64_t first = thread / kThreads * tile + thread % kThreads; first < packs;
         first += plan.grid_x * tile) {
      for (int k = 0; k < kPacksInFlight; ++k) {
        const int64_t index = first + k * kThreads;
        if (index < packs) ++visits[static_cast<size_t>(index)];
      }
    }
  }
  for (const int count : visits) CHECK(count == 1, "a pack is visited %d times", count);
  for (const Rows& rows : {p.out, p.in, p.saved}) {
    const int64_t size = item_size(rows.dtype);
    const int64_t bytes = plan.vector * size < 16 ? plan.vector * size : 16;
    for (int64_t index = 0; index < packs; index += packs > 100000 ? 997 : 1) {
      const int64_t element = index * plan.vector;
      const int64_t wanted =
          element / p.dim * rows.row_stride + element % p.dim * rows.channel_stride;
      const int64_t offset = pack_offset(plan, rows, index);
      CHECK(offset == wanted, "pack %d at %d, not %d", int(index), int(offset), int(wanted));
      for (int64_t b = 0; b < p.batch && b < 3; ++b) {
        const auto address = reinterpret_cast<uintptr_t>(rows.data) +
                             static_cast<uintptr_t>((b * rows.batch_stride + offset) * size);
        CHECK(plan.vector == 1 || address % static_cast<uintptr_t>(bytes) == 0, "misaligned pack");
      }
    }
  }
}

void test_plan() {
  struct PlanCase {
    Shape shape;
    View odd;  // of one tensor; the others are plain
    DType dtype;
    int vector;  // wanted
  };
  const auto at256 = [](Layout layout) { return View{layout, 256}; };
  const DType half = DType::kBFloat16, single = DType::kFloat32;
  const std::vector<PlanCase> plan_cases = {
      {{64, 50, 768}, at256({247 * 768, 768, 1, 0}), half, 8},
      {{64, 50, 768}, at256({247 * 768, 768, 1, 0}), single, 4},
      {{64, 50, 768}, at256({247 * 768, 768, 1, 0}), DType::kFloat64, 2},
      {{2, 10, 12}, {{240, 12, 1, 0}, 256 + 24}, half, 2},  // the first row 24 bytes in
      {{2, 10, 12}, at256({240, 12, 1, 0}), half, 8},       // one run of 120 elements
      {{2, 10, 12}, at256({242, 12, 1, 0}), half, 2},       // only the samples are misaligned
      {{2, 10, 12}, at256({241, 12, 1, 0}), half, 1},
      {{2, 3, 7}, at256({63, 7, 1, 0}), half, 1},            // a run of 21 elements
      {{2, 4, 7}, {{56, 7, 1, 0}, 256 + 2}, half, 1},        // an odd pointer
      {{3, 5, 768}, at256({6939, 771, 1, 0}), single, 1},    // rows padded by 3
      {{3, 5, 768}, at256({6984, 776, 1, 0}), single, 4},    // rows padded by 8
      {{3, 5, 16}, at256({80, 1, 5, 0}), single, 1},         // transposed
      {{70000, 1, 8}, at256({8, 8, 1, 0}), single, 4},       // more samples than gridDim.y
      {{1, 4000, 4096}, at256({0, 4096, 1, 0}), single, 4},  // more packs than blocks may reduce
  };
  for (const PlanCase& c : plan_cases) {
    const View plain{{c.shape.length * c.shape.dim, c.shape.dim, 1, 0}, 512};
    for (int which = 0; which < 2; ++which) {  // out and in; saved is always plain
      for (const bool backward : {false, true}) {
        float grad_logit = 0;
        PromptGateParams p{};
        p.batch = c.shape.batch, p.length = c.shape.length, p.dim = c.shape.dim;
        p.out = rows_of(which == 0 ? c.odd : plain, c.dtype);
        p.in = rows_of(which == 1 ? c.odd : plain, c.dtype);
        p.saved = rows_of(plain, c.dtype);
        if (backward) p.grad_logit = &grad_logit;
        check_plan(p, c.vector);
      }
    }
  }
  // the pack is one that the kernels of both dtypes have, also where the gradient of x is not
  // wanted
  for (const DType out : {single, half}) {
    for (const DType in : {single, half}) {
      PromptGateParams p{};
      p.batch = 2, p.length = 4, p.dim = 64;
      p.out = rows_of(at256({640, 64, 1, 0}), out);
      p.in.dtype = in, p.rescale = true;
      CHECK(plan_launch(p, true).vector == (out == single && in == single ? 4 : 8), "mixed dtypes");
    }
  }
  // positions beyond 2^31 and 2^32 elements: by the stride, by the run, by a row
  const int64_t big = (int64_t{1} << 33) + 8;
  const Rows wide = rows_of(at256({0, big, 1, 0}), half), run = rows_of(at256({0, 8, 1, 0}), half);
  CHECK(pack_offset({1, 1, 8, 4, 1}, wide, 3) == 3 * big, "row stride");
  CHECK(pack_offset({1, 1, 8, 1, big}, run, big - 1) == (big - 1) * 8, "one run");
  CHECK(pack_offset({1, 1, 8, 2, big}, rows_of(at256({0, 9 * big, 1, 0}), half), big + 5) ==
            9 * big + 40,
        "64-bit division");
}

}  // namespace

int main(int argc, char** argv) {
  const std::map<std::string, std::function<void()>> laws = {
      {"conversions", test_conversions},
      {"gate", test_gate},
      {"update", test_update},
      {"forward", for_each_dtype_pair<Forward>},
      {"backward", for_each_dtype_pair<Backward>},
      {"chunks", test_chunks},
      {"plan", test_plan},
  };
  const auto law = laws.find(argc == 2 ? argv[1] : "");
  if (law == laws.end()) {
    std::printf("usage: test_prompt_gate LAW, one of:");
    for (const auto& [name, function] : laws) std::printf(" %s", name.c_str());
    std::printf("\n");
    return 2;
  }
  law->second();
  std::printf("%s: holds\n", law->first.c_str());
  return 0;
}
