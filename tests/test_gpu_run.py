# SPDX-License-Identifier: Apache-2.0
"""Runs in parts (conftest.py, benchmarks/gpu.py): how each part ends, which results are kept."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu

spec = importlib.util.spec_from_file_location("root_conftest", ROOT / "conftest.py")
root_conftest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(root_conftest)

HAS_WORKERS = importlib.util.find_spec("xdist") is not None


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A temporary folder with copies of conftest.py and benchmarks, for pytest to run in."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the package may be built in place only
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = test_*.py bench_*.py\n")
    (tmp_path / "benchmarks").mkdir()
    for path in (ROOT / "benchmarks").glob("*.py"):
        shutil.copy(path, tmp_path / "benchmarks")
    return tmp_path


def run_pytest(folder, *arguments, **environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"GATED_PROMPT_COMMIT": "c"} | environment
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def lines_of(path):
    return list(map(json.loads, path.read_text().splitlines()))


def outcomes(path):
    """Returns {test name: outcome}."""
    return {row["id"].partition("::")[2]: row["outcome"] for row in lines_of(path) if "id" in row}


FOUR = """
import pytest
def test_passes(): pass
def test_fails(): assert False
@pytest.mark.skip(reason="wanted")
def test_skips(): pass
@pytest.fixture
def broken(): raise ValueError
def test_has_no_fixture(broken): pass
@pytest.mark.xfail(reason="known")
def test_is_known(): assert False
@pytest.fixture
def breaks(): yield; raise ValueError
def test_breaks_at_its_end(breaks): pass
"""


@pytest.mark.parametrize("workers", [(), pytest.param(("-n", "2"), id="workers")])
def test_each_result_is_a_line(workers, copied):
    if workers and not HAS_WORKERS:
        pytest.skip("no pytest-xdist")
    (copied / "test_four.py").write_text(FOUR)
    (copied / "test_broken.py").write_text("import no_such_module")
    what = ("test_four.py", "test_broken.py", "--continue-on-collection-errors")
    run_pytest(copied, *what, "--rows=x.jsonl", *workers)
    begin, *rows = lines_of(copied / "x.jsonl")
    broken = [row for row in rows if row["id"] == "test_broken.py"]
    assert broken
    for row in broken:
        assert row["outcome"] == "failed"
        assert "no_such_module" in row["why"]
    rows = [row for row in rows if row not in broken]
    (failed,) = (row for row in rows if row["id"].endswith("test_fails"))
    assert "assert False" in failed["why"]
    assert begin["command"].startswith("pytest -q")
    assert (begin["commit"], begin["torch"]) == ("c", torch.__version__)
    assert {row["id"].partition("::")[2]: (row["outcome"], row.get("reason")) for row in rows} == {
        "test_passes": ("passed", None),
        "test_fails": ("failed", None),
        "test_skips": ("skipped", "wanted"),
        "test_has_no_fixture": ("failed", None),
        "test_is_known": ("skipped", "known"),
        "test_breaks_at_its_end": ("failed", None),
    }


@pytest.mark.parametrize("workers", [(), pytest.param(("-n", "2"), id="workers")])
def test_the_rest_is_what_has_not_passed(workers, copied):
    if workers and not HAS_WORKERS:
        pytest.skip("no pytest-xdist")
    (copied / "test_four.py").write_text(FOUR)
    rows = copied / "x.jsonl"
    arguments = ("test_four.py", "--rows=x.jsonl", "--rest", *workers)
    run_pytest(copied, *arguments, "--deadline", "-1")
    assert set(outcomes(rows).values()) == {"skipped"}
    assert sum(row.get("reason") == gpu.OUT_OF_TIME for row in lines_of(rows)) == 6
    run_pytest(copied, *arguments)
    assert sum(row.get("outcome") == "passed" for row in lines_of(rows)) == 1
    assert len(lines_of(rows)) == 2 * 7
    for commit, is_again in (("c", False), ("another", True)):
        before = len(lines_of(rows))
        run_pytest(copied, *arguments, GATED_PROMPT_COMMIT=commit)
        again = [row.get("id") for row in lines_of(rows)[before:]]
        assert "test_four.py::test_fails" in again
        assert ("test_four.py::test_passes" in again) == is_again


TIMED = """
import os, signal, time
import pytest, torch
from harness import timed_here, Work, label, race
import shapes

pytestmark = timed_here
CASE = shapes.Case("cpu", 1)

class Nothing(Work):
    def forward(self): self.result = torch.zeros(())
    def backward(self): pass
    def verify(self): pass

@pytest.mark.parametrize("index", range(3))
def test_timed(benchmark, index):
    if index == 2:
        FAULT
    label(benchmark, suite="gate", case=CASE, how="alone", which="forward", peer=str(index))
    work = Nothing(CASE, "nothing")
    race(benchmark, work, work, "forward", most=5)
