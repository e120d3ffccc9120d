# SPDX-License-Identifier: Apache-2.0
"""The changes that `wrap` makes to a timm model, and how they are undone."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gated_prompt.hooks import is_untouched
from gated_prompt.prompting import MARK
from gated_prompt.tempering import Tempering, original_norm

METHODS_OF_TIMM = {  # methods that the wrapper restates, as they were when this was imported
    name: (getattr(VisionTransformer, name), getattr(Eva, name))
    for name in ("forward_head", "pool", "forward_features", "forward")
}
_CONTAINERS = (nn.Sequential.forward, nn.ModuleList.forward)


class Wrapping:
    """Changes a timm model for `wrap`, and records what to restore.

    It is an attribute of the timm model, so a model whose wrapper was lost, or a copy of a wrapped
    model, can be unwrapped too. It remembers parameters by module and name, because
    `load_state_dict(assign=True)` and others replace them.
    """

    def __init__(self, vit: nn.Module):
        self.wrapper = None  # a weak reference
        self.training = [(module, module.training) for module in vit.modules()]
        self.requires_grad = [(m, n, p, p.requires_grad) for m, n, p in _own_parameters(vit)]
        self.narrowed: list[tuple[nn.Module, str, Tensor]] = []  # originals, on the CPU
        self.temperings: list[Tempering | None] = []
        setattr(vit, MARK, self)
        vit.requires_grad_(False)
        for module in callable_parts(vit):
            module.forward = functools.partial(_forward_or_run, module)

    def __getstate__(self):
        return {**vars(self), "wrapper": None}

    def is_in_use(self, vit: nn.Module) -> bool:
        wrapper = None if self.wrapper is None else self.wrapper()
        return wrapper is not None and wrapper.backbone is vit

    def narrow(self, vit: nn.Module, dtype: torch.dtype) -> None:
        seen = set()
        for module, name, parameter in _own_parameters(vit):
            if not isinstance(module, (nn.Linear, nn.Conv2d)) or id(parameter) in seen:
                continue
            if parameter.is_meta:
                raise ValueError("wrap: frozen_dtype needs weights, and vit is on the meta device")
            if not parameter.requires_grad:
                seen.add(id(parameter))
                self.narrowed.append((module, name, parameter.data.cpu()))
                parameter.data = parameter.data.to(dtype)

    def originals(self) -> dict[int, Tensor]:
        """{id of a parameter: its value in its original dtype}, for all narrowed parameters."""
        found = {}
        for module, name, original in self.narrowed:
            for parameter in _parameters_now(module, name):
                now = parameter.data.cpu()
                is_old = torch.equal(original.to(now.dtype), now)  # False: new values were loaded
                found[id(parameter)] = original if is_old else now.to(original.dtype)
        return found

    def undo(self, vit: nn.Module) -> None:
        if self.is_in_use(vit):
            self.wrapper()._is_wrapped = False
        delattr(vit, MARK)
        for module in callable_parts(vit):
            if has_our_forward(module):
                del module.forward
        for tempering in self.temperings:
            if tempering is not None:
                tempering.leave()
        for module in [
            m for m in vit.modules() if isinstance(getattr(m, "q_norm", None), Tempering)
        ]:
            module.q_norm = original_norm(module.q_norm)  # of a copied attention
        originals = self.originals()
        for parameter in vit.parameters():
            if id(parameter) in originals:
                parameter.data = originals[id(parameter)].to(parameter.device)
        for module, name, parameter, requires_grad in self.requires_grad:
            for now in (parameter, *_parameters_now(module, name)):
                now.requires_grad_(requires_grad)
        for module, training in self.training:
            module.training = training


def is_wrapped(vit: nn.Module) -> bool:
    """True if a wrapper uses this timm model. A copy of a wrapped model is not in use."""
    wrapping = vars(vit).get(MARK)
    return wrapping is not None and wrapping.is_in_use(vit)


def originals_of(vit: nn.Module) -> dict[int, Tensor]:
    """{id of a parameter: its value in its original dtype}, for all that frozen_dtype narrowed."""
    return vars(vit)[MARK].originals() if MARK in vars(vit) else {}


def _own_parameters(model: nn.Module):
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter


def _parameters_now(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameter of this name, or the parameters into which pruning, weight norm or a
    parametrisation turned it."""
    own = module._parameters
    found = [own.get(name + end) for end in ("", "_orig", "_g", "_v")]
    if parametrize.is_parametrized(module, name):
        found += module.parametrizations[name].parameters(recurse=False)
    return [parameter for parameter in found if parameter is not None]


