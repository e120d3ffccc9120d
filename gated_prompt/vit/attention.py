# SPDX-License-Identifier: Apache-2.0
"""The temperatures of a ViT: how they get into timm's attention, and how they are folded into
frozen weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gated_prompt.autograd import no_autocast
from gated_prompt.ops import divide_rows, require_kernels
from gated_prompt.temperature import (
    TEMPERATURE_RANGE,
    clamp_straight_through,
    clamped,
    is_in_plain_aten,
    temperature_gradient,
    tempered,
)

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


class Tempering(nn.Module):
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
        vars(self).update(attn=None, temperatures=temperatures, index=index)
        self.norm = None
        self.follow(attn, temperatures)

    def with_temperature(self, function: Callable[[Tensor | float], Tensor]):
        """function(temperature)."""
        if isinstance(self.temperatures, float):
            return function(self.temperatures)
        return self.temperatures(self.index, function)

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

    def divided(self, q: Tensor) -> Tensor:
        return self.with_temperature(lambda temperature: tempered(q, temperature))

    def after_projection(self, module: nn.Module, args, out: Tensor) -> Tensor | None:
        if module is not _projection_to_hook(self.attn):
            return None  # the patched forward was removed; q_norm divides again
        if module is not self.attn.qkv:
            return self.divided(out)
        size = out.shape[-1] // 3
        return torch.cat([self.divided(out[..., :size]), out[..., size:]], dim=-1)

    def leave(self) -> None:
        """Puts the original q_norm back, with the hooks that others have put on this module. Does
        nothing if this module is not in place."""
        if self.attn is None or self.attn.q_norm is not self:
            return
        self.attn.q_norm = self.norm
        for module in self.attn.modules():
            hooks = module._forward_hooks
            for key in [key for key, hook in hooks.items() if hook == self.after_projection]:
                del hooks[key]
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


# ---- projection ----


def _folded(weight, bias, temperature, rows, dtype):
    """Returns weight and bias in dtype, with the first `rows` rows divided by the clamped
    temperature, and the clamped temperature. Each element is rounded once."""
    if not isinstance(temperature, Tensor) and temperature == 1:
        return weight.to(dtype), None if bias is None else bias.to(dtype), 1.0
    if _divide_rows_applies(weight, bias, temperature, dtype):
        low, high = TEMPERATURE_RANGE
        weight, new_bias, tau = divide_rows(weight, bias, temperature, rows, low, high, dtype)
        return weight, None if bias is None else new_bias, tau
    tau, results = clamped(temperature), []
    for tensor in (weight, bias):
        if tensor is not None:
            result = torch.empty_like(tensor, dtype=dtype)
            torch.div(tensor[:rows], tau, out=result[:rows])
            result[rows:].copy_(tensor[rows:])
        results.append(None if tensor is None else result)
    return *results, tau


def _divide_rows_applies(weight, bias, temperature, dtype) -> bool:
    """True if `divide_rows` supports these inputs. False for compilers, which fuse the aten ops."""
    if torch.compiler.is_compiling() or not isinstance(temperature, Tensor):
        return False
    is_known = dtype == weight.dtype or (weight.dtype == torch.float32 and dtype.itemsize == 2)
    if bias is not None:
        is_known = is_known and bias.dtype == weight.dtype and bias.is_contiguous()
    if not is_known or not weight.is_contiguous():
        return False
    require_kernels("FrozenProjection", weight.device)
    return True


class FrozenProjection(torch.autograd.Function):
    """x [B, N, C] -> `parts` tensors [B, N, H, d], views of one tensor; the first divided by tau.

    weight [parts*H*d, C] and bias are frozen, so the division is a pass over them, not over q.
    Neither x nor the divided weight is saved for backward. Backward multiplies the gradients of the
    parts with their weight rows one at a time; the backward of unbind would first stack them into
    one [B, N, parts*H*d] tensor.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, temperature, parts, head_dim):
        device, dtype = x.device.type, x.dtype
        if device != "meta" and dtype != torch.float64 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        folded, bias, tau = _folded(weight, bias, temperature, weight.shape[0] // parts, dtype)
        out = F.linear(x.to(dtype), folded, bias)  # the same cast as autocast's
        heads = weight.shape[0] // (parts * head_dim)
        outputs = out.view(*out.shape[:2], parts, heads, head_dim).unbind(2)
        is_learned = isinstance(temperature, Tensor)
        ctx.save_for_backward(weight, *((temperature, tau, outputs[0]) if is_learned else ()))
        ctx.tau = None if is_learned else tau
        ctx.x_dtype = x.dtype
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        weight, *saved = ctx.saved_tensors
        tau, grad_temperature, grad_x = ctx.tau, None, None
        if saved:
            temperature, tau, q = saved
            if torch.is_grad_enabled():  # backward itself is differentiated
                tau = clamp_straight_through(temperature)
            if ctx.needs_input_grad[3] and grads[0] is not None:
                grad_temperature = temperature_gradient(q, grads[0], tau, temperature)
        if ctx.needs_input_grad[0] and any(grad is not None for grad in grads):
            with no_autocast(weight.device.type):
                grad_x = _project_back(grads, weight, tau).to(ctx.x_dtype)
        return grad_x, None, None, grad_temperature, None, None


def _project_back(grads, weight, tau):
    """Sum over the parts of grad [B, N, H, d] @ the part's rows of weight; the rows of the first
    part are divided by tau."""
    rows, dtype = weight.shape[0] // len(grads), next(g.dtype for g in grads if g is not None)
    first, is_float = weight[:rows], isinstance(tau, float)
    if grads[0] is None or (is_float and tau == 1):
        pass
    elif is_float or torch.is_grad_enabled():
        first = first / tau
    elif weight.dtype == dtype:
        first = _folded(first, None, tau, rows, dtype)[0]
    else:  # all rows need a cast: divide and cast in one pass
        weight = _folded(weight, None, tau, rows, dtype)[0]
        first = weight[:rows]
    total = flat = None
    for index, grad in enumerate(grads):
        if grad is None:
            continue
        part = first if index == 0 else weight[index * rows : (index + 1) * rows]
        grad, part = grad.reshape(*grad.shape[:2], rows), part.to(dtype)
        if total is None:
            total = grad @ part
        elif is_in_plain_aten(grad):
            total = total + grad @ part
        else:
            flat = total.view(-1, total.shape[-1]) if flat is None else flat
            flat.addmm_(grad.reshape(-1, rows), part)
    return total
