# SPDX-License-Identifier: Apache-2.0
"""Runs tests and benchmarks on a GPU in parts with time limits: first correctness, then speed.

    make gpu         # about eight minutes, at most nine
    make gpu-more    # continues where the last run stopped, three minutes; repeat until all is done
    make rehearsal   # the same parts on the CPU, with tiny sizes; the figures mean nothing

After its time a part skips what it has not begun, and ends by itself. If it does not, it is
interrupted (GRACE) and then killed (UNTIL_KILLED), and the next part runs. Results are written as
they come: gpu.jsonl (../conftest.py describes it), gpu-parts.jsonl with how each part ended, and
gpu.log with what the parts printed. docs/gpu.md describes the parts. At the end, the run prints the
goals that were measured. The exit status is 1 if a part failed or was stopped.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the package is built in place and need not be installed
LOG_BYTES = 2**20  # the log gets the end of what each part printed
GRACE, UNTIL_KILLED = 25, 8  # seconds from the time limit to SIGINT, and from SIGINT to SIGKILL
LEAST = 10  # seconds; a part does not begin if fewer are left
SECONDS = "{seconds}"  # in a command, replaced by the part's time limit
PASSED, UNFINISHED, FAILED, STOPPED, LEFT_OUT = (
    "passed", "unfinished", "failed", "stopped", "left out"
)  # fmt: skip
TELLING = re.compile(r"\d (passed|failed|skipped|desel)|no tests ran|SUMMARY:|SUMMARY \(|Error: ")
NOTHING_LEFT = 5  # pytest's exit status
OUT_OF_TIME = "out of time"  # ../conftest.py
SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis")


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    seconds: int
    command: tuple
    is_needed: bool = False  # if it fails, nothing else runs
    environment: dict = dataclasses.field(default_factory=dict)


def has(module):
    return importlib.util.find_spec(module) is not None


def parts(options):
    """Returns the parts of `make gpu`, and the further parts of `make gpu-more`. Parts in the same
    tuple run in parallel."""
    is_real = not options.rehearse
    python, device = sys.executable, "cuda" if is_real else "toy"
    pytest = (python, "-m", "pytest", "-v", "-rf", "-p", "no:cacheprovider")
    tests = (*pytest, "--continue-on-collection-errors", "-m", "cuda" if is_real else "not cuda")
    rows = (rows_in(options.results), "--rest", "--deadline", SECONDS)
    rows += ("--tb", "long" if options.more else "short")
    benchmarks = (*pytest, *rows, "--benchmark-only", "--device", device)
    workers = ("-q", "-n", str(options.workers)) if has("xdist") else ()
    if workers and has("pytest_timeout"):  # a signal can't end a test that hangs in the driver
        workers += (f"--timeout={options.timeout}", "--timeout-method=thread")
    few_threads = {"OMP_NUM_THREADS": "2"} if is_real else {}

    def sanitizer(tool):
        # without torch's cache, so that an access outside a tensor is detected
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        checked = ("compute-sanitizer", "--tool", tool, "--kernel-name", "kns=gated_prompt")
        checked = (*checked, "--error-exitcode", "9") if is_real else ()
        which = "small" if is_real else "small and cpu"
        command = (*checked, *tests, "-k", which, "tests/test_smoke.py")
        return Part(tool, 120, command, environment=uncached | few_threads)

    def goals(names, *arguments):
        return (*benchmarks, "--goals", names, "benchmarks", *arguments)

    build = (python, "setup.py", "--quiet", "build_ext", "--inplace")
    ready = (python, "benchmarks/gpu.py", "--ready", *(() if is_real else ("--rehearse",)))
    raw_ops = (python, "benchmarks/lab/raw_ops.py", "--device", device)
    ncu = [word for section in SECTIONS for word in ("--section", section)]
    ncu = ("ncu", "--clock-control", "none", *ncu, "-k", "regex:prompt_gate") if is_real else ()
    gates = (*benchmarks, "benchmarks/bench_prompt_gate.py")
    few = () if is_real else ("-k", "cpu and (scalar or dot)")
    first = [
        (Part("build", 90, build, True, {"FORCE_CUDA": "1"} if is_real else {}),),
        (Part("ready", 30, ready, True),),
        (Part("smoke", 40, (*tests, *rows, *few, "tests/test_smoke.py")),),
        (
            Part("tests", 170, (*tests, *rows, *workers, *few, *options.tests), False, few_threads),
            *map(sanitizer, ("memcheck", "racecheck", "synccheck")),
        ),
        (Part("gate", 45, goals("G1,G2")),),
        (Part("step", 180, goals("G5,G7,G8,G9,G13")),),
        (Part("call", 40, goals("G3", "-k", "not compiled and not autotune and not triton")),),
    ]
    more = [
        (Part("raw-ops", 40, raw_ops),),
        (Part("rivals", 90, goals("G3,G4")),),
        (Part("compiled-step", 150, goals("G6,G12,G14")),),
        (Part("ncu", 60, (*ncu, *raw_ops, "--once", "--sizes", "256x50")),),
        (Part("attention", 60, (*benchmarks, "benchmarks/bench_attention.py")),),
        (Part("chain", 110, (*gates, "-k", "chain and not linear")),),
        (Part("linear", 60, (*gates, "-k", "linear")),),
    ]
    return first[options.built :], more


class Run:
    def __init__(self, options):
        self.most = options.most
        self.start = time.monotonic()
        self.end = self.start + options.seconds
        self.logs, self.results = ROOT / "build" / "gpu", options.results
        self.rows, self.ends, self.log = (
            self.results / name for name in ("gpu.jsonl", "gpu-parts.jsonl", "gpu.log")
        )
        for folder in (self.logs, self.results):
            folder.mkdir(parents=True, exist_ok=True)
        self.about, self.before = None, []  # before: lines of the runs that this one may continue
        self.outcomes = {}  # {part: outcome}, of this run and of the runs that it continues
        for path in filter(Path.exists, (self.rows, self.ends, self.log)):
            path.chmod(0o644)  # a copy from another machine may be read-only
            if not options.more:
                path.unlink()
        if self.ends.exists():
            self.before = list(map(json.loads, self.ends.read_text().splitlines()))

    def all(self, stages):
        for stage in stages:
            stage = [p for p in stage if p.is_needed or self.outcomes.get(p.name) != PASSED]
            running = [began for began in map(self.begin, stage) if began]
            pool = ThreadPoolExecutor()
            try:
                list(pool.map(lambda began: self.finish(*began), running))
            finally:  # also if this run is interrupted
                for *_, process in running:
                    kill(process)
                pool.shutdown()
            if any(part.is_needed and self.outcomes[part.name] != PASSED for part in stage):
                return
            if stage and stage[0].name == "ready":
                self.go_on()

    def go_on(self):
        """Takes over the outcomes of earlier runs of the same commit, torch and GPU. Exits if there
        are results of another GPU or torch, since they must not be mixed."""
        self.about = json.loads(self.log_of("ready").read_text().splitlines()[-1])
        commit, *machine = self.about
        for line in reversed(self.before):  # the last line of a part counts
            before = line["about"] or self.about
            if before[1:] != machine:
                sys.exit(f"gpu: {self.results} has results of {before[1:]}, this is {machine}")
            if before[0] == commit and commit != "unknown" and not commit.endswith("+"):
                self.outcomes.setdefault(line["part"], line["outcome"])

    def begin(self, part):
        """Starts a part. Returns (part, start time, seconds, size of the file of rows, process), or
        None if the part can't run."""
        left = self.end - time.monotonic() - GRACE
        most = self.most if SECONDS in part.command else part.seconds
        seconds = int(min(part.seconds, most, left))
        if seconds < LEAST:
            return self.note(part, LEFT_OUT, 0, "no time is left")
        if shutil.which(part.command[0]) is None:
            return self.note(part, LEFT_OUT, 0, f"no {part.command[0]} here")
        command = [word.replace(SECONDS, str(seconds)) for word in part.command]
        size = self.rows.stat().st_size if self.rows.exists() else 0
        with self.log_of(part.name).open("wb") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env=environment() | part.environment,
            )  # fmt: skip
        return part, time.monotonic(), seconds, size, process

    def finish(self, part, began, seconds, size, process):
        end, was_stopped = began + seconds + GRACE, False
        for sent in (signal.SIGINT, signal.SIGKILL):
            try:
                process.wait(max(0, end - time.monotonic()))
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, sent)
                end, was_stopped = end + UNTIL_KILLED, True
        code = process.wait()
        kill(process)  # ends processes that the part left running
        printed = self.log_of(part.name).read_bytes()[-LOG_BYTES:].decode(errors="replace")
        with self.log.open("a") as log:
            log.write(f"\n======== {part.name}: exit status {code}\n{printed}")
        if was_stopped:
            outcome = STOPPED
        elif code == NOTHING_LEFT and part.name in self.outcomes:
            outcome = PASSED
        elif code == 0 and self.is_cut(part, size):
            outcome = UNFINISHED
        else:  # a part that skipped all its tests has not passed
            has_run = "pytest" not in part.command or re.search(r"\d passed", printed)
            outcome = PASSED if code == 0 and has_run else FAILED
        lines = [line.strip("= ") for line in printed.splitlines() if line.strip()] or [""]
        telling = [line for line in lines if TELLING.search(line)] or lines
        last = telling[-2:] if "SUMMARY" in telling[-1] else telling[-1:]
        self.note(part, outcome, time.monotonic() - began, "; ".join(last))

    def is_cut(self, part, size):
        """True if one of the part's rows, which begin at `size`, was skipped because its time was
        over."""
        if rows_in(self.results) not in part.command or not self.rows.exists():
            return False
        new = self.rows.read_text()[size:].splitlines()
        return any(json.loads(line).get("reason") == OUT_OF_TIME for line in new)

    def log_of(self, name):
        return self.logs / f"{name}.log"

    def note(self, part, outcome, took, says):
        # a part that is left out keeps its earlier outcome, such as a failure
        if outcome != LEFT_OUT or part.name not in self.outcomes:
            self.outcomes[part.name] = outcome
        says = says[:160]
        line = {"part": part.name, "outcome": self.outcomes[part.name], "says": says}
        line |= {"seconds": round(took, 1), "about": self.about}
        with self.ends.open("a") as ends:
            ends.write(json.dumps(line) + "\n")
        now = time.monotonic() - self.start
        print(f"{now:4.0f} s  {part.name:14} {outcome:10} {took:4.0f} s  {says}", flush=True)


