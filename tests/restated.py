# SPDX-License-Identifier: Apache-2.0
"""The method restated step by step in float64, and the small models that it is tested on."""

import torch
import torch.nn.functional as F
from conftest import timm_or_skip
from torch import nn

import gated_prompt as gp

timm_or_skip()
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer


def small_vit(**changes):
    torch.manual_seed(0)
    options = {
        "img_size": (40, 24), "patch_size": 8, "embed_dim": 36, "depth": 3, "num_heads": 3,
        "num_classes": 5, "reg_tokens": 0, "global_pool": "token", "init_values": 0.5,
    }  # fmt: skip
    return randomised(VisionTransformer(**{**options, **changes}))


def small_eva(**changes):
    torch.manual_seed(0)
    options = {
        "img_size": (40, 24), "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3,
        "num_classes": 5, "global_pool": "token", "use_rot_pos_emb": True,
    }  # fmt: skip
    return randomised(Eva(**{**options, **changes}))


def randomised(vit):
    for parameter in vit.double().parameters():  # replaces the initial zeros and ones
        nn.init.normal_(parameter, std=0.3)
    return vit


def restated_attention(attn, tau, y, rope, is_patch):
    """softmax(q k^T / sqrt(d) / tau) v by explicit products; rope rotates only the patches."""
    if attn.qkv is None:
        parts = [F.linear(y, p.weight, p.bias) for p in (attn.q_proj, attn.k_proj, attn.v_proj)]
    else:
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        parts = F.linear(y, attn.qkv.weight, bias).chunk(3, dim=2)
    q, k, v = (part.unflatten(2, (-1, attn.head_dim)).transpose(1, 2) for part in parts)
    q, k = getattr(attn.q_norm, "norm", attn.q_norm)(q), attn.k_norm(k)  # without the temperature
    if rope is not None:
        sin, cos = rope.chunk(2, dim=-1)

        def turned(t):
            half = attn.head_dim // 2
            if attn.rotate_half:
                other = torch.cat([-t[..., half:], t[..., :half]], dim=-1)
            else:
                other = torch.stack([-t[..., 1::2], t[..., ::2]], dim=-1).flatten(-2)
            return t * cos + other * sin

        at = is_patch.nonzero()[:, 0]  # in the order of rope
        q, k = (t.index_copy(2, at, turned(t[:, :, at])) for t in (q, k))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(-2, -1) / attn.head_dim**0.5 / tau
    out = attn.norm((torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2))
    if getattr(attn, "gate", None) is not None:
        out = out * torch.sigmoid(F.linear(y, attn.gate.weight, attn.gate.bias))
    return F.linear(out, attn.proj.weight, attn.proj.bias)


