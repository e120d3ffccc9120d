# SPDX-License-Identifier: Apache-2.0
"""The gate of one block beside its peers: forward, and forward + backward.

    pytest benchmarks --benchmark-only

Each row's extra_info has `gb_per_s`: the bytes that the gate must move (ops.launch_plan; a peer
that moves more is not credited for it) over the median time. How it is timed: harness.py.
"""

import pytest
from harness import DTYPES, MODES, name_of, time_peer
from peers import PEERS

CASES = {  # name: (device, (B, P, D), gate, rule); ViT-B/16 and ViT-S/16 at 224 px
    "ViT-B B8 P50 scalar": ("cpu", (8, 50, 768), "scalar", "mix"),
    "ViT-S B8 P10 scalar": ("cpu", (8, 10, 384), "scalar", "mix"),
    "ViT-B B8 P50 channel": ("cpu", (8, 50, 768), "channel", "mix"),
    "ViT-B B8 P50 token": ("cpu", (8, 50, 768), "token", "residual"),
    "ViT-B B8 P50 sample": ("cpu", (8, 50, 768), "sample", "mix"),
    "ViT-B B8 P50 full": ("cpu", (8, 50, 768), "full", "residual"),
    "ViT-B B256 P10 scalar": ("cuda", (256, 10, 768), "scalar", "mix"),
    "ViT-B B256 P50 scalar": ("cuda", (256, 50, 768), "scalar", "mix"),
    "ViT-B B256 P200 scalar": ("cuda", (256, 200, 768), "scalar", "mix"),
    "ViT-B B64 P50 scalar": ("cuda", (64, 50, 768), "scalar", "mix"),
    "ViT-B B64 P50 channel": ("cuda", (64, 50, 768), "channel", "mix"),
    "ViT-B B64 P50 token": ("cuda", (64, 50, 768), "token", "residual"),
    "ViT-B B64 P50 sample": ("cuda", (64, 50, 768), "sample", "mix"),
    "ViT-B B64 P50 full": ("cuda", (64, 50, 768), "full", "residual"),
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES)
def test_prompt_gate(benchmark, device, case, dtype, mode, peer):
    where, shape, gate, rule = CASES[case]
    if where != device:
        pytest.skip(f"a shape for {where}")
    if "carrier" in peer and mode == "forward":
        pytest.skip("a carrier changes the backward")
    benchmark.group = f"{case} {name_of(dtype)} {mode}"
    time_peer(benchmark, device, shape, gate, rule, dtype, mode, peer)
