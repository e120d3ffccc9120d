# SPDX-License-Identifier: Apache-2.0
"""The gate of one block, compared with its peers. Linear gates are also compared with the GEMMs
that they must run: one with a bias in forward, two in backward.

    pytest benchmarks/bench_prompt_gate.py --benchmark-only [flags of shapes.py] [--all-peers]

how, also as CUDA graphs on CUDA:
  "chain"  gates in a chain of blocks (gates.Chain), compared with the same chain without gates.
           over_us is the time that one gate adds where it is used: the most important figure.
  "alone"  gates one after the other (gates.Alone), compared with ours: ratio is a peer's time
           divided by our time. On CUDA, "forward, saving" is forward with the tensors that
           backward needs, and the calls rotate through buffers of more than four times the L2
           (l2: "cold"), unless 256 buffers are too small for that (l2: "warm").

gb_per_s, for "alone", is the bytes that the gate must move divided by the time of the row. A peer
that moves more bytes gets no credit for them. harness.py explains the timing.
"""

import functools
import importlib.util

import pytest
from gates import Alone, Chain, Copy, Gemms, QuackSoftmax, bytes_moved, l2_bytes
from harness import PASSES, TRAINING, Graphed, label, race, timed_here
from peers import COMPACT, COMPILED, OUT_OF_PLACE, PEERS, QUACK, TWO_CARRIERS
from shapes import CALL, DEFAULT, chosen

HOWS = ("chain", "alone", "chain, graph", "alone, graph")
LIMITS = {"device copy": Copy, "bare GEMMs": Gemms, QUACK: QuackSoftmax}
EXTRA_PEERS = {"chain": ("no gate", "no gate, compiled"), "alone": tuple(LIMITS)}
QUICK_COMPILED = tuple(f"{form}, compiled" for form in (OUT_OF_PLACE, "original", "slice_scatter"))
QUICK_PEERS = (
    *("gated_prompt", *COMPACT, "triton", "original", *QUICK_COMPILED),
    *("no gate", "device copy", "bare GEMMs"),
)
LIMIT_PEERS = (TWO_CARRIERS, "device copy")
GOAL_PEERS = (
    *(*LIMIT_PEERS, QUACK, "bare GEMMs", "gated_prompt, carrier", "triton", "triton, rows"),
    *("original", "original, compiled"),
)
pytestmark = timed_here


def rows(config):
    """Yields (device, case, how, peer, which)."""
    for case in (*chosen(config, "prompt_gate"), *chosen(config, "prompt_gate_linear")):
        for how in HOWS:
            if "graph" in how and case.device == "cpu":
                continue
            for peer in (*PEERS, *EXTRA_PEERS[how.split(",")[0]]):
                if not runs(case, how, peer):
                    continue
                if config.getoption("all_peers") or by_default(case, how, peer):
                    for which in passes(config, case, how):
                        yield case.device, case, how, peer, which


def passes(config, case, how):
    if case.device == "cpu" or "chain" in how:
        return PASSES
    return ("forward", *TRAINING) if config.getoption("all_peers") else TRAINING


def runs(case, how, peer):
    is_linear = case.gate.startswith("linear")
    if peer == "bare GEMMs":
        return is_linear
    if peer == QUACK:
        return how == "alone, graph" and case.gate == "scalar"
    if peer in (TWO_CARRIERS, "triton, rows") and "chain" in how:
        return False  # in a chain these equal "gated_prompt, carrier" and "triton"
    if peer == TWO_CARRIERS or peer.startswith("triton"):
        return case.device == "cuda" and not is_linear
    if peer.startswith("where"):
        return case.gate != "full"
    return True


def by_default(case, how, peer):
    """True if the row runs without --all-peers: on CUDA the rows that goals.py needs; on the CPU
    almost all rows for the scalar gate of ViT-B, and fewer for other cases. Compilation and
    Triton's tuning take most of the time of a run."""
    of_all = DEFAULT[case.device]["batch"], 50, "scalar"
    is_reference = (case.batch, case.prompts, case.gate) == of_all
    if case.device == "cuda":
        if case.pixels == CALL["pixels"]:
            return how == "alone" and peer in ("gated_prompt", "original")
        if how == "alone, graph" and peer == "original, max-autotune":
            return is_reference  # it compiles for a long time: one row is enough
        few = case.gate in ("channel", "token", "sample")
        return (is_reference and peer in QUICK_PEERS) or (
            how == "alone, graph" and peer in (LIMIT_PEERS if few else GOAL_PEERS)
        )
    if is_reference:
        return not peer.endswith("autotune")
    if "chain" in how:
        is_eager = not peer.endswith(tuple(COMPILED))
        return (case.gate == "scalar" and is_eager) or peer in QUICK_COMPILED
    return peer in (*QUICK_PEERS, "slice assignment", "slice_scatter")


def pytest_generate_tests(metafunc):
    names = ("device", "case", "how", "peer", "which")
    found = list(rows(metafunc.config))
    metafunc.parametrize(names, found, indirect=["device", "case"], ids=str)


@functools.lru_cache(maxsize=2)
def make(case, how, peer):
    if peer in LIMITS:
        work = LIMITS[peer](case)
    else:
        work = (Chain if "chain" in how else Alone)(case, peer)
    return Graphed(work) if "graph" in how and case.device == "cuda" else work


def rival_of(how, peer):
    if "chain" not in how:
        return "gated_prompt"
    return "no gate" + next((mode for mode in COMPILED if peer.endswith(mode)), "")


def names(case, how, peer, which):
    """Returns the fields that identify a row in the results."""
    suite = "linear" if case.gate.startswith("linear") else "gate"
    return {"suite": suite, "case": case, "how": how, "which": which, "peer": peer}


def test_prompt_gate(request, benchmark, device, case, how, peer, which):
    label(benchmark, **names(case, how, peer, which))
    if (peer == QUACK or peer.startswith("triton")) and device == "cpu":
        pytest.skip("needs a GPU")
    if peer == QUACK and importlib.util.find_spec("quack") is None:
        pytest.skip("quack is not installed (pip install quack-kernels)")
    rival, work = make(case, how, rival_of(how, peer)), make(case, how, peer)
    is_linear = case.gate.startswith("linear")  # its GEMM saves the rows before they change
    if peer.startswith("slice assignment,") and "alone" in how and not is_linear:
        reason = "compiled, it computes the gate's gradient from the overwritten rows"
        request.applymarker(pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True))
    median = race(benchmark, work, rival, which)
    if "alone" in how:
        moved = bytes_moved(case, peer)[which]
        benchmark.extra_info["bytes"] = moved
        benchmark.extra_info["gb_per_s"] = moved / median / 1e9
        if device == "cuda":
            is_cold = work.calls * moved > 4 * l2_bytes()
            benchmark.extra_info["l2"] = "cold" if is_cold else "warm"
