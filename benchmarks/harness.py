# SPDX-License-Identifier: Apache-2.0
"""Times gates, attention and whole models.

A *work* is an object with prepare(), which is not timed, and infer(), forward() and backward(),
each of which makes `calls` calls. verify() compares their results with float64. `race` first runs
and verifies a work and its rival, so that no wrong result is timed. Then it runs the two in turns,
in the order work, rival, rival, work, work, ..., and reports figures of these pairs: other load on
the machine affects both.

Times are per call. On the CPU this is CPU time of the single thread (wall-clock time with several
--threads). On CUDA it is device time between two events around `calls` calls in sequence, followed
by a synchronisation. In eager mode it includes the time that the device waits for the host. Works
with `ahead` (CUDA graphs, and the limits of the machine) are launched while the device still
sleeps, so that their times include no host time.
"""

import math
import statistics
import time

import pytest
import torch

try:
    from nvtx import annotate
except ModuleNotFoundError:  # only profilers need the ranges
    import contextlib

    def annotate(message):
        return contextlib.nullcontext()


PASSES = ("forward", "backward", "forward+backward")  # "forward" is without gradients
TRAINING = ("forward, saving", *PASSES[1:])  # "saving": keeps the tensors that backward needs
AHEAD = 1_000_000  # cycles, half a millisecond, in which the host must launch two graphs


def clock():
    """pytest-benchmark's timer. `race` advances it by the time of each call."""
    return clock.now


clock.now = 0.0
timed_here = pytest.mark.benchmark(timer=clock)


class Timer:
    """Measures seconds on the device, and on CUDA also the host's seconds to launch the work."""

    def __init__(self, device, ahead=False):
        self.is_cuda, self.ahead = device == "cuda", ahead
        self.of_host = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        if self.is_cuda:
            self.of_host = time.perf_counter
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, *functions):
        """Calls the functions and returns (seconds, host's seconds)."""
        if self.is_cuda:
            torch.cuda.synchronize()
            if self.ahead:
                torch.cuda._sleep(AHEAD)
            self.events[0].record()
        start = self.of_host()
        for function in functions:
            function()
        host = self.of_host() - start
        if not self.is_cuda:
            return host, host
        self.events[1].record()
        torch.cuda.synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1e3, host


class Work:
    """Base class of works: random inputs for a case, and one call unless a subclass has more."""

    calls = 1
    ahead = False  # True: launched while the device still sleeps

    def __init__(self, case, peer):
        self.case, self.device, self.name = case, case.device, f"{peer}/{case}"
        self.generator = torch.Generator(case.device).manual_seed(0)

    def randn(self, *size, dtype=None):
        values = torch.randn(size, generator=self.generator, device=self.device)
        return values.to(dtype or self.case.torch_dtype)

    def prepare(self):
        pass

    @torch.no_grad()
    def infer(self):
        self.forward()
        self.inferred = self.result


def assert_near(got, near, exact, eps=0.0):
    """Allows twice the error of plain eager PyTorch (`near`), relative to float64 (`exact`), plus
    rounding: 8 epsilons of the result's dtype or 8 `eps` (of the inputs' dtype)."""
    error, allowed = ((t.double() - exact).norm() / exact.norm() for t in (got, near))
    # 1e-4: on a CPU Inductor sums P*D elements in plain float32 (an error of 1.2e-5 was seen)
    allowed = 2 * allowed + max(8 * torch.finfo(got.dtype).eps, 8 * eps, 1e-4)
    assert error < allowed, f"relative error {error:.3g}, at most {allowed:.3g}"


def seconds(work, which, timer):
    """Returns (seconds, host's seconds) per call of `work`, in a pass of PASSES or TRAINING."""
    work.prepare()
    with annotate(f"{work.name}/{which}"):
        if which == "forward":
            found = timer(work.infer)
        elif which == "forward, saving":
            found = timer(work.forward)
        elif which == "forward+backward":
            found = timer(work.forward, work.backward)
        else:
            work.forward()
            found = timer(work.backward)
    return tuple(value / work.calls for value in found)


def check(work):
    """Runs and verifies a work, unless it has been verified before."""
    if getattr(work, "is_right", False):
        return
    work.prepare()
    work.infer()
    # a Graphed has its results in the work that it captured, and the next replay overwrites them
    inner = getattr(work, "work", work)
    if hasattr(inner, "inferred"):
        inner.inferred = inner.inferred.clone()
    work.prepare()
    work.forward()
    work.backward()
    work.verify()
    work.is_right = True


def label(benchmark, **names):
    """Names a row: suite, case, how, pass and peer. Rows that differ in the peer form a group."""
    benchmark.extra_info |= {key: str(value) for key, value in names.items()}
    benchmark.group = " ".join(map(str, list(names.values())[1:-1]))


def race(benchmark, work, rival, which, budget=0.2, most=200):
    """Times `work` and `rival` in turns, for about `budget` seconds each or `most` rounds.

    extra_info gets [low, median, high], where low and high are the ends of a 95 % interval of the
    median, of: us, the work's time; ratio, its time divided by the rival's; over_us, its time minus
    the rival's; on CUDA host_us. It also gets `calls`, and whether torch was set to deterministic
    algorithms. Returns the median of the work's seconds.
    """
    timer = Timer(work.device, work.ahead)
    for contender in {work, rival}:
        check(contender)
        seconds(contender, which, timer)
    start = time.perf_counter()
    seconds(work, which, timer), seconds(rival, which, timer)
    rounds = max(5, min(most, int(2 * budget / (time.perf_counter() - start))))
    pairs = []

    def run():
        first, second = (work, rival) if len(pairs) % 2 else (rival, work)
        found = seconds(first, which, timer), seconds(second, which, timer)
        own, other = found if len(pairs) % 2 else reversed(found)
        pairs.append((*own, other[0]))
        clock.now += own[0]

    benchmark.pedantic(run, rounds=rounds, warmup_rounds=max(1, rounds // 10))
    own, host, others = zip(*pairs[-rounds:], strict=True)
    info = benchmark.extra_info
    info["us"] = interval([1e6 * value for value in own])
    info["ratio"] = interval([a / b for a, b in zip(own, others, strict=True)])
    info["over_us"] = interval([1e6 * (a - b) for a, b in zip(own, others, strict=True)])
    info["calls"] = work.calls
    info["deterministic"] = torch.are_deterministic_algorithms_enabled()
    if work.device == "cuda":
        info["host_us"] = interval([1e6 * value for value in host])
    return statistics.median(own)


def interval(values):
    """Returns [low, median, high], with the median's 95 % interval from the sorted values."""
    values, half = sorted(values), 0.98 * len(values) ** 0.5
    middle = (len(values) - 1) / 2
    low, high = max(0, int(middle - half)), min(len(values) - 1, math.ceil(middle + half))
    return [values[low], statistics.median(values), values[high]]


class Graphed:
    """The phases of a work as CUDA graphs, timed without the host."""

    ahead = True

    def __init__(self, work):
        self.work, self.name, self.verify = work, f"{work.name}/graph", work.verify
        self.device, self.calls = work.device, work.calls
        phases = ("prepare", "infer", "forward", "backward")
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream())
        # before the capture, so that the first calls can allocate and compile
        with torch.cuda.stream(stream):
            for phase in 3 * phases:
                getattr(work, phase)()
        torch.cuda.synchronize()
        for phase in phases:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                getattr(work, phase)()
            setattr(self, phase, graph.replay)
