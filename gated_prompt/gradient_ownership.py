# SPDX-License-Identifier: Apache-2.0
"""Whether a backward may write into the gradient that it was given.

A backward may rescale the incoming gradient in place, instead of a copy, only if nothing else can
see it. A gradient that only autograd's engine holds has the same three reference counts each time;
any other holder raises one of them: another node that the gradient is on its way to, the caller who
passed it in, a hook that keeps it, a tensor of which it is a view. One exception is known: memory
of numpy that a backward returns looks as if nobody else had it. It looks so to the engine as well,
which adds to it in place.
"""

from __future__ import annotations

import os
import sys
from typing import ClassVar

import torch

from gated_prompt.torch_private import (
    compiles_autograd,
    dispatch_modes,
    is_mapped,
    storage_address,
    storage_uses,
    tensor_uses,
)

_CAN_COUNT = None not in (storage_address, storage_uses, tensor_uses)
_REUSES_GRADIENTS = os.environ.get("GATED_PROMPT_REUSE_GRADIENTS", "1") != "0"  # for debugging


def _uses(argument):
    return sys.getrefcount(argument)


def uses_of_an_argument():
    """Of one that nobody else has. It is one more where frames are evaluated by torch.compile, as
    they are in the whole process after a compilation has failed."""
    nobody_else_has = object()
    return _uses(nobody_else_has)


def use_counts(grad):
    """Uses of an argument; of the tensor, in C++ and in Python, and of its storage. None: they
    don't tell.

    The storage is asked by its address: grad.untyped_storage() would count as a use for as long as
    the storage lives, and the engine, which asks the same, would then add the next gradient to this
    one out of place.
    """
    if grad is None or is_mapped(grad) or grad.is_meta or not _CAN_COUNT:
        return None
    of_storage = storage_uses(storage_address(grad))
    return uses_of_an_argument(), (tensor_uses(grad), sys.getrefcount(grad), of_storage)


class Probe(torch.autograd.Function):
    """Measures the counts of a gradient that is nobody else's, called as our own backwards are."""

    counts: ClassVar = {}  # {uses of an argument: the others}, as measured

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad, unused=None):
        found = use_counts(grad)
        if found is not None:
            Probe.counts.update([found])
        return grad


def _is_observed() -> bool:
    """Whether Python looks on at each op (FakeTensorMode, FlopCounterMode): counts differ then."""
    return dispatch_modes() > 0


def _is_debugged() -> bool:
    """Whether a debugger or profiler may hold the variables of our frames."""
    monitoring = getattr(sys, "monitoring", None)  # Python 3.12 on
    tools = () if monitoring is None else map(monitoring.get_tool, range(6))
    return bool(sys.gettrace() or sys.getprofile() or any(tools))


def calibrate() -> None:
    """Measures the counts of a gradient that nobody else has; once for each number of uses of an
    argument. It waits for the first gate that runs undisturbed."""
    if not _REUSES_GRADIENTS or torch.is_inference_mode_enabled():
        return
    if _is_observed() or _is_debugged() or compiles_autograd():
        return
    with torch.enable_grad():  # nothing here saves a tensor: hooks of the caller see none
        leaf = torch.zeros((), requires_grad=True, device="cpu")
        Probe.apply(leaf.clone()).neg().sum().backward()  # neg makes a gradient of its own


def is_reusable(grad, counts) -> bool:
    """Whether a backward may write into `grad`. counts: `use_counts`, asked first in its frame."""
    return (
        counts is not None
        and Probe.counts.get(counts[0]) == counts[1]
        and _REUSES_GRADIENTS
        and not grad.requires_grad
        and not torch.is_grad_enabled()
        and grad.is_contiguous()
        and not grad.is_neg()
        and not _is_observed()
        and not torch.compiler.is_compiling()
    )
