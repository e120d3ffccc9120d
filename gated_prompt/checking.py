# SPDX-License-Identifier: Apache-2.0
"""`check`: is what should be tuned really tuned?"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gated_prompt.prompting import GatedPrompts

_MAX_NAMES = 5


def check(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
) -> None:
    """Raises if training would leave prompts, gates or temperatures, or another parameter that
    requires grad, as they are.

    Call it once in your script, after the first `loss.backward()` and before `zero_grad()`; in
    distributed training, in all processes. Before any backward it can't check the gradients.

    Args:
        model: What `wrap` or `attach` returned, or a model around it: DistributedDataParallel,
            torch.compile, a LightningModule, a PEFT model, ...
        optimizer: The optimiser, or all optimisers. None: groups are not checked.

    Raises:
        TypeError: model contains no gated prompts.
        RuntimeError: a list of all problems: a parameter of prompts, gates or temperatures is
            frozen; a tuned parameter is in no group of the optimisers, or in two; it has no
            gradient although a backward has run; it is outside DistributedDataParallel, or its
            gradient is not the same in all processes, so each process would tune its own.
    """
    parts = [module for module in model.modules() if isinstance(module, GatedPrompts)]
    if not parts:
        raise TypeError(
            "check: model must contain what wrap or attach returned, got a "
            f"{type(model).__name__} without gated prompts"
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tuned = {id(p): p for p in model.parameters() if p.requires_grad}
    added = {id(p): p for part in parts for p in part.added_parameters().values()}
    problems: dict[str, list[str]] = {"are frozen": [names[i] for i in added if i not in tuned]}
    grouped = None
    if optimizer is not None:
        several = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        grouped = [p for o in several for group in o.param_groups for p in group["params"]]
        counts = dict.fromkeys(tuned, 0)
        for parameter in grouped:
            if id(parameter) in counts:
                counts[id(parameter)] += 1
        problems["are in no group of the optimizer"] = [names[i] for i in tuned if counts[i] == 0]
        problems["are in several groups"] = [names[i] for i in tuned if counts[i] > 1]
    if any(p.grad is not None for p in (*tuned.values(), *(grouped or ()))):
        without = [names[i] for i, p in tuned.items() if p.grad is None]
        problems["have no gradient after backward (torch.no_grad or detach on the way?)"] = without
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        parallel = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        inside = {id(p) for m in parallel for p in m.parameters()}
        whole = {i: p for i, p in tuned.items() if not hasattr(p, "device_mesh")}  # not sharded
        problems["are outside DistributedDataParallel"] = [
            names[i] for i in whole if i not in inside
        ]
        problems["have other gradients in another process (thawed after DDP was made?)"] = [
            names[i] for i in _differing(whole)
        ]
    found = [f"{_some(those)} {words}" for words, those in problems.items() if those]
    if found:
        raise RuntimeError(f"check: {'; '.join(found)}")


def _differing(tuned: dict[int, nn.Parameter]) -> list[int]:
    """The parameters whose gradients are not the same in all processes."""
    if not tuned:
        return []
    sums = [0 * p.sum() if p.grad is None else p.grad.double().sum() for p in tuned.values()]
    mine = torch.stack([s.detach().double() for s in sums])
    all_sums = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(all_sums, mine)
    is_same = (
        torch.stack([torch.isclose(mine, s, 0, 0, equal_nan=True) for s in all_sums])
        .all(0)
        .tolist()
    )
    return [i for i, same in zip(tuned, is_same, strict=True) if not same]


def _some(names: list[str]) -> str:
    words = ", ".join(names[:_MAX_NAMES]) + (", ..." if len(names) > _MAX_NAMES else "")
    return f"{len(names)} tuned parameters ({words})"
