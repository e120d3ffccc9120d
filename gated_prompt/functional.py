# SPDX-License-Identifier: Apache-2.0
"""The documented functions: checked arguments, then kernels (eager) or aten (traced)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._autograd import CreationMeta
from torch._C._autograd import _get_creation_meta as _creation_meta

from gated_prompt.ops import PromptGateFunction, copy_rows, require_kernels

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RULES = ("mix", "residual")


def prompt_gate(
    block_out: Tensor,
    block_in: Tensor,
    gate_logit: Tensor,
    start: int,
    length: int,
    rule: str = "mix",
) -> Tensor:
    """Gates how much a transformer block may change the prompt tokens; returns a new sequence.

    On the prompt rows, with h the rows of block_out, x the rows of block_in and g =
    sigmoid(gate_logit):

        mix:       out = g * h + (1 - g) * x
        residual:  out = x + g * h

    All other rows are those of block_out, bit for bit. Computed in float32 (float64 for float64)
    and rounded once to the dtype of block_out.

    Args:
        block_out: What the block returned, [B, N, D]; float64, float32, bfloat16 or float16, any
            strides.
        block_in: What the block was given, [B, N, D], of which the prompt rows are read; or these
            rows alone, [B, P, D] or [P, D]. Its dtype may differ from that of block_out.
        gate_logit: The gate before the sigmoid; any shape that broadcasts to [B, P, D], [] for one
            gate per block. May be float32 beside bfloat16 activations. A gate of one element runs
            the kernels; other shapes run the formula in PyTorch's own ops.
        start: First prompt row, in [-N, N]; negative counts from the end.
        length: P, the number of prompt rows.
        rule: "mix" (the paper's convex update) or "residual".

    Returns:
        [B, N, D], dtype of block_out. Gradients flow to block_out, block_in and gate_logit.
        Second derivatives raise where the kernels ran (use `gated_prompt.reference.prompt_gate`).
        The gradient of gate_logit is summed in a fixed order: the same bits from run to run.

    Raises:
        TypeError: an argument is not a tensor (or int), or its dtype is not one of the four.
        ValueError: shapes, slice or rule do not fit.
        RuntimeError: devices differ, or there are no kernels for the device.
        NotImplementedError: a tensor is sparse, nested, quantized or mkldnn.

    Source: Yoo et al., ICML 2023, arXiv 2306.05067, section 3.2 (mix).
    """
    start, rows, gate = _checked(
        "prompt_gate", block_out, block_in, gate_logit, start, length, rule
    )
    if _is_traced(block_out, block_in, gate_logit):
        new = _gated_rows(block_out[:, start : start + length], rows, gate, rule)
        return block_out.slice_scatter(new, 1, start, start + length)
    require_kernels("prompt_gate", block_out.device)
    _require_storage("prompt_gate", block_out=block_out)  # clone() would read past its end
    return _apply("prompt_gate", block_out.clone(), rows, gate, start, length, rule)


def prompt_gate_(
    block_out: Tensor,
    block_in: Tensor,
    gate_logit: Tensor,
    start: int,
    length: int,
    rule: str = "mix",
) -> Tensor:
    """`prompt_gate`, written into block_out: only its prompt rows are read and written. Returns
    block_out.

    For autograd this is an in-place operation and follows PyTorch's rules: what a ViT block returns
    (a sum) may be overwritten; a leaf that requires grad, or a tensor that an earlier op saved for
    its backward (relu, tanh, softmax), raises PyTorch's error. block_in may not overlap the prompt
    rows of block_out in memory, unless both are the very same elements.

    Args, formula, dtypes, gradients and errors: see `prompt_gate`. Also raises RuntimeError where
    block_out overlaps itself (an expanded tensor) or is an inference tensor outside inference mode.
    """
    start, rows, gate = _checked(
        "prompt_gate_", block_out, block_in, gate_logit, start, length, rule
    )
    if _is_traced(block_out, block_in, gate_logit):
        # copies keep what the products save apart from what is, or may later be, overwritten
        old = block_out[:, start : start + length]
        compiled = torch.compiler.is_dynamo_compiling()
        if compiled and torch.autograd.forward_ad._current_level < 0:
            old, rows = copy_rows(old), copy_rows(rows)
        else:
            old = old.clone()
        block_out[:, start : start + length] = _gated_rows(old, rows, gate, rule)
        return block_out
    require_kernels("prompt_gate_", block_out.device)
    _require_writable(block_out, rows, gate)
    return _apply("prompt_gate_", block_out, rows, gate, start, length, rule)


def _apply(op, block_out, rows, gate, start, length, rule):
    if gate.numel() != 1:
        _require_storage(op, block_out=block_out, block_in=rows, gate_logit=gate)
        old = block_out[:, start : start + length].clone()
        block_out[:, start : start + length] = _gated_rows(old, rows, gate, rule)
        return block_out
    has_kernel = block_out.dtype == rows.dtype or (
        torch.float64 not in (block_out.dtype, rows.dtype)
        and torch.float32 in (block_out.dtype, rows.dtype)
    )
    if not has_kernel:  # float64 beside another dtype, float16 beside bfloat16: rare
        rows = rows.to(torch.float64 if block_out.dtype == torch.float64 else torch.float32)
    rows, gate = rows.resolve_neg(), gate.reshape(()).resolve_neg()
    save = gate.requires_grad and torch.is_grad_enabled()
    return PromptGateFunction.apply(block_out, rows, gate, start, length, rule == "mix", save)


def _gated_rows(h: Tensor, x: Tensor, gate_logit: Tensor, rule: str) -> Tensor:
    """The formula in aten, [B, P, D]: what compilers and function transforms see."""
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    g = gate_logit.to(dtype).sigmoid()
    x = x.to(dtype)
    new = g * h.to(dtype) + (1 - g) * x if rule == "mix" else x + g * h.to(dtype)
    return new.to(h.dtype)


def _require_writable(block_out: Tensor, rows: Tensor, gate: Tensor) -> None:
    """Raises where the result can't be in place; autograd itself does so only after the write."""
    if block_out.is_inference() and not torch.is_inference_mode_enabled():
        problem = "an inference tensor, outside inference mode"
    elif block_out.is_neg():
        problem = "a negative view"
    elif not torch.is_grad_enabled():
        return
    elif block_out.requires_grad and block_out.is_leaf:
        problem = "a leaf that requires grad"
    elif not (block_out.requires_grad or rows.requires_grad or gate.requires_grad):
        return
    elif gate.is_inference():
        raise RuntimeError("prompt_gate_: gate_logit is an inference tensor and can't be saved")
    elif not block_out._is_view():
        return
    elif block_out._base.is_leaf and block_out._base.requires_grad:
        problem = "a view of a leaf that requires grad"
    elif _creation_meta(block_out) != CreationMeta.DEFAULT:
        problem = "a view from an op with several outputs (unbind, split), or made under no_grad"
    else:
        return
    raise RuntimeError(
        f"prompt_gate_: block_out is {problem}, and can't be written in place; use prompt_gate"
    )


def _require_storage(op: str, **tensors: Tensor) -> None:
    """Raises where a tensor reaches beyond its storage: the kernels check this, aten does not."""
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


def _is_traced(*tensors: Tensor) -> bool:
    """Whether something looks at the ops: torch.compile, export, functorch, forward AD, subclasses.

    A compiler must see aten: an opaque op would keep Inductor from fusing the gate into its
    neighbours, and a mutating custom op is miscompiled in some aliasing patterns (pytorch#198031,
    #153389).
    """
    return (
        torch.compiler.is_compiling()
        or any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _checked(op, block_out, block_in, gate_logit, start, length, rule):
    """Checks arguments. Returns start >= 0, the rows of block_in [B, P, D], and gate_logit."""
    for name, tensor in (
        ("block_out", block_out),
        ("block_in", block_in),
        ("gate_logit", gate_logit),
    ):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
            kind = (
                "nested"
                if tensor.is_nested
                else "quantized"
                if tensor.is_quantized
                else tensor.layout
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
    for name, value in (("start", start), ("length", length)):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
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
            _require_storage(op, block_in=block_in)  # names the argument, if that was it
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
    if gate_logit.dim() > 0 and not _broadcasts(gate_logit.shape, (batch, length, dim)):
        raise ValueError(
            f"{op}: gate_logit must broadcast to [B, P, D] = {[batch, length, dim]}, "
            f"got {list(gate_logit.shape)}"
        )
    return start, rows, gate_logit


def _broadcasts(shape, wanted) -> bool:
    if len(shape) > len(wanted):
        return False
    return all(s in (1, w) for s, w in zip(reversed(shape), reversed(wanted), strict=False))
