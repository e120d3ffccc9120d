# SPDX-License-Identifier: Apache-2.0
"""The documented functions: checked arguments, then kernels (eager) or aten (traced)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._autograd import CreationMeta
from torch._C._autograd import _get_creation_meta as _creation_meta

from gated_prompt.ops import (
    PromptGateFunction,
    PromptGateLinearFunction,
    copy_rows,
    linear_logit,
    require_kernels,
)

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
    and rounded once to the dtype of block_out; autocast changes nothing.

    Args:
        block_out: What the block returned, [B, N, D]; float64, float32, bfloat16 or float16, any
            strides.
        block_in: What the block was given, [B, N, D], of which the prompt rows are read; or these
            rows alone, [B, P, D] or [P, D]. Its dtype may differ from that of block_out.
        gate_logit: The gate before the sigmoid; any shape that broadcasts to [B, P, D]: [] one gate
            per block, [D] per channel, [P, 1] per token, [B, 1, 1] per sample, [P, D], [B, P, D],
            ... May be float32 beside bfloat16 activations.
        start: First prompt row, in [-N, N]; negative counts from the end.
        length: P, the number of prompt rows.
        rule: "mix" (the paper's convex update) or "residual".

    Returns:
        [B, N, D], dtype of block_out. Gradients flow to block_out, block_in and gate_logit; that of
        gate_logit is summed in float32 (float64), in a fixed order: the same bits from run to run.
        Second derivatives raise where the kernels ran (use `gated_prompt.reference.prompt_gate`).

    Raises:
        TypeError: an argument is not a tensor (or int), or its dtype is not one of the four.
        ValueError: shapes, slice or rule do not fit.
        RuntimeError: devices differ, or there are no kernels for the device.
        NotImplementedError: a tensor is sparse, nested, quantized or mkldnn.

    Source: Yoo et al., ICML 2023, arXiv 2306.05067, section 3.2 (mix, scalar gate).
    """
    start, rows = _checked(
        "prompt_gate", block_out, block_in, start, length, rule, gate_logit=gate_logit
    )
    if is_traced(block_out, block_in, gate_logit):
        new = _gated_rows(block_out[:, start : start + length], rows, gate_logit, rule)
        return _with_rows(block_out, new, start, length)
    block_out = _own_copy("prompt_gate", block_out)
    return _apply("prompt_gate", block_out, rows, None, (gate_logit,), start, length, rule)


