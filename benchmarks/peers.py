# SPDX-License-Identifier: Apache-2.0
"""The gate as others write it: (h, x, gate, start, length, rule) -> sequence.

gate is (logit,), or (weight, bias) of a linear gate. h may be written; x is a sequence as h, or the
prompt rows alone.
"""

import functools
import types

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
    """Out of place, for compilers."""
    end = start + length
    new = update(h[:, start:end], x[:, start:end], gate, rule)
    return h.slice_scatter(new, 1, start, end)


def where(h, x, gate, start, length, rule):
    """Over the whole sequence, chosen by a mask of rows; for all gates but the full one."""
    end, (_, num_tokens, _) = start + length, h.shape
    mask = torch.arange(num_tokens, device=h.device)[:, None]
    mask = (mask >= start) & (mask < end)
    h_rows, x_rows = (torch.where(mask, t, 0) for t in (h, x))  # an inf elsewhere is no 0 * inf
    if len(gate) == 1 and gate[0].dim() > 1 and gate[0].shape[-2] == length:
        gate = [torch.nn.functional.pad(gate[0], (0, 0, start, num_tokens - end))]
    return torch.where(mask, update(h_rows, x_rows, gate, rule), h)


def triton(h, x, gate, start, length, rule):
    import triton_gate

    return triton_gate.gate_(h, x, gate[0], start, length, rule)


def gated_prompt(h, x, gate, start, length, rule):
    op = gp.prompt_gate_ if len(gate) == 1 else gp.prompt_gate_linear_
    return op(h, x, *gate, start, length, rule)


def gated_prompt_carrier(h, x, gate, start, length, rule, carrier):
    """The gradient of x goes to a carrier, as compact as the prompt rows: (sequence, carrier)."""
    op = gp.prompt_gate_ if len(gate) == 1 else gp.prompt_gate_linear_
    return op(h, x, *gate, start, length, rule, carrier=carrier)


TWO_CARRIERS = "gated_prompt, two carriers"  # its output's gradient, too, comes in two parts
QUACK = "QuACK softmax"  # of a published kernel library, on as many bytes as the gate must move
COMPACT = ("gated_prompt, carrier", TWO_CARRIERS, "triton, rows")  # alone, x is the prompt rows
COMPILED = {", compiled": "default", ", max-autotune": "max-autotune-no-cudagraphs"}
PEERS = {  # name: (function, torch.compile's mode)
    "gated_prompt": (gated_prompt, None),
    "gated_prompt, carrier": (gated_prompt_carrier, None),
    TWO_CARRIERS: (gated_prompt_carrier, None),
    "triton": (triton, None),
    "triton, rows": (triton, None),
    "original": (original, None),
    "slice assignment": (slice_assignment, None),
    "slice_scatter": (slice_scatter, None),
    "where": (where, None),
    **{
        f"{form.__name__.replace('slice_a', 'slice a')}{how}": (form, mode)
        for how, mode in COMPILED.items()
        for form in (original, slice_assignment, slice_scatter, where, gated_prompt)
    },
}


def compiled(function, mode):
    """torch.compile of a function of its own: other shapes leave nothing to guard against."""
    if mode is None:
        return function
    if isinstance(function, types.FunctionType):
        code, names = function.__code__.replace(), function.__globals__
        function = functools.wraps(function)(
            types.FunctionType(code, names, function.__name__, None, function.__closure__)
        )
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
