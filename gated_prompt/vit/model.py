# SPDX-License-Identifier: Apache-2.0
"""The model that `wrap` returns: a frozen timm ViT with prompts, gates, temperatures and a head."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gated_prompt.autograd import is_autocast
from gated_prompt.hooks import is_observed, is_untouched
from gated_prompt.prompting import GatedPrompts, groups_of
from gated_prompt.tempering import Tempering
from gated_prompt.vit.backbone_identity import describe
from gated_prompt.vit.embedding import embed, rope_with_prompts
from gated_prompt.vit.options import WrapOptions
from gated_prompt.vit.shortcuts import attention_of, run_block
from gated_prompt.vit.wrapping import (
    MARK,
    Wrapping,
    inside,
    patched_methods,
    says_patched,
    train_what_is_tuned,
    unpatched_name,
)

HEAD_INITS = ("new", "vpt")


class GatedPromptViT(GatedPrompts):
    """A frozen timm ViT with prompts, gates, temperatures and a head; made by `wrap`.

    `GatedPrompts` has the formula. Public attributes that the wrapper lacks are taken from the
    backbone: `blocks`, `patch_embed`, `pretrained_cfg`, ...

    Attributes:
        backbone: The timm model.
        prompts, deep_prompts, gates, temperatures: See `GatedPrompts`.
        head: The classifier.
        options: `WrapOptions`: the arguments of `wrap`, after `WrapOptions.resolved`.
            `wrap(other_vit, **vars(model.options))` wraps another backbone in the same way.
    """

    def __init__(
        self, vit, options: WrapOptions, prompts, deep_prompts, gates, head: str | nn.Module
    ):  # fmt: skip
        super().__init__()
        if MARK in vars(vit):  # vit is a copy of a wrapped model, or its wrapper was lost
            vars(vit)[MARK].undo(vit)
        self.options, self._is_wrapped, self._initial = options, True, {}
        Wrapping(vit)
        self.backbone = vit
        self._set_wrapper()
        device, temperature = next(vit.parameters()).device, options.temperature
        self._set_parts(
            prompts, deep_prompts, gates, len(vit.blocks), temperature is True,
            device, self._tuned_dtype(),
        )  # fmt: skip
        source = self.temperatures if temperature is True else float(temperature or 1.0)
        # without prompts, our version of timm's attention gains nothing
        restates = options.num_prompts or options.attention not in ("auto", "sdpa")
        restates = restates or options.last_block == "pooled-rows"
        self._backend = options.attention if restates else None
        self._temperings = [
            Tempering(attention_of(block), source, index) if options.has_temperature else None
            for index, block in enumerate(vit.blocks)
        ]
        self._wrapping.temperings = self._temperings
        if hasattr(vit, "_traits"):  # newer timm's record of the image size
            self._traits = vit._traits
        self._head_init = head if head in HEAD_INITS else "new"
        if head in HEAD_INITS:
            self.reset_classifier(vit.num_classes)
        else:
            self.head = copy.deepcopy(vit.head).requires_grad_(True) if head == "keep" else head
            self.head.to(device)
        self.train(vit.training)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            backbone = None if name.startswith("_") else self._modules.get("backbone")
            if backbone is None or not hasattr(backbone, name):
                raise
            return getattr(backbone, name)

    def __setstate__(self, state):
        super().__setstate__(state)
        if self._is_wrapped:
            self._set_wrapper()

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:
        if f"{prefix}patch_embed.proj.weight" in state_dict:
            raise RuntimeError(  # with strict=False, nothing would be loaded
                "GatedPromptViT: load_state_dict got the names of the bare backbone; load it "
                "before wrap, or into model.backbone"
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _set_wrapper(self) -> None:
        self._wrapping.wrapper = weakref.ref(self)

    @property
    def _wrapping(self) -> Wrapping:
        return getattr(self.backbone, MARK)

    def _tuned_dtype(self) -> torch.dtype:
        """float64 for a float64 backbone, otherwise float32. A narrower dtype would round small
        optimiser steps away."""
        is_double = any(p.dtype == torch.float64 for p in self.backbone.parameters())
        return torch.float64 if is_double else torch.float32

    @property
    def method(self) -> str:
        return self.options.method

    @property
    def pool(self) -> str:
        return self.options.pool

    # ---- timm's interface ----

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class token, registers, and prompts at the start."""
        at_start = self.prompts is not None and self.prompts.position == "start"
        return self.backbone.num_prefix_tokens + (self.num_prompts if at_start else 0)

    @property
    def num_features(self) -> int:
        return self.backbone.num_features

    @property
    def num_classes(self) -> int:
        sizes = [m.out_features for m in self.head.modules() if hasattr(m, "out_features")]
        return sizes[-1] if sizes else 0

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Makes a new linear head, initialised as `wrap` was told to. 0 classes: no head.

        global_pool: If given, changes the pool; timm's names "token" (the class token) and "avg"
        (the mean of the patches). With last_block="pooled-rows" this changes the time per step.
        """
        if global_pool is not None:
            pools = {"token": "cls", "avg": "patch"}
            if global_pool not in pools or (
                global_pool == "token" and self.backbone.cls_token is None
            ):
                raise ValueError(
                    f"reset_classifier: global_pool must be one of {tuple(pools)}, and 'token' "
                    f"only if vit has a class token, got {global_pool!r}"
                )
            self.options = dataclasses.replace(self.options, pool=pools[global_pool])
        if num_classes == 0:
            self.head = nn.Identity()
            return
        device = next(self.backbone.parameters()).device
        self.head = nn.Linear(
            self.backbone.num_features, num_classes, device=device, dtype=self._tuned_dtype()
        )
        if self._head_init == "vpt":
            nn.init.kaiming_normal_(self.head.weight, mode="fan_out")
            nn.init.constant_(self.head.bias, -math.log(99))
        else:
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that timm's optimiser factories exclude from weight decay."""
        own = {n for n, p in self.named_parameters() if n.startswith(("prompts.", "deep_prompts."))}
        own |= {n for n, _ in self.named_parameters() if n.startswith(("gates.", "temperatures."))}
        return own | {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that sort parameters into layers, for timm's layer-wise learning rate decay. The
        backbone's are sorted as timm sorts them. All others are in the last layer, with timm's
        head, where the learning rate is not decayed."""

        def in_backbone(pattern: str) -> str:
            return rf"^backbone\.(?:{pattern.removeprefix('^')})"

        return {
            layer: in_backbone(spec)
            if isinstance(spec, str)
            else [(in_backbone(pattern), order) for pattern, order in spec]
            for layer, spec in self.backbone.group_matcher(coarse).items()
        }

    def _replicate_for_data_parallel(self):
        raise RuntimeError(
            "GatedPromptViT: nn.DataParallel can't copy the changes that wrap made to the blocks; "
            "use DistributedDataParallel"
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block and its gate in backward, instead of keeping their activations."""
        self.backbone.set_grad_checkpointing(enable)

    def train(self, mode: bool = True) -> GatedPromptViT:
        """Sets the mode of the prompts, the head and the tuned modules of the backbone, including
        adapters. Frozen modules of the backbone stay in eval mode. With the methods "full" and
        "bias" the whole backbone gets the mode."""
        super().train(mode)
        vit = self.backbone
        if self.method not in ("full", "bias"):
            train_what_is_tuned(vit, mode)
        return self

    def forward_features(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> tokens [B, N, D] after the last block, before the final norm.

        timm returns them after the norm. The paper pools between the last block and the norm.
        """
        return self._in_backbone(images, self._run)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, N, D] -> logits [B, classes]; with pre_logits=True, the pooled and normed
        features [B, D]."""
        features = self._normed_mean(x[:, self._pooled_rows(x.shape[1])])
        return features if pre_logits else self._logits(features)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> logits [B, classes]."""
        return self._logits(self._in_backbone(images, self._features))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """Like timm's method: returns the tokens after the blocks that `indices` selects. The
        prompts are in the sequence while the blocks run.

        Args:
            indices: An int n: the last n blocks. A list: these blocks. None: all blocks.
            return_prefix_tokens: Adds the prefix tokens to each intermediate.
            norm: Applies the final norm to the intermediates.
            stop_early: Does not run the blocks after the last one of `indices`.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: Returns only the intermediates.

        Returns:
            (the tokens after the last block that ran, intermediates). An intermediate is the patch
            tokens after a block and its gate, [B, D, h, w] ("NCHW") or [B, h * w, D] ("NLC"). With
            return_prefix_tokens it is a pair of these and the `num_prefix_tokens` tokens before the
            patches, [B, N', D], including prompts at the start. Prompts at the end are left out.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(
                f"forward_intermediates: output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}"
            )
        kept = dict.fromkeys(_taken(indices, len(self.backbone.blocks)))
        depth = max(kept) + 1 if stop_early else None
        final = self._in_backbone(x, functools.partial(self._run, kept=kept, depth=depth))
        found, first, size = [], self.num_prefix_tokens, x.shape[-2:]
        border = -self.num_prompts if self._has_prompts_at_end() else None
        for tokens in kept.values():
            tokens = self.backbone.norm(tokens) if norm else tokens
            patches = tokens[:, first:border]
            if output_fmt == "NCHW":
                grid = self.backbone.patch_embed.dynamic_feat_size(size)
                patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
            found.append((patches, tokens[:, :first]) if return_prefix_tokens else patches)
        return found if intermediates_only else (final, found)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list:
        """Like timm's. See `forward_intermediates`."""
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm,
            output_fmt="NCHW" if reshape else "NLC", intermediates_only=True,
        )  # fmt: skip

    def remember_initial_values(self) -> None:
        """Lets `has_initial_values` compare with the values of now."""
        self._initial = {
            name: describe(parameter)
            for name, parameter in self.added_parameters().items()
            if not parameter.is_meta
        }

    def has_initial_values(self) -> bool:
        """True if prompts, gates and temperatures have the values that `wrap` gave them."""
        now, initial = self.added_parameters(), self._initial
        return bool(now) and all(n in initial and initial[n] == describe(now[n]) for n in now)

    def require_wrapped(self, what: str) -> None:
        """Raises RuntimeError if the model was unwrapped."""
        if not self._is_wrapped:
            raise RuntimeError(
                f"{what}: this wrapper was unwrapped; save what was tuned before unwrap, or wrap "
                "the backbone again"
            )

    # ---- the forward pass ----

    def _in_backbone(self, images: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """run(images), inside a call of the backbone, so that its hooks run."""
        self.require_wrapped("GatedPromptViT")
        vit = self.backbone
        if not torch.compiler.is_compiling():
            if patched := patched_methods(vit):
                raise RuntimeError(f"GatedPromptViT: {says_patched('vit', patched)}")
            if len(vit.blocks) != len(self._temperings):
                raise RuntimeError(
                    f"GatedPromptViT: the backbone must have {len(self._temperings)} blocks, as "
                    f"when it was wrapped, got {len(vit.blocks)}; unwrap, and wrap again"
                )
        if not isinstance(images, torch.fx.Proxy):
            self._check_dtype(images)
            self._tell_what_is_not_tuned("GatedPromptViT")
        return inside(vit, images, run)

    def _check_dtype(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(
                f"GatedPromptViT: images must be a tensor [B, C, H, W], got {type(images).__name__}"
            )
        if not images.is_floating_point():
            raise ValueError(
                f"GatedPromptViT: images must be [B, C, H, W] in floating point, got "
                f"{list(images.shape)} in {images.dtype}"
            )
        dtype, device = self.options.frozen_dtype, images.device.type
        if not self._wrapping.narrowed or dtype == images.dtype:
            return
        if not is_autocast(device) or torch.get_autocast_dtype(device) != dtype:
            raise RuntimeError(
                f"GatedPromptViT: frozen_dtype={dtype} needs torch.autocast({device!r}, {dtype}) "
                f"around the call, got images in {images.dtype} outside it"
            )

    def _features(self, images: Tensor) -> Tensor:
        """The features [B, D] that the head reads."""
        pooled_rows = self.options.last_block == "pooled-rows"
        x = self._run(images, pooled_rows)
        return self._normed_mean(x if pooled_rows else x[:, self._pooled_rows(x.shape[1])])

    def _run(
        self,
        images: Tensor,
        pooled_rows: bool = False,
        kept: dict[int, Tensor] | None = None,
        depth: int | None = None,
    ) -> Tensor:
        """images [B, C, H, W] -> tokens after the last block, or after the first `depth` blocks.

        pooled_rows: Compute and return only the rows of the last block that the pool reads.
        kept: A dict with indices of blocks as keys; gets the tokens after these blocks as values.
        """
        vit = self.backbone
        x, ropes = embed(vit, images)
        carrier = start = None
        if self.prompts is not None:
            x, carrier, start = self.prompts(x, vit.num_prefix_tokens)
            at_start = self.prompts.position == "start"
            ropes = [rope_with_prompts(rope, self.num_prompts, at_start) for rope in ropes]
        closed = self._closed(x)
        if not torch.is_grad_enabled() or is_observed(x):
            carrier = None
        embedded, last = x, len(vit.blocks) - 1

        def run(x: Tensor) -> Tensor:
            # a pre-hook of vit.blocks may replace x; the carrier would bypass it in backward
            passed = carrier if x is embedded else None
            for index in range(last + 1 if depth is None else depth):
                rows = self._pooled_rows(x.shape[1]) if pooled_rows and index == last else None
                arguments = (x, passed, index, start, ropes[index % len(ropes)], rows, closed)
                if vit.grad_checkpointing and torch.is_grad_enabled():
                    x, passed = checkpoint(self._gated_block, *arguments, use_reentrant=False)
                else:
                    x, passed = self._gated_block(*arguments)
                if kept is not None and index in kept:
                    kept[index] = x
            return x

        return inside(vit.blocks, x, run) if isinstance(vit.blocks, nn.Sequential) else run(x)

    def _gated_block(self, x, carrier, index, start, rope, rows, closed):
        """Runs block `index` and its gate, if it has one: x [B, N, D] and the carrier of the
        prompts' gradient (see `prompt_gate_`) -> both after the block. If rows is given, the
        returned x has only these rows."""
        block, is_low = self.backbone.blocks[index], self.options.memory == "low"
        tempering = self._temperings[index]
        if tempering is not None:
            is_learned = self.options.temperature is True
            source = self.temperatures if is_learned else tempering.temperatures
            tempering.follow(attention_of(block), source)
        out = run_block(block, x, rope, rows, tempering, self._backend, is_low)
        if tempering is not None:
            tempering.require_used(block)
        # the gate may overwrite out if no other code, such as a hook, can have kept it
        is_own = type(block).__module__.startswith("timm.") and is_untouched(block)
        is_own = is_own and not is_observed(x)
        return self._gated(index, out, x, carrier, start, closed, is_own)

    def _has_prompts_at_end(self) -> bool:
        return self.prompts is not None and self.prompts.position == "end"

    def _pooled_rows(self, num_tokens: int) -> slice:
        """The tokens whose mean is the input of the head."""
        first, size = self.backbone.num_prefix_tokens, self.num_prompts
        if self.pool == "cls":
            return slice(0, 1)
        if self.pool == "prompt+patch" or self.prompts is None:
            return slice(first, num_tokens)
        border = num_tokens - size if self.prompts.position == "end" else first + size
        prompts_first = self.prompts.position == "start"
        of_first_part = (self.pool == "prompt") == prompts_first
        return slice(first, border) if of_first_part else slice(border, num_tokens)

    def _normed_mean(self, x: Tensor) -> Tensor:
        """[B, M, D] -> [B, D]."""
        vit = self.backbone
        x = x[:, 0] if self.pool == "cls" else x.mean(dim=1)
        return vit.head_drop(vit.fc_norm(vit.norm(x)))  # one of the two norms is an Identity

    def _logits(self, features: Tensor) -> Tensor:
        weight = next(self.head.parameters(), None)
        if weight is None or isinstance(features, torch.fx.Proxy):
            return self.head(features)
        if not is_autocast(features.device.type):  # the head's dtype may be wider
            features = features.to(weight.dtype)
        return self.head(features)

    # ---- tuning ----

    def tuned_parameters(self) -> dict[str, nn.Parameter]:
        """Returns all tuned parameters by name: prompts.tokens, deep_prompts.tokens, gates.0.logit,
        temperatures.0, head.weight, ..., and backbone.NAME, with timm's name, for the backbone's.
        The names do not contain the prefixes that torch.compile and other wrappers insert."""
        self.require_wrapped("tuned_parameters")
        tuned = ((n, p) for n, p in self.named_parameters() if p.requires_grad)
        return {unpatched_name(name): parameter for name, parameter in tuned}

    def param_groups(
        self,
        lr: float,
        weight_decay: float = 0.0,
        gate_lr: float | None = None,
        temperature_lr: float | None = None,
        head_lr: float | None = None,
        backbone_lr: float | None = None,
    ) -> list[dict]:
        """Returns optimiser groups of the tuned parameters: "prompts", "gates", "temperatures",
        "backbone", "head", and one for each module or parameter that you added to the model.

        A learning rate of None means `lr`. Gates and temperatures get no weight decay, which would
        pull gates half open and temperatures to 0.
        """
        rates = {
            "prompts": None,
            "gates": gate_lr,
            "temperatures": temperature_lr,
            "backbone": backbone_lr,
            "head": head_lr,
        }
        return groups_of(self.tuned_parameters(), lr, weight_decay, rates)

    def gate_report(self) -> dict[str, list[float]]:
        self.require_wrapped("gate_report")
        return super().gate_report()

    gate_report.__doc__ = GatedPrompts.gate_report.__doc__

    def save_tuned(self, folder: str | os.PathLike, **options) -> Path:
        """See `gated_prompt.save_tuned`."""
        import gated_prompt  # here, because tuned_files imports this module

        return gated_prompt.save_tuned(self, folder, **options)


def _taken(indices: int | list[int] | None, depth: int) -> list[int]:
    """Returns the sorted blocks that timm's `indices` selects. None: all. An int n: the last n. A
    list: these, where negative indices count from the end."""
    if isinstance(indices, int):
        if not 1 <= indices <= depth:
            raise ValueError(
                f"forward_intermediates: indices must be in [1, {depth}], got {indices}"
            )
        return list(range(depth - indices, depth))
    taken = range(depth) if indices is None else indices
    if not all(-depth <= index < depth for index in taken):
        raise ValueError(
            f"forward_intermediates: indices must be in [{-depth}, {depth - 1}], got {indices}"
        )
    return sorted(index % depth for index in taken)
