# SPDX-License-Identifier: Apache-2.0
"""How anything is timed: one harness for gates, attention and whole models.

What is timed is a work: an object with prepare(), which is not timed, then infer(), or forward()
and backward(), each of which makes `calls` calls. verify() compares the results that these left
with float64. `race` first lets both run and verify, so that no wrong result is timed, and then runs
a work in turns with another, its rival, in the order work, rival, rival, work, work, ...; what it
reports is of those pairs: what the machine does meanwhile meets both.

Time is of one call: on the CPU, CPU time of the one thread (with --threads, time); on CUDA, time on
the device between two events with a synchronisation after them, over `calls` calls one after the
other. In eager mode that has the host in it wherever the device waits for it; CUDA graphs, and what
says what the device can do, are handed over while it still sleeps.
"""

import math
import statistics
import time

import pytest
import torch

try:
    from nvtx import annotate
except ModuleNotFoundError:  # ranges are for profilers; the numbers do not need them
    import contextlib

    def annotate(message):
        return contextlib.nullcontext()


PASSES = ("forward", "backward", "forward+backward")  # forward alone: without gradients
TRAINING = ("forward, saving", *PASSES[1:])  # what backward needs is saved, as in a step
AHEAD = 1_000_000  # cycles, half a millisecond: what the host may take to hand over two graphs


def clock():
    """pytest-benchmark's timer; it goes on by the time that a call took."""
    return clock.now


clock.now = 0.0
timed_here = pytest.mark.benchmark(timer=clock)


class Timer:
    """Seconds on the device, and on CUDA those that the host took to hand the work over."""

    def __init__(self, device, ahead=False):
        self.is_cuda, self.ahead = device == "cuda", ahead
        self.of_host = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        if self.is_cuda:
            self.of_host = time.perf_counter
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, *functions):
        """(seconds, host's seconds) of calling these."""
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
    """What all works have: random inputs of a case, one call unless it says otherwise."""

    calls = 1
    ahead = False  # whether it is handed over while the device still sleeps

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
    """At most twice as far from float64 as plain eager PyTorch, `near`, and some rounding, in
    epsilons of the result or of what it was made of."""
    error, allowed = ((t.double() - exact).norm() / exact.norm() for t in (got, near))
    # 1e-4: Inductor's plain float32 sums over P D elements on a CPU (1.2e-5 was seen)
    allowed = 2 * allowed + max(8 * torch.finfo(got.dtype).eps, 8 * eps, 1e-4)
    assert error < allowed, f"relative error {error:.3g}, at most {allowed:.3g}"


def seconds(work, which, timer):
    """(seconds, host's seconds) of a call of `work` in one of PASSES or TRAINING."""
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
    """Once for each work."""
    if getattr(work, "is_right", False):
        return
    work.prepare()
    work.infer()
    inner = getattr(work, "work", work)  # of a Graphed, whose results stay where they are
    if hasattr(inner, "inferred"):
        inner.inferred = inner.inferred.clone()
    work.prepare()
    work.forward()
    work.backward()
    work.verify()
    work.is_right = True


def label(benchmark, **names):
    """What a row is: suite, case, how, pass and peer; rows that differ in the peer are a group."""
    benchmark.extra_info |= {key: str(value) for key, value in names.items()}
    benchmark.group = " ".join(map(str, list(names.values())[1:-1]))


def race(benchmark, work, rival, which, budget=0.2, most=200):
    """Times `work` beside `rival` in a pass, for about `budget` seconds each or `most` rounds.

    extra_info gets, as [low, median, high], the ends of a 95 % interval around the median: us, the
    work's time; ratio, that over its rival's; over_us, that less its rival's; on CUDA host_us. And
    whether torch was told to be deterministic. Returns the median of the work's seconds.
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
    """[low, median, high]: the median and its 95 % interval, from the order of the values."""
    values, half = sorted(values), 0.98 * len(values) ** 0.5
    middle = (len(values) - 1) / 2
    low, high = max(0, int(middle - half)), min(len(values) - 1, math.ceil(middle + half))
    return [values[low], statistics.median(values), values[high]]


class Graphed:
    """The phases of a work as CUDA graphs: no host in the way."""

    ahead = True

    def __init__(self, work):
        self.work, self.name, self.verify = work, f"{work.name}/graph", work.verify
        self.device, self.calls = work.device, work.calls
        phases = ("prepare", "infer", "forward", "backward")
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made once is made before the capture
            for phase in 3 * phases:
                getattr(work, phase)()
        torch.cuda.synchronize()
        for phase in phases:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                getattr(work, phase)()
            setattr(self, phase, graph.replay)
