# SPDX-License-Identifier: Apache-2.0
"""Attention with a learnable temperature, compared with attention without one, on every backend.

    pytest benchmarks/bench_attention.py --benchmark-only [flags of shapes.py] [--all-peers]

what: "kernel" is q, k, v [B, N, H, d] -> [B, N, H, d]; "layer" is timm's frozen Attention with its
projections, x [B, N, D] -> [B, N, D]. ratio is relative to torch's SDPA without a temperature for a
kernel, and to timm's layer on SDPA for a layer. tflop_per_s counts only matrix products. A backend
that can't run is skipped with the reason. --all-peers adds the compiled layers on CUDA.
"""

import contextlib
import copy
import functools
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from harness import PASSES, Work, assert_near, check, label, race, timed_here
from peers import COMPILED, compiled
from shapes import MODELS, chosen
from torch.nn.attention import SDPBackend, sdpa_kernel
from vit_peers import attention

from gated_prompt.temperature import tempered_attention, unavailable_reason
from gated_prompt.tempering import Temperatures, Tempering
from gated_prompt.vit import shortcuts

pytestmark = timed_here


def sdpa(q, k, v, backend=None):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def explicit(q, k, v, tau=1.0):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 / tau).softmax(dim=-1)
    return (weights @ v).transpose(1, 2)


def xformers(q, k, v):
    import xformers.ops

    return xformers.ops.memory_efficient_attention(q, k, v)


def gated_prompt(backend):
    return functools.partial(tempered_attention, backend=backend)


KERNELS = {  # name: (function of q, k, v and tau, whether it has the temperature)
    "sdpa": (sdpa, False),
    "sdpa flash": (functools.partial(sdpa, backend=SDPBackend.FLASH_ATTENTION), False),
    "sdpa efficient": (functools.partial(sdpa, backend=SDPBackend.EFFICIENT_ATTENTION), False),
    "sdpa cudnn": (functools.partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION), False),
    "xformers": (xformers, False),
    "original": (explicit, True),
    "gated_prompt sdpa": (gated_prompt("sdpa"), True),
    "gated_prompt xformers": (gated_prompt("xformers"), True),
}


class Kernel(Work):
    """Attention on q, k and v."""

    flop_backward = 2.5  # relative to forward

    def __init__(self, case, peer):
        super().__init__(case, peer)
        batch, num_tokens, dim = case.size
        size = (batch, num_tokens, 3, MODELS[case.model][2], -1)
        packed = self.randn(batch, num_tokens, 3 * dim).view(size)  # like a projection's output
        self.function, has_tau = KERNELS[peer]
        self.leaves = [t.detach().requires_grad_() for t in packed.unbind(2)]
        if has_tau:
            self.leaves.append(torch.tensor(1.2, device=self.device, requires_grad=True))
        self.gradient = self.randn(batch, num_tokens, dim).view_as(self.leaves[0])
        self.flop = 4 * batch * num_tokens**2 * dim

    def forward(self):
        self.result = self.function(*self.leaves)

    def backward(self):
        self.gradients = torch.autograd.grad(self.result, self.leaves, self.gradient)

    def verify(self):
        found = []
        for dtype in (self.case.torch_dtype, torch.float64):
            leaves = [t.detach().to(dtype).requires_grad_() for t in self.leaves]
            result = self.plain(*leaves)
            gradients = torch.autograd.grad(result, leaves, self.gradient.to(dtype))
            found.append([result, result, *gradients])
        for group in zip([self.inferred, self.result, *self.gradients], *found, strict=True):
            # the temperature's gradient is float32, but sums values that have the case's dtype
            assert_near(*group, torch.finfo(self.case.torch_dtype).eps)

    def plain(self, *leaves):
        return explicit(*leaves)


