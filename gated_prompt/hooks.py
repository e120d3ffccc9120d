# SPDX-License-Identifier: Apache-2.0
"""Can other code see, keep or change what a module returns?"""

from __future__ import annotations

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
    """True if a hook or a forward was set by this package."""
    owner = getattr(hook, "__self__", None)
    module = getattr(hook, "__module__", None) if owner is None else type(owner).__module__
    return (module or "").startswith("gated_prompt.")


def is_observed(x) -> bool:
    """True if torch reports every module call to someone: global hooks, torch.jit or torch.fx
    tracing."""
    return bool(isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or any(global_hooks))
