# SPDX-License-Identifier: Apache-2.0
"""Facts and digests that identify a backbone, to check it when a tuned file is loaded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gated_prompt.tempering import original_norm
from gated_prompt.vit.shortcuts import attention_of, uncompiled
from gated_prompt.vit.wrapping import originals_of, unpatched_name

_INPUT = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
_ROPE = (
    "temperature", "rotate_half", "in_pixels", "linear_bands", "max_res", "ref_feat_shape",
    "grid_offset", "grid_indexing", "min_period", "max_period", "normalize_coords",
)  # fmt: skip


def describe(tensor: Tensor) -> str:
    """Returns "dtype shape sha256" of a tensor on any device. For a subclass around other tensors,
    for example a quantised one: its class name, its shape, and a digest over these tensors."""
    if hasattr(type(tensor), "__tensor_flatten__"):  # a subclass around other tensors
        parts = [describe(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return f"{type(tensor).__name__} {list(tensor.shape)} {digest}"
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{str(tensor.dtype)[6:]} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def identity_of(vit: nn.Module, tuned: Mapping) -> dict:
    """Returns facts and digests that identify a backbone, as JSON types.

    The digest is over the names and tensors that timm's model has, except those in `tuned` and
    timm's own head, which is not used. Weights that frozen_dtype has narrowed are taken in their
    original dtype.
    """
    originals = originals_of(vit)
    state = {unpatched_name(f"backbone.{n}"): t for n, t in vit.state_dict(keep_vars=True).items()}
    lines = [
        f"{name} {describe(originals.get(id(tensor), tensor))}\n"
        for name, tensor in sorted(state.items())
        if name not in tuned
        and re.match(r"backbone\.(?!head\.)", name)
        and isinstance(tensor, Tensor)
    ]
    config = getattr(vit, "pretrained_cfg", None) or {}
    config = config if isinstance(config, dict) else vars(config)
    weight = vit.patch_embed.proj.weight
    identity = {
        "architecture": config.get("architecture"),
        "tag": config.get("tag"),
        "source": getattr(vit, "_gated_prompt_source", None),  # set by load_backbone
        "global_pool": vit.global_pool,
        "input": {key: config.get(key) for key in _INPUT},
        "facts": _facts(vit) | {"dtype": str(originals.get(id(weight), weight).dtype)[6:]},
        "frozen_sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
    }
    return json.loads(json.dumps(identity))  # tuples to lists


def _facts(vit: nn.Module) -> dict:
    """Properties of an architecture that its results depend on; few of them show in the tensors."""
    block, embed, rope = uncompiled(vit.blocks[0]), vit.patch_embed, getattr(vit, "rope", None)
    attn = attention_of(block)

    def of_blocks(function):
        """function(block), if all blocks have the same value; otherwise a list of all values."""
        found = [function(uncompiled(block)) for block in vit.blocks]
        return found[0] if all(each == found[0] for each in found) else found

    q_norm = getattr(attn, "q_norm", None)
    q_norm = original_norm(q_norm)
    registers = getattr(vit, "reg_token", None)
    norms = {
        "norm_pre": vit.norm_pre, "norm1": getattr(block, "norm1", None),
        "q_norm": q_norm, "norm": vit.norm, "fc_norm": vit.fc_norm,
    }  # fmt: skip
    return {
        "model": type(vit).__name__,
        "block": of_blocks(lambda block: type(block).__name__),
        "img_size": embed.img_size,
        "patch_size": embed.patch_size,
        "in_chans": embed.proj.in_channels,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": getattr(attn, "num_heads", None),
        "num_prefix_tokens": vit.num_prefix_tokens,
        "num_reg_tokens": 0 if registers is None else registers.shape[1],
        "no_embed_class": getattr(vit, "no_embed_class", None),
        "activation": of_blocks(lambda b: repr(getattr(getattr(b, "mlp", None), "act", None))),
        **{n: f"{type(m).__name__}, eps={getattr(m, 'eps', None)}" for n, m in norms.items()},
        "rope": rope and {"kind": type(rope).__name__} | {n: getattr(rope, n, None) for n in _ROPE},
    }


def differences_of(saved: dict, got: dict) -> str:
    """Describes the differences of two identities; "" if there are none. Compares digests only if
    the facts are equal, because another architecture explains other weights."""
    wanted, facts = saved["facts"], got["facts"]
    words = [
        f"{name}={wanted[name]!r}, got {facts.get(name)!r}"
        for name in wanted
        if wanted[name] != facts.get(name)
    ]
    if not words and saved["frozen_sha256"] != got["frozen_sha256"]:
        (wanted, got) = (f"{i['architecture']}.{i['tag']}, {i['source']}" for i in (saved, got))
        words = [
            "its frozen weights or their names are different (another SHA-256); saved with "
            f"{wanted!r}, got {got!r}; if the backbone had adapters when it was saved, add them "
            "before load_tuned"
        ]
    return "; ".join(words)