def restated(model, images):
    """Runs the method as the paper states it, with explicit attention and cat.

    Returns (features, logits).
    """
    vit, depth = model.backbone, len(model.backbone.blocks)
    batch, prompts = images.shape[0], model.num_prompts
    patch = vit.patch_embed.patch_size[0]
    x = F.conv2d(images, vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=patch)
    x = x.flatten(2).transpose(1, 2)
    prefix = [] if vit.cls_token is None else [vit.cls_token]
    prefix += [] if vit.reg_token is None else [vit.reg_token]
    prefix = [token.expand(batch, -1, -1) for token in prefix]
    if vit.pos_embed is not None and vit.no_embed_class:
        x = x + vit.pos_embed
    x = torch.cat([*prefix, x], dim=1)
    if vit.pos_embed is not None and not vit.no_embed_class:
        x = x + vit.pos_embed
    x = vit.norm_pre(x)
    at_end = model.prompts is not None and model.prompts.position == "end"
    first = x.shape[1] if at_end else vit.num_prefix_tokens
    if prompts:
        inserted = model.prompts.tokens.expand(batch, -1, -1)
        x = torch.cat([x[:, :first], inserted, x[:, first:]], dim=1)
    is_prompt = torch.zeros(x.shape[1], dtype=torch.bool)
    is_prompt[first : first + prompts] = True
    is_prefix = torch.zeros_like(is_prompt)
    is_prefix[: vit.num_prefix_tokens] = True
    grid = tuple(size // patch for size in images.shape[-2:])
    ropes = None if getattr(vit, "rope", None) is None else vit.rope.get_embed(shape=grid)
    for index, block in enumerate(vit.blocks):
        attn, tau = block.attn, torch.tensor(float(model.options.temperature or 1.0)).to(x)
        if len(model.temperatures) > 0:
            tau = model.temperatures[index].to(x.dtype)
            tau = tau + (tau.clamp(0.01, 10.0) - tau).detach()
        rope = ropes[index] if ropes is not None and ropes.dim() > 2 else ropes
        scales = [getattr(block, name, None) for name in ("gamma_1", "gamma_2")]
        if hasattr(block, "ls1"):
            scales = [getattr(ls, "gamma", None) for ls in (block.ls1, block.ls2)]
        scales = [1.0 if scale is None else scale for scale in scales]
        norms = [
            lambda y, norm=norm: F.layer_norm(y, y.shape[-1:], norm.weight, norm.bias, norm.eps)
            for norm in (block.norm1, block.norm2)
        ]
        y = restated_attention(attn, tau, norms[0](x), rope, ~is_prompt & ~is_prefix)
        h = x + scales[0] * y
        h = h + scales[1] * block.mlp(norms[1](h))
        old = x[:, first : first + prompts]
        if model.deep_prompts is not None and index + 1 < depth:
            old = model.deep_prompts.tokens[index].expand(batch, -1, -1)
        if index < len(model.gates):
            gate = model.gates[index]
            new = h[:, first : first + prompts]
            logit = F.linear(new, gate.weight, gate.bias) if gate.logit is None else gate.logit
            g = torch.sigmoid(logit)
            mixed = g * new + (1 - g) * old if gate.rule == "mix" else old + g * new
            h = torch.cat([h[:, :first], mixed, h[:, first + prompts :]], dim=1)
        elif model.deep_prompts is not None and index + 1 < depth:
            h = torch.cat([h[:, :first], old, h[:, first + prompts :]], dim=1)
        x = h
    assert depth == index + 1
    pooled = {
        "cls": lambda: x[:, 0],
        "patch": lambda: x[:, ~is_prompt & ~is_prefix].mean(1),
        "prompt": lambda: x[:, is_prompt].mean(1),
        "prompt+patch": lambda: x[:, ~is_prefix].mean(1),
    }[model.pool]()
    norm = vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm
    features = F.layer_norm(pooled, (x.shape[-1],), norm.weight, norm.bias, norm.eps)
    return features, F.linear(features, model.head.weight, model.head.bias)


def tuned(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def randomise(model, logit=None):
    """Moves gate logits and temperatures away from their initial values, so that a mix-up shows."""
    with torch.no_grad():
        for index, gate in enumerate(model.gates):
            if gate.logit is not None:
                noise = 0.3 * torch.randn(gate.logit.shape)
                gate.logit.copy_(0.7 * index - 0.8 + noise if logit is None else logit)
        for index, temperature in enumerate(model.temperatures):
            temperature.fill_(0.6 + 0.5 * index)
    return model.double().train()


SECOND_SYSTEM = {
    "gate": "linear", "rule": "residual", "prompt_position": "end", "prompt_init": "normal",
}  # fmt: skip
GPT_DEEP = {"method": "gpt-deep"}
OPTIONS = [
    {"method": "linear"},
    {"method": "linear", "pool": "patch"},
    {"method": "full"},
    {"method": "bias", "pool": "patch"},
    {"method": "partial-1"},
    {"method": "partial-2", "pool": "prompt+patch"},
    {"method": "vpt-shallow", "pool": "prompt+patch"},
    {"method": "vpt-deep"},
    {"method": "vpt-deep", "pool": "prompt", "prompt_position": "end"},
    {"method": "gpt"},
    {"method": "gpt", "pool": "patch"},
    {"method": "gpt", "pool": "prompt"},
    {"method": "gpt", "pool": "prompt+patch"},
    {"method": "gpt", "pool": "patch", "prompt_position": "end"},
    {"method": "gpt", "pool": "prompt+patch", "prompt_position": "end", "rule": "residual"},
    {"method": "gpt", "gate": "channel"},
    {"method": "gpt", "gate": "token", "rule": "residual", "pool": "prompt"},
    {"method": "gpt", "gate": "full"},
    {"method": "gpt", "gate": "linear", "rule": "mix"},
    {"method": "gpt", "gate": "linear-token", "rule": "residual", "pool": "prompt+patch"},
    {**SECOND_SYSTEM, "pool": "prompt+patch"},
    {"method": "gpt", "gate": None},
    {"method": "gpt", "gated_blocks": 1},
    {"method": "gpt", "gated_blocks": 3, "pool": "prompt"},
    {"method": "gpt", "gated_blocks": 0},
    {"method": "gpt", "temperature": False},
    {"method": "gpt", "temperature": 0.5},
    {"method": "gpt", "attention": "math"},
    {"method": "gpt", "attention": "sdpa", "prompt_init": "normal"},
    GPT_DEEP,
    {**GPT_DEEP, "gated_blocks": 1, "pool": "prompt+patch"},
    {**GPT_DEEP, "gated_blocks": 3, "pool": "prompt", "temperature": False},
    {**GPT_DEEP, **SECOND_SYSTEM, "pool": "prompt"},
    {"method": "gpt", "memory": "low"},
    {"method": "gpt", "last_block": "all-rows"},
    {"method": "gpt", "last_block": "all-rows", "memory": "low"},
    {"method": "gpt", "last_block": "pooled-rows", "pool": "patch", "memory": "low"},
    {"method": "vpt-deep", "last_block": "pooled-rows", "pool": "prompt", "memory": "low"},
    {"method": "full", "last_block": "pooled-rows", "memory": "low"},
]
VITS = {
    "MAE-style": (small_vit, {"init_values": None}),
    "MoCo-v3-style": (small_vit, {"init_values": None, "embed_dim": 24, "num_heads": 6}),
    "registers": (small_vit, {"reg_tokens": 2}),
    "DINOv2-registers-style": (small_vit, {"reg_tokens": 2, "no_embed_class": True}),
    "average pool": (small_vit, {"global_pool": "avg"}),
    "CLIP-style": (small_vit, {
        "pre_norm": True, "qk_norm": True, "scale_attn_norm": True, "norm_layer": nn.LayerNorm,
    }),
    "EVA-02-style": (small_eva, {"swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False}),
    "DINOv3-style": (small_eva, {
        "rope_type": "dinov3", "num_reg_tokens": 2, "init_values": 0.5, "use_abs_pos_emb": False,
        "rope_rotate_half": True, "dynamic_img_size": True, "qkv_bias": False,
    }),
    "mixed rotary": (small_eva, {"rope_type": "mixed", "attn_type": "rope"}),
    "grouped queries": (small_eva, {
        "attn_type": "rope", "num_kv_heads": 1, "qkv_fused": False, "qk_norm": True,
    }),
}  # fmt: skip
SAMPLE = [  # some of OPTIONS, for backbones whose differences no option touches
    {"method": "linear"}, {"method": "full"}, {"method": "vpt-shallow", "pool": "prompt+patch"},
    {"method": "vpt-deep"}, {"method": "gpt"}, {"method": "gpt", "pool": "patch"},
    {**SECOND_SYSTEM, "pool": "prompt+patch"}, {"method": "gpt", "temperature": 0.5}, GPT_DEEP,
    {"method": "gpt", "last_block": "pooled-rows", "pool": "patch", "memory": "low"},
]  # fmt: skip


def make_case(vit, options):
    make, changes = VITS[vit]
    model = gp.wrap(make(**changes), num_prompts=4, prompt_dropout=0.0, head="vpt", **options)
    return randomise(model)  # the head "vpt" is large, so gradients are not small