"""
FAULTS = {
    "hangs": "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "hangs, with a limit": "time.sleep(600)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_part_that_hangs_or_is_killed_keeps_its_rows(fault, copied, monkeypatch):
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)  # set if xdist runs this test
    monkeypatch.setattr(gpu, "ROOT", copied)
    monkeypatch.setattr(gpu, "GRACE", 6 if "limit" in fault else 0)
    monkeypatch.setattr(gpu, "UNTIL_KILLED", 1)
    limit = ("--timeout", "3", "--timeout-method", "thread") if "limit" in fault else ()
    if limit and importlib.util.find_spec("pytest_timeout") is None:
        pytest.skip("no pytest-timeout")
    for name, what in (("bad", FAULTS[fault]), ("good", "pass")):
        (copied / "benchmarks" / f"bench_{name}.py").write_text(TIMED.replace("FAULT", what))
    run = gpu.Run(SimpleNamespace(seconds=600, most=600, more=False, results=copied / "results"))
    pytest_ = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rest")
    pytest_ += (gpu.rows_in(run.results), "--deadline", gpu.SECONDS, *limit)
    parts = [
        gpu.Part(name, 18, (*pytest_, f"benchmarks/bench_{name}.py")) for name in ("bad", "good")
    ]
    run.all([(part,) for part in parts])
    ends = {line["part"]: line["outcome"] for line in lines_of(run.ends)}
    assert ends["good"] == "passed"
    assert ends["bad"] == ("failed" if fault in ("is killed", "hangs, with a limit") else "stopped")
    found = [(row["id"], row["us"]) for row in lines_of(run.rows) if "us" in row]
    assert [id.split("/")[1] for id, _ in found] == [
        *(f"bench_bad.py::test_timed[{index}]" for index in range(2)),
        *(f"bench_good.py::test_timed[{index}]" for index in range(3)),
    ]
    assert all(len(us) == 3 for _, us in found)
    assert "======== bad: exit status" in run.log.read_text()


def options(results, **changes):
    return SimpleNamespace(**{
        **{"rehearse": False, "built": False, "more": False, "timeout": 90, "workers": 2},
        **{"seconds": 600, "most": 600, "tests": ["tests"], "results": results, **changes},
    })  # fmt: skip


def say(text):
    return (sys.executable, "-c", f"print({text!r})")


def test_more_goes_on_from_results_that_are_read_only(tmp_path):
    def ready(*about):
        return (gpu.Part("ready", 60, say(json.dumps(about)), is_needed=True),)

    stages = [
        (gpu.Part("good", 60, say("9 passed in 1 s")), gpu.Part("lacking", 60, ("no-such-tool",))),
        (gpu.Part("bad", 60, (sys.executable, "-c", "raise ValueError('why')")),),
    ]
    run = gpu.Run(options(tmp_path))
    run.all([ready("c", "t", "g"), *stages])
    assert [(line["part"], line["outcome"], line["says"]) for line in lines_of(run.ends)] == [
        ("ready", "passed", '["c", "t", "g"]'),
        ("lacking", "left out", "no no-such-tool here"),
        ("good", "passed", "9 passed in 1 s"),
        ("bad", "failed", "ValueError: why"),
    ]
    for about, again in (
        (("c", "t", "g"), ["ready", "lacking", "bad"]),
        (("d", "t", "g"), ["ready", "lacking", "good", "bad"]),
        (("unknown", "t", "g"), ["ready", "lacking", "good", "bad"]),
        (("unknown", "t", "g"), ["ready", "lacking", "good", "bad"]),
    ):
        for path in tmp_path.iterdir():
            path.chmod(0o444)
        before = len(lines_of(run.ends))
        run = gpu.Run(options(tmp_path, more=True))
        run.all([ready(*about), *stages])
        assert [line["part"] for line in lines_of(run.ends)[before:]] == again
    run = gpu.Run(options(tmp_path, more=True))
    with pytest.raises(SystemExit, match=r"has results of \['t', 'g'\], this is \['t', 'h'\]"):
        run.all([ready("c", "t", "h"), *stages])
    gpu.Run(options(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_not_forgotten_when_the_part_is_left_out(tmp_path):
    part = gpu.Part("one", 60, (sys.executable, "-c", "raise ValueError"))
    run = gpu.Run(options(tmp_path))
    run.all([(part,)])
    run.end = 0
    run.all([(part,)])
    assert [line["outcome"] for line in lines_of(run.ends)] == ["failed", "failed"]


@pytest.mark.parametrize(
    ("printed", "outcome"), [("3 passed", "passed"), ("28 skipped\nSUMMARY: 0 errors", "failed")]
)
def test_a_part_in_which_all_was_skipped_has_not_passed(printed, outcome, tmp_path):
    run = gpu.Run(options(tmp_path))
    run.all([(gpu.Part("memcheck", 60, (*say(printed), "pytest")),)])
    assert run.outcomes == {"memcheck": outcome}


WITHOUT_INSTALLATION = """
import runpy, sys
from pathlib import Path

sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
sys.path = [path for path in sys.path if path not in ("", {root!r})]
found = runpy.run_path("benchmarks/gpu.py")
sys.path.insert(0, "benchmarks")
print(len(list(found["table"](Path("benchmarks/results")))))
"""


def test_the_package_need_not_be_installed():
    """With a build in place only, the parts of a run and the table still import the package."""
    assert gpu.environment()["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    command = [sys.executable, "-c", WITHOUT_INSTALLATION.format(root=str(ROOT))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 0


@pytest.mark.parametrize(
    ("argument", "kept"),
    [
        ("--rows=/a/b/gpu.jsonl", "--rows=gpu.jsonl"),
        ("/a/b/c.jsonl", "c.jsonl"),
        ("benchmarks/bench_vit.py", "benchmarks/bench_vit.py"),
        ("--rows=benchmarks/results/gpu.jsonl", "--rows=benchmarks/results/gpu.jsonl"),
        ("cuda and (a or b)", "cuda and (a or b)"),
    ],
)
def test_a_command_is_kept_without_folders_of_the_machine(argument, kept):
    assert root_conftest.portable(argument) == kept


def test_after_a_needed_part_fails_nothing_runs(tmp_path):
    fail = gpu.Part("build", 60, (sys.executable, "-c", "raise SystemExit(1)"), is_needed=True)
    run = gpu.Run(options(tmp_path))
    run.all([(fail,), (gpu.Part("next", 60, (sys.executable, "-c", "")),)])
    assert run.outcomes == {"build": "failed"}


def test_without_time_parts_are_left_out(tmp_path):
    run = gpu.Run(options(tmp_path, seconds=gpu.GRACE + gpu.LEAST - 1))
    run.all([(gpu.Part("one", 60, (sys.executable, "-c", "")),)])
    assert run.outcomes == {"one": "left out"}


@pytest.mark.parametrize("rehearse", [False, True])
def test_ready_says_why_not(rehearse, tmp_path, monkeypatch):
    first, _ = gpu.parts(options(tmp_path, rehearse=rehearse))
    (part,) = next(stage for stage in first if stage[0].name == "ready")
    run = gpu.Run(options(tmp_path))
    run.all([(part,)])
    (line,) = lines_of(run.ends)
    is_ready = rehearse or torch.cuda.is_available()
    assert line["outcome"] == ("passed" if is_ready else "failed")
    about = root_conftest.kind(root_conftest.about())
    assert line["says"] == (json.dumps(about) if is_ready else "no CUDA GPU that torch can use")


@pytest.mark.parametrize("rehearse", [False, True])
def test_parts_name_files_that_are_there_and_fit_one_call(rehearse, tmp_path):
    first, more = gpu.parts(options(tmp_path, rehearse=rehearse))
    names = [part.name for stage in first + more for part in stage]
    assert len(set(names)) == len(names)
    assert sum(max(part.seconds for part in stage) for stage in first) <= 600
    for part in (part for stage in first + more for part in stage):
        files = [word for word in part.command if word.endswith(".py") and "/" in word]
        assert all((ROOT / file).exists() for file in files), part


# ---- what a run records about itself ----


@pytest.mark.parametrize("fault", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 60)])
def test_a_run_is_not_lost_where_git_and_nvidia_smi_fail(fault, monkeypatch):
    def run(*arguments, **options):
        raise fault

    monkeypatch.delenv("GATED_PROMPT_COMMIT", raising=False)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert root_conftest.commit() == "unknown"
    assert root_conftest.gpu() == {"cuda": torch.version.cuda}
    monkeypatch.setenv("GATED_PROMPT_COMMIT", "abc")
    assert root_conftest.commit() == "abc"


def test_a_copy_with_the_git_of_another_commit_is_told_its_own(monkeypatch):
    monkeypatch.setattr(root_conftest, "_printed", lambda *command: "of another commit")
    monkeypatch.delenv("GATED_PROMPT_COMMIT", raising=False)
    assert root_conftest.commit() == "of another commit+"
    monkeypatch.setenv("GATED_PROMPT_COMMIT", "abc")
    assert root_conftest.commit() == "abc"


def test_a_field_that_nvidia_smi_refuses_is_left_out(monkeypatch):
    def run(command, **options):
        is_known = "clocks.sm" not in command[1]
        return SimpleNamespace(
            returncode=not is_known, stdout="a\nb\n" if is_known else "Field ..."
        )

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = root_conftest.gpu()
    assert "clocks.sm" not in found
    assert found["name"] == found["clocks_event_reasons.active"] == "a"
