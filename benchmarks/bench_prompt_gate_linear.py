# SPDX-License-Identifier: Apache-2.0
"""The linear gates of one block (rule "residual") beside their peers, and beside the bare GEMMs
that are their limit: one with bias forward, three in forward + backward.

    pytest benchmarks --benchmark-only

How it is timed: harness.py. gb_per_s leaves weights and GEMMs out.
"""

import pytest
import torch
from harness import DTYPES, MODES, make_inputs, name_of, time_call, time_peer

SHAPES = {"cpu": (8, 50, 768), "cuda": (64, 50, 768)}  # B, P, D
PEERS = ("gated_prompt", "gated_prompt, carrier", "original", "original, compiled")


def group(device, gate, dtype, mode):
    batch, length, _ = SHAPES[device]
    return f"ViT-B B{batch} P{length} {gate} {name_of(dtype)} {mode}"


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("gate", ["linear", "linear-token"])
def test_prompt_gate_linear(benchmark, device, gate, dtype, mode, peer):
    if "carrier" in peer and mode == "forward":
        pytest.skip("a carrier changes the backward")
    benchmark.group = group(device, gate, dtype, mode)
    time_peer(benchmark, device, SHAPES[device], gate, "residual", dtype, mode, peer)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("gate", ["linear", "linear-token"])
def test_bare_gemms(benchmark, device, gate, dtype, mode):
    leaves, _ = make_inputs(gate, *SHAPES[device], dtype, device, compact=True)
    _, x, weight, bias = (t.detach().to(dtype) for t in leaves)
    h, grad = x.flatten(0, 1), torch.randn_like(x[..., : len(weight)]).flatten(0, 1)

    def run():
        torch.nn.functional.linear(h, weight, bias)
        if mode != "forward":
            torch.matmul(grad, weight)
            torch.matmul(grad.T, h)

    benchmark.group = group(device, gate, dtype, mode)
    benchmark.extra_info["peer"] = "bare GEMMs"
    time_call(benchmark, device, tuple, run)
