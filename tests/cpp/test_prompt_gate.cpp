// SPDX-License-Identifier: Apache-2.0
// Tests of the torch-free code: arithmetic, CPU kernels on strided data, CUDA launch shape and
// index map. Usage: test_prompt_gate LAW; exit status 0 if the law holds.
#include <limits>

#include "cases.h"

namespace {

// ---- oracles, in double ----

// Decodes a 16-bit float by its definition: sign, `exponent_bits`, the rest is mantissa.
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
  // between neighbours a < b: the midpoint rounds to the even one, other values to the nearer one
  for (uint32_t bits = 0; decode(static_cast<uint16_t>(bits), kExponentBits) < INFINITY; ++bits) {
    const double a = decode(static_cast<uint16_t>(bits), kExponentBits);
    double b = decode(static_cast<uint16_t>(bits + 1), kExponentBits);
    if (std::isinf(b)) b = a + (a - decode(static_cast<uint16_t>(bits - 1), kExponentBits));
    const auto middle = static_cast<float>((a + b) / 2);
    if (static_cast<double>(middle) != (a + b) / 2)
      continue;  // not a float32 (bfloat16 subnormals)
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

// The derivatives that backward uses equal finite differences of update().
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
    const double half = saved_derivative(mix, h, x);
    CHECK(std::fabs(dz - logit_gradient(gate.slope, half, mix)) < 1e-9, "mix=%d", mix);
  }
  const double inf = INFINITY;
  const float large = 3e38f;
  CHECK(saved_derivative(true, large, -large) == large, "the halved difference does not overflow");
  CHECK(update(0.25, inf, 0.75, inf) == inf, "inf mixed with inf is inf");
}

// ---- CPU kernels on strided data, every dtype and gate ----

constexpr double kSubnormal = 0x1p-24;  // step of the subnormal values of float16

// The allowed error of a value of this size that is rounded to the types of the call.
double bound_of(const Call& call, double size) {
  const bool has_half = call.types.out == kF16 || call.types.in == kF16;
  return 4 * (epsilon(call.types.out) + epsilon(call.types.in) + epsilon(kF32)) * size +
         (has_half ? kSubnormal : 0);
}

// Checks that only the elements were written, and nothing at all unless `wanted`.
void check_written(const Tensor& after, const Tensor& before, bool wanted, const char* name) {
  check_untouched(after, before, name);
  CHECK(wanted || after.bytes == before.bytes, "%s was written, unasked", name);
}

void check_forward(const Call& start) {
  Call call = start;
  run_fwd_cpu(call.params(/*backward=*/false));
  for_each_element(call.c.shape, [&](int64_t b, int64_t r, int64_t d) {
    const double h = start.out.at(b, r, d), x = start.in.at(b, r, d);
    double z = start.logit.at(b, r, d), error = 0;
    if (call.linear) {  // a sum of float products
      z = start.grad_bias.at(0, 0, 0);
      for (int64_t k = 0; k < call.c.shape.dim; ++k) {
        const double term = start.out.at(b, r, k) * start.weight.at(0, 0, k);
        z += term, error += std::fabs(term) * 4 * epsilon(kF32);
      }
      CHECK(std::fabs(call.logit.at(b, r, d) - z) <=
                error + epsilon(call.c.gate) * (1 + std::fabs(z)),
            "logit %g, not %g", call.logit.at(b, r, d), z);
      CHECK(call.gathered.at(b, r, d) == h, "gathered");
    }
    const double g = sigmoid(z), w = call.mix ? 1 - g : 1;
    const double size = std::fabs(h) + std::fabs(x), scale = bound_of(call, size) + error * size;
    CHECK(std::fabs(call.out.at(b, r, d) - (g * h + w * x)) <= scale, "[%d,%d,%d]: %g, not %g",
          int(b), int(r), int(d), call.out.at(b, r, d), g * h + w * x);
    if (!call.wants_saved) return;
    CHECK(std::fabs(call.saved.at(b, r, d) - (call.mix ? (h - x) / 2 : h)) <= scale, "saved");
  });
  check_untouched(call.out, start.out, "out");
  CHECK(call.in.bytes == start.in.bytes, "in was written");
  check_written(call.saved, start.saved, call.wants_saved, "saved");
}

void test_forward() {
  for_each_forward(check_forward);
}

