# SPDX-License-Identifier: Apache-2.0
"""The linear gates of one block beside their peers, and beside the bare GEMMs that are their limit:
one with bias forward, two backward.

    pytest benchmarks/bench_prompt_gate_linear.py --benchmark-only [flags of shapes.py]

What the rows are: bench_prompt_gate.py. gb_per_s leaves weights and GEMMs out.
"""

from bench_prompt_gate import names, parametrize, test_prompt_gate  # noqa: F401
from harness import timed_here

test_prompt_gate_linear = test_prompt_gate
del test_prompt_gate
pytestmark = timed_here


def pytest_generate_tests(metafunc):
    parametrize(metafunc, "prompt_gate_linear")
