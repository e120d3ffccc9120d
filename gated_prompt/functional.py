# SPDX-License-Identifier: Apache-2.0
"""The documented functions: check the arguments, then run kernels (eager) or ATen ops (traced)."""

from __future__ import annotations

import torch
from torch import Tensor

from gated_prompt.autograd import PromptGateFunction, PromptGateLinearFunction
from gated_prompt.checks import checked, require_storage, require_writable
from gated_prompt.ops import require_kernels
from gated_prompt.traced import is_traced, traced_gate, traced_gate_

MIX = {"mix": True, "residual": False}  # rule: the value of the flag `mix` of the raw ops


def prompt_gate(
    block_out: Tensor,
    block_in: Tensor,
    gate_logit: Tensor,
    start: int,
    length: int,
    rule: str = "mix",
    *,
    batch_dim: int = 0,
) -> Tensor:
    """Gates how much a transformer block may change the prompt tokens; returns a new sequence.

    On the prompt rows, with h the rows of block_out, x the rows of block_in and g =
    sigmoid(gate_logit):

        mix:       out = g * h + (1 - g) * x
        residual:  out = x + g * h

    All other rows are copied from block_out, bit for bit. The formula is computed in float32 (in
    float64 if block_out is float64) and rounded once to block_out's dtype. Autocast has no effect.

    Args:
        block_out: The block's output, [B, N, D]; float64, float32, bfloat16 or float16, any
            strides.
        block_in: The block's input: the sequence [B, N, D], of which only the prompt rows are read,
            or only these rows, [B, P, D] or [P, D]. Its dtype may differ from block_out's.
        gate_logit: The gate before the sigmoid; any shape that broadcasts to [B, P, D]: [] one gate
            per block, [D] per channel, [P, 1] per token, [B, 1, 1] per sample, [P, D], [B, P, D],
            ... May be float32 when the activations are bfloat16.
        start: Index of the first prompt row, in [-N, N]; negative counts from the end.
        length: P, the number of prompt rows.
        rule: "mix" (the paper's convex update) or "residual".
        batch_dim: 1: block_out and block_in (and carrier) are [N, B, D] and [P, B, D], as in CLIP's
            blocks. The shapes can't show this, so with a large batch the wrong value raises no
            error. gate_logit broadcasts to [B, P, D] in both cases.

    Returns:
        The shape and dtype of block_out. Gradients flow to block_out, block_in and gate_logit. The
        gradient of gate_logit is summed in float32 (float64) in a fixed order, so every run gives
        the same bits. Second derivatives raise an error if the kernels ran (use
        `gated_prompt.reference.prompt_gate`).

    Raises:
        TypeError: an argument is not a tensor (or int), or its dtype is not one of the four.
        ValueError: a shape, the slice or the rule is not allowed.
        RuntimeError: devices differ, or there are no kernels for the device.
        NotImplementedError: a tensor is sparse, nested, quantized or mkldnn.

    Source: Yoo et al., ICML 2023, arXiv 2306.05067, section 3.2 (mix, scalar gate).
    """
    if batch_dim != 0:
        arguments = (block_out, block_in, gate_logit, start, length, rule)
        return _sequence_first(prompt_gate, batch_dim, *arguments)
    start, rows = checked(
        "prompt_gate", block_out, block_in, start, length, rule, gate_logit=gate_logit
    )
    if is_traced(block_out, block_in, gate_logit):
        return traced_gate(block_out, block_in, rows, (gate_logit,), start, length, rule)
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
    batch_dim: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """`prompt_gate` in place: reads and writes only the prompt rows of block_out.

    For autograd this is an in-place operation with PyTorch's rules. The output of a ViT block may
    be overwritten, because it is the result of a sum, which saves nothing. If block_out is a leaf
    that requires grad, an error is raised before the write. If an earlier op saved block_out for
    its backward (relu, tanh, softmax), PyTorch raises its usual error when that backward runs. The
    prompt rows of block_in and block_out must not overlap in memory, unless they are exactly the
    same elements.

    Args, formula, dtypes, gradients and errors: see `prompt_gate`. Also:

    Args:
        carrier: [B, P, D] in block_in's dtype. The gradient of block_in's prompt rows goes to this
            tensor, so that autograd need not build a [B, N, D] gradient of block_in that is zero in
            all other rows. First gate: the prompts as they were inserted into the sequence. Each
            later gate: the carrier that the previous gate returned. Under torch.compile and
            torch.func the carrier is not used; the gradient goes through block_in.

    Returns:
        block_out; if a carrier was given, (block_out, carrier for the next gate). The values of the
        returned carrier mean nothing; only its gradient counts.

    Raises:
        RuntimeError: also if block_out overlaps itself in memory (an expanded tensor), or can't be
            written in place: a leaf that requires grad, or an inference tensor outside inference
            mode.
    """
    if batch_dim != 0:
        arguments = (block_out, block_in, gate_logit, start, length, rule)
        return _sequence_first(prompt_gate_, batch_dim, *arguments, carrier=carrier)
    start, rows = checked(
        "prompt_gate_", block_out, block_in, start, length, rule, carrier, gate_logit=gate_logit
    )
    if is_traced(block_out, block_in, gate_logit):
        gate = (gate_logit,)
        return traced_gate_(block_out, block_in, rows, carrier, gate, start, length, rule)
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
    *,
    batch_dim: int = 0,
) -> Tensor:
    """`prompt_gate` with a gate computed from the block's output; returns a new sequence.

    On the prompt rows, with h the rows of block_out and x the rows of block_in:

        g = sigmoid(h @ weight.T + bias)
        mix:       out = g * h + (1 - g) * x
        residual:  out = x + g * h

    All other rows are copied from block_out, bit for bit. The product is a GEMM in block_out's
    dtype, also under autocast. The rest is computed in float32 (float64 for float64) and rounded
    once. weight [1, D] needs no GEMM: dot product, sigmoid and update are one pass in float32
    (float64).

    Args:
        block_out, block_in, start, length, rule, batch_dim: See `prompt_gate`.
        weight: [D, D] for a gate per channel or [1, D] for a gate per token: the weight of
            torch.nn.Linear(D, D) or (D, 1). May be float32 when the activations are bfloat16.
        bias: [D] or [1]; None: no bias.

    Returns:
        [B, N, D] in block_out's dtype. Gradients flow to block_out, block_in, weight and bias.
        Second derivatives raise an error if the kernels ran (use
        `gated_prompt.reference.prompt_gate_linear`). The kernels of this package give the same bits
        in every run. The GEMMs are PyTorch's, and their results may depend on the number of
        threads.

    Raises:
        The errors of `prompt_gate`.

    Source: the linear-sigmoid gate with residual add on the prompt tokens, a variant of Yoo et al.,
    ICML 2023, arXiv 2306.05067, section 3.2.
    """
    if batch_dim != 0:
        arguments = (block_out, block_in, weight, bias, start, length, rule)
        return _sequence_first(prompt_gate_linear, batch_dim, *arguments)
    start, rows = checked(
        "prompt_gate_linear", block_out, block_in, start, length, rule, weight=weight, bias=bias
    )
    if is_traced(block_out, block_in, weight, bias):
        return traced_gate(block_out, block_in, rows, (weight, bias), start, length, rule)
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
    batch_dim: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """`prompt_gate_linear` in place: reads and writes only the prompt rows of block_out.

    Formula, dtypes and gradients: see `prompt_gate_linear`. Rules for writing in place, `carrier`,
    return value and errors: see `prompt_gate_`.
    """
    if batch_dim != 0:
        arguments = (block_out, block_in, weight, bias, start, length, rule)
        return _sequence_first(prompt_gate_linear_, batch_dim, *arguments, carrier=carrier)
    op = "prompt_gate_linear_"
    start, rows = checked(
        op, block_out, block_in, start, length, rule, carrier, weight=weight, bias=bias
    )
    if is_traced(block_out, block_in, weight, bias):
        gate = (weight, bias)
        return traced_gate_(block_out, block_in, rows, carrier, gate, start, length, rule)
    require_writable(op, block_out, rows, carrier, weight=weight, bias=bias)
    return _apply(op, block_out, rows, carrier, (weight, bias), start, length, rule)


