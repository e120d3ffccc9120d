# SPDX-License-Identifier: Apache-2.0
"""The tuning loop for a wrapped model, and its evaluation.

Datasets are map-style and return (image [C, H, W], label) pairs.
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
    """Peak learning rate of the prompts; not scaled by the batch size."""
    gate_lr: float | None = None
    """Peak learning rate of the gates. None: lr."""
    temperature_lr: float | None = None
    """Peak learning rate of the temperatures. None: lr."""
    head_lr: float | None = None
    """Peak learning rate of the head. None: lr."""
    weight_decay: float = 0.0
    """Weight decay of prompts, head and backbone; gates and temperatures have none."""
    momentum: float = 0.9
    """Momentum of SGD."""
    warmup_epochs: int = 10
    """Epochs of warm-up; the first epoch runs at rate 0, as in the paper's code."""
    seed: int = 42
    """Seed for the order of the images and for prompt dropout."""
    cache_features: bool = False
    """Compute the frozen features once and train the head on them. Only for method "linear", and
    only if the dataset returns the same image every time (no augmentation)."""
    cuda_graph: bool = False
    """Run forward and backward of whole batches as one CUDA graph, see `GraphedStep`."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"TuneConfig: {name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"TuneConfig: warmup_epochs must be in [0, epochs = {self.epochs}), "
                f"got {self.warmup_epochs}; change it together with epochs"
            )


def tune(
    model: nn.Module,
    train_set: Dataset,
    config: TuneConfig,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Tunes a wrapped model in place, with cross-entropy, and leaves it in train mode.

    The same weights and seed give the same numbers on the same machine with the same number of
    threads. The caller's random state is not changed.

    Args:
        model: A `GatedPromptViT`; batches are moved to its device.
        train_set: The images and their labels.
        config: The recipe.
        progress: Called after each epoch with its number, from 1, and its mean loss.

    Returns:
        The mean training loss of each epoch.

    Raises:
        ValueError: train_set is empty; cache_features is set and the method is not "linear"; or
            cuda_graph is set and the model is not on a GPU.
        RuntimeError: The loss is nan or inf. Raised before the optimiser step, so the tuned
            parameters are unchanged since the last good step.
    """
    if len(train_set) == 0:
        raise ValueError("tune: train_set must have at least one image, got 0")
    if config.cache_features and model.method != "linear":
        raise ValueError(
            f'tune: cache_features needs the method "linear", got "{model.method}", whose features '
            "change with every step"
        )
    device = next(model.parameters()).device
    if config.cuda_graph and device.type != "cuda":
        raise ValueError(f"tune: cuda_graph needs a model on a CUDA GPU, got one on {device}")
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
    losses, step = [], None
    with seeded(config.seed, device):
        for epoch in range(1, config.epochs + 1):
            total = 0.0
            for images, labels in loader:
                batch = images.to(device), labels.to(device)
                if step is None:
                    is_graphed = config.cuda_graph and len(images) == config.batch_size
                    step = GraphedStep(network, *batch) if is_graphed else _EagerStep(network)
                loss = step(*batch)
                value = loss.item()
                if not math.isfinite(value):
                    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
                    raise RuntimeError(
                        f"tune: the loss must be finite, got {value} in epoch {epoch} at learning "
                        f"rates {rates}; stopped before the optimiser step. Lower them, or look "
                        "for nan and inf in the images"
                    )
                optimizer.step()
                total += value * len(labels)
            schedule.step()
            losses.append(total / len(train_set))
            if progress is not None:
                progress(epoch, losses[-1])
    return losses


class _EagerStep:
    """Computes the loss of a batch, and replaces .grad by its gradients."""

    def __init__(self, network: nn.Module):
        self.network = network
        self.parameters = [p for p in network.parameters() if p.requires_grad]

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        loss = F.cross_entropy(self.network(images), labels)
        loss.backward()
        return loss.detach()


class GraphedStep(_EagerStep):
    """Forward, cross-entropy and gradients of a batch as one CUDA graph.

    If a batch is small, the host needs more time to launch the kernels of a step one by one than
    the GPU needs to run them; a graph is one launch. The optimiser is not part of the graph:

        step = GraphedStep(model, images, labels)  # a first batch; it fixes the shapes
        for images, labels in batches:
            loss = step(images, labels)
            optimizer.step()

    Prompt dropout draws new numbers at each call. The graph fixes the shapes, the mode (train or
    eval), the context (autocast) and the set of tuned parameters.
    """

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor):
        """Captures a step of `network` on copies of these images and labels, after three warm-up
        steps. No parameter is changed.

        Raises:
            RuntimeError: autocast is on with its cache. The graph would reuse the cached casts of
                the tuned parameters, with the values of the capture.
        """
        is_autocast = torch.is_autocast_enabled(images.device.type)
        if is_autocast and torch.is_autocast_cache_enabled():
            raise RuntimeError(
                "GraphedStep: autocast must have no cache, or the graph would reuse casts of old "
                "parameter values: torch.autocast(..., cache_enabled=False)"
            )
        super().__init__(network)
        self.images, self.labels = images.clone(), labels.clone()
        self.replay, self.loss = self._capture()
        self.grads = [parameter.grad for parameter in self.parameters]

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss []; .grad has the gradients until the next call. A batch of another
        shape, such as a smaller last batch, runs without the graph."""
        if images.shape != self.images.shape or labels.shape != self.labels.shape:
            return super().__call__(images, labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.replay()
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad
        return self.loss.clone()

    def _capture(self) -> tuple[Callable[[], None], Tensor]:
        """Returns a function that replays the step on self.images and self.labels, and the loss
        tensor that each replay overwrites."""
        device, run = self.images.device, super().__call__
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(self.images, self.labels)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            loss = run(self.images, self.labels)
        return graph.replay, loss


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Factor of the peak learning rate: step / warmup, then (1 + cos(pi * done)) / 2, where done
    goes from 0 at the end of the warm-up to 1 at `total`."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def evaluate(model: nn.Module, dataset: Dataset, batch_size: int = 256) -> float:
    """Top-1 accuracy in [0, 1], in eval mode; restores the model's mode."""
    predicted, labels = _over(model, lambda x: model(x).argmax(-1), dataset, batch_size)
    return (predicted == labels).double().mean().item()


def pooled_features(model: nn.Module, dataset: Dataset, batch_size: int = 256) -> TensorDataset:
    """The head's inputs, in eval mode: (feature [D], label) pairs on the CPU, in order."""

    def features(images: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(images), pre_logits=True)

    return TensorDataset(*_over(model, features, dataset, batch_size))


@torch.no_grad()
def _over(
    model: nn.Module, function: Callable[[Tensor], Tensor], dataset: Dataset, batch_size: int
) -> tuple[Tensor, Tensor]:
    """function(images) and the labels of a whole dataset, on the CPU."""
    if len(dataset) == 0:
        raise ValueError("evaluate: dataset must have at least one image, got an empty one")
    device, was_training = next(model.parameters()).device, model.training
    # Without its own generator, a loader would draw from the caller's.
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
    """Seeds torch's CPU generator, and the generator of `device` if that is CUDA. Restores both on
    exit."""
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield
