# SPDX-License-Identifier: Apache-2.0
"""Gated prompts, and what the paper compares them with, around a frozen timm ViT."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gated_prompt.attention import (
    BACKENDS,
    TEMPERATURE_RANGE,
    TemperedAttention,
    check_attention,
    unavailable_reason,
)
from gated_prompt.functional import DTYPES, RULES, prompt_gate, prompt_gate_
from gated_prompt.modules import (
    GATES,
    POSITIONS,
    PROMPT_INITS,
    DeepPromptTokens,
    PromptGate,
    PromptTokens,
)
from gated_prompt.prompt_init import DATA_INITS, patch_tokens, prototypes

METHODS = ("linear", "full", "bias", "partial-k", "vpt-shallow", "vpt-deep", "gpt", "gpt-deep")
POOLS = ("cls", "patch", "prompt", "prompt+patch")
MEMORY = ("default", "low")
LAST_BLOCK = ("auto", "all-rows", "pooled-rows")
_MARK = "_is_wrapped_by_gated_prompt"  # on the timm model, while it is


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
    # what raises up to and including these leaves vit as it was
    prompts, deep_prompts, gates = _make_tuned(vit, options)
    replaced, replacements = _make_attention(vit, options)
    model = GatedPromptViT(vit, options, prompts, deep_prompts, gates)
    for block, replacement in zip(replaced, replacements, strict=True):
        block.attn = replacement
        if _is_pre_norm(block):  # on the instance, so that hooks of the block still run
            block.forward = functools.partial(_pre_norm_forward, block, memory == "low")
    setattr(vit, _MARK, True)
    if method in ("full", "bias"):
        _thaw(vit, biases_alone=method == "bias")
    elif method.startswith("partial-"):
        _thaw(nn.ModuleList([*vit.blocks[-_tuned_blocks(method) :], vit.norm, vit.fc_norm]))
    if frozen_dtype is not None:
        model._narrow_frozen(frozen_dtype)
    if prompts is not None and init_images is not None:
        try:
            model._init_prompts(init_images, prompt_init)
        except Exception:
            unwrap(model)
            raise
    return model


def unwrap(model: GatedPromptViT) -> nn.Module:
    """The timm model as it was before `wrap`: attention modules, requires_grad, train mode, dtypes.

    What "full", "bias" and "partial-k" have tuned of it stays tuned. The wrapper is of no use
    afterwards: save what was tuned before.
    """
    if not isinstance(model, GatedPromptViT):
        raise TypeError(
            "unwrap: model must be what wrap returned (of a compiled or parallel one, ._orig_mod "
            f"or .module), got {type(model).__name__}"
        )
    model.require_wrapped("unwrap")
    model._is_wrapped = False
    vit = model.backbone
    delattr(vit, _MARK)
    for block in vit.blocks:
        if isinstance(getattr(block, "attn", None), TemperedAttention):
            block.attn = block.attn.attn
            vars(block).pop("forward", None)
    for parameter, original in model._before_narrowing:
        parameter.data = original.to(parameter.device)
    for parameter, requires_grad in model._requires_grad_before:
        parameter.requires_grad_(requires_grad)
    for module, training in model._training_before:
        module.training = training
    return vit


def unpatched_name(name: str) -> str:
    """The name of a wrapper's parameter as if `wrap` had not replaced the attention."""
    name = re.sub(r"^backbone\.blocks\.(\d+)\.attn\.temperature$", r"temperatures.\1", name)
    return name.replace(".attn.attn.", ".attn.")


