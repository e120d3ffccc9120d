# SPDX-License-Identifier: Apache-2.0
"""Under what conditions benchmarks run, and where: the latter goes into the JSON of every run."""

import ctypes
import subprocess
import sys

import pytest
import torch
import torch._inductor.config

from gated_prompt import ops


@pytest.fixture(autouse=True)
def _one_thread():
    """One CPU thread: with more, what is timed at these sizes is the wake-up of the others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch._inductor.config.patch("cpp.threads", 1):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _keep_memory():
    """glibc gives freed megabytes back to the system; to get them again cost more than the gate,
    in some rounds and not in others."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)
        ctypes.CDLL(None).mallopt(mmap_max, 0)


def pytest_addoption(parser):
    text = "whole models: more shapes, and on the CPU compiled rows"
    parser.addoption("--all-shapes", action="store_true", help=text)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["build"] = ops.build_info()
    if torch.cuda.is_available():
        query = "name,driver_version,clocks.sm,clocks.mem,clocks_throttle_reasons.active"
        machine_info["gpu"] = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        ).stdout.strip()


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    if request.param == "cuda" and ops.cuda_unavailable_reason is not None:
        pytest.skip(ops.cuda_unavailable_reason)
    return request.param
