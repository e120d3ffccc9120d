# SPDX-License-Identifier: Apache-2.0
"""Short cuts through timm's blocks: the same results in less time or memory.

The plain path calls a block unchanged, with all hooks and patches on it and on its modules. A short
cut restates timm's forward: our code computes the same result, but skips the calls of some modules
or passes them other inputs. It is taken only if nothing can observe the difference. Each short cut
has one condition, which is checked at every call, because hooks and patches may be added at any
time:

    folded projections  `folded_layers`  no pass over q for the temperature; the gradients of q, k
                                         and v are not stacked
    pooled rows         `pools_rows`     the last block computes only the rows that the pool reads
    recomputed MLP      `recomputes`     the MLP's hidden layer is not saved for backward
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gated_prompt.hooks import is_observed, is_untouched
from gated_prompt.temperature import attend, is_transformed
from gated_prompt.tempering import Tempering
from gated_prompt.vit.attention import FrozenProjection

ATTENTIONS = (Attention, AttentionRope, EvaAttention)
PRE_NORM_BLOCKS = (Block, EvaBlock)
_OWNERS = ("torch.nn.", "timm.", "gated_prompt.")
# Class names, in the packages of _OWNERS, of modules that treat each token by itself in a block.
# (Attention does not; `pools_rows` deals with its keys and values.)
_TOKEN_WISE = {
    "Attention", "AttentionRope", "EvaAttention", "Tempering", "Mlp", "GluMlp", "SwiGLU",
    "LayerScale", "Linear", "Identity", "Dropout", "DropPath", "LayerNorm", "RMSNorm", "RmsNorm",
    "SimpleNorm",
    "GELU", "GELUTanh", "QuickGELU", "SiLU", "ReLU", "Tanh", "Sigmoid",
}  # fmt: skip


def _is_genuine(kind: type) -> bool:
    forward = kind.forward
    return (forward.__module__, forward.__qualname__) == (
        kind.__module__, f"{kind.__name__}.forward",
    )  # fmt: skip


# The forwards that the short cuts restate. A class patched before this import is left out here;
# `_is_as_known` finds a class patched later.
_FORWARDS = {
    kind: kind.forward for kind in (*PRE_NORM_BLOCKS, *ATTENTIONS, nn.Linear) if _is_genuine(kind)
}


# ---- conditions ----


def _is_as_known(module: nn.Module | None) -> bool:
    kind = type(module)
    return kind in _FORWARDS and kind.forward is _FORWARDS[kind]


def is_restated(attn: nn.Module | None) -> bool:
    """True if `attention` may replace a call of this module: it is one of timm's attentions,
    unmodified, and `attention` computes the same result."""
    return (
        type(attn) in ATTENTIONS
        and _is_as_known(attn)
        and is_untouched(attn)
        and attn.fused_attn
        and not (attn.training and attn.attn_drop.p > 0)
        and _are_stock(attn.q_norm)
        and _is_stock(attn.k_norm)
        and _is_stock(attn.attn_drop)
    )


def folded_layers(attn: nn.Module, x: Tensor) -> list[tuple[Tensor, Tensor | None]] | None:
    """[(weight, bias)] of qkv, or three such pairs for q, k and v. None unless these layers are
    untouched nn.Linear with frozen parameters on x's device and x is not transformed."""
    layers = (attn.q_proj, attn.k_proj, attn.v_proj) if attn.qkv is None else (attn.qkv,)
    found = []
    for layer in layers:
        if type(layer) is not nn.Linear or not _is_as_known(layer) or not is_untouched(layer):
            return None
        found.append((layer.weight, layer.bias))
    own_biases = ()
    if attn._parameters.get("q_bias") is not None and attn.qkv is not None:  # Eva's
        own_biases = attn.q_bias, attn.v_bias
    for tensor in (*(t for pair in found for t in pair if t is not None), *own_biases):
        if type(tensor) is not nn.Parameter or tensor.requires_grad or tensor.device != x.device:
            return None
    if is_transformed(x):
        return None
    if own_biases:
        ((weight, bias),) = found
        own = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        found = None if bias is not None else [(weight, own)]
    return found


def pools_rows(block: nn.Module) -> bool:
    """True if the block can compute a part of its rows: only attention reads other rows."""
    return is_restated(block.attn) and all(map(_are_stock, block.children()))


def recomputes(block: nn.Module) -> bool:
    """True if running norm2 and the MLP twice has no visible effect: no hooks, and no buffers that
    train mode may update, such as batch statistics."""
    parts = (*block.norm2.modules(), *block.mlp.modules())
    return all(is_untouched(m) and not (m.training and m._buffers) for m in parts)


def _are_stock(module: nn.Module) -> bool:
    """`_is_stock` for the module and all modules in it."""
    children = module._modules.values()
    return _is_stock(module) and all(child is None or _are_stock(child) for child in children)


def _is_stock(module: nn.Module) -> bool:
    return _is_token_wise(type(module)) and is_untouched(module)


@functools.cache
def _is_token_wise(kind: type) -> bool:
    return kind.__name__ in _TOKEN_WISE and kind.__module__.startswith(_OWNERS)


# ---- blocks ----


def uncompiled(module: nn.Module | None) -> nn.Module | None:
    """The original module if this is torch.compile's wrapper, otherwise module itself."""
    # not getattr(module, "_orig_mod"): a module without it would raise and catch an AttributeError
    return getattr(module, "_modules", {}).get("_orig_mod", module)


def attention_of(block: nn.Module) -> nn.Module | None:
    return uncompiled(getattr(uncompiled(block), "attn", None))


