# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments of the documented functions, with their error messages."""

from __future__ import annotations

import torch
from torch import Tensor

from gated_prompt.ops import require_kernels
from gated_prompt.torch_private import CreationMeta, creation_meta

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RULES = ("mix", "residual")


def require_writable(op, block_out, rows, carrier, **gate) -> None:
    """Raises if block_out can't be written in place; autograd would raise only after the write."""
    require_kernels(op, block_out.device)
    has_inference = False
    for t in gate.values():  # any() over a generator takes three times as long
        has_inference = has_inference or (t is not None and t.is_inference())
    if torch.is_grad_enabled() and block_out.requires_grad and not block_out.is_leaf:
        is_odd = block_out._is_view() or block_out.is_neg() or block_out.is_inference()
        if not is_odd and not has_inference:
            return  # the usual case
    tensors = [t for t in (rows, carrier, *gate.values()) if t is not None]
    if block_out.is_inference() and not torch.is_inference_mode_enabled():
        problem = "an inference tensor, outside inference mode"
    elif block_out.is_neg():
        problem = "a negative view"
    elif not torch.is_grad_enabled():
        return
    elif block_out.requires_grad and block_out.is_leaf:
        problem = "a leaf that requires grad"
    elif not (block_out.requires_grad or any(t.requires_grad for t in tensors)):
        return
    elif has_inference:
        names = " or ".join(gate)
        raise RuntimeError(f"{op}: {names} is an inference tensor and can't be saved for backward")
    elif not block_out._is_view():
        return
    elif block_out._base.is_leaf and block_out._base.requires_grad:
        problem = "a view of a leaf that requires grad"
    elif None not in (creation_meta, CreationMeta) and (
        creation_meta(block_out) != CreationMeta.DEFAULT
    ):
        problem = "a view from an op with several outputs (unbind, split), or made under no_grad"
    else:
        return
    raise RuntimeError(
        f"{op}: block_out is {problem}, and can't be written in place; use {op.rstrip('_')}"
    )


def require_storage(op: str, **tensors: Tensor) -> None:
    """Raises if a tensor reaches beyond its storage. The kernels check this, ATen ops do not."""
    for name, t in tensors.items():
        last = t.storage_offset() + sum(
            (size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)
        )
        needed, there = (last + 1) * t.itemsize, t.untyped_storage().nbytes()
        if t.numel() > 0 and needed > there:
            raise RuntimeError(
                f"{op}: {name} reaches {needed} bytes into a storage of {there} bytes "
                "(was it freed or resized?)"
            )


def checked(op, block_out, block_in, start, length, rule, carrier=None, **gate):
    """Checks the arguments. gate: gate_logit=, or weight= and bias=. Returns a start >= 0 and the
    prompt rows of block_in, [B, P, D]."""
    _check_tensor(op, "block_out", block_out, block_out)
    _check_tensor(op, "block_in", block_in, block_out)
    for name, tensor in gate.items():
        if name != "bias" or tensor is not None:
            _check_tensor(op, name, tensor, block_out)
    for name, value in (("start", start), ("length", length)):
        if type(value) is not int and (
            isinstance(value, bool) or not isinstance(value, (int, torch.SymInt))
        ):
            raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if rule not in RULES:
        raise ValueError(f"{op}: rule must be 'mix' or 'residual', got {rule!r}")
    if block_out.dim() != 3:
        raise ValueError(f"{op}: block_out must be [B, N, D], got {list(block_out.shape)}")
    batch, num_tokens, dim = block_out.shape
    if length < 0:
        raise ValueError(f"{op}: length must be at least 0, got {length}")
    if not -num_tokens <= start <= num_tokens:
        raise ValueError(
            f"{op}: start must be in [{-num_tokens}, {num_tokens}] (N={num_tokens}; negative "
            f"counts from the end), got {start}"
        )
    if start < 0:
        start = start + num_tokens
    if start + length > num_tokens:
        raise ValueError(
            f"{op}: slice [{start}, {start + length}) is outside N={num_tokens}; start and length "
            f"must select rows of block_out {list(block_out.shape)}"
        )
    if tuple(block_in.shape) == (batch, num_tokens, dim):
        try:
            rows = block_in[:, start : start + length]
        except RuntimeError:
            require_storage(op, block_in=block_in)  # a clearer error, if this is the cause
            raise
    elif tuple(block_in.shape) == (batch, length, dim):
        rows = block_in
    elif tuple(block_in.shape) == (length, dim):
        rows = block_in.expand(batch, length, dim)
    else:
        raise ValueError(
            f"{op}: block_in must be [B, N, D] = {[batch, num_tokens, dim]}, or the prompt rows "
            f"{[batch, length, dim]} or {[length, dim]}, got {list(block_in.shape)}"
        )
    if carrier is not None:
        _check_tensor(op, "carrier", carrier, block_out)
        if tuple(carrier.shape) != (batch, length, dim) or carrier.dtype != block_in.dtype:
            raise ValueError(
                f"{op}: carrier must be [B, P, D] = {[batch, length, dim]} in block_in's dtype "
                f"{block_in.dtype}, got {list(carrier.shape)} in {carrier.dtype}"
            )
    if "gate_logit" in gate:
        shape = gate["gate_logit"].shape
        if len(shape) > 0 and shape != (1,) and not _broadcasts(shape, (batch, length, dim)):
            raise ValueError(
                f"{op}: gate_logit must broadcast to [B, P, D] = {[batch, length, dim]}, "
                f"got {list(shape)}"
            )
        return start, rows
    weight, bias = gate["weight"], gate["bias"]
    if tuple(weight.shape) not in ((dim, dim), (1, dim)):
        raise ValueError(
            f"{op}: weight must be [D, D] or [1, D] with D={dim}, got {list(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"{op}: bias must be [{weight.shape[0]}], as weight has {weight.shape[0]} rows, "
            f"got {list(bias.shape)}"
        )
    return start, rows


def _check_tensor(op, name, tensor, block_out) -> None:
    is_dense = (
        isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_nested
    )
    if is_dense and tensor.dtype in DTYPES and tensor.device == block_out.device:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = (
            "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else tensor.layout
        )
        raise NotImplementedError(f"{op}: {name} must be a dense strided tensor, got {kind}")
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}"
        )
    if tensor.device != block_out.device:
        raise RuntimeError(
            f"{op}: {name} must be on the device of block_out, {block_out.device}, "
            f"got {tensor.device}"
        )


def _broadcasts(shape, wanted) -> bool:
    if len(shape) > len(wanted):
        return False
    return all(s in (1, w) for s, w in zip(reversed(shape), reversed(wanted), strict=False))
