# SPDX-License-Identifier: Apache-2.0
"""Modules that own the parameters for the functions in `gated_prompt.functional`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gated_prompt.checks import RULES
from gated_prompt.functional import (
    prompt_gate,
    prompt_gate_,
    prompt_gate_linear,
    prompt_gate_linear_,
)
from gated_prompt.traced import is_traced

GATES = {  # name: shape of its parameter
    "scalar": (1,),  # not (): FSDP2's fully_shard refuses parameters without dimensions
    "channel": ("dim",),
    "token": ("num_prompts", 1),
    "full": ("num_prompts", "dim"),
    "linear": ("dim", "dim"),
    "linear-token": (1, "dim"),
}
POSITIONS = ("start", "end")
PROMPT_INITS = ("uniform", "normal")
_CLOSED = -5.0  # sigmoid(-5) = 0.0067


# torch.fx does not trace into these functions.
torch.fx.wrap("prompt_gate")
torch.fx.wrap("prompt_gate_linear")


class PromptGate(nn.Module):
    """One learnable gate for the prompt rows of one block.

    Formulas: see `gated_prompt.prompt_gate`, and `gated_prompt.prompt_gate_linear` for the gates
    "linear" and "linear-token".

    Attributes:
        logit: The gate before the sigmoid, a float32 parameter; None for the linear gates.
        weight, bias: The float32 parameters of the linear gates: [D, D] and [D] ("linear"), or
            [1, D] and [1] ("linear-token"). None for the other gates.
    """

    def __init__(
        self,
        gate: str = "scalar",
        rule: str = "mix",
        *,
        dim: int | None = None,
        num_prompts: int | None = None,
        init: float | None = None,
    ):
        """Makes a gate.

        Args:
            gate: "scalar": one gate for the block (the paper's). "channel": one per channel.
                "token": one per prompt. "full": one per element of the prompts. The linear gates
                are computed from the block's output, for each prompt: "linear": one gate per
                channel; "linear-token": one gate for all channels.
            rule: "mix": g*h + (1-g)*x. "residual": x + g*h.
            dim: D; required by all gates except "scalar" and "token".
            num_prompts: P; required by "token" and "full".
            init: Initial value of the logit, or of the bias of a linear gate; -5 is a nearly closed
                gate, g = 0.0067. None: -5; for a linear gate, the initial bias of torch.nn.Linear.
                The weight of a linear gate always starts as in torch.nn.Linear, so with None g
                starts near 0.5.
        """
        super().__init__()
        for name, value, allowed in (("gate", gate, tuple(GATES)), ("rule", rule, RULES)):
            if value not in allowed:
                raise ValueError(f"PromptGate: {name} must be one of {allowed}, got {value!r}")
        sizes = {"dim": dim, "num_prompts": num_prompts}
        for name in sizes.keys() & set(GATES[gate]):
            _check_positive_int("PromptGate", name, sizes[name])
        shape = [sizes.get(size, size) for size in GATES[gate]]
        self.gate, self.rule, self.init = gate, rule, init
        is_linear = gate.startswith("linear")
        self.logit = None if is_linear else nn.Parameter(torch.empty(shape))
        self.weight = nn.Parameter(torch.empty(shape)) if is_linear else None
        self.bias = nn.Parameter(torch.empty(shape[0])) if is_linear else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is None:
            nn.init.constant_(self.logit, _CLOSED if self.init is None else self.init)
            return
        bound = 1 / math.sqrt(self.weight.shape[1])  # as in torch.nn.Linear, for weight and bias
        nn.init.uniform_(self.weight, -bound, bound)
        if self.init is None:
            nn.init.uniform_(self.bias, -bound, bound)
        else:
            nn.init.constant_(self.bias, self.init)

    def forward(
        self,
        block_out: Tensor,
        block_in: Tensor,
        start: int,
        length: int,
        carrier: Tensor | None = None,
        *,
        inplace: bool = True,
        batch_dim: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Gates rows [start, start + length) of block_out [B, N, D] ([N, B, D] if batch_dim is 1).

        Args:
            block_out, block_in, start, length, batch_dim: See `gated_prompt.prompt_gate`.
            carrier: See `gated_prompt.prompt_gate_`.
            inplace: True: write into block_out, except under torch.compile, tracing and torch.func.
                False: never write into it; needed if other code may keep the block's output.

        Returns:
            The new sequence [B, N, D]; if a carrier was given, (sequence, carrier for the next
            gate).
        """
        logit = self.logit
        gate = (self.weight, self.bias) if logit is None else (logit,)
        arguments = (block_out, block_in, *gate, start, length, self.rule)
        if inplace and not is_traced(block_out, block_in, *gate):
            function = prompt_gate_linear_ if logit is None else prompt_gate_
            return function(*arguments, carrier=carrier, batch_dim=batch_dim)
        # a compiler fuses this with the ops around it, with or without carriers
        function = prompt_gate_linear if logit is None else prompt_gate
        out = function(*arguments, batch_dim=batch_dim)
        return out if carrier is None else (out, out.narrow(1 - batch_dim, start, length))

    def extra_repr(self) -> str:
        parameter = self.logit if self.weight is None else self.weight
        return f"{self.gate} {list(parameter.shape)}, rule={self.rule}, init={self.init}"


class PromptTokens(nn.Module):
    """Learnable prompt tokens, and their place in the sequence.

    Attributes:
        tokens: [P, D], a float32 parameter.
    """

    def __init__(
        self,
        num_prompts: int,
        dim: int,
        *,
        position: str = "start",
        dropout: float = 0.1,
        init: str = "uniform",
        patch_dim: int = 3 * 16 * 16,
    ):
        """Makes the tokens.

        Args:
            num_prompts: P.
            dim: D.
            position: "start", right after the class and register tokens; "end", after the patches.
            dropout: Probability that an element of the prompts is zeroed before insertion, in
                training.
            init: "uniform": in +-sqrt(6 / (patch_dim + dim)), as in VPT. "normal": standard normal.
            patch_dim: Number of values in a patch, channels * height * width; for init="uniform".

        Source: Jia et al., ECCV 2022, arXiv 2203.12119 (VPT).
        """
        super().__init__()
        for name, value in (("num_prompts", num_prompts), ("dim", dim), ("patch_dim", patch_dim)):
            _check_positive_int("PromptTokens", name, value)
        for name, value, allowed in (
            ("position", position, POSITIONS),
            ("init", init, PROMPT_INITS),
        ):
            if value not in allowed:
                raise ValueError(f"PromptTokens: {name} must be one of {allowed}, got {value!r}")
        self.position, self.init, self.patch_dim = position, init, patch_dim
        self.tokens = nn.Parameter(torch.empty(num_prompts, dim))
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init == "normal":
            nn.init.normal_(self.tokens)
            return
        bound = math.sqrt(6 / (self.patch_dim + self.tokens.shape[-1]))
        nn.init.uniform_(self.tokens, -bound, bound)

    def forward(self, x: Tensor, num_prefix_tokens: int = 1) -> tuple[Tensor, Tensor, int]:
        """Inserts the tokens.

        Args:
            x: The tokens [B, N, D]: class and register tokens, then patches.
            num_prefix_tokens: The number of tokens before the patches.

        Returns:
            The sequence [B, N + P, D]; the inserted prompts [B, P, D], after dropout, which are the
            first carrier for `prompt_gate_`; and the position of the first prompt.
        """
        start = num_prefix_tokens if self.position == "start" else x.shape[1]
        prompts = _expanded(self, self.tokens, x)
        return torch.cat([x[:, :start], prompts, x[:, start:]], dim=1), prompts, start

    def extra_repr(self) -> str:
        return f"{list(self.tokens.shape)}, position={self.position}, init={self.init}"


class DeepPromptTokens(nn.Module):
    """New prompt tokens for each block except the first, as in VPT-deep.

    Attributes:
        tokens: [L - 1, P, D], a float32 parameter; tokens[l] enter block l + 1, counted from 0.
    """

    def __init__(self, first: PromptTokens, depth: int):
        """Makes the tokens for blocks 1, ..., depth - 1 in the same way as `first` for block 0.

        Source: Jia et al., ECCV 2022, arXiv 2203.12119 (VPT).
        """
        super().__init__()
        _check_positive_int("DeepPromptTokens", "depth", depth)
        self.tokens = nn.Parameter(torch.empty(depth - 1, *first.tokens.shape))
        self.dropout = nn.Dropout(first.dropout.p)
        self.init, self.patch_dim = first.init, first.patch_dim
        self.reset_parameters()

    reset_parameters = PromptTokens.reset_parameters

    def forward(self, block: int, like: Tensor) -> Tensor:
        """Returns the prompts [B, P, D] for `block` >= 1, in the batch size and dtype of `like`."""
        return _expanded(self, self.tokens[block - 1], like)

    def extra_repr(self) -> str:
        return f"{list(self.tokens.shape)}, init={self.init}"


def _expanded(module, tokens: Tensor, like: Tensor) -> Tensor:
    """tokens [P, D] after dropout, as [B, P, D] in the batch size and dtype of `like`."""
    if not torch.is_grad_enabled() and not torch.jit.is_tracing():
        # without gradients, torch's FlopCounterMode fails on views of parameters
        tokens = tokens.detach()
    tokens = tokens.expand(like.shape[0], -1, -1)
    return (module.dropout(tokens) if module.training else tokens).to(like.dtype)


def _check_positive_int(owner: str, name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{owner}: {name} must be at least 1, got {value}")
