# SPDX-License-Identifier: Apache-2.0
"""The gate as others write it: (h, x, gate, start, length, rule) -> sequence.

gate is (logit,), or (weight, bias) of a linear gate.
"""

import torch

import gated_prompt as gp


def update(h, x, gate, rule):
    """The new prompt rows, from the rows h and x."""
    if len(gate) == 2:
        gate = [torch.nn.functional.linear(h, *(t.to(h.dtype) for t in gate))]
    g = torch.sigmoid(gate[0])
    new = g * h + (1 - g) * x if rule == "mix" else x + g * h
    return new.to(h.dtype)


def original(h, x, gate, start, length, rule):
    """As the method's first implementation does: slices, two products, a cat of the sequence."""
    end = start + length
    new = update(h[:, start:end], x[:, start:end], gate, rule)
    return torch.cat([h[:, :start], new, h[:, end:]], dim=1)


def slice_assignment(h, x, gate, start, length, rule):
    """Written over the slice; autograd needs a clone of the rows for that to be legal."""
    end = start + length
    h[:, start:end] = update(h[:, start:end].clone(), x[:, start:end], gate, rule)
    return h


def slice_scatter(h, x, gate, start, length, rule):
    """Out of place, for compilers: compiled slice assignment gave wrong gate gradients."""
    end = start + length
    new = update(h[:, start:end], x[:, start:end], gate, rule)
    return h.slice_scatter(new, 1, start, end)


def gated_prompt(h, x, gate, start, length, rule):
    op = gp.prompt_gate_ if len(gate) == 1 else gp.prompt_gate_linear_
    return op(h, x, *gate, start, length, rule)


def gated_prompt_carrier(h, x, gate, start, length, rule):
    """x is the prompt rows alone; their gradient comes back as compact as that."""
    op = gp.prompt_gate_ if len(gate) == 1 else gp.prompt_gate_linear_
    return op(h, x, *gate, start, length, rule, carrier=x)[0]


PEERS = {  # name: (function, whether torch.compile comes first)
    "gated_prompt": (gated_prompt, False),
    "gated_prompt, carrier": (gated_prompt_carrier, False),
    "original": (original, False),
    "slice assignment": (slice_assignment, False),
    "original, compiled": (original, True),
    "slice_scatter, compiled": (slice_scatter, True),
}


def make_peer(name):
    function, is_compiled = PEERS[name]
    if not is_compiled:
        return function
    torch._dynamo.reset()  # each shape for itself: no guard, no recompilation is timed
    return torch.compile(function, fullgraph=True, dynamic=False)