def prompt_gate_(
    block_out: Tensor,
    block_in: Tensor,
    gate_logit: Tensor,
    start: int,
    length: int,
    rule: str = "mix",
    *,
    carrier: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`prompt_gate`, written into block_out: only its prompt rows are read and written.

    For autograd this is an in-place operation and follows PyTorch's rules: what a ViT block returns
    (a sum) may be overwritten; a leaf that requires grad, or a tensor that an earlier op saved for
    its backward (relu, tanh, softmax), raises PyTorch's error. block_in may not overlap the prompt
    rows of block_out in memory, unless both are the very same elements.

    Args, formula, dtypes, gradients and errors: see `prompt_gate`. Also:

    Args:
        carrier: Spares the gradient of block_in, which is [B, N, D] and zero but for its prompt
            rows. [B, P, D]: the gradient of block_in's prompt rows goes here instead. For the first
            gate it is the prompts as they were inserted; for each next one, what the last returned.
            A compiled or transformed gate sends it through block_in all the same.

    Returns:
        block_out; or (block_out, carrier of the next gate) where a carrier was given. That tensor
        has no values, only a gradient.

    Raises:
        RuntimeError: also where block_out overlaps itself (an expanded tensor) or is an inference
            tensor outside inference mode.
    """
    start, rows = _checked(
        "prompt_gate_", block_out, block_in, start, length, rule, carrier, gate_logit=gate_logit
    )
    if is_traced(block_out, block_in, gate_logit):
        h, rows, target = _traced_rows(block_out, rows, carrier, start, length)
        target.copy_(_gated_rows(h, rows, gate_logit, rule))
        return _traced_result(block_out, carrier, start, length)
    _require_writable("prompt_gate_", block_out, rows, carrier, gate_logit=gate_logit)
    return _apply("prompt_gate_", block_out, rows, carrier, (gate_logit,), start, length, rule)


def prompt_gate_linear(
    block_out: Tensor,
    block_in: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: int,
    length: int,
    rule: str = "residual",
) -> Tensor:
    """`prompt_gate` with a gate that the block's output decides itself; returns a new sequence.

    On the prompt rows, with h the rows of block_out and x the rows of block_in:

        g = sigmoid(h @ weight.T + bias)
        mix:       out = g * h + (1 - g) * x
        residual:  out = x + g * h

    All other rows are those of block_out, bit for bit. The product is a GEMM in block_out's dtype,
    under autocast too, and the rest is computed in float32 (float64 for float64) and rounded once.
    weight [1, D] needs no GEMM: dot product, sigmoid and update are one pass in float32 (float64).

    Args:
        block_out, block_in, start, length, rule: See `prompt_gate`.
        weight: [D, D], a gate for each channel, or [1, D], a gate for each token, as a
            torch.nn.Linear(D, D) or (D, 1) holds it. May be float32 beside bfloat16 activations.
        bias: [D] or [1]; None: no bias.

    Returns:
        [B, N, D], dtype of block_out. Gradients flow to block_out, block_in, weight and bias.
        Second derivatives raise where the kernels ran (use
        `gated_prompt.reference.prompt_gate_linear`). Kernels of this package give the same bits
        from run to run; the GEMMs are PyTorch's, whose results may depend on the number of threads.

    Raises:
        As `prompt_gate`.

    Source: the linear-sigmoid gate with residual add on the prompt tokens, a variant of Yoo et al.,
    ICML 2023, arXiv 2306.05067, section 3.2.
    """
    start, rows = _checked(
        "prompt_gate_linear", block_out, block_in, start, length, rule, weight=weight, bias=bias
    )
    if is_traced(block_out, block_in, weight, bias):
        h = block_out[:, start : start + length]
        new = _gated_rows(h, rows, linear_logit(h, weight, bias), rule)
        return _with_rows(block_out, new, start, length)
    block_out = _own_copy("prompt_gate_linear", block_out)
    return _apply("prompt_gate_linear", block_out, rows, None, (weight, bias), start, length, rule)


def prompt_gate_linear_(
    block_out: Tensor,
    block_in: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: int,
    length: int,
    rule: str = "residual",
    *,
    carrier: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`prompt_gate_linear`, written into block_out: only its prompt rows are read and written.

    Formula, dtypes and gradients: see `prompt_gate_linear`. What may be overwritten, `carrier`,
    what is returned and errors: see `prompt_gate_`.
    """
    op = "prompt_gate_linear_"
    start, rows = _checked(
        op, block_out, block_in, start, length, rule, carrier, weight=weight, bias=bias
    )
    if is_traced(block_out, block_in, weight, bias):
        h, rows, target = _traced_rows(block_out, rows, carrier, start, length)
        target.copy_(_gated_rows(h, rows, linear_logit(h, weight, bias), rule))
        return _traced_result(block_out, carrier, start, length)
    _require_writable(op, block_out, rows, carrier, weight=weight, bias=bias)
    return _apply(op, block_out, rows, carrier, (weight, bias), start, length, rule)


# ---- eager ----


def _own_copy(op: str, block_out: Tensor) -> Tensor:
    require_kernels(op, block_out.device)
    _require_storage(op, block_out=block_out)  # clone() would read past its end
    return block_out.clone()


def _apply(op, block_out, rows, carrier, gate, start, length, rule):
    """gate: (gate_logit,), or (weight, bias)."""
    if len(gate) == 2:  # aten reads them, and would read freed memory
        named = zip(("block_out", "weight", "bias"), (block_out, *gate), strict=True)
        _require_storage(op, **{name: t for name, t in named if t is not None})
    has_kernel = block_out.dtype == rows.dtype or (
        torch.float64 not in (block_out.dtype, rows.dtype)
        and torch.float32 in (block_out.dtype, rows.dtype)
    )
    if not has_kernel:  # float64 beside another dtype, float16 beside bfloat16: rare
        _require_storage(op, block_in=rows)
        dtype = torch.float64 if block_out.dtype == torch.float64 else torch.float32
        rows = rows.to(dtype)
        carrier = None if carrier is None else carrier.to(dtype)
    gate = [t if t is None or not t.is_neg() else t.resolve_neg() for t in gate]
    rows, grads = rows.resolve_neg(), torch.is_grad_enabled()
    carries = carrier is not None and grads and not block_out._is_view()
    if carrier is not None:
        rows = rows.detach()
    arguments = (block_out, rows, carrier, carries, *gate, start, length, rule == "mix")
    if len(gate) == 1:
        out = PromptGateFunction.apply(*arguments, grads and gate[0].requires_grad)
    else:
        save_rows = grads and gate[0].requires_grad
        of_bias = gate[1] is not None and gate[1].requires_grad
        save = save_rows or (grads and (block_out.requires_grad or of_bias))
        of_rows = rows.requires_grad or (carrier is not None and carrier.requires_grad)
        saves = (save or (grads and of_rows), save, save_rows)
        out = PromptGateLinearFunction.apply(*arguments, saves)
    if carrier is None or carries:
        return out
    # autograd allows one output where block_out is a view, and needs none without gradients
    return out, out[:, start : start + length]


# ---- traced ----


def _traced_rows(block_out: Tensor, rows: Tensor, carrier: Tensor | None, start: int, length: int):
    """h and x, copied from what is, or may later be, overwritten, since the products save them; and
    the rows to write."""
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "prompt_gate_: torch.onnx.export(dynamo=False) leaves writes to slices out of the "
            "file; use dynamo=True, or prompt_gate (prompt_gate_linear)"
        )
    if carrier is not None and carrier.requires_grad and not rows.requires_grad:
        raise RuntimeError(
            "prompt_gate_: a compiled or transformed gate sends its gradient through block_in, not "
            "through carrier; pass block_in without detach(), got one that does not require grad"
        )
    target = block_out[:, start : start + length]
    if torch.compiler.is_dynamo_compiling() and torch.autograd.forward_ad._current_level < 0:
        return copy_rows(target), copy_rows(rows), target
    return target.clone(), rows, target


