# SPDX-License-Identifier: Apache-2.0
"""Attention with a learnable temperature, also folded into frozen weights; all that imports
xformers."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gated_prompt.functional import is_traced
from gated_prompt.ops import divide_rows, no_autocast, ranged, require_kernels, scaled_dot

BACKENDS = ("auto", "sdpa", "xformers", "math")
TEMPERATURE_RANGE = (0.01, 10.0)
_log = logging.getLogger(__name__)
torch.fx.wrap("tempered")  # a symbolic trace keeps calls of it as they are


def tempered_attention(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | float, backend: str = "auto"
) -> Tensor:
    """Self-attention with a temperature: softmax(q k^T * d^-0.5 / tau) v, tau = clamp(temperature).

    q is divided by tau, so any attention kernel serves unchanged. tau is clamped to [0.01, 10] with
    a straight-through gradient; the value stored in `temperature` is not changed, and never read by
    the host.

    Args:
        q, k, v: [B, N, H, d], one floating dtype. Not [B, H, N, d], as torch's own attention has
            it, which can't be told from it: use transpose(1, 2) first.
        temperature: A tensor of one element, or a float. May be float32 beside bfloat16 q.
        backend: "sdpa" (torch's scaled_dot_product_attention), "xformers"
            (memory_efficient_attention, CUDA only), "math" (explicit softmax, for checks), "auto"
            (xformers on CUDA where it supports dtype and head size, else sdpa; the logger
            `gated_prompt.attention` says once at level INFO which it took, and why; a compiled
            model takes sdpa).

    Returns:
        [B, N, H, d]. Gradients flow to q, k, v and temperature. That of temperature is
        -1/tau * sum(q' * dq'), over the divided q' and its gradient, summed in float32 (float64) in
        a fixed order.

    Raises:
        ValueError: unknown backend; a temperature of more than one element.
        RuntimeError: an explicit backend can't run here; there is no silent replacement.

    Source: Yoo et al., ICML 2023, arXiv 2306.05067, section 3.3.
    """
    if backend not in BACKENDS:
        raise ValueError(f"tempered_attention: backend must be one of {BACKENDS}, got {backend!r}")
    shapes, dtypes = [list(t.shape) for t in (q, k, v)], {t.dtype for t in (q, k, v)}
    if q.dim() != 4 or shapes[0] != shapes[1] or shapes[1] != shapes[2]:
        raise ValueError(
            f"tempered_attention: q, k and v must be [B, N, H, d] of one shape, got {shapes}"
        )
    if len(dtypes) > 1:
        raise TypeError(f"tempered_attention: q, k and v must have one dtype, got {dtypes}")
    if not isinstance(temperature, (Tensor, float, int)):
        raise TypeError(
            "tempered_attention: temperature must be a tensor or a float, "
            f"got {type(temperature).__name__}"
        )
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        raise ValueError(
            "tempered_attention: temperature must have one element or be a float, "
            f"got {list(temperature.shape)}"
        )
    return attend(tempered(q, temperature), k, v, backend)


# ---- temperature ----


def clamped(temperature: Tensor | float) -> Tensor | float:
    """[] or a float, within TEMPERATURE_RANGE."""
    if isinstance(temperature, Tensor):
        # [1] would widen the dtype of q / tau. Literals: torch.compile(dynamic=True) would make
        # symbols of a global's floats, which autograd Functions can't take.
        return temperature.reshape(()).clamp(0.01, 10.0)
    low, high = TEMPERATURE_RANGE
    return min(max(temperature, low), high)


def clamp_straight_through(temperature: Tensor) -> Tensor:
    """`clamped`, with a gradient as if there were no clamp."""
    # not t + (clamp(t) - t), which cancels: -1 in bfloat16 would become 0.0078
    return clamped(temperature).detach() + (temperature - temperature.detach()).reshape(())


def tempered(q: Tensor, temperature: Tensor | float) -> Tensor:
    """q / clamp(temperature)."""
    if not isinstance(temperature, Tensor):
        return q if temperature == 1 else q / clamped(temperature)
    if is_transformed(q, temperature):
        return q / clamp_straight_through(temperature)
    return _TemperedQuery.apply(q, temperature)


def _differentiable(temperature: Tensor) -> Tensor:
    """The clamped temperature, for a backward; with a graph only where one is asked for."""
    grads = torch.is_grad_enabled()
    return clamp_straight_through(temperature) if grads else clamped(temperature)


def is_transformed(*tensors: Tensor) -> bool:
    """Whether something looks on that our autograd Functions can't serve; torch.compile they can:
    it then keeps a third of a [B, N, D] less per block than for a q that is divided itself."""
    return is_traced(*tensors) and not torch.compiler.is_dynamo_compiling()


def _in_plain_aten(grad: Tensor) -> bool:
    """Whether a backward is traced, differentiated, or mapped by vmap."""
    return (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._functorch.is_legacy_batchedtensor(grad)
    )


def _temperature_gradient(q: Tensor, grad: Tensor, tau: Tensor, temperature: Tensor) -> Tensor:
    """-1/tau * sum(q * grad), q already divided by tau, in the shape of temperature: one read of
    both, no copy of either."""
    if _in_plain_aten(grad):
        dtype = torch.promote_types(q.dtype, torch.float32)
        gradient = (-(q.to(dtype) * grad.to(dtype)).sum() / tau).to(tau.dtype)
        return gradient.reshape(temperature.shape)
    return scaled_dot(q, grad, tau.view(temperature.shape))


class _TemperedQuery(torch.autograd.Function):
    """q / clamp(tau), of which nothing but the result is saved, and that by attention anyway."""

    @staticmethod
    def forward(ctx, q, temperature):
        out = q / clamped(temperature)
        ctx.save_for_backward(out, temperature)
        return out

    @staticmethod
    def backward(ctx, grad):
        out, temperature = ctx.saved_tensors
        tau = _differentiable(temperature)
        need_q, need_temperature = ctx.needs_input_grad
        return (
            grad / tau if need_q else None,
            _temperature_gradient(out, grad, tau, temperature) if need_temperature else None,
        )


class Temperatures(nn.Module):
    """One learnable temperature [1] for each of `count` blocks, float32; "0", "1", ... are their
    names."""

    def __init__(self, count: int, device: torch.device):
        super().__init__()
        for index in range(count):
            self.register_parameter(str(index), nn.Parameter(torch.ones(1, device=device)))

    def __len__(self) -> int:
        return len(self._parameters)

    def __getitem__(self, index: int) -> nn.Parameter:
        return list(self.parameters())[index]

    def forward(self, index: int, function: Callable[[Tensor], Tensor]) -> Tensor:
        """function(temperature `index`). A call of the module that has it: what shards or offloads
        parameters brings them in at such calls."""
        return function(getattr(self, str(index)))


class Tempering(nn.Module):
    """Divides the queries of a block's attention by a temperature, where timm's code makes them.

    It takes the place of `attn.q_norm`, which all of timm's attentions call, and calls it. (A hook
    would do in eager mode; torch.compile does not look whether a module that it has compiled has
    hooks, but it sees another module.) A forward that somebody has put on the instance of the
    attention may leave q_norm out; there the projection is hooked.

    Attributes:
        norm: The q_norm whose place it has.
    """

    def __init__(self, attn: nn.Module, temperatures: Temperatures | float, index: int):
        super().__init__()
        # no children of this module
        vars(self).update(attn=None, temperatures=temperatures, index=index)
        self.norm = None
        self.follow(attn, temperatures)

    def with_temperature(self, function: Callable[[Tensor | float], Tensor]):
        """function(temperature)."""
        if isinstance(self.temperatures, float):
            return function(self.temperatures)
        return self.temperatures(self.index, function)

    def follow(self, attn: nn.Module | None, temperatures: Temperatures | float) -> None:
        """Goes where the queries of the block are made now: modules may have been replaced, and one
        attention may serve two blocks."""
        if not hasattr(attn, "q_norm"):
            raise RuntimeError(
                f"GatedPromptViT: block {self.index} must have an `attn` with a `q_norm`, as "
                f"timm's have, for its temperature, got {type(attn).__name__}; put `attn` on what "
                "replaces the block, or wrap with temperature=False"
            )
        projection = _calls_projection_alone(attn)
        is_there = attn is self.attn and attn.q_norm is self
        is_there = is_there and temperatures is self.temperatures
        is_there = is_there and (projection is None or self._hooks(projection))
        if is_there:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"GatedPromptViT: the attention of block {self.index} was changed since it ran "
                "last; run the model once without torch.compile, so that its temperature follows"
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
        return q if _calls_projection_alone(self.attn) is not None else self.divided(q)

    def divided(self, q: Tensor) -> Tensor:
        return self.with_temperature(lambda temperature: tempered(q, temperature))

    def after_projection(self, module: nn.Module, args, out: Tensor) -> Tensor | None:
        if module is not _calls_projection_alone(self.attn):
            return None  # what called it alone was taken off
        if module is not self.attn.qkv:
            return self.divided(out)
        size = out.shape[-1] // 3
        return torch.cat([self.divided(out[..., :size]), out[..., size:]], dim=-1)

    def leave(self) -> None:
        """Gives its place back, if it has one, with the hooks that others have put on it."""
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
    """A q_norm without temperings, such as a copy of an attention brings along."""
    while isinstance(norm, Tempering):
        norm = norm.norm
    return norm


def _calls_projection_alone(attn: nn.Module) -> nn.Module | None:
    """What projects queries, if the attention may not call q_norm, and need not: its forward is the
    instance's own."""
    if "forward" not in vars(attn) or not isinstance(original_norm(attn.q_norm), nn.Identity):
        return None
    if attn.qkv is None:
        return attn.q_proj
    # with biases of its own, timm's Eva does not call qkv but reads its weight
    return attn.qkv if getattr(attn, "q_bias", None) is None else None


