# SPDX-License-Identifier: Apache-2.0
"""The gate in ATen ops, which compilers, exporters and function transforms can see."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from gated_prompt.autograd import linear_logit, no_autocast
from gated_prompt.ops import copy_rows
from gated_prompt.torch_private import forward_ad_level, interpreter_stack


def traced_gate(block_out, block_in, rows, gate, start, length, rule, is_overwritten=False):
    """The gate out of place. rows: the prompt rows of block_in, [B, P, D]. gate: (gate_logit,), or
    (weight, bias). is_overwritten: block_out will be."""
    h = block_out[:, start : start + length]
    if not _trains_compiled(block_out, block_in, *gate):
        return _with_rows(block_out, _gated_rows(h, rows, _logit(h, gate), rule), start, length)
    # the product of a linear gate saves h
    logit = gate[0] if len(gate) == 1 else _logit(_kept(_kept(h)), gate)
    is_sequence = rows is not block_in and block_in.dim() == 3
    x = block_in if is_sequence else rows
    where = start, length, rule
    return CompiledGate.apply(block_out, x, logit, *where, is_sequence, is_overwritten)


def traced_gate_(block_out, block_in, rows, carrier, gate, start, length, rule):
    """The gate in place; with a carrier it returns (block_out, the next carrier)."""
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
    if _trains_compiled(block_out, block_in, *gate):
        # the compiler removes this copy, unless block_out is a graph input
        new = traced_gate(block_out, block_in, rows, gate, start, length, rule, True)
        block_out.copy_(new)
    else:
        if _is_plain_dynamo():
            h = target
        else:  # the products save h for backward, and h is overwritten
            h = _kept(_kept(target)) if torch.compiler.is_dynamo_compiling() else target.clone()
        target.copy_(_gated_rows(h, rows, _logit(h, gate), rule))
    # This gate's gradient of x goes through block_in. If the next gate is eager, it uses this slice
    # as its carrier.
    return block_out if carrier is None else (block_out, target)


class CompiledGate(torch.autograd.Function):
    """The gate out of place for torch.compile, with a backward that Inductor fuses into the
    kernels around it.

    Autograd would save h and x, and send [B, N, D] gradients of zeros through slices. This Function
    saves (h - x) / 2 (mix) or h / 2 (residual) as one [B, P, D] tensor; the division prevents an
    overflow in float16. block_in: the sequence, if `is_sequence`, or its prompt rows [B, P, D].
    """

    @staticmethod
    def forward(
        ctx, block_out, block_in, gate_logit, start, length, rule, is_sequence, is_overwritten
    ):
        end = start + length
        h, x = block_out[:, start:end], block_in[:, start:end] if is_sequence else block_in
        if is_overwritten:  # forward needs the copies, so backward does not compute them again
            h, x = copy_rows(h), copy_rows(x)
        half = h / 2 - x / 2 if rule == "mix" else h / 2
        ctx.save_for_backward(_kept(half.to(h.dtype)), gate_logit)
        ctx.start, ctx.end, ctx.is_mix, ctx.is_sequence = start, end, rule == "mix", is_sequence
        ctx.in_dtype = block_in.dtype
        return _joined(block_out, _gated_rows(h, x, gate_logit, rule), start, end)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        kept, gate_logit = ctx.saved_tensors
        start, end, dtype = ctx.start, ctx.end, _computed_in(grad)
        outer = (0, 0, start, grad.shape[1] - end)
        g = gate_logit.to(dtype).sigmoid()
        rows = grad[:, start:end].to(dtype)
        of_g = 2 * rows * _kept(kept).to(dtype)
        if g.dim() == 0 or g.shape[-1] == 1:
            # sums of all rows, which Inductor adds to the kernel of the LayerNorm that sums grad
            of_g = pad(of_g, outer).sum(-1)[:, start:end, None]
        of_logit = of_g.sum_to_size(g.shape) * (g * (1 - g))
        if ctx.is_sequence and math.prod(g.shape[-2:]) == 1:
            of_block_out, of_block_in = _scaled(grad, g, start, end, ctx.is_mix)
        else:
            of_block_out = grad.slice_scatter((rows * g).to(grad.dtype), 1, start, end)
            of_block_in = rows * (1 - g) if ctx.is_mix else rows
            if ctx.is_sequence:
                of_block_in = pad(of_block_in, outer)
        of_block_in, of_logit = of_block_in.to(ctx.in_dtype), of_logit.to(gate_logit.dtype)
        return of_block_out, of_block_in, of_logit, None, None, None, None, None


def _scaled(grad, g, start, end, is_mix):
    """The gradients of block_out and of the sequence block_in, for a gate with one number per block
    or sample.

    Each row of grad is multiplied by a number. As [B * N, D], in which a LayerNorm's rows are
    numbered, too, Inductor makes less code of this than of slices.
    """
    batch, num_tokens, dim = grad.shape
    token = torch.arange(batch * num_tokens, device=grad.device) % num_tokens
    is_prompt = ((token >= start) & (token < end))[:, None]
    g = g.expand(batch, num_tokens, 1).reshape(-1, 1)
    flat = grad.reshape(-1, dim).to(g.dtype)
    of_block_out = flat * torch.where(is_prompt, g, 1.0)
    of_block_in = torch.where(is_prompt, flat * (1 - g) if is_mix else flat, 0.0)
    return of_block_out.to(grad.dtype).view_as(grad), of_block_in.view_as(grad)


def _kept(rows: Tensor) -> Tensor:
    """The rows in reverse order: torch.compile saves this copy, where it would save a view of rows,
    which keeps the whole sequence."""
    return rows.flip(1)


def _gated_rows(h: Tensor, x: Tensor, gate_logit: Tensor, rule: str) -> Tensor:
    """The new prompt rows, [B, P, D]."""
    dtype = _computed_in(h)
    g = gate_logit.to(dtype).sigmoid()
    x = x.to(dtype)
    new = g * h.to(dtype) + (1 - g) * x if rule == "mix" else x + g * h.to(dtype)
    return new.to(h.dtype)


def _computed_in(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _logit(h, gate):
    return gate[0] if len(gate) == 1 else linear_logit(h, *gate)


def _with_rows(block_out, new, start, length):
    if torch.jit.is_tracing() or _is_plain_dynamo():  # dynamo=False of ONNX has no slice_scatter
        return _joined(block_out, new, start, start + length)
    return block_out.slice_scatter(new, 1, start, start + length)


def _joined(block_out, new, start, end):
    # On a CPU Inductor writes each part by its own loop; on CUDA this is like slice_scatter.
    with no_autocast(block_out.device.type):  # autocast's cat refuses some dtypes
        return torch.cat([block_out[:, :start], new, block_out[:, end:]], dim=1)


def _trains_compiled(*tensors) -> bool:
    needs_grad = any(t is not None and t.requires_grad for t in tensors)
    return needs_grad and torch.is_grad_enabled() and _is_plain_dynamo()


def _is_plain_dynamo() -> bool:
    """True under torch.compile, without function transforms in the compiled code."""
    if not torch.compiler.is_dynamo_compiling() or forward_ad_level() >= 0:
        return False
    return isinstance(interpreter_stack(), type(None))  # Dynamo answers `is None` wrongly


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