class GatedPromptViT(nn.Module):
    """A frozen timm ViT with prompts, gates, temperatures and a head; made by `wrap`.

    The prompts enter once, before the first block. After block l, their rows become
    g_l * block_l(x) + (1 - g_l) * x on the prompt rows (rule "mix"), which the fused op writes in
    place. With deep prompts, x in this formula is the fresh prompts of block l + 1; where block l
    has no gate, g_l = 0.

    Attributes:
        backbone: The timm model; what is frozen of it is always in eval mode.
        prompts: `PromptTokens`, or None.
        deep_prompts: `DeepPromptTokens`, or None.
        gates: A `PromptGate` for each of the first blocks.
        head: The classifier.
        options: What `wrap` was given, defaults resolved.
    """

    def __init__(self, vit, options, prompts, deep_prompts, gates):
        super().__init__()
        self.options, self._is_wrapped = options, True
        self._requires_grad_before = [(p, p.requires_grad) for p in vit.parameters()]
        self._training_before = [(m, m.training) for m in vit.modules()]
        self._before_narrowing: list[tuple[nn.Parameter, Tensor]] = []
        self.backbone = vit.requires_grad_(False)
        weight = next(vit.parameters())
        self.prompts = None if prompts is None else prompts.to(weight.device, weight.dtype)
        self.deep_prompts = None
        if deep_prompts is not None:
            self.deep_prompts = deep_prompts.to(weight.device, weight.dtype)
            closed = torch.tensor(-math.inf, device=weight.device)  # g is exactly 0
            self.register_buffer("_closed", closed, persistent=False)
        self.gates = nn.ModuleList(gates).to(weight.device)
        self.reset_classifier(vit.num_classes)
        self.train(vit.training)

    @property
    def method(self) -> str:
        return self.options["method"]

    @property
    def pool(self) -> str:
        return self.options["pool"]

    @property
    def num_prompts(self) -> int:
        return 0 if self.prompts is None else len(self.prompts.tokens)

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
        return getattr(self.head, "out_features", 0)

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
        narrowed = {id(parameter) for parameter, _ in self._before_narrowing}
        like = next(p for p in self.backbone.parameters() if id(p) not in narrowed)
        self.head = nn.Linear(
            self.backbone.num_features, num_classes, device=like.device, dtype=like.dtype
        )
        nn.init.kaiming_normal_(self.head.weight, mode="fan_out")
        nn.init.constant_(self.head.bias, -math.log(99))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm's optimiser factories leave out of weight decay."""
        own = {n for n, p in self.named_parameters() if n.startswith(("prompts.", "deep_prompts."))}
        own |= {n for n, _ in self.named_parameters() if n.startswith("gates.")}
        own |= {n for n, _ in self.named_parameters() if n.endswith(".temperature")}
        return own | {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layers, for timm's layer-wise decay of the learning rate."""
        stem = r"^(?:prompts|backbone\.(?:cls_token|reg_token|pos_embed|patch_embed|norm_pre|rope))"
        blocks = (r"^backbone\.blocks\.(\d+)", None)
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
        """Sets the mode of prompts, head and what is tuned of the backbone; what is frozen of it
        stays in eval mode."""
        super().train(mode)
        vit = self.backbone
        if self.method not in ("full", "bias"):
            vit.eval()
        if self.method.startswith("partial-"):
            vit.blocks[-_tuned_blocks(self.method) :].train(mode)
        return self

    def forward_features(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> tokens [B, N, D] after the last block.

        Before the final norm, unlike timm's: the paper's pools come between the two.
        """
        return self._run(images, pooled_rows=False)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, N, D] -> logits [B, classes]; pre_logits=True: pooled, normed [B, D]."""
        return self._head_of_rows(x[:, self._pooled_rows(x.shape[1])], pre_logits)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> logits [B, classes]."""
        if self.options["last_block"] == "pooled-rows":
            return self._head_of_rows(self._run(images, pooled_rows=True), False)
        return self.forward_head(self.forward_features(images))

    def require_wrapped(self, what: str) -> None:
        """Raises RuntimeError once the model was unwrapped."""
        if not self._is_wrapped:
            raise RuntimeError(
                f"{what}: this wrapper was unwrapped; save what was tuned before unwrap, or wrap "
                "the backbone again"
            )

    # ---- the forward pass ----

    def _run(self, images: Tensor, pooled_rows: bool) -> Tensor:
        """Tokens after the last block: all, or those that the pool reads."""
        vit = self.backbone
        x, ropes = self._embed(images)
        carrier = start = None
        is_constant = False  # but for the prompts
        if self.prompts is not None:
            is_constant = not x.requires_grad
            x, carrier, start = self.prompts(x, vit.num_prefix_tokens)
            if not torch.is_grad_enabled():
                carrier = None
            ropes = [self._rope_with_prompts(rope) for rope in ropes]
        last = len(vit.blocks) - 1
        for index in range(last + 1):
            rows = self._pooled_rows(x.shape[1]) if pooled_rows and index == last else None
            learned = carrier if index == 0 and is_constant and rows is None else None
            arguments = (x, carrier, index, start, ropes[index % len(ropes)], rows, learned)
            if vit.grad_checkpointing and torch.is_grad_enabled():
                x, carrier = checkpoint(self._gated_block, *arguments, use_reentrant=False)
            else:
                x, carrier = self._gated_block(*arguments)
        return x

    def _embed(self, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Tokens that enter the first block, [B, N, D], and timm's rotary embeddings: one for all
        blocks, or one for each."""
        self.require_wrapped("GatedPromptViT")
        vit = self.backbone
        if images.dim() != 4 or not images.is_floating_point():
            raise ValueError(
                "GatedPromptViT: images must be [B, C, H, W] in floating point, got "
                f"{list(images.shape)} in {images.dtype}"
            )
        size = vit.patch_embed.img_size
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

    def _gated_block(self, x, carrier, index, start, rope, rows, learned):
        """Block `index` and its gate, if it has one: x [B, N, D] and the carrier of the prompts'
        gradient (see `prompt_gate_`) -> the same after it; or of x these rows alone. learned: the
        prompts in x, if these are all that is learned of it."""
        block, options = self.backbone.blocks[index], {} if rope is None else {"rope": rope}
        if rows is not None:
            options["rows"] = rows
        if learned is not None and "forward" in vars(block):
            options["learned"] = (learned, start)
        out = block(x, **options)
        fresh, is_last = x, index == len(self.backbone.blocks) - 1
        if self.deep_prompts is not None and not is_last:
            fresh = self.deep_prompts(index + 1, out)
            carrier = fresh if torch.is_grad_enabled() else None
        if index < len(self.gates):
            gated = self.gates[index](out, fresh, start, self.num_prompts, carrier)
            return gated if carrier is not None else (gated, None)
        if fresh is not x:
            function = prompt_gate if torch.compiler.is_compiling() else prompt_gate_
            return function(out, fresh, self._closed, start, self.num_prompts), carrier
        return out, carrier

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

    def _head_of_rows(self, x: Tensor, pre_logits: bool) -> Tensor:
        x = x[:, 0] if self.pool == "cls" else x.mean(dim=1)
        # timm has one of the two, the other is Identity
        x = self.backbone.fc_norm(self.backbone.norm(x))
        return x if pre_logits else self.head(x)

    # ---- tuning ----

    @property
    def temperatures(self) -> list[nn.Parameter]:
        """The learnable temperatures, one per block, or none."""
        modules = (getattr(block, "attn", None) for block in self.backbone.blocks)
        found = (m.temperature for m in modules if isinstance(m, TemperedAttention))
        return [t for t in found if isinstance(t, nn.Parameter)]

    @torch.no_grad()
    def clamp_temperatures_(self) -> None:
        """Clamps the stored temperatures to [0.01, 10], as the original code does in forward."""
        for temperature in self.temperatures:
            temperature.clamp_(*TEMPERATURE_RANGE)

    def tuned_parameters(self) -> dict[str, nn.Parameter]:
        """All that is tuned, by names that do not depend on how the backbone is patched:
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
        "head"; a rate of None is `lr`."""
        rates = {
            "prompts": None,
            "gates": gate_lr,
            "temperatures": temperature_lr,
            "backbone": backbone_lr,
            "head": head_lr,
        }
        groups: dict[str, list] = {name: [] for name in rates}
        for name, parameter in self.tuned_parameters().items():
            groups[name.split(".")[0].removeprefix("deep_")].append(parameter)
        return [
            {
                "name": name,
                "params": params,
                "lr": lr if rates[name] is None else rates[name],
                "weight_decay": weight_decay,
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

    def _narrow_frozen(self, dtype: torch.dtype) -> None:
        for module in self.backbone.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                for parameter in module.parameters(recurse=False):
                    if not parameter.requires_grad:
                        self._before_narrowing.append((parameter, parameter.data.cpu()))
                        parameter.data = parameter.data.to(dtype)

    @torch.no_grad()
    def _init_prompts(self, images: Tensor | Iterable, init: str) -> None:
        vit = self.backbone

        def embed(batch):
            x, ropes = self._embed(batch.to(self.prompts.tokens.device))

            def run(index, x):
                rope = ropes[index % len(ropes)]
                return vit.blocks[index](x, **({} if rope is None else {"rope": rope}))

            return x, run

        blocks = [] if self.deep_prompts is None else range(len(vit.blocks) - 1)
        found = patch_tokens(embed, blocks, vit.num_prefix_tokens, images)
        first, *deep = (prototypes(tokens, self.num_prompts, init) for tokens in found)
        self.prompts.tokens.copy_(first)
        if deep:
            self.deep_prompts.tokens.copy_(torch.stack(deep))


# ---- checks, and what is known of timm's blocks ----


def check_backbone(vit) -> None:
    try:
        from timm.layers import PatchEmbed
        from timm.models.eva import Eva
        from timm.models.vision_transformer import VisionTransformer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"wrap: {error}; pip install 'gated-prompt[vit]'") from error
    if isinstance(vit, GatedPromptViT):
        raise TypeError(
            "wrap: vit must be a timm VisionTransformer or Eva, got a model that is wrapped already"
        )
    if not isinstance(vit, (VisionTransformer, Eva)):
        raise TypeError(
            "wrap: vit must be a timm.models.vision_transformer.VisionTransformer or a "
            f"timm.models.eva.Eva, got {type(vit).__module__}.{type(vit).__name__}"
        )
    if type(vit).forward_head not in (VisionTransformer.forward_head, Eva.forward_head):
        raise TypeError(
            f"wrap: vit must have the head and pool of its base class, got {type(vit).__name__}"
        )
    if type(vit.patch_embed) is not PatchEmbed:
        raise TypeError(
            "wrap: vit must have a timm.layers.PatchEmbed, got "
            f"{type(vit.patch_embed).__module__}.{type(vit.patch_embed).__name__}"
        )
    if getattr(vit, _MARK, False):
        raise RuntimeError("wrap: vit is wrapped already; call unwrap on its wrapper first")


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
        is_pooled = is_worth and all(_is_pre_norm(b) and _can_replace(b) for b in vit.blocks)
        o["last_block"] = "pooled-rows" if is_pooled else "all-rows"
    elif o["last_block"] == "pooled-rows" and is_last_gated:
        raise ValueError(
            "wrap: last_block='pooled-rows' needs a last block without a gate, got gated_blocks="
            f"{depth} of {depth}"
        )
    other = next((block for block in vit.blocks if not _is_pre_norm(block)), None)
    if other is not None and (o["memory"] == "low" or o["last_block"] == "pooled-rows"):
        raise TypeError(
            f"wrap: memory={o['memory']!r} and last_block={o['last_block']!r} need timm's Block or "
            f"EvaBlock, got {type(other).__module__}.{type(other).__name__}"
        )
    return o


def _make_tuned(vit: nn.Module, o: dict):
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


def _make_attention(vit: nn.Module, o: dict):
    """The blocks whose attention is replaced, and by what."""
    temperature, blocks = o["temperature"], list(vit.blocks)
    is_needed = temperature is not False or o["attention"] not in ("auto", "sdpa")
    is_needed = is_needed or o["last_block"] == "pooled-rows" or o["memory"] == "low"
    if not is_needed:  # it spares a stack of the gradients of q, k and v
        blocks = [block for block in blocks if o["num_prompts"] and _can_replace(block)]
    start = 1.0 if isinstance(temperature, bool) else float(temperature)
    return blocks, [
        TemperedAttention(getattr(block, "attn", None), start, temperature is True, o["attention"])
        for block in blocks
    ]


def _default_pool(vit: nn.Module) -> str:
    config = getattr(vit, "pretrained_cfg", None) or {}
    tag = config.get("tag") if isinstance(config, dict) else getattr(config, "tag", None)
    source = getattr(vit, "_gated_prompt_source", None)  # set by load_backbone
    if source == "mae" or (tag is not None and tag.split(".")[-1].startswith("mae")):
        return "prompt+patch"
    if vit.global_pool == "token":
        return "cls"
    if vit.global_pool == "avg" and isinstance(vit.norm, nn.Identity):
        return "patch"
    raise ValueError(
        f"wrap: pool must be one of {POOLS}, got None, for a backbone with global_pool="
        f"{vit.global_pool!r} and final norm {type(vit.norm).__name__}, which norms before it "
        "pools; here the norm comes after"
    )


def _can_replace(block: nn.Module) -> bool:
    try:
        check_attention(getattr(block, "attn", None))
    except TypeError:
        return False
    return True


def _is_pre_norm(block: nn.Module) -> bool:
    """Whether it is x + scale(attn(norm1(x))), then x + scale(mlp(norm2(x)))."""
    from timm.models.eva import EvaBlock
    from timm.models.vision_transformer import Block

    return type(block) in (Block, EvaBlock)


def _pre_norm_forward(
    block: nn.Module,
    recomputes: bool,
    x: Tensor,
    rows: slice | None = None,
    learned: tuple[Tensor, int] | None = None,
    **options,
) -> Tensor:
    """In place of the forward of one block, whose attention is a `TemperedAttention`.

    recomputes: The MLP's hidden layer, in backward. rows: the result of these rows alone. learned:
    a copy of the rows of x that are learned, and where they start; they get the gradient of x, but
    for that through the residual connection, where the attention can do so.
    """
    norm1 = block.norm1
    if learned is not None:
        is_frozen = not any(parameter.requires_grad for parameter in norm1.parameters())
        takes = is_frozen and block.attn.takes_learned_rows(x) and not torch.compiler.is_compiling()
        learned = learned if takes else None
    if not recomputes and rows is None and learned is None:
        return type(block).forward(block, x, **options)
    if rows is not None:
        options["rows"] = rows
    if learned is None:
        y = norm1(x)
    else:  # of the rest of x nothing is kept for backward
        y = norm1(x.detach())
        options["learned"] = norm1(learned[0]), learned[1]
    if hasattr(block, "ls1"):
        scale1, scale2 = block.ls1, block.ls2
    else:  # Eva's
        scale1, scale2 = (
            nn.Identity() if gamma is None else gamma.mul
            for gamma in (block.gamma_1, block.gamma_2)
        )
    x = x if rows is None else x[:, rows]
    x = x + block.drop_path1(scale1(block.attn(y, **options)))

    def mlp(x):
        return block.mlp(block.norm2(x))

    if recomputes and torch.is_grad_enabled():
        # it stops where the last tensor is back that backward needs: before fc2
        y = checkpoint(mlp, x, use_reentrant=False, preserve_rng_state=block.training)
    else:
        y = mlp(x)
    return x + block.drop_path2(scale2(y))


def _thaw(module: nn.Module, biases_alone: bool = False) -> None:
    """Lets the parameters of a backbone, or of parts of it, be tuned, but for timm's own head and
    pool, which are not used."""
    unused = {
        id(parameter)
        for part in (getattr(module, "head", None), getattr(module, "attn_pool", None))
        if part is not None
        for parameter in part.parameters()
    }
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            is_bias = name == "bias" or name.endswith("_bias")  # q_bias, v_bias of Eva
            if id(parameter) not in unused and (is_bias or not biases_alone):
                parameter.requires_grad_(True)
