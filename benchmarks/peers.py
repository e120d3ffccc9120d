# SPDX-License-Identifier: Apache-2.0
"""Ways to write the gate, as functions (h, x, gate, start, length, rule) -> sequence.

gate is (logit,), or (weight, bias) for a linear gate. A function may write into h. x is a sequence
like h, or only the prompt rows.
"""

import functools
import types

import torch

import gated_prompt as gp


def update(h, x, gate, rule):
    """Returns the new prompt rows from the prompt rows of h and x."""
    if len(gate) == 2:
        gate = [torch.nn.functional.linear(h, *(t.to(h.dtype) for t in gate))]
    g = torch.sigmoid(gate[0])
    new = g * h + (1 - g) * x if rule == "mix" else x + g * h
    return new.to(h.dtype)


def original(h, x, gate, start, length, rule):
    """The method's first implementation: slices, two products, a cat of the sequence."""
    end = start + length
    new = update(h[:, start:end], x[:, start:end], gate, rule)
    return torch.cat([h[:, :start], new, h[:, end:]], dim=1)


def slice_assignment(h, x, gate, start, length, rule):
    """Writes into the slice, for which autograd needs a clone of the rows."""
    end = start + length
    h[:, start:end] = update(h[:, start:end].clone(), x[:, start:end], gate, rule)
    return h


def slice_scatter(h, x, gate, start, length, rule):
    """Out of place, in a form for compilers."""
    end = start + length
    new = update(h[:, start:end], x[:, start:end], gate, rule)
    return h.slice_scatter(new, 1, start, end)


def where(h, x, gate, start, length, rule):
    """Computes the whole sequence and selects rows by a mask. For all gates except the full one."""
    end, (_, num_tokens, _) = start + length, h.shape
    mask = torch.arange(num_tokens, device=h.device)[:, None]
    mask = (mask >= start) & (mask < end)
    # zeros in the other rows, since an inf there would become 0 * inf
    h_rows, x_rows = (torch.where(mask, t, 0) for t in (h, x))
    if len(gate) == 1 and gate[0].dim() > 1 and gate[0].shape[-2] == length:
        gate = [torch.nn.functional.pad(gate[0], (0, 0, start, num_tokens - end))]
    return torch.where(mask, update(h_rows, x_rows, gate, rule), h)


def triton(h, x, gate, start, length, rule):
    import triton_gate

    return triton_gate.gate_(h, x, gate[0], start, length, rule)


def gated_prompt(h, x, gate, start, length, rule):
    op = gp.prompt_gate_ if len(gate) == 1 else gp.prompt_gate_linear_
    return op(h, x, *gate, start, length, rule)


def gated_prompt_new(h, x, gate, start, length, rule):
    op = gp.prompt_gate if len(gate) == 1 else gp.prompt_gate_linear
    return op(h, x, *gate, start, length, rule)


def gated_prompt_carrier(h, x, gate, start, length, rule, carrier):
    """Returns (sequence, carrier). The gradient of x goes to the carrier, which is [B, P, D]."""
    op = gp.prompt_gate_ if len(gate) == 1 else gp.prompt_gate_linear_
    return op(h, x, *gate, start, length, rule, carrier=carrier)


OUT_OF_PLACE = "gated_prompt, out of place"
TWO_CARRIERS = "gated_prompt, two carriers"  # the gradient of its output also has two parts
QUACK = "QuACK softmax"  # from a published kernel library, on as many bytes as the gate must move
COMPACT = ("gated_prompt, carrier", TWO_CARRIERS, "triton, rows")  # in gates.Alone, x is [B, P, D]
COMPILED = {", compiled": "default", ", max-autotune": "max-autotune-no-cudagraphs"}
FORMS = {  # name: function; each is also compiled
    "original": original,
    "slice assignment": slice_assignment,
    "slice_scatter": slice_scatter,
    "where": where,
    "gated_prompt": gated_prompt,
    OUT_OF_PLACE: gated_prompt_new,
}
PEERS = {  # name: (function, torch.compile's mode)
    "gated_prompt, carrier": (gated_prompt_carrier, None),
    TWO_CARRIERS: (gated_prompt_carrier, None),
    "triton": (triton, None),
    "triton, rows": (triton, None),
    **{
        name + how: (form, mode)
        for how, mode in {"": None, **COMPILED}.items()
        for name, form in FORMS.items()
    },
}


def compiled(function, mode):
    """Returns the compiled function. A plain function is copied first, so that this compilation
    shares no cache with other shapes of the same function."""
    if mode is None:
        return function
    if isinstance(function, types.FunctionType):
        code, names = function.__code__.replace(), function.__globals__
        function = functools.wraps(function)(
            types.FunctionType(code, names, function.__name__, None, function.__closure__)
        )
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
