# SPDX-License-Identifier: Apache-2.0
"""The drop-in example trains as the eager formula does."""

import runpy
from pathlib import Path

import pytest
from conftest import timm_or_skip

from gated_prompt import reference

timm_or_skip()
EXAMPLES = Path(__file__).parent.parent / "examples"


def test_plain_loop_has_the_losses_of_the_eager_formula():
    main = runpy.run_path(str(EXAMPLES / "train_plain_loop.py"))["main"]
    losses = main(steps=6)
    assert losses == pytest.approx(main(steps=6, gate=reference.prompt_gate), rel=1e-5)
    assert losses[-1] < losses[0] - 0.1
