# SPDX-License-Identifier: Apache-2.0
"""The formulas in plain, out-of-place PyTorch: the oracle of the tests, differentiable any number
of times.

It shares no code with what it checks, computes in the dtype of its inputs, and is meant for
float64.
"""

from __future__ import annotations

import torch


def prompt_gate(block_out, block_in, gate_logit, start, length, rule="mix"):
    """`gated_prompt.prompt_gate` by slices and cat.

    Args:
        block_out: h, [B, N, D].
        block_in: x, [B, N, D]; or its prompt rows, [B, P, D] or [P, D].
        gate_logit: anything that broadcasts to [B, P, D].
        start, length: the prompt rows are start, ..., start + length - 1; a negative start counts
            from N.
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
