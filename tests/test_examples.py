# SPDX-License-Identifier: Apache-2.0
"""What people are told to copy runs: examples and the code in the documentation."""

import re
import runpy
from pathlib import Path

import pytest
from conftest import timm_or_skip

from gated_prompt import reference

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/prompt_gate.md").read_text(), re.DOTALL)


def test_plain_loop_has_the_losses_of_the_eager_formula():
    timm_or_skip()
    main = runpy.run_path(str(ROOT / "examples/train_plain_loop.py"))["main"]
    losses = main(steps=6)
    assert losses == pytest.approx(main(steps=6, gate=reference.prompt_gate), rel=1e-5)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("block", BLOCKS)
def test_code_in_the_documentation_runs(block):
    exec(compile(block, "docs/prompt_gate.md", "exec"), {})


def test_the_documentation_has_code():
    assert len(BLOCKS) == 3
