# SPDX-License-Identifier: Apache-2.0
"""Attention with a learnable temperature, on any backend; the only file that imports xformers."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from gated_prompt.ops import ranged, scaled_dot
from gated_prompt.torch_private import is_mapped
from gated_prompt.traced import is_traced

BACKENDS = ("auto", "sdpa", "xformers", "math")
TEMPERATURE_RANGE = (0.01, 10.0)
_log = logging.getLogger("gated_prompt.attention")
torch.fx.wrap("tempered")  # torch.fx does not trace into it


def tempered_attention(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | float, backend: str = "auto"
) -> Tensor:
    """Self-attention with a temperature: softmax(q k^T * d^-0.5 / tau) v, tau = clamp(temperature).

    q is divided by tau before attention, so any attention kernel can be used unchanged. tau is
    clamped to [0.01, 10] with a straight-through gradient. The value stored in `temperature` is not
    changed, and the host never reads it.

    Args:
        q, k, v: [B, N, H, d], one floating dtype. torch's own attention takes [B, H, N, d]; that
            layout can't be detected, so call transpose(1, 2) first.
        temperature: A tensor of one element, or a float. May be float32 when q is bfloat16.
        backend: "sdpa" (torch's scaled_dot_product_attention), "xformers"
            (memory_efficient_attention, CUDA only), "math" (explicit softmax, for checks), "auto"
            (xformers on CUDA if it supports the dtype and head size, otherwise sdpa; a compiled
            model uses sdpa). The logger `gated_prompt.attention` reports the choice of "auto" and
            the reason at level INFO, once per kind of input.

    Returns:
        [B, N, H, d]. Gradients flow to q, k, v and temperature. The gradient of temperature is
        -1/tau * sum(q' * dq'), with q' = q / tau and its gradient dq', summed in float32 (float64)
        in a fixed order.

    Raises:
        TypeError: q, k and v differ in dtype, or temperature is neither a tensor nor a float.
        ValueError: unknown backend; wrong shapes; a temperature of more than one element.
        RuntimeError: the backend that was asked for can't run here; no other one is used instead.

    Source: Yoo et al., ICML 2023, arXiv 2306.05067, section 3.3.
    """
    if backend not in BACKENDS:
        raise ValueError(f"tempered_attention: backend must be one of {BACKENDS}, got {backend!r}")
    shapes, dtypes = [list(t.shape) for t in (q, k, v)], {t.dtype for t in (q, k, v)}
    if q.dim() != 4 or shapes[0] != shapes[1] or shapes[1] != shapes[2]:
        raise ValueError(
            f"tempered_attention: q, k and v must be [B, N, H, d] of one shape, got {shapes}"
        )
    if len(dtypes) > 1:
        raise TypeError(f"tempered_attention: q, k and v must have one dtype, got {dtypes}")
    if not isinstance(temperature, (Tensor, float, int)):
        raise TypeError(
            "tempered_attention: temperature must be a tensor or a float, "
            f"got {type(temperature).__name__}"
        )
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        raise ValueError(
            "tempered_attention: temperature must have one element or be a float, "
            f"got {list(temperature.shape)}"
        )
    return attend(tempered(q, temperature), k, v, backend)


# ---- temperature ----


def clamped(temperature: Tensor | float) -> Tensor | float:
    """The temperature clamped to TEMPERATURE_RANGE, as a tensor [] or a float."""
    if isinstance(temperature, Tensor):
        # Shape [1] would widen the dtype of q / tau. The bounds are literals, since
        # torch.compile(dynamic=True) makes symbols of global floats, which autograd Functions can't
        # take.
        return temperature.reshape(()).clamp(0.01, 10.0)
    low, high = TEMPERATURE_RANGE
    return min(max(temperature, low), high)


def clamp_straight_through(temperature: Tensor) -> Tensor:
    """`clamped`, with the gradient of the identity."""
    # not t + (clamp(t) - t), which cancels: for t = -1 in bfloat16 it gives 0.0078 instead of 0.01
    return clamped(temperature).detach() + (temperature - temperature.detach()).reshape(())


def tempered(q: Tensor, temperature: Tensor | float) -> Tensor:
    """q / clamp(temperature)."""
    if not isinstance(temperature, Tensor):
        return q if temperature == 1 else q / clamped(temperature)
    if is_transformed(q, temperature):
        return q / clamp_straight_through(temperature)
    return _TemperedQuery.apply(q, temperature)


def _differentiable(temperature: Tensor) -> Tensor:
    """The clamped temperature, for a backward; differentiable only if gradients are enabled."""
    grads = torch.is_grad_enabled()
    return clamp_straight_through(temperature) if grads else clamped(temperature)


def is_transformed(*tensors: Tensor) -> bool:
    """True under functorch, forward AD, export and torch.jit tracing, and for tensor subclasses:
    our autograd Functions must not run there. Under torch.compile they may run. Each block then
    keeps less for backward than if q itself were divided (a third of the size of [B, N, D] less).
    """
    return is_traced(*tensors) and not torch.compiler.is_dynamo_compiling()


def is_in_plain_aten(grad: Tensor) -> bool:
    """True if a backward must use ATen ops: it is compiled, it is itself differentiated
    (create_graph=True), or torch.autograd.grad(is_grads_batched=True) maps it."""
    return torch.compiler.is_compiling() or torch.is_grad_enabled() or is_mapped(grad)


def temperature_gradient(q: Tensor, grad: Tensor, tau: Tensor, temperature: Tensor) -> Tensor:
    """-1/tau * sum(q * grad) in the shape of temperature, for a q that is already divided by tau.
    The kernel reads q and grad once and copies neither."""
    if is_in_plain_aten(grad):
        dtype = torch.promote_types(q.dtype, torch.float32)
        gradient = (-(q.to(dtype) * grad.to(dtype)).sum() / tau).to(tau.dtype)
        return gradient.reshape(temperature.shape)
    return scaled_dot(q, grad, tau.view(temperature.shape))


class _TemperedQuery(torch.autograd.Function):
    """q / clamp(temperature). Of the large tensors it saves only the result, which attention saves
    too."""

    @staticmethod
    def forward(ctx, q, temperature):
        out = q / clamped(temperature)
        ctx.save_for_backward(out, temperature)
        return out

    @staticmethod
    def backward(ctx, grad):
        out, temperature = ctx.saved_tensors
        tau = _differentiable(temperature)
        need_q, need_temperature = ctx.needs_input_grad
        return (
            grad / tau if need_q else None,
            temperature_gradient(out, grad, tau, temperature) if need_temperature else None,
        )


# ---- backends ----


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """softmax(q k^T * d^-0.5) v: q [B, M, H, d], k and v [B, N, H, d] -> [B, M, H, d]."""
    if backend == "auto":
        backend = "sdpa" if is_traced(q, k, v) or not _takes_xformers(q) else "xformers"
    return _KERNELS[backend](q, k, v)


def _sdpa(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _math(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2)


def unavailable_reason(backend: str) -> str | None:
    """Returns the reason why `backend` can't run on this machine, or None if it can."""
    if backend != "xformers":
        return None
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install 'gated-prompt[vit]')"
    if not torch.cuda.is_available():
        return "xformers needs a CUDA GPU and torch sees none"
    # xformers can be imported without its C++ library, so try an input that every build supports
    return _xformers_failure(torch.float16, 64, torch.device("cuda"), False)


