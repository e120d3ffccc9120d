# SPDX-License-Identifier: Apache-2.0
"""The results of runs, from the files that ../conftest.py writes: cpu*.jsonl and gpu*.jsonl."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
NAMES = ("suite", "case", "how", "which", "peer")


def load(folder=RESULTS):
    """{device: result}: the rows of all its runs together, and the runs. Of a row that is there
    more than once the last counts; of tests there is one row, their number by outcome; and of
    parts (gpu.py) how they ended."""
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
            elif "part" in row:  # of gpu.py
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
        raise SystemExit(f"{path}: of {new}, other runs of another machine")


def machine(device, run):
    """What must be one for rows to be held against each other; a GPU is rented with any CPU."""
    return run["cpu"] if device == "cpu" else (run.get("gpu") or {}).get("name"), run["torch"]