void check_backward(const Call& start) {
  Call call = start;
  run_bwd_cpu(call.params(/*backward=*/true));
  Tensor sums(call.logit.shape, call.logit.layout, kF64, 0), sizes = sums;
  for_each_element(sums.shape, [&](int64_t b, int64_t r, int64_t d) {
    for (Tensor* t : {&sums, &sizes}) store(&t->bytes[t->position(b, r, d)], kF64, 0);
  });
  const auto add = [](Tensor& t, int64_t b, int64_t r, int64_t d, double value) {
    store(&t.bytes[t.position(b, r, d)], kF64, t.at(b, r, d) + value);
  };
  std::vector<double> bias(static_cast<size_t>(call.grad_bias.shape.dim)), bias_size = bias;
  for_each_element(call.c.shape, [&](int64_t b, int64_t r, int64_t d) {
    const double c = call.carries ? start.carrier.at(b, r, d) : 0, t = start.out.at(b, r, d) + c;
    const double g = sigmoid(start.logit.at(b, r, d)), w = call.mix ? 1 - g : 1;
    const double scale = bound_of(call, std::fabs(start.out.at(b, r, d)) + std::fabs(c));
    const double term = (call.mix ? 2 : 1) * g * (1 - g) * start.saved.at(b, r, d) * t;
    add(sums, b, r, d, term), add(sizes, b, r, d, std::fabs(term) + scale * epsilon(kF32));
    bias[static_cast<size_t>(d) % bias.size()] += term;
    bias_size[static_cast<size_t>(d) % bias.size()] += std::fabs(term) + scale;
    if (call.rescale) CHECK(std::fabs(call.out.at(b, r, d) - g * t) <= scale, "grad of h");
    if (call.wants_in) CHECK(std::fabs(call.in.at(b, r, d) - w * t) <= scale, "grad of x");
  });
  if (call.wants_saved) {
    for_each_element(sums.shape, [&](int64_t b, int64_t r, int64_t d) {
      const double got = call.grad_logit.at(b, r, d), wanted = sums.at(b, r, d);
      const double subnormal = call.c.gate == kF16 ? kSubnormal : 0;
      const double bound =
          (16 * epsilon(kF32) + epsilon(call.c.gate)) * sizes.at(b, r, d) + subnormal;
      CHECK(std::fabs(got - wanted) <= bound, "grad of logit [%d,%d,%d] %g, not %g", int(b), int(r),
            int(d), got, wanted);
    });
    check_untouched(call.grad_logit, start.grad_logit, "grad of logit");
  }
  for (size_t d = 0; call.biased && d < bias.size(); ++d) {
    const double got = call.grad_bias.at(0, 0, static_cast<int64_t>(d));
    CHECK(std::fabs(got - bias[d]) <= 16 * epsilon(kF32) * bias_size[d], "bias %g, not %g", got,
          bias[d]);
  }
  check_untouched(call.grad_bias, start.grad_bias, "grad of bias");
  check_written(call.out, start.out, call.rescale, "grad");
  check_written(call.in, start.in, call.wants_in, "grad of x");
}

void test_backward() {
  for_each_backward(check_backward);
}

// Any split of the tasks gives the same bits.
void test_tasks() {
  for (const Kind& kind : kKinds) {
    std::vector<Call> calls;
    for (const int64_t step : {1, 3, 1000}) {
      calls.emplace_back(Case{{5, 11, 777}, sequence, compact}, Types{kBF16, kF32}, kind, true,
                         true);
      calls.back().biased = calls.back().is_streamed();
      const PromptGateParams p = calls.back().params(/*backward=*/true);
      CHECK(tasks_of(p).count > 4, "%d tasks", int(tasks_of(p).count));
      run_bwd_cpu(p, step);
    }
    for (const Call& call : calls) {
      CHECK(call.out.bytes == calls[0].out.bytes && call.in.bytes == calls[0].in.bytes, "rows");
      CHECK(call.grad_logit.bytes == calls[0].grad_logit.bytes, "grad of logit");
      CHECK(call.grad_bias.bytes == calls[0].grad_bias.bytes, "grad of bias");
    }
  }
}

