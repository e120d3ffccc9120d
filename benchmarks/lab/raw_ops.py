# SPDX-License-Identifier: Apache-2.0
"""Times only the CUDA kernels: raw ops in CUDA graphs, compared with copies in the same process.

    python benchmarks/lab/raw_ops.py [--gates scalar,channel] [--sizes 64x50,256x50] [--once]

For work on kernels: it needs neither timm nor Triton and compiles nothing, so a run takes seconds,
and many variants can be compared in a short time on a GPU (docs/optimisation-log.md). Sizes are
batch x prompts, for ViT-B/16 at 224 px in bfloat16 with the rule mix. Forward saves what backward
needs (it moves 4P); backward has a second carrier (5P). Each line has, for each pass, the median of
microseconds per call, and the bandwidth as a fraction of the bandwidth of a copy of 1 GiB. --once
runs each kernel twice without a graph and times nothing, for ncu.
"""

import argparse
import functools
import statistics
import sys
from pathlib import Path

import torch

from gated_prompt import ops, reference

sys.path.insert(0, str(Path(__file__).parent.parent))  # the suite: benchmarks/
import bench_limits
import gates
from harness import Graphed, Timer, Work, check, seconds
from shapes import GATES, Case

ROUNDS = 15
LOGITS = {name: shapes for name, shapes in GATES.items() if not name.startswith("linear")}
LOGITS["row"] = lambda b, p, d: [(b, p, 1)]  # linear-token has the same backward
PASSES = {"forward, saving": 4, "backward": 5}  # bytes that each must move, in units of [B, P, D]


class RawOps(Work):
    """`calls` gates, each with its own buffers."""

    calls = 16

    def __init__(self, case, gate):
        super().__init__(case, f"raw ops, {gate}")
        batch, _, dim = case.size
        self.start, self.length = case.start, case.prompts
        self.sequence = self.randn(*case.size)
        self.sequences = [self.sequence.clone() for _ in range(self.calls)]
        self.xs = [self.randn(batch, self.length, dim) for _ in range(self.calls)]
        (shape,) = LOGITS[gate](batch, self.length, dim)
        self.logit = self.randn(*shape, dtype=torch.float32)

    def prepare(self):
        for sequence in self.sequences:
            sequence.copy_(self.sequence)

    def forward(self):
        rows = self.logit, self.start, self.length
        self.saved = [
            ops.prompt_gate_fwd_(h, x, *rows, True, True)
            for h, x in zip(self.sequences, self.xs, strict=True)
        ]
        self.result = self.sequences[-1]

    def backward(self):
        """Uses the sequences as gradients, and x as the gradient of the second carrier."""
        rows, wanted = (self.start, self.length, True), (True, True, True, False)
        self.gradients = [
            ops.prompt_gate_bwd_(g, saved, self.logit, c, *rows, *wanted, c.dtype)
            for g, saved, c in zip(self.sequences, self.saved, self.xs, strict=True)
        ]

    def verify(self):
        """Compares the last call with float64."""
        rows = slice(self.start, self.start + self.length)
        allowed = max(8 * torch.finfo(self.result.dtype).eps, 1e-5)
        leaves = [t.double().requires_grad_() for t in (self.sequence, self.xs[-1], self.logit)]
        wanted = reference.prompt_gate(*leaves, self.start, self.length, "mix")
        gradient = self.inferred.double()  # the incoming gradient, before backward overwrote it
        gradient[:, rows] += self.xs[-1]
        exact = torch.autograd.grad(wanted, leaves, gradient)
        found = self.inferred, self.result, *self.gradients[-1][:2]
        for got, near in zip(found, (wanted, *exact), strict=True):
            error = (got.double() - near).norm() / near.norm()
            assert error < allowed, f"{self.name}: relative error {error:.3g}"


def median(work, which):
    check(work)
    timer = Timer(work.device, work.ahead)
    return statistics.median(seconds(work, which, timer)[0] for _ in range(ROUNDS))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gates", default=",".join(LOGITS), help="separated by commas")
    parser.add_argument(
        "--sizes", default="64x50,256x50,256x200", help="batch x prompts, separated by commas"
    )
    parser.add_argument("--once", action="store_true", help="run without timing, for ncu")
    parser.add_argument("--device", choices=("cuda", "toy"), default="cuda", help="as in shapes.py")
    options = parser.parse_args()
    is_toy = options.device == "toy"
    reason = None if torch.cuda.is_available() else "torch finds none"
    if not is_toy and (reason or ops.cuda_unavailable_reason):
        raise SystemExit(f"raw_ops: needs a GPU: {reason or ops.cuda_unavailable_reason}")
    makers = {gate: functools.partial(RawOps, gate=gate) for gate in options.gates.split(",")}
    for batch, prompts in (size.split("x") for size in options.sizes.split(",")):
        case = Case("cuda", int(batch), prompts=int(prompts), dtype="bfloat16")
        case = case.toy() if is_toy else case
        if options.once:
            RawOps.calls = 1
            once([make(case) for make in makers.values()])
        else:
            compare(case, {"copy": gates.Copy, **makers})


def once(works):
    for work in 2 * works:
        work.prepare()
        work.forward()
        work.backward()


@functools.cache
def rate_of_a_copy(device):
    """Returns GB/s of a large copy, and prints it."""
    large = bench_limits.Copy(Case(device, 64, dtype="bfloat16"), "copy")
    rate = large.rate(median(large, "forward"))["gb_per_s"]
    name = torch.cuda.get_device_name() if device == "cuda" else "toy, CPU"
    print(f"{name}, copy {rate / 1e3:.3f} TB/s", flush=True)
    return rate


def compare(case, makers):
    rate = rate_of_a_copy(case.device)
    batch, _, dim = case.size
    rows_bytes = batch * case.prompts * dim * case.torch_dtype.itemsize
    for name, make in makers.items():
        work = Graphed(make(case)) if case.device == "cuda" else make(case)
        line = f"B{batch} P{case.prompts} {name:14}"
        for which, times in PASSES.items():
            found = median(work, which)
            share = times * rows_bytes / found / 1e9 / rate
            line += f" {which} {1e6 * found:8.2f} us {share:.3f}  "
        print(line, flush=True)


if __name__ == "__main__":
    main()
