# SPDX-License-Identifier: Apache-2.0
"""Prompts that start as prototypes of the patch tokens of training images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gated_prompt.vit.embedding import embed
from gated_prompt.vit.wrapping import inside

DATA_INITS = ("mean", "random-token", "kmeans")


@torch.no_grad()
def init_prompts(model, images: Tensor | Iterable, init: str) -> None:
    """Fills the prompts of a `GatedPromptViT`, and its deep prompts, with prototypes of the patch
    tokens that enter the same block of the plain backbone.

    Args:
        images: [M, C, H, W], or an iterable of batches: tensors, or sequences that begin with one.
        init: See `prototypes`.
    """
    depth = 1 if model.deep_prompts is None else len(model.blocks)
    found: list[list[Tensor]] = []
    for batch in images.split(64) if isinstance(images, Tensor) else images:
        if isinstance(batch, (list, tuple)) and batch:
            batch = batch[0]
        if not isinstance(batch, Tensor) or batch.dim() != 4:
            got = list(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(
                "wrap: init_images must be a tensor [M, C, H, W] or an iterable of batches (a "
                "DataLoader, not a Dataset), each a tensor [M, C, H, W] or a tuple that begins "
                f"with one, got {got}"
            )
        batch = batch.to(model.prompts.tokens.device)
        tokens = patch_tokens(model.backbone, batch, depth)
        found.append([of_block.flatten(0, 1).float().cpu() for of_block in tokens])
    if not found:
        raise ValueError("wrap: init_images must hold at least one image, got none")
    first, *deep = (
        prototypes(torch.cat(tokens), model.num_prompts, init)
        for tokens in zip(*found, strict=True)
    )
    model.prompts.tokens.copy_(first)
    if deep:
        model.deep_prompts.tokens.copy_(torch.stack(deep))


def patch_tokens(vit: nn.Module, images: Tensor, depth: int) -> list[Tensor]:
    """images [B, C, H, W] -> the patch tokens [B, N, D] that enter each of the first `depth` blocks
    of a wrapped backbone, without prompts."""
    found = []

    def run(images: Tensor) -> Tensor:
        x, ropes = embed(vit, images)
        for index in range(depth):
            if index > 0:
                rope = ropes[(index - 1) % len(ropes)]
                x = vit.blocks[index - 1](x, **({} if rope is None else {"rope": rope}))
            found.append(x[:, vit.num_prefix_tokens :])
        return x

    inside(vit, images, run)
    return found


def prototypes(tokens: Tensor, num_prompts: int, init: str) -> Tensor:
    """Returns num_prompts prototypes [P, D] of tokens [M, D]. Draws from torch's CPU generator.

    init "random-token" picks P of the tokens. "mean" splits the tokens at random into P parts of
    equal size and takes the mean of each (one mean for all would give P equal prompts, which stay
    equal). "kmeans" takes the centres of MiniBatchKMeans.

    Raises:
        ValueError: there are fewer tokens than prompts.
        ModuleNotFoundError: init is "kmeans" and scikit-learn is not installed.

    Source: Wang et al., ICML 2024 (SPT): prompts that start as prototypes of the input tokens.
    """
    if len(tokens) < num_prompts:
        raise ValueError(
            f"wrap: prompt_init={init!r} needs at least num_prompts = {num_prompts} patch tokens, "
            f"got {len(tokens)}; give more init_images"
        )
    if init == "kmeans":
        try:
            from sklearn.cluster import MiniBatchKMeans
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"wrap: prompt_init='kmeans': {error}; pip install 'gated-prompt[tune]'"
            ) from error
        seed = int(torch.randint(2**31 - 1, ()))
        # several tokens per cluster in each batch, so that no cluster stays empty for long
        batch_size = max(1024, 4 * num_prompts)
        kmeans = MiniBatchKMeans(num_prompts, batch_size=batch_size, random_state=seed, n_init=3)
        return torch.from_numpy(kmeans.fit(tokens.numpy()).cluster_centers_)
    order = torch.randperm(len(tokens))
    if init == "random-token":
        return tokens[order[:num_prompts]]
    return torch.stack([part.mean(0) for part in tokens[order].tensor_split(num_prompts)])
