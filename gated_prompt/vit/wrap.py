# SPDX-License-Identifier: Apache-2.0
"""`wrap` and `unwrap`, and their checks of the backbone."""

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

from gated_prompt.block_hooks import has_hooks
from gated_prompt.prompting import (
    dropout_of,
    make_prompts,
    warn_of_frozen_adapters,
)
from gated_prompt.vit.model import HEAD_INITS, GatedPromptViT
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
    head: str | nn.Module = "new",
) -> GatedPromptViT:
    """Freezes a timm ViT and adds the parameters that `method` tunes.

    `vit` itself is changed until `unwrap`: its parameters stop requiring gradients, its `forward`
    is replaced, and its attentions divide the queries if there is a temperature. `vit.head` is not
    used; the model that `wrap` returns has its own head.

    Args:
        vit: A timm `VisionTransformer` or `Eva` (DINOv3, EVA-02 and others with rotary positions).
        method: Selects what is tuned in addition to the head:
            "linear": nothing.
            "full": the backbone. "bias": its biases. "partial-k" ("partial-1", ...): its last k
            blocks and its final norm.
            "vpt-shallow": prompts that enter the first block. "vpt-deep": new prompts for every
            block, which replace the prompt rows that the previous block returned.
            "gpt": prompts that enter the first block, and a gate and a temperature per block.
            "gpt-deep": like "gpt", with new prompts for every block. A closed gate replaces the
            prompt rows of the block's output by the next block's prompts, as in "vpt-deep". With
            rule "mix", an open gate keeps the block's output, and the new prompts have no effect.
        num_prompts: P. Not used by methods without prompts.
        gate, rule: See `PromptGate`; "gpt" and "gpt-deep" only. "scalar": one gate per block.
            "channel": one per channel. "token": one per prompt. "full": one per channel of each
            prompt. The linear gates are computed from the block's output, for each prompt:
            "linear": one gate per channel; "linear-token": one gate for all channels. rule: "mix"
            or "residual". gate=None: no gates, only temperatures.
        gate_init: The `init` of `PromptGate`. None: -5 (nearly closed); linear gates start near
            0.5.
        gated_blocks: The number of blocks with a gate, counted from the first block. None: all
            blocks except the last (rule="mix"), all blocks (rule="residual").
        temperature: "gpt" and "gpt-deep" only. True: learnable in every block, starting at 1.
            False: 1. A float: this constant.
        prompt_position, prompt_dropout: See `PromptTokens`.
        prompt_init: "uniform" or "normal": see `PromptTokens`. "mean", "random-token" or "kmeans":
            from the patch tokens of init_images that enter the same block, including position
            embeddings; see `gated_prompt.vit.prompt_init.prototypes`.
        init_images: Required for "mean", "random-token" and "kmeans": images [M, C, H, W], or an
            iterable of batches, which may be (images, labels) pairs. Normalised as for training,
            without augmentation.
        pool: The tokens that the head reads. "cls": the class token. "patch", "prompt",
            "prompt+patch": the mean of these tokens. The backbone's final norm comes after the
            pool. None: "prompt+patch" for MAE, as in the paper (MAE is recognised by timm's tag or
            by `load_backbone`); otherwise the pool that the backbone was built with. Backbones that
            norm before they pool (DINOv3, SigLIP) have no default.
        attention: The backend, see `tempered_attention`. With "auto" and "sdpa", methods without
            prompts keep timm's own attention, unless last_block="pooled-rows".
        memory: "low": backward recomputes the hidden layer of the MLP, which is 4 of the 10
            activations of size D that a frozen block keeps for each token. Same gradients.
        last_block: "pooled-rows": in the last block, `forward` computes only the tokens that the
            pool reads. Same logits. Not allowed if the last block has a gate. "all-rows": computes
            all tokens. "auto": "pooled-rows" if the method has prompts, the pool is "cls" or
            "prompt" (where most is saved), and the last block supports it.
        frozen_dtype: Stores the weights and biases of frozen linear and convolution layers in this
            dtype, for example torch.bfloat16. Then autocast need not cast them at each use. Call
            the model under torch.autocast with this dtype, or with images of this dtype. The
            originals are kept on the CPU, and `unwrap` restores them.
        head: "new": a linear layer with `vit.num_classes` outputs (none if that is 0), weights
            normal with standard deviation 0.01 and biases 0, so the first loss is near ln(classes).
            "vpt": the same layer as VPT and the paper initialise it: weights Kaiming normal
            (fan_out), biases -ln(99); the first loss is far above ln(classes). "keep": a copy of
            `vit.head`, tuned. A module: used as it is, [B, D] -> logits.

    Returns:
        A `GatedPromptViT`.

    Raises:
        TypeError: vit is not one of these models; an option needs another kind of block or
            attention than vit has; an option has a wrong type.
        ValueError: an option is unknown or out of range, or does not fit vit or another option.
        RuntimeError: vit is wrapped already, or one of its methods was replaced; attention can't
            run on this machine.
        ModuleNotFoundError: prompt_init is "kmeans" and scikit-learn is not installed.

    Source: Yoo et al., ICML 2023, arXiv 2306.05067, sections 3.2 and 3.3. The head, the prompt
    initialisation and the other methods are as in Jia et al., ECCV 2022 (VPT).
    """
    check_backbone(vit)
    if not isinstance(head, nn.Module) and head not in (*HEAD_INITS, "keep"):
        raise ValueError(f"wrap: head must be 'new', 'vpt', 'keep' or a module, got {head!r}")
    if isinstance(head, nn.Module):
        own = {id(parameter) for parameter in vit.parameters()}
        if not own.isdisjoint(map(id, head.parameters())):
            raise ValueError(
                "wrap: head must not share parameters with vit, which is frozen, got "
                f"{type(head).__name__} with some; head='keep' copies vit.head"
            )
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
    # an error up to this line leaves vit unchanged
    warn_of_frozen_adapters("wrap", vit, vit.head.parameters())
    model = GatedPromptViT(vit, options, prompts, deep_prompts, gates, head)
    if method in ("full", "bias"):
        _thaw(vit, only_biases=method == "bias")
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
    if head in HEAD_INITS and type(vit.head) not in (nn.Linear, nn.Identity):
        warnings.warn(
            f"wrap: vit.head is a {type(vit.head).__name__}, which is not used: the model has a "
            "new linear head; head='keep' copies vit.head",
            stacklevel=2,
        )
    _warn_of_coarse_parameters(model)
    _warn_of_idle_dropout(model)
    model.remember_initial_values()
    return model


