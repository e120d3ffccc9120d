# SPDX-License-Identifier: Apache-2.0
"""The gate (rule "mix") as others write it: (h, x, logit, start, length) -> sequence."""

import torch

import gated_prompt as gp


def original(h, x, logit, start, length):
    """As the method's first implementation does: slices, two products, a cat of the sequence."""
    g = torch.sigmoid(logit)
    end = start + length
    prompts = g * h[:, start:end] + (1 - g) * x[:, start:end]
    return torch.cat([h[:, :start], prompts.to(h.dtype), h[:, end:]], dim=1)


def slice_assignment(h, x, logit, start, length):
    """Written over the slice; autograd needs a clone of the rows for that to be legal."""
    g = torch.sigmoid(logit)
    end = start + length
    old = h[:, start:end].clone()
    h[:, start:end] = (g * old + (1 - g) * x[:, start:end]).to(h.dtype)
    return h


def slice_scatter(h, x, logit, start, length):
    """Out of place, for compilers: compiled slice assignment gave wrong gate gradients."""
    g = torch.sigmoid(logit)
    end = start + length
    prompts = g * h[:, start:end] + (1 - g) * x[:, start:end]
    return h.slice_scatter(prompts.to(h.dtype), 1, start, end)


PEERS = {  # name: (function, whether torch.compile comes first)
    "gated_prompt": (gp.prompt_gate_, False),
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