def _takes_xformers(q: Tensor) -> bool:
    return _why_not_xformers(q.dtype, q.shape[-1], q.device, q.requires_grad) is None


@functools.cache
def _why_not_xformers(dtype, head_dim, device, needs_grad) -> str | None:
    """Returns None if xformers runs on such inputs, otherwise the reason. Logs the choice; cached,
    so once per kind of input."""
    reason = unavailable_reason("xformers") if device.type == "cuda" else f"q is on {device}"
    reason = reason or _xformers_failure(dtype, head_dim, device, needs_grad)
    taken = "xformers" if reason is None else "sdpa"
    _log.info(
        "attention='auto' takes %s for %s, head size %d: %s",
        taken, dtype, head_dim, reason or f"xformers supports these inputs on {device}",
    )  # fmt: skip
    return reason


@functools.cache
def _xformers_failure(dtype, head_dim, device, needs_grad) -> str | None:
    """Returns the error that xformers raises on a sample of such inputs, or None."""
    try:
        from xformers.ops import memory_efficient_attention

        sample = torch.zeros(1, 8, 3, 2, head_dim, dtype=dtype, device=device)
        sample.requires_grad_(needs_grad)  # strides matter too: use the ones of a packed qkv
        with torch.enable_grad():
            memory_efficient_attention(*sample.unbind(2))
    except Exception as error:  # broken installs and unknown dtypes raise all kinds of errors
        return f"xformers refuses {dtype}, head size {head_dim}: {type(error).__name__}: {error}"
    return None


def _xformers_attention(q, k, v):
    cause, reason = None, f"q is on {q.device}"
    if q.is_cuda:
        try:
            from xformers.ops import memory_efficient_attention

            return memory_efficient_attention(q, k, v)
        except torch.cuda.OutOfMemoryError:  # not a sign that the input is unsupported
            raise
        except Exception as error:
            cause = error
            reason = unavailable_reason("xformers") or f"{type(error).__name__}: {error}"
    raise RuntimeError(f"tempered_attention: backend='xformers' can't run: {reason}") from cause


_KERNELS = {
    "sdpa": ranged("attention sdpa", _sdpa),
    "xformers": ranged("attention xformers", _xformers_attention),
    "math": ranged("attention math", _math),
}
