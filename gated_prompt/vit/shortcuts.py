# SPDX-License-Identifier: Apache-2.0
"""Short cuts through timm's blocks: the same results in less time or memory.

The plain path calls a block as it is, with all that others have put on it and on its modules. A
short cut leaves modules out, or changes what they are given. So it is taken only where nobody can
tell. Each has one condition, which is asked at every call, since hooks and patches come and go:

    folded projections  `folded_layers`  no pass over q for the temperature, no stack of the
                                         gradients of q, k and v
    pooled rows         `pools_rows`     the last block computes the rows that the pool reads
    recomputed MLP      `recomputes`     the MLP's hidden layer is not kept
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

from gated_prompt.temperature import attend, is_transformed
from gated_prompt.torch_private import global_hooks
from gated_prompt.vit.attention import FrozenProjection, Tempering

ATTENTIONS = (Attention, AttentionRope, EvaAttention)
PRE_NORM_BLOCKS = (Block, EvaBlock)
_OWNERS = ("torch.nn.", "timm.", "gated_prompt.")
# Names of their classes that treat each token by itself, inside of a block.
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


# What the short cuts restate; nobody has patched the class, before this import or since.
_FORWARDS = {
    kind: kind.forward for kind in (*PRE_NORM_BLOCKS, *ATTENTIONS, nn.Linear) if _is_genuine(kind)
}


# ---- conditions ----


def _is_as_known(module: nn.Module | None) -> bool:
    kind = type(module)
    return kind in _FORWARDS and kind.forward is _FORWARDS[kind]


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of the module is its class's forward and nothing else: no hook of any kind but
    our own, no forward of the instance, not compiled."""
    own = vars(module)
    return not (
        own["_forward_pre_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own
        or own.get("_compiled_call_impl") is not None
        or (own["_forward_hooks"] and not _are_ours(own["_forward_hooks"].values()))
    )


def _are_ours(hooks) -> bool:
    return all(getattr(hook, "__func__", None) is Tempering.after_projection for hook in hooks)


def is_observed(x) -> bool:
    """Whether torch tells somebody of the call of each module: global hooks, tracing."""
    return bool(isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or any(global_hooks))


def is_restated(attn: nn.Module | None) -> bool:
    """Whether `attention` computes what a call of this attention of timm's computes."""
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
    """(weight, bias) of qkv, or of q, k and v, if these are plain linear layers, untouched, frozen
    and where x is; else None."""
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
    """Whether the rows of its result need no other rows but those that attention reads."""
    return is_restated(block.attn) and all(map(_are_stock, block.children()))


def recomputes(block: nn.Module) -> bool:
    """Whether nobody can tell that the MLP runs twice."""
    parts = (*block.norm2.modules(), *block.mlp.modules())
    return all(is_untouched(m) and not (m.training and m._buffers) for m in parts)


def _are_stock(module: nn.Module) -> bool:
    """The module and those in it."""
    children = module._modules.values()
    return _is_stock(module) and all(child is None or _are_stock(child) for child in children)


def _is_stock(module: nn.Module) -> bool:
    return _is_token_wise(type(module)) and is_untouched(module)


@functools.cache
def _is_token_wise(kind: type) -> bool:
    return kind.__name__ in _TOKEN_WISE and kind.__module__.startswith(_OWNERS)


# ---- blocks ----


def uncompiled(module: nn.Module | None) -> nn.Module | None:
    """The module that torch.compile(module) stands for, or module itself."""
    # not getattr(module, "_orig_mod"): each module that has none would raise an error, and catch it
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
    """block(x), or these rows of it: x [B, N, D] -> [B, N, D].

    rope: timm's rotary embedding. tempering: what divides the queries. backend: of `attend`, where
    attention can be restated; None: timm's own. low_memory: the MLP is computed again in backward,
    where that can be done.
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
    late = None  # rows that are chosen at the end
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
        # it stops where the last tensor is back that backward needs: before fc2
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
    """attn(x, rope), for an attention that `is_restated`, or these rows of it, which attend to all:
    x [B, N, C] -> [B, M, C]."""
    layers = folded_layers(attn, x)
    if layers is None:
        q, k, v = _project_as_timm(attn, x)
        q = attn.q_norm(q if rows is None else q[:, rows])
    elif tempering is None or type(tempering.norm) is not nn.Identity:
        q, k, v = _project(attn, layers, x, rows, 1.0)
        q = attn.q_norm(q)  # it may be the tempering
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
    gate = getattr(attn, "gate", None)  # timm's gated attention, newer than timm's first 1.0
    if gate is not None:
        out = out * gate(x if rows is None else x[:, rows]).sigmoid()
    return attn.proj_drop(attn.proj(out))


def _project(attn, layers, x, rows, temperature):
    """q [B, M, H, d] of the rows, divided by the temperature; k and v [B, N, H', d]."""
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
    """t [B, M, H, d], tokens `first` on, with those after the prefix rotated by rope."""
    prefix = max(attn.num_prefix_tokens - first, 0)
    start = max(first - attn.num_prefix_tokens, 0)
    t = t.transpose(1, 2)
    turned = t[:, :, prefix:]
    rope = rope[..., start : start + turned.shape[2], :]
    half = getattr(attn, "rotate_half", False)
    turned = apply_rot_embed_cat(turned, rope, half=half)
    return torch.cat([t[:, :, :prefix], turned], dim=2).transpose(1, 2)
