# SPDX-License-Identifier: Apache-2.0
"""Prompts, gates and temperatures of a sequence of blocks, as `wrap` and `attach` both use them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gated_prompt.functional import prompt_gate, prompt_gate_
from gated_prompt.modules import DeepPromptTokens, PromptGate, PromptTokens
from gated_prompt.temperature import TEMPERATURE_RANGE
from gated_prompt.tempering import Temperatures
from gated_prompt.torch_private import dispatch_modes
from gated_prompt.traced import is_traced

torch.fx.wrap("prompt_gate")  # torch.fx records calls of it and does not trace into it
MARK = "_gated_prompt_wrapping"  # the attribute of a timm model that `wrap` has changed
_PATIENCE = 100  # forwards; more than usual numbers of accumulated batches
PROMPTED = ("vpt-shallow", "vpt-deep", "gpt", "gpt-deep")  # methods with prompts


def make_prompts(
    method: str,
    *,
    dim: int,
    depth: int,
    num_prompts: int,
    gate: str | None,
    rule: str,
    gate_init: float | None,
    gated_blocks: int,
    position: str = "start",
    dropout: float = 0.1,
    init: str = "uniform",
    patch_dim: int = 3 * 16 * 16,
) -> tuple[PromptTokens | None, DeepPromptTokens | None, list[PromptGate]]:
    """Makes what `method` adds to `depth` blocks over tokens of size `dim`. The arguments are those
    of `wrap`, without None."""
    gates = [
        PromptGate(gate, rule, init=gate_init, dim=dim, num_prompts=num_prompts)
        for _ in range(gated_blocks)
    ]
    if num_prompts == 0:
        return None, None, gates
    prompts = PromptTokens(
        num_prompts, dim, position=position, dropout=dropout, init=init, patch_dim=patch_dim
    )
    is_deep = method.endswith("-deep")
    return prompts, DeepPromptTokens(prompts, depth) if is_deep else None, gates


def number_of_gates(gate: str | None, rule: str, depth: int) -> int:
    """The default of `gated_blocks` for "gpt" and "gpt-deep". With rule "mix" the last block has no
    gate, as in the paper."""
    return 0 if gate is None else depth - 1 if rule == "mix" else depth


class GatedPrompts(nn.Module):
    """The prompts, gates and temperatures of a sequence of blocks.

    The prompts are inserted once, before the first block. After block l, which maps x to
    block_l(x), the prompt rows become g_l * block_l(x) + (1 - g_l) * x (rule "mix"). With deep
    prompts, in all blocks except the last, x in this formula is the new prompts of block l + 1,
    and g_l = 0 if block l has no gate.

    Attributes:
        prompts: `PromptTokens`, or None.
        deep_prompts: `DeepPromptTokens`, or None.
        gates: One `PromptGate` for each of the first blocks.
        temperatures: The learnable temperatures [1], one per block; empty if they are not learned.
    """

    def _set_parts(self, prompts, deep_prompts, gates, depth, learns_temperature, device, dtype):
        self.depth, self._is_seen = depth, False
        self._waiting = None if prompts is None else (0, None)  # forwards, hash in the first
        self.num_prompts = 0 if prompts is None else len(prompts.tokens)
        self.prompts = None if prompts is None else prompts.to(device, dtype)
        self.deep_prompts = None if deep_prompts is None else deep_prompts.to(device, dtype)
        self.gates = nn.ModuleList(gates).to(device)
        self.temperatures = Temperatures(depth if learns_temperature else 0, device)

    def added_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of prompts, gates and temperatures, by name, whether tuned or frozen."""
        parts = ("prompts", "deep_prompts", "gates", "temperatures")
        return {
            f"{part}.{name}": parameter
            for part in parts
            if getattr(self, part) is not None
            for name, parameter in getattr(self, part).named_parameters()
        }

    # ---- between the blocks ----

    def _closed(self, like: Tensor) -> Tensor | None:
        """The logit of a gate that is exactly 0, for blocks without a gate before deep prompts."""
        return None if self.deep_prompts is None else like.new_full((), -math.inf)

    def _gated(
        self,
        index: int,
        out: Tensor,
        x: Tensor,
        carrier: Tensor | None,
        start: int,
        closed: Tensor | None,
        may_write: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The input of block index + 1, and its carrier (see `prompt_gate_`).

        x and out [B, N, D] are the input and the output of block `index`, carrier is the carrier
        for x or None. may_write: out may be overwritten, because no other code can have kept it.
        """
        fresh = x
        if self.deep_prompts is not None and index + 1 < self.depth:
            fresh = self.deep_prompts(index + 1, out)
            carrier = fresh if torch.is_grad_enabled() and may_write else None
        if index < len(self.gates):
            gate = self.gates[index]
            gated = gate(out, fresh, start, self.num_prompts, carrier, inplace=may_write)
            return gated if carrier is not None else (gated, None)
        if fresh is not x:
            function = prompt_gate_ if may_write and not is_traced(out) else prompt_gate
            return function(out, fresh, closed, start, self.num_prompts), carrier
        return out, carrier

    def _tell_what_is_not_tuned(self, who: str) -> None:
        """Warns in the first forward in train mode if it can't tune the prompts, gates and
        temperatures, and later if the prompts get gradients but do not change."""
        if not self.training or torch.compiler.is_compiling():
            return
        if not self._is_seen:
            self._tell_what_is_frozen(who)
        if self._waiting is not None and torch.is_grad_enabled():
            self._tell_of_a_missing_optimizer(who)

    def _tell_what_is_frozen(self, who: str) -> None:
        added = self.added_parameters()
        frozen = [name for name, parameter in added.items() if not parameter.requires_grad]
        if not torch.is_grad_enabled():
            if len(frozen) == len(added):
                return
            warnings.warn(
                f"{who}: this forward in train mode runs under torch.no_grad, so prompts, gates "
                "and temperatures get no gradient; remove no_grad to tune them (in checkpointing: "
                "use_reentrant=False), or call model.eval() if you only evaluate",
                stacklevel=4,
            )
        elif frozen:
            warnings.warn(
                f"{who}: {len(frozen)} of {len(added)} parameters of prompts, gates and "
                f"temperatures are frozen, for example {frozen[0]!r}, and will not be tuned; if "
                "your script freezes parameters, let it do so before wrap or attach",
                stacklevel=4,
            )
        self._is_seen = True

    def _tell_of_a_missing_optimizer(self, who: str) -> None:
        tokens = self.prompts.tokens
        count, start = self._waiting
        if 0 < count < _PATIENCE:
            self._waiting = count + 1, start
            return
        is_capturing = tokens.is_cuda and torch.cuda.is_current_stream_capturing()
        is_sharded = hasattr(tokens, "device_mesh")
        if is_capturing or is_sharded or tokens.is_meta or is_traced(tokens) or dispatch_modes():
            self._waiting = None  # the values can't be read here
            return
        now = hash(tuple(tokens.detach().flatten().tolist()))  # a copy would stay in memory
        self._waiting = (1, now) if count == 0 else None
        # a gradient that zero_grad has not removed, or one of accumulation
        if count > 0 and tokens.grad is not None and now == start:
            warnings.warn(
                f"{who}: the prompts have a gradient and have not changed in {_PATIENCE} forwards "
                "in train mode; are they in the optimizer? gp.check(model, optimizer) says what is "
                "not",
                stacklevel=4,
            )

    # ---- tuning ----

    @torch.no_grad()
    def clamp_temperatures_(self) -> None:
        """Clamps the stored temperatures to [0.01, 10], as the original code does in forward."""
        for temperature in self.temperatures:
            temperature.clamp_(*TEMPERATURE_RANGE)

    @torch.no_grad()
    def gate_report(self) -> dict[str, list[float]]:
        """Returns the learned gates and temperatures, as lists of floats.

        Returns:
            "gates": g_l of each gated block; the mean if a gate has several elements. Empty for the
            linear gates, which depend on the tokens.
            "temperatures": tau_l of each block, clamped. Empty if they are not learned.
            "selection": The prompts after the last gate are a weighted sum of the initial prompts,
            with weight prod_l (1 - g_l), and of the output of each gated block l, with weight
            g_l * prod_{k>l} (1 - g_k). These weights, in this order; they sum to 1. Empty unless
            the gates are scalar, the rule is "mix" and there are no deep prompts.
        """
        logits = [gate.logit for gate in self.gates if gate.logit is not None]
        gates = [logit.double().sigmoid().mean().item() for logit in logits]
        selection = []
        is_selection = gates and self.deep_prompts is None
        if is_selection and self.gates[0].rule == "mix" and self.gates[0].gate == "scalar":
            passed = 1.0
            for g in reversed(gates):
                selection.insert(0, g * passed)
                passed *= 1 - g
            selection.insert(0, passed)
        temperatures = [t.clamp(*TEMPERATURE_RANGE).item() for t in self.temperatures]
        return {"gates": gates, "temperatures": temperatures, "selection": selection}


def warn_of_frozen_adapters(who: str, model: nn.Module, head: Iterable[nn.Parameter] = ()) -> None:
    """Warns if `who` freezes the trainable parameters of a model that is frozen for the most part,
    except its head: the user probably wants to tune these parameters."""
    of_head = {id(parameter) for parameter in head}
    trainable = {
        name: p.numel()
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in of_head
    }
    if 0 < sum(trainable.values()) < 0.5 * sum(p.numel() for p in model.parameters()):
        name = "vit" if who == "wrap" else "model"
        warnings.warn(
            f"{who}: {len(trainable)} parameters of {name} were trainable while most of {name} was "
            f"frozen, for example {next(iter(trainable))!r}; {who} has frozen them too; to tune "
            f"them as well, call requires_grad_(True) on them after {who}",
            stacklevel=3,
        )


def dropout_of(modules: Iterable[nn.Module]) -> list[str]:
    """Words for the dropout, stochastic depth and patch dropout among the modules."""
    found = set()
    for module in modules:
        kind = type(module).__name__
        rates = [getattr(module, name, 0) for name in ("p", "drop_prob", "prob")]
        rate = max((r for r in rates if isinstance(r, (int, float))), default=0)
        if ("Drop" in kind or kind == "StochasticDepth") and rate > 0:
            found.add(f"{kind} ({rate:g})")
    return sorted(found)


def groups_of(
    tuned: dict[str, nn.Parameter], lr: float, weight_decay: float, rates: dict[str, float | None]
) -> list[dict]:
    """Sorts tuned parameters into optimiser groups by the first part of their name. `rates` has the
    learning rates of some groups, in the order of the result; None means lr."""
    groups: dict[str, list] = {name: [] for name in rates}
    for name, parameter in tuned.items():
        groups.setdefault(name.split(".")[0].removeprefix("deep_"), []).append(parameter)
    return [
        {
            "name": name,
            "params": params,
            "lr": lr if rates.get(name) is None else rates[name],
            "weight_decay": 0.0 if name in ("gates", "temperatures") else weight_decay,
        }
        for name, params in groups.items()
        if params
    ]
