# SPDX-License-Identifier: Apache-2.0
"""Attention with a learnable temperature; the only file that imports xformers."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BACKENDS = ("auto", "sdpa", "xformers", "math")
TEMPERATURE_RANGE = (0.01, 10.0)


def clamp_straight_through(temperature: Tensor) -> Tensor:
    """temperature within [0.01, 10]; its gradient passes as if there were no clamp."""
    # not t + (clamp(t) - t), which cancels: -1 in bfloat16 would become 0.0078
    return temperature.clamp(*TEMPERATURE_RANGE).detach() + (temperature - temperature.detach())


def tempered_attention(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | float, backend: str = "auto"
) -> Tensor:
    """Self-attention with a temperature: softmax(q k^T * d^-0.5 / tau) v, tau = clamp(temperature).

    q is divided by tau, so any attention kernel serves unchanged. tau is clamped to [0.01, 10] with
    a straight-through gradient; the value stored in `temperature` is not changed.

    Args:
        q, k, v: [B, N, H, d], one floating dtype.
        temperature: [] or a float.
        backend: "sdpa" (torch's scaled_dot_product_attention), "xformers"
            (memory_efficient_attention, CUDA only), "math" (explicit softmax, for checks), "auto"
            (today: sdpa).

    Returns:
        [B, N, H, d]. Gradients flow to q, k, v and temperature.

    Raises:
        ValueError: unknown backend.
        RuntimeError: an explicit backend can't run here; there is no silent replacement.

    Source: Yoo et al., ICML 2023, arXiv 2306.05067, section 3.3.
    """
    if backend not in BACKENDS:
        raise ValueError(f"tempered_attention: backend must be one of {BACKENDS}, got {backend!r}")
    low, high = TEMPERATURE_RANGE
    is_tensor = isinstance(temperature, Tensor)
    q = q / (clamp_straight_through(temperature) if is_tensor else min(max(temperature, low), high))
    if backend == "xformers":
        reason = "q is on the CPU" if q.device.type != "cuda" else unavailable_reason("xformers")
        if reason is not None:
            raise RuntimeError(f"tempered_attention: backend='xformers' can't run: {reason}")
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if backend == "math":
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return (weights @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def unavailable_reason(backend: str) -> str | None:
    """Why `backend` can't run on this machine, or None if it can."""
    if backend != "xformers":
        return None
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install 'gated-prompt[vit]')"
    if not torch.cuda.is_available():
        return "xformers needs a CUDA GPU and torch sees none"
    try:
        import xformers.ops  # noqa: F401
    except Exception as error:  # whatever a broken install raises is the reason
        return f"xformers does not import: {error}"
    return None


class TemperedAttention(nn.Module):
    """A timm `Attention` whose softmax has a temperature; takes its place in a block, and can give
    it back.

    Attributes:
        attn: The timm module, unchanged; its weights are used, its forward is not.
        temperature: A learnable float32 parameter [], or a constant float.
    """

    def __init__(self, attn: nn.Module, temperature: float, learnable: bool, backend: str):
        super().__init__()
        from timm.layers import Attention

        if type(attn) is not Attention:
            raise TypeError(
                "TemperedAttention: attn must be a timm.layers.Attention, "
                f"got {type(attn).__module__}.{type(attn).__name__}"
            )
        self.attn = attn
        self.backend = backend
        self.temperature = (
            nn.Parameter(torch.tensor(float(temperature), device=attn.qkv.weight.device))
            if learnable
            else float(temperature)
        )

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise NotImplementedError("TemperedAttention: attention masks are not supported")
        attn = self.attn
        batch, num_tokens, _ = x.shape
        qkv = attn.qkv(x).reshape(batch, num_tokens, 3, attn.num_heads, attn.head_dim)
        q, k, v = qkv.unbind(2)
        out = tempered_attention(
            attn.q_norm(q), attn.k_norm(k), v, self.temperature, self.backend
        ).flatten(2)
        out = attn.norm(out)
        gate = getattr(attn, "gate", None)  # timm's gated attention, newer than timm's first 1.0
        if gate is not None:
            out = out * gate(x).sigmoid()
        return attn.proj_drop(attn.proj(out))