# ---- projection ----


def _folded(weight, bias, temperature, rows, dtype):
    """weight and bias in dtype, their first `rows` rows divided by the clamped temperature, and
    that; each element is rounded once."""
    if not isinstance(temperature, Tensor) and temperature == 1:
        return weight.to(dtype), None if bias is None else bias.to(dtype), 1.0
    if _has_kernel(weight, bias, temperature, dtype):
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


def _has_kernel(weight, bias, temperature, dtype) -> bool:
    """Whether `divide_rows` serves; compilers fuse the same in aten."""
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
    """x [B, N, C] -> `parts` tensors [B, N, H, d], views of one; the first divided by tau.

    weight [parts*H*d, C] and bias are frozen, and the temperature costs a pass over them, not over
    q. x is not saved, nor the divided weight. In backward each part's gradient meets its rows of
    the weight where it lies: unbind's backward would stack the three first.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, temperature, parts, head_dim):
        device, dtype = x.device.type, x.dtype
        if device != "meta" and dtype != torch.float64 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        folded, bias, tau = _folded(weight, bias, temperature, weight.shape[0] // parts, dtype)
        out = F.linear(x.to(dtype), folded, bias)  # autocast, too, would cast to dtype
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
            if torch.is_grad_enabled():  # a graph for second derivatives
                tau = clamp_straight_through(temperature)
            if ctx.needs_input_grad[3] and grads[0] is not None:
                grad_temperature = _temperature_gradient(q, grads[0], tau, temperature)
        if ctx.needs_input_grad[0] and any(grad is not None for grad in grads):
            with no_autocast(weight.device.type):
                grad_x = _project_back(grads, weight, tau).to(ctx.x_dtype)
        return grad_x, None, None, grad_temperature, None, None


def _project_back(grads, weight, tau):
    """sum over the parts of grad [B, N, H, d] @ rows of weight, the first ones divided by tau."""
    rows, dtype = weight.shape[0] // len(grads), next(g.dtype for g in grads if g is not None)
    first, is_float = weight[:rows], isinstance(tau, float)
    if grads[0] is None or (is_float and tau == 1):
        pass
    elif is_float or torch.is_grad_enabled():
        first = first / tau
    elif weight.dtype == dtype:
        first = _folded(first, None, tau, rows, dtype)[0]
    else:  # all rows are to be cast: at once
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
        elif _in_plain_aten(grad):
            total = total + grad @ part
        else:
            flat = total.view(-1, total.shape[-1]) if flat is None else flat
            flat.addmm_(grad.reshape(-1, rows), part)
    return total


# ---- backends ----


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """softmax(q k^T * d^-0.5) v: q [B, M, H, d], k and v [B, N, H, d] -> [B, M, H, d]."""
    if backend == "auto":
        backend = "sdpa" if is_traced(q, k, v) or not _takes_xformers(q) else "xformers"
    return _KERNELS[backend](q, k, v)


def _sdpa(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _math(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2)


def unavailable_reason(backend: str) -> str | None:
    """Why `backend` can't run on this machine, or None if it can."""
    if backend != "xformers":
        return None
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install 'gated-prompt[vit]')"
    if not torch.cuda.is_available():
        return "xformers needs a CUDA GPU and torch sees none"
    # it imports without its C++ library, too: so try what each of its builds takes
    return _xformers_failure(torch.float16, 64, torch.device("cuda"), False)


