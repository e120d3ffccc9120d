# SPDX-License-Identifier: Apache-2.0
"""The gates as autograd Functions that call the raw ops."""

from __future__ import annotations

import contextlib

import torch

from gated_prompt.gradient_ownership import (
    Probe,
    calibrate,
    is_reusable,
    use_counts,
    uses_of_an_argument,
)
from gated_prompt.ops import prompt_gate_bwd_, prompt_gate_fwd_, prompt_gate_linear_token_fwd_
from gated_prompt.torch_private import is_mapped

_NOTHING = contextlib.nullcontext()


class PromptGateFunction(torch.autograd.Function):
    """The gate on rows [start, start + length) of block_out [B, N, D], in place.

    rows [B, P, D] are the prompt rows of block_in; gate_logit broadcasts to [B, P, D]. If carrier
    is not None, it receives the gradient of `rows`. If `carries`, the outputs are block_out and a
    new carrier [B, P, D]. Its values mean nothing; the next gate sends it a gradient of the updated
    rows. If `save`, which means that the gate needs a gradient, one [B, P, D] tensor is saved for
    backward: (h - x) / 2 (mix) or h (residual). It can't be recomputed from the result: with g =
    4.5e-5 the division by g loses every digit of bfloat16.
    """

    @staticmethod
    def forward(ctx, block_out, rows, carrier, carries, gate_logit, start, length, mix, save):
        saved = prompt_gate_fwd_(block_out, rows, gate_logit, start, length, mix, save)
        ctx.save_for_backward(saved, gate_logit)
        return _outputs(ctx, block_out, rows, saved, carries, start, length, mix)

    @staticmethod
    def backward(ctx, grad_out, grad_carrier=None):
        counts = use_counts(grad_out)
        if grad_out is None and grad_carrier is None:
            return (None,) * 9
        may_write = is_reusable(grad_out, counts)
        with _without_autograd(grad_carrier if grad_out is None else grad_out):
            saved, gate_logit = ctx.saved_tensors
            grad_out, grad_in, grad_logit, _ = _gate_backward(
                ctx, grad_out, grad_carrier, may_write,
                saved, gate_logit, ctx.needs_input_grad[4], False,
            )  # fmt: skip
        return _needed(ctx, grad_out, grad_in, grad_in, None, grad_logit)


class PromptGateLinearFunction(torch.autograd.Function):
    """`PromptGateFunction` with gate_logit = h @ weight.T + bias, h the prompt rows of block_out.

    weight is [D, D] or [1, D]. Saved for backward are the logit, [B, P, D] or [B, P, 1]; for the
    gradients of block_out, weight and bias, the tensor that `PromptGateFunction` saves; and, for
    the gradient of weight, h [B, P, D]. With the rule residual the last two are the same tensor.
    `saves` has a bool for each of the three.
    """

    @staticmethod
    def forward(
        ctx, block_out, rows, carrier, carries, weight, bias, start, length, mix, saves
    ):  # fmt: skip
        save_logit, save, save_rows = saves
        if weight.shape[0] == 1:
            logit, saved, h = prompt_gate_linear_token_fwd_(
                block_out, rows, weight[0], bias, start, length, mix,
                save_logit, save, save_rows and mix,
            )  # fmt: skip
        else:
            h = block_out[:, start : start + length].clone(memory_format=torch.contiguous_format)
            logit = linear_logit(h, weight, bias)
            saved = prompt_gate_fwd_(block_out, rows, logit, start, length, mix, save and mix)
            if save and not mix:
                saved = h
        # for the rule residual, `saved` is h itself
        ctx.save_for_backward(logit, saved, weight, *((h,) if save_rows and mix else ()))
        return _outputs(ctx, block_out, rows, saved, carries, start, length, mix)

    @staticmethod
    def backward(ctx, grad_out, grad_carrier=None):
        counts = use_counts(grad_out)
        if grad_out is None and grad_carrier is None:
            return (None,) * 10
        may_write, grad_weight = is_reusable(grad_out, counts), None
        need_out, (need_weight, need_bias) = ctx.needs_input_grad[0], ctx.needs_input_grad[4:6]
        with _without_autograd(grad_carrier if grad_out is None else grad_out):
            logit, saved, weight, *kept = ctx.saved_tensors
            grad_out, grad_in, grad_logit, grad_bias = _gate_backward(
                ctx, grad_out, grad_carrier, may_write,
                saved, logit, need_out or need_weight, need_bias,
            )  # fmt: skip
            if need_out:  # the logit also depends on h
                rows = grad_out[:, ctx.start : ctx.start + ctx.length]
                _add_product_(rows, grad_logit, weight.to(rows.dtype))
            if need_weight:
                h = kept[0] if kept else saved
                grad_weight = _weight_gradient(grad_logit, h).to(weight.dtype)
        return _needed(ctx, grad_out, grad_in, grad_in, None, grad_weight, grad_bias)


def linear_logit(h, weight, bias):
    """h @ weight.T + bias in h's dtype (float32 or float64 for weight [1, D]); ignores autocast."""
    dtype = h.dtype if weight.shape[0] != 1 else torch.promote_types(h.dtype, torch.float32)
    bias = None if bias is None else bias.to(dtype)
    with no_autocast(h.device.type):
        return torch.nn.functional.linear(h.to(dtype), weight.to(dtype), bias)


def is_autocast(device_type):
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def no_autocast(device_type):
    if not is_autocast(device_type):
        return _NOTHING
    return torch.autocast(device_type, enabled=False)


# ---- forward ----


