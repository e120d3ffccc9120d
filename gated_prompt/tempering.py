# SPDX-License-Identifier: Apache-2.0
"""Temperatures, and how they get into the attention of a model that is not changed otherwise."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gated_prompt.hooks import remove_hooks
from gated_prompt.temperature import tempered

torch.fx.wrap("tempered")  # a symbolic trace records the call and does not trace into it


class Temperatures(nn.Module):
    """One learnable temperature [1] for each of `count` blocks, float32. The parameters are named
    "0", "1", ..."""

    def __init__(self, count: int, device: torch.device):
        super().__init__()
        for index in range(count):
            self.register_parameter(str(index), nn.Parameter(torch.ones(1, device=device)))

    def __len__(self) -> int:
        return len(self._parameters)

    def __getitem__(self, index: int) -> nn.Parameter:
        return list(self.parameters())[index]

    def forward(self, index: int, function: Callable[[Tensor], Tensor]) -> Tensor:
        """function(temperature `index`). This is a call of the module that owns the parameter,
        because tools that shard or offload parameters bring them in at such calls."""
        return function(getattr(self, str(index)))


def is_one(temperature: bool | float) -> bool:
    """True for the constant temperature 1, as 1.0 or as False; True means a learned one."""
    return temperature is not True and float(temperature or 1.0) == 1.0


class _Divides:
    """Divides queries by temperature `index` of `temperatures`, or by a constant."""

    temperatures: Temperatures | float
    index: int
    _used_in: set[int]  # the threads that have divided queries since `require_used`

    def with_temperature(self, function: Callable[[Tensor | float], Tensor]):
        """function(temperature)."""
        if not torch.compiler.is_compiling():
            self._used_in.add(threading.get_ident())
        if isinstance(self.temperatures, float):
            return function(self.temperatures)
        return self.temperatures(self.index, function)

    def divided(self, q: Tensor) -> Tensor:
        return self.with_temperature(lambda temperature: tempered(q, temperature))

    def divided_first_third(self, qkv: Tensor) -> Tensor:
        size = qkv.shape[-1] // 3
        return torch.cat([self.divided(qkv[..., :size]), qkv[..., size:]], dim=-1)

    def require_used(self, block: nn.Module) -> None:
        """Raises RuntimeError if no queries were divided since the last call. A block that is
        compiled can't tell."""
        if torch.compiler.is_compiling():
            return
        thread = threading.get_ident()
        if thread in self._used_in:
            self._used_in.discard(thread)
        elif not any(map(is_compiled, block.modules())):
            raise RuntimeError(
                f"the attention of block {self.index} has not divided its queries by the "
                "temperature, because it does not call the module that divides them (or it was "
                "patched); use temperature=False"
            )


def is_compiled(module: nn.Module) -> bool:
    """True if torch.compile, or module.compile(), has compiled the module."""
    return hasattr(module, "_orig_mod") or vars(module).get("_compiled_call_impl") is not None


class Tempering(_Divides, nn.Module):
    """Divides the queries of a block's attention by a temperature, where timm's code computes them.

    This module replaces `attn.q_norm`, which all of timm's attentions call, and calls the original.
    (A hook would work in eager mode. But torch.compile does not check whether a module that it has
    compiled got hooks; it does notice a replaced module.) If the attention instance has its own
    forward, that forward might not call q_norm; then a hook on the projection divides instead.

    Attributes:
        norm: The original q_norm.
    """

    def __init__(self, attn: nn.Module, temperatures: Temperatures | float, index: int):
        super().__init__()
        # not setattr, which would register the modules as children of this one
        vars(self).update(attn=None, temperatures=temperatures, index=index, _used_in=set())
        self.norm = None
        self.follow(attn, temperatures)

    def follow(self, attn: nn.Module | None, temperatures: Temperatures | float) -> None:
        """Moves to the attention that computes the block's queries now: modules may have been
        replaced, and two blocks may share one attention."""
        if not hasattr(attn, "q_norm"):
            raise RuntimeError(
                f"GatedPromptViT: for its temperature, block {self.index} must have an `attn` with "
                f"a `q_norm`, as timm's blocks have, got {type(attn).__name__}; give the module "
                "that replaces the block this `attn`, or wrap with temperature=False"
            )
        projection = _projection_to_hook(attn)
        is_there = attn is self.attn and attn.q_norm is self
        is_there = is_there and temperatures is self.temperatures
        is_there = is_there and (projection is None or self._hooks(projection))
        if is_there:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"GatedPromptViT: the attention of block {self.index} was replaced or patched "
                "since the last call; call the model once without torch.compile, which moves the "
                "temperature to the new attention"
            )
        vars(self)["temperatures"] = temperatures
        if attn.q_norm is not self:
            self.leave()
            self.norm = original_norm(attn.q_norm)
            attn.q_norm = self
        vars(self)["attn"] = attn
        if projection is not None and not self._hooks(projection):
            projection.register_forward_hook(self.after_projection)

    def _hooks(self, projection: nn.Module) -> bool:
        return self.after_projection in projection._forward_hooks.values()

    def forward(self, q: Tensor) -> Tensor:
        q = self.norm(q)
        return q if _projection_to_hook(self.attn) is not None else self.divided(q)

    def after_projection(self, module: nn.Module, args, out: Tensor) -> Tensor | None:
        if module is not _projection_to_hook(self.attn):
            return None  # the patched forward was removed; q_norm divides again
        return self.divided_first_third(out) if module is self.attn.qkv else self.divided(out)

    def leave(self) -> None:
        """Puts the original q_norm back, with the hooks that others have put on this module. Does
        nothing if this module is not in place."""
        if self.attn is None or self.attn.q_norm is not self:
            return
        self.attn.q_norm = self.norm
        for module in self.attn.modules():
            remove_hooks(module, lambda hook: hook == self.after_projection)
        for kind in _HOOKS:
            getattr(self.norm, kind).update(getattr(self, kind))
            getattr(self, kind).clear()


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks",
)  # fmt: skip


