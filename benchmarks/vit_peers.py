# SPDX-License-Identifier: Apache-2.0
"""Whole models around a frozen timm ViT: gated_prompt's, and those that others would write.

`make` returns a peer by its name: a model of images [B, 3, H, W] -> logits [B, classes], in which
only the tuned parameters require grad. All peers have the same backbone weights, head, prompts,
gates and temperatures. None has dropout, and the head of each reads the normed class token. `check`
must pass before a peer is timed.
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
    """Tunes only the head, on frozen features. Base class of the peers below."""

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
        """Returns {name: tuned parameters}, with the names of gp's `param_groups`."""
        return {"head": list(self.head.parameters())}


class CachedLinear(Linear):
    """Tunes the head on features that are computed once for each batch of images, and kept."""

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
    """Tunes all parameters."""

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
        peft.get_peft_model(vit, config)  # changes vit in place

    def forward(self, images):
        return self.head(self.vit.norm(self.blocks(self.embed(images))[:, 0]))

    def tuned(self):
        lora = [p for p in self.vit.parameters() if p.requires_grad]
        return {"lora": lora, **super().tuned()}


class VPTShallow(Linear):
    """Prompts after the prefix tokens, in timm's own blocks, with SDPA."""

    def __init__(self, vit, num_prompts):
        super().__init__(vit)
        self.prompts = nn.Parameter(torch.empty(num_prompts, vit.embed_dim))
        self.start = vit.num_prefix_tokens

    def forward(self, images):
        x = self.with_prompts(self.embed(images), self.prompts, end=self.start)
        return self.head(self.vit.norm(self.blocks(x)[:, 0]))

    def with_prompts(self, x, prompts, end):
        """Returns x with the prompts instead of rows [self.start, end)."""
        prompts = prompts.expand(len(x), -1, -1).to(x.dtype)
        return torch.cat([x[:, : self.start], prompts, x[:, end:]], dim=1)

    def tuned(self):
        return {"prompts": [self.prompts], **super().tuned()}


class VPTDeep(VPTShallow):
    """New prompts in the same rows before every block."""

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
    """Gated prompts as in the method's first implementation: each block has attention with an
    explicit softmax and a temperature; after each block except the last comes a gate made of
    slices, two products and a cat of the whole sequence."""

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
    """`Original` without temperatures, on timm's own blocks."""

    def block(self, index, x):
        return self.vit.blocks[index](x)

    def tuned(self):
        return {name: group for name, group in super().tuned().items() if name != "temperatures"}


def attention(attn, x, temperature):
    """timm's attention on x [B, N, D], with an explicit softmax and a temperature []."""
    batch, num_tokens, dim = x.shape
    tau = temperature + (temperature.clamp(0.01, 10.0) - temperature).detach()
    qkv = attn.qkv(x).reshape(batch, num_tokens, 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q @ k.transpose(-2, -1) * attn.scale / tau).softmax(dim=-1)
    return attn.proj((weights @ v).transpose(1, 2).reshape(batch, num_tokens, dim))


def wrapped(method="gpt", **options):
    """Returns a maker of gp.wrap's model, with SDPA like timm's own blocks."""
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
    """Returns the reason why the peer can't be made here, or None."""
    if name == "lora" and importlib.util.find_spec("peft") is None:
        return "peft is not installed (pip install peft)"
    return None


def make(name, arch="vit_base_patch16_224", num_prompts=50, **vit_options):
    """Returns the peer `name` around timm's `arch`, float32 on the CPU. vit_options go to timm."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(size, generator=generator)

    torch.manual_seed(0)
    vit = timm.create_model(arch, num_classes=NUM_CLASSES, **vit_options)
    with torch.no_grad():  # so that no norm, bias or attention is close to the identity or zero
        for parameter in vit.parameters():
            parameter.add_(randn(*parameter.shape), alpha=vit.embed_dim**-0.5)
    depth, dim = len(vit.blocks), vit.embed_dim
    values = {  # unlike initial values, with which gates are closed and temperatures are 1
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
    """Returns {"prompts": parameters, "gates": ...} of any peer, always in the same order."""
    if hasattr(model, "param_groups"):
        return {group["name"]: group["params"] for group in model.param_groups(lr=1.0)}
    return model.tuned()


# ---- do two peers compute the same function? ----

TINY = {"arch": "vit_tiny_patch16_224", "img_size": 48, "depth": 3, "embed_dim": 48, "num_heads": 3}


def results(model, parameters, images, at_once=None):
    """Returns {"logits": value, "prompts": gradient of a weighted sum of the logits, ...}.

    parameters: the result of `tuned`. at_once: the number of images in a call of the model.
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
    """Returns {name: relative error} for the names that both have."""
    return {
        name: ((got[name] - wanted[name]).norm() / wanted[name].norm()).item()
        for name in got.keys() & wanted.keys()
    }


@functools.cache
def check(name, device="cpu"):
    """Raises AssertionError unless the peer and the peer that it must equal (PEERS) agree, in
    float64 on a tiny ViT, in the logits and in the gradients of all tuned parameters, to 1e-9 of
    their norm. For LoRA, only the logits and the gradient of the head are compared."""
    other = PEERS[name][1]
    images = torch.randn(3, 3, 48, 48, dtype=torch.float64, device=device)
    models = [make(peer, num_prompts=4, **TINY).double().to(device) for peer in (name, other)]
    got, wanted = (results(model.train(), tuned(model), images) for model in models)
    assert name == "lora" or got.keys() == wanted.keys(), f"{name}: tunes {list(got)}"
    for group, value in got.items():
        assert value.abs().max() > 1e-6, f"{name}: {group} is zero, so the comparison shows nothing"
    for group, error in errors(got, wanted).items():
        assert error < 1e-9, f"{name}: {group}: relative error {error:.3g}, compared with {other}"
