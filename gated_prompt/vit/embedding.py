# SPDX-License-Identifier: Apache-2.0
"""The part of a timm ViT before its first block."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def embed(vit: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """images [B, C, H, W] -> the tokens [B, N, D] that enter the first block, and timm's rotary
    embeddings: a list of one for all blocks (None if vit has none), or of one per block."""
    is_symbolic = isinstance(images, torch.fx.Proxy)
    if not is_symbolic and (images.dim() != 4 or not images.is_floating_point()):
        raise ValueError(
            "GatedPromptViT: images must be [B, C, H, W] in floating point, got "
            f"{list(images.shape)} in {images.dtype}"
        )
    size = None if is_symbolic else vit.patch_embed.img_size
    if vit.patch_embed.strict_img_size and size and tuple(images.shape[-2:]) != tuple(size):
        raise ValueError(
            f"GatedPromptViT: images must be {size[0]} x {size[1]}, as the backbone was built "
            f"(img_size=, or set_input_size() before wrap), got {images.shape[-2]} x "
            f"{images.shape[-1]}"
        )
    x, rope = vit._pos_embed(vit.patch_embed(images)), None
    if isinstance(x, tuple):  # Eva's _pos_embed has already applied patch_drop
        x, rope = x
    else:
        x = vit.patch_drop(x)
    is_for_each_block = rope is not None and getattr(vit, "rope_mixed", False)
    return vit.norm_pre(x), list(rope) if is_for_each_block else [rope]


def rope_with_prompts(rope: Tensor | None, num_prompts: int, at_start: bool) -> Tensor | None:
    """rope [..., N, 2d], sines before cosines -> [..., P + N, 2d]; prompts are rotated by 0."""
    if rope is None:
        return None
    still = torch.zeros_like(rope[..., :1, :])
    still[..., rope.shape[-1] // 2 :] = 1
    still = still.expand(*still.shape[:-2], num_prompts, -1)
    return torch.cat([still, rope] if at_start else [rope, still], dim=-2)
