# SPDX-License-Identifier: Apache-2.0
"""`wrap` and `unwrap`, and what they require."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from gated_prompt.modules import DeepPromptTokens, PromptGate, PromptTokens
from gated_prompt.vit.model import GatedPromptViT
from gated_prompt.vit.options import WrapOptions
from gated_prompt.vit.prompt_init import DATA_INITS, init_prompts
from gated_prompt.vit.wrapping import (
    MARK,
    METHODS_OF_TIMM,
    callable_parts,
    has_our_forward,
    is_wrapped,
    patched_methods,
    says_patched,
)


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
            "random-token", "kmeans", see `gated_prompt.vit.prompt_init.prototypes`.
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
    check_backbone(vit)
    options = WrapOptions(
        method=method,
        num_prompts=num_prompts,
        gate=gate,
        rule=rule,
        gate_init=gate_init,
        gated_blocks=gated_blocks,
        temperature=temperature,
        prompt_position=prompt_position,
        prompt_dropout=prompt_dropout,
        prompt_init=prompt_init,
        pool=pool,
        attention=attention,
        memory=memory,
        last_block=last_block,
        frozen_dtype=frozen_dtype,
    ).resolved(vit, has_images=init_images is not None)
    prompts, deep_prompts, gates = make_tuned(vit, options)
    # nothing above has changed vit
    _warn_of_frozen_adapters(vit)
    model = GatedPromptViT(vit, options, prompts, deep_prompts, gates)
    if method in ("full", "bias"):
        _thaw(vit, biases_alone=method == "bias")
    elif method.startswith("partial-"):
        _thaw(nn.ModuleList([*vit.blocks[-options.tuned_blocks :], vit.norm, vit.fc_norm]))
    try:
        if prompts is not None and init_images is not None:
            init_prompts(model, init_images, prompt_init)
        if frozen_dtype is not None:
            model._wrapping.narrow(vit, frozen_dtype)
    except Exception:
        unwrap(model)
        raise
    _warn_of_coarse_parameters(model)
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
    wrapping = vars(model).get(MARK) if isinstance(model, nn.Module) else None
    if wrapping is None:
        raise TypeError(
            "unwrap: model must be what wrap returned (of a compiled or parallel one, ._orig_mod "
            f"or .module), or its backbone, got {type(model).__name__}"
        )
    wrapping.undo(model)
    return model


# ---- what is required ----


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
    if not hasattr(vit, "_pos_embed"):  # which timm does not promise
        raise RuntimeError(
            "wrap: vit must have the method _pos_embed, as timm 1.0 has it, got none with timm "
            f"{timm.__version__}; install an older timm"
        )
    for name, known in METHODS_OF_TIMM.items():
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
    patched = patched_methods(vit)
    for module in callable_parts(vit):
        if "forward" in vars(module) and not has_our_forward(module):
            patched.append("forward")
    if patched:
        raise RuntimeError(f"wrap: {says_patched('vit', patched)}")


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


def _warn_of_coarse_parameters(model: GatedPromptViT) -> None:
    coarse = {p.dtype for p in model.parameters() if p.requires_grad}
    coarse -= {torch.float32, torch.float64}
    if coarse:
        warnings.warn(
            f"wrap: method {model.method!r} tunes parameters of the backbone in "
            f"{', '.join(map(str, coarse))}, where small steps of an optimiser are lost; give "
            "it a float32 backbone and use torch.autocast",
            stacklevel=3,
        )


# ---- what is tuned ----


def make_tuned(vit: nn.Module, options: WrapOptions):
    """PromptTokens or None, DeepPromptTokens or None, gates."""
    sizes = {"dim": vit.embed_dim, "num_prompts": options.num_prompts}
    gates = [
        PromptGate(options.gate, options.rule, init=options.gate_init, **sizes)
        for _ in range(options.gated_blocks)
    ]
    if options.num_prompts == 0:
        return None, None, gates
    prompts = PromptTokens(
        options.num_prompts,
        vit.embed_dim,
        position=options.prompt_position,
        dropout=options.prompt_dropout,
        init="uniform" if options.prompt_init in DATA_INITS else options.prompt_init,
        patch_dim=vit.patch_embed.proj.weight[0].numel(),
    )
    is_deep = options.method.endswith("-deep")
    return prompts, DeepPromptTokens(prompts, len(vit.blocks)) if is_deep else None, gates


_BIAS = re.compile(  # also Eva's q_bias, a pruned and a parametrised one
    r"(^|[._])bias(_orig)?$|parametrizations\.(\w+_)?bias\.original\d*$"
)


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
