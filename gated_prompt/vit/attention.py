# SPDX-License-Identifier: Apache-2.0
"""The temperature folded into the frozen weights that project the queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gated_prompt.autograd import no_autocast
from gated_prompt.ops import divide_rows, require_kernels
from gated_prompt.temperature import (
    TEMPERATURE_RANGE,
    clamp_straight_through,
    clamped,
    is_in_plain_aten,
    temperature_gradient,
)


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
