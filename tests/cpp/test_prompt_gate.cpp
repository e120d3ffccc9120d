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
    CHECK(std::fabs(dz - gate.slope * gate_derivative(mix, h, x)) < 1e-9, "mix=%d", mix);
  }
  const double inf = INFINITY;
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
      Buffer<X> x(c.shape, c.in, 2);
      const int64_t row = c.shape.dim;
      Buffer<H> saved(c.shape, {c.shape.length * row, row, 1, 0}, 3);
      PromptGateParams p = make_params<H, X>(c.shape, mix, logit);
      p.out = h.rows(dtype_of<H>()), p.in = x.rows(dtype_of<X>()),
      p.saved = saved.rows(dtype_of<H>());
      prompt_gate_fwd_cpu(p, 0, num_chunks(p));
      std::vector<bool> touched(h.data.size());
      for_each_element(c.shape, [&](int64_t b, int64_t r, int64_t d) {
        const double h_i = before.at(b, r, d), x_i = x.at(b, r, d);
        const double wanted = g * h_i + (mix ? 1 - g : 1) * x_i, difference = mix ? h_i - x_i : h_i;
        const double scale = std::fabs(h_i) + std::fabs(x_i);
        CHECK(std::fabs(h.at(b, r, d) - wanted) <= bound * scale, "[%d,%d,%d]", int(b), int(r),
              int(d));
        CHECK(std::fabs(saved.at(b, r, d) - difference) <= bound * scale, "saved");
        touched[h.position(b, r, d)] = true;
      });
      for (size_t i = 0; i < h.data.size(); ++i) {
        CHECK(touched[i] || std::memcmp(&h.data[i], &before.data[i], sizeof(H)) == 0, "element %zu",
              i);
      }
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
      Buffer<X> grad_in(c.shape, compact, 6);
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
      CHECK(std::fabs(static_cast<double>(grad_logit) - g * (1 - g) * sum) <=
                8 * epsilon<float>() * magnitude,
            "grad of logit %g, not %g", double(grad_logit), g * (1 - g) * sum);
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

