# SPDX-License-Identifier: Apache-2.0
"""Gated prompts, and what the paper compares them with, around a frozen timm ViT."""

from __future__ import annotations

import functools
import math
import os
import re
import warnings
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from gated_prompt.attention import (
    BACKENDS,
    TEMPERATURE_RANGE,
    Temperatures,
    Tempering,
    original_norm,
    unavailable_reason,
)
from gated_prompt.functional import DTYPES, RULES, is_traced, prompt_gate, prompt_gate_
from gated_prompt.modules import (
    GATES,
    POSITIONS,
    PROMPT_INITS,
    DeepPromptTokens,
    PromptGate,
    PromptTokens,
)
from gated_prompt.ops import is_autocast
from gated_prompt.prompt_init import DATA_INITS, patch_tokens, prototypes

try:
    from timm.layers import PatchEmbed
    from timm.models._features import feature_take_indices
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    from gated_prompt.shortcuts import (
        ATTENTIONS,
        PRE_NORM_BLOCKS,
        attention_of,
        is_observed,
        is_untouched,
        run_block,
        uncompiled,
    )
except ModuleNotFoundError as error:  # timm
    raise ModuleNotFoundError(f"wrap: {error}; pip install 'gated-prompt[vit]'") from error

torch.fx.wrap("prompt_gate")  # a symbolic trace keeps calls of it as they are
METHODS = ("linear", "full", "bias", "partial-k", "vpt-shallow", "vpt-deep", "gpt", "gpt-deep")
POOLS = ("cls", "patch", "prompt", "prompt+patch")
MEMORY = ("default", "low")
LAST_BLOCK = ("auto", "all-rows", "pooled-rows")
_METHODS = {  # of timm's, which the wrapper restates; as they were when this was imported
    name: (getattr(VisionTransformer, name), getattr(Eva, name))
    for name in ("forward_head", "pool", "forward_features", "forward")
}
_CONTAINERS = (nn.Sequential.forward, nn.ModuleList.forward)
_MARK = "_gated_prompt_wrapping"  # on the timm model, while it is wrapped


def wrap(
    vit: nn.Module,
    method: str = "gpt",
    *,
    num_prompts: int = 100,
    gate: str | None = "scalar",
    rule: str = "mix",
    gate_init: float | None = None,
    gated_blocks: int | None = None,
    temperature: bool | float = True,
    prompt_position: str = "start",
    prompt_dropout: float = 0.1,
    prompt_init: str = "uniform",
    init_images: Tensor | Iterable | None = None,
    pool: str | None = None,
    attention: str = "auto",
    memory: str = "default",
    last_block: str = "auto",
    frozen_dtype: torch.dtype | None = None,
) -> GatedPromptViT:
    """Freezes a timm ViT and adds what `method` tunes.

    The instance `vit` is changed until `unwrap`: its parameters stop requiring gradients, and the
    attention of each block is replaced where the method has prompts. A new linear head with
    `vit.num_classes` outputs is made (none if that is 0), as VPT starts it: first losses are well
    above ln(classes); `vit.head` stays as it is, unused.

    Args:
        vit: A timm `VisionTransformer` or `Eva` (DINOv3, EVA-02 and others with rotary positions).
        method: What is tuned, each with the head:
            "linear": nothing else;
            "full": the backbone; "bias": its biases; "partial-k" ("partial-1", ...): its last k
            blocks and its final norm;
            "vpt-shallow": prompts that enter the first block; "vpt-deep": fresh prompts for every
            block, which replace what the last block made of its own;
            "gpt": prompts at the first block, a gate per block, a temperature per block;
            "gpt-deep": that with fresh prompts for every block: where the gate is closed they take
            the place of the last block's, as in vpt-deep, where it is open they have no effect.
        num_prompts: P. Not used by methods without prompts.
        gate, rule: See `PromptGate`; "gpt" and "gpt-deep" only. A gate for the block ("scalar"),
            each channel ("channel"), each prompt ("token"), both ("full"); or decided by each
            prompt's own output, for each channel ("linear") or all ("linear-token"). rule: "mix" or
            "residual". gate=None: temperatures alone.
        gate_init: The `init` of `PromptGate`; None: nearly closed, -5, but for the linear gates,
            which start near 0.5.
        gated_blocks: How many blocks, from the first, have a gate. None: all but the last
            (rule="mix"), all (rule="residual").
        temperature: "gpt" and "gpt-deep" only. True: learnable in every block, from 1. False: 1. A
            float: that constant.
        prompt_position, prompt_dropout: See `PromptTokens`.
        prompt_init: "uniform" or "normal", see `PromptTokens`; or from the patch tokens of
            init_images as they enter the block (position embeddings in them): "mean",
            "random-token", "kmeans", see `gated_prompt.prompt_init.prototypes`.
        init_images: For these: [M, C, H, W], or an iterable of batches, which may be (images,
            labels) pairs; normalised as for training, without augmentation.
        pool: What the head reads. "cls": the class token. "patch", "prompt", "prompt+patch": the
            mean of these tokens. The backbone's own final norm comes after. None: "prompt+patch"
            for MAE (as in the paper; told by timm's tag, or by `load_backbone`), else what the
            backbone was built with; it must be said for one that norms before it pools (DINOv3,
            SigLIP).
        attention: Backend, see `tempered_attention`. Methods without prompts keep timm's own
            attention where it is "auto" or "sdpa".
        memory: "low": the MLP's hidden layer, 4 of the 10 activations of size D that a frozen block
            keeps for each token, is computed a second time in backward: the same gradients.
        last_block: "pooled-rows": `forward` computes, in the last block, only the tokens that the
            pool reads; the same logits. Not where the last block has a gate. "all-rows": all.
            "auto": "pooled-rows" for prompted methods where it gains much, pool="cls" and
            "prompt", and can be had.
        frozen_dtype: Keeps the weights of frozen linear and convolution layers in this dtype, such
            as torch.bfloat16, for use under autocast to it, which otherwise casts them each time
            they are used. `unwrap` puts the original back, which until then lies on the CPU.

    Returns:
        A `GatedPromptViT`.

    Raises:
        TypeError: vit is not one of these models, or one of its blocks has an attention that can't
            have a temperature.
        ValueError: an option is unknown or out of range, or does not go with another.
        RuntimeError: vit is wrapped already, or attention can't run on this machine.

    Source: Yoo et al., ICML 2023, arXiv 2306.05067, sections 3.2 and 3.3; head, prompt
    initialisation and the methods compared as in Jia et al., ECCV 2022 (VPT).
    """
    options = {
        name: value for name, value in locals().items() if name not in ("vit", "init_images")
    }
    check_backbone(vit)
    _check_options(options)
    options = _resolve(vit, options, init_images)
    prompts, deep_prompts, gates = make_tuned(vit, options)
    # nothing above has changed vit
    _warn_of_frozen_adapters(vit)
    model = GatedPromptViT(vit, options, prompts, deep_prompts, gates)
    if method in ("full", "bias"):
        _thaw(vit, biases_alone=method == "bias")
    elif method.startswith("partial-"):
        _thaw(nn.ModuleList([*vit.blocks[-_tuned_blocks(method) :], vit.norm, vit.fc_norm]))
    try:
        if prompts is not None and init_images is not None:
            model._init_prompts(init_images, prompt_init)
        if frozen_dtype is not None:
            model._wrapping.narrow(vit, frozen_dtype)
    except Exception:
        unwrap(model)
        raise
    model._warn_of_coarse_parameters()
    return model