def original_norm(norm: nn.Module) -> nn.Module:
    """The q_norm inside any Temperings. A copied attention has a copied Tempering as its q_norm."""
    while isinstance(norm, Tempering):
        norm = norm.norm
    return norm


def _projection_to_hook(attn: nn.Module) -> nn.Module | None:
    """The module that projects the queries, if the attention instance has its own forward, which
    need not call an Identity q_norm. None if q_norm divides, or if the biases are separate."""
    if "forward" not in vars(attn) or not isinstance(original_norm(attn.q_norm), nn.Identity):
        return None
    if attn.qkv is None:
        return attn.q_proj
    # with separate biases, timm's EvaAttention may read qkv.weight instead of calling qkv
    return attn.qkv if getattr(attn, "q_bias", None) is None else None


# ---- attention that is not timm's ----


class QueryDivision(_Divides):
    """Divides the queries of a block by a temperature: by a hook on the nn.Linear that projects the
    queries, or by a forward on the instance of nn.MultiheadAttention.

    Attributes:
        path: The name of this module in the block.
    """

    def __init__(self, block: nn.Module, path: str, temperatures: Temperatures | float, index: int):
        self.path, self.temperatures, self.index, self._used_in = path, temperatures, index, set()
        self.follow(block)

    def follow(self, block: nn.Module) -> None:
        """Moves to the module that has the name `path` now; adapters replace modules."""
        module = block.get_submodule(self.path)
        if self._is_on(module):
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"attach: {self.path!r} of block {self.index} was replaced since the last call; "
                "call the model once without torch.compile, which moves the temperature to it"
            )
        self.leave(block)
        if isinstance(module, nn.MultiheadAttention):
            if "forward" in vars(module):
                raise RuntimeError(
                    f"attach: the forward of {self.path!r} in block {self.index} was replaced, "
                    "which a temperature replaces too; attach before, or use temperature=False"
                )
            module.forward = functools.partial(_forward_of_multihead, module, self)
        else:
            module.register_forward_hook(self.after_projection)

    def leave(self, block: nn.Module) -> None:
        """Removes the hooks and the forward that this object has set in the block."""
        for module in block.modules():
            remove_hooks(module, self._owns)
            if _forward_of(module, self):
                remove_forward(module)

    def _is_on(self, module: nn.Module) -> bool:
        return _forward_of(module, self) or any(map(self._owns, module._forward_hooks.values()))

    def _owns(self, hook) -> bool:
        return getattr(hook, "__self__", None) is self

    def after_projection(self, module: nn.Module, args, out: Tensor) -> Tensor:
        sizes = [t.shape[-1] if isinstance(t, Tensor) else 0 for t in (args[0], out)]
        if 0 in sizes or sizes[1] not in (sizes[0], 3 * sizes[0]):
            raise ValueError(
                f"attach: {self.path!r} of block {self.index} must map D to D (queries) or 3 D "
                f"(queries, keys and values), got {sizes[0]} to {sizes[1]}; use temperature=False"
            )
        return self.divided(out) if sizes[0] == sizes[1] else self.divided_first_third(out)


_FORWARDS = ("forward", "_old_forward")  # accelerate moves a forward to the second name


def _forward_of(module: nn.Module, division: QueryDivision) -> bool:
    own = [vars(module).get(name) for name in _FORWARDS]
    own = [f for f in own if getattr(f, "func", None) is _forward_of_multihead]
    return any(forward.args[1] is division for forward in own)


def remove_forward(module: nn.Module) -> None:
    """Removes the forward that `QueryDivision` has set on a module, if there is one."""
    for name in _FORWARDS:
        own = vars(module).get(name)
        if getattr(own, "func", None) is _forward_of_multihead:
            if name == "forward":
                del module.forward
            else:  # below a hook of accelerate
                setattr(module, name, functools.partial(type(module).forward, module))


def _forward_of_multihead(
    mha: nn.MultiheadAttention,
    division: QueryDivision,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    """The self-attention of nn.MultiheadAttention, with divided queries."""
    is_plain = key_padding_mask is None and attn_mask is None and not is_causal
    if not is_plain or need_weights or query is not key or key is not value or query.dim() != 3:
        raise RuntimeError(
            "attach: with a temperature, nn.MultiheadAttention must be called as self-attention "
            "attn(x, x, x, need_weights=False) on a batch, without masks; change the call, or use "
            "temperature=False"
        )
    x = query if mha.batch_first else query.transpose(0, 1)
    qkv = F.linear(x, mha.in_proj_weight, mha.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, mha.num_heads, mha.head_dim)).unbind(2)  # [B, N, H, d]
    q, k, v = (t.transpose(1, 2) for t in (division.divided(q), k, v))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=mha.dropout if mha.training else 0.0)
    out = mha.out_proj(out.transpose(1, 2).flatten(2))
    return (out if mha.batch_first else out.transpose(0, 1)), None
