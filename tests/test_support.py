# SPDX-License-Identifier: Apache-2.0
"""The support matrix, from made-up reports."""

import pytest
import support


def report(tests, torch="2", name="prompt_gate"):
    return torch, [(f"test_{name}", f"test[{test}]", passed) for test, passed in tests.items()]


def test_reports_of_one_torch_are_one():
    without_gpu = report({"cpu-a": True, "cpu-b": True, "cuda-a": False, "cuda-b": False})
    with_gpu = report({"cuda-a": True, "cuda-b": False})
    other_torch = report({"cpu-a": True, "cpu-b": False}, torch="3")
    for reports in ([without_gpu, with_gpu], [with_gpu, without_gpu]):
        lines = support.table([*reports, other_torch])
        devices = next(line for line in lines if line.startswith("| devices |"))
        assert "cpu (2)" in devices
        assert "cuda (1)" in devices
        assert "| torch | 2 (3), 3 (1) |" in lines
    assert "| devices | cpu (2), cuda (not run) |" in support.table([without_gpu, other_torch])


def test_a_report_without_torch_is_refused(tmp_path):
    path = tmp_path / "x.xml"
    path.write_text("<testsuites><testsuite/></testsuites>")
    with pytest.raises(SystemExit, match="does not say which torch"):
        support.read(path)
