# SPDX-License-Identifier: Apache-2.0
"""`attach` and `detach`: gated prompts in any model that has a sequence of transformer blocks."""

from __future__ import annotations

import copy
import math
import warnings

import torch
from torch import nn

from gated_prompt.anatomy import blocks_of, dim_of, head_of, query_of
from gated_prompt.block_hooks import AttachedPrompts, has_hooks, set_hooks, unset_hooks
from gated_prompt.checks import RULES
from gated_prompt.modules import GATES
from gated_prompt.prompting import (
    MARK,
    PROMPTED,
    GatedPrompts,
    dropout_of,
    groups_of,
    make_prompts,
    number_of_gates,
    warn_of_frozen_adapters,
)
from gated_prompt.temperature import TEMPERATURE_RANGE
from gated_prompt.tempering import is_compiled, is_one

NAME = "gated_prompts"  # of the module that attach adds to the model


def attach(
    model: nn.Module,
    method: str = "gpt",
    *,
    num_prompts: int = 100,
    gate: str | None = "scalar",
    rule: str = "mix",
    gate_init: float | None = None,
    gated_blocks: int | None = None,
    temperature: bool | float = True,
    prompt_dropout: float = 0.1,
    prompt_init: str = "uniform",
    start: int = 1,
    keep_prompts: bool = False,
    blocks: str | None = None,
    query: str | None = None,
    head: str | bool | None = None,
    batch_dim: int = 0,
) -> nn.Module:
    """Freezes a model and adds gated prompts to its blocks. For timm models, use `wrap`.

    The class and the forward of the model stay as they are: hooks on its blocks insert the prompts
    before the first block, gate them after each block, and remove them after the last one. So the
    model's outputs keep their shapes. The new parameters are in `model.gated_prompts`. They are
    part of `state_dict()`, and move, copy and pickle with the model. Unlike `wrap`, `attach` does
    not change which modules are in train mode, and warns of dropout that stays active.

    Outputs of blocks before the last one, such as the `hidden_states` and `attentions` of
    transformers or DINO's intermediate layers, contain the prompts. So models that make feature
    maps of them (the Backbone classes of transformers) are refused. Masks are widened: all tokens
    attend to the prompts. Prompts attend to all tokens to which any token attends, so causal models
    are not supported.

    Recognised without further arguments: ViT, DeiT, ViT-MAE, DINOv2, DINOv3, CLIP and SigLIP of
    transformers; torchvision's `VisionTransformer`; the image towers of open_clip and CLIP; models
    with a list of blocks of the class `Block`, such as those of MAE, DINO and MoCo v3. For other
    models, give `blocks`, and `query` or temperature=False.

    Args:
        model: The model, or a part of it, such as the image tower `clip.vision_model`; then the
            rest is not frozen.
        method, num_prompts, gate, rule, gate_init, temperature, prompt_dropout: See `wrap`; the
            method is "gpt", "gpt-deep", "vpt-shallow" or "vpt-deep".
        gated_blocks: See `wrap`. None: all blocks except the last one, whose prompts are removed
            (keep_prompts=True and rule="residual": all blocks).
        prompt_init: "uniform" or "normal": see `PromptTokens`.
        start: The index of the first prompt in the sequence of tokens; 1: after the class token.
            If the prompts are removed, the result does not depend on it. (Rotary positions: the
            prompts must come before the patches.)
        keep_prompts: True: the prompts stay in the output of the last block. MAE's fine-tuning
            model (`global_pool=True`) then averages prompts and patches, as in the paper.
        blocks: The name of the nn.ModuleList or nn.Sequential of blocks, for example
            "encoder.layers". Each block takes tokens [B, N, D] as its first argument (or
            `hidden_states=`) and returns tokens of this shape (or a tuple that starts with them).
        query: For the temperature: the name, in each block, of the nn.Linear that projects the
            queries, or whose output has the queries in its first third; or of the
            nn.MultiheadAttention.
        head: The name of the module that is not frozen. None: `classifier`, `heads` or `head`, and
            a warning if model has none. False: none, because you have your own.
        batch_dim: 1: the blocks run over [N, B, D].

    Returns:
        The same model. `detach` undoes `attach`.

    Raises:
        TypeError: model has no blocks that attach knows, or several sequences of them.
        ValueError: an option is unknown or out of range; a name is not in model; the attention
            allows no temperature. In the first forward: the shape of a block's tokens does not fit.
        RuntimeError: model is attached or wrapped already.

    Source: Yoo et al., ICML 2023, arXiv 2306.05067, sections 3.2 and 3.3.
    """
    options = {name: value for name, value in locals().items() if name != "model"}
    _check_model(model)
    _check_options(method, gate, rule, temperature, start, batch_dim)
    layers = blocks_of(model, blocks)
    _check_blocks(layers, batch_dim)
    depth, has_gates = len(layers), method.startswith("gpt")
    if not has_gates:
        gate, temperature = None, False
    most = depth if keep_prompts else depth - 1
    default = min(number_of_gates(gate, rule, depth), most)
    gated_blocks = default if gated_blocks is None else gated_blocks
    if not 0 <= gated_blocks <= (0 if gate is None else most):
        raise ValueError(
            f"attach: gated_blocks must be in [0, {0 if gate is None else most}], got "
            f"{gated_blocks}"
        )
    if num_prompts < 1:
        raise ValueError(f"attach: num_prompts must be at least 1, got {num_prompts}")
    if method.endswith("-deep") and depth < 2:
        raise ValueError(f"attach: method {method!r} needs at least 2 blocks, got {depth}")
    queries = [None if is_one(temperature) else query_of(block, query) for block in layers]
    first = next(layers[0].parameters())
    patch = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    parts = make_prompts(
        method,
        dim=dim_of(layers[0]),
        depth=depth,
        num_prompts=num_prompts,
        gate=gate,
        rule=rule,
        gate_init=gate_init,
        gated_blocks=gated_blocks,
        dropout=prompt_dropout,
        init=prompt_init,
        **({} if patch is None else {"patch_dim": patch.weight[0].numel()}),
    )
    head = head_of(model, head)
    of_head = [] if head is None else list(model.get_submodule(head).parameters())
    warn_of_frozen_adapters("attach", model, of_head)
    _warn_of_active_dropout(model, of_head)
    # an error up to this line leaves the model unchanged
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    prompts = AttachedPrompts(
        parts, depth, temperature, start, batch_dim, keep_prompts, first.device, dtype
    )
    prompts.options, prompts.head = options, head
    prompts._required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    kept = {id(parameter) for parameter in of_head}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    setattr(model, NAME, prompts.train(model.training))
    if hasattr(getattr(model, "config", None), "to_dict"):  # of transformers, which saves it
        model.config = copy.copy(model.config)  # other models may share it
        setattr(model.config, NAME, options)
    set_hooks(model, prompts, layers, queries, temperature)
    return model


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    gate_lr: float | None = None,
    temperature_lr: float | None = None,
    head_lr: float | None = None,
    backbone_lr: float | None = None,
) -> list[dict]:
    """Returns optimiser groups of what is tuned in a model that `attach` returned: "prompts",
    "gates", "temperatures", "backbone" (adapters, ...) and "head". See `GatedPromptViT`'s method.
    """
    rates = {
        "prompts": None, "gates": gate_lr, "temperatures": temperature_lr,
        "backbone": backbone_lr, "head": head_lr,
    }  # fmt: skip
    head, tuned = _attached("param_groups", model).head, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = "head" if head and name.startswith(f"{head}.") else "backbone"
            is_added = name.startswith(f"{NAME}.")
            tuned[name.removeprefix(f"{NAME}.") if is_added else f"{group}.{name}"] = parameter
    return groups_of(tuned, lr, weight_decay, rates)


