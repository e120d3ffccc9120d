# SPDX-License-Identifier: Apache-2.0
"""Modules that own the parameters of the functions in `gated_prompt.functional`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gated_prompt.functional import RULES, prompt_gate, prompt_gate_

GATES = ("scalar",)


class PromptGate(nn.Module):
    """One learnable gate for the prompt rows of one block; see `gated_prompt.prompt_gate` for the
    formula.

    Attributes:
        logit: The gate before the sigmoid, a float32 parameter, [] for gate="scalar".
    """

    def __init__(self, gate: str = "scalar", rule: str = "mix", *, init: float = -5.0):
        """Makes a gate that starts at sigmoid(init).

        Args:
            gate: "scalar", one gate for all prompt tokens and channels (the paper's).
            rule: "mix": g*h + (1-g)*x. "residual": x + g*h.
            init: Start of the logit; -5 is a nearly closed gate, g = 0.0067.
        """
        super().__init__()
        if gate not in GATES:
            raise ValueError(f"PromptGate: gate must be one of {GATES}, got {gate!r}")
        if rule not in RULES:
            raise ValueError(f"PromptGate: rule must be one of {RULES}, got {rule!r}")
        self.gate, self.rule, self.init = gate, rule, init
        self.logit = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.logit, self.init)

    def forward(self, block_out: Tensor, block_in: Tensor, start: int, length: int) -> Tensor:
        """Gates rows [start, start + length) of block_out [B, N, D]; in place unless compiled."""
        # a compiler fuses the out-of-place form into the ops around it
        gate = prompt_gate if torch.compiler.is_compiling() else prompt_gate_
        return gate(block_out, block_in, self.logit, start, length, self.rule)

    def extra_repr(self) -> str:
        return f"{self.gate}, rule={self.rule}, init={self.init}"