// Rows are joined if a sample has one gate and no gaps between its rows.
void test_joined_rows() {
  for (const Kind& kind : kKinds) {
    for (const auto layout : {sequence, padded}) {
      Call call(Case{{2, 10, 512}, layout, compact}, Types{kF32, kF32}, kind, true, true);
      call.carries = true;
      const PromptGateParams p = call.params(/*backward=*/true), joined = join_rows(p);
      const bool may_join = !kind.by_row && !kind.by_channel && layout == sequence;
      CHECK(joined.length == (may_join ? 2 : 10), "%d rows", int(joined.length));
      CHECK(joined.length * joined.dim == p.length * p.dim, "%d elements", int(joined.dim));
      const Rows before[] = {p.h, p.x, p.saved, p.carrier};
      const Rows after[] = {joined.h, joined.x, joined.saved, joined.carrier};
      for (int i = 0; i < 4; ++i) {  // each element stays in place
        for (int64_t k = 0; k < p.length * p.dim; k += 256) {
          const auto at = [&](const PromptGateParams& params, const Rows& rows) {
            return offset_of(rows, {1, k / params.dim}) + k % params.dim * rows.channel_stride;
          };
          CHECK(at(p, before[i]) == at(joined, after[i]), "tensor %d, element %d", i, int(k));
        }
      }
    }
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

// How often the loops of the kernels by packs visit each pack of each sample.
std::vector<int> visits_of(const PromptGateParams& p, const LaunchPlan& plan, bool backward) {
  const int64_t packs = plan.rows * plan.packs_per_row;
  const int64_t threads = plan.threads;
  const int64_t stage = backward ? 1 : kPacksInFlight;
  std::vector<int> visits(static_cast<size_t>(p.batch * packs));
  for (int64_t block = 0; block < plan.grid_x; ++block) {
    for (int64_t first = block * threads * stage; first < packs;
         first += plan.grid_x * threads * stage) {
      for (int64_t index = first; index < smaller(first + threads * stage, packs); ++index) {
        for (int64_t y = 0; y < plan.grid_y; ++y) {
          for (int64_t b = y; b < p.batch; b += plan.grid_y) {
            ++visits[static_cast<size_t>(b * packs + index)];
          }
        }
      }
    }
  }
  return visits;
}

// Checks that every pack of every sample is visited once, and that in each tensor it starts at the
// right element and is aligned.
void check_plan(const PromptGateParams& p, int wanted_vector, bool backward) {
  const LaunchPlan plan = plan_launch(p, backward);
  CHECK(plan.mapping == Mapping::kPacks, "mapping");
  CHECK(plan.vector == wanted_vector, "D=%d: vector %d, not %d", int(p.dim), plan.vector,
        wanted_vector);
  CHECK(plan.grid_x >= 1 && plan.grid_x <= kMaxGridX, "grid_x %d", int(plan.grid_x));
  CHECK(plan.grid_y >= 1 && plan.grid_y <= kMaxGridYZ, "grid_y %d", int(plan.grid_y));
  CHECK(workspace_bytes(p) <= kMaxWorkspaceBytes, "workspace");
  CHECK(!backward || plan.grid_x * plan.grid_y <= 2 * kManyBlocks, "too many partials");
  const int64_t packs = plan.rows * plan.packs_per_row;
  CHECK(packs * plan.vector == p.length * p.dim, "packs tile the sample");
  for (const int count : visits_of(p, plan, backward)) {
    CHECK(count == 1, "a pack is visited %d times", count);
  }
  for (const Rows& rows : {p.h, p.x, p.saved}) {
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
    View odd;  // layout of one tensor; the others are plain
    DType dtype;
    int vector;  // expected
  };
  const auto at256 = [](Layout layout) { return View{layout, 256}; };
  const DType half = DType::kBFloat16, single = DType::kFloat32;
  const std::vector<PlanCase> plan_cases = {
      {{64, 50, 768}, at256({247 * 768, 768, 1, 0}), half, 8},
      {{64, 50, 768}, at256({247 * 768, 768, 1, 0}), single, 4},
      {{64, 50, 768}, at256({247 * 768, 768, 1, 0}), DType::kFloat64, 2},
      {{2, 10, 12}, {{240, 12, 1, 0}, 256 + 24}, half, 2},  // the first row at byte 24
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
    for (int which = 0; which < 2; ++which) {  // h is odd, then x; saved is always plain
      for (const bool backward : {false, true}) {
        float grad_logit = 0;
        PromptGateParams p{};
        p.batch = c.shape.batch, p.length = c.shape.length, p.dim = c.shape.dim;
        p.h = rows_of(which == 0 ? c.odd : plain, c.dtype);
        p.x = rows_of(which == 1 ? c.odd : plain, c.dtype);
        p.saved = rows_of(plain, c.dtype);
        if (backward) p.grad_logit.data = &grad_logit;
        check_plan(p, c.vector, backward);
      }
    }
  }
  // the kernels of both dtypes must have this pack width, even if the gradient of x is not wanted
  for (const DType out : {single, half}) {
    for (const DType in : {single, half}) {
      PromptGateParams p{};
      p.batch = 2, p.length = 4, p.dim = 64;
      p.h = rows_of(at256({640, 64, 1, 0}), out);
      p.x.dtype = in, p.rescale = true;
      CHECK(plan_launch(p, true).vector == (out == single && in == single ? 4 : 8), "mixed dtypes");
    }
  }
  // positions beyond 2^31 and 2^32 elements, by a large stride, a long run, a large row index
  const int64_t big = (int64_t{1} << 33) + 8;
  const Rows wide = rows_of(at256({0, big, 1, 0}), half), run = rows_of(at256({0, 8, 1, 0}), half);
  CHECK(pack_offset({Mapping::kPacks, kThreads, 1, 1, 1, 8, 4, 1}, wide, 3) == 3 * big,
        "row stride");
  CHECK(pack_offset({Mapping::kPacks, kThreads, 1, 1, 1, 8, 1, big}, run, big - 1) == (big - 1) * 8,
        "one run");
  CHECK(pack_offset({Mapping::kPacks, kThreads, 1, 1, 1, 8, 2, big},
                    rows_of(at256({0, 9 * big, 1, 0}), half), big + 5) == 9 * big + 40,
        "64-bit division");
  PromptGateParams many{};
  many.batch = big, many.length = 3;
  const RowIndex row = row_of_segment(many, segments_of(many), 0, 3 * (big - 1) + 2);
  CHECK(row.b == big - 1 && row.p == 2, "rows beyond 2^32");
}

// Each kind of gate has its mapping. Every row of a segment is visited once. Partial sums fit into
// the workspace. Each sum that blocks share has a ticket, and these blocks are in one grid row.
void test_segments() {
  for (const Kind& kind : kKinds) {
    for (const Shape s : {Shape{64, 50, 768}, Shape{256, 200, 768}, Shape{3, 7, 33}, Shape{1, 1, 1},
                          Shape{1500, 2, 8}, Shape{2, 70000, 8}, Shape{70000, 2, 8}}) {
      PromptGateParams p{};
      p.batch = s.batch, p.length = s.length, p.dim = s.dim;
      p.by_sample = kind.by_sample, p.by_row = kind.by_row, p.by_channel = kind.by_channel;
      p.h = rows_of({compact(s), 256}, kBF16), p.x = p.saved = p.h;
      float grad = 0;
      p.grad_logit.data = &grad;
      if (kind.by_sample && kind.by_row) p.grad_bias = &grad;
      const LaunchPlan forward = plan_launch(p, false), plan = plan_launch(p, true);
      context = std::string(kind.name) + " " + std::to_string(s.batch);
      const Mapping own = kind.by_channel ? Mapping::kStrips
                          : kind.by_row   ? Mapping::kRows
                                          : Mapping::kPacks;
      CHECK(forward.mapping == own, "mapping forward");
      const bool by_prompt = own == Mapping::kRows && !kind.by_sample;
      CHECK(plan.mapping == (by_prompt ? Mapping::kPrompts : own), "mapping backward");
      CHECK(workspace_bytes(p) <= kMaxWorkspaceBytes, "workspace");
      const Segments segments = segments_of(p);
      CHECK(segments.count * segments.rows == s.batch * s.length, "rows");
      const int64_t groups = plan.grid_y * plan.grid_z;  // of blocks that share a sum
      CHECK(plan.grid_x == 1 || groups <= kMaxTickets, "%d tickets", int(groups));
      const int64_t sums = own == Mapping::kPacks    ? kind.by_sample ? s.batch : plan.grid_y
                           : by_prompt               ? ceil_div(s.length, kWarps)
                           : own == Mapping::kStrips ? segments.count
                                                     : 1;
      CHECK(plan.grid_x == 1 || plan.grid_y == sums, "a block with a part of a sum has one sum");
      if (own != Mapping::kStrips) continue;
      std::vector<int> visits(static_cast<size_t>(s.batch * s.length));
      for (int64_t segment = 0; segment < segments.count; ++segment) {
        for (int64_t i = 0; i < segments.rows; ++i) {
          const RowIndex row = row_of_segment(p, segments, segment, i);
          ++visits[static_cast<size_t>(row.b * s.length + row.p)];
        }
      }
      for (const int count : visits) CHECK(count == 1, "a row is visited %d times", count);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_law(argc, argv,
                 {
                     {"conversions", test_conversions},
                     {"gate", test_gate},
                     {"update", test_update},
                     {"forward", test_forward},
                     {"backward", test_backward},
                     {"tasks", test_tasks},
                     {"joined_rows", test_joined_rows},
                     {"plan", test_plan},
                     {"segments", test_segments},
                 });
}
