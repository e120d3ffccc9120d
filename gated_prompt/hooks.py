# SPDX-License-Identifier: Apache-2.0
"""Hooks of modules: can other code see, keep or change what a module returns? And their removal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gated_prompt.torch_private import global_hooks


def is_untouched(module: nn.Module) -> bool:
    """True if a call of the module runs only its class's forward: no hooks except ours, no forward
    on the instance, not compiled."""
    own = vars(module)
    return not (
        own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own
        or own.get("_compiled_call_impl") is not None
        or (own["_forward_pre_hooks"] and not all(map(is_ours, own["_forward_pre_hooks"].values())))
        or (own["_forward_hooks"] and not all(map(is_ours, own["_forward_hooks"].values())))
    )


def is_ours(hook) -> bool:
    """True if a hook was set by this package: our hooks are bound methods."""
    return type(getattr(hook, "__self__", None)).__module__.startswith("gated_prompt.")


def remove_hooks(module: nn.Module, is_mine: Callable[[Callable], bool]) -> None:
    """Removes the forward hooks and pre-hooks of a module for which is_mine(hook) is True."""
    for hooks, *kinds in (
        (
            module._forward_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called,
        ),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if is_mine(hook)]:
            for each in (hooks, *kinds):
                each.pop(key, None)


def is_observed(x) -> bool:
    """True if torch reports every module call to someone: global hooks, torch.jit or torch.fx
    tracing."""
    return bool(isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or any(global_hooks))
