# SPDX-License-Identifier: Apache-2.0
"""The gate in ATen ops, which compilers, exporters and function transforms can see."""

from __future__ import annotations

import torch
from torch import Tensor

from gated_prompt.ops import copy_rows
from gated_prompt.torch_private import forward_ad_level, interpreter_stack


def traced_rows(block_out: Tensor, rows: Tensor, carrier: Tensor | None, start: int, length: int):
    """Returns h, x and the view of block_out to write.

    The products save h and x for backward. So h is a copy, since the view is overwritten. Under
    torch.compile x is a copy as well, since block_in may be overwritten later.
    """
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "prompt_gate_: torch.onnx.export(dynamo=False) leaves writes to slices out of the "
            "file; use dynamo=True, or prompt_gate (prompt_gate_linear)"
        )
    if carrier is not None and carrier.requires_grad and not rows.requires_grad:
        raise RuntimeError(
            "prompt_gate_: a compiled or transformed gate sends its gradient through block_in, not "
            "through carrier; pass block_in without detach(), got one that does not require grad"
        )
    target = block_out[:, start : start + length]
    if torch.compiler.is_dynamo_compiling() and forward_ad_level() < 0:
        return copy_rows(target), copy_rows(rows), target
    return target.clone(), rows, target


def traced_result(block_out: Tensor, carrier: Tensor | None, start: int, length: int):
    # This gate's gradient of x goes through block_in. If the next gate is eager, it uses this slice
    # as its carrier.
    return block_out if carrier is None else (block_out, block_out[:, start : start + length])


def with_rows(block_out: Tensor, new: Tensor, start: int, length: int) -> Tensor:
    if torch.jit.is_tracing():  # torch.onnx.export(dynamo=False) has no slice_scatter
        return torch.cat([block_out[:, :start], new, block_out[:, start + length :]], dim=1)
    return block_out.slice_scatter(new, 1, start, start + length)


def gated_rows(h: Tensor, x: Tensor, gate_logit: Tensor, rule: str) -> Tensor:
    """The new prompt rows, [B, P, D]."""
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    g = gate_logit.to(dtype).sigmoid()
    x = x.to(dtype)
    new = g * h.to(dtype) + (1 - g) * x if rule == "mix" else x + g * h.to(dtype)
    return new.to(h.dtype)


def is_traced(*tensors: Tensor | None) -> bool:
    """True under torch.compile, export, functorch, forward AD and torch.jit tracing, and for tensor
    subclasses.

    A compiler must see ATen ops: Inductor can't fuse a custom op with its neighbours, and in some
    aliasing patterns torch.compile gives wrong results for custom ops that write their inputs
    (pytorch#198031, #153389).
    """
    if torch.compiler.is_compiling():
        return True
    for t in tensors:  # any() over a generator takes three times as long
        if t is not None and type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return True
    return interpreter_stack() is not None or forward_ad_level() >= 0 or torch.jit.is_tracing()
