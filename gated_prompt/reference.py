# SPDX-License-Identifier: Apache-2.0
"""The formulas in plain, out-of-place PyTorch, differentiable any number of times.

This is the oracle of the tests. It shares no code with the functions that it checks. It computes in
the dtype of its inputs and is meant for float64.
"""

from __future__ import annotations

import torch


def prompt_gate(block_out, block_in, gate_logit, start, length, rule="mix"):
    """`gated_prompt.prompt_gate` by slices and cat.

    Args:
        block_out: h, [B, N, D].
        block_in: x, [B, N, D]; or its prompt rows, [B, P, D] or [P, D].
        gate_logit: any shape that broadcasts to [B, P, D].
        start, length: the prompt rows are start, ..., start + length - 1; a negative start counts
            from the end.
        rule: "mix": g*h + (1-g)*x. "residual": x + g*h. g = sigmoid(gate_logit).
    """
    num_tokens = block_out.shape[1]
    first = start if start >= 0 else start + num_tokens
    before, h, after = torch.split(block_out, [first, length, num_tokens - first - length], dim=1)
    is_sequence = block_in.dim() == 3 and block_in.shape[1] == num_tokens
    x = block_in[:, first : first + length] if is_sequence else block_in
    g = torch.sigmoid(gate_logit)
    prompts = g * h + (1 - g) * x if rule == "mix" else x + g * h
    return torch.cat([before, prompts.to(block_out.dtype), after], dim=1)


def prompt_gate_linear(block_out, block_in, weight, bias, start, length, rule="residual"):
    """`gated_prompt.prompt_gate_linear` by einsum: the logit is a linear map of the rows of h.

    Args:
        block_out, block_in, start, length, rule: see `prompt_gate`.
        weight: [D, D] or [1, D].
        bias: [D] or [1], or None.
    """
    first = start if start >= 0 else start + block_out.shape[1]
    h = block_out[:, first : first + length]
    logit = torch.einsum("bpd,kd->bpk", h, weight.to(h.dtype))
    if bias is not None:
        logit = logit + bias
    return prompt_gate(block_out, block_in, logit, start, length, rule)
