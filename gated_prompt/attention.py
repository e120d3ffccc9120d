# SPDX-License-Identifier: Apache-2.0
"""Attention with a learnable temperature, folded into frozen weights; all that imports xformers."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gated_prompt.functional import is_traced
from gated_prompt.ops import divide_rows, no_autocast, ranged, require_kernels, scaled_dot

BACKENDS = ("auto", "sdpa", "xformers", "math")
TEMPERATURE_RANGE = (0.01, 10.0)
_log = logging.getLogger(__name__)


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
    if _is_transformed(q, temperature):
        return q / clamp_straight_through(temperature)
    return _TemperedQuery.apply(q, temperature)


def _differentiable(temperature: Tensor) -> Tensor:
    """The clamped temperature, for a backward; with a graph only where one is asked for."""
    grads = torch.is_grad_enabled()
    return clamp_straight_through(temperature) if grads else clamped(temperature)


def _is_transformed(*tensors: Tensor) -> bool:
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
    require_kernels("TemperedAttention", weight.device)
    return True


class _FrozenProjection(torch.autograd.Function):
    """x [B, N, C] -> `parts` tensors [B, N, H, d], views of one; the first divided by tau.

    weight [parts*H*d, C] and bias are frozen, and the temperature costs a pass over them, not over
    q. x is not saved, nor the divided weight. In backward each part's gradient meets its rows of
    the weight where it lies: unbind's backward would stack the three first. learned [B, P, C]: a
    copy of the rows of x from `start` on, which gets their gradient in place of x, which then gets
    none. Else None.
    """

    @staticmethod
    def forward(ctx, x, learned, weight, bias, temperature, start, parts, head_dim):
        device, dtype = x.device.type, x.dtype
        if device != "meta" and dtype != torch.float64 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        folded, bias, tau = _folded(weight, bias, temperature, weight.shape[0] // parts, dtype)
        out = F.linear(x.to(dtype), folded, bias)  # autocast, too, would cast to dtype
        outputs = out.view(*out.shape[:2], parts, -1, head_dim).unbind(2)
        is_learned = isinstance(temperature, Tensor)
        ctx.save_for_backward(weight, *((temperature, tau, outputs[0]) if is_learned else ()))
        ctx.tau = None if is_learned else tau
        ctx.rows = None if learned is None else slice(start, start + learned.shape[1])
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
            if ctx.needs_input_grad[4] and grads[0] is not None:
                grad_temperature = _temperature_gradient(q, grads[0], tau, temperature)
        if ctx.rows is not None:
            grads = [None if grad is None else grad[:, ctx.rows] for grad in grads]
        if any(ctx.needs_input_grad[:2]) and any(grad is not None for grad in grads):
            with no_autocast(weight.device.type):
                grad_x = _project_back(grads, weight, tau).to(ctx.x_dtype)
        of_x = (grad_x, None) if ctx.rows is None else (None, grad_x)
        return *of_x, None, None, grad_temperature, None, None, None


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


# ---- timm's attention ----


class TemperedAttention(nn.Module):
    """A timm attention whose softmax has a temperature; takes its place in a block, and can give
    it back.

    Attributes:
        attn: The timm module, unchanged; its weights are used, its forward is not.
        temperature: A learnable float32 parameter [1], or a constant float.
    """

    def __init__(self, attn: nn.Module, temperature: float, learnable: bool, backend: str):
        super().__init__()
        check_attention(attn)
        self.attn = attn
        self.backend = backend
        self.temperature = (
            nn.Parameter(torch.tensor([float(temperature)], device=attn.proj.weight.device))
            if learnable
            else float(temperature)
        )

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rows: slice | None = None,
        learned: tuple[Tensor, int] | None = None,
    ) -> Tensor:
        """x [B, N, C] -> [B, N, C].

        Args:
            rope: timm's rotary embedding of the tokens after the prefix, [..., N', 2d].
            rows: The result of these tokens alone, which attend to all.
            learned: A copy of some rows of x, [B, P, C], and where they start: these are all of x
                that is learned, and get the gradient. Only where `takes_learned_rows`.
        """
        if attn_mask is not None or is_causal:
            raise NotImplementedError("TemperedAttention: attention masks are not supported")
        attn = self.attn
        if attn.training and attn.attn_drop.p > 0:
            raise NotImplementedError(
                f"TemperedAttention: dropout of attention weights is not supported, got "
                f"attn_drop={attn.attn_drop.p} in training mode"
            )
        layers, q_norm, k_norm = self._frozen_layers(x), attn.q_norm, attn.k_norm
        folds = layers is not None and isinstance(q_norm, nn.Identity)
        if layers is not None:
            temperature = self.temperature if folds else 1.0
            q, k, v = self._project(x, layers, temperature, rows, learned)
        else:
            q, k, v = self._project_as_timm(x)
            q = q if rows is None else q[:, rows]
        if not isinstance(q_norm, nn.Identity):
            q = q_norm(q)
        if not isinstance(k_norm, nn.Identity):
            k = k_norm(k)
        if rope is not None:
            first = 0 if rows is None else rows.start
            q, k = self._rotated(q, rope, first).type_as(v), self._rotated(k, rope, 0).type_as(v)
        if not folds:
            q = tempered(q, self.temperature)
        groups = q.shape[2] // k.shape[2]
        if groups > 1:
            k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
        out = attn.norm(attend(q, k, v, self.backend).flatten(2))
        gate = getattr(attn, "gate", None)  # timm's gated attention, newer than timm's first 1.0
        if gate is not None:
            out = out * gate(x if rows is None else x[:, rows]).sigmoid()
        return attn.proj_drop(attn.proj(out))

    def takes_learned_rows(self, x: Tensor) -> bool:
        gate = getattr(self.attn, "gate", None)  # it reads x, too
        return gate is None and self._frozen_layers(x) is not None

    def _frozen_layers(self, x: Tensor) -> list[tuple[Tensor, Tensor | None]] | None:
        """(weight, bias) of qkv, or of q, k and v, if they are plain linear layers, frozen and
        without hooks; else None."""
        attn = self.attn
        qkv = attn.qkv
        layers = []
        for layer in (attn.q_proj, attn.k_proj, attn.v_proj) if qkv is None else (qkv,):
            if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
                return None
            layers.append((layer.weight, layer.bias))
        if attn._parameters.get("q_bias") is not None:  # Eva's
            q_bias, v_bias = attn.q_bias, attn.v_bias
            if q_bias.requires_grad or v_bias.requires_grad:
                return None
            layers = [(layers[0][0], torch.cat([q_bias, attn.k_bias, v_bias]))]
        tensors = [t for layer in layers for t in layer if t is not None]
        if any(t.requires_grad for t in tensors) or _is_transformed(x, *tensors):
            return None
        return layers

    def _project(self, x, layers, temperature, rows, learned):
        """q [B, M, H, d] of the rows, divided by the temperature; k and v [B, N, H', d]."""
        size, run = self.attn.head_dim, _FrozenProjection.apply
        learned, start = (None, None) if learned is None else learned
        of_rows = x if rows is None else x[:, rows]
        if len(layers) == 3:
            q, k, v = layers
            (q,) = run(of_rows, learned, *q, temperature, start, 1, size)
            (k,) = run(x, learned, *k, 1.0, start, 1, size)
            (v,) = run(x, learned, *v, 1.0, start, 1, size)
            return q, k, v
        ((weight, bias),) = layers
        if rows is None:
            return run(x, learned, weight, bias, temperature, start, 3, size)
        border = weight.shape[0] // 3
        q_bias, kv_bias = (None, None) if bias is None else (bias[:border], bias[border:])
        (q,) = run(of_rows, None, weight[:border], q_bias, temperature, None, 1, size)
        return q, *run(x, None, weight[border:], kv_bias, 1.0, None, 2, size)

    def _project_as_timm(self, x):
        """q [B, N, H, d], k and v [B, N, H', d]."""
        attn = self.attn
        if attn.qkv is None:
            parts = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
        elif getattr(attn, "q_bias", None) is None:
            parts = attn.qkv(x).chunk(3, dim=-1)
        else:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
            parts = F.linear(x, attn.qkv.weight, bias).chunk(3, dim=-1)
        return [part.unflatten(-1, (-1, attn.head_dim)) for part in parts]

    def _rotated(self, t, rope, first):
        """t [B, M, H, d], tokens `first` on, with those after the prefix rotated by rope."""
        from timm.layers import apply_rot_embed_cat

        prefix = max(self.attn.num_prefix_tokens - first, 0)
        start = max(first - self.attn.num_prefix_tokens, 0)
        t = t.transpose(1, 2)
        turned = t[:, :, prefix:]
        rope = rope[..., start : start + turned.shape[2], :]
        half = getattr(self.attn, "rotate_half", False)
        turned = apply_rot_embed_cat(turned, rope, half=half)
        return torch.cat([t[:, :, :prefix], turned], dim=2).transpose(1, 2)


def check_attention(attn: nn.Module | None) -> None:
    """Raises TypeError unless attn is one of timm's that TemperedAttention restates."""
    from timm.layers import Attention, AttentionRope
    from timm.models.eva import EvaAttention

    if type(attn) not in (Attention, AttentionRope, EvaAttention):
        raise TypeError(
            "TemperedAttention: attn must be a timm.layers.Attention or AttentionRope, or a "
            f"timm.models.eva.EvaAttention, got {type(attn).__module__}.{type(attn).__name__}"
        )