def unwrap(model: GatedPromptViT | nn.Module) -> nn.Module:
    """Undoes `wrap` and returns the timm model, with the requires_grad, train mode and dtypes that
    it had before.

    Backbone parameters that "full", "bias" and "partial-k" have tuned keep their new values. Hooks
    and modules that other code has added stay. The wrapper can't be used any more: save the tuned
    parameters first.

    Args:
        model: The model that `wrap` returned; or, if you no longer have it, its timm model.
    """
    if isinstance(model, GatedPromptViT):
        model.require_wrapped("unwrap")
        model = model.backbone
    wrapping = vars(model).get(MARK) if isinstance(model, nn.Module) else None
    if wrapping is None:
        raise TypeError(
            "unwrap: model must be what wrap returned (for a compiled or parallel model: its "
            f"._orig_mod or .module), or its backbone, got {type(model).__name__}"
        )
    wrapping.undo(model)
    return model


# ---- checks ----


def check_backbone(vit) -> None:
    if hasattr(vit, "_orig_mod"):
        raise TypeError(
            "wrap: vit must be a timm VisionTransformer or Eva, got a compiled one; wrap "
            "vit._orig_mod, and compile the model that wrap returns"
        )
    if isinstance(vit, GatedPromptViT):
        raise TypeError(
            "wrap: vit must be a timm VisionTransformer or Eva, got a model that is wrapped already"
        )
    if not isinstance(vit, (VisionTransformer, Eva)):
        raise TypeError(
            "wrap: vit must be a timm.models.vision_transformer.VisionTransformer or a "
            f"timm.models.eva.Eva, got {type(vit).__module__}.{type(vit).__name__}; "
            f"{_other_way(vit)}"
        )
    if not hasattr(vit, "_pos_embed"):  # private in timm
        raise RuntimeError(
            "wrap: vit must have the method _pos_embed, as in timm 1.0, got none with timm "
            f"{timm.__version__}; install an older timm"
        )
    for name, known in METHODS_OF_TIMM.items():
        if getattr(type(vit), name) not in known:
            raise TypeError(
                f"wrap: vit must have the {name} of its base class, got {type(vit).__name__}'s "
                "own, which the wrapper would replace; gp.attach keeps it"
            )
    if type(vit.patch_embed) is not PatchEmbed:
        raise TypeError(
            "wrap: vit must have a timm.layers.PatchEmbed, got "
            f"{type(vit.patch_embed).__module__}.{type(vit.patch_embed).__name__}"
        )
    if is_wrapped(vit):
        raise RuntimeError("wrap: vit is wrapped already; call unwrap(vit) first")
    if has_hooks(vit):
        raise RuntimeError("wrap: vit has gated prompts from attach; call detach(vit) first")
    patched = patched_methods(vit)
    for module in callable_parts(vit):
        if "forward" in vars(module) and not has_our_forward(module):
            patched.append("forward")
    if patched:
        raise RuntimeError(f"wrap: {says_patched('vit', patched)}")


