# SPDX-License-Identifier: Apache-2.0
"""The Triton gate that benchmarks compare with: its results, and its compiled code for sm_90.

The results come from Triton's interpreter, which needs no GPU. It runs in a separate process, so
that TRITON_INTERPRET stays unset for the other tests.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="this torch came without Triton")

import cases

ROOT = str(Path(__file__).parent.parent)
sys.path.append(ROOT + "/benchmarks")
GATES = ("scalar", "channel", "token", "sample", "full")
SMALL = cases.Case(batch=3, inplace=True)
CHECKED = [
    dataclasses.replace(SMALL, gate=gate, rule=rule, dtype=dtype, in_form=in_form, **at)
    for gate, rule, dtype, in_form, at in itertools.product(
        GATES,
        cases.RULES,
        (torch.float32, torch.bfloat16),
        ("sequence", "rows"),
        ({"num_tokens": 7, "start": 1}, {"num_tokens": 9, "start": 4}),
    )
]
CHECKED += [
    dataclasses.replace(SMALL, gate=gate, **change)
    for gate, change in (
        *((gate, {"dtype": torch.float16, "values": "large"}) for gate in GATES),
        *((gate, {"num_tokens": 5, "dim": 7, "start": 0, "length": 5}) for gate in GATES),  # P = N
        *((gate, {"needs": (False, True, True)}) for gate in GATES),
        *((gate, {"needs": (True, False, True)}) for gate in GATES),
        *((gate, {"needs": (True, True, False)}) for gate in GATES),
        ("scalar", {"needs": (False, False, False)}),
        *((gate, {"batch": 12}) for gate in GATES),  # more partial sums than are added at a time
    )
]


def name_of(case):
    """Names a case by its gate, its rule and the fields that differ from SMALL."""
    fields = vars(case).items()
    changed = [str(v) for k, v in fields if v != getattr(SMALL, k) or k in ("gate", "rule")]
    return "-".join(changed).replace(" ", "").replace("torch.", "")


def check(case):
    cases._call = call
    cases.check_against_reference(case)


def call(case, leaves, target):
    """Like cases._call. Returns out * 1, since the peer writes into its incoming gradient."""
    gate_ = importlib.import_module("triton_gate").gate_
    h, at = cases._Into.apply(leaves["block_out"], target), (case.start, case.length, case.rule)
    with torch.no_grad():
        alone = gate_(h.clone(), leaves["block_in"], leaves["gate_logit"], *at)
    out = gate_(h, leaves["block_in"], leaves["gate_logit"], *at)
    assert out is h
    torch.testing.assert_close(out, alone)
    return (out * 1,)


def interpret():
    """Prints {name: error, or None} of all cases in CHECKED, as JSON."""
    found = {}
    for case in CHECKED:
        try:
            found[name_of(case)] = check(case)
        except Exception as error:
            found[name_of(case)] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


@functools.cache
def interpreted():
    changes = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ROOT}
    run = subprocess.run(
        [sys.executable, __file__], env=os.environ | changes, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", [name_of(case) for case in CHECKED])
def test_interpreted_it_is_the_reference(name):
    assert interpreted()[name] is None


@pytest.mark.cuda
@pytest.mark.parametrize(("gate", "rule"), list(itertools.product(GATES, cases.RULES)))
def test_on_a_gpu_it_is_the_reference(monkeypatch, gate, rule):
    peer = importlib.import_module("triton_gate")
    all_of_them = peer.tilings
    monkeypatch.setattr(peer, "tilings", lambda *a, **k: itertools.islice(all_of_them(*a, **k), 2))
    monkeypatch.setattr(cases, "_call", call)
    for dtype in (torch.float32, torch.bfloat16):
        case = dataclasses.replace(SMALL, gate=gate, rule=rule, dtype=dtype, device="cuda")
        cases.check_against_reference(case)


# ---- compiled code ----

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}


class Compiler:
    """Replaces a kernel: compiles each launch for sm_90, as Triton would, and runs nothing."""

    def __init__(self, kernel, found):
        self.kernel, self.found, self.__name__ = kernel, found, kernel.__name__

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *arguments, num_warps):
        signature, constants, aligned = {}, {}, {}
        for i, (parameter, value) in enumerate(zip(self.kernel.params, arguments, strict=True)):
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPES[value.dtype]
                aligned[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name], constants[(i,)] = "constexpr", value
        source = triton.compiler.ASTSource(self.kernel, signature, constants, aligned)
        target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
        result = triton.compile(source, target=target, options={"num_warps": num_warps})
        self.found.append((self.__name__, result))


def resources(cubin, folder):
    """Returns {"REG": registers per thread, "LOCAL": bytes that it spills, ...}."""
    (folder / "kernel.cubin").write_bytes(cubin)
    command = [str(BIN / "cuobjdump"), "-res-usage", str(folder / "kernel.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", report)}


@pytest.mark.skipif(not (BIN / "ptxas").exists(), reason="this Triton came without ptxas")
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set")
@pytest.mark.parametrize("in_form", ["sequence", "rows"])
@pytest.mark.parametrize("gate", GATES)
def test_compiled_for_sm_90_it_moves_128_bits_at_a_time(monkeypatch, tmp_path, gate, in_form):
    peer = importlib.import_module("triton_gate")
    batch, tokens, length, dim = 64, 247, 50, 768
    size, rows_size = (batch, tokens, dim), (batch, length, dim)
    h = torch.empty(size, dtype=torch.bfloat16, device="meta")
    x = h if in_form == "sequence" else h[:, :length]
    logit = torch.empty(cases.GATES[gate](*rows_size), device="meta")
    plan = peer.Plan(h.shape, x.shape, logit.shape, h.dtype, h.device, 1, length, "mix")
    found = []
    for name in ("_forward", "_backward", "_add"):
        monkeypatch.setattr(peer, name, Compiler(getattr(peer, name), found))
    assert len(plan.tilings) == 4
    for at in plan.tilings:
        plan.tilings, plan.fastest = [at], {}
        found.clear()
        saved = plan.forward(h, x, logit, True)
        plan.backward(h, saved, logit, True, True)
        kernels = ["_forward", "_backward"] + ["_add"] * (gate != "full")
        assert [name for name, _ in found] == kernels
        packs = at.rows * at.cols // (32 * at.warps) // 8  # per thread and tensor
        for name, kernel in found:
            used = resources(kernel.asm["cubin"], tmp_path)
            moves = re.findall(r"\b(ld|st)\.global\S*?((?:\.v[248])?\.[bu]\d+) ", kernel.asm["ptx"])
            print(gate, name, f"{at.rows}x{at.cols}/{at.warps}", used["REG"], moves)
            assert used["LOCAL"] == used["STACK"] == 0
            if name == "_add":
                continue
            loads, stores = (2, 2) if name == "_forward" else (2, 2 + (in_form == "sequence"))
            if gate == "full":  # a pack of float32 logits is 2 x 128 bits
                loads, stores = loads + 2, stores + 2 * (name == "_backward")
            assert moves.count(("ld", ".v4.b32")) >= loads * packs
            assert moves.count(("st", ".v4.b32")) >= stores * packs
            assert not any(width.endswith("16") for _, width in moves)  # no single bfloat16
            assert "cvt.rn.bf16x2.f32" in kernel.asm["ptx"]  # rounded to nearest


if __name__ == "__main__":
    interpret()