def callable_parts(vit: nn.Module) -> list[nn.Module]:
    """The timm model and its sequence of blocks. The wrapper does its work inside calls of these
    modules, so that their hooks run and tools that shard or offload their parameters work."""
    return [vit, *([vit.blocks] if isinstance(vit.blocks, nn.Sequential) else [])]


def _forward_or_run(module: nn.Module, x: Tensor, *args, run: Callable | None = None, **kwargs):
    """The forward of the instance while wrapped: run(x), or the class's forward without run."""
    return type(module).forward(module, x, *args, **kwargs) if run is None else run(x)


def has_our_forward(module: nn.Module) -> bool:
    return getattr(vars(module).get("forward"), "func", None) is _forward_or_run


def inside(module: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """run(x), inside a call of the module."""
    # _hf_hook: accelerate has replaced our forward by one that calls it
    if has_our_forward(module) or hasattr(module, "_hf_hook"):
        if torch.compiler.is_compiling():
            return module(x, run=run)
        calls = []
        out = module(x, run=lambda x: calls.append(x) or run(x))
        if not calls:
            raise RuntimeError(
                f"GatedPromptViT: a hook of {type(module).__name__} has dropped the argument "
                "`run`, which the wrapper needs; the hook must return all kwargs that it gets"
            )
        return out
    if not is_untouched(module):
        raise RuntimeError(
            f"GatedPromptViT: after wrap, the forward of {type(module).__name__} was replaced, or "
            "the module itself by one with hooks; unwrap, and wrap again"
        )
    return run(x)


_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unpatched_name(name: str) -> str:
    """A parameter's name without the parts that `wrap`, torch.compile, FSDP and checkpoint wrappers
    insert."""
    return _WRAPPERS.sub("", name).replace(".attn.q_norm.norm.", ".attn.q_norm.")


def patched_methods(vit: nn.Module) -> list[str]:
    """Names of the methods that the wrapper restates and that are not timm's on this model; and
    "blocks (type)", if the blocks are not a plain container."""
    found = [name for name in METHODS_OF_TIMM if name in vars(vit) and name != "forward"]
    found += [n for n, known in METHODS_OF_TIMM.items() if getattr(type(vit), n) not in known]
    is_container = isinstance(vit.blocks, (nn.Sequential, nn.ModuleList))
    is_plain = is_container and type(vit.blocks).forward in _CONTAINERS
    return found if is_plain else [*found, f"blocks ({type(vit.blocks).__name__})"]


def says_patched(owner: str, names: list[str]) -> str:
    return (
        f"{owner} (or its blocks) has its own {', '.join(names)}, which would not run, because "
        f"the wrapper replaces it; patch the modules inside {owner} instead; if accelerate has "
        "replaced it, call accelerate after wrap"
    )


def train_what_is_tuned(module: nn.Module, mode: bool) -> None:
    """Sets the mode of a backbone's modules. A module gets `mode` if all its parameters are tuned,
    or if it is an adapter: of a class that is neither torch's nor timm's, with a tuned parameter.
    A module without parameters gets the same as its parent. All others are in eval mode."""
    flags = [parameter.requires_grad for parameter in module.parameters()]
    is_foreign = not type(module).__module__.startswith(("torch.nn.modules.", "timm."))
    is_tuned = any(flags) and (is_foreign or all(flags))
    module.training = mode and is_tuned
    for child in module.children():
        if not any(flags) or next(child.parameters(), None) is None:
            child.train(mode and is_tuned)
        else:
            train_what_is_tuned(child, mode)
