# SPDX-License-Identifier: Apache-2.0
"""Gated prompt tuning of frozen Vision Transformers (ICML 2023, arXiv 2306.05067).

The op and its modules need only torch. The names in _LAZY are imported on first use, so that
importing this package stays light; all except `tempered_attention` need the extra `vit`.
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
    "CheckpointError": "gated_prompt.vit.checkpoint_file",
    "GatedPromptViT": "gated_prompt.vit.model",
    "attach": "gated_prompt.attaching",
    "check": "gated_prompt.checking",
    "create_backbone": "gated_prompt.vit.backbones",
    "detach": "gated_prompt.attaching",
    "load_attached": "gated_prompt.vit.whole_state",
    "load_backbone": "gated_prompt.vit.backbones",
    "load_official": "gated_prompt.vit.official",
    "load_tuned": "gated_prompt.vit.tuned_files",
    "load_tuned_state_dict": "gated_prompt.vit.tuned_state",
    "load_wrapped": "gated_prompt.vit.whole_state",
    "param_groups": "gated_prompt.attaching",
    "read_checkpoint": "gated_prompt.vit.checkpoint_file",
    "save_tuned": "gated_prompt.vit.tuned_files",
    "tempered_attention": "gated_prompt.temperature",
    "tuned_state_dict": "gated_prompt.vit.tuned_state",
    "unwrap": "gated_prompt.vit.wrap",
    "wrap": "gated_prompt.vit.wrap",
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
