# SPDX-License-Identifier: Apache-2.0
"""For tests and benchmarks alike: a run that ends by itself, writes each result down at once, and
goes on where an earlier one stopped.

A file of results (--rows) has a line of JSON for each. A line with "command" begins a run: what
ran, where, at which commit. The lines after it are what pytest ran: "id", as pytest calls it, its
"outcome", where it was skipped the "reason", where it failed "why", and of a benchmark the figures.
Runs append.
"""

import json
import math
import os
import platform
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
import torch

from gated_prompt import ops

ROOT = Path(__file__).parent
OUT_OF_TIME = "out of time"
WHY = 2000  # characters of a failure, its end


def pytest_addoption(parser):
    group = parser.getgroup("gated_prompt")
    text = "seconds from now; what has not begun by then skips"
    group.addoption("--deadline", type=float, default=math.inf, help=text)
    text = "a file to which each result is appended at once, as a line of JSON"
    group.addoption("--rows", type=Path, help=text)
    text = "leave out what --rows has already, of this commit, this torch and this GPU"
    group.addoption("--rest", action="store_true", help=text)


_done = pytest.StashKey()


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist, told by its controller
        config.option.deadline = config.workerinput["deadline"]
        config.stash[_done] = set(config.workerinput["done"])
        return
    config.option.deadline += time.time()
    config.stash[_done], path = set(), config.option.rows
    if path is not None:
        now = about(config)
        if config.option.rest and path.exists():
            config.stash[_done] = passed(path, now)
        config.pluginmanager.register(Rows(path, now))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Of pytest-xdist: one that takes the place of a dead worker must collect what that one had."""
    node.workerinput["deadline"] = node.config.option.deadline
    node.workerinput["done"] = sorted(node.config.stash[_done])


@pytest.hookimpl(tryfirst=True)  # before a fixture makes anything
def pytest_runtest_setup(item):
    if time.time() > item.config.option.deadline:
        pytest.skip(OUT_OF_TIME)


def pytest_collection_modifyitems(config, items):
    done = config.stash[_done]
    if done:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]


def passed(path, now):
    """The ids of what passed, or was timed, in runs such as the one that begins now; none where
    the commit does not tell the code."""
    found, is_same = set(), False
    if now["commit"] == "unknown" or now["commit"].endswith("+"):
        return found
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if "command" in row:
            is_same = kind(row) == kind(now)
        elif is_same and row["outcome"] == "passed":
            found.add(row["id"])
    return found


def kind(run):
    return [run["commit"], run["torch"], (run["gpu"] or {}).get("name")]


class Rows:
    """Writes them, as a plugin of the process that reports."""

    def __init__(self, path, about):
        self.file, self.now = path.open("a"), {}
        self.write(about)

    def write(self, row):
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def pytest_runtest_logreport(self, report):
        row = self.now.setdefault(report.nodeid, {"id": report.nodeid, "outcome": "passed"})
        if report.outcome != "passed":
            row["outcome"] = report.outcome
            if report.failed:
                row["why"] = report.longreprtext[-WHY:]
            if report.skipped:
                is_xfail = hasattr(report, "wasxfail")
                reason = report.wasxfail if is_xfail else report.longrepr[2]
                row["reason"] = reason.removeprefix("Skipped: ")
        if report.when in ("setup", "call"):
            return
        # after its last phase; or pytest-xdist says that its worker has died
        self.write(self.now.pop(report.nodeid) | dict(report.user_properties).get("row", {}))

    def pytest_collectreport(self, report):
        if report.failed:  # a file that does not import
            why = report.longreprtext[-WHY:]
            self.write({"id": report.nodeid, "outcome": report.outcome, "why": why})


# ---- what a run says of itself ----


def about(config=None):
    build = ops.build_info()
    arguments = config.invocation_params.args if config else ()
    threads = torch.get_num_threads()
    return {
        "command": "pytest " + shlex.join(map(portable, arguments)),
        "commit": commit(),
        "cpu": cpu(),
        "threads": config.getoption("threads", threads) if config else threads,  # of benchmarks
        "gpu": gpu(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "build": build | {"compiler": build["compiler"].split()[-1]},
    }


def portable(argument):
    """Without the folders of this machine: --rows=/somewhere/gpu.jsonl is --rows=gpu.jsonl."""
    return re.sub(r"(?<![^=])/\S*/", "", str(argument))


def commit():
    """What the environment says, for a copy without .git or with that of another commit; else
    HEAD, with a + where files have changed since."""
    if os.environ.get("GATED_PROMPT_COMMIT"):
        return os.environ["GATED_PROMPT_COMMIT"]
    head = _printed("git", "rev-parse", "HEAD")
    changed = _printed("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return head + "+" * bool(changed) if head else "unknown"


def cpu():
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", path.read_text()) if path.exists() else []
    return names[0] if names else platform.processor()


def gpu():
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
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
