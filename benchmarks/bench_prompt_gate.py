# SPDX-License-Identifier: Apache-2.0
"""The gate of one block beside its peers.

    pytest benchmarks/bench_prompt_gate.py --benchmark-only [flags of shapes.py] [--all-peers]

how: "chain", in a chain of blocks (gates.Chain), beside the same chain without gates: over_us is
what a gate costs where it is used, the figure that counts; "alone", one gate after the other
(gates.Alone), beside ours: ratio is how many times longer a peer takes. On CUDA both also as CUDA
graphs; alone, buffers rotate beyond four times the L2 (l2: "cold") or, where 256 of them are too
small for that, do not ("warm").

gb_per_s: the bytes that the gate must move over the time that a row takes alone; a peer that moves
more is not credited for it. How anything is timed: harness.py.
"""

import functools

import pytest
from gates import Alone, Chain, Copy, Gemms, bytes_moved, l2_bytes
from harness import PASSES, Graphed, label, race, timed_here
from peers import COMPILED, PEERS
from shapes import BATCH, chosen

HOWS = ("chain", "alone", "chain, graph", "alone, graph")
EXTRA_PEERS = {"chain": ("no gate", "no gate, compiled"), "alone": ("device copy", "bare GEMMs")}
QUICK_PEERS = (
    *("gated_prompt", "gated_prompt, carrier", "triton", "original"),
    *("original, compiled", "slice_scatter, compiled", "no gate", "device copy", "bare GEMMs"),
)
pytestmark = timed_here


def rows(config, suite):
    """(device, case, how, peer) of a suite."""
    for case in chosen(config, suite):
        for how in HOWS:
            if "graph" in how and case.device == "cpu":
                continue
            for peer in (*PEERS, *EXTRA_PEERS[how.split(",")[0]]):
                if runs(case, how, peer) and (
                    config.getoption("all_peers") or by_default(case, how, peer)
                ):
                    yield case.device, case, how, peer


def runs(case, how, peer):
    is_linear = case.gate.startswith("linear")
    if peer == "bare GEMMs":
        return is_linear
    if peer == "triton":
        return case.device == "cuda" and not is_linear
    if peer.startswith("where"):
        return case.gate != "full"
    return True


def by_default(case, how, peer):
    """All rows of one case, the scalar gate of ViT-B; fewer of the others: it is compiling that
    takes most of the time, and Triton's tuning."""
    if case.gate == "scalar" and (case.batch, case.prompts) == (BATCH[case.device], 50):
        return not peer.endswith("autotune") or case.device == "cuda"
    if case.device == "cuda":
        return "graph" in how and peer in QUICK_PEERS
    if "chain" in how:
        return case.gate == "scalar" and not peer.endswith(tuple(COMPILED))
    return peer in (*QUICK_PEERS, "slice assignment", "slice_scatter")


def parametrize(metafunc, suite):
    names = ("device", "case", "how", "peer")
    found = list(rows(metafunc.config, suite))
    metafunc.parametrize(names, found, indirect=["device"], ids=str)


def pytest_generate_tests(metafunc):
    parametrize(metafunc, "prompt_gate")


@functools.lru_cache(maxsize=2)
def make(case, how, peer):
    if peer in ("device copy", "bare GEMMs"):
        work = {"device copy": Copy, "bare GEMMs": Gemms}[peer](case)
    else:
        work = (Chain if "chain" in how else Alone)(case, peer)
    return Graphed(work) if "graph" in how else work


def rival_of(how, peer):
    if "chain" not in how:
        return "gated_prompt"
    return "no gate" + next((mode for mode in COMPILED if peer.endswith(mode)), "")


@pytest.mark.parametrize("which", PASSES)
def test_prompt_gate(request, benchmark, device, case, how, peer, which):
    suite = "linear" if case.gate.startswith("linear") else "gate"
    label(benchmark, suite=suite, case=case, how=how, which=which, peer=peer)
    rival, work = make(case, how, rival_of(how, peer)), make(case, how, peer)
    if peer.startswith("slice assignment,") and "alone" in how:
        reason = "compiled, the gate's gradient is that of the rows after they were overwritten"
        request.applymarker(pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True))
    median = race(benchmark, work, rival, which)
    if "alone" in how:
        moved = bytes_moved(case)[which]
        benchmark.extra_info["bytes"] = moved
        benchmark.extra_info["gb_per_s"] = moved / median / 1e9
        if device == "cuda":
            is_cold = work.calls * moved > 4 * l2_bytes()
            benchmark.extra_info["l2"] = "cold" if is_cold else "warm"
