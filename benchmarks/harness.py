# SPDX-License-Identifier: Apache-2.0
"""How a gate is timed beside its peers: one harness for all gates.

block_out has just been written, as after a block, so small sizes sit in cache. Parameters of the
gate are float32. In forward + backward the result goes through one more op, `* 1`, whose backward
makes a gradient that is nobody else's, as the next block's does (handed in directly, it would be
the caller's, and our backward would have to copy it): its time, the same for all, is in each row.
No result is timed that is not first compared with the float64 reference.
"""

import contextlib

import torch
from peers import make_peer

from gated_prompt import ops, reference

try:
    from nvtx import annotate
except ModuleNotFoundError:  # ranges are for profilers; the numbers do not need them
    annotate = contextlib.nullcontext

MODES = ("forward", "forward+backward")
DTYPES = (torch.float32, torch.bfloat16)
START = 1  # after the class token; then P prompts and the 196 patches of 224 px

GATES = {  # name: shapes of its parameters, from B, P, D
    "scalar": lambda b, p, d: [()],
    "channel": lambda b, p, d: [(d,)],
    "token": lambda b, p, d: [(p, 1)],
    "sample": lambda b, p, d: [(b, 1, 1)],
    "full": lambda b, p, d: [(b, p, d)],
    "linear": lambda b, p, d: [(d, d), (d,)],
    "linear-token": lambda b, p, d: [(1, d), (1,)],
}


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def make_inputs(gate, batch, length, dim, dtype, device, compact):
    """([h, x, parameters of the gate], gradient); compact: x is the prompt rows alone."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(size, generator=generator)

    h, x, grad = (randn(batch, 197 + length, dim).to(device, dtype) for _ in range(3))
    parameters = [randn(*size).to(device) for size in GATES[gate](batch, length, dim)]
    if len(parameters) == 2:
        parameters[0] /= dim**0.5  # logits of about 1
    if compact:
        x = x[:, START : START + length].clone()
    return [t.requires_grad_() for t in (h, x, *parameters)], grad


def check(peer, leaves, grad, length, rule):
    """Value and gradients within the rounding of the dtype, so that no wrong result is timed."""
    exact = [t.detach().double().requires_grad_() for t in leaves]
    oracle = reference.prompt_gate if len(exact) == 3 else reference.prompt_gate_linear
    wanted = oracle(*exact, START, length, rule)
    wanted_grads = torch.autograd.grad(wanted, exact, grad.double())
    h, x, *gate = leaves
    got = peer(h + 0, x, gate, START, length, rule)
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), wanted, rtol=4 * eps, atol=8 * eps)
    for a, b in zip(torch.autograd.grad(got, leaves, grad), wanted_grads, strict=True):
        error = (a.double() - b).norm() / b.norm()
        assert error < max(8 * eps, 1e-5), f"relative error {error:.3g}"  # 1e-5: a sum that cancels


def time_call(benchmark, device, setup, run, rounds=200, warmup_rounds=20):
    """setup() -> arguments of run, anew for each round and not timed."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def set_up():
        arguments = setup()
        synchronize()
        return arguments, {}

    def timed(*arguments):
        run(*arguments)
        synchronize()

    benchmark.pedantic(timed, setup=set_up, rounds=rounds, warmup_rounds=warmup_rounds)


def time_peer(benchmark, device, shape, gate, rule, dtype, mode, peer):
    """shape: (B, P, D)."""
    batch, length, dim = shape
    function = make_peer(peer)
    leaves, grad = make_inputs(gate, *shape, dtype, device, compact="carrier" in peer)
    check(function, leaves, grad, length, rule)
    h, x, *parameters = leaves
    backward = mode != "forward"

    def setup():
        # a non-leaf with a cheap backward, as block outputs are
        return (h + 0 if backward else h.detach().clone(),)

    def run(fresh):
        with annotate(f"{gate}/{peer}/{mode}/{shape}/{dtype}"):
            if backward:
                out = function(fresh, x, parameters, START, length, rule)
                torch.autograd.grad(out * 1, leaves, grad)
            else:
                with torch.no_grad():
                    function(fresh, x, parameters, START, length, rule)

    time_call(benchmark, device, setup, run)
    size = {"batch": batch, "num_tokens": 197 + length, "dim": dim, "length": length}
    size |= {"dtype": name_of(dtype), "gate": gate}
    moved = ops.launch_plan(**size, save=backward)["bytes_moved"]
    if backward:
        moved += ops.launch_plan(**size, backward=True)["bytes_moved"]
    benchmark.extra_info["bytes"] = moved
    if benchmark.stats is not None:  # None where benchmarking is disabled
        benchmark.extra_info["gb_per_s"] = moved / benchmark.stats.stats.median / 1e9