class Layer(Kernel):
    """timm's frozen Attention on x."""

    def __init__(self, case, peer):
        Work.__init__(self, case, peer)
        batch, num_tokens, dim = case.size
        torch.manual_seed(0)
        attn = timm.layers.Attention(dim, MODELS[case.model][2], qkv_bias=True)
        self.attn = attn.to(self.device, case.torch_dtype).requires_grad_(False).eval()
        self.leaves = [self.randn(*case.size).requires_grad_()]
        peer, _, how = peer.partition(",")
        if peer == "timm":
            function = self.attn
        elif peer == "original":
            self.leaves.append(torch.tensor(1.2, device=self.device, requires_grad=True))
            function = functools.partial(attention, self.attn)
        else:
            backend = peer.split()[1]
            temperatures = Temperatures(1, self.device)
            torch.nn.init.constant_(temperatures[0], 1.2)
            tempering = Tempering(self.attn, temperatures, 0)

            def function(x):
                return shortcuts.attention(self.attn, x, None, None, tempering, backend)

            self.leaves.append(temperatures[0])
        self.function = compiled(function, COMPILED.get(f",{how}"))
        self.takes_tau = peer == "original"
        self.gradient = self.randn(*case.size)
        self.flop = 4 * batch * num_tokens**2 * dim + 8 * batch * num_tokens * dim**2
        # frozen projections compute only the gradient of their input
        backward = 10 * batch * num_tokens**2 * dim + 8 * batch * num_tokens * dim**2
        self.flop_backward = backward / self.flop

    def forward(self):
        self.result = self.function(*self.leaves[: 1 + self.takes_tau])

    def plain(self, x, tau=1.0):
        attn = copy.deepcopy(self.attn).to(x.dtype)
        if isinstance(attn.q_norm, Tempering):
            attn.q_norm.leave()
        return attention(attn, x, torch.as_tensor(tau, dtype=x.dtype, device=x.device))


WORKS = {"kernel": Kernel, "layer": Layer}
ROWS = [
    *(("kernel", peer) for peer in KERNELS),
    *(
        ("layer", peer)
        for peer in ("timm", "original", "gated_prompt sdpa", "gated_prompt xformers")
    ),
    *(("layer", f"{peer}, compiled") for peer in ("timm", "original", "gated_prompt sdpa")),
]
RIVALS = {"kernel": "sdpa", "layer": "timm"}
# Messages of torch, xformers and gated_prompt about a backend that can't run here. Any other error
# fails the test.
CANT_RUN = re.compile(
    "can't run|No available kernel|No viable backend|No operator found|[Nn]o valid execution plan"
)


def pytest_generate_tests(metafunc):
    rows = [
        (case.device, case, what, peer)
        for case in chosen(metafunc.config, "attention")
        for what, peer in ROWS
        if case.device == "cpu" or "compiled" not in peer or metafunc.config.getoption("all_peers")
    ]
    arguments = ("device", "case", "what", "peer")
    metafunc.parametrize(arguments, rows, indirect=["device", "case"], ids=str)


@functools.lru_cache(maxsize=2)
def make(case, what, peer):
    return WORKS[what](case, peer)


def names(case, what, which, peer):
    """Returns the fields that identify a row in the results."""
    return {"suite": "attention", "case": case.shape, "how": what, "which": which, "peer": peer}


@pytest.mark.parametrize("which", PASSES)
def test_attention(benchmark, device, case, what, peer, which):
    label(benchmark, **names(case, what, which, peer))
    if "xformers" in peer and unavailable_reason("xformers"):
        pytest.skip(unavailable_reason("xformers"))
    rival = RIVALS[what] + ", compiled" * peer.endswith(", compiled")
    rival, work = make(case, what, rival), make(case, what, peer)
    try:
        check(work)
    except RuntimeError as error:
        if not CANT_RUN.search(str(error)):
            raise
        pytest.skip(f"{peer}: {str(error).splitlines()[0]}")
    median = race(benchmark, work, rival, which)
    parts = {"forward": 1, "backward": work.flop_backward}
    parts["forward+backward"] = 1 + work.flop_backward
    benchmark.extra_info["tflop_per_s"] = work.flop * parts[which] / median / 1e12
