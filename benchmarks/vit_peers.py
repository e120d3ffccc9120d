# SPDX-License-Identifier: Apache-2.0
"""Whole models around a frozen timm ViT, gated_prompt's beside those that others would write.

`make` gives a peer by its name: images [B, 3, H, W] -> logits [B, classes], where only what is
tuned requires grad. All peers have the same backbone weights, head, prompts, gates and
temperatures, none has dropout, and the head of all reads the normed class token. `check` must pass
before a peer is timed.
"""

import functools
import importlib.util

import timm
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import gated_prompt as gp

NUM_CLASSES = 100

# ---- the peers ----


class Linear(nn.Module):
    """The head alone, on frozen features; the base of the peers below."""

    def __init__(self, vit):
        super().__init__()
        self.vit = vit.requires_grad_(False).eval()
        self.head = nn.Linear(vit.embed_dim, NUM_CLASSES)

    def forward(self, images):
        with torch.no_grad():
            features = self.vit.norm(self.blocks(self.embed(images))[:, 0])
        return self.head(features)

    def embed(self, images):
        return self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(images)))

    def blocks(self, x):
        for block in self.vit.blocks:
            x = block(x)
        return x

    def tuned(self):
        """What is tuned, by the names of gp's `param_groups`."""
        return {"head": list(self.head.parameters())}


class CachedLinear(Linear):
    """The head on features that were computed once, before."""

    def __init__(self, vit):
        super().__init__(vit)
        self.features = {}

    def forward(self, images):
        key = images.data_ptr(), len(images)
        if key not in self.features:
            with torch.no_grad():
                self.features[key] = self.vit.norm(self.blocks(self.embed(images))[:, 0])
        return self.head(self.features[key])


class Full(Linear):
    """Everything tuned."""

    def __init__(self, vit):
        super().__init__(vit)
        vit.reset_classifier(0)
        vit.requires_grad_(True)

    def forward(self, images):
        return self.head(self.vit.norm(self.blocks(self.embed(images))[:, 0]))

    def tuned(self):
        return {"backbone": list(self.vit.parameters()), **super().tuned()}


class Lora(Linear):
    """peft's LoRA on the qkv of every block."""

    def __init__(self, vit, rank=8):
        import peft

        super().__init__(vit)
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["qkv"])
        peft.get_peft_model(vit, config)  # changes vit, too

    def forward(self, images):
        return self.head(self.vit.norm(self.blocks(self.embed(images))[:, 0]))

    def tuned(self):
        lora = [p for p in self.vit.parameters() if p.requires_grad]
        return {"lora": lora, **super().tuned()}


class VPTShallow(Linear):
    """Prompts behind the prefix tokens; the blocks are timm's own, on SDPA."""

    def __init__(self, vit, num_prompts):
        super().__init__(vit)
        self.prompts = nn.Parameter(torch.empty(num_prompts, vit.embed_dim))
        self.start = vit.num_prefix_tokens

    def forward(self, images):
        x = self.with_prompts(self.embed(images), self.prompts, end=self.start)
        return self.head(self.vit.norm(self.blocks(x)[:, 0]))

    def with_prompts(self, x, prompts, end):
        """prompts in the place of rows [start, end) of x."""
        prompts = prompts.expand(len(x), -1, -1).to(x.dtype)
        return torch.cat([x[:, : self.start], prompts, x[:, end:]], dim=1)

    def tuned(self):
        return {"prompts": [self.prompts], **super().tuned()}


class VPTDeep(VPTShallow):
    """Fresh prompts in the slots before every block."""

    def __init__(self, vit, num_prompts):
        super().__init__(vit, num_prompts)
        later = torch.empty(len(vit.blocks) - 1, num_prompts, vit.embed_dim)
        self.later_prompts = nn.Parameter(later)

    def blocks(self, x):
        first, *rest = self.vit.blocks
        x = first(x)
        for block, prompts in zip(rest, self.later_prompts, strict=True):
            x = block(self.with_prompts(x, prompts, end=self.start + len(prompts)))
        return x

    def tuned(self):
        return {**super().tuned(), "prompts": [self.prompts, self.later_prompts]}


