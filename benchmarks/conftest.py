# SPDX-License-Identifier: Apache-2.0
"""Selects the benchmarks that run, sets the conditions they run under, and reduces each result to a
row, which ../conftest.py writes to a file."""

import ctypes
import importlib.util
import inspect
import sys

import goals
import pytest
import shapes
import torch
import torch._inductor.config

from gated_prompt import ops

# without timm (the extra `vit`) collect only the suites of the op
collect_ignore = []
if importlib.util.find_spec("timm") is None:
    collect_ignore += ["bench_attention.py", "bench_vit.py"]


def pytest_addoption(parser):
    shapes.add_options(parser)
    parser.addoption("--all-peers", action="store_true", help="also the rows left out by default")
    parser.addoption("--threads", type=int, default=1, help="CPU threads; above 1, wall-clock time")
    parser.addoption("--goals", help="only the rows that these goals of goals.py need: G1,G2")


def pytest_collection_modifyitems(config, items):
    if config.option.goals:
        wanted = goals.asked_for(config.option.goals.split(","))
        asked = [item for item in items if is_asked_for(item, wanted)]
        config.hook.pytest_deselected(items=[item for item in items if item not in asked])
        items[:] = asked


def is_asked_for(item, wanted):
    arguments = inspect.signature(item.module.names).parameters
    row = item.module.names(*(item.callspec.params[name] for name in arguments))
    row = {key: str(value) for key, value in row.items()}
    return any(goals.matching([row], names) for names in wanted)


@pytest.fixture
def device(request):
    if request.config.option.device == "toy":
        return "cpu"
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    if request.param == "cuda" and ops.cuda_unavailable_reason is not None:
        pytest.skip(ops.cuda_unavailable_reason)
    return request.param


@pytest.fixture
def case(request):
    return request.param.toy() if request.config.option.device == "toy" else request.param


@pytest.fixture(autouse=True)
def _kept(request):
    """Passes the row of a timed benchmark to ../conftest.py."""
    yield
    arguments = request.node.funcargs or {}  # None after an interruption
    stats = getattr(arguments.get("benchmark"), "stats", None)
    if stats:
        request.node.user_properties.append(("row", row(stats.as_dict(include_data=False))))


DIGITS = {
    "us": 3,
    "ratio": 4,
    "over_us": 3,
    "host_us": 2,
    "gb_per_s": 2,
    "tflop_per_s": 2,
    "images_per_s": 2,
}


def row(benchmark):
    """Returns the fields of pytest-benchmark's record that are kept, without the raw data."""
    stats, info = benchmark["stats"], benchmark["extra_info"]
    times = {
        "median_us": round(stats["median"] * 1e6, 3),
        "quartiles_us": [round(stats[q] * 1e6, 3) for q in ("q1", "q3")],
        "rounds": stats["rounds"],
    }
    names = ("suite", "case", "how", "which", "peer")
    rest = {k: rounded(v, DIGITS.get(k, 0)) for k, v in info.items() if k not in names}
    return {name: info[name] for name in names if name in info} | times | rest


def rounded(value, digits):
    if isinstance(value, list | tuple):
        return [rounded(v, digits) for v in value]
    return value if isinstance(value, str | bool) else round(value, digits or None)


@pytest.fixture(autouse=True)
def _threads(request):
    """Sets the number of CPU threads, by default one. With more, small sizes mostly time how long
    the other threads take to wake up."""
    before, threads = torch.get_num_threads(), request.config.option.threads
    torch.set_num_threads(threads)
    with torch._inductor.config.patch("cpp.threads", threads):
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _keep_memory():
    """Keeps freed memory in the process. By default glibc returns freed megabytes to the system;
    to request them again cost more time than the gate, in some rounds but not in others."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)
        ctypes.CDLL(None).mallopt(mmap_max, 0)
