# SPDX-License-Identifier: Apache-2.0
"""The options of `wrap`. Each is checked by itself, then with the backbone and the others."""

from __future__ import annotations

import dataclasses
import math
import re

import torch
from torch import nn

from gated_prompt.checks import DTYPES, RULES
from gated_prompt.modules import GATES, POSITIONS, PROMPT_INITS
from gated_prompt.prompting import number_of_gates
from gated_prompt.temperature import BACKENDS, TEMPERATURE_RANGE, unavailable_reason
from gated_prompt.tempering import is_one
from gated_prompt.vit.prompt_init import DATA_INITS
from gated_prompt.vit.shortcuts import ATTENTIONS, PRE_NORM_BLOCKS, attention_of, uncompiled

METHODS = ("linear", "full", "bias", "partial-k", "vpt-shallow", "vpt-deep", "gpt", "gpt-deep")
POOLS = ("cls", "patch", "prompt", "prompt+patch")
MEMORY = ("default", "low")
LAST_BLOCK = ("auto", "all-rows", "pooled-rows")


@dataclasses.dataclass(frozen=True)
class WrapOptions:
    """The arguments of `wrap`, without vit and init_images. See `wrap` for their meaning.

    Raises:
        TypeError, ValueError: an option has a wrong type, is unknown or out of range.
    """

    method: str
    num_prompts: int
    gate: str | None
    rule: str
    gate_init: float | None
    gated_blocks: int | None
    temperature: bool | float
    prompt_position: str
    prompt_dropout: float
    prompt_init: str
    pool: str | None
    attention: str
    memory: str
    last_block: str
    frozen_dtype: torch.dtype | None

    def __post_init__(self):
        for name in ("num_prompts", "gated_blocks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                if name == "gated_blocks" and value is None:
                    continue
                raise TypeError(f"wrap: {name} must be an int, got {type(value).__name__}")
        if not isinstance(self.temperature, (bool, int, float)):
            raise TypeError(
                f"wrap: temperature must be a bool or a float, got {self.temperature!r}"
            )
        if self.frozen_dtype not in (None, *DTYPES):
            raise TypeError(
                f"wrap: frozen_dtype must be one of {DTYPES}, got {self.frozen_dtype!r}"
            )
        if self.gate_init is not None and not math.isfinite(self.gate_init):
            raise ValueError(f"wrap: gate_init must be finite, got {self.gate_init}")
        for name, allowed in (
            ("method", METHODS),
            ("gate", (None, *GATES)),
            ("rule", RULES),
            ("prompt_position", POSITIONS),
            ("prompt_init", (*PROMPT_INITS, *DATA_INITS)),
            ("pool", (None, *POOLS)),
            ("attention", BACKENDS),
            ("memory", MEMORY),
            ("last_block", LAST_BLOCK),
        ):
            value = getattr(self, name)
            is_partial = isinstance(value, str) and re.fullmatch(r"partial-\d+", value)
            if name == "method" and is_partial:
                continue
            if value not in allowed or value == "partial-k":
                raise ValueError(f"wrap: {name} must be one of {allowed}, got {value!r}")
        low, high = TEMPERATURE_RANGE
        if not isinstance(self.temperature, bool) and not low <= self.temperature <= high:
            raise ValueError(
                f"wrap: temperature must be in [{low}, {high}], got {self.temperature}"
            )

    @property
    def has_prompts(self) -> bool:
        return self.method.startswith(("vpt", "gpt"))

    @property
    def has_temperature(self) -> bool:
        """True if a block's attention is divided by a temperature other than the constant 1."""
        return self.method.startswith("gpt") and not is_one(self.temperature)

    @property
    def tuned_blocks(self) -> int:
        """k of the method "partial-k", 0 for the other methods."""
        is_partial = self.method.startswith("partial-")
        return int(self.method.removeprefix("partial-")) if is_partial else 0

    def resolved(self, vit: nn.Module, has_images: bool) -> WrapOptions:
        """Returns the options for `vit`: pool, gated_blocks and last_block have values instead of
        None and "auto"; num_prompts, gated_blocks and temperature are 0 or False if `method` does
        not use them.

        Raises:
            TypeError: an option needs another kind of block or attention than vit has.
            RuntimeError: attention="xformers" can't run on this machine.
            ValueError: an option does not fit vit or another option.
        """
        if self.attention == "xformers" and unavailable_reason("xformers") is not None:
            reason = unavailable_reason("xformers")
            raise RuntimeError(f"wrap: attention='xformers' can't run: {reason}")
        depth, method = len(vit.blocks), self.method
        if self.has_prompts and self.num_prompts < 1:
            raise ValueError(
                f"wrap: num_prompts must be at least 1 for {method}, got {self.num_prompts}"
            )
        if self.has_prompts and (self.prompt_init in DATA_INITS) != has_images:
            needed = "takes no init_images" if has_images else "needs init_images, got none"
            raise ValueError(f"wrap: prompt_init={self.prompt_init!r} {needed}")
        if method.startswith("partial-") and not 1 <= self.tuned_blocks <= depth:
            raise ValueError(f"wrap: method 'partial-k' needs k in [1, {depth}], got {method!r}")
        if method.endswith("-deep") and depth == 1:
            raise ValueError(f"wrap: method {method!r} needs at least 2 blocks, and vit has 1")
        gated = self._gated_blocks(depth)
        pool = self._pool(vit)
        last_block = self._last_block(vit, pool, is_gated=gated == depth)
        self._require_known_blocks(vit, last_block)
        return dataclasses.replace(
            self,
            num_prompts=self.num_prompts if self.has_prompts else 0,
            gated_blocks=gated,
            temperature=self.temperature if method.startswith("gpt") else False,
            pool=pool,
            last_block=last_block,
        )

    def _gated_blocks(self, depth: int) -> int:
        if not self.method.startswith("gpt"):
            return 0
        if self.gate is None and self.gated_blocks:
            raise ValueError(
                f"wrap: gated_blocks must be 0 or None without a gate, got {self.gated_blocks}"
            )
        if self.gated_blocks is None:
            return number_of_gates(self.gate, self.rule, depth)
        if not 0 <= self.gated_blocks <= depth:
            raise ValueError(f"wrap: gated_blocks must be in [0, {depth}], got {self.gated_blocks}")
        return self.gated_blocks

    def _pool(self, vit: nn.Module) -> str:
        pool = _default_pool(vit) if self.pool is None else self.pool
        if pool == "prompt" and not self.has_prompts:
            raise ValueError(
                f"wrap: pool='prompt' needs prompts, and method {self.method!r} has none"
            )
        if pool == "cls" and vit.cls_token is None:
            raise ValueError("wrap: pool='cls' needs a class token, and vit has none")
        return pool

    def _last_block(self, vit: nn.Module, pool: str, is_gated: bool) -> str:
        last = vit.blocks[-1]
        if self.last_block == "auto":
            gains = self.has_prompts and pool in ("cls", "prompt") and not is_gated
            is_pooled = gains and _is_known(last) and _has_known_attention(last)
            return "pooled-rows" if is_pooled else "all-rows"
        if self.last_block == "pooled-rows" and is_gated:
            depth = len(vit.blocks)
            raise ValueError(
                "wrap: last_block='pooled-rows' needs a last block without a gate, got "
                f"gated_blocks={depth} of {depth}"
            )
        return self.last_block

    def _require_known_blocks(self, vit: nn.Module, last_block: str) -> None:
        pooled = vit.blocks[-1:] if last_block == "pooled-rows" else ()
        for block in vit.blocks if self.memory == "low" else pooled:
            if not _is_known(block):
                raise TypeError(
                    f"wrap: memory={self.memory!r} and last_block={last_block!r} need timm's "
                    f"Block or EvaBlock, got {type(block).__module__}.{type(block).__name__}; "
                    "memory='default' and last_block='all-rows' work with any block"
                )
        needs_all = self.has_temperature or self.attention not in ("auto", "sdpa")
        for block in vit.blocks if needs_all else pooled:
            if not _has_known_attention(block):
                attn = attention_of(block)
                raise TypeError(
                    "wrap: a temperature, attention='xformers' or 'math', and "
                    "last_block='pooled-rows' need blocks whose attn is a timm.layers.Attention, "
                    "AttentionRope or timm.models.eva.EvaAttention, got "
                    f"{type(attn).__module__}.{type(attn).__name__}; use temperature=False and the "
                    "defaults of the others, or shard or replace attn after wrap"
                )


def _default_pool(vit: nn.Module) -> str:
    config = getattr(vit, "pretrained_cfg", None) or {}
    tag = config.get("tag") if isinstance(config, dict) else getattr(config, "tag", None)
    source = getattr(vit, "_gated_prompt_source", None)  # set by load_backbone
    if source == "mae" or (tag is not None and tag.split(".")[-1].startswith("mae")):
        return "prompt+patch"
    if vit.global_pool == "token":
        return "cls"
    if getattr(vit, "pool_include_prefix", False):
        raise ValueError(
            f"wrap: pool must be one of {POOLS}, got None, for a backbone with "
            "pool_include_prefix=True, whose pool includes the class token in the mean"
        )
    if vit.global_pool == "avg" and isinstance(vit.norm, nn.Identity):
        return "patch"
    raise ValueError(
        f"wrap: pool must be one of {POOLS}, got None, for a backbone with global_pool="
        f"{vit.global_pool!r} and final norm {type(vit.norm).__name__}: this backbone norms before "
        "it pools, but the wrapped model norms after it pools, so you must choose the pool"
    )


def _is_known(block: nn.Module) -> bool:
    """True if the block computes x + scale(attn(norm1(x))), then x + scale(mlp(norm2(x)))."""
    return type(uncompiled(block)) in PRE_NORM_BLOCKS


def _has_known_attention(block: nn.Module) -> bool:
    return type(attention_of(block)) in ATTENTIONS