class Original(VPTShallow):
    """Gated prompts as the method's first implementation has them: explicit softmax attention with
    a temperature in each block; behind all blocks but the last a gate by slices, two products and a
    cat of the whole sequence."""

    def __init__(self, vit, num_prompts):
        super().__init__(vit, num_prompts)
        self.gate_logit = nn.Parameter(torch.empty(len(vit.blocks) - 1))
        self.temperature = nn.Parameter(torch.empty(len(vit.blocks)))

    def blocks(self, x):
        for index in range(len(self.vit.blocks)):
            out = self.block(index, x)
            x = self.gate(out, x, self.gate_logit[index]) if index < len(self.gate_logit) else out
        return x

    def block(self, index, x):
        block = self.vit.blocks[index]
        x = x + block.ls1(attention(block.attn, block.norm1(x), self.temperature[index]))
        return x + block.ls2(block.mlp(block.norm2(x)))

    def gate(self, out, x, logit):
        end = self.start + len(self.prompts)
        g = logit.sigmoid()
        mixed = g * out[:, self.start : end] + (1 - g) * x[:, self.start : end]
        return torch.cat([out[:, : self.start], mixed, out[:, end:]], dim=1)

    def tuned(self):
        gates, temperatures = [self.gate_logit], [self.temperature]
        return {**super().tuned(), "gates": gates, "temperatures": temperatures}


class GatesAlone(Original):
    """Without temperatures, on timm's own blocks."""

    def block(self, index, x):
        return self.vit.blocks[index](x)

    def tuned(self):
        return {name: group for name, group in super().tuned().items() if name != "temperatures"}


def attention(attn, x, temperature):
    """timm's attention on x [B, N, D], the softmax explicit and with a temperature []."""
    batch, num_tokens, dim = x.shape
    tau = temperature + (temperature.clamp(0.01, 10.0) - temperature).detach()
    qkv = attn.qkv(x).reshape(batch, num_tokens, 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q @ k.transpose(-2, -1) * attn.scale / tau).softmax(dim=-1)
    return attn.proj((weights @ v).transpose(1, 2).reshape(batch, num_tokens, dim))


def wrapped(method="gpt", **options):
    """On SDPA, as timm's own blocks are."""
    options |= {"prompt_dropout": 0.0, "attention": "sdpa"}
    return lambda vit, num_prompts: gp.wrap(vit, method, num_prompts=num_prompts, **options)


PEERS = {  # name: (function of a timm ViT and P, the peer that it must equal)
    "original": (Original, "gated_prompt"),
    "gated_prompt": (wrapped(), "original"),
    "gated_prompt, all rows": (wrapped(last_block="all-rows"), "original"),
    "gated_prompt, memory low": (wrapped(memory="low"), "original"),
    "gated_prompt, gates alone": (
        wrapped(temperature=False, last_block="all-rows"),
        "original, gates alone",
    ),
    "original, gates alone": (GatesAlone, "gated_prompt, gates alone"),
    "vpt-shallow": (VPTShallow, "gated_prompt vpt-shallow"),
    "gated_prompt vpt-shallow": (wrapped("vpt-shallow"), "vpt-shallow"),
    "vpt-deep": (VPTDeep, "gated_prompt vpt-deep"),
    "gated_prompt vpt-deep": (wrapped("vpt-deep"), "vpt-deep"),
    "lora": (lambda vit, num_prompts: Lora(vit), "linear"),  # LoRA starts from no change
    "linear": (lambda vit, num_prompts: Linear(vit), "gated_prompt linear"),
    "gated_prompt linear": (wrapped("linear"), "linear"),
    "linear, cached features": (lambda vit, num_prompts: CachedLinear(vit), "linear"),
    "full": (lambda vit, num_prompts: Full(vit), "gated_prompt full"),
    "gated_prompt full": (wrapped("full"), "full"),
}


