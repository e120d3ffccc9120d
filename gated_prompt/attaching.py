# SPDX-License-Identifier: Apache-2.0
"""`attach` and `detach`: gated prompts in any model that has a sequence of transformer blocks."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from gated_prompt.anatomy import BLOCKS, blocks_of, dim_of, head_of, query_of
from gated_prompt.checks import RULES
from gated_prompt.hooks import is_observed, is_ours, is_untouched
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
from gated_prompt.tempering import QueryDivision

NAME = "gated_prompts"  # of the module that attach adds to the model
_OWNERS = ("torch.", "torchvision.", "timm.", "transformers.", "open_clip.")
_MASKS = ("attention_mask", "attn_mask", "mask", "src_mask")


class AttachedPrompts(GatedPrompts):
    """What `attach` adds to a model, as its child `gated_prompts`; see `GatedPrompts`.

    The forward of the model calls nothing here. Hooks on its blocks do the work.

    Attributes:
        start: The index of the first prompt in the sequence.
        batch_dim: The dimension of the batch in the input of the blocks.
        keep_prompts: False: the prompts are removed after the last block.
        head: The name of the module of the model that stays trainable, or None.
        options: The arguments of `attach`; `attach(other, **model.gated_prompts.options)` attaches
            to another model in the same way. Models of transformers have them in
            `config.gated_prompts`, too, and save them.
    """

    def __init__(self, parts, depth, temperature, start, batch_dim, keep_prompts, device, dtype):
        super().__init__()
        self.start, self.batch_dim, self.keep_prompts = start, batch_dim, keep_prompts
        self._set_parts(*parts, depth, temperature is True, device, dtype)
        self._batch = None  # of the images, if the model's forward is running

    def _replicate_for_data_parallel(self):
        raise RuntimeError(
            "attach: nn.DataParallel can't copy the hooks that attach has set; use "
            "DistributedDataParallel"
        )

    def extra_repr(self) -> str:
        parts = ("start", "batch_dim", "keep_prompts")
        return ", ".join(f"{name}={getattr(self, name)}" for name in parts)

    def before_model(self, model: nn.Module, args, kwargs) -> None:
        if torch.compiler.is_compiling():
            return
        images = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() == 4]
        self._batch = len(images[0]) if images else None

    def after_model(self, model: nn.Module, args, out) -> None:
        if not torch.compiler.is_compiling():
            self._batch = None

    def inserted(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N + P, D]."""
        self._tell_what_is_not_tuned("attach")
        if not torch.compiler.is_compiling() and len(x) != self._batch == x.shape[1]:
            shape = list(x.shape if self.batch_dim == 0 else x.transpose(0, 1).shape)
            raise ValueError(
                f"attach: the first block got {shape}, and the model got a batch of {self._batch}; "
                f"batch_dim={self.batch_dim} must be the dimension of the batch"
            )
        if x.shape[1] < self.start:
            raise ValueError(
                f"attach: start must be at most the number of tokens, {x.shape[1]}, got "
                f"{self.start}"
            )
        return self.prompts(x, self.start)[0]

    def removed(self, x: Tensor) -> Tensor:
        """x [B, N + P, D] -> [B, N, D]."""
        return torch.cat([x[:, : self.start], x[:, self.start + self.num_prompts :]], dim=1)


class _BlockHooks:
    """The hooks on one block. Bound methods, so that a copied model has hooks that use the copied
    prompts."""

    def __init__(self, prompts, block: nn.Module, index: int, division: QueryDivision | None):
        self.prompts, self.index, self.division = prompts, index, division
        # in a boolean mask of torch.nn, True means "does not attend"; elsewhere, "attends"
        self.true_is_masked = any(isinstance(m, nn.MultiheadAttention) for m in block.modules())

    def before(self, block: nn.Module, args, kwargs):
        if self.division is not None:
            self.division.follow(block)
        x, p = self._batch_first(_tokens(args, kwargs, block)), self.prompts
        if self.index == 0:
            x = p.inserted(x)
        args, kwargs = _with_tokens(args, kwargs, self._batch_first(x))
        sizes = (x.shape[1] - p.num_prompts, p.start, p.num_prompts)
        return _with_wider_masks(args, kwargs, *sizes, self.true_is_masked)

    def after(self, block: nn.Module, args, kwargs, out):
        if self.division is not None:
            self.division.require_used(block)
        x, new = _tokens(args, kwargs, block), _tokens(_as_tuple(out), {}, block)
        if x.shape != new.shape:
            raise ValueError(
                f"attach: block {self.index} must keep the shape of its input {list(x.shape)}, got "
                f"{list(new.shape)}"
            )
        x, new = self._batch_first(x), self._batch_first(new)
        # the gate may overwrite `new` if no other code, such as a hook, can have kept it
        is_own = type(block).__module__.startswith(_OWNERS) and type(block).__name__ in BLOCKS
        is_own = is_own and not torch.compiler.is_compiling() and not is_observed(x)
        is_own = is_own and is_untouched(block) and not new._is_view()
        p = self.prompts
        # no carrier: it gained nothing on a CPU (ViT-S, 50 prompts: 0.675 s a step, 0.673 without)
        new, _ = p._gated(self.index, new, x, None, p.start, p._closed(x), is_own)
        if self.index + 1 == p.depth and not p.keep_prompts:
            new = p.removed(new)
        new = self._batch_first(new)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    def _batch_first(self, x: Tensor) -> Tensor:
        return x if self.prompts.batch_dim == 0 else x.transpose(0, 1)


def _as_tuple(out) -> tuple:
    return out if isinstance(out, tuple) else (out,)


def _tokens(args, kwargs, block) -> Tensor:
    x = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(x, Tensor) or x.dim() != 3:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"attach: the first input and output of {type(block).__name__} must be tokens "
            f"[B, N, D], got {got}"
        )
    return x


def _with_wider_masks(
    args, kwargs, num_tokens: int, start: int, num_prompts: int, true_is_masked: bool
):  # fmt: skip
    """Lets all tokens attend to the prompts, and the prompts to all tokens, in masks over
    `num_tokens` tokens: the second argument, or one of the names in _MASKS. (Compiled models of
    transformers pass one.)"""

    def wider(mask):
        if not isinstance(mask, Tensor) or mask.dim() < 2 or mask.shape[-1] != num_tokens:
            return mask
        for dim in (-1, -2) if mask.shape[-2] == num_tokens else (-1,):
            shape = [*mask.shape]
            shape[dim] = num_prompts
            # a boolean mask, or one that is added to the scores
            free = mask.new_full(shape, mask.dtype == torch.bool and not true_is_masked)
            rest = mask.shape[dim] - start
            mask = torch.cat([mask.narrow(dim, 0, start), free, mask.narrow(dim, start, rest)], dim)
        return mask

    args = (*args[:1], *map(wider, args[1:2]), *args[2:])
    return args, {name: wider(t) if name in _MASKS else t for name, t in kwargs.items()}


def _with_tokens(args, kwargs, x: Tensor):
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


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
    maps of them (the Backbone classes of transformers) are refused.

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
    is_one = temperature is not True and float(temperature or 1.0) == 1.0
    paths = [None if is_one else query_of(block, query) for block in layers]
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
    source = prompts.temperatures if temperature is True else float(temperature or 1.0)
    prompts.options, prompts.head = options, head
    prompts._required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    kept = {id(parameter) for parameter in of_head}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    setattr(model, NAME, prompts.train(model.training))
    if hasattr(getattr(model, "config", None), "to_dict"):  # of transformers, which saves it
        setattr(model.config, NAME, options)
    model.register_forward_pre_hook(prompts.before_model, with_kwargs=True)
    model.register_forward_hook(prompts.after_model, always_call=True)
    for index, (block, path) in enumerate(zip(layers, paths, strict=True)):
        division = None if path is None else QueryDivision(block, path, source, index)
        hooks = _BlockHooks(prompts, block, index, division)
        block.register_forward_pre_hook(hooks.before, with_kwargs=True)
        block.register_forward_hook(hooks.after, with_kwargs=True)
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
    for module in model.modules():
        forward = getattr(vars(module).get("forward"), "func", None)
        if forward is not None and is_ours(forward):
            del module.forward
        for hooks, *kinds in (
            (
                module._forward_hooks,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if _is_of_attach(hook)]:
                for each in (hooks, *kinds):
                    each.pop(key, None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(prompts._required_grad.get(name, parameter.requires_grad))
    return model


def _is_of_attach(hook) -> bool:
    return isinstance(
        getattr(hook, "__self__", None), (AttachedPrompts, _BlockHooks, QueryDivision)
    )


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
    if hasattr(model, "_orig_mod"):
        raise TypeError("attach: got a compiled model; attach to model._orig_mod, then compile")
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
    if any(isinstance(m, GatedPrompts) or MARK in vars(m) for m in model.modules()):
        raise RuntimeError(
            "attach: model has gated prompts already; call detach (or unwrap, for a wrapped part)"
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
