# SPDX-License-Identifier: Apache-2.0
"""Prompts that start as prototypes of the patch tokens of training images."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

DATA_INITS = ("mean", "random-token", "kmeans")


@torch.no_grad()
def patch_tokens(
    tokens_of: Callable[[Tensor], list[Tensor]], images: Tensor | Iterable
) -> list[Tensor]:
    """The patch tokens of images as they enter each of some blocks.

    Args:
        tokens_of: images [B, C, H, W] -> these tokens, [B, N, D] for each block.
        images: [M, C, H, W], or batches: tensors, or sequences that begin with one.

    Returns:
        A tensor [M * N, D] for each block, float32, on the CPU.
    """
    found: list[list[Tensor]] = []
    for batch in images.split(64) if isinstance(images, Tensor) else images:
        if isinstance(batch, (list, tuple)) and batch:
            batch = batch[0]
        if not isinstance(batch, Tensor) or batch.dim() != 4:
            got = list(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(
                "wrap: init_images must be images [M, C, H, W], or batches of them, alone or first "
                f"in a tuple (a DataLoader, not a Dataset), got {got}"
            )
        found.append([tokens.flatten(0, 1).float().cpu() for tokens in tokens_of(batch)])
    if not found:
        raise ValueError("wrap: init_images must hold at least one image, got none")
    return [torch.cat(tokens) for tokens in zip(*found, strict=True)]


def prototypes(tokens: Tensor, num_prompts: int, init: str) -> Tensor:
    """num_prompts prototypes [P, D] of tokens [M, D]; draws from torch's generator of the CPU.

    "random-token": tokens of the set. "mean": the means of P parts of it, of equal size and drawn
    at random (P times one mean would be P equal prompts, which stay equal). "kmeans": the centres
    of MiniBatchKMeans.

    Raises:
        ValueError: there are fewer tokens than prompts.
        ModuleNotFoundError: scikit-learn, for "kmeans", is not installed.

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
        # enough clusters' worth of tokens in each batch that none stays empty for long
        batch_size = max(1024, 4 * num_prompts)
        kmeans = MiniBatchKMeans(num_prompts, batch_size=batch_size, random_state=seed, n_init=3)
        return torch.from_numpy(kmeans.fit(tokens.numpy()).cluster_centers_)
    order = torch.randperm(len(tokens))
    if init == "random-token":
        return tokens[order[:num_prompts]]
    return torch.stack([part.mean(0) for part in tokens[order].tensor_split(num_prompts)])
