# SPDX-License-Identifier: Apache-2.0
"""`check`: is what should be tuned really tuned?"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gated_prompt.prompting import GatedPrompts

_MAX_NAMES = 5


def check(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
) -> str:
    """Raises if training would leave prompts, gates or temperatures, or another parameter that
    requires grad, as they are.

    Call it once in your script, after the first `loss.backward()` and before `zero_grad()`; in
    distributed training, in all processes.

    Args:
        model: What `wrap` or `attach` returned, or a model around it: DistributedDataParallel,
            torch.compile, a LightningModule, a PEFT model, ...
        optimizer: The optimiser, or all optimisers. None: groups are not checked.

    Returns:
        What is tuned, in words. Warns if there is no gradient to check, and if gates or
        temperatures have weight decay.

    Raises:
        TypeError: model contains no gated prompts; optimizer is not an optimiser.
        RuntimeError: a list of all problems: a parameter of prompts, gates or temperatures is
            frozen; a tuned parameter is in no group of the optimisers, or in two; it has no
            gradient although a backward has run; its gradient is not the same in all processes; it
            is outside the DistributedDataParallel in model; model is in nn.DataParallel; PEFT has
            copied the prompts.
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
    groups = _groups_of(optimizer)
    grouped = [p for group in groups for p in group["params"]]
    if optimizer is not None:
        counts = dict.fromkeys(tuned, 0)
        for parameter in grouped:
            if id(parameter) in counts:
                counts[id(parameter)] += 1
        problems["are in no group of the optimizer (freeze them, or add them)"] = [
            names[i] for i in tuned if counts[i] == 0
        ]
        problems["are in several groups"] = [names[i] for i in tuned if counts[i] > 1]
    has_gradients = any(p.grad is not None for p in (*tuned.values(), *grouped))
    if has_gradients:
        without = [names[i] for i, p in tuned.items() if p.grad is None]
        problems["have no gradient after backward (torch.no_grad or detach on the way?)"] = without
    is_parallel = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    kinds = {type(module).__name__ for module in model.modules()}
    if is_parallel and "FullyShardedDataParallel" not in kinds:
        whole = {i: p for i, p in tuned.items() if not hasattr(p, "device_mesh")}  # not sharded
        around = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        if around:
            inside = {id(p) for m in around for p in m.parameters()}
            problems["are outside DistributedDataParallel"] = [
                names[i] for i in whole if i not in inside
            ]
        problems[
            "have other gradients in another process (attached or thawed after DDP was made, "
            "outside it, or under no_sync?)"
        ] = [names[i] for i in _differing(whole)]
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        problems["are in nn.DataParallel, which can't copy hooks; use DDP"] = [
            names[i] for i in tuned
        ]
    problems["are copies by PEFT's modules_to_save, which no block uses"] = [
        names[i] for i in added if ".modules_to_save." in names[i]
    ]
    found = [f"{_some(those)} {words}" for words, those in problems.items() if those]
    if found:
        raise RuntimeError(f"check: {'; '.join(found)}")
    _warn(parts, groups, has_gradients)
    frozen = sum(1 for p in model.parameters() if not p.requires_grad)
    others = sorted({names[i].rpartition(".")[0] for i in tuned if i not in added})
    words = f"tuned: {len(added)} parameters of prompts, gates and temperatures"
    words += f", and {_first(others)}" if others else ", and nothing else"
    return f"{words}; frozen: {frozen} parameters"


def _groups_of(optimizer) -> list[dict]:
    several = [] if optimizer is None else optimizer
    several = [several] if isinstance(several, torch.optim.Optimizer) else several
    if not isinstance(several, Iterable) or not all(hasattr(o, "param_groups") for o in several):
        raise TypeError(
            "check: optimizer must be a torch.optim.Optimizer or several of them, got "
            f"{type(optimizer).__name__}"
        )
    return [group for one in several for group in one.param_groups]


def _warn(parts: list[GatedPrompts], groups: list[dict], has_gradients: bool) -> None:
    if not has_gradients:
        warnings.warn(
            "check: no parameter has a gradient, so gradients were not checked; call it after "
            "backward and before zero_grad",
            stacklevel=3,
        )
    still = {
        id(p): name
        for part in parts
        for name, p in part.added_parameters().items()
        if name.startswith(("gates.", "temperatures."))
    }
    decayed = [
        still[id(p)] for g in groups if g.get("weight_decay") for p in g["params"] if id(p) in still
    ]
    if decayed:
        warnings.warn(
            f"check: {_first(decayed)} have weight decay, which pulls gates half open and "
            "temperatures to 0; param_groups gives them none",
            stacklevel=3,
        )


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
    return f"{len(names)} tuned parameters ({_first(names)})"


def _first(names: list[str]) -> str:
    return ", ".join(names[:_MAX_NAMES]) + (", ..." if len(names) > _MAX_NAMES else "")
