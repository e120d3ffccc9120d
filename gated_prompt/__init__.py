# SPDX-License-Identifier: Apache-2.0
"""Gated prompt tuning of frozen Vision Transformers (ICML 2023, arXiv 2306.05067).

The op and its modules need torch alone. `wrap` and what follows it need the extra `vit`; they are
imported when first used, so that importing this package stays light.
"""

import importlib

from gated_prompt.functional import (
    prompt_gate,
    prompt_gate_,
    prompt_gate_linear,
    prompt_gate_linear_,
)
from gated_prompt.modules import PromptGate, PromptTokens

__version__ = "0.1.0"

_LAZY = {
    "CheckpointError": "gated_prompt.checkpoint",
    "GatedPromptViT": "gated_prompt.vit",
    "create_backbone": "gated_prompt.backbones",
    "load_backbone": "gated_prompt.backbones",
    "load_official": "gated_prompt.backbones",
    "load_tuned": "gated_prompt.artifacts",
    "load_tuned_state_dict": "gated_prompt.artifacts",
    "read_checkpoint": "gated_prompt.checkpoint",
    "save_tuned": "gated_prompt.artifacts",
    "tempered_attention": "gated_prompt.attention",
    "tuned_state_dict": "gated_prompt.artifacts",
    "unwrap": "gated_prompt.vit",
    "wrap": "gated_prompt.vit",
}

__all__ = [
    "PromptGate",
    "PromptTokens",
    "prompt_gate",
    "prompt_gate_",
    "prompt_gate_linear",
    "prompt_gate_linear_",
    *sorted(_LAZY),
]


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LAZY])
