# SPDX-License-Identifier: Apache-2.0
"""Whole models compared with their peers: a training step (forward, loss, gradients of all tuned
parameters; no optimiser) and inference.

    pytest benchmarks/bench_vit.py --benchmark-only [flags of shapes.py] [--all-peers]

Weights are float32. A case with another dtype, such as the default on CUDA, runs under autocast to
it. ratio is relative to VPT-shallow on timm's own blocks, run in the same way: eager, compiled or
as a CUDA graph. The row "vpt-shallow" compares this model with itself, so its interval shows the
noise. --all-peers adds rows that take long, most of them compiled, and our own linear and full,
which do the same as the other linear and full.

Other extra_info: attention, the implementation that computes it (SDPA with the same backend for all
peers except the original); images_per_s, from the median; tuned, the number of tuned parameters;
for a step saved_bytes, kept between forward and backward; for a step on CUDA peak_bytes, the peak
above the memory that was allocated before; for a compiled step flop, counted.
Before a row is timed, vit_peers.check must pass, and the model as it will be timed (compiled, under
autocast) must agree with the eager float32 model.
"""

import functools
import gc

import pytest
import torch
import torch.nn.functional as F
from counts import ROWS, allocated_bytes, count, requested_bytes, saved_bytes
from harness import Graphed, Work, label, race, timed_here
from peers import COMPILED, compiled
from shapes import MODELS, chosen
from torch.nn.attention import SDPBackend
from torch.nn.utils import parameters_to_vector
from vit_peers import NUM_CLASSES, PEERS, check, make, tuned, unavailable_reason

MODES = {"step": "forward+backward", "inference": "forward"}
HOWS = ("", *COMPILED, ", graph")
SAME = ("gated_prompt linear", "gated_prompt full")  # the same as "linear" and "full"
GATES_ALONE = ("gated_prompt, gates alone", "original, gates alone")
EAGER_ONLY = ("linear", "linear, cached features", *SAME)
FEW = ("original", "gated_prompt", "vpt-shallow")
GRAPHED = (
    *FEW,
    *("gated_prompt, " + how for how in ("all rows", "gates alone", "memory low")),
    "vpt-deep",
)
REFERENCE = ("ViT-B/16", 224, 64, 50)
ON_CUDA = {  # (model, pixels, batch, prompts): the peers whose eager steps goals.py needs
    REFERENCE: [name for name in PEERS if name not in (*SAME, "original, gates alone")],
    ("ViT-L/16", 224, 64, 50): ("gated_prompt", "gated_prompt, all rows", "vpt-shallow"),
    ("ViT-L/16", 512, 16, 50): ("gated_prompt, memory low",),
}
# relative error of the logits and of each group of gradients; 0.1 for other dtypes
TOLERANCE = {"float32": 1e-3}
pytestmark = timed_here


class Model(Work):
    """A peer in one mode on one shape."""

    def __init__(self, case, mode, name, how):
        super().__init__(case, f"{name}{how}")
        check(name, case.device)
        batch, self.mode = case.batch, mode
        self.eager = make(name, MODELS[case.model][0], case.prompts, img_size=case.pixels)
        self.eager = self.eager.to(case.device).train(mode == "step")
        self.model = compiled(self.eager, COMPILED.get(how))
        self.images = self.randn(batch, 3, case.pixels, case.pixels, dtype=torch.float32)
        self.labels = torch.arange(batch, device=case.device) % NUM_CLASSES
        self.tuned = tuned(self.eager)
        self.parameters = [p for group in self.tuned.values() for p in group]

    def precision(self):
        dtype = self.case.torch_dtype
        is_narrow = dtype != torch.float32
        return torch.autocast(self.device, dtype if is_narrow else None, is_narrow, False)

    @torch.no_grad()
    def infer(self):
        if self.mode == "inference":
            with self.precision():
                self.result = self.model(self.images)

    def forward(self):
        if self.mode == "step":
            with self.precision():
                self.result = self.model(self.images)
                self.loss = F.cross_entropy(self.result, self.labels)

    def backward(self):
        if self.mode == "step":
            self.gradients = torch.autograd.grad(self.loss, self.parameters)

    def verify(self):
        """Compares with the eager float32 model, 8 images at a time to limit memory."""
        wanted, gradients = [], [torch.zeros_like(p) for p in self.parameters]
        with torch.set_grad_enabled(self.mode == "step"):
            for images, labels in zip(self.images.split(8), self.labels.split(8), strict=True):
                logits = self.eager(images)
                wanted.append(logits.detach())
                if self.mode == "step":
                    loss = F.cross_entropy(logits, labels, reduction="sum") / len(self.images)
                    new = torch.autograd.grad(loss, self.parameters)
                    gradients = [a + b for a, b in zip(gradients, new, strict=True)]
        self.compare("logits", self.result.detach(), torch.cat(wanted))
        if self.mode == "step":
            # the gradient of a convolution may be channels-last
            own = [g.contiguous() for g in self.gradients]
            for name, group in self.tuned.items():
                parts = (parameters_to_vector(t[: len(group)]) for t in (own, gradients))
                self.compare(name, *parts)
                del own[: len(group)], gradients[: len(group)]

    def compare(self, name, got, wanted):
        error = ((got.float() - wanted).norm() / wanted.norm()).item()
        # temperatures: sums that cancel; in bfloat16 the error was 0.31 for the original and 0.15
        # for ours (ViT-S/16, CPU)
        tolerance = TOLERANCE.get(self.case.dtype, 0.1) * (10 if name == "temperatures" else 1)
        assert error < tolerance, f"{name}: relative error {error:.3g}"

    def memory(self):
        """Returns saved_bytes and, on CUDA, peak_bytes of a step. The step must have run before."""
        with self.precision():
            found = {"saved_bytes": allocated_bytes(self.model, self.images)}
            if self.model is self.eager:  # both ways of counting must agree
                counted = saved_bytes(self.eager, self.images)[0]
                assert abs(found["saved_bytes"] - counted) < 0.01 * counted + 1e5
        if self.device == "cuda":
            before = requested_bytes()
            torch.cuda.reset_peak_memory_stats()
            self.forward()
            self.backward()
            found["peak_bytes"] = requested_bytes("peak") - before
        return found


