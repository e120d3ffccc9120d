# SPDX-License-Identifier: Apache-2.0
"""Under what conditions benchmarks run, and what of a run is kept as JSON."""

import ctypes
import importlib.util
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import shapes
import torch
import torch._inductor.config

from gated_prompt import ops

START = time.monotonic()
# without the extra `vit`, the suites of the op alone
collect_ignore = []
if importlib.util.find_spec("timm") is None:
    collect_ignore += ["bench_attention.py", "bench_vit.py"]


def pytest_addoption(parser):
    shapes.add_options(parser)
    parser.addoption("--all-peers", action="store_true", help="all compiled rows, too")
    parser.addoption("--threads", type=int, default=1, help="CPU threads; above 1, time is time")
    text = "seconds after collecting begins, from which on rows skip"
    parser.addoption("--deadline", type=float, default=math.inf, help=text)


@pytest.hookimpl(tryfirst=True)  # before a fixture makes anything
def pytest_runtest_setup(item):
    """So that a run ends by itself: interrupted in a round, pytest-benchmark writes no JSON."""
    if time.monotonic() - START > item.config.getoption("deadline"):
        pytest.skip("out of time")


@pytest.fixture(autouse=True)
def _threads(request):
    """One CPU thread: with more, what is timed at small sizes is the wake-up of the others."""
    before, threads = torch.get_num_threads(), request.config.getoption("threads")
    torch.set_num_threads(threads)
    with torch._inductor.config.patch("cpp.threads", threads):
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _keep_memory():
    """glibc gives freed megabytes back to the system; to get them again cost more than the gate,
    in some rounds and not in others."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)
        ctypes.CDLL(None).mallopt(mmap_max, 0)


@pytest.fixture
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    if request.param == "cuda" and ops.cuda_unavailable_reason is not None:
        pytest.skip(ops.cuda_unavailable_reason)
    return request.param


# ---- JSON ----

DIGITS = {
    "us": 3,
    "ratio": 4,
    "over_us": 3,
    "host_us": 2,
    "gb_per_s": 2,
    "tflop_per_s": 2,
    "images_per_s": 2,
}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Few of the figures, none of the raw data."""
    machine, rows = output_json["machine_info"], output_json["benchmarks"]
    output_json.clear()
    build = ops.build_info()
    output_json |= {
        "command": "pytest " + shlex.join(_portable(config.invocation_params.args)),
        "commit": _commit(),
        "cpu": machine["cpu"].get("brand_raw", machine["processor"]),
        "threads": config.getoption("threads"),
        "gpu": _gpu(),
        "python": machine["python_version"],
        "torch": torch.__version__,
        "build": build | {"compiler": build["compiler"].split()[-1]},
        "rows": [_row(row) for row in rows],
    }


def _row(row):
    stats, info = row["stats"], row["extra_info"]
    times = {
        "median_us": round(stats["median"] * 1e6, 3),
        "quartiles_us": [round(stats[q] * 1e6, 3) for q in ("q1", "q3")],
        "rounds": stats["rounds"],
    }
    names = ("suite", "case", "how", "which", "peer")
    rest = {k: _rounded(v, DIGITS.get(k, 0)) for k, v in info.items() if k not in names}
    return {name: info[name] for name in names if name in info} | times | rest


def _rounded(value, digits):
    if isinstance(value, list | tuple):
        return [_rounded(v, digits) for v in value]
    return value if isinstance(value, str | bool) else round(value, digits or None)


def _portable(arguments):
    return [a for a in map(str, arguments) if not a.startswith("--benchmark-json")]


def _commit():
    """What the environment says, for a copy without .git or with that of another commit; else
    HEAD, with a + where files have changed since."""
    if os.environ.get("GATED_PROMPT_COMMIT"):
        return os.environ["GATED_PROMPT_COMMIT"]
    commit = _printed("git", "rev-parse", "HEAD")
    return commit + "+" * bool(_printed("git", "status", "--porcelain")) if commit else "unknown"


def _gpu():
    """What nvidia-smi knows of it, asked for one by one: a name that is new to it is left out, and
    the rest is there. None: no GPU."""
    if not torch.cuda.is_available():
        return None
    names = ("name", "driver_version", "clocks.sm", "clocks.mem", "power.limit")
    found = {"cuda": torch.version.cuda}
    for name in (*names, "clocks_event_reasons.active"):
        text = _printed("nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader")
        if text:
            found[name] = text.splitlines()[0]
    return found


def _printed(*command):
    """By a command; nothing where it is missing or fails: a run is not lost for that."""
    where = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