// The grid of a plan reaches every element of every sample once, in packs that are aligned.
void test_plan() {
  struct PlanCase {
    Shape shape;
    Layout out;
    uintptr_t address;
    DType dtype;
    int vector;  // wanted
  };
  const auto sequence = [](int64_t n, int64_t d) { return Layout{n * d, d, 1, 0}; };
  const std::vector<PlanCase> plan_cases = {
      {{64, 50, 768}, sequence(247, 768), 256, DType::kBFloat16, 8},
      {{64, 50, 768}, sequence(247, 768), 256, DType::kFloat32, 4},
      {{64, 50, 768}, sequence(247, 768), 256, DType::kFloat64, 2},
      {{2, 10, 12},
       sequence(20, 12),
       256 + 24,
       DType::kBFloat16,
       2},  // rows begin at multiples of 24 bytes
      {{2, 10, 12},
       sequence(20, 12),
       256,
       DType::kBFloat16,
       8},  // one run of 120, samples 480 bytes apart
      {{2, 3, 7}, sequence(9, 7), 256, DType::kBFloat16, 1},         // 21 elements
      {{2, 4, 7}, sequence(8, 7), 256 + 2, DType::kBFloat16, 1},     // odd pointer
      {{3, 5, 768}, {9 * 771, 771, 1, 0}, 256, DType::kFloat32, 1},  // rows padded by 3
      {{3, 5, 768}, {9 * 776, 776, 1, 0}, 256, DType::kFloat32, 4},  // rows padded by 8
      {{3, 5, 16}, {5 * 16, 1, 5, 0}, 256, DType::kFloat32, 1},      // transposed
      {{70000, 1, 8}, sequence(1, 8), 256, DType::kFloat32, 4},      // more samples than gridDim.y
      {{1, 4000, 4096},
       sequence(4000, 4096),
       256,
       DType::kFloat32,
       4},  // more packs than blocks may reduce
  };
  for (const PlanCase& c : plan_cases) {
    for (const bool backward : {false, true}) {
      PromptGateParams p{};
      p.batch = c.shape.batch, p.length = c.shape.length, p.dim = c.shape.dim;
      p.out = {reinterpret_cast<void*>(c.address), c.out.batch, c.out.row, c.out.channel, c.dtype};
      p.in = {reinterpret_cast<void*>(uintptr_t{512}), c.shape.length * c.shape.dim, c.shape.dim, 1,
              c.dtype};
      p.saved = p.in;
      float grad_logit = 0;
      if (backward) p.grad_logit = &grad_logit;
      const LaunchPlan plan = plan_launch(p, backward);
      CHECK(plan.vector == c.vector, "dim %d: vector %d, not %d", int(c.shape.dim), plan.vector,
            c.vector);
      CHECK(plan.grid_x >= 1 && plan.grid_x <= kMaxGridX && plan.grid_y >= 1 &&
                plan.grid_y <= kMaxGridY,
            "grid");
      if (backward)
        CHECK(plan.grid_x * plan.grid_y <= kMaxPartials, "%d partials",
              int(plan.grid_x * plan.grid_y));
      // the loop of the kernel over the packs of one sample
      const int64_t packs = plan.rows * plan.packs_per_row;
      std::vector<int> visits(static_cast<size_t>(packs));
      const int64_t tile = int64_t{kThreads} * kPacksInFlight;
      for (int64_t block = 0; block < plan.grid_x; ++block) {
        for (int64_t thread = 0; thread < kThreads; ++thread) {
          for (int64_t first = block * tile + thread; first < packs; first += plan.grid_x * tile) {
            for (int k = 0; k < kPacksInFlight; ++k) {
              const int64_t index = first + k * kThreads;
              if (index < packs) ++visits[static_cast<size_t>(index)];
            }
          }
        }
      }
      for (const int count : visits) CHECK(count == 1, "a pack is visited %d times", count);
      CHECK(packs * plan.vector == c.shape.length * c.shape.dim, "packs tile the sample");
      // each pack maps to the elements of its rows, at an aligned address
      const int64_t bytes =
          plan.vector * item_size(c.dtype) < 16 ? plan.vector * item_size(c.dtype) : 16;
      for (int64_t index = 0; index < packs; index += packs > 100000 ? 997 : 1) {
        const int64_t element = index * plan.vector, r = element / c.shape.dim,
                      d = element % c.shape.dim;
        const int64_t offset = pack_offset(plan, p.out, index);
        CHECK(offset == r * c.out.row + d * c.out.channel, "pack %d at %d", int(index),
              int(offset));
        CHECK(
            plan.vector == 1 || (c.address + static_cast<uintptr_t>(offset * item_size(c.dtype))) %
                                        static_cast<uintptr_t>(bytes) ==
                                    0,
            "pack %d is misaligned", int(index));
      }
    }
  }
  // the pack size is one that the kernels of both dtypes have, also where the gradient of x is not
  // wanted
  for (const DType out : {DType::kFloat32, DType::kBFloat16}) {
    for (const DType in : {DType::kFloat32, DType::kBFloat16}) {
      PromptGateParams p{};
      p.batch = 2, p.length = 4, p.dim = 64;
      p.out = {reinterpret_cast<void*>(uintptr_t{256}), 640, 64, 1, out};
      p.in.dtype = in, p.rescale = true;
      const int wanted = out == DType::kFloat32 && in == DType::kFloat32 ? 4 : 8;
      CHECK(plan_launch(p, true).vector == wanted, "vector %d", plan_launch(p, true).vector);
    }
  }
  // 64-bit positions: a row stride that carries past 2^31 and 2^32 elements
  PromptGateParams p{};
  p.batch = 1, p.length = 4, p.dim = 8;
  p.out = {reinterpret_cast<void*>(uintptr_t{256}), 0, int64_t{1} << 31, 1, DType::kBFloat16};
  const LaunchPlan plan = plan_launch(p, false);
  CHECK(pack_offset(plan, p.out, 3) == 3 * (int64_t{1} << 31), "64-bit offset");
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
