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
torch.fx.wrap("tempered")  # a symbolic trace keeps calls of it as they are


def tempered_attention(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | float, backend: str = "auto"
) -> Tensor:
    """Self-attention with a temperature: softmax(q k^T * d^-0.5 / tau) v, tau = clamp(temperature).

    q is divided by tau, so any attention kernel serves unchanged. tau is clamped to [0.01, 10] with
    a straight-through gradient; the value stored in `temperature` is not changed, and never read by
    the host.

    Args:
        q, k, v: [B, N, H, d], one floating dtype. Not [B, H, N, d], as torch's own attention has
            it, which can't be told from it: use transpose(1, 2) first.
        temperature: A tensor of one element, or a float. May be float32 beside bfloat16 q.
        backend: "sdpa" (torch's scaled_dot_product_attention), "xformers"
            (memory_efficient_attention, CUDA only), "math" (explicit softmax, for checks), "auto"
            (xformers on CUDA where it supports dtype and head size, else sdpa; the logger
            `gated_prompt.attention` says once at level INFO which it took, and why; a compiled
            model takes sdpa).

    Returns:
        [B, N, H, d]. Gradients flow to q, k, v and temperature. That of temperature is
        -1/tau * sum(q' * dq'), over the divided q' and its gradient, summed in float32 (float64) in
        a fixed order.

    Raises:
        ValueError: unknown backend; a temperature of more than one element.
        RuntimeError: an explicit backend can't run here; there is no silent replacement.

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
    """[] or a float, within TEMPERATURE_RANGE."""
    if isinstance(temperature, Tensor):
        # [1] would widen the dtype of q / tau. Literals: torch.compile(dynamic=True) would make
        # symbols of a global's floats, which autograd Functions can't take.
        return temperature.reshape(()).clamp(0.01, 10.0)
    low, high = TEMPERATURE_RANGE
    return min(max(temperature, low), high)


def clamp_straight_through(temperature: Tensor) -> Tensor:
    """`clamped`, with a gradient as if there were no clamp."""
    # not t + (clamp(t) - t), which cancels: -1 in bfloat16 would become 0.0078
    return clamped(temperature).detach() + (temperature - temperature.detach()).reshape(())


def tempered(q: Tensor, temperature: Tensor | float) -> Tensor:
    """q / clamp(temperature)."""
    if not isinstance(temperature, Tensor):
        return q if temperature == 1 else q / clamped(temperature)
    if is_transformed(q, temperature):
        return q / clamp_straight_through(temperature)
    return _TemperedQuery.apply(q, temperature)


def _differentiable(temperature: Tensor) -> Tensor:
    """The clamped temperature, for a backward; with a graph only where one is asked for."""
    grads = torch.is_grad_enabled()
    return clamp_straight_through(temperature) if grads else clamped(temperature)


def is_transformed(*tensors: Tensor) -> bool:
    """Whether something looks on that our autograd Functions can't serve; torch.compile they can:
    it then keeps a third of a [B, N, D] less per block than for a q that is divided itself."""
    return is_traced(*tensors) and not torch.compiler.is_dynamo_compiling()


def is_in_plain_aten(grad: Tensor) -> bool:
    """Whether a backward is traced, differentiated, or mapped by vmap."""
    return torch.compiler.is_compiling() or torch.is_grad_enabled() or is_mapped(grad)


def temperature_gradient(q: Tensor, grad: Tensor, tau: Tensor, temperature: Tensor) -> Tensor:
    """-1/tau * sum(q * grad), q already divided by tau, in the shape of temperature: one read of
    both, no copy of either."""
    if is_in_plain_aten(grad):
        dtype = torch.promote_types(q.dtype, torch.float32)
        gradient = (-(q.to(dtype) * grad.to(dtype)).sum() / tau).to(tau.dtype)
        return gradient.reshape(temperature.shape)
    return scaled_dot(q, grad, tau.view(temperature.shape))


class _TemperedQuery(torch.autograd.Function):
    """q / clamp(tau), of which nothing but the result is saved, and that by attention anyway."""

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
    """Why `backend` can't run on this machine, or None if it can."""
    if backend != "xformers":
        return None
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install 'gated-prompt[vit]')"
    if not torch.cuda.is_available():
        return "xformers needs a CUDA GPU and torch sees none"
    # it imports without its C++ library, too: so try what each of its builds takes
    return _xformers_failure(torch.float16, 64, torch.device("cuda"), False)


def _takes_xformers(q: Tensor) -> bool:
    return _why_not_xformers(q.dtype, q.shape[-1], q.device, q.requires_grad) is None


@functools.cache
def _why_not_xformers(dtype, head_dim, device, needs_grad) -> str | None:
    """None if it runs, else why not; asked once for each kind of input, and logged."""
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
    """What xformers raises on a sample of such inputs, or None."""
    try:
        from xformers.ops import memory_efficient_attention

        sample = torch.zeros(1, 8, 3, 2, head_dim, dtype=dtype, device=device)
        sample.requires_grad_(needs_grad)  # packed as ours are: strides decide, too
        with torch.enable_grad():
            memory_efficient_attention(*sample.unbind(2))
    except Exception as error:  # a broken install, or an unknown dtype, raises anything
        return f"xformers refuses {dtype}, head size {head_dim}: {type(error).__name__}: {error}"
    return None


def _xformers_attention(q, k, v):
    cause, reason = None, f"q is on {q.device}"
    if q.is_cuda:
        try:
            from xformers.ops import memory_efficient_attention

            return memory_efficient_attention(q, k, v)
        except torch.cuda.OutOfMemoryError:  # says nothing of what is supported
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