def _other_way(model) -> str:
    inner = getattr(model, "timm_model", getattr(model, "trunk", None))
    if isinstance(inner, (VisionTransformer, Eva)):
        name = "timm_model" if hasattr(model, "timm_model") else "trunk"
        return f"wrap model.{name}: model.{name} = gp.wrap(model.{name}, ...)"
    return "gp.attach is for other models"


def _warn_of_coarse_parameters(model: GatedPromptViT) -> None:
    coarse = {p.dtype for p in model.parameters() if p.requires_grad}
    coarse -= {torch.float32, torch.float64}
    if coarse:
        warnings.warn(
            f"wrap: method {model.method!r} tunes parameters of the backbone in "
            f"{', '.join(map(str, coarse))}, where small optimiser steps are rounded away; "
            "use a float32 backbone and torch.autocast",
            stacklevel=3,
        )


def _warn_of_idle_dropout(model: GatedPromptViT) -> None:
    """Warns if dropout, stochastic depth or patch dropout of the backbone never runs, because its
    frozen modules stay in eval mode."""
    mode = model.training
    model.train()
    idle = dropout_of(module for module in model.backbone.modules() if not module.training)
    model.train(mode)
    if idle:
        warnings.warn(
            f"wrap: {', '.join(idle)} of vit has no effect, because frozen modules stay in eval "
            "mode; prompt_dropout is the dropout of the prompts",
            stacklevel=3,
        )


# ---- tuned parts ----


def make_tuned(vit: nn.Module, options: WrapOptions):
    """Returns (PromptTokens or None, DeepPromptTokens or None, [PromptGate]) for these options."""
    return make_prompts(
        options.method,
        dim=vit.embed_dim,
        depth=len(vit.blocks),
        num_prompts=options.num_prompts,
        gate=options.gate,
        rule=options.rule,
        gate_init=options.gate_init,
        gated_blocks=options.gated_blocks,
        position=options.prompt_position,
        dropout=options.prompt_dropout,
        init="uniform" if options.prompt_init in DATA_INITS else options.prompt_init,
        patch_dim=vit.patch_embed.proj.weight[0].numel(),
    )


_BIAS = re.compile(  # also Eva's q_bias, and pruned or parametrised biases
    r"(^|[._])bias(_orig)?$|parametrizations\.(\w+_)?bias\.original\d*$"
)


def _thaw(module: nn.Module, only_biases: bool = False) -> None:
    """Makes the parameters of module, or only its biases, trainable, except those of timm's own
    head and attention pool, which are not used."""
    unused = {
        id(parameter)
        for part in (getattr(module, "head", None), getattr(module, "attn_pool", None))
        if part is not None
        for parameter in part.parameters()
    }
    for name, parameter in module.named_parameters():
        is_bias = _BIAS.search(name) is not None
        if id(parameter) not in unused and (is_bias or not only_biases):
            parameter.requires_grad_(True)
