# SPDX-License-Identifier: Apache-2.0
"""What people are told to copy runs: examples and the code in the documentation."""

import re
import runpy
from pathlib import Path

import pytest
from conftest import timm_or_skip

from gated_prompt import reference

ROOT = Path(__file__).parent.parent
BLOCKS = [
    (page, code)
    for page in ("docs/prompt_gate.md", "docs/vit.md", "docs/profiling.md")
    for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
]


def test_plain_loop_has_the_losses_of_the_eager_formula():
    timm_or_skip()
    main = runpy.run_path(str(ROOT / "examples/train_plain_loop.py"))["main"]
    losses = main(steps=6)
    assert losses == pytest.approx(main(steps=6, gate=reference.prompt_gate), rel=1e-5)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_code_in_the_documentation_runs(page, code):
    if "timm" in code:
        timm_or_skip()
    exec(compile(code, page, "exec"), {})


def test_the_documentation_has_code():
    pages = 3 * ["docs/prompt_gate.md"] + 2 * ["docs/vit.md"] + ["docs/profiling.md"]
    assert [page for page, _ in BLOCKS] == pages
