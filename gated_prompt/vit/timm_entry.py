# SPDX-License-Identifier: Apache-2.0
"""Wrapped models as models of timm, for timm's own scripts.

Importing this module registers `gpt_NAME` for each NAME of timm's VisionTransformers and Evas, with
the pretrained tags of NAME. timm's train.py imports it by an option:

    python train.py --device-modules gated_prompt.vit.timm_entry \
        --model gpt_vit_base_patch16_224.mae --pretrained --model-kwargs num_prompts=100 ...

It also runs scripts that have no such option, such as timm's validate.py:

    python -m gated_prompt.vit.timm_entry validate.py --model gpt_vit_base_patch16_224.mae ...
"""

from __future__ import annotations

import importlib
import inspect
import os
import runpy
import sys
from collections.abc import Callable

import timm
import torch
from timm.layers import is_scriptable
from timm.models import generate_default_cfgs, get_arch_pretrained_cfgs, register_model

from gated_prompt.vit.backbones import create_backbone
from gated_prompt.vit.model import GatedPromptViT
from gated_prompt.vit.wrap import wrap

_MODULES = ("vision_transformer", "eva", "deit")  # of timm.models; the last has DeiT III too
_OPTIONS = inspect.signature(wrap).parameters.keys() - {"vit"}


def _entry(name: str) -> Callable[..., GatedPromptViT]:
    """Returns timm's entry point of `gpt_{name}`."""

    def create(pretrained: bool = False, **kwargs) -> GatedPromptViT:
        """Creates timm's model and wraps it.

        timm drops arguments that are None before this function gets them. So for no gates give
        gated_blocks=0, not gate=None.

        Args:
            pretrained: Lets timm download the weights of the backbone.
            kwargs: Options of `wrap`; frozen_dtype may also be a name such as "bfloat16". All
                others go to `create_backbone`, which has `checkpoint` for a file and passes the
                rest to timm. `num_classes` is the size of the new head.

        Raises:
            RuntimeError: the model is to be scripted.
            TypeError, ValueError and others: from `create_backbone` and `wrap`.
        """
        if is_scriptable():
            raise RuntimeError(
                f"gpt_{name}: scriptable must be False, got True: torch.jit.script can't compile a "
                "wrapped model; use torch.compile (--torchcompile)"
            )
        options = {option: kwargs.pop(option) for option in _OPTIONS & kwargs.keys()}
        if isinstance(options.get("frozen_dtype"), str):  # from a command line
            name_of = options["frozen_dtype"]
            options["frozen_dtype"] = getattr(torch, name_of, name_of)
        overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}
        vit = create_backbone(
            name,
            pretrained=pretrained,
            num_classes=kwargs.pop("num_classes", None),
            pretrained_cfg_overlay={**overlay, "architecture": name},
            **kwargs,
        )
        return wrap(vit, **options)

    create.__name__ = create.__qualname__ = f"gpt_{name}"
    return create


def _run_script() -> None:
    """Runs the script sys.argv[1] with the arguments that follow, as `python` does."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m gated_prompt.vit.timm_entry SCRIPT.py [ARGUMENT ...]")
    importlib.import_module("gated_prompt.vit.timm_entry")  # this module, under its own name
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


__all__: list[str] = []  # register_model adds the names
if __name__ == "__main__":
    _run_script()
else:
    # the distilled DeiTs have a second head, which wrap refuses
    _names = timm.list_models(module=_MODULES, exclude_filters="*distilled*")
    default_cfgs = generate_default_cfgs(  # register_model looks for this name
        {f"gpt_{tag}": cfg for n in _names for tag, cfg in get_arch_pretrained_cfgs(n).items()}
    )
    for _name in _names:
        globals()[f"gpt_{_name}"] = register_model(_entry(_name))
