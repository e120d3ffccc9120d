# SPDX-License-Identifier: Apache-2.0
"""Gated prompts around a frozen timm VisionTransformer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gated_prompt.attention import BACKENDS, TEMPERATURE_RANGE, TemperedAttention
from gated_prompt.modules import POSITIONS, PROMPT_INITS, PromptGate, PromptTokens

METHODS = ("linear", "vpt-shallow", "gpt")
_MARK = "_is_wrapped_by_gated_prompt"  # on the timm model, while it is
POOLS = ("cls", "patch", "prompt", "prompt+patch")


def wrap(
    vit: nn.Module,
    method: str = "gpt",
    *,
    num_prompts: int = 100,
    gate: str = "scalar",
    rule: str = "mix",
    gate_init: float | None = None,
    gated_blocks: int | None = None,
    temperature: bool | float = True,
    prompt_position: str = "start",
    prompt_dropout: float = 0.1,
    prompt_init: str = "uniform",
    pool: str | None = None,
    attention: str = "auto",
) -> GatedPromptViT:
    """Freezes a timm VisionTransformer and adds what `method` tunes.

    The instance `vit` is changed until `unwrap`: its parameters stop requiring gradients, and where
    a temperature is asked for, the attention of each block is replaced. A new linear head with
    `vit.num_classes` outputs is made (none if that is 0); `vit.head` stays as it is, unused.

    Args:
        vit: A `timm.models.vision_transformer.VisionTransformer`.
        method: "linear" (the head alone), "vpt-shallow" (prompts at the first block and the head),
            "gpt" (prompts, a gate per block, a temperature per block, and the head).
        num_prompts: P. Not used by "linear".
        gate, rule: See `PromptGate`; "gpt" only.
        gate_init: The `init` of `PromptGate`; None: nearly closed, -5, but for the linear gates,
            which start near 0.5.
        gated_blocks: How many blocks, from the first, have a gate. None: all but the last
            (rule="mix"), all (rule="residual").
        temperature: "gpt" only. True: learnable in every block, from 1. False: 1. A float: that
            constant.
        prompt_position, prompt_dropout, prompt_init: See `PromptTokens`.
        pool: What the head reads. "cls": the class token. "patch", "prompt", "prompt+patch": the
            mean of these tokens. The backbone's own final norm comes after. None: "prompt+patch"
            for a backbone tagged MAE in timm (as in the paper), else what the backbone was built
            with.
        attention: Backend of blocks with a temperature; see `tempered_attention`.

    Returns:
        A `GatedPromptViT`.

    Raises:
        TypeError: vit is not a timm VisionTransformer.
        ValueError: an option is unknown or out of range.
        RuntimeError: vit is wrapped already.

    Source: Yoo et al., ICML 2023, arXiv 2306.05067, sections 3.2 and 3.3; head and prompt
    initialisation as in Jia et al., ECCV 2022 (VPT).
    """
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"wrap: {error}; pip install 'gated-prompt[vit]'") from error
    if isinstance(vit, GatedPromptViT):
        raise TypeError(
            "wrap: vit must be a timm VisionTransformer, got a model that is wrapped already"
        )
    if not isinstance(vit, VisionTransformer):
        raise TypeError(
            "wrap: vit must be a timm.models.vision_transformer.VisionTransformer, "
            f"got {type(vit).__module__}.{type(vit).__name__}"
        )
    if getattr(vit, _MARK, False):
        raise RuntimeError("wrap: vit is wrapped already; call unwrap on its wrapper first")
    counts = {
        "num_prompts": num_prompts,
        "gated_blocks": 0 if gated_blocks is None else gated_blocks,
    }
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"wrap: {name} must be an int, got {type(value).__name__}")
    if not isinstance(temperature, (bool, int, float)):
        raise TypeError(f"wrap: temperature must be a bool or a float, got {temperature!r}")
    for name, value, allowed in (
        ("method", method, METHODS),
        ("prompt_position", prompt_position, POSITIONS),
        ("prompt_init", prompt_init, PROMPT_INITS),
        ("pool", pool, (None, *POOLS)),
        ("attention", attention, BACKENDS),
    ):
        if value not in allowed:
            raise ValueError(f"wrap: {name} must be one of {allowed}, got {value!r}")
    if method == "linear":
        num_prompts = 0
    elif num_prompts < 1:
        raise ValueError(f"wrap: num_prompts must be at least 1 for {method}, got {num_prompts}")
    depth = len(vit.blocks)
    if method != "gpt":
        gated_blocks, temperature = 0, False
    elif gated_blocks is None:
        gated_blocks = depth - 1 if rule == "mix" else depth
    if not 0 <= gated_blocks <= depth:
        raise ValueError(f"wrap: gated_blocks must be in [0, {depth}], got {gated_blocks}")
    pool = _default_pool(vit) if pool is None else pool
    if pool == "prompt" and num_prompts == 0:
        raise ValueError("wrap: pool='prompt' needs prompts, and method 'linear' has none")
    if pool == "cls" and not vit.has_class_token:
        raise ValueError("wrap: pool='cls' needs a class token, and vit has none")
    if temperature is not False:
        start = 1.0 if temperature is True else temperature
        low, high = TEMPERATURE_RANGE
        if not low <= start <= high:
            raise ValueError(f"wrap: temperature must be in [{low}, {high}], got {temperature}")
    # what raises up to and including these leaves vit as it was
    sizes = {"dim": vit.embed_dim, "num_prompts": num_prompts}
    gates = [PromptGate(gate, rule, init=gate_init, **sizes) for _ in range(gated_blocks)]
    replacements = [
        TemperedAttention(getattr(block, "attn", None), start, temperature is True, attention)
        for block in (vit.blocks if temperature is not False else ())
    ]
    prompts = None
    if num_prompts:
        prompts = PromptTokens(
            num_prompts,
            vit.embed_dim,
            position=prompt_position,
            dropout=prompt_dropout,
            init=prompt_init,
            patch_dim=vit.patch_embed.proj.weight[0].numel(),
        )
    model = GatedPromptViT(vit, method, prompts, gates, pool)
    for block, replacement in zip(vit.blocks, replacements, strict=False):
        block.attn = replacement
    setattr(vit, _MARK, True)
    return model


def unwrap(model: GatedPromptViT) -> nn.Module:
    """The timm model as it was before `wrap`: attention modules, requires_grad, train mode.

    The wrapper is of no use afterwards.
    """
    if not isinstance(model, GatedPromptViT):
        raise TypeError(f"unwrap: model must be what wrap returned, got {type(model).__name__}")
    vit = model.backbone
    delattr(vit, _MARK)
    for block in vit.blocks:
        if isinstance(getattr(block, "attn", None), TemperedAttention):
            block.attn = block.attn.attn
    for parameter, requires_grad in model._requires_grad_before:
        parameter.requires_grad_(requires_grad)
    for module, training in model._training_before:
        module.training = training
    return vit


class GatedPromptViT(nn.Module):
    """A frozen timm VisionTransformer with prompts, gates, temperatures and a head; made by `wrap`.

    The prompts enter once, before the first block. After block l, their rows become
    g_l * block_l(x) + (1 - g_l) * x on the prompt rows (rule "mix"), which the fused op writes in
    place.

    Attributes:
        backbone: The timm model, frozen and always in eval mode.
        prompts: `PromptTokens`, or None.
        gates: A `PromptGate` for each of the first blocks.
        head: The classifier.
    """

    def __init__(self, vit, method, prompts, gates, pool):
        super().__init__()
        self.method, self.pool = method, pool
        self._requires_grad_before = [(p, p.requires_grad) for p in vit.parameters()]
        self._training_before = [(m, m.training) for m in vit.modules()]
        self.backbone = vit.requires_grad_(False).eval()
        weight = next(vit.parameters())
        self.prompts = None if prompts is None else prompts.to(weight.device, weight.dtype)
        self.gates = nn.ModuleList(gates).to(weight.device)
        self.reset_classifier(vit.num_classes)

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
    def num_classes(self) -> int:
        return getattr(self.head, "out_features", 0)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A new head: weights Kaiming normal (fan_out), biases -ln(99). 0 classes: no head."""
        weight = next(self.backbone.parameters())
        if num_classes == 0:
            self.head = nn.Identity()
            return
        self.head = nn.Linear(
            self.backbone.num_features, num_classes, device=weight.device, dtype=weight.dtype
        )
        nn.init.kaiming_normal_(self.head.weight, mode="fan_out")
        nn.init.constant_(self.head.bias, -math.log(99))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block, with its gate, in backward instead of keeping its activations."""
        self.backbone.set_grad_checkpointing(enable)

    def train(self, mode: bool = True) -> GatedPromptViT:
        """Sets the mode of prompts and head; the frozen backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward_features(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> tokens [B, N, D] after the last block.

        Before the final norm, unlike timm's: the paper's pools come between the two.
        """
        vit = self.backbone
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        carrier = start = None
        if self.prompts is not None:
            x, carrier, start = self.prompts(x, vit.num_prefix_tokens)
        for index in range(len(vit.blocks)):
            arguments = (x, carrier, index, start)
            if vit.grad_checkpointing and torch.is_grad_enabled():
                x, carrier = checkpoint(self._gated_block, *arguments, use_reentrant=False)
            else:
                x, carrier = self._gated_block(*arguments)
        return x

    def _gated_block(self, x: Tensor, carrier: Tensor | None, index: int, start: int | None):
        """Block `index` and its gate, if it has one: x [B, N, D] and the carrier of the prompts'
        gradient (see `prompt_gate_`) -> the same after it."""
        out = self.backbone.blocks[index](x)
        if index < len(self.gates):
            return self.gates[index](out, x, start, self.num_prompts, carrier)
        return out, carrier

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, N, D] -> logits [B, classes]; pre_logits=True: pooled, normed [B, D]."""
        first = self.backbone.num_prefix_tokens
        prompts = slice(first, first + self.num_prompts)
        patches = slice(first + self.num_prompts, None)
        if self.prompts is not None and self.prompts.position == "end":
            border = x.shape[1] - self.num_prompts
            prompts, patches = slice(border, None), slice(first, border)
        if self.pool == "cls":
            x = x[:, 0]
        elif self.pool == "prompt+patch":
            x = x[:, first:].mean(dim=1)
        else:
            x = x[:, prompts if self.pool == "prompt" else patches].mean(dim=1)
        x = self.backbone.fc_norm(
            self.backbone.norm(x)
        )  # timm has one of the two, the other is Identity
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> logits [B, classes]."""
        return self.forward_head(self.forward_features(images))

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

    def param_groups(
        self,
        lr: float,
        weight_decay: float = 0.0,
        gate_lr: float | None = None,
        temperature_lr: float | None = None,
        head_lr: float | None = None,
    ) -> list[dict]:
        """Optimiser groups "prompts", "gates", "temperatures", "head"; a rate of None is `lr`."""
        groups = (
            ("prompts", [] if self.prompts is None else [self.prompts.tokens], None),
            ("gates", list(self.gates.parameters()), gate_lr),
            ("temperatures", self.temperatures, temperature_lr),
            ("head", list(self.head.parameters()), head_lr),
        )
        return [
            {
                "name": name,
                "params": params,
                "lr": lr if rate is None else rate,
                "weight_decay": weight_decay,
            }
            for name, params, rate in groups
            if params
        ]

    @torch.no_grad()
    def gate_report(self) -> dict[str, list[float]]:
        """What was learned, as floats.

        Returns:
            "gates": g_l of each gated block, the mean where a gate has several elements; empty for
            the linear gates, which depend on the tokens. "temperatures": tau_l of each block where
            it is learned, clamped. "selection": for scalar gates of rule "mix", the weight in the
            prompts after the last gate of the initial prompts, prod_l (1 - g_l), then of each gated
            block, g_l * prod_{k>l} (1 - g_k); they sum to 1.
        """
        logits = [gate.logit for gate in self.gates if gate.logit is not None]
        gates = [logit.double().sigmoid().mean().item() for logit in logits]
        selection = []
        if gates and self.gates[0].rule == "mix" and self.gates[0].gate == "scalar":
            passed = 1.0
            for g in reversed(gates):
                selection.insert(0, g * passed)
                passed *= 1 - g
            selection.insert(0, passed)
        temperatures = [t.clamp(*TEMPERATURE_RANGE).item() for t in self.temperatures]
        return {"gates": gates, "temperatures": temperatures, "selection": selection}


def _default_pool(vit: nn.Module) -> str:
    config = getattr(vit, "pretrained_cfg", None) or {}
    tag = config.get("tag") if isinstance(config, dict) else getattr(config, "tag", None)
    if tag is not None and tag.split(".")[-1].startswith("mae"):
        return "prompt+patch"
    if vit.global_pool == "token":
        return "cls"
    if vit.global_pool == "avg" and isinstance(vit.norm, nn.Identity):
        return "patch"
    raise ValueError(
        f"wrap: pool must be one of {POOLS} for a backbone with global_pool={vit.global_pool!r} "
        f"and final norm {type(vit.norm).__name__}, got None"
    )