def unavailable_reason(name):
    """Why the peer can't be made here, or None if it can."""
    if name == "lora" and importlib.util.find_spec("peft") is None:
        return "peft is not installed (pip install peft)"
    return None


def make(name, arch="vit_base_patch16_224", num_prompts=50, **vit_options):
    """The peer `name` around a timm `arch`, float32 on the CPU; arguments as for timm."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(size, generator=generator)

    torch.manual_seed(0)
    vit = timm.create_model(arch, num_classes=NUM_CLASSES, **vit_options)
    with torch.no_grad():  # attention and norms that do something
        for parameter in vit.parameters():
            parameter.add_(randn(*parameter.shape), alpha=vit.embed_dim**-0.5)
    depth, dim = len(vit.blocks), vit.embed_dim
    values = {  # away from the start of training, where gates are closed and temperatures 1
        "gates": randn(depth - 1) - 1,
        "temperatures": 1 + 0.2 * randn(depth),
        "head": randn((dim + 1) * NUM_CLASSES) / dim**0.5,
        "prompts": 0.1 * randn(depth * num_prompts * dim),  # the first block's come first
    }
    model = PEERS[name][0](vit, num_prompts)
    with torch.no_grad():
        for group, parameters in tuned(model).items():
            if group in values:
                vector_to_parameters(values[group], parameters)
    return model


def tuned(model):
    """{"prompts": parameters, "gates": ...} of any peer, in the same order for all."""
    if hasattr(model, "param_groups"):
        return {group["name"]: group["params"] for group in model.param_groups(lr=1.0)}
    return model.tuned()


# ---- are they the same function? ----

TINY = {"arch": "vit_tiny_patch16_224", "img_size": 48, "depth": 3, "embed_dim": 48, "num_heads": 3}


def results(model, parameters, images, at_once=None):
    """{"logits": value, "prompts": gradient of a weighted sum of the logits, ...}

    parameters: as of `tuned`. at_once: how many images go through the model together.
    """
    at_once = at_once or len(images)
    flat = [parameter for group in parameters.values() for parameter in group]
    weights = torch.linspace(-1, 1, len(images) * NUM_CLASSES).view(len(images), -1).to(images)
    logits, grads = [], [torch.zeros_like(parameter) for parameter in flat]
    for some, weight in zip(images.split(at_once), weights.split(at_once), strict=True):
        new = model(some)
        logits.append(new.detach())
        if flat:
            new = torch.autograd.grad((new * weight).sum(), flat)
            grads = [a + b for a, b in zip(grads, new, strict=True)]
    named = {"logits": torch.cat(logits)}
    for name, group in parameters.items():
        taken, grads = grads[: len(group)], grads[len(group) :]
        named[name] = parameters_to_vector(taken)
    return named


def errors(got, wanted):
    """Relative errors of what both have."""
    return {
        name: ((got[name] - wanted[name]).norm() / wanted[name].norm()).item()
        for name in got.keys() & wanted.keys()
    }


@functools.cache
def check(name, device="cpu"):
    """Raises AssertionError unless the peer and the one that it must equal (PEERS) agree in logits
    and in the gradients of all that is tuned to 1e-9 of their norm, in float64 on a tiny ViT; of
    LoRA, in logits and the gradient of the head."""
    other = PEERS[name][1]
    images = torch.randn(3, 3, 48, 48, dtype=torch.float64, device=device)
    models = [make(peer, num_prompts=4, **TINY).double().to(device) for peer in (name, other)]
    got, wanted = (results(model.train(), tuned(model), images) for model in models)
    assert name == "lora" or got.keys() == wanted.keys(), f"{name}: tunes {list(got)}"
    for group, value in got.items():
        assert value.abs().max() > 1e-6, f"{name}: {group} of zero tells nothing"
    for group, error in errors(got, wanted).items():
        assert error < 1e-9, f"{name}: {group} differ from those of {other} by {error:.3g}"