def unwrap(model: GatedPromptViT | nn.Module) -> nn.Module:
    """The timm model as it was before `wrap`: requires_grad, train mode, dtypes. What others have
    put on it since stays.

    What "full", "bias" and "partial-k" have tuned of it stays tuned. The wrapper is of no use
    afterwards: save what was tuned before.

    Args:
        model: What `wrap` returned; or the timm model that it was given, if that was lost.
    """
    if isinstance(model, GatedPromptViT):
        model.require_wrapped("unwrap")
        model = model.backbone
    wrapping = vars(model).get(_MARK) if isinstance(model, nn.Module) else None
    if wrapping is None:
        raise TypeError(
            "unwrap: model must be what wrap returned (of a compiled or parallel one, ._orig_mod "
            f"or .module), or its backbone, got {type(model).__name__}"
        )
    wrapping.undo(model)
    return model


class _Wrapping:
    """What `wrap` changes of a timm model, and what it was.

    It lies on the model, so that a model whose wrapper was lost, and a copy of a wrapped model, can
    be unwrapped, too. Parameters are remembered by module and name: `load_state_dict(assign=True)`
    and others put new ones in their place.
    """

    def __init__(self, vit: nn.Module):
        self.wrapper = None  # a weak reference
        self.training = [(module, module.training) for module in vit.modules()]
        self.requires_grad = [(m, n, p, p.requires_grad) for m, n, p in _own_parameters(vit)]
        self.narrowed: list[tuple[nn.Module, str, Tensor]] = []  # originals, on the CPU
        self.temperings: list[Tempering | None] = []
        setattr(vit, _MARK, self)
        vit.requires_grad_(False)
        for module in _callable_parts(vit):
            module.forward = functools.partial(_forward_or_run, module)

    def __getstate__(self):
        return {**vars(self), "wrapper": None}

    def is_in_use(self, vit: nn.Module) -> bool:
        wrapper = None if self.wrapper is None else self.wrapper()
        return wrapper is not None and wrapper.backbone is vit

    def narrow(self, vit: nn.Module, dtype: torch.dtype) -> None:
        seen = set()
        for module, name, parameter in _own_parameters(vit):
            if not isinstance(module, (nn.Linear, nn.Conv2d)) or id(parameter) in seen:
                continue
            if parameter.is_meta:
                raise ValueError("wrap: frozen_dtype needs weights, and vit is on the meta device")
            if not parameter.requires_grad:
                seen.add(id(parameter))
                self.narrowed.append((module, name, parameter.data.cpu()))
                parameter.data = parameter.data.to(dtype)

    def originals(self) -> dict[int, Tensor]:
        """{id of a parameter: its value in the dtype that it had}, of those that were narrowed."""
        found = {}
        for module, name, original in self.narrowed:
            for parameter in _parameters_now(module, name):
                now = parameter.data.cpu()
                is_old = torch.equal(original.to(now.dtype), now)  # else others were loaded
                found[id(parameter)] = original if is_old else now.to(original.dtype)
        return found

    def undo(self, vit: nn.Module) -> None:
        if self.is_in_use(vit):
            self.wrapper()._is_wrapped = False
        delattr(vit, _MARK)
        for module in _callable_parts(vit):
            if has_our_forward(module):
                del module.forward
        for tempering in self.temperings:
            if tempering is not None:
                tempering.leave()
        for module in [
            m for m in vit.modules() if isinstance(getattr(m, "q_norm", None), Tempering)
        ]:
            module.q_norm = original_norm(module.q_norm)  # a copy's
        originals = self.originals()
        for parameter in vit.parameters():
            if id(parameter) in originals:
                parameter.data = originals[id(parameter)].to(parameter.device)
        for module, name, parameter, requires_grad in self.requires_grad:
            for now in (parameter, *_parameters_now(module, name)):
                now.requires_grad_(requires_grad)
        for module, training in self.training:
            module.training = training


