# SPDX-License-Identifier: Apache-2.0
"""Decides whether a backward may write into its incoming gradient.

A backward may rescale the incoming gradient in place, instead of copying it, only if no other code
can see that tensor. A gradient that only autograd's engine holds always has the same three
reference counts: of the tensor in C++, of the tensor in Python, and of its storage. One of these
counts is higher if anything else refers to the gradient: another node that will receive it, a
caller who passed it in, a hook that keeps it, or its base tensor if it is a view. One exception is
known: if a backward returns memory of a numpy array, the counts do not show the array. PyTorch's
engine has the same blind spot and also adds to such memory in place.
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
    """The reference count, inside a function, of an argument that has no other reference.

    It is one higher when torch.compile evaluates the frames. After a failed compilation,
    torch.compile does so in the whole process.
    """
    nobody_else_has = object()
    return _uses(nobody_else_has)


def use_counts(grad):
    """Returns uses_of_an_argument() and the three counts (tensor in C++ and Python, storage).

    Returns None if they are not available.

    The storage is looked up by its address. grad.untyped_storage() would itself count as a use for
    as long as the storage lives. The engine reads the same count, and would then add the next
    gradient to this one out of place.
    """
    if grad is None or is_mapped(grad) or grad.is_meta or not _CAN_COUNT:
        return None
    of_storage = storage_uses(storage_address(grad))
    return uses_of_an_argument(), (tensor_uses(grad), sys.getrefcount(grad), of_storage)


class Probe(torch.autograd.Function):
    """Measures the counts of an unshared gradient. Its backward is called in the same way as the
    backwards in autograd.py."""

    counts: ClassVar = {}  # {uses_of_an_argument(): the three counts}

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
    """True if a Python mode sees each op (FakeTensorMode, FlopCounterMode): counts differ then."""
    return dispatch_modes() > 0


def _is_debugged() -> bool:
    """True if a debugger or profiler may hold references to local variables of our frames."""
    monitoring = getattr(sys, "monitoring", None)  # since Python 3.12
    tools = () if monitoring is None else map(monitoring.get_tool, range(6))
    return bool(sys.gettrace() or sys.getprofile() or any(tools))


def calibrate() -> None:
    """Measures the counts of an unshared gradient, once for each value of uses_of_an_argument().

    If something would disturb the counts, nothing is measured, and the next gate tries again.
    """
    if not _REUSES_GRADIENTS or torch.is_inference_mode_enabled():
        return
    if _is_observed() or _is_debugged() or compiles_autograd():
        return
    with torch.enable_grad():  # saves no tensor, so the caller's saved-tensor hooks do not run
        leaf = torch.zeros((), requires_grad=True, device="cpu")
        Probe.apply(leaf.clone()).neg().sum().backward()  # neg's backward makes a new tensor


def is_reusable(grad, counts) -> bool:
    """True if a backward may write into `grad`. counts: the result of `use_counts`, which the
    backward must call before anything else. (A view shares its storage, so its counts differ.)"""
    return (
        counts is not None
        and Probe.counts.get(counts[0]) == counts[1]
        and _REUSES_GRADIENTS
        and not grad.requires_grad  # it would keep the graph of its old values
        and not torch.is_grad_enabled()  # create_graph=True: a graph may save what we would write
        and grad.is_contiguous()  # otherwise its elements may overlap
        and not grad.is_inference()  # PyTorch's own ops can't write into it
        and not _is_observed()
    )
