# SPDX-License-Identifier: Apache-2.0
"""The private names of torch that this package uses, each with a fallback.

No other file of the package imports a private name of torch. If a later torch lacks one of them,
the package takes a slower path that is always correct, and no import fails.
tests/test_torch_private.py deletes the names one by one. A few private attributes have no fallback,
since all of torch relies on them: Tensor._is_view and _base, the dictionaries of parameters,
buffers, modules and hooks of Module, and its _compiled_call_impl.
"""

import functools
import sys

import torch


def _find(path, missing):
    found = torch
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return missing
    return found


# path below torch: the value that replaces a missing name
NAMES = {
    # not None if a function transform is active. Missing: assume so; the gate runs as ATen ops
    "_C._functorch.peek_interpreter_stack": lambda: True,
    # True if torch.autograd.grad(is_grads_batched=True) maps the backward. Missing: assume not;
    # torch then raises an error, since it can't map the kernel's op
    "_C._functorch.is_legacy_batchedtensor": lambda tensor: False,
    # the number of the backward that runs, or -1. Missing: assume that one runs; attach then does
    # not check the order of the blocks
    "_C._current_graph_task_id": lambda: 0,
    # the number of Python modes that see each op. Missing: assume one; gradients are copied
    "_C._len_torch_dispatch_stack": lambda: 1,
    # the use counts of a storage and of a tensor. Missing: gradients are copied
    "_C._storage_Use_Count": None,
    "_C._storage_address": None,
    "Tensor._use_count": None,
    # how a view was made. Missing: no check before the write; torch raises its error after it
    "_C._autograd._get_creation_meta": None,
    "_C._autograd.CreationMeta": None,
    # the hooks that apply to all modules. Missing: assume there are some; the plain path is taken
    "nn.modules.module._global_forward_hooks": True,
    "nn.modules.module._global_forward_pre_hooks": True,
    "nn.modules.module._global_backward_hooks": True,
    "nn.modules.module._global_backward_pre_hooks": True,
}
_found = {path.rpartition(".")[2]: _find(path, missing) for path, missing in NAMES.items()}

interpreter_stack = _found["peek_interpreter_stack"]
is_mapped = _found["is_legacy_batchedtensor"]
backward_id = _found["_current_graph_task_id"]
dispatch_modes = _found["_len_torch_dispatch_stack"]
storage_uses, storage_address = _found["_storage_Use_Count"], _found["_storage_address"]
tensor_uses = _found["_use_count"]
creation_meta, CreationMeta = _found["_get_creation_meta"], _found["CreationMeta"]
global_hooks = [hooks for name, hooks in _found.items() if name.startswith("_global_")]


# A function; it returns 0 or more in forward-mode AD. Missing: 0, so the gate runs as ATen ops.
forward_ad_level = functools.partial(getattr, torch.autograd.forward_ad, "_current_level", 0)


def compiles_autograd() -> bool:
    """True if compiled autograd is on. Missing: assume it is off."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return bool(getattr(module, "compiled_autograd_enabled", False))
