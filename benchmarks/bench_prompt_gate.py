# SPDX-License-Identifier: Apache-2.0
"""The gate of one block beside its peers: forward, and forward + backward.

    pytest benchmarks --benchmark-only

Each row's extra_info has `gb_per_s`: the bytes that the gate must move (ops.launch_plan; a peer
that moves more is not credited for it) over the median time. block_out has just been written, as
after a block, so small sizes sit in cache. No result is timed that is not first compared with the
float64 reference.
"""

import contextlib

import pytest
import torch
from peers import PEERS, make_peer

from gated_prompt import ops, reference

try:
    from nvtx import annotate
except ModuleNotFoundError:  # ranges are for profilers; the numbers do not need them
    annotate = contextlib.nullcontext

# ViT-B/16 at 224 px: 1 class token, P prompts, 196 patches
SHAPES = {  # name: (device, batch, P, D)
    "ViT-B B8 P50": ("cpu", 8, 50, 768),
    "ViT-S B8 P10": ("cpu", 8, 10, 384),
    "ViT-B B64 P50": ("cuda", 64, 50, 768),
    "ViT-B B256 P10": ("cuda", 256, 10, 768),
    "ViT-B B256 P50": ("cuda", 256, 50, 768),
    "ViT-B B256 P200": ("cuda", 256, 200, 768),
}


def make_inputs(batch, length, dim, dtype, device):
    generator = torch.Generator().manual_seed(0)
    size = (batch, 197 + length, dim)
    h, x, grad = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(3))
    logit = torch.tensor(-0.5, device=device)
    return [t.requires_grad_() for t in (h, x, logit)], grad


def check(gate, leaves, grad, length):
    """Value and gradients within the rounding of the dtype, so that no wrong result is timed."""
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wanted = reference.prompt_gate(*exact, 1, length)
    wanted_grads = torch.autograd.grad(wanted, exact, grad.double())
    h, x, logit = leaves
    got = gate(h + 0, x, logit, 1, length)
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), wanted, rtol=4 * eps, atol=8 * eps)
    for a, b in zip(torch.autograd.grad(got, leaves, grad), wanted_grads, strict=True):
        error = (a.double() - b).norm() / b.norm()
        assert error < 8 * eps, f"relative error {error:.3g}"


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_prompt_gate(benchmark, device, shape, dtype, mode, peer):
    where, batch, length, dim = SHAPES[shape]
    if where != device:
        pytest.skip(f"a shape for {where}")
    gate = make_peer(peer)
    leaves, grad = make_inputs(batch, length, dim, dtype, device)
    check(gate, leaves, grad, length)
    h, x, logit = leaves
    backward = mode != "forward"
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def setup():
        # a non-leaf with a cheap backward, as block outputs are
        fresh = h + 0 if backward else h.detach().clone()
        synchronize()
        return (fresh,), {}

    def run(fresh):
        with annotate(f"prompt_gate/{peer}/{mode}/{shape}/{dtype}"):
            if backward:
                torch.autograd.grad(gate(fresh, x, logit, 1, length), leaves, grad)
            else:
                with torch.no_grad():
                    gate(fresh, x, logit, 1, length)
            synchronize()

    benchmark.group = f"{shape} {str(dtype).removeprefix('torch.')} {mode}"
    benchmark.pedantic(run, setup=setup, rounds=200, warmup_rounds=20)
    size = {"batch": batch, "num_tokens": 197 + length, "dim": dim, "length": length}
    size["dtype"] = str(dtype).removeprefix("torch.")
    moved = ops.launch_plan(**size, save=backward)["bytes_moved"]
    if backward:
        moved += ops.launch_plan(**size, backward=True)["bytes_moved"]
    benchmark.extra_info["bytes"] = moved
    if benchmark.stats is not None:  # None where benchmarking is disabled
        benchmark.extra_info["gb_per_s"] = moved / benchmark.stats.stats.median / 1e9
