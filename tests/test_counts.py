# SPDX-License-Identifier: Apache-2.0
"""Compares the counts on the meta device (docs/counts.md) with real steps and with formulas."""

import functools
import sys
from pathlib import Path

import pytest
import torch
from conftest import timm_or_skip

timm_or_skip()

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import counts
import shapes
import vit_peers
from gates import bytes_moved

ARCH, DEPTH, D, N, P = "vit_tiny_patch16_224", 3, 192, 1 + 4 + 196, 4
of_step = functools.partial(counts.count, arch=ARCH, pixels=224, prompts=P, batch=1, depth=DEPTH)


@pytest.mark.parametrize("name", counts.ROWS)
def test_meta_keeps_the_bytes_that_a_real_step_keeps(name):
    found = of_step(name)["saved_bytes"]
    model = vit_peers.make(name, ARCH, P, depth=DEPTH).to(torch.bfloat16).train()
    real = counts.saved_bytes(model, torch.randn(1, 3, 224, 224, dtype=torch.bfloat16))[0]
    assert found == pytest.approx(real, rel=0.01)


def test_flop_of_vpt_are_those_of_the_formula():
    """A block needs 24 N D^2 + 4 N^2 D forward, and 24 N D^2 + 10 N^2 D backward since there are no
    gradients of weights. The patch embedding is one GEMM; the head is a GEMM in each direction."""
    block = 48 * N * D**2 + 14 * N**2 * D
    patches, head = 2 * 196 * 768 * D, 6 * D * vit_peers.NUM_CLASSES
    flop = of_step("vpt-shallow")["flop"]
    assert flop == pytest.approx(DEPTH * block + patches + head, rel=1e-3)


def test_backward_of_the_folded_projection_is_counted():
    """Our model runs the same products as VPT, some of them with addmm_, which torch's counter does
    not know."""
    vpt, ours = (of_step(name)["flop"] for name in ("vpt-shallow", "gated_prompt, all rows"))
    assert ours == pytest.approx(vpt, rel=1e-3)


def test_traffic_of_single_ops():
    a, b = torch.empty(4, 8, device="meta"), torch.empty(8, device="meta")
    with counts._Traffic() as traffic:
        a.view(32)[1:].expand(2, 31)  # moves nothing
        torch.empty(100, device="meta")
        a + b.expand(4, 8)
        a.add_(1)
    assert (traffic.kernels, traffic.bytes) == (2, (32 + 8 + 32 + 32 + 32) * 4)


def test_gates_move_what_their_plan_says():
    import gated_prompt as gp

    h, x, logit = (torch.empty(size, device="meta") for size in ((2, 9, 16), (2, 9, 16), ()))
    with counts._Traffic() as traffic:
        gp.prompt_gate_(h, x, logit, 1, 3)
    assert (traffic.kernels, traffic.bytes) == (1, 3 * 2 * 3 * 16 * 4 + 4)


def test_bytes_of_a_gate_alone_are_those_of_both_passes():
    case = shapes.Case("cpu", 2, "ViT-S/16", 32, prompts=3)
    ours = bytes_moved(case)["forward+backward"]
    assert counts.gate_bytes(case, "gated_prompt, carrier") == ours
    sequence, rows = 2 * 8 * 384 * 4, 2 * 3 * 384 * 4
    # slice_backward reads the gradient of block_in's rows and writes a [B, N, D] one
    assert counts.gate_bytes(case, "gated_prompt") == ours + sequence + rows