def rows_in(results):
    return f"--rows={results / 'gpu.jsonl'}"


def kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def environment():
    """Returns the environment variables of the parts. Compiled code and tuning results go to
    folders that can be copied to another machine. PyPI's xformers needs the CUDA 12 runtime, which
    a wheel can provide."""
    compilers = {
        "TORCHINDUCTOR_CACHE_DIR": str(ROOT / "build" / "inductor"),
        "TRITON_CACHE_DIR": str(ROOT / "build" / "triton"),
        "TRITON_CACHE_AUTOTUNING": "1",
    }
    found = {"PYTHONUNBUFFERED": "1"} | compilers | os.environ
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    runtime = Path(sysconfig.get_path("purelib")) / "nvidia" / "cuda_runtime" / "lib"
    if runtime.exists():
        paths = [os.environ.get("LD_LIBRARY_PATH"), str(runtime)]
        found["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    return found


def table(folder):
    """Yields a line of text for each goal that was measured."""
    import goals
    import rows

    results = rows.load(folder)
    found = {device: result["rows"] for device, result in results.items()}
    for id, what, bound, measured, mode, met in goals.lines(found):
        if measured != goals.NOT_MEASURED:
            yield f"{id:4} {what:96} {bound:7} {measured:24} {met:4} {mode}"


def ready(is_real):
    """Prints commit, torch and GPU. Exits with a message if CUDA can't run here."""
    import torch

    from gated_prompt import ops

    spec = importlib.util.spec_from_file_location("root_conftest", ROOT / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    if is_real and not torch.cuda.is_available():
        sys.exit("no CUDA GPU that torch can use")
    reason = is_real and (ops.cuda_unavailable_reason or ops._lacking_architecture(0))
    if reason:
        sys.exit(reason)
    print(json.dumps(conftest.kind(conftest.about())))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--more", action="store_true", help="continue the run whose results are in the folder")
    add("--rehearse", action="store_true", help="run on the CPU, with tiny sizes")
    add("--built", action="store_true", help="skip the build: the extension is already built")
    add("--ready", action="store_true", help="only check whether CUDA can run here")
    add("--seconds", type=int, default=540, help="time limit of the whole run")
    add("--most", type=int, default=600, help="upper limit for the seconds of any part")
    add("--timeout", type=int, default=90, help="seconds for a test, with pytest-timeout")
    add("--workers", type=int, default=max(2, (os.cpu_count() or 2) - 4), help="for the tests")
    add("--results", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    add("--tests", nargs="+", default=["tests"], help="test files and folders to run")
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.ready:
        return ready(is_real=not options.rehearse)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu: terminated by SIGTERM"))
    run = Run(options)
    first, more = parts(options)
    run.all([*first, *more] if options.more else first)
    title = (
        "REHEARSAL: the figures mean nothing" if options.rehearse else "goals that were measured"
    )
    print(f"\n---- {title} ----", *table(options.results), sep="\n")
    sys.exit(bool({FAILED, STOPPED} & set(run.outcomes.values())))


if __name__ == "__main__":
    main()
