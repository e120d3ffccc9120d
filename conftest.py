# SPDX-License-Identifier: Apache-2.0
"""Options of pytest for tests and benchmarks: end a run in time (--deadline), write each result
immediately (--rows), continue an earlier run (--rest).

A file of results (--rows) has a line of JSON per result. A line with "command" begins a run: it
records what ran, where, and at which commit. Each following line is a test or benchmark: its pytest
"id", its "outcome", the "reason" if it was skipped, "why" if it failed, and the figures of a
benchmark. New runs are appended.
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
WHY = 2000  # characters kept of a failure: its end


def pytest_addoption(parser):
    group = parser.getgroup("gated_prompt")
    text = "seconds from now; tests that have not begun by then are skipped"
    group.addoption("--deadline", type=float, default=math.inf, help=text)
    text = "append each result to this file, as a line of JSON, as soon as it is known"
    group.addoption("--rows", type=Path, help=text)
    text = "leave out what passed before, according to --rows, with this commit, torch and GPU"
    group.addoption("--rest", action="store_true", help=text)


_done = pytest.StashKey()


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist gets these from its controller
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
    """Hook of pytest-xdist. A worker that replaces a dead one must collect the same tests."""
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
    """Returns the ids that passed (or were timed) in runs with the commit, torch and GPU of `now`.

    The set is empty if the commit does not identify the code: it is unknown, or files have changed.
    """
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
    """Plugin that appends rows to the file, in the process that collects the reports."""

    def __init__(self, path, about):
        path.parent.mkdir(parents=True, exist_ok=True)
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
        # teardown, the last phase; or pytest-xdist reports that the worker has died
        self.write(self.now.pop(report.nodeid) | dict(report.user_properties).get("row", {}))

    def pytest_collectreport(self, report):
        if report.failed:  # the file can't be imported
            why = report.longreprtext[-WHY:]
            self.write({"id": report.nodeid, "outcome": report.outcome, "why": why})


# ---- facts about a run ----


def about(config=None):
    build = ops.build_info()
    arguments = config.invocation_params.args if config else ()
    threads = torch.get_num_threads()
    return {
        "command": "pytest " + shlex.join(map(portable, arguments)),
        "commit": commit(),
        "cpu": cpu(),
        "threads": config.getoption("threads", threads) if config else threads,  # for benchmarks
        "gpu": gpu(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "build": build | {"compiler": build["compiler"].split()[-1]},
    }


def portable(argument):
    """Removes folders of this machine: --rows=/somewhere/gpu.jsonl becomes --rows=gpu.jsonl."""
    return re.sub(r"(?<![^=])/\S*/", "", str(argument))


def commit():
    """Returns HEAD, with a + if files have changed since. GATED_PROMPT_COMMIT overrides this, for a
    copy that has no .git, or a .git at another commit."""
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
    """Returns facts about the GPU from nvidia-smi; None if there is no GPU.

    Each is a separate query, so one that this nvidia-smi does not support loses only that fact.
    """
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
    """Returns what the command prints, or "" if it is missing or fails: the run continues."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
