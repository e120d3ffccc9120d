# SPDX-License-Identifier: Apache-2.0
"""Names of torch that torch does not promise, and what is done where one of them is missing.

Nothing else in the package imports a private name of torch. A later torch may lack one: then the
slower way is taken that is right in any case, and no import fails. tests/test_torch_private.py
deletes them one by one. Attributes that all of torch is built on are used as they are:
Tensor._is_view and _base; of Module, its dictionaries of parameters, buffers, modules and hooks.
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


# path below torch: what stands for it where it is missing
NAMES = {
    # whether a function transform is at work. Missing: yes, so the gate is computed by aten
    "_C._functorch.peek_interpreter_stack": lambda: True,
    # whether torch.autograd.grad(is_grads_batched=True) maps a backward. Missing: no, and torch
    # raises where the kernel's op can't be mapped
    "_C._functorch.is_legacy_batchedtensor": lambda tensor: False,
    # how many Python modes see each op. Missing: one, so gradients are copied
    "_C._len_torch_dispatch_stack": lambda: 1,
    # uses of a storage and of a tensor. Missing: nobody knows, so gradients are copied
    "_C._storage_Use_Count": None,
    "_C._storage_address": None,
    "Tensor._use_count": None,
    # how a view was made. Missing: not asked, and torch raises its own error, after the write
    "_C._autograd._get_creation_meta": None,
    "_C._autograd.CreationMeta": None,
    # hooks of all modules. Missing: there may be some, so the plain path is taken
    "nn.modules.module._global_forward_hooks": True,
    "nn.modules.module._global_forward_pre_hooks": True,
    "nn.modules.module._global_backward_hooks": True,
    "nn.modules.module._global_backward_pre_hooks": True,
}
_found = {path.rpartition(".")[2]: _find(path, missing) for path, missing in NAMES.items()}

interpreter_stack = _found["peek_interpreter_stack"]
is_mapped = _found["is_legacy_batchedtensor"]
dispatch_modes = _found["_len_torch_dispatch_stack"]
storage_uses, storage_address = _found["_storage_Use_Count"], _found["_storage_address"]
tensor_uses = _found["_use_count"]
creation_meta, CreationMeta = _found["_get_creation_meta"], _found["CreationMeta"]
global_hooks = [hooks for name, hooks in _found.items() if name.startswith("_global_")]


# Called, at least 0 in forward-mode AD. Missing: 0, so the gate is computed by aten.
forward_ad_level = functools.partial(getattr, torch.autograd.forward_ad, "_current_level", 0)


def compiles_autograd() -> bool:
    """Whether compiled autograd is on. Missing: no."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return bool(getattr(module, "compiled_autograd_enabled", False))