def _traced_result(block_out: Tensor, carrier: Tensor | None, start: int, length: int):
    # the gradient has gone to block_in; for the next gate it comes back through these rows
    return block_out if carrier is None else (block_out, block_out[:, start : start + length])


def _with_rows(block_out: Tensor, new: Tensor, start: int, length: int) -> Tensor:
    if torch.jit.is_tracing():  # torch.onnx.export(dynamo=False) has no slice_scatter
        return torch.cat([block_out[:, :start], new, block_out[:, start + length :]], dim=1)
    return block_out.slice_scatter(new, 1, start, start + length)


def _gated_rows(h: Tensor, x: Tensor, gate_logit: Tensor, rule: str) -> Tensor:
    """The formula in aten, [B, P, D]: what compilers and function transforms see."""
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    g = gate_logit.to(dtype).sigmoid()
    x = x.to(dtype)
    new = g * h.to(dtype) + (1 - g) * x if rule == "mix" else x + g * h.to(dtype)
    return new.to(h.dtype)


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether something looks at the ops: torch.compile, export, functorch, forward AD, subclasses.

    A compiler must see aten: an opaque op would keep Inductor from fusing the gate into its
    neighbours, and a mutating custom op is miscompiled in some aliasing patterns (pytorch#198031,
    #153389).
    """
    if torch.compiler.is_compiling():
        return True
    for t in tensors:  # any() over a generator takes three times as long
        if t is not None and type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return True
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


# ---- checks ----


def _require_writable(op, block_out, rows, carrier, **gate) -> None:
    """Raises where the result can't be in place; autograd itself does so only after the write."""
    require_kernels(op, block_out.device)
    if torch.is_grad_enabled() and block_out.requires_grad and not block_out.is_leaf:
        is_odd = block_out._is_view() or block_out.is_neg() or block_out.is_inference()
        if not is_odd and not any(t is not None and t.is_inference() for t in gate.values()):
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
    elif any(t is not None and t.is_inference() for t in gate.values()):
        names = " or ".join(gate)
        raise RuntimeError(f"{op}: {names} is an inference tensor and can't be saved")
    elif not block_out._is_view():
        return
    elif block_out._base.is_leaf and block_out._base.requires_grad:
        problem = "a view of a leaf that requires grad"
    elif _creation_meta(block_out) != CreationMeta.DEFAULT:
        problem = "a view from an op with several outputs (unbind, split), or made under no_grad"
    else:
        return
    raise RuntimeError(
        f"{op}: block_out is {problem}, and can't be written in place; use {op.rstrip('_')}"
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


def _checked(op, block_out, block_in, start, length, rule, carrier=None, **gate):
    """Checks arguments; gate is gate_logit=, or weight= and bias=. Returns start >= 0 and the rows
    of block_in [B, P, D]."""
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