def detach(model: nn.Module) -> nn.Module:
    """Undoes `attach` and returns the model, with the requires_grad that it had before."""
    prompts = _attached("detach", model)
    delattr(model, NAME)
    if hasattr(getattr(model, "config", None), NAME):
        delattr(model.config, NAME)
    unset_hooks(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(prompts._required_grad.get(name, parameter.requires_grad))
    return model


def _attached(who: str, model: nn.Module) -> AttachedPrompts:
    found = getattr(model, NAME, None)
    if not isinstance(found, AttachedPrompts):
        raise TypeError(
            f"{who}: model must be what attach returned, got a {type(model).__name__} without "
            f"{NAME}"
        )
    return found


# ---- checks ----


def _check_model(model) -> None:
    if any(map(is_compiled, model.modules())):
        raise TypeError(
            "attach: model or a part of it is compiled, and compiled code would not see the hooks; "
            "attach first, then compile"
        )
    if isinstance(model, (nn.Sequential, nn.ModuleList)):
        raise TypeError(
            f"attach: model must not be a {type(model).__name__}, which would call or count the "
            "prompts as one of its parts; attach to the model around it"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise RuntimeError(
            "attach: model must have its weights, got parameters on the meta device; attach after "
            "from_pretrained or to_empty, not in __init__"
        )
    if any(kind.__name__ == "BackboneMixin" for kind in type(model).__mro__):
        raise TypeError(
            f"attach: {type(model).__name__} makes feature maps of hidden states, which would "
            "contain the prompts; attach to the model without Backbone in its name"
        )
    is_prompted = any(isinstance(m, GatedPrompts) or MARK in vars(m) for m in model.modules())
    if is_prompted or has_hooks(model):
        raise RuntimeError(
            "attach: model has gated prompts already; call detach (or unwrap, for a wrapped part)"
        )
    if hasattr(model, NAME):
        raise RuntimeError(f"attach: model has an attribute {NAME!r}, which attach needs")


def _check_blocks(blocks: list[nn.Module], batch_dim: int) -> None:
    if len({id(block) for block in blocks}) < len(blocks):
        raise ValueError("attach: each block must be another module, got one that is there twice")
    for block in blocks:
        for module in block.modules():
            if isinstance(module, nn.MultiheadAttention) and module.batch_first == bool(batch_dim):
                raise ValueError(
                    f"attach: batch_dim must be {int(not module.batch_first)} for blocks with "
                    f"nn.MultiheadAttention(batch_first={module.batch_first}), got {batch_dim}"
                )


def _warn_of_active_dropout(model: nn.Module, of_head: list[nn.Parameter]) -> None:
    """Warns of dropout and stochastic depth in what attach freezes."""
    head = {id(parameter) for parameter in of_head}
    parts = [m for m in model.children() if head.isdisjoint(map(id, m.parameters()))]
    if found := dropout_of(module for part in parts for module in part.modules()):
        warnings.warn(
            f"attach: {', '.join(found)} stays active in train mode, although model is frozen; "
            "build the model without it if you don't want that",
            stacklevel=3,
        )


def _check_options(method, gate, rule, temperature, start, batch_dim) -> None:
    for name, value, allowed in (
        ("method", method, PROMPTED),
        ("gate", gate, (None, *GATES)),
        ("rule", rule, RULES),
        ("batch_dim", batch_dim, (0, 1)),
    ):
        if value not in allowed:
            raise ValueError(f"attach: {name} must be one of {allowed}, got {value!r}")
    if not isinstance(start, int) or start < 0:
        raise ValueError(f"attach: start must be an int of at least 0, got {start!r}")
    low, high = TEMPERATURE_RANGE
    is_number = isinstance(temperature, (int, float)) and math.isfinite(temperature)
    if not is_number or (not isinstance(temperature, bool) and not low <= temperature <= high):
        raise ValueError(
            f"attach: temperature must be a bool or in [{low}, {high}], got {temperature!r}"
        )