def _outputs(ctx, block_out, rows, saved, carries, start, length, mix):
    if uses_of_an_argument() not in Probe.counts:
        calibrate()
    ctx.mark_dirty(block_out)
    ctx.set_materialize_grads(False)
    ctx.start, ctx.length, ctx.mix, ctx.in_dtype = start, length, mix, rows.dtype
    if not carries:
        return block_out
    ctx.like = block_out.shape, block_out.dtype, block_out.device
    if saved.shape == rows.shape:  # a carrier needs only this shape
        return block_out, saved.detach()
    return block_out, block_out.new_empty(()).expand(rows.shape)


# ---- backward ----


def _without_autograd(grad):
    device_type = grad.device.type
    if torch.is_grad_enabled() or is_autocast(device_type):
        return _no_grad_no_autocast(device_type)
    return _NOTHING


@contextlib.contextmanager
def _no_grad_no_autocast(device_type):
    with torch.no_grad(), no_autocast(device_type):
        yield


def _gate_backward(
    ctx, grad_out, grad_carrier, may_write, saved, gate_logit, need_logit, need_bias
):  # fmt: skip
    """Returns the gradients of block_out, rows, gate_logit and a bias that was added to the logit.
    The first is written into grad_out if `may_write`, otherwise into a copy."""
    need_out, need_in, need_carrier = ctx.needs_input_grad[:3]
    if grad_out is None:  # the carrier was used, but not the sequence
        shape, dtype, device = ctx.like
        grad_out, may_write = torch.zeros(shape, dtype=dtype, device=device), True
    if is_mapped(grad_out) or (grad_carrier is not None and is_mapped(grad_carrier)):
        return _mapped_gate_backward(
            ctx, grad_out, grad_carrier, saved, gate_logit, need_logit, need_bias
        )
    if need_out and not may_write:
        grad_out = grad_out.clone(memory_format=torch.contiguous_format)
    grad_out = grad_out.resolve_neg()
    grads = prompt_gate_bwd_(
        grad_out, saved, gate_logit, grad_carrier, ctx.start, ctx.length, ctx.mix,
        need_out, need_in or need_carrier, need_logit, need_bias, ctx.in_dtype,
    )  # fmt: skip
    return grad_out, *grads


def _mapped_gate_backward(
    ctx, grad_out, grad_carrier, saved, gate_logit, need_logit, need_bias
):  # fmt: skip
    """`_gate_backward` in ATen ops, which torch.autograd.grad(is_grads_batched=True) can map."""
    grad_out = grad_out.resolve_neg()
    dtype = torch.promote_types(grad_out.dtype, torch.float32)
    rows = grad_out[:, ctx.start : ctx.start + ctx.length].to(dtype)
    rows = rows if grad_carrier is None else rows + grad_carrier.to(dtype)
    g = gate_logit.to(dtype).sigmoid()
    grad_in = ((1 - g if ctx.mix else 1) * rows).to(ctx.in_dtype)
    grad_rows = (g * rows).to(grad_out.dtype)
    grad_out = grad_out.slice_scatter(grad_rows, 1, ctx.start, ctx.start + ctx.length)
    grad_logit = grad_bias = None
    if need_logit or need_bias:
        grad_logit = (2 if ctx.mix else 1) * g * (1 - g) * saved.to(dtype) * rows
        own = gate_logit.shape
        grad_logit = grad_logit.sum_to_size(own)
        grad_bias = grad_logit.sum((0, 1)) if need_bias else None
        grad_logit = grad_logit.to(gate_logit.dtype)
    return grad_out, grad_in, grad_logit, grad_bias


def _add_product_(rows, grad_logit, weight):
    """rows [B, P, D] += grad_logit @ weight."""
    if weight.shape[0] == 1 and not is_mapped(rows):
        rows.addcmul_(grad_logit.to(rows.dtype), weight)
    elif rows.is_cuda and not is_mapped(rows):
        rows.baddbmm_(grad_logit, weight.expand(len(rows), -1, -1))
    else:  # on a CPU, a GEMM that accumulates is slower than a GEMM and a sum
        rows += grad_logit.to(rows.dtype) @ weight


def _weight_gradient(grad_logit, h):
    """grad_logit.T @ h, summed over samples and prompts."""
    count = grad_logit.shape[0] * grad_logit.shape[1]
    h = h.reshape(count, h.shape[-1])
    return grad_logit.reshape(count, grad_logit.shape[-1]).to(h.dtype).transpose(0, 1) @ h


def _needed(ctx, *grads):
    """Returns a gradient for each argument of forward, None if it needs no gradient."""
    needs = ctx.needs_input_grad
    grads = [grad if need else None for grad, need in zip(grads, needs, strict=False)]
    grads += [None] * (len(needs) - len(grads))
    if torch.is_grad_enabled():  # create_graph=True
        anchor = torch.empty((), requires_grad=True)
        guarded = _NoSecondDerivative.apply(anchor, *(g for g in grads if g is not None))
        guarded = iter(guarded)
        grads = [None if grad is None else next(guarded) for grad in grads]
    return tuple(grads)


class _NoSecondDerivative(torch.autograd.Function):
    """Identity on gradients that raises when differentiated.

    torch's once_differentiable raises only if the incoming gradient requires grad. But the graph of
    our gradients lacks the gate's inputs too, so their second derivatives would silently be zero.
    """

    @staticmethod
    def forward(ctx, anchor, *grads):
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "prompt_gate: the kernels have no second derivative; use torch.func (grad, jvp, "
            "hessian), which also works with a model that wrap returned, or "
            "gated_prompt.reference.prompt_gate (prompt_gate_linear)"
        )