def is_wrapped(vit: nn.Module) -> bool:
    """Whether a wrapper uses this timm model; no copy of such a model is in use."""
    wrapping = vars(vit).get(_MARK)
    return wrapping is not None and wrapping.is_in_use(vit)


def originals_of(vit: nn.Module) -> dict[int, Tensor]:
    """{id of a parameter: its value as it was} of those that frozen_dtype has narrowed."""
    return vars(vit)[_MARK].originals() if _MARK in vars(vit) else {}


def _own_parameters(model: nn.Module):
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter


def _parameters_now(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameter of this name, or what pruning, weight norm or a parametrisation has made of
    it."""
    own = module._parameters
    found = [own.get(name + end) for end in ("", "_orig", "_g", "_v")]
    if parametrize.is_parametrized(module, name):
        found += module.parametrizations[name].parameters(recurse=False)
    return [parameter for parameter in found if parameter is not None]


def _callable_parts(vit: nn.Module) -> list[nn.Module]:
    """The timm model and its sequence of blocks, whose calls the wrapper fills with its own work:
    so their hooks, and what shards or offloads their own parameters, take part."""
    return [vit, *([vit.blocks] if isinstance(vit.blocks, nn.Sequential) else [])]


def _forward_or_run(module: nn.Module, x: Tensor, *args, run: Callable | None = None, **kwargs):
    """In place of the forward of the instance."""
    return type(module).forward(module, x, *args, **kwargs) if run is None else run(x)


def has_our_forward(module: nn.Module) -> bool:
    return getattr(vars(module).get("forward"), "func", None) is _forward_or_run


def _inside(module: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """run(x), inside of a call of the module."""
    if has_our_forward(module) or hasattr(module, "_hf_hook"):  # accelerate's is around ours
        if torch.compiler.is_compiling():
            return module(x, run=run)
        calls = []
        out = module(x, run=lambda x: calls.append(x) or run(x))
        if not calls:
            raise RuntimeError(
                f"GatedPromptViT: a hook of {type(module).__name__} has dropped the argument `run` "
                "by which the wrapper does its work; it must return the kwargs that it is given"
            )
        return out
    if not is_untouched(module):
        raise RuntimeError(
            f"GatedPromptViT: the forward of {type(module).__name__} was replaced after wrap, or "
            "the module itself, and it has hooks; unwrap, and wrap again"
        )
    return run(x)


_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unpatched_name(name: str) -> str:
    """A parameter's name without the parts that `wrap`, torch.compile, FSDP and checkpoint wrappers
    put in."""
    return _WRAPPERS.sub("", name).replace(".attn.q_norm.norm.", ".attn.q_norm.")


class GatedPromptViT(nn.Module):
    """A frozen timm ViT with prompts, gates, temperatures and a head; made by `wrap`.

    The prompts enter once, before the first block. After block l, their rows become
    g_l * block_l(x) + (1 - g_l) * x on the prompt rows (rule "mix"), which the fused op writes in
    place. With deep prompts, x in this formula is the fresh prompts of block l + 1; where block l
    has no gate, g_l = 0.

    What the wrapper does not have itself, it takes from the backbone: `blocks`, `patch_embed`,
    `pretrained_cfg`, ...

    Attributes:
        backbone: The timm model; what is frozen of it is always in eval mode.
        prompts: `PromptTokens`, or None.
        deep_prompts: `DeepPromptTokens`, or None.
        gates: A `PromptGate` for each of the first blocks.
        temperatures: A sequence of the learnable temperatures [1], one per block, or none.
        head: The classifier.
        options: What `wrap` was given, defaults resolved.
    """

    def __init__(self, vit, options, prompts, deep_prompts, gates):
        super().__init__()
        if _MARK in vars(vit):  # a copy, or its wrapper was lost
            vars(vit)[_MARK].undo(vit)
        self.options, self._is_wrapped = options, True
        _Wrapping(vit)
        self.backbone = vit
        self._set_wrapper()
        device, dtype = next(vit.parameters()).device, self._tuned_dtype()
        self.prompts = None if prompts is None else prompts.to(device, dtype)
        self.deep_prompts = None if deep_prompts is None else deep_prompts.to(device, dtype)
        self.gates = nn.ModuleList(gates).to(device)
        temperature, depth = options["temperature"], len(vit.blocks)
        self.temperatures = Temperatures(depth if temperature is True else 0, device)
        source = self.temperatures if temperature is True else float(temperature or 1.0)
        # without prompts nothing is gained by restating timm's attention
        restates = options["num_prompts"] or options["attention"] not in ("auto", "sdpa")
        restates = restates or options["last_block"] == "pooled-rows"
        self._backend = options["attention"] if restates else None
        self._temperings = [
            None if source == 1.0 else Tempering(attention_of(block), source, index)
            for index, block in enumerate(vit.blocks)
        ]
        self._wrapping.temperings = self._temperings
        self.reset_classifier(vit.num_classes)
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

    def _set_wrapper(self) -> None:
        self._wrapping.wrapper = weakref.ref(self)

    @property
    def _wrapping(self) -> _Wrapping:
        return getattr(self.backbone, _MARK)

    def _tuned_dtype(self) -> torch.dtype:
        """float32, or float64 for such a backbone: a step of an optimiser would be lost in less."""
        is_double = any(p.dtype == torch.float64 for p in self.backbone.parameters())
        return torch.float64 if is_double else torch.float32

    @property
    def method(self) -> str:
        return self.options["method"]

    @property
    def pool(self) -> str:
        return self.options["pool"]

    @property
    def num_prompts(self) -> int:
        return self.options["num_prompts"]

    # ---- timm's face ----

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
        """A new head: weights Kaiming normal (fan_out), biases -ln(99). 0 classes: no head.

        global_pool: Another pool, by timm's name, "token" or "avg" (the patches). With last_block
        "pooled-rows" it may cost or gain time.
        """
        if global_pool is not None:
            pools = {"token": "cls", "avg": "patch"}
            if global_pool not in pools or (
                global_pool == "token" and self.backbone.cls_token is None
            ):
                raise ValueError(
                    f"reset_classifier: global_pool must be one of {tuple(pools)}, and vit have a "
                    f"class token for 'token', got {global_pool!r}"
                )
            self.options["pool"] = pools[global_pool]
        if num_classes == 0:
            self.head = nn.Identity()
            return
        device = next(self.backbone.parameters()).device
        self.head = nn.Linear(
            self.backbone.num_features, num_classes, device=device, dtype=self._tuned_dtype()
        )
        nn.init.kaiming_normal_(self.head.weight, mode="fan_out")
        nn.init.constant_(self.head.bias, -math.log(99))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm's optimiser factories leave out of weight decay."""
        own = {n for n, p in self.named_parameters() if n.startswith(("prompts.", "deep_prompts."))}
        own |= {n for n, _ in self.named_parameters() if n.startswith(("gates.", "temperatures."))}
        return own | {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layers, for timm's layer-wise decay of the learning rate."""
        stem = r"^(?:prompts|backbone\.(?:cls_token|reg_token|pos_embed|patch_embed|norm_pre|rope))"
        blocks = (r"^(?:backbone\.blocks|temperatures)\.(\d+)", None)
        return {"stem": stem, "blocks": [blocks, (r"^backbone\.(?:fc_)?norm", (99999,))]}

    def _replicate_for_data_parallel(self):
        raise RuntimeError(
            "GatedPromptViT: nn.DataParallel can't copy what wrap changed of the blocks; use "
            "DistributedDataParallel"
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block, with its gate, in backward instead of keeping its activations."""
        self.backbone.set_grad_checkpointing(enable)

    def train(self, mode: bool = True) -> GatedPromptViT:
        """Sets the mode of prompts, head and what is tuned of the backbone, adapters in it as well;
        what is frozen of it stays in eval mode."""
        super().train(mode)
        vit = self.backbone
        if self.method not in ("full", "bias"):
            _train_what_is_tuned(vit, mode)
        return self

    def forward_features(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> tokens [B, N, D] after the last block.

        Before the final norm, unlike timm's: the paper's pools come between the two.
        """
        return self._in_backbone(images, self._run)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, N, D] -> logits [B, classes]; pre_logits=True: pooled, normed [B, D]."""
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
        """As timm's: what follows the blocks of `indices` (of the last n; all), with the prompts at
        work.

        Returns:
            (`forward_features(x)`, intermediates), or the latter alone: the patch tokens after each
            block and its gate, [B, D, h, w] or ("NLC") [B, h * w, D]; with return_prefix_tokens
            pairs of these and `num_prefix_tokens` tokens [B, N', D], to which prompts at the start
            belong; prompts at the end are left out. norm: after the final norm. stop_early: the
            blocks behind the last one that is wanted do not run.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(
                f"forward_intermediates: output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}"
            )
        taken, last = feature_take_indices(len(self.backbone.blocks), indices)
        kept = dict.fromkeys(sorted(taken))
        depth = last + 1 if stop_early else None
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
        """As timm's: see `forward_intermediates`."""
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm,
            output_fmt="NCHW" if reshape else "NLC", intermediates_only=True,
        )  # fmt: skip

    def require_wrapped(self, what: str) -> None:
        """Raises RuntimeError once the model was unwrapped."""
        if not self._is_wrapped:
            raise RuntimeError(
                f"{what}: this wrapper was unwrapped; save what was tuned before unwrap, or wrap "
                "the backbone again"
            )

    # ---- the forward pass ----

    def _in_backbone(self, images: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """run(images), as the work of a call of the backbone."""
        self.require_wrapped("GatedPromptViT")
        vit = self.backbone
        if not torch.compiler.is_compiling():
            if patched := _patched(vit):
                raise RuntimeError(f"GatedPromptViT: {_says_patched('vit', patched)}")
            if len(vit.blocks) != len(self._temperings):
                raise RuntimeError(
                    f"GatedPromptViT: the backbone must have {len(self._temperings)} blocks, as "
                    f"when it was wrapped, got {len(vit.blocks)}; unwrap, and wrap again"
                )
        if not isinstance(images, torch.fx.Proxy):
            self._check_dtype(images)
        return _inside(vit, images, run)

    def _check_dtype(self, images: Tensor) -> None:
        if not images.is_floating_point():
            raise ValueError(
                f"GatedPromptViT: images must be [B, C, H, W] in floating point, got "
                f"{list(images.shape)} in {images.dtype}"
            )
        dtype, device = self.options["frozen_dtype"], images.device.type
        if not self._wrapping.narrowed or dtype == images.dtype:
            return
        if not is_autocast(device) or torch.get_autocast_dtype(device) != dtype:
            raise RuntimeError(
                f"GatedPromptViT: frozen_dtype={dtype} needs torch.autocast({device!r}, {dtype}) "
                f"around the call, got none for images in {images.dtype}"
            )

    def _features(self, images: Tensor) -> Tensor:
        """What the head reads, [B, D]."""
        pooled_rows = self.options["last_block"] == "pooled-rows"
        x = self._run(images, pooled_rows)
        return self._normed_mean(x if pooled_rows else x[:, self._pooled_rows(x.shape[1])])

    def _run(
        self,
        images: Tensor,
        pooled_rows: bool = False,
        kept: dict[int, Tensor] | None = None,
        depth: int | None = None,
    ) -> Tensor:
        """Tokens after the last block, or the first `depth`: all, or those that the pool reads.
        kept: gets the tokens after the blocks that are its keys."""
        vit = self.backbone
        x, ropes = self._embed(images)
        carrier = start = closed = None
        if self.prompts is not None:
            x, carrier, start = self.prompts(x, vit.num_prefix_tokens)
            ropes = [self._rope_with_prompts(rope) for rope in ropes]
        if self.deep_prompts is not None:
            closed = x.new_full((), -math.inf)  # the logit of a gate that is exactly 0
        if not torch.is_grad_enabled() or is_observed(x):
            carrier = None
        embedded, last = x, len(vit.blocks) - 1

        def run(x: Tensor) -> Tensor:
            # what a hook of the blocks has made of x does not pass its gradient on to the carrier
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

        return _inside(vit.blocks, x, run) if isinstance(vit.blocks, nn.Sequential) else run(x)

    def _embed(self, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Tokens that enter the first block, [B, N, D], and timm's rotary embeddings: one for all
        blocks, or one for each."""
        vit = self.backbone
        is_symbolic = isinstance(images, torch.fx.Proxy)
        if not is_symbolic and (images.dim() != 4 or not images.is_floating_point()):
            raise ValueError(
                "GatedPromptViT: images must be [B, C, H, W] in floating point, got "
                f"{list(images.shape)} in {images.dtype}"
            )
        size = None if is_symbolic else vit.patch_embed.img_size
        if vit.patch_embed.strict_img_size and size and tuple(images.shape[-2:]) != tuple(size):
            raise ValueError(
                f"GatedPromptViT: images must be {size[0]} x {size[1]}, as the backbone was built "
                f"(img_size=, or set_input_size() before wrap), got {images.shape[-2]} x "
                f"{images.shape[-1]}"
            )
        x, rope = vit._pos_embed(vit.patch_embed(images)), None
        if isinstance(x, tuple):  # Eva, which has dropped patches already
            x, rope = x
        else:
            x = vit.patch_drop(x)
        is_own = rope is not None and getattr(vit, "rope_mixed", False)
        return vit.norm_pre(x), list(rope) if is_own else [rope]

    def _rope_with_prompts(self, rope: Tensor | None) -> Tensor | None:
        """rope [..., N, 2d], sines before cosines, with a rotation by 0 for each prompt."""
        if rope is None:
            return None
        still = torch.zeros_like(rope[..., :1, :])
        still[..., rope.shape[-1] // 2 :] = 1
        still = still.expand(*still.shape[:-2], self.num_prompts, -1)
        at_start = self.prompts.position == "start"
        return torch.cat([still, rope] if at_start else [rope, still], dim=-2)

    def _gated_block(self, x, carrier, index, start, rope, rows, closed):
        """Block `index` and its gate, if it has one: x [B, N, D] and the carrier of the prompts'
        gradient (see `prompt_gate_`) -> the same after it; or of x these rows alone."""
        block, is_low = self.backbone.blocks[index], self.options["memory"] == "low"
        tempering = self._temperings[index]
        if tempering is not None:
            is_learned = self.options["temperature"] is True
            source = self.temperatures if is_learned else tempering.temperatures
            tempering.follow(attention_of(block), source)
        out = run_block(block, x, rope, rows, tempering, self._backend, is_low)
        # of nobody else can it be, and be seen when it is overwritten
        is_own = type(block).__module__.startswith("timm.") and is_untouched(block)
        is_own = is_own and not is_observed(x)
        fresh, is_last = x, index == len(self.backbone.blocks) - 1
        if self.deep_prompts is not None and not is_last:
            fresh = self.deep_prompts(index + 1, out)
            carrier = fresh if torch.is_grad_enabled() and is_own else None
        if index < len(self.gates):
            gate = self.gates[index]
            gated = gate(out, fresh, start, self.num_prompts, carrier, inplace=is_own)
            return gated if carrier is not None else (gated, None)
        if fresh is not x:
            function = prompt_gate_ if is_own and not is_traced(out) else prompt_gate
            return function(out, fresh, closed, start, self.num_prompts), carrier
        return out, carrier

    def _has_prompts_at_end(self) -> bool:
        return self.prompts is not None and self.prompts.position == "end"

    def _pooled_rows(self, num_tokens: int) -> slice:
        """The tokens whose mean the head reads."""
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
        return vit.head_drop(vit.fc_norm(vit.norm(x)))  # timm has one norm, the other is Identity

    def _logits(self, features: Tensor) -> Tensor:
        weight = next(self.head.parameters(), None)
        if weight is None or isinstance(features, torch.fx.Proxy):
            return self.head(features)
        if not is_autocast(features.device.type):  # the head may be wider
            features = features.to(weight.dtype)
        return self.head(features)

    # ---- tuning ----

    @torch.no_grad()
    def clamp_temperatures_(self) -> None:
        """Clamps the stored temperatures to [0.01, 10], as the original code does in forward."""
        for temperature in self.temperatures:
            temperature.clamp_(*TEMPERATURE_RANGE)

    def tuned_parameters(self) -> dict[str, nn.Parameter]:
        """All that is tuned, by names that do not depend on what torch.compile and others put in:
        prompts.tokens, deep_prompts.tokens, gates.0.logit, temperatures.0, head.weight, and
        backbone. before timm's name."""
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
        """Optimiser groups "prompts", "gates", "temperatures", "backbone" (what is tuned of it),
        "head", and one for each module that was added to the model; a rate of None is `lr`. Gates
        and temperatures get no weight decay, which would pull gates half open and temperatures to
        0."""
        rates = {
            "prompts": None,
            "gates": gate_lr,
            "temperatures": temperature_lr,
            "backbone": backbone_lr,
            "head": head_lr,
        }
        groups: dict[str, list] = {name: [] for name in rates}
        for name, parameter in self.tuned_parameters().items():
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

    @torch.no_grad()
    def gate_report(self) -> dict[str, list[float]]:
        """What was learned, as floats.

        Returns:
            "gates": g_l of each gated block, the mean where a gate has several elements; empty for
            the linear gates, which depend on the tokens. "temperatures": tau_l of each block where
            it is learned, clamped. "selection": for scalar gates of rule "mix" without deep
            prompts, the weight in the prompts after the last gate of the initial prompts,
            prod_l (1 - g_l), then of each gated block, g_l * prod_{k>l} (1 - g_k); they sum to 1.
        """
        self.require_wrapped("gate_report")
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

    def save_tuned(self, folder: str | os.PathLike, **options) -> Path:
        """See `gated_prompt.save_tuned`."""
        import gated_prompt  # artifacts stands above this module

        return gated_prompt.save_tuned(self, folder, **options)

    # ---- for wrap ----

    def _warn_of_coarse_parameters(self) -> None:
        coarse = {p.dtype for p in self.parameters() if p.requires_grad} - {
            torch.float32, torch.float64,
        }  # fmt: skip
        if coarse:
            warnings.warn(
                f"wrap: method {self.method!r} tunes parameters of the backbone in "
                f"{', '.join(map(str, coarse))}, where small steps of an optimiser are lost; give "
                "it a float32 backbone and use torch.autocast",
                stacklevel=3,
            )

    @torch.no_grad()
    def _init_prompts(self, images: Tensor | Iterable, init: str) -> None:
        vit, device = self.backbone, self.prompts.tokens.device
        depth = 1 if self.deep_prompts is None else len(vit.blocks)

        def tokens_of(batch: Tensor) -> list[Tensor]:
            found = []

            def run(images: Tensor) -> Tensor:
                x, ropes = self._embed(images)
                for index in range(depth):
                    if index > 0:
                        rope = ropes[(index - 1) % len(ropes)]
                        x = vit.blocks[index - 1](x, **({} if rope is None else {"rope": rope}))
                    found.append(x[:, vit.num_prefix_tokens :])
                return x

            self._in_backbone(batch.to(device), run)
            return found

        first, *deep = (
            prototypes(tokens, self.num_prompts, init) for tokens in patch_tokens(tokens_of, images)
        )
        self.prompts.tokens.copy_(first)
        if deep:
            self.deep_prompts.tokens.copy_(torch.stack(deep))


# ---- checks, and what is known of timm's blocks ----


def check_backbone(vit) -> None:
    if hasattr(vit, "_orig_mod"):
        raise TypeError(
            "wrap: vit must be a timm VisionTransformer or Eva, got a compiled one; wrap "
            "vit._orig_mod, and compile what wrap returns"
        )
    if isinstance(vit, GatedPromptViT):
        raise TypeError(
            "wrap: vit must be a timm VisionTransformer or Eva, got a model that is wrapped already"
        )
    if not isinstance(vit, (VisionTransformer, Eva)):
        raise TypeError(
            "wrap: vit must be a timm.models.vision_transformer.VisionTransformer or a "
            f"timm.models.eva.Eva, got {type(vit).__module__}.{type(vit).__name__}"
        )
    for name, known in _METHODS.items():
        if getattr(type(vit), name) not in known:
            raise TypeError(
                f"wrap: vit must have the {name} of its base class, got {type(vit).__name__}'s own"
            )
    if type(vit.patch_embed) is not PatchEmbed:
        raise TypeError(
            "wrap: vit must have a timm.layers.PatchEmbed, got "
            f"{type(vit.patch_embed).__module__}.{type(vit.patch_embed).__name__}"
        )
    if is_wrapped(vit):
        raise RuntimeError("wrap: vit is wrapped already; call unwrap(vit) first")
    patched = _patched(vit)
    for module in _callable_parts(vit):
        if "forward" in vars(module) and not has_our_forward(module):
            patched.append("forward")
    if patched:
        raise RuntimeError(f"wrap: {_says_patched('vit', patched)}")


def _patched(vit: nn.Module) -> list[str]:
    """Which of timm's methods that the wrapper restates are not timm's."""
    found = [name for name in _METHODS if name in vars(vit) and name != "forward"]
    found += [n for n, known in _METHODS.items() if getattr(type(vit), n) not in known]
    is_container = isinstance(vit.blocks, (nn.Sequential, nn.ModuleList))
    is_plain = is_container and type(vit.blocks).forward in _CONTAINERS
    return found if is_plain else [*found, f"blocks ({type(vit.blocks).__name__})"]


def _says_patched(owner: str, names: list[str]) -> str:
    return (
        f"the instance {owner} (or its blocks) has its own {', '.join(names)}, which would "
        "not run, since the wrapper does this work; wrap first, then let others (accelerate) "
        "attach themselves, or patch the modules inside"
    )


def _check_options(options: dict) -> None:
    for name in ("num_prompts", "gated_blocks"):
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, int):
            if name == "gated_blocks" and value is None:
                continue
            raise TypeError(f"wrap: {name} must be an int, got {type(value).__name__}")
    temperature, dtype = options["temperature"], options["frozen_dtype"]
    if not isinstance(temperature, (bool, int, float)):
        raise TypeError(f"wrap: temperature must be a bool or a float, got {temperature!r}")
    if dtype not in (None, *DTYPES):
        raise TypeError(f"wrap: frozen_dtype must be one of {DTYPES}, got {dtype!r}")
    if options["gate_init"] is not None and not math.isfinite(options["gate_init"]):
        raise ValueError(f"wrap: gate_init must be finite, got {options['gate_init']}")
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
        value = options[name]
        if name == "method" and isinstance(value, str) and re.fullmatch(r"partial-\d+", value):
            continue
        if value not in allowed or value == "partial-k":
            raise ValueError(f"wrap: {name} must be one of {allowed}, got {value!r}")
    low, high = TEMPERATURE_RANGE
    if not isinstance(temperature, bool) and not low <= temperature <= high:
        raise ValueError(f"wrap: temperature must be in [{low}, {high}], got {temperature}")
    if options["attention"] == "xformers" and unavailable_reason("xformers") is not None:
        reason = unavailable_reason("xformers")
        raise RuntimeError(f"wrap: attention='xformers' can't run: {reason}")


def _tuned_blocks(method: str) -> int:
    return int(method.removeprefix("partial-"))


def _resolve(vit: nn.Module, options: dict, init_images) -> dict:
    """The options with every default in place, once they go with vit and with each other."""
    o, depth = dict(options), len(vit.blocks)
    method, gate = o["method"], o["gate"]
    has_prompts = method.startswith(("vpt", "gpt"))
    if not has_prompts:
        o["num_prompts"] = 0
    elif o["num_prompts"] < 1:
        raise ValueError(
            f"wrap: num_prompts must be at least 1 for {method}, got {o['num_prompts']}"
        )
    if has_prompts and (o["prompt_init"] in DATA_INITS) != (init_images is not None):
        needed = "needs init_images, got none" if init_images is None else "takes no init_images"
        raise ValueError(f"wrap: prompt_init={o['prompt_init']!r} {needed}")
    if method.startswith("partial-") and not 1 <= _tuned_blocks(method) <= depth:
        raise ValueError(f"wrap: method 'partial-k' needs k in [1, {depth}], got {method!r}")
    if method.endswith("-deep") and depth == 1:
        raise ValueError(f"wrap: method {method!r} needs at least 2 blocks, and vit has 1")
    if not method.startswith("gpt"):
        o["gated_blocks"], o["temperature"] = 0, False
    elif gate is None and o["gated_blocks"]:
        raise ValueError(
            f"wrap: gated_blocks must be 0 or None without a gate, got {o['gated_blocks']}"
        )
    elif o["gated_blocks"] is None:
        o["gated_blocks"] = 0 if gate is None else depth - 1 if o["rule"] == "mix" else depth
    if not 0 <= o["gated_blocks"] <= depth:
        raise ValueError(f"wrap: gated_blocks must be in [0, {depth}], got {o['gated_blocks']}")
    pool = o["pool"] = _default_pool(vit) if o["pool"] is None else o["pool"]
    if pool == "prompt" and not has_prompts:
        raise ValueError(f"wrap: pool='prompt' needs prompts, and method {method!r} has none")
    if pool == "cls" and vit.cls_token is None:
        raise ValueError("wrap: pool='cls' needs a class token, and vit has none")
    is_last_gated = o["gated_blocks"] == depth
    if o["last_block"] == "auto":
        is_worth = has_prompts and pool in ("cls", "prompt") and not is_last_gated
        is_pooled = is_worth and _is_known(vit.blocks[-1]) and _has_known_attention(vit.blocks[-1])
        o["last_block"] = "pooled-rows" if is_pooled else "all-rows"
    elif o["last_block"] == "pooled-rows" and is_last_gated:
        raise ValueError(
            "wrap: last_block='pooled-rows' needs a last block without a gate, got gated_blocks="
            f"{depth} of {depth}"
        )
    is_low, is_pooled = o["memory"] == "low", o["last_block"] == "pooled-rows"
    for block in vit.blocks if is_low else vit.blocks[-1:] if is_pooled else ():
        if not _is_known(block):
            raise TypeError(
                f"wrap: memory={o['memory']!r} and last_block={o['last_block']!r} need timm's "
                f"Block or EvaBlock, got {type(block).__module__}.{type(block).__name__}; "
                "memory='default' and last_block='all-rows' take any"
            )
    needs_all = o["temperature"] is not False or o["attention"] not in ("auto", "sdpa")
    for block in vit.blocks if needs_all else vit.blocks[-1:] if is_pooled else ():
        if not _has_known_attention(block):
            attn = attention_of(block)
            raise TypeError(
                "wrap: attn of each block must be a timm.layers.Attention or AttentionRope, or "
                "a timm.models.eva.EvaAttention, for a temperature (temperature=False: none), "
                f"an attention= and pooled rows, got {type(attn).__module__}."
                f"{type(attn).__name__}; shard and replace it after wrap"
            )
    return o


def make_tuned(vit: nn.Module, o: dict):
    """PromptTokens or None, DeepPromptTokens or None, gates."""
    sizes = {"dim": vit.embed_dim, "num_prompts": o["num_prompts"]}
    gates = [
        PromptGate(o["gate"], o["rule"], init=o["gate_init"], **sizes)
        for _ in range(o["gated_blocks"])
    ]
    if o["num_prompts"] == 0:
        return None, None, gates
    prompts = PromptTokens(
        o["num_prompts"],
        vit.embed_dim,
        position=o["prompt_position"],
        dropout=o["prompt_dropout"],
        init="uniform" if o["prompt_init"] in DATA_INITS else o["prompt_init"],
        patch_dim=vit.patch_embed.proj.weight[0].numel(),
    )
    is_deep = o["method"].endswith("-deep")
    return prompts, DeepPromptTokens(prompts, len(vit.blocks)) if is_deep else None, gates


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
            "pool_include_prefix=True, whose pool has the class token among the patches"
        )
    if vit.global_pool == "avg" and isinstance(vit.norm, nn.Identity):
        return "patch"
    raise ValueError(
        f"wrap: pool must be one of {POOLS}, got None, for a backbone with global_pool="
        f"{vit.global_pool!r} and final norm {type(vit.norm).__name__}, which norms before it "
        "pools; here the norm comes after"
    )


def _warn_of_frozen_adapters(vit: nn.Module) -> None:
    """Where most of vit is frozen already, what is not is what somebody wants to tune."""
    trainable = {name: p.numel() for name, p in vit.named_parameters() if p.requires_grad}
    if 0 < sum(trainable.values()) < 0.5 * sum(p.numel() for p in vit.parameters()):
        warnings.warn(
            f"wrap: {len(trainable)} parameters of vit were trainable beside frozen ones, such as "
            f"{next(iter(trainable))!r}, and are frozen now like the rest; to tune them with what "
            "the method tunes, call requires_grad_(True) on them after wrap",
            stacklevel=3,
        )


def _is_known(block: nn.Module) -> bool:
    """Whether it is x + scale(attn(norm1(x))), then x + scale(mlp(norm2(x)))."""
    return type(uncompiled(block)) in PRE_NORM_BLOCKS


def _has_known_attention(block: nn.Module) -> bool:
    return type(attention_of(block)) in ATTENTIONS


_BIAS = re.compile(  # also Eva's q_bias, a pruned and a parametrised one
    r"(^|[._])bias(_orig)?$|parametrizations\.(\w+_)?bias\.original\d*$"
)


def _train_what_is_tuned(module: nn.Module, mode: bool) -> None:
    """Sets the mode of a backbone: of what is tuned as a whole, and of adapters, that is modules of
    others with something tuned in them; what has frozen parameters alone is in eval mode."""
    flags = [parameter.requires_grad for parameter in module.parameters()]
    is_foreign = not type(module).__module__.startswith(("torch.nn.modules.", "timm."))
    is_tuned = any(flags) and (is_foreign or all(flags))
    module.training = mode and is_tuned
    for child in module.children():
        if not any(flags) or next(child.parameters(), None) is None:
            child.train(mode and is_tuned)
        else:
            _train_what_is_tuned(child, mode)


def _thaw(module: nn.Module, biases_alone: bool = False) -> None:
    """Lets the parameters of a backbone, or of parts of it, be tuned, but for timm's own head and
    pool, which are not used."""
    unused = {
        id(parameter)
        for part in (getattr(module, "head", None), getattr(module, "attn_pool", None))
        if part is not None
        for parameter in part.parameters()
    }
    for name, parameter in module.named_parameters():
        is_bias = _BIAS.search(name) is not None
        if id(parameter) not in unused and (is_bias or not biases_alone):
            parameter.requires_grad_(True)
