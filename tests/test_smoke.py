# SPDX-License-Identifier: Apache-2.0
"""Compares the raw ops with float64, in seconds. Runs first on a GPU, and in compute-sanitizer.

Outputs are filled with NaN before the kernels write them, so an element that is not written shows.
A sanitizer can run the tests with "small" in their name or id: no captured graph, no large case.
"""

import itertools

import pytest
import torch

import gated_prompt as gp
from gated_prompt import autograd, ops

SHAPES = {  # of the logit, for B, P, D
    "scalar": lambda b, p, d: (),
    "channel": lambda b, p, d: (d,),
    "token": lambda b, p, d: (p, 1),
    "sample": lambda b, p, d: (b, 1, 1),
    "row": lambda b, p, d: (b, p, 1),
    "token-channel": lambda b, p, d: (p, d),
    "sample-channel": lambda b, p, d: (b, 1, d),
    "full": lambda b, p, d: (b, p, d),
}
START = 1
SIZES = {  # B, N, D, P
    "small": (4, 61, 768, 50),
    "small-odd": (3, 9, 33, 4),
    "small-tiny": (2, 7, 12, 3),
    "large": (64, 247, 768, 50),
    "many-samples": (2100, 5, 64, 3),
}
STEP = SIZES["large"]
CONCURRENT = ("scalar", "sample", "token", "channel", "full")
cuda_only = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)])


@pytest.fixture(autouse=True)
def _filled_with_nan():
    """In deterministic mode, torch fills what new_empty returns with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_near(name, got, exact, terms, eps):
    """Asserts an error of at most 8 eps of the sum of the terms' absolute values, plus the absolute
    rounding error of subnormal numbers."""
    error, of = (got.double() - exact).abs(), torch.finfo(got.dtype)
    bad = ~(error <= 8 * eps * terms + of.smallest_normal * of.eps)
    assert not bad.any(), f"{name}: {int(bad.sum())} of {bad.numel()} off by up to {error.max():g}"


class Gate:
    """Random inputs of a gate; activations start `offset` elements after an aligned address."""

    def __init__(self, kind, size, dtype, mix, device, offset=0):
        self.batch, self.num_tokens, self.dim, self.length = size
        self.dtype, self.mix, self.device, self.offset = dtype, mix, device, offset
        self.rows = slice(START, START + self.length)
        prompts = self.batch, self.length, self.dim
        self.h, self.grad = (self.randn(self.batch, self.num_tokens, self.dim) for _ in range(2))
        self.x, self.carrier = (self.randn(*prompts) for _ in range(2))
        self.logit = torch.randn(SHAPES[kind](self.batch, self.length, self.dim), device=device)
        self.has_bias = kind in ("full", "row")

    def randn(self, *shape):
        count = torch.Size(shape).numel()
        values = torch.randn(self.offset + count, device=self.device).to(self.dtype)
        return values[self.offset :].view(shape)

    def forward(self):
        """Returns (sequence, saved)."""
        out = self.h.clone()
        saved = ops.prompt_gate_fwd_(out, self.x, self.logit, START, self.length, self.mix, True)
        return out, saved

    def backward(self, saved):
        """Returns the gradients of sequence, x, logit and, if has_bias, a linear gate's bias."""
        grad, rows = self.grad.clone(), (START, self.length, self.mix)
        wanted = (True, True, True, self.has_bias)
        found = ops.prompt_gate_bwd_(
            grad, saved, self.logit, self.carrier, *rows, *wanted, self.dtype
        )
        return grad, *found

    def check(self, repeats):
        """Compares results with float64, and the bits of gradients over `repeats` more runs.

        Returns (saved, gradients).
        """
        eps, rows = torch.finfo(self.dtype).eps, self.rows
        h, x, z = self.h[:, rows].double(), self.x.double(), self.logit.double()
        of_out = self.grad[:, rows].double() + self.carrier.double()
        g = z.sigmoid()
        of_x = 1 - g if self.mix else torch.ones_like(g)
        out, saved = self.forward()
        assert_near("out", out[:, rows], g * h + of_x * x, g * h.abs() + of_x * x.abs(), eps)
        assert_near("saved", saved, (h - x) / 2 if self.mix else h, h.abs() + x.abs(), eps)
        gradients = grad, grad_x, grad_logit, grad_bias = self.backward(saved)
        assert_near("grad of h", grad[:, rows], g * of_out, g * of_out.abs(), eps)
        assert_near("grad of x", grad_x, of_x * of_out, of_x * of_out.abs(), eps)
        outside = torch.ones(self.num_tokens, dtype=torch.bool, device=self.device)
        outside[rows] = False
        assert torch.equal(out[:, outside], self.h[:, outside])
        assert torch.equal(grad[:, outside], self.grad[:, outside])
        terms = (2 if self.mix else 1) * g * (1 - g) * saved.double() * of_out
        sums = terms.sum_to_size(z.shape), terms.abs().sum_to_size(z.shape)
        assert_near("grad of the logit", grad_logit, *sums, 1e-6)
        if self.has_bias:
            wanted, scale = (t.sum((0, 1)).view(grad_bias.shape) for t in sums)
            assert_near("grad of the bias", grad_bias, wanted, scale, 1e-6)
        for _ in range(repeats):
            assert_same(self.backward(saved), gradients)
        return saved, gradients


