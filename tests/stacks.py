# SPDX-License-Identifier: Apache-2.0
"""Small models of the stacks that users have, and the method on them in plain PyTorch.

Models of projects that are no packages (MAE, DINO, OpenAI's CLIP) are restated: the same names of
classes and modules and the same order of operations, at toy size.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, SIDE, PATCH, DIM, DEPTH, HEADS = 4, 16, 8, 16, 3, 2


# ---- classes of projects ----


class PatchEmbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, DIM, PATCH, PATCH)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """DINO's: returns the attention weights too."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        batch, size, _ = x.shape
        qkv = self.qkv(x).reshape(batch, size, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        weights = (qkv[0] @ qkv[1].transpose(-2, -1) * (DIM // HEADS) ** -0.5).softmax(-1)
        return self.proj((weights @ qkv[2]).transpose(1, 2).flatten(2)), weights


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x, return_attention=False):
        y, weights = self.attn(self.norm1(x))
        if return_attention:
            return weights
        x = x + y
        return x + self.mlp(self.norm2(x))


class Dino(nn.Module):
    """As the class in DINO's vision_transformer.py."""

    embed_dim = DIM

    def __init__(self, num_classes=CLASSES):
        super().__init__()
        self.patch_embed = PatchEmbed()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (SIDE // PATCH) ** 2, DIM))
        self.blocks = nn.ModuleList([Block() for _ in range(DEPTH)])
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, num_classes) if num_classes else nn.Identity()

    def prepare_tokens(self, images):
        x = self.patch_embed(images)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed

    def forward(self, images):
        x = self.prepare_tokens(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])

    def get_intermediate_layers(self, images, n=1):
        x, found = self.prepare_tokens(images), []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if DEPTH - index <= n:
                found.append(self.norm(x))
        return found


def mae(global_pool=False):
    """As the class in MAE's models_vit.py: timm's blocks, its own forward."""
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")

    class Mae(vision_transformer.VisionTransformer):
        def __init__(self):
            super().__init__(SIDE, PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS,
                             num_classes=CLASSES)  # fmt: skip
            self.global_pool = global_pool
            if global_pool:
                self.fc_norm = nn.LayerNorm(DIM)
                del self.norm

        def forward_features(self, images):
            x = self.patch_embed(images)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
            for block in self.blocks:
                x = block(x)
            return self.fc_norm(x[:, 1:].mean(1)) if self.global_pool else self.norm(x)[:, 0]

        def forward(self, images):
            return self.head(self.forward_features(images))

    return Mae()


class ResidualAttentionBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(DIM, HEADS)
        self.ln_1, self.ln_2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Clip(nn.Module):
    """As the image tower of OpenAI's CLIP: its blocks run over [N, B, D]."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, DIM, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(DIM))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + (SIDE // PATCH) ** 2, DIM))
        self.ln_pre, self.ln_post = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(
            *(ResidualAttentionBlock() for _ in range(DEPTH))
        )
        self.proj = nn.Parameter(torch.zeros(DIM, CLASSES))

    def forward(self, images):
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding).transpose(0, 1)
        x = self.transformer.resblocks(x).transpose(0, 1)
        return self.ln_post(x[:, 0]) @ self.proj


class Encoder(nn.Module):
    """A model of one's own around torch's encoder, pooled by the mean."""

    def __init__(self):
        super().__init__()
        self.patch_embed = PatchEmbed()
        layer = nn.TransformerEncoderLayer(
            DIM, HEADS, 2 * DIM, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, images):
        return self.head(self.encoder(self.patch_embed(images)).mean(1))


class MyAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_qkv = nn.Linear(DIM, 3 * DIM, bias=False)

    def forward(self, x):
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in self.to_qkv(x).chunk(3, 2))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class MyLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = MyAttention(), nn.LayerNorm(DIM)
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x):
        return torch.tanh(self.out(self.attention(self.norm(x)))) + x


class MyModel(nn.Module):
    """A model whose names `attach` does not know. Pooled by the mean."""

    def __init__(self):
        super().__init__()
        self.patch_embed, self.encoder = PatchEmbed(), nn.Module()
        self.encoder.layers = nn.ModuleList([MyLayer() for _ in range(DEPTH)])
        self.classifier = nn.Linear(DIM, CLASSES)

    def forward(self, images):
        x = self.patch_embed(images)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.classifier(x.mean(1))


# ---- stacks ----


@dataclasses.dataclass
class Stack:
    """A model of a stack.

    make() returns it, blocks is the name of its blocks, query the name in a block of the layer (or
    the prefix of the parameters) that projects the queries. options: arguments of attach.
    """

    make: Callable[[], nn.Module]
    blocks: str
    query: str
    options: dict = dataclasses.field(default_factory=dict)
    batch_dim: int = 0

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make().double().eval()
        for parameter in model.parameters():  # replaces the initial zeros and ones
            nn.init.normal_(parameter, std=0.4)
        return model


def logits(model, images) -> Tensor:
    out = model(images)
    for name in ("logits", "pooler_output"):
        out = getattr(out, name, out)
    return out


def _torchvision():
    models = pytest.importorskip("torchvision.models")
    return models.VisionTransformer(SIDE, PATCH, DEPTH, HEADS, DIM, 2 * DIM, num_classes=CLASSES)


def _transformers(name, config, **changes):
    def make():
        transformers = pytest.importorskip("transformers")
        sizes = {
            "hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
            "intermediate_size": 2 * DIM, "image_size": SIDE, "patch_size": PATCH,
            "num_labels": CLASSES, **changes,
        }  # fmt: skip
        return getattr(transformers, name)(getattr(transformers, config)(**sizes))

    return make


def _named(new: str, old: str) -> str:
    """A name in transformers 5, or in transformers 4."""
    try:
        return old if importlib.metadata.version("transformers") < "5" else new
    except importlib.metadata.PackageNotFoundError:
        return new


def _open_clip():
    transformer = pytest.importorskip("open_clip.transformer")
    return transformer.VisionTransformer(
        SIDE, PATCH, DIM, DEPTH, HEADS, mlp_ratio=2.0, output_dim=CLASSES
    )


STACKS = {
    "MAE": Stack(mae, "blocks", "attn.qkv."),
    "MAE, average pool": Stack(lambda: mae(True), "blocks", "attn.qkv.", {"keep_prompts": True}),
    "DINO": Stack(Dino, "blocks", "attn.qkv."),
    "CLIP": Stack(Clip, "transformer.resblocks", "attn.in_proj_", {"batch_dim": 1}, batch_dim=1),
    "torch.nn": Stack(
        Encoder, "encoder.layers", "self_attn.in_proj_", {"blocks": "encoder.layers"}
    ),
    "own": Stack(
        MyModel, "encoder.layers", "attention.to_qkv.",
        {"blocks": "encoder.layers", "query": "attention.to_qkv"},
    ),
    "torchvision": Stack(_torchvision, "encoder.layers", "self_attention.in_proj_"),
    "open_clip": Stack(_open_clip, "transformer.resblocks", "attn.in_proj_"),
    "HF ViT": Stack(
        _transformers("ViTForImageClassification", "ViTConfig"),
        _named("vit.layers", "vit.encoder.layer"),
        _named("attention.q_proj.", "attention.attention.query."),
    ),
    "HF DINOv2": Stack(
        _transformers("Dinov2ForImageClassification", "Dinov2Config", mlp_ratio=2),
        "dinov2.encoder.layer", _named("attention.q_proj.", "attention.attention.query."),
    ),
    "HF DINOv3": Stack(
        _transformers(  # the rescaling would make training random
            "DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=2, pos_embed_rescale=None
        ),
        _named("model.layer", "layer"), "attention.q_proj.",
    ),
    "HF CLIP": Stack(
        _transformers("CLIPVisionModel", "CLIPVisionConfig"),
        _named("encoder.layers", "vision_model.encoder.layers"), "self_attn.q_proj.",
    ),
    "HF SigLIP": Stack(
        _transformers("SiglipVisionModel", "SiglipVisionConfig"),
        _named("encoder.layers", "vision_model.encoder.layers"), "self_attn.q_proj.",
    ),
}  # fmt: skip
PACKAGES = ("torchvision", "open_clip", "HF ")  # stacks that may be missing


# ---- the method in plain PyTorch ----


class EagerBlock(nn.Module):
    """A block, followed by the formula of the method on the whole sequence."""

    def __init__(self, block, index, stack, tuned, options):
        super().__init__()
        self.block, self.index, self.stack, self.options = block, index, stack, options
        vars(self)["tuned"] = tuned

    def __getattr__(self, name):  # torch.nn.TransformerEncoder asks for attributes of its blocks
        own = super().__getattr__
        return own(name) if name in ("block", "tuned") else getattr(own("block"), name)

    def forward(self, x, *args, **kwargs):
        swap = self.stack.batch_dim == 1
        t, deep = self.tuned, "deep_prompts.tokens" in self.tuned
        prompts = t["prompts.tokens"]
        p, s = len(prompts), self.options.get("start", 1)
        x = x.transpose(0, 1) if swap else x
        if self.index == 0:
            x = torch.cat([x[:, :s], prompts.to(x.dtype).expand(len(x), -1, -1), x[:, s:]], 1)
        out = self.block(x.transpose(0, 1) if swap else x, *args, **kwargs)
        h, *rest = out if isinstance(out, tuple) else (out,)
        h = h.transpose(0, 1) if swap else h
        is_last, old, new = self.index + 1 == DEPTH, x[:, s : s + p], h[:, s : s + p]
        if deep and not is_last:
            old = t["deep_prompts.tokens"][self.index].expand(len(x), -1, -1)
        weight = t.get(f"gates.{self.index}.weight")
        logit = t.get(f"gates.{self.index}.logit")
        if weight is not None:
            logit = F.linear(new, weight.to(new.dtype), t[f"gates.{self.index}.bias"].to(new.dtype))
        if logit is not None:
            g = torch.sigmoid(logit)
            is_mix = self.options.get("rule", "mix") == "mix"
            rows = g * new + (1 - g) * old if is_mix else old + g * new
        else:
            rows = old if deep and not is_last else new
        h = torch.cat([h[:, :s], rows.to(h.dtype), h[:, s + p :]], dim=1)
        if is_last and not self.options.get("keep_prompts", False):
            h = torch.cat([h[:, :s], h[:, s + p :]], dim=1)
        h = h.transpose(0, 1) if swap else h
        return (h, *rest) if isinstance(out, tuple) else h


class Eager(nn.Module):
    """`model`, not attached, with the method around its blocks. The temperature divides the rows of
    the queries in the weights."""

    def __init__(self, model, stack, tuned, options):
        super().__init__()
        container = model.get_submodule(stack.blocks)
        for index, block in enumerate(list(container)):
            container[index] = EagerBlock(block, index, stack, tuned, options)
        self.model, self.names = model, list(container._modules)
        self.stack = stack
        vars(self)["tuned"] = tuned

    def forward(self, images):
        changed = {}
        parameters = dict(self.model.named_parameters())
        for index, block in enumerate(self.names):
            tau = self.tuned.get(f"temperatures.{index}")
            prefix = f"{self.stack.blocks}.{block}.block.{self.stack.query}"
            for name in ("weight", "bias"):
                value = parameters.get(prefix + name)
                if tau is not None and (name == "weight" or value is not None):
                    rows = value[:DIM] / tau.clamp(0.01, 10).to(value.dtype)
                    changed[prefix + name] = torch.cat([rows, value[DIM:]])
        out = torch.func.functional_call(self.model, changed, (images,))
        for name in ("logits", "pooler_output"):
            out = getattr(out, name, out)
        return out
