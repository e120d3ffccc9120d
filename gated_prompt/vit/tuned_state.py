# SPDX-License-Identifier: Apache-2.0
"""The tuned parameters and buffers as a dict of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gated_prompt.vit.checkpoint_file import CheckpointError, first_names
from gated_prompt.vit.model import GatedPromptViT
from gated_prompt.vit.wrapping import unpatched_name


def tuned_state_dict(model: GatedPromptViT) -> dict[str, Tensor]:
    """Returns the tuned parameters, named as in `model.tuned_parameters()`, and the buffers that
    belong to them, for example of a BatchNorm. The tensors are detached, not copied."""
    check_model("tuned_state_dict", model)
    return {name: parameter.detach() for name, parameter in tuned_tensors(model).items()}


@torch.no_grad()
def load_tuned_state_dict(model: GatedPromptViT, state: Mapping[str, Tensor]) -> None:
    """Copies `state`, from `tuned_state_dict`, into a model that was wrapped with the same options.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape, because the model has
            another method, gate, number of prompts or classes. The model is not changed.
        TypeError: a value of state is not a tensor, or model is not what `wrap` returned.
    """
    check_model("load_tuned_state_dict", model)
    targets, problems = tuned_tensors(model), []
    for words, names in (
        ("missing", targets.keys() - state.keys()),
        ("unexpected", state.keys() - targets.keys()),
    ):
        if names:
            problems.append(f"{len(names)} tensors {words} ({first_names(sorted(names))})")
    for name in sorted(targets.keys() & state.keys()):
        if not isinstance(state[name], Tensor):
            raise TypeError(f"load_tuned_state_dict: {name} must be a tensor, got {state[name]!r}")
        wanted, got = list(targets[name].shape), list(state[name].shape)
        if wanted != got:
            problems.append(f"{name} must be {wanted}, got {got}")
    if problems:
        own = ", ".join(
            f"{o}={getattr(model.options, o)!r}" for o in ("method", "gate", "num_prompts")
        )
        raise CheckpointError(
            f"load_tuned_state_dict: {'; '.join(problems[:5])}; the model has {own} and "
            f"{model.num_classes} classes"
        )
    for name, target in targets.items():
        target.copy_(state[name])


def check_model(who: str, model) -> None:
    if not isinstance(model, GatedPromptViT):
        raise TypeError(
            f"{who}: model must be what wrap returned (for a compiled or parallel model: its "
            f"._orig_mod or .module), got {type(model).__name__}"
        )
    model.require_wrapped(who)


def tuned_tensors(model: GatedPromptViT) -> dict[str, Tensor]:
    """Returns the tensors that `tuned_state_dict` saves.

    Outside the backbone these are all parameters and buffers, frozen ones too. In the backbone
    they are the tuned parameters, and the buffers for which `_is_with_what_is_tuned` is True.
    """
    tuned = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, last = name.rpartition(".")
        if name.startswith("backbone."):
            is_ours = (
                tensor.requires_grad
                if isinstance(tensor, nn.Parameter)
                else _is_with_what_is_tuned(model, owner)
            )
        else:
            is_ours = True
        if is_ours and last == "_extra_state":
            raise ValueError(
                "tuned_state_dict: the state of a model must be parameters and buffers, got extra "
                f"state of {owner!r}; save model.state_dict() instead"
            )
        if is_ours:
            tuned[unpatched_name(name)] = tensor
    return tuned


def _is_with_what_is_tuned(model: nn.Module, owner: str) -> bool:
    """True if the buffers of the module `owner` are saved: it tracks statistics, or the innermost
    module around them that has parameters has a tuned one."""
    module = model.get_submodule(owner)
    if type(module).__module__.startswith("timm."):  # its buffers are constants
        return False
    if hasattr(module, "track_running_stats"):
        return True
    while owner != "backbone":
        flags = [parameter.requires_grad for parameter in model.get_submodule(owner).parameters()]
        if flags:
            return any(flags)
        owner = owner.rpartition(".")[0]
    return False
