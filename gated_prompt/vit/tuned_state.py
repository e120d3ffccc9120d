# SPDX-License-Identifier: Apache-2.0
"""The tuned parameters and buffers as a dict of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gated_prompt.attaching import NAME
from gated_prompt.prompting import GatedPrompts
from gated_prompt.vit.checkpoint_file import CheckpointError, first_names
from gated_prompt.vit.model import GatedPromptViT
from gated_prompt.vit.wrapping import unpatched_name


def tuned_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns the tuned parameters, and the buffers that belong to them, for example of a
    BatchNorm. The tensors are detached, not copied.

    Args:
        model: What `wrap` returned; the names are those of `model.tuned_parameters()`. Or a model
            with gated prompts from `attach`, also with other adapters (PEFT); the names are those
            of `state_dict()`, without the prefixes that torch.compile and other wrappers insert.

    Raises:
        TypeError: model has no gated prompts, or is parallel or compiled.
    """
    _check_any_model("tuned_state_dict", model)
    return {name: parameter.detach() for name, parameter in tuned_tensors(model).items()}


@torch.no_grad()
def load_tuned_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies `state`, from `tuned_state_dict`, into a model that was made in the same way.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape, because the model has
            another method, gate, number of prompts or classes. The model is not changed.
        TypeError: a value of state is not a tensor, or see `tuned_state_dict`.
    """
    _check_any_model("load_tuned_state_dict", model)
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
        is_whole = any("patch_embed." in name for name in state.keys() - targets.keys())
        is_whole = is_whole or any(isinstance(value, Mapping) for value in state.values())
        hint = "; gp.load_wrapped loads a whole state with the backbone" if is_whole else ""
        raise CheckpointError(
            f"load_tuned_state_dict: {'; '.join(problems[:5])}; the model has {_words(model)}{hint}"
        )
    for name, target in targets.items():
        target.copy_(state[name])


def _words(model: nn.Module) -> str:
    if not isinstance(model, GatedPromptViT):
        parts = [module for module in model.modules() if isinstance(module, GatedPrompts)]
        return ", ".join(f"num_prompts={part.num_prompts}" for part in parts)
    options = vars(model.options)
    own = ", ".join(f"{name}={options[name]!r}" for name in ("method", "gate", "num_prompts"))
    return f"{own} and {model.num_classes} classes"


def _check_any_model(who: str, model) -> None:
    is_inside = isinstance(model, nn.Module) and not isinstance(model, GatedPromptViT)
    is_inside = is_inside and not hasattr(model, "_orig_mod")
    is_inside = is_inside and not isinstance(model, nn.parallel.DistributedDataParallel)
    if not is_inside or not any(isinstance(m, GatedPrompts) for m in model.modules()):
        check_model(who, model)


def check_model(who: str, model) -> None:
    is_compiled = hasattr(model, "_orig_mod")
    if not is_compiled and isinstance(getattr(model, NAME, None), GatedPrompts):
        raise TypeError(
            f"{who}: model must be what wrap returned, got one with prompts from attach; save its "
            "state_dict() or tuned_state_dict(model); load_attached and load_tuned_state_dict load "
            "them"
        )
    if not isinstance(model, GatedPromptViT):
        raise TypeError(
            f"{who}: model must be what wrap returned (for a compiled or parallel model: its "
            f"._orig_mod or .module), got {type(model).__name__}"
        )
    model.require_wrapped(who)


def tuned_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors that `tuned_state_dict` saves.

    These are the tuned parameters, the buffers for which `_is_with_what_is_tuned` is True, and all
    parameters and buffers, frozen ones too, outside the backbone of a wrapped model, or in the
    `gated_prompts` of an attached one.
    """
    parts = [n for n, module in model.named_modules() if isinstance(module, GatedPrompts)]
    is_wrapped, tuned = isinstance(model, GatedPromptViT), {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, last = name.rpartition(".")
        is_inside = not is_wrapped and any(name.startswith(f"{part}.") for part in parts)
        if name.startswith("backbone.") if is_wrapped else not is_inside:
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
    while owner not in ("", "backbone"):
        flags = [parameter.requires_grad for parameter in model.get_submodule(owner).parameters()]
        if flags:
            return any(flags)
        owner = owner.rpartition(".")[0]
    return False
