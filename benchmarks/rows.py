# SPDX-License-Identifier: Apache-2.0
"""Reads the results of runs from the files that ../conftest.py writes: cpu*.jsonl, gpu*.jsonl."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
NAMES = ("suite", "case", "how", "which", "peer")


def load(folder=RESULTS):
    """Returns {device: {"rows", "runs", "parts"}} from all files of a device.

    If a row occurs several times, the last one counts. Tests become one row with the number of
    tests for each outcome. parts: how the parts of gpu.py ended. Exits if the runs of a device come
    from different machines.
    """
    results = {}
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: path.stem):
        device, run = path.stem[:3], None
        empty = {"rows": {}, "runs": [], "outcomes": {}, "parts": {}}
        result = results.setdefault(device, empty)
        for row in map(json.loads, path.read_text().splitlines()):
            if "command" in row:
                run = row
                _require_one_machine(path, device, [*result["runs"], run])
                result["runs"].append(run)
            elif "part" in row:  # written by gpu.py
                result["parts"][row["part"]] = row
            elif "suite" in row:
                result["rows"][tuple(map(row.get, NAMES))] = row
            elif row["id"].startswith("tests/") and row["outcome"] != "skipped":
                result["outcomes"][row["id"]] = row["outcome"]
            else:
                result["outcomes"].setdefault(row["id"], row["outcome"])
    return {device: _joined(**result) for device, result in results.items() if result["runs"]}


def _joined(rows, runs, outcomes, parts):
    found = [outcome for id, outcome in outcomes.items() if id.startswith("tests/")]
    count = {name: found.count(name) for name in ("passed", "failed", "skipped")}
    tests = [{"suite": "tests", "peer": "tests", **count}] if any(found) else []
    return {"rows": [*rows.values(), *tests], "runs": runs, "parts": parts}


def _require_one_machine(path, device, runs):
    *others, new = (machine(device, run) for run in runs)
    if any(other != new for other in others):
        raise SystemExit(f"{path}: results of {new}, but other runs are of another machine")


def machine(device, run):
    """Returns what must be equal in runs whose rows are compared: the torch version, and the CPU or
    the GPU. The CPU of a GPU machine may differ, since rented GPUs come with various CPUs."""
    return run["cpu"] if device == "cpu" else (run.get("gpu") or {}).get("name"), run["torch"]