def assert_same(found, wanted):
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), "the bits differ"


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_products_are_not_shortened(dtype, accuracy, device):
    """torch's matmul, with which results are compared, uses no TF32, whose products are exact to
    only 5e-4, and no partial sums in 16 bits."""
    a, b = (torch.randn(2, 512, 4096, device=device).abs() + 1).to(dtype)  # nothing cancels
    exact = a.double() @ b.double().T
    assert ((a @ b.T).double() - exact).abs().max() <= accuracy * exact.max()
    matmul = torch.backends.cuda.matmul
    assert not matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not matmul.allow_fp16_reduced_precision_reduction


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", SHAPES)
def test_raw_ops(kind, size, device):
    is_small = size.startswith("small")
    dtypes = [torch.bfloat16, torch.float32] + [torch.float16] * (not is_small)
    rules_and_offsets = itertools.product((True, False), (0, 3)) if is_small else [(True, 0)]
    for dtype, (mix, offset) in itertools.product(dtypes, rules_and_offsets):
        repeats = 20 if device.type == "cuda" and not is_small else 2
        Gate(kind, SIZES[size], dtype, mix, device, offset).check(repeats)


def test_small_scaled_dot(device):
    a, b = torch.randn(2, 8, 61, 12, 64, device=device).bfloat16()
    tau = torch.tensor(1.3, device=device)
    terms = -a.double() * b.double() / tau.double()
    assert_near("dot", ops.scaled_dot(a, b, tau), terms.sum(), terms.abs().sum(), 1e-7)


def test_small_divide_rows(device):
    weight, bias = torch.randn(96, 32, device=device), torch.randn(96, device=device)
    tau = torch.tensor(1.3, device=device)
    new, new_bias, _ = ops.divide_rows(weight, bias, tau, 32, 0.01, 10.0, torch.bfloat16)
    for found, given in ((new, weight), (new_bias, bias)):
        assert torch.equal(found[:32], (given[:32] / tau).bfloat16())
        assert torch.equal(found[32:], given[32:].bfloat16())


def test_small_linear_token(device):
    gate = Gate("scalar", SIZES["small"], torch.bfloat16, True, device)
    weight, out = torch.randn(gate.dim, device=device) / gate.dim**0.5, gate.h.clone()
    rows = (START, gate.length, True)
    logit, *_ = ops.prompt_gate_linear_token_fwd_(
        out, gate.x, weight, None, *rows, True, True, True
    )
    h, weight = gate.h[:, gate.rows].double(), weight.double()
    assert_near("logit", logit[..., 0], h @ weight, h.abs() @ weight.abs(), 1e-6)
    g, x = (h @ weight).sigmoid()[..., None], gate.x.double()
    terms = g * h.abs() + (1 - g) * x.abs()
    assert_near("out", out[:, gate.rows], g * h + (1 - g) * x, terms, torch.finfo(gate.dtype).eps)


# ---- work that overlaps on a GPU only ----


@cuda_only
@pytest.mark.parametrize("kind", CONCURRENT)
def test_streams_that_overlap(kind, device):
    gate = Gate(kind, STEP, torch.bfloat16, True, device)
    saved, wanted = gate.check(repeats=0)
    torch.use_deterministic_algorithms(False)
    results = []
    torch.cuda.synchronize()
    for stream in [torch.cuda.Stream() for _ in range(4)]:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)
            results += [gate.backward(saved) for _ in range(10)]
    torch.cuda.synchronize()
    for found in results:
        assert_same(found, wanted)


@cuda_only
@pytest.mark.parametrize("kind", CONCURRENT)
def test_replays_of_a_graph(kind, device):
    """Also replays back to back, while another stream launches the same kernels."""
    gate = Gate(kind, STEP, torch.bfloat16, True, device)
    saved, wanted = gate.check(repeats=0)
    torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        captured = gate.backward(saved)
    for _ in range(4):
        for _ in range(50):
            for tensor in captured:
                tensor.fill_(torch.nan)
            graph.replay()
        assert_same(captured, wanted)
    for _ in range(50):
        graph.replay()
    with torch.cuda.stream(stream):
        beside = [gate.backward(saved) for _ in range(10)]
    torch.cuda.synchronize()
    for found in [captured, *beside]:
        assert_same(found, wanted)


def test_gradients_are_written_in_place(device, monkeypatch):
    """A backward that copied its gradient would copy a [B, N, D] tensor for each gate.

    Not a "small" test: under compute-sanitizer Python's frames stay alive and keep references to
    a gradient, which is then copied.
    """
    found, real = [], autograd.is_reusable
    monkeypatch.setattr(autograd, "is_reusable", lambda *a: found.append(real(*a)) or found[-1])
    torch.use_deterministic_algorithms(False)
    gates = [gp.PromptGate("scalar", dim=64, num_prompts=5, init=0.3).to(device) for _ in range(2)]
    x = torch.randn(2, 9, 64, device=device, requires_grad=True)
    h = x + 0
    for gate in gates:
        h = gate(h, x.detach(), START, 5) + 0
    (h * torch.randn_like(h)).sum().backward()
    assert found == [True, True]
