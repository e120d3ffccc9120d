# SPDX-License-Identifier: Apache-2.0
"""The tuning loop around a wrapped model, and the accuracy of what came out.

Datasets are map-style and give (image [C, H, W], label) pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset


@dataclass(frozen=True)
class TuneConfig:
    """SGD with momentum, linear warm-up, then a cosine to 0: the paper's recipe."""

    epochs: int = 100
    """Passes over the training set."""
    batch_size: int = 64
    """Images per step."""
    lr: float = 0.1
    """Peak learning rate of the prompts, used as it is: not scaled by the batch size."""
    gate_lr: float | None = None
    """Peak learning rate of the gates. None: lr."""
    temperature_lr: float | None = None
    """Peak learning rate of the temperatures. None: lr."""
    head_lr: float | None = None
    """Peak learning rate of the head. None: lr."""
    weight_decay: float = 0.0
    """Weight decay of everything that is tuned."""
    momentum: float = 0.9
    """Momentum of SGD."""
    warmup_epochs: int = 10
    """Epochs of warm-up; the first of them runs at rate 0, as in the paper's code."""
    seed: int = 42
    """Seed of the order of the images and of the prompt dropout."""
    cache_features: bool = False
    """Compute the frozen features once and train the head on them. For method "linear", and only
    where the dataset gives the same image every time (no augmentation)."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"TuneConfig: {name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"TuneConfig: warmup_epochs must be in [0, epochs = {self.epochs}), "
                f"got {self.warmup_epochs}; set it with epochs"
            )


def tune(
    model: nn.Module,
    train_set: Dataset,
    config: TuneConfig,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Tunes a wrapped model in place, with cross-entropy, and leaves it in train mode.

    The same weights and seed give the same numbers on the same machine with the same number of
    threads. The random state of the caller is left as it was.

    Args:
        model: A `GatedPromptViT`; batches go to its device.
        train_set: The images and their labels.
        config: The recipe.
        progress: Called after each epoch with its number, from 1, and its mean loss.

    Returns:
        The mean training loss of each epoch.

    Raises:
        ValueError: train_set is empty, or cache_features with a method that is not "linear".
        RuntimeError: The loss is nan or inf. Raised before the step, so what is tuned is as the
            last good step left it.
    """
    if len(train_set) == 0:
        raise ValueError("tune: train_set must have at least one image, got 0")
    if config.cache_features and model.method != "linear":
        raise ValueError(
            f'tune: cache_features needs the method "linear", got "{model.method}", whose features '
            "change with every step"
        )
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(
        model.param_groups(
            lr=config.lr,
            weight_decay=config.weight_decay,
            gate_lr=config.gate_lr,
            temperature_lr=config.temperature_lr,
            head_lr=config.head_lr,
        ),
        momentum=config.momentum,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: warmup_cosine(epoch, config.warmup_epochs, config.epochs)
    )
    network = model
    if config.cache_features:
        train_set, network = pooled_features(model, train_set), model.head
    order = torch.Generator().manual_seed(config.seed)
    loader = DataLoader(train_set, config.batch_size, shuffle=True, generator=order)
    model.train()
    losses = []
    with seeded(config.seed, device):
        for epoch in range(1, config.epochs + 1):
            total = 0.0
            for images, labels in loader:
                loss = F.cross_entropy(network(images.to(device)), labels.to(device))
                value = loss.item()
                if not math.isfinite(value):
                    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
                    raise RuntimeError(
                        f"tune: the loss must be finite, got {value} in epoch {epoch} at learning "
                        f"rates {rates}; stopped before the step. Lower them, or look for nan and "
                        "inf in the images"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += value * len(labels)
            schedule.step()
            losses.append(total / len(train_set))
            if progress is not None:
                progress(epoch, losses[-1])
    return losses


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Share of the peak learning rate: step / warmup, then (1 + cos(pi * done)) / 2, where done
    goes from 0 at the end of the warm-up to 1 at `total`."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def evaluate(model: nn.Module, dataset: Dataset, batch_size: int = 256) -> float:
    """Top-1 accuracy in [0, 1], the model in eval mode; its mode is put back."""
    predicted, labels = _over(model, lambda x: model(x).argmax(-1), dataset, batch_size)
    return (predicted == labels).double().mean().item()


def pooled_features(model: nn.Module, dataset: Dataset, batch_size: int = 256) -> TensorDataset:
    """What the head reads, in eval mode: (feature [D], label) pairs on the CPU, in order."""

    def features(images: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(images), pre_logits=True)

    return TensorDataset(*_over(model, features, dataset, batch_size))


@torch.no_grad()
def _over(
    model: nn.Module, function: Callable[[Tensor], Tensor], dataset: Dataset, batch_size: int
) -> tuple[Tensor, Tensor]:
    """function(images) and the labels of a whole dataset, on the CPU."""
    device, was_training = next(model.parameters()).device, model.training
    # A loader without a generator of its own draws from the caller's.
    loader = DataLoader(dataset, batch_size, generator=torch.Generator())
    model.eval()
    try:
        batches = [(function(x.to(device)).cpu(), y) for x, y in loader]
    finally:
        model.train(was_training)
    results, labels = zip(*batches, strict=True)
    return torch.cat(results), torch.cat(labels)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Inside, torch's generators start at `seed`: the CPU's, and that of `device` if it is CUDA.
    Outside, they are as they were."""
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield
