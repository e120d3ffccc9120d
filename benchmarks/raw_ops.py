# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels by themselves: raw ops in CUDA graphs, beside copies in the same process.

    python benchmarks/raw_ops.py [--gates scalar,channel] [--sizes 64x50,256x50]

For work on kernels: it needs torch and gated_prompt alone and takes seconds, so that many variants
can be compared while a GPU is at hand (docs/optimisation-log.md). Sizes are batch x prompts, of
ViT-B/16 at 224 px in bfloat16, rule mix. A call has buffers of its own, 16 in a graph; forward
saves what backward needs (4P), backward has a second carrier (5P). Each line: us a call, the median
of 15, and the bytes over that time as a fraction of a copy of 1 GiB; "eager": without a graph,
host and all. Results are not compared with anything here; the tests and the suites do that.
"""

import argparse
import statistics

import shapes
import torch

from gated_prompt import ops

CALLS, ROUNDS, AHEAD = 16, 15, 400_000  # AHEAD: cycles that the device sleeps, as in harness.py
DTYPE = torch.bfloat16


def microseconds(run, before=lambda: None):
    found = []
    for _ in range(ROUNDS):
        before()
        torch.cuda.synchronize()
        torch.cuda._sleep(AHEAD)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(1e3 * start.elapsed_time(end))
    return statistics.median(found)


def captured(run):
    """(a replay of run, what it returned)"""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = run()
    return graph.replay, results


def copy_rate():
    """Of 1 GiB: bytes read and written a microsecond."""
    source = torch.randint(0, 256, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / microseconds(lambda: target.copy_(source))


def measure(batch, length, gates, rate):
    dim, start = shapes.MODELS["ViT-B/16"][1], 1
    rows = slice(start, start + length)
    size = (batch, start + length + (224 // 16) ** 2, dim)
    sequence = torch.randn(size, device="cuda", dtype=DTYPE)
    sequences = [sequence.clone() for _ in range(CALLS)]
    xs = [torch.randn(batch, length, dim, device="cuda", dtype=DTYPE) for _ in sequences]
    part = xs[0].nbytes

    def refill():
        for tensor in sequences:
            tensor.copy_(sequence)

    targets, sources = (
        [torch.empty_like(x) for x in xs],
        [s[:, rows].contiguous() for s in sequences],
    )
    replay, _ = captured(lambda: [t.copy_(s) for t, s in zip(targets, sources, strict=True)])
    us = microseconds(replay) / CALLS
    print(f"B{batch} P{length} {'copy, 2P':12} {us:8.2f} us {2 * part / us / rate:.3f}", flush=True)
    for gate in gates:
        (shape,) = shapes.GATES[gate](batch, length, dim)
        logit = torch.randn(shape, device="cuda")

        def forward(logit=logit):
            return [
                ops.prompt_gate_fwd_(h, x, logit, start, length, True, True)
                for h, x in zip(sequences, xs, strict=True)
            ]

        replay, saved = captured(forward)
        us_forward = microseconds(replay, refill) / CALLS

        def backward(logit=logit, saved=saved):
            flags = (True, True, True, True, False, DTYPE)
            return [
                ops.prompt_gate_bwd_(g, s, logit, c, start, length, *flags)
                for g, s, c in zip(sequences, saved, xs, strict=True)
            ]

        replay, gradients = captured(backward)
        us_backward = microseconds(replay, refill) / CALLS
        eager = microseconds(backward, refill) / CALLS
        print(
            f"B{batch} P{length} {gate:12} forward {us_forward:8.2f} us "
            f"{4 * part / us_forward / rate:.3f}   backward {us_backward:8.2f} us "
            f"{5 * part / us_backward / rate:.3f}   eager {eager:8.2f} us",
            flush=True,
        )
        del gradients


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gates = [gate for gate in shapes.GATES if not gate.startswith("linear")]
    parser.add_argument("--gates", default=",".join(gates), help="by commas")
    parser.add_argument(
        "--sizes", default="64x50,256x50,256x200", help="batch x prompts, by commas"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available() or ops.cuda_unavailable_reason is not None:
        raise SystemExit(f"raw_ops: needs a GPU: {ops.cuda_unavailable_reason or 'none is here'}")
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, copy {rate / 1e6:.3f} TB/s", flush=True)
    for size in options.sizes.split(","):
        measure(*map(int, size.split("x")), options.gates.split(","), rate)


if __name__ == "__main__":
    main()