def run_block(
    block: nn.Module,
    x: Tensor,
    rope: Tensor | None,
    rows: slice | None,
    tempering: Tempering | None,
    backend: str | None,
    low_memory: bool,
) -> Tensor:
    """block(x), or `rows` of block(x): x [B, N, D] -> [B, N, D], or [B, M, D] for M rows.

    rope: timm's rotary embedding. tempering: the block's Tempering, which divides the queries.
    backend: for `attend`, if attention can be restated; None: keep timm's attention. low_memory:
    recompute the MLP in backward, if `recomputes` allows.
    """
    options = {} if rope is None else {"rope": rope}
    is_known = type(block) in PRE_NORM_BLOCKS and _is_as_known(block) and is_untouched(block)
    if not is_known or is_observed(x):
        restates = again = False
    else:
        restates = backend is not None and is_restated(block.attn)
        again = low_memory and torch.is_grad_enabled() and recomputes(block)
    if not restates and not again:
        x = block(x, **options)
        return x if rows is None else x[:, rows]
    late = None  # rows to select at the end, if the block must compute all
    if rows is not None and not (restates and pools_rows(block)):
        rows, late = None, rows
    if hasattr(block, "ls1"):
        scale1, scale2 = block.ls1, block.ls2
    else:  # Eva's
        scale1, scale2 = (
            nn.Identity() if gamma is None else gamma.mul
            for gamma in (block.gamma_1, block.gamma_2)
        )
    y = block.norm1(x)
    if restates:
        y = attention(block.attn, y, rope, rows, tempering, backend)
    else:
        y = block.attn(y, **options)
    x = x if rows is None else x[:, rows]
    x = x + block.drop_path1(scale1(y))

    def mlp(x):
        return block.mlp(block.norm2(x))

    if again:
        # the recomputation stops at the last tensor that backward needs: before fc2
        has_random = any(module.training for module in block.mlp.modules())
        y = checkpoint(mlp, x, use_reentrant=False, preserve_rng_state=has_random)
    else:
        y = mlp(x)
    x = x + block.drop_path2(scale2(y))
    return x if late is None else x[:, late]


def attention(
    attn: nn.Module,
    x: Tensor,
    rope: Tensor | None,
    rows: slice | None,
    tempering: Tempering | None,
    backend: str,
) -> Tensor:
    """attn(x, rope) for an attention that `is_restated`, or `rows` of the result; these rows attend
    to all N tokens: x [B, N, C] -> [B, M, C]."""
    layers = folded_layers(attn, x)
    if layers is None:
        q, k, v = _project_as_timm(attn, x)
        q = attn.q_norm(q if rows is None else q[:, rows])
    elif tempering is None or type(tempering.norm) is not nn.Identity:
        q, k, v = _project(attn, layers, x, rows, 1.0)
        q = attn.q_norm(q)  # the Tempering, if there is one: it divides q
    else:
        q, k, v = tempering.with_temperature(lambda tau: _project(attn, layers, x, rows, tau))
    k = attn.k_norm(k)
    if rope is not None:
        first = 0 if rows is None else rows.start
        q, k = (_rotated(attn, t, rope, at).type_as(v) for t, at in ((q, first), (k, 0)))
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    out = attn.norm(attend(q, k, v, backend).flatten(2))
    gate = getattr(attn, "gate", None)  # gated attention; older timm 1.0 releases lack it
    if gate is not None:
        out = out * gate(x if rows is None else x[:, rows]).sigmoid()
    return attn.proj_drop(attn.proj(out))


def _project(attn, layers, x, rows, temperature):
    """q [B, M, H, d] of `rows`, divided by the temperature; k and v [B, N, H', d] of all rows."""
    size, run = attn.head_dim, FrozenProjection.apply
    of_rows = x if rows is None else x[:, rows]
    if len(layers) == 3:
        q, k, v = layers
        (q,) = run(of_rows, *q, temperature, 1, size)
        (k,) = run(x, *k, 1.0, 1, size)
        (v,) = run(x, *v, 1.0, 1, size)
        return q, k, v
    ((weight, bias),) = layers
    if rows is None:
        return run(x, weight, bias, temperature, 3, size)
    border = weight.shape[0] // 3
    q_bias, kv_bias = (None, None) if bias is None else (bias[:border], bias[border:])
    (q,) = run(of_rows, weight[:border], q_bias, temperature, 1, size)
    return q, *run(x, weight[border:], kv_bias, 1.0, 2, size)


def _project_as_timm(attn, x):
    """q [B, N, H, d], k and v [B, N, H', d]."""
    if attn.qkv is None:
        parts = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    elif getattr(attn, "q_bias", None) is None:
        parts = attn.qkv(x).chunk(3, dim=-1)
    else:
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        is_added = attn.qkv_bias_separate
        qkv = attn.qkv(x) + bias if is_added else F.linear(x, attn.qkv.weight, bias)
        parts = qkv.chunk(3, dim=-1)
    size = attn.head_dim
    return [part.unflatten(-1, (part.shape[-1] // size, size)) for part in parts]


def _rotated(attn, t, rope, first):
    """Rotates t [B, M, H, d], the tokens from index `first` on, by rope, except prefix tokens."""
    prefix = max(attn.num_prefix_tokens - first, 0)
    start = max(first - attn.num_prefix_tokens, 0)
    t = t.transpose(1, 2)
    turned = t[:, :, prefix:]
    rope = rope[..., start : start + turned.shape[2], :]
    half = getattr(attn, "rotate_half", False)
    turned = apply_rot_embed_cat(turned, rope, half=half)
    return torch.cat([t[:, :, :prefix], turned], dim=2).transpose(1, 2)
