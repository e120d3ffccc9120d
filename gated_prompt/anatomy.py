# SPDX-License-Identifier: Apache-2.0
"""Where a model has its blocks, the projection of its queries, and its head; for `attach`."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

# Class names of blocks that map tokens to tokens and return a sum, which may be overwritten.
BLOCKS = {
    "Block": "MAE, DINO, MoCo v3, timm",
    "NestedTensorBlock": "DINOv2",
    "EncoderBlock": "torchvision",
    "ResidualAttentionBlock": "open_clip, CLIP",
    "TransformerEncoderLayer": "torch.nn",
    "ViTLayer": "transformers", "DeiTLayer": "transformers", "ViTMAELayer": "transformers",
    "ViTMSNLayer": "transformers", "Dinov2Layer": "transformers",
    "Dinov2WithRegistersLayer": "transformers", "DINOv3ViTLayer": "transformers",
    "CLIPEncoderLayer": "transformers", "SiglipEncoderLayer": "transformers",
}  # fmt: skip
_QUERIES = ("q_proj", "query", "qkv")  # names of the nn.Linear that projects the queries
_QUERY_NORMS = ("q_norm", "ln_q", "norm_q", "query_norm", "q_layernorm", "qk_norm")
_HEADS = ("classifier", "heads", "head")


def blocks_of(model: nn.Module, name: str | None) -> list[nn.Module]:
    """The blocks of the model: those in the list `name`, or in the only list of known blocks."""
    if name is not None:
        try:
            container = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"attach: blocks={name!r} is not in model: {error}") from None
        if not isinstance(container, (nn.ModuleList, nn.Sequential)) or len(container) == 0:
            raise ValueError(
                f"attach: blocks={name!r} must be a nn.ModuleList or nn.Sequential of blocks, got "
                f"{type(container).__name__}"
            )
        return list(container)
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 0:
            kinds = {type(block).__name__ for block in module}
            if kinds <= BLOCKS.keys():
                found[path] = module
    if len(found) == 1:
        return list(*found.values())
    known = ", ".join(sorted(BLOCKS))
    got = f"{len(found)} in {type(model).__name__}"
    got += f": {', '.join(map(repr, found))}; choose one, or attach to a part" if found else ""
    raise TypeError(
        f"attach: model must have one list of blocks of a class in ({known}), or the argument "
        f"blocks, got {got}. For a ViT of your own, give blocks= and query=; networks without a "
        "fixed sequence of tokens (Swin, MViT, convolutions) can't have prompts"
    )


def query_of(block: nn.Module, name: str | None) -> str:
    """The name, in the block, of the module that projects the queries: `name`, or the only one of a
    known kind."""
    advice = "give query=, or use temperature=False"
    if name is None:
        named = dict(block.named_modules())
        found = [n for n, m in named.items() if isinstance(m, nn.MultiheadAttention)]
        found = found or [n for n in named if n.rpartition(".")[2] in _QUERIES]
        kind = type(block).__name__
        if len(found) != 1 or kind not in BLOCKS:
            raise ValueError(
                f"attach: the queries of {kind} must be known for a temperature, got "
                f"{found or 'no'} candidates in a block of this class; {advice}"
            )
        (name,) = found
    try:
        module = block.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"attach: query={name!r} is not in the block: {error}") from None
    if isinstance(module, nn.MultiheadAttention):
        is_own = type(module).forward is not nn.MultiheadAttention.forward
        if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
            raise ValueError(
                f"attach: {name!r} must be self-attention without bias_k and add_zero_attn for a "
                f"temperature, got kdim={module.kdim}; use temperature=False"
            )
        if is_own or "forward" in vars(module):
            raise ValueError(
                f"attach: {name!r} has its own forward, which a temperature would replace; use "
                "temperature=False"
            )
        return name
    owner = block.get_submodule(name.rpartition(".")[0])
    norms = [n for n in _QUERY_NORMS if isinstance(getattr(owner, n, None), nn.Module)]
    norms = [n for n in norms if not isinstance(getattr(owner, n), nn.Identity)]
    if norms:
        raise ValueError(
            f"attach: {name!r} divides the queries before {norms[0]} normalises them, so a "
            "temperature has no effect; use temperature=False (for timm models: wrap)"
        )
    return name


def dim_of(block: nn.Module) -> int:
    """D, from the first normalisation or linear layer of the block."""
    for module in block.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() in (1, 2):
            return weight.shape[-1]
    raise ValueError(f"attach: {type(block).__name__} has no layer that shows the size of a token")


def head_of(model: nn.Module, name: str | bool | None) -> str | None:
    """The name of the module that is not frozen: `name`, or the first of _HEADS, or None."""
    if name is False:
        return None
    modules = dict(model.named_modules())
    found = [n for n in (_HEADS if name is None else (name,)) if n in modules]
    if name is None:
        found = [n for n in found if next(modules[n].parameters(), None) is not None]
    if found:
        return found[0]
    if name is not None:
        raise ValueError(f"attach: head={name!r} is not in {type(model).__name__}")
    warnings.warn(
        f"attach: found no head in {type(model).__name__} ({', '.join(_HEADS)}), so only prompts, "
        "gates and temperatures will be tuned; give head=, or head=False if you have your own",
        stacklevel=3,
    )
    return None
