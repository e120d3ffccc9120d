# SPDX-License-Identifier: Apache-2.0
"""Tests of `gated-prompt info` and of what the build reports about itself."""

import pytest
import torch

from gated_prompt import ops
from gated_prompt.job import cli


def test_info_says_what_was_built_and_what_can_run(capsys):
    cli.main(["info"])
    printed = capsys.readouterr().out
    assert f"torch {ops.build_info()['torch']}" in printed
    assert f"running {ops.build_info()['cpu_instructions']}" in printed
    assert "attention sdpa:    usable" in printed
    if not torch.cuda.is_available():
        assert "GPU:               none that torch can use" in printed
        assert "attention xformers: no: " in printed


def test_info_says_why_there_are_no_cuda_kernels(capsys, monkeypatch):
    monkeypatch.setattr(ops, "cuda_unavailable_reason", "no toolkit")
    cli.main(["info"])
    assert "CUDA kernels:      no: no toolkit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), "8.0,9.0", True),
        ((8, 6), "8.0", True),  # machine code of an earlier minor version
        ((8, 0), "8.6", False),
        ((9, 0), "8.0", False),  # another major version, no PTX
        ((9, 0), "8.0+PTX", True),
        ((12, 0), "7.5,9.0+PTX", True),
        ((7, 5), "8.0+PTX", False),  # PTX runs on later GPUs only
        ((10, 0), "9.0a", False),
    ],
)
def test_which_gpus_a_build_runs_on(capability, architectures, runs):
    assert ops.has_kernel(capability, architectures) == runs


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["tunee"])
    assert "invalid choice: 'tunee'" in capsys.readouterr().err
