# SPDX-License-Identifier: Apache-2.0
"""The documented functions: checked arguments, then kernels (eager) or aten (traced)."""

from __future__ import annotations

import torch
from torch import Tensor

from gated_prompt.autograd import PromptGateFunction, PromptGateLinearFunction, linear_logit
from gated_prompt.checks import checked, require_storage, require_writable
from gated_prompt.ops import require_kernels
from gated_prompt.traced import gated_rows, is_traced, traced_result, traced_rows, with_rows


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
    start, rows = checked(
        "prompt_gate", block_out, block_in, start, length, rule, gate_logit=gate_logit
    )
    if is_traced(block_out, block_in, gate_logit):
        new = gated_rows(block_out[:, start : start + length], rows, gate_logit, rule)
        return with_rows(block_out, new, start, length)
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
    start, rows = checked(
        "prompt_gate_", block_out, block_in, start, length, rule, carrier, gate_logit=gate_logit
    )
    if is_traced(block_out, block_in, gate_logit):
        h, rows, target = traced_rows(block_out, rows, carrier, start, length)
        target.copy_(gated_rows(h, rows, gate_logit, rule))
        return traced_result(block_out, carrier, start, length)
    require_writable("prompt_gate_", block_out, rows, carrier, gate_logit=gate_logit)
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
    start, rows = checked(
        "prompt_gate_linear", block_out, block_in, start, length, rule, weight=weight, bias=bias
    )
    if is_traced(block_out, block_in, weight, bias):
        h = block_out[:, start : start + length]
        new = gated_rows(h, rows, linear_logit(h, weight, bias), rule)
        return with_rows(block_out, new, start, length)
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
    start, rows = checked(
        op, block_out, block_in, start, length, rule, carrier, weight=weight, bias=bias
    )
    if is_traced(block_out, block_in, weight, bias):
        h, rows, target = traced_rows(block_out, rows, carrier, start, length)
        target.copy_(gated_rows(h, rows, linear_logit(h, weight, bias), rule))
        return traced_result(block_out, carrier, start, length)
    require_writable(op, block_out, rows, carrier, weight=weight, bias=bias)
    return _apply(op, block_out, rows, carrier, (weight, bias), start, length, rule)


# ---- eager ----


def _own_copy(op: str, block_out: Tensor) -> Tensor:
    require_kernels(op, block_out.device)
    require_storage(op, block_out=block_out)  # clone() would read past its end
    return block_out.clone()


def _apply(op, block_out, rows, carrier, gate, start, length, rule):
    """gate: (gate_logit,), or (weight, bias)."""
    if len(gate) == 2:  # aten reads them, and would read freed memory
        named = zip(("block_out", "weight", "bias"), (block_out, *gate), strict=True)
        require_storage(op, **{name: t for name, t in named if t is not None})
    has_kernel = block_out.dtype == rows.dtype or (
        torch.float64 not in (block_out.dtype, rows.dtype)
        and torch.float32 in (block_out.dtype, rows.dtype)
    )
    if not has_kernel:  # float64 beside another dtype, float16 beside bfloat16: rare
        require_storage(op, block_in=rows)
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
