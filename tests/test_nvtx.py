# SPDX-License-Identifier: Apache-2.0
"""NVTX ranges for Nsight: their names, that each one ends, and none without GATED_PROMPT_NVTX.

The variable is read at import, so the tests run code in a new Python process. There, a stand-in
replaces the package nvtx and records each push and pop.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import timm_or_skip

from gated_prompt import ops
from gated_prompt import temperature as attention
from gated_prompt.vit import attention as vit_attention

STAND_IN = """
told = []


class annotate:
    def __init__(self, message, domain):
        self.name = f"{domain}: {message}"

    def __enter__(self):
        told.append(("push", self.name))

    def __exit__(self, *error):
        told.append(("pop", self.name))
"""
SETUP = """
import json, sys, nvtx, torch
import gated_prompt as gp
from gated_prompt import ops

h, x = torch.randn(2, 7, 8), torch.randn(2, 7, 8)


def gated(gate_, h, *gate):
    gate = [torch.zeros(size, requires_grad=True) for size in gate]
    bias = [None] if len(gate[0].shape) == 2 else []
    gate_(h.clone().requires_grad_() * 1, x, *gate, *bias, 1, 3).sum().backward()


def step(compiled=False, **options):
    import timm

    vit = timm.create_model("test_vit", img_size=32, depth=2)
    model = gp.wrap(vit, num_prompts=3, **options).train()
    if compiled:
        model = torch.compile(model, backend="aot_eager", fullgraph=True)
    model(torch.randn(2, 3, 32, 32)).sum().backward()


def raise_an_error():
    try:
        ops.prompt_gate_fwd_(h, x[:, :2], torch.zeros(()), 1, 3, True, True)
    except RuntimeError:
        return
    raise SystemExit("no error")
"""


@pytest.fixture
def run(tmp_path):
    """Runs code in a new process with the stand-in for nvtx; nvtx=None: nvtx is not installed."""

    def run_code(code, value="1", nvtx=STAND_IN):
        content = "raise ModuleNotFoundError('No module named nvtx')" if nvtx is None else nvtx
        (tmp_path / "nvtx.py").write_text(content)
        path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        environment = {**os.environ, "PYTHONPATH": path, "GATED_PROMPT_NVTX": value}
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment
        )

    return run_code


def names_of(told):
    """Returns the names of ranges in the order of their start; asserts that they nest and end."""
    names, is_open = [], []
    for what, name in told:
        if what == "push":
            names.append(name.removeprefix("gated_prompt: "))
            is_open.append(name)
        else:
            assert is_open.pop() == name
    assert not is_open
    return names


@pytest.fixture
def ranges(run):
    """Runs lines of code and returns the names of the ranges of each line."""

    def of_lines(*lines):
        tell = "; print(json.dumps(nvtx.told)); nvtx.told.clear()\n"
        result = run(SETUP + "".join(line + tell for line in lines))
        assert result.returncode == 0, result.stderr
        return [names_of(json.loads(told)) for told in result.stdout.splitlines()]

    return of_lines


@pytest.mark.skipif(ops._HAS_RANGES, reason="GATED_PROMPT_NVTX is set")
def test_without_the_variable_nothing_is_wrapped():
    raw = torch.ops.gated_prompt
    assert ops.prompt_gate_fwd_ is raw.prompt_gate_fwd_.default
    assert ops.prompt_gate_linear_token_fwd_ is raw.prompt_gate_linear_token_fwd_.default
    assert ops.prompt_gate_bwd_ is raw.prompt_gate_bwd_.default
    assert attention.scaled_dot is ops.scaled_dot is raw.scaled_dot.default
    assert vit_attention.divide_rows is ops.divide_rows is raw.divide_rows.default
    for name, function in attention._KERNELS.items():
        assert function in (attention._sdpa, attention._math, attention._xformers_attention), name


@pytest.mark.parametrize("value", ["", "0"])
def test_without_the_variable_nvtx_is_not_imported(run, value):
    code = "import sys, gated_prompt, gated_prompt.vit.attention; print('nvtx' in sys.modules)"
    assert run(code, value).stdout.strip() == "False"


def test_ops_are_named_by_shape_and_dtype(ranges):
    shape = "[2, 7, 8] P=3 float32"
    gate = [f"prompt_gate_fwd_ {shape}", f"prompt_gate_bwd_ {shape}"]
    assert ranges(
        "gated(gp.prompt_gate_, h, (8,))",
        "gated(gp.prompt_gate_, h.bfloat16(), ())",
        "gated(gp.prompt_gate_linear_, h, (8, 8))",
        "gated(gp.prompt_gate_linear_, h, (1, 8))",
        "raise_an_error(), raise_an_error()",
    ) == [
        gate,
        [name.replace("float32", "bfloat16") for name in gate],
        gate,
        [f"prompt_gate_linear_token_fwd_ {shape}", gate[1]],
        [gate[0]] * 2,
    ]


def test_a_step_of_a_wrapped_vit(ranges):
    timm_or_skip()
    gate, cls = "[2, 8, 64] P=3 float32", "[2, 1, 2, 32] float32"
    fold = "divide_rows [64, 64] float32"
    sdpa = [
        "divide_rows [192, 64] float32",
        "attention sdpa [2, 8, 2, 32] float32",
        f"prompt_gate_fwd_ {gate}",
        fold,
        f"attention sdpa {cls}",  # the last block has one query, the class token
        f"scaled_dot {cls}",
        fold,
        f"prompt_gate_bwd_ {gate}",
        "scaled_dot [2, 8, 2, 32] float32",
        fold,
    ]
    assert ranges("step()", "step(attention='math')", "step(compiled=True)") == [
        sdpa,
        [name.replace("sdpa", "math") for name in sdpa],
        [],
    ]


def test_the_variable_without_nvtx_says_what_to_do(run):
    result = run("import gated_prompt", nvtx=None)
    assert result.returncode == 1
    assert "ImportError: gated_prompt: GATED_PROMPT_NVTX=1 needs the package nvtx" in result.stderr
    assert "pip install nvtx" in result.stderr
