# SPDX-License-Identifier: Apache-2.0
"""A run on a GPU in parts, each within its time, the most telling first: truth, then numbers.

    make gpu         # about eight minutes, at most nine
    make gpu-more    # goes on where it stopped, three minutes; again, until nothing is left
    make rehearsal   # the same parts without a GPU: on the CPU, tiny; no figure means anything

A part ends by itself: after its seconds what has not begun skips; half a minute later it is
interrupted, then killed, and the next one runs. What it found by then is in the results: gpu.jsonl
(../conftest.py says how), gpu-parts.jsonl, how each part ended, and gpu.log, what they printed.
docs/gpu.md says what each part is for. Last comes a table of the goals that were measured. Exit
status 1: something failed or was stopped.
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
sys.path.insert(0, str(ROOT))  # the package is built in place, and nothing is installed
LOG_BYTES = 2**20  # of each part, its end
GRACE, UNTIL_KILLED = 25, 8  # seconds from a part's end to SIGINT, and from there to SIGKILL
LEAST = 10  # seconds for which it is worth to begin
SECONDS = "{seconds}"  # in a command: those that the part has
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
    is_needed: bool = False  # where it fails, nothing else runs
    environment: dict = dataclasses.field(default_factory=dict)


def has(module):
    return importlib.util.find_spec(module) is not None


def parts(options):
    """Those of `make gpu`, and more; parts of one tuple run beside each other."""
    is_real = not options.rehearse
    python, device = sys.executable, "cuda" if is_real else "toy"
    pytest = (python, "-m", "pytest", "-v", "-rf", "-p", "no:cacheprovider")
    tests = (*pytest, "--continue-on-collection-errors", "-m", "cuda" if is_real else "not cuda")
    rows = (rows_in(options.results), "--rest", "--deadline", SECONDS)
    rows += ("--tb", "long" if options.more else "short")
    benchmarks = (*pytest, *rows, "--benchmark-only", "--device", device)
    workers = ("-q", "-n", str(options.workers)) if has("xdist") else ()
    if workers and has("pytest_timeout"):  # what hangs in the driver is reached by no signal
        workers += (f"--timeout={options.timeout}", "--timeout-method=thread")
    few_threads = {"OMP_NUM_THREADS": "2"} if is_real else {}

    def sanitizer(tool):
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that a step beyond a tensor is seen
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
        (Part("chain", 90, (*gates, "-k", "chain and not linear")),),
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
        self.about, self.before = None, []  # the lines of runs that this one may go on with
        self.outcomes = {}  # name: of this run, and of those that it goes on with
        for path in filter(Path.exists, (self.rows, self.ends, self.log)):
            path.chmod(0o644)  # brought back from another machine it may be read-only
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
            finally:  # where this run itself is ended
                for *_, process in running:
                    kill(process)
                pool.shutdown()
            if any(part.is_needed and self.outcomes[part.name] != PASSED for part in stage):
                return
            if stage and stage[0].name == "ready":
                self.go_on()

    def go_on(self):
        """With what earlier runs have, if it is of this commit, torch and GPU; those of another GPU
        or torch would spoil the results."""
        self.about = json.loads(self.log_of("ready").read_text().splitlines()[-1])
        commit, *machine = self.about
        for line in reversed(self.before):  # the last of a part counts
            before = line["about"] or self.about
            if before[1:] != machine:
                sys.exit(f"gpu: {self.results} has results of {before[1:]}, this is {machine}")
            if before[0] == commit and commit != "unknown" and not commit.endswith("+"):
                self.outcomes.setdefault(line["part"], line["outcome"])

    def begin(self, part):
        """(part, when it began, its seconds, the size of the rows, its process); None where it
        can't run."""
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
        kill(process)  # what it has left running
        printed = self.log_of(part.name).read_bytes()[-LOG_BYTES:].decode(errors="replace")
        with self.log.open("a") as log:
            log.write(f"\n======== {part.name}: exit status {code}\n{printed}")
        if was_stopped:
            outcome = STOPPED
        elif code == NOTHING_LEFT and part.name in self.outcomes:
            outcome = PASSED
        elif code == 0 and self.is_cut(part, size):
            outcome = UNFINISHED
        else:  # where all was skipped, nothing was shown
            has_run = "pytest" not in part.command or re.search(r"\d passed", printed)
            outcome = PASSED if code == 0 and has_run else FAILED
        lines = [line.strip("= ") for line in printed.splitlines() if line.strip()] or [""]
        telling = [line for line in lines if TELLING.search(line)] or lines
        last = telling[-2:] if "SUMMARY" in telling[-1] else telling[-1:]
        self.note(part, outcome, time.monotonic() - began, "; ".join(last))

    def is_cut(self, part, size):
        """Whether something of its rows, those behind `size`, was skipped since its time was up."""
        if rows_in(self.results) not in part.command or not self.rows.exists():
            return False
        new = self.rows.read_text()[size:].splitlines()
        return any(json.loads(line).get("reason") == OUT_OF_TIME for line in new)

    def log_of(self, name):
        return self.logs / f"{name}.log"

    def note(self, part, outcome, took, says):
        if outcome != LEFT_OUT or part.name not in self.outcomes:  # a failure is not forgotten
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
    """That of the parts. What compilers make and find out goes to folders that can be taken along;
    xformers of PyPI wants the CUDA 12 runtime, which a wheel can bring."""
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
    """The goals that were measured."""
    import goals
    import rows

    results = rows.load(folder)
    found = {device: result["rows"] for device, result in results.items()}
    for id, what, bound, measured, mode, met in goals.lines(found):
        if measured != goals.NOT_MEASURED:
            yield f"{id:4} {what:96} {bound:7} {measured:24} {met:4} {mode}"


def ready(is_real):
    """Ends with why CUDA can't run here; prints commit, torch and GPU."""
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
    add("--more", action="store_true", help="go on with the run whose results are there")
    add("--rehearse", action="store_true", help="without a GPU: on the CPU, tiny")
    add("--built", action="store_true", help="the extension is built, and built for this")
    add("--ready", action="store_true", help="only say whether CUDA can run here")
    add("--seconds", type=int, default=540, help="of all")
    add("--most", type=int, default=600, help="seconds of a part")
    add("--timeout", type=int, default=90, help="seconds of a test, where pytest-timeout is there")
    add("--workers", type=int, default=max(2, (os.cpu_count() or 2) - 4), help="of the tests")
    add("--results", type=Path, default=Path("benchmarks/results"), help="folder")
    add("--tests", nargs="+", default=["tests"], help="what of them")
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.ready:
        return ready(is_real=not options.rehearse)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu: ended from outside"))
    run = Run(options)
    first, more = parts(options)
    run.all([*first, *more] if options.more else first)
    title = (
        "REHEARSAL: no figure means anything" if options.rehearse else "goals that were measured"
    )
    print(f"\n---- {title} ----", *table(options.results), sep="\n")
    sys.exit(bool({FAILED, STOPPED} & set(run.outcomes.values())))


if __name__ == "__main__":
    main()