@functools.lru_cache(maxsize=1)
def rival_of(case, mode, how):
    torch._dynamo.reset()  # drops compiled code and guards for other shapes and modes
    return make_work(case, mode, "vpt-shallow", how)


def make_work(case, mode, name, how):
    gc.collect()  # models are reference cycles
    work = Model(case, mode, name, how)
    return Graphed(work) if how == ", graph" and work.device == "cuda" else work


def rows(config):
    """Yields (device, case, mode, how, peer)."""
    for case in chosen(config, "vit"):
        for mode in MODES:
            for how in HOWS:
                for name in PEERS:
                    if (name in EAGER_ONLY and how) or (how == ", graph" and case.device == "cpu"):
                        continue
                    if config.getoption("all_peers") or by_default(case, mode, how, name):
                        yield case.device, case, mode, how, name


def by_default(case, mode, how, name):
    """True if the row runs without --all-peers: eager rows; on CUDA only steps, plus a few compiled
    steps, since compiling takes a minute, and a few CUDA graphs, which exclude host time."""
    if case.device == "cpu":
        return how == "" and name not in (*SAME, *GATES_ALONE)
    size = case.model, case.pixels, case.batch, case.prompts
    if mode != "step" or how == "":
        return mode == "step" and name in ON_CUDA.get(size, FEW)
    if how == ", graph" and size == REFERENCE:
        return name in GRAPHED
    wanted = {", compiled": REFERENCE, ", graph": ("ViT-B/16", 224, 8, 50)}
    return size == wanted.get(how) and name in FEW


def names(case, mode, how, peer):
    """Returns the fields that identify a row in the results."""
    return {"suite": "vit", "case": case.shape, "which": mode, "peer": f"{peer}{how}"}


def attention_of(case, peer):
    """Returns what computes attention. For SDPA torch chooses the backend, which may be cuDNN on a
    Hopper GPU."""
    if peer == "original":
        return "explicit softmax"
    _, num_tokens, dim = case.size
    heads = MODELS[case.model][2]
    q = torch.empty(1, heads, num_tokens, dim // heads, dtype=case.torch_dtype, device=case.device)
    choice = torch._fused_sdp_choice(*3 * [q.requires_grad_()])
    return f"sdpa, {SDPBackend(choice).name.lower()}"


def pytest_generate_tests(metafunc):
    arguments = ("device", "case", "mode", "how", "peer")
    of_device = ["device", "case"]
    metafunc.parametrize(arguments, list(rows(metafunc.config)), indirect=of_device, ids=str)


def test_vit(benchmark, device, case, mode, how, peer):
    if unavailable_reason(peer) is not None:
        pytest.skip(unavailable_reason(peer))
    label(benchmark, **names(case, mode, how, peer))
    benchmark.extra_info["attention"] = attention_of(case, peer)
    try:
        rival = work = rival_of(case, mode, how)
        if peer != "vpt-shallow":
            work = make_work(case, mode, peer, how)
        median = race(benchmark, work, rival, MODES[mode], budget=1.0, most=60)
        benchmark.extra_info["images_per_s"] = case.batch / median
        if mode == "step" and how != ", graph":
            benchmark.extra_info |= work.memory()
            benchmark.extra_info["tuned"] = sum(p.numel() for p in work.parameters)
        if how in COMPILED and mode == "step" and peer in ROWS:
            size = MODELS[case.model][0], case.pixels, case.prompts, case.batch
            benchmark.extra_info["flop"] = count(peer, *size)["flop"]
    except torch.OutOfMemoryError as error:
        pytest.skip(f"out of memory: {error}")