def _sequence_first(function, batch_dim, block_out, block_in, *others, **carrier):
    """function on sequences [N, B, D]."""
    if batch_dim != 1:
        raise ValueError(f"{function.__name__}: batch_dim must be 0 or 1, got {batch_dim!r}")
    swapped = {name: _swapped(tensor) for name, tensor in carrier.items()}
    out = function(_swapped(block_out), _swapped(block_in), *others, **swapped)
    is_pair = isinstance(out, tuple)
    sequence = out[0] if is_pair else out
    sequence = block_out if function.__name__.endswith("_") else _swapped(sequence)
    return (sequence, _swapped(out[1])) if is_pair else sequence


def _swapped(tensor):
    is_sequence = isinstance(tensor, Tensor) and tensor.dim() == 3
    return tensor.transpose(0, 1) if is_sequence else tensor  # `checked` has the errors


# ---- eager ----


def _own_copy(op: str, block_out: Tensor) -> Tensor:
    require_kernels(op, block_out.device)
    require_storage(op, block_out=block_out)  # clone() would read past the storage's end
    return block_out.clone()


def _apply(op, block_out, rows, carrier, gate, start, length, rule):
    """Runs the kernels. gate: (gate_logit,), or (weight, bias)."""
    if len(gate) == 2:  # ATen ops read these tensors and do not check for freed storage
        named = zip(("block_out", "weight", "bias"), (block_out, *gate), strict=True)
        require_storage(op, **{name: t for name, t in named if t is not None})
    takes_both = block_out.dtype == rows.dtype or (
        torch.float64 not in (block_out.dtype, rows.dtype)
        and torch.float32 in (block_out.dtype, rows.dtype)
    )
    if not takes_both:  # float64 with another dtype, or float16 with bfloat16: rare
        require_storage(op, block_in=rows)
        dtype = torch.float64 if block_out.dtype == torch.float64 else torch.float32
        rows = rows.to(dtype)
        carrier = None if carrier is None else carrier.to(dtype)
    gate = [t if t is None or not t.is_neg() else t.resolve_neg() for t in gate]
    rows, grads = rows.resolve_neg(), torch.is_grad_enabled()
    carries = carrier is not None and grads and not block_out._is_view()
    if carrier is not None:
        rows = rows.detach()
    arguments = (block_out, rows, carrier, carries, *gate, start, length, MIX[rule])
    if len(gate) == 1:
        out = PromptGateFunction.apply(*arguments, grads and gate[0].requires_grad)
    else:
        save_rows = grads and gate[0].requires_grad
        needs_bias = gate[1] is not None and gate[1].requires_grad
        save = save_rows or (grads and (block_out.requires_grad or needs_bias))
        needs_rows = rows.requires_grad or (carrier is not None and carrier.requires_grad)
        saves = (save or (grads and needs_rows), save, save_rows)
        out = PromptGateLinearFunction.apply(*arguments, saves)
    if carrier is None or carries:
        return out
    # The Function has returned only block_out: if it is a view, autograd allows no second output,
    # and without gradients none is needed. The slice is the next carrier.
    return out, out[:, start : start + length]