def _takes_xformers(q: Tensor) -> bool:
    return _why_not_xformers(q.dtype, q.shape[-1], q.device, q.requires_grad) is None


@functools.cache
def _why_not_xformers(dtype, head_dim, device, needs_grad) -> str | None:
    """None if it runs, else why not; asked once for each kind of input, and logged."""
    reason = unavailable_reason("xformers") if device.type == "cuda" else f"q is on {device}"
    reason = reason or _xformers_failure(dtype, head_dim, device, needs_grad)
    taken = "xformers" if reason is None else "sdpa"
    _log.info(
        "attention='auto' takes %s for %s, head size %d: %s",
        taken, dtype, head_dim, reason or f"xformers supports these inputs on {device}",
    )  # fmt: skip
    return reason


@functools.cache
def _xformers_failure(dtype, head_dim, device, needs_grad) -> str | None:
    """What xformers raises on a sample of such inputs, or None."""
    try:
        from xformers.ops import memory_efficient_attention

        sample = torch.zeros(1, 8, 3, 2, head_dim, dtype=dtype, device=device)
        sample.requires_grad_(needs_grad)  # packed as ours are: strides decide, too
        with torch.enable_grad():
            memory_efficient_attention(*sample.unbind(2))
    except Exception as error:  # a broken install, or an unknown dtype, raises anything
        return f"xformers refuses {dtype}, head size {head_dim}: {type(error).__name__}: {error}"
    return None


def _xformers_attention(q, k, v):
    cause, reason = None, f"q is on {q.device}"
    if q.is_cuda:
        try:
            from xformers.ops import memory_efficient_attention

            return memory_efficient_attention(q, k, v)
        except torch.cuda.OutOfMemoryError:  # says nothing of what is supported
            raise
        except Exception as error:
            cause = error
            reason = unavailable_reason("xformers") or f"{type(error).__name__}: {error}"
    raise RuntimeError(f"tempered_attention: backend='xformers' can't run: {reason}") from cause


_KERNELS = {
    "sdpa": ranged("attention sdpa", _sdpa),
    "xformers": ranged("attention xformers", _xformers_attention),
    "math": ranged("attention math", _math),
}
