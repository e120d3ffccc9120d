# SPDX-License-Identifier: Apache-2.0
"""The support matrix, from made-up reports."""

import json

import pytest
from support_matrix import read, table


def report(tests, torch="2", name="prompt_gate"):
    return torch, [(f"test_{name}", f"test[{test}]", passed) for test, passed in tests.items()]


def test_reports_of_one_torch_are_one():
    without_gpu = report({"cpu-a": True, "cpu-b": True, "cuda-a": False, "cuda-b": False})
    with_gpu = report({"cuda-a": True, "cuda-b": False})
    other_torch = report({"cpu-a": True, "cpu-b": False}, torch="3")
    for reports in ([without_gpu, with_gpu], [with_gpu, without_gpu]):
        lines = table([*reports, other_torch])
        devices = next(line for line in lines if line.startswith("| devices |"))
        assert "cpu (2)" in devices
        assert "cuda (1)" in devices
        assert "| torch | 2 (3), 3 (1) |" in lines
    assert "| devices | cpu (2), cuda (not run) |" in table([without_gpu, other_torch])


def test_a_report_has_a_run_for_each_torch_and_no_failure(tmp_path):
    path = tmp_path / "x.jsonl"

    def write(*rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def test(name, outcome):
        return {"id": f"tests/test_a.py::{name}", "outcome": outcome}

    runs = [{"command": "pytest", "torch": torch} for torch in ("2", "3", "4")]
    passed, timed = test("test_x[1]", "passed"), {"suite": "gate", "outcome": "passed"}
    write(runs[0], passed, runs[1], test("test_y", "skipped"), runs[2], timed)
    assert read(path) == [
        ("2", [("test_a", "test_x[1]", True)]),
        ("3", [("test_a", "test_y", False)]),
    ]
    write(runs[0], test("test_x[1]", "failed"), runs[0], test("test_x[1]", "passed"))
    assert ("test_a", "test_x[1]", True) in read(path)[-1][1]
    write(runs[0], test("test_x[1]", "passed"), runs[0], test("test_x[1]", "failed"))
    with pytest.raises(SystemExit, match=r"test_a.py::test_x\[1\] has failed"):
        read(path)
