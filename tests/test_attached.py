# SPDX-License-Identifier: Apache-2.0
"""Hooks, adapters and patches on a backbone take effect, whether added before or after wrap.

The tests compare with `unshortened`, which calls timm's own blocks and applies the formulas of the
method between them, in float64.
"""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import timm_or_skip
from torch import nn
from torch.nn.utils import parametrize, prune

import gated_prompt as gp
from gated_prompt import reference
from gated_prompt.vit import shortcuts

timm_or_skip()
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

pytestmark = pytest.mark.usefixtures("one_thread")
DIM, P, DEPTH = 16, 2, 3
CONFIGS = {
    "vpt-shallow": {"method": "vpt-shallow"},
    "vpt-deep": {"method": "vpt-deep", "pool": "prompt+patch"},
    "gpt": {"method": "gpt", "pool": "prompt"},
    "gpt-deep": {"method": "gpt-deep", "gated_blocks": 1, "prompt_position": "end"},
    "memory low": {"method": "gpt", "memory": "low", "gate": "linear", "rule": "residual"},
    "pooled rows": {"method": "gpt", "last_block": "pooled-rows", "pool": "patch"},
}


def make_vit(kind=VisionTransformer, **changes):
    torch.manual_seed(0)
    options = {
        "img_size": 16, "patch_size": 8, "embed_dim": DIM, "depth": DEPTH, "num_heads": 2,
        "num_classes": 3, "global_pool": "token", **changes,
    }  # fmt: skip
    vit = kind(**options).double().eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.4)
    return vit


def wrapped(vit, config):
    model = gp.wrap(vit, num_prompts=P, prompt_dropout=0.0, **CONFIGS[config]).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone."):
                low, high = (0.5, 2.0) if "temperatures" in name else (-1.0, 1.0)
                parameter.uniform_(low, high)
    return model


def unshortened(vit, model, tuned, images):
    """Runs the method around timm's own blocks; the temperature goes into the attention's scale."""
    o, batch = model.options, len(images)
    x = vit._pos_embed(vit.patch_embed(images))
    x, rope = x if isinstance(x, tuple) else (x, None)
    x, first = vit.norm_pre(x), vit.num_prefix_tokens
    at_start = o.prompt_position == "start"
    start, options = first if at_start else x.shape[1], {}
    if rope is not None:  # [N, 2d]: sines and cosines; prompts are rotated by 0
        sin, cos = rope.new_zeros(P, rope.shape[1] // 2), rope.new_ones(P, rope.shape[1] // 2)
        still = torch.cat([sin, cos], dim=1)
        options = {"rope": torch.cat([still, rope] if at_start else [rope, still])}
    prompts = tuned["prompts.tokens"].expand(batch, -1, -1)
    x = torch.cat([x[:, :start], prompts, x[:, start:]], 1)
    for index, block in enumerate(vit.blocks):
        attn = getattr(block, "_orig_mod", block).attn
        attn = getattr(attn, "_orig_mod", attn)
        attn.fused_attn = False
        if o.temperature:
            attn.scale = attn.head_dim**-0.5 / tuned[f"temperatures.{index}"]
        out, old = block(x, **options), x
        if "deep_prompts.tokens" in tuned and index < DEPTH - 1:
            old = tuned["deep_prompts.tokens"][index].expand(batch, -1, -1)
        if f"gates.{index}.logit" in tuned:
            gate = (tuned[f"gates.{index}.logit"],)
            x = reference.prompt_gate(out, old, *gate, start, P, o.rule)
        elif f"gates.{index}.weight" in tuned:
            gate = tuned[f"gates.{index}.weight"], tuned[f"gates.{index}.bias"]
            x = reference.prompt_gate_linear(out, old, *gate, start, P, o.rule)
        elif old is not x:
            x = torch.cat([out[:, :start], old, out[:, start + P :]], 1)
        else:
            x = out
    rows = {
        "cls": slice(0, 1), "prompt+patch": slice(first, None), "prompt": slice(start, start + P),
        "patch": slice(first + P, None),  # valid only with prompts at the start
    }[o.pool]  # fmt: skip
    features = vit.fc_norm(vit.norm(x[:, rows].mean(1)))
    return F.linear(features, tuned["head.weight"], tuned["head.bias"])


# ---- attachments: each function(module, parent, name) returns the parameters that it adds ----


def learned(*size, around=0.0):
    generator = torch.Generator().manual_seed(math.prod(size))
    noise = torch.randn(size, generator=generator, dtype=torch.float64)
    return nn.Parameter(around + 0.3 * noise)


def hook(module, parent, name):
    scale = learned(3 * DIM if name == "qkv" else DIM, around=1.3)
    module.register_forward_hook(lambda module, args, out: out * scale)
    return [scale]


def pre_hook(module, parent, name):
    noise = learned(DIM)
    module.register_forward_pre_hook(lambda module, args: (args[0] + noise, *args[1:]))
    return [noise]


def full_backward_hook(module, parent, name):
    module.register_full_backward_hook(lambda module, into, out: tuple(g * 0.5 for g in into))
    return []


def instance_forward(module, parent, name):
    scale, forward = learned(3 * DIM if name == "qkv" else DIM, around=1.3), module.forward
    module.forward = lambda *args, **options: forward(*args, **options) * scale
    return [scale]


def lora_by_hand(module, parent, name):
    width = 3 * DIM if name == "qkv" else DIM
    a, b, forward = learned(DIM, 2), learned(2, width), module.forward
    module.forward = lambda x, **options: forward(x, **options) + x @ a @ b
    return [a, b]


class Lora(nn.Module):
    def __init__(self, base, width):
        super().__init__()
        self.base, self.a, self.b = base, learned(DIM, 2), learned(2, width)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base, name)

    def forward(self, x, **options):
        return self.base(x, **options) + x @ self.a @ self.b


def lora_by_module(module, parent, name):
    if name in ("attn", "block"):
        return hook(module, parent, name)  # users do not replace these
    lora = Lora(module, 3 * DIM if name == "qkv" else DIM)
    setattr(parent, name, lora)
    return [lora.a, lora.b]


def lora_by_peft(module, parent, name):
    peft = pytest.importorskip("peft")
    targets = ["qkv", "proj", "fc1", "fc2"] if name != "norm1" else []
    inside = [n for n, m in module.named_modules() if n.split(".")[-1] in targets]
    if isinstance(module, nn.Linear):
        module, inside = parent, [name]
    if not inside:
        return hook(module, parent, name)
    config = peft.LoraConfig(target_modules=inside, r=2, init_lora_weights=False)
    torch.manual_seed(5)
    peft.inject_adapter_in_model(config, module)
    module.double()
    return [p for n, p in module.named_parameters() if "lora_" in n]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = learned(1, around=1.3)

    def forward(self, weight):
        return weight * self.scale


def parametrized(module, parent, name):
    scaled = Scaled()
    first = next(m for m in module.modules() if "weight" in m._parameters)
    parametrize.register_parametrization(first, "weight", scaled)
    return [scaled.scale]


def compiled(module, parent, name):
    new = torch.compile(module, backend="eager")
    if name == "block":
        blocks, index = parent
        blocks[index] = new
    else:
        setattr(parent, name, new)
    return []


def compiled_in_place(module, parent, name):
    module.compile(backend="eager")
    return []


def offloaded(module, parent, name):
    """Offloads as accelerate does: parameters are present only while their module runs."""
    for part in module.modules():
        own = dict(part._parameters)
        if not any(p is not None for p in own.values()):
            continue

        def forward(*args, part=part, own=own, forward=part.forward, **options):
            away = dict(part._parameters)
            part._parameters.update(own)
            try:
                return forward(*args, **options)
            finally:
                part._parameters.update(away)

        for key, p in own.items():
            if p is not None:
                away = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
                own[key] = p.detach()
                part._parameters[key] = away
        part.forward = forward
    return []


class Int8Linear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("int8", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    @property
    def weight(self):
        return self.int8

    def forward(self, x):
        return F.linear(x, self.int8.to(x.dtype) * self.scale, self.bias)


def quantised(module, parent, name):
    if isinstance(module, nn.Linear):
        setattr(parent, name, Int8Linear(module))
    for part in list(module.modules()):
        for key, child in list(part.named_children()):
            if isinstance(child, nn.Linear):
                setattr(part, key, Int8Linear(child))
    return []


ATTACHED = {
    f.__name__: f
    for f in (
        hook, pre_hook, full_backward_hook, instance_forward, lora_by_hand, lora_by_module,
        lora_by_peft, parametrized, compiled, compiled_in_place, offloaded, quantised,
    )
}  # fmt: skip
PLACES = ("norm1", "attn", "attn.qkv", "attn.proj", "mlp", "block")


def attach(vit, attached, place, index):
    block = getattr(vit.blocks[index], "_orig_mod", vit.blocks[index])
    if place == "block":
        return ATTACHED[attached](vit.blocks[index], (vit.blocks, index), "block")
    parent = block.get_submodule(place.rpartition(".")[0])
    name = place.rpartition(".")[2]
    return ATTACHED[attached](getattr(parent, name), parent, name)


def results(run, images, leaves):
    """Returns the logits without and with grad mode, and all gradients."""
    with torch.no_grad():
        found = [run(images)]
    images = images.clone().requires_grad_()
    logits = run(images)
    gradients = torch.autograd.grad(
        logits.square().sum(), [images, *leaves], allow_unused=True, materialize_grads=True
    )
    return [*found, logits, *gradients]


def assert_same(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * max(1.0, b.abs().max().item()))


def assert_unshortened(model, other, images):
    """Asserts that `model` equals the method around the blocks of `other`."""
    tuned = dict(model.tuned_parameters())
    copies = {n: p.detach().clone().requires_grad_() for n, p in tuned.items()}
    got = results(model, images, tuned.values())
    wanted = results(lambda x: unshortened(other, model, copies, x), images, copies.values())
    assert_same(got, wanted)


def assert_takes_part(attached, place, when, config, index, kind=VisionTransformer, **changes):
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    vit = make_vit(kind, **changes)
    if when == "before":
        own = attach(vit, attached, place, index)
        model = wrapped(vit, config)
        for parameter in own:  # wrap freezes them
            parameter.requires_grad_(True)
    else:
        model = wrapped(vit, config)
        own = attach(vit, attached, place, index)
    tuned = {n: p for n, p in model.tuned_parameters().items() if not n.startswith("backbone.")}
    got = results(model, images, [*own, *tuned.values()])

    other = make_vit(kind, **changes).requires_grad_(False)
    others = attach(other, attached, place, index)
    with torch.no_grad():
        for a, b in zip(others, own, strict=True):
            assert torch.equal(a, b)
    copies = {n: p.detach().clone().requires_grad_() for n, p in tuned.items()}
    wanted = results(
        lambda x: unshortened(other, model, copies, x), images, [*others, *copies.values()]
    )
    assert_same(got, wanted)
    if own:
        assert wanted[3].abs().max() > 1e-6, "the attachment has no effect: the test is void"
    return model, got


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", [VisionTransformer, Eva], ids=lambda kind: kind.__name__)
def test_nothing_attached_is_the_unshortened_model(kind, config, monkeypatch):
    monkeypatch.setitem(ATTACHED, "nothing", lambda *_: [])
    options = {"use_rot_pos_emb": True} if kind is Eva else {}
    assert_takes_part("nothing", "block", "after", config, 0, kind, **options)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("attached", ATTACHED)
def test_what_is_attached_takes_part(attached, place, when):
    if "compiled" in attached or "peft" in attached:  # slow, so run each config once
        torch._dynamo.reset()
        cases = zip(CONFIGS, itertools.cycle(range(DEPTH)), strict=False)
    else:
        cases = itertools.product(CONFIGS, range(DEPTH))
    for config, index in cases:
        assert_takes_part(attached, place, when, config, index)


@pytest.mark.parametrize("attached", ["hook", "pre_hook", "instance_forward", "lora_by_hand"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_copy_and_an_unwrapped_model_keep_what_was_attached(attached, when):
    model, _ = assert_takes_part(attached, "attn.qkv", when, "gpt", 1)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    wanted = model(images)
    other = make_vit()
    others = attach(other, attached, "attn.qkv", 1)
    if attached == "hook":
        torch.testing.assert_close(copy.deepcopy(model)(images), wanted)
    vit = gp.unwrap(model)
    assert not any("Tempering" in type(module).__name__ for module in vit.modules())
    torch.testing.assert_close(vit(images), other(images))
    assert len(others) > 0
    with torch.no_grad():
        vit.requires_grad_(False)
        assert not torch.equal(vit(images), make_vit()(images))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("config", CONFIGS)
def test_hooks_of_the_backbone_and_of_its_sequence_of_blocks_run(config, when):
    """The backbone's hooks see images and pooled features; the hooks of `blocks` see all tokens
    before the blocks, and the remaining rows after them."""
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    seen = {}

    def attach_all(vit):
        for name, module in (("vit", vit), ("blocks", vit.blocks)):
            module.register_forward_pre_hook(
                lambda module, args, name=name: (args[0] * 1.5,) if name == "vit" else None
            )
            module.register_forward_pre_hook(
                lambda module, args, name=name: seen.update({name: args[0].shape}) or None
            )
            module.register_forward_hook(
                lambda module, args, out, name=name: (
                    seen.update({name + " out": out.shape})
                    or (out * 0.5 if name == "vit" else None)
                )
            )

    vit = make_vit()
    if when == "before":
        attach_all(vit)
    model = wrapped(vit, config)
    if when == "after":
        attach_all(vit)
    tuned = dict(model.tuned_parameters())
    got = results(model, images, tuned.values())
    copies = {n: p.detach().clone().requires_grad_() for n, p in tuned.items()}
    halved = {n: p * 0.5 if n == "head.weight" else p for n, p in copies.items()}
    other = make_vit().requires_grad_(False)
    wanted = results(lambda x: unshortened(other, model, halved, 1.5 * x), images, copies.values())
    assert_same(got, wanted)
    rows = 5 + P
    if model.options.last_block == "pooled-rows":
        rows = {"cls": 1, "prompt": P, "patch": 4}[model.pool]
    assert seen == {
        "vit": images.shape, "vit out": (2, DIM),
        "blocks": (2, 5 + P, DIM), "blocks out": (2, rows, DIM),
    }  # fmt: skip


def test_a_hook_of_the_blocks_that_changes_their_input_gets_the_whole_gradient():
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model = wrapped(make_vit(), "gpt")
    model.blocks.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    tokens = model.prompts.tokens
    (gradient,) = torch.autograd.grad(model(images).sum(), tokens)
    direction = torch.randn_like(tokens)
    ends = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            tokens.add_(direction, alpha=step)
            ends.append(model(images).sum())
            tokens.sub_(direction, alpha=step)
    torch.testing.assert_close(
        (gradient * direction).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-7
    )


# ---- shortcuts ----


@pytest.mark.parametrize("off", ["folded_layers", "pools_rows", "recomputes", "is_restated"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_short_cut_that_is_switched_off_changes_nothing_but_the_cost(config, off, monkeypatch):
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    found, taken = [], []
    condition = getattr(shortcuts, off)
    for answer in (condition, lambda *_: None):
        calls = []
        monkeypatch.setattr(
            shortcuts, off, lambda *a, f=answer, c=calls: (lambda r: c.append(bool(r)) or r)(f(*a))
        )
        model = wrapped(make_vit(), config)
        found.append(results(model, images, model.tuned_parameters().values()))
        taken.append(any(calls))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * max(1.0, b.abs().max().item()))
    is_taken = {
        "folded_layers": True, "is_restated": True, "recomputes": config == "memory low",
        "pools_rows": model.options.last_block == "pooled-rows",
    }  # fmt: skip
    assert taken == [is_taken[off], False]


def test_what_is_trainable_inside_a_projection_is_not_folded():
    model = wrapped(make_vit(), "gpt")
    x = torch.randn(1, 5, DIM, dtype=torch.float64)
    attn = model.blocks[0].attn
    assert shortcuts.folded_layers(attn, x) is not None
    for change in (
        lambda a: a.qkv.weight.requires_grad_(True),
        lambda a: a.qkv.bias.requires_grad_(True),
        lambda a: a.qkv.register_full_backward_pre_hook(lambda *_: None),
        lambda a: a.qkv.compile(),
        lambda a: setattr(a, "qkv", a.qkv.to("meta")),
        lambda a: prune.identity(a.qkv, "weight"),
        lambda a: setattr(a, "qkv", Int8Linear(a.qkv)),
    ):
        changed = copy.deepcopy(attn)
        change(changed)
        assert shortcuts.folded_layers(changed, x) is None


def test_rows_are_not_pooled_where_tokens_meet_or_somebody_looks_on():
    block = wrapped(make_vit(), "pooled rows").blocks[-1]
    assert shortcuts.pools_rows(block)

    class Mixes(nn.Module):
        def forward(self, x):
            return x + x.mean(1, keepdim=True)

    for change in (
        lambda b: setattr(b, "mlp", Mixes()),
        lambda b: b.mlp.fc2.register_forward_hook(lambda *_: None),
        lambda b: setattr(b.mlp, "norm", nn.BatchNorm1d(4)),
        lambda b: b.norm2.register_forward_pre_hook(lambda *_: None),
        lambda b: setattr(b.attn.proj, "forward", b.attn.proj.forward),
    ):
        changed = copy.deepcopy(block)
        change(changed)
        assert not shortcuts.pools_rows(changed)
        assert shortcuts.recomputes(block)


@pytest.mark.parametrize("config", CONFIGS)
def test_outputs_of_blocks_that_a_hook_keeps_stay_as_they_are(config):
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model, kept = wrapped(make_vit(), config), []
    for block in model.blocks:
        block.register_forward_hook(lambda m, a, out: kept.append((out.detach(), out.clone())))
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            model(images)
    assert all(torch.equal(a, b) for a, b in kept)
    assert len(kept) == 2 * DEPTH


# ---- modules that are replaced, shared, copied, patched ----


def copied_blocks(vit):
    vit.blocks = copy.deepcopy(vit.blocks)


def copied_attention(vit):
    vit.blocks[1].attn = copy.deepcopy(vit.blocks[1].attn)


def reversed_blocks(vit):
    vit.blocks = nn.Sequential(*list(vit.blocks)[::-1])


def shared_block(vit):
    vit.blocks[2] = vit.blocks[0]


def shared_attention(vit):
    vit.blocks[2].attn = vit.blocks[0].attn


@pytest.mark.parametrize("when", ["before", "after", "both"])
@pytest.mark.parametrize("config", ["gpt", "gpt-deep", "memory low", "pooled rows"])
@pytest.mark.parametrize(
    "change",
    [copied_blocks, copied_attention, reversed_blocks, shared_block, shared_attention],
    ids=lambda f: f.__name__,
)
def test_blocks_that_are_exchanged_have_the_temperature_of_their_place(change, config, when):
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    vit, other = make_vit(), make_vit().requires_grad_(False)
    for is_asked, moment in ((when != "after", "before"), (when != "before", "after")):
        if moment == "after":
            model = wrapped(vit, config)
            model(images)
        if is_asked:
            change(vit)
            change(other)
    assert_unshortened(model, other, images)
    gp.unwrap(model)
    plain = make_vit()
    for _ in range(1 + (when == "both")):
        change(plain)
    torch.testing.assert_close(vit(images), plain(images))


def test_what_unwrap_finds_no_more_is_given_back_too():
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    vit = make_vit()
    model = wrapped(vit, "gpt")
    last, swapped = vit.blocks[2], vit.blocks[0].attn
    vit.blocks[0].attn = copy.deepcopy(swapped)
    vit.blocks[1].attn.q_norm.register_forward_hook(lambda m, args, out: out * 1.5)
    vit.blocks = vit.blocks[:2]
    with pytest.raises(RuntimeError, match=r"backbone must have 3 blocks, .* got 2; unwrap, and"):
        model(images)
    gp.unwrap(model)
    vit.blocks[0].attn = swapped
    vit.blocks = nn.Sequential(*vit.blocks, last)
    plain = make_vit()
    plain.blocks[1].attn.q_norm.register_forward_hook(lambda m, args, out: out * 1.5)
    torch.testing.assert_close(vit(images), plain(images))


@pytest.mark.parametrize("name", ["attn", "mlp.fc1", "norm1"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_patch_of_a_class_takes_part(config, name, monkeypatch):
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model, other = wrapped(make_vit(), config), make_vit().requires_grad_(False)
    kind = type(model.blocks[0].get_submodule(name))
    forward = kind.forward
    inside = {
        id(m) for vit in (model.backbone, other) for b in vit.blocks for m in b.modules()
    }  # fmt: skip
    monkeypatch.setattr(
        kind, "forward",
        lambda self, *a, **k: forward(self, *a, **k) * (1.5 if id(self) in inside else 1.0),
    )  # fmt: skip
    assert_unshortened(model, other, images)


def test_patches_and_containers_that_would_not_run_are_refused(monkeypatch):
    class Halves(nn.Sequential):
        def forward(self, x):
            for block in self:
                x = 0.5 * block(x)
            return x

    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    vit = make_vit()
    vit.blocks = Halves(*vit.blocks)
    with pytest.raises(RuntimeError, match=r"has its own blocks \(Halves\), which would not run"):
        gp.wrap(vit, num_prompts=P)
    model = wrapped(make_vit(), "gpt")
    model.backbone.blocks = Halves(*model.blocks)
    with pytest.raises(RuntimeError, match=r"has its own blocks \(Halves\), which would not run"):
        model(images)
    model = wrapped(make_vit(), "gpt")
    features = VisionTransformer.forward_features
    monkeypatch.setattr(
        VisionTransformer, "forward_features", lambda self, x, **k: 2 * features(self, x, **k)
    )
    with pytest.raises(RuntimeError, match="has its own forward_features, which would not run"):
        model(images)
    with pytest.raises(TypeError, match="must have the forward_features of its base class"):
        gp.wrap(make_vit(), num_prompts=P)


def test_a_hook_that_drops_the_wrappers_work_is_told():
    model = wrapped(make_vit(), "gpt")
    model.blocks.register_forward_pre_hook(lambda m, args, options: (args, {}), with_kwargs=True)
    with pytest.raises(RuntimeError, match="a hook of Sequential has dropped the argument `run`"):
        model(torch.randn(2, 3, 16, 16, dtype=torch.float64))


def test_temperatures_that_are_exchanged_are_used():
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model, other = wrapped(make_vit(), "gpt"), make_vit().requires_grad_(False)
    model.temperatures = copy.deepcopy(model.temperatures)
    with torch.no_grad():
        for temperature in model.temperatures:
            temperature.fill_(1.7)
    tuned = dict(model.tuned_parameters())
    torch.testing.assert_close(model(images), unshortened(other, model, tuned, images))


def test_adapters_are_in_the_mode_of_what_is_tuned():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.norm = base, nn.BatchNorm1d(DIM, affine=False)
            self.drop, self.low = nn.Dropout(0.5), nn.Linear(DIM, DIM)

        def forward(self, x):
            return self.base(x) + self.low(self.drop(x))

    for when in ("before", "after"):
        vit = make_vit(pos_drop_rate=0.5, proj_drop_rate=0.5)
        model = None if when == "before" else wrapped(vit, "gpt")
        adapter = vit.blocks[1].mlp = Adapter(vit.blocks[1].mlp)
        model = wrapped(vit, "gpt") if model is None else model
        adapter.low.requires_grad_(True)
        model.blocks[2].requires_grad_(True)
        model.train()
        tuned = [adapter, adapter.norm, adapter.drop, adapter.low, *model.blocks[2].modules()]
        for name, module in model.backbone.named_modules():
            assert module.training == any(module is m for m in tuned), name
        model.eval()
        assert not any(module.training for module in model.modules())


def test_statistics_that_a_second_run_would_change_are_not_run_twice():
    """Tests the power iteration of spectral_norm, in a tuned block with memory="low"."""
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    found = []
    for memory in ("default", "low"):
        vit = make_vit()
        torch.manual_seed(0)
        nn.utils.parametrizations.spectral_norm(vit.blocks[2].mlp.fc1)
        torch.manual_seed(1)
        model = gp.wrap(vit, "partial-1", memory=memory).double().train()
        weight = vit.blocks[2].mlp.fc1.parametrizations.weight
        (gradient,) = torch.autograd.grad(model(images).square().sum(), weight.original)
        found.append((gradient, weight[0]._u.clone()))
        state = gp.tuned_state_dict(model)
        assert {k.rpartition(".")[2] for k in state} >= {"_u", "_v", "original"}
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_flags_and_dtypes_come_back_to_parameters_that_were_renamed_or_tied(dtype):
    vit = make_vit().float()
    vit.blocks[1].attn.qkv.weight = vit.blocks[0].attn.qkv.weight
    before = {name: p.detach().clone() for name, p in vit.named_parameters()}
    model = gp.wrap(vit, num_prompts=P, frozen_dtype=dtype)
    prune.identity(vit.blocks[0].mlp.fc1, "weight")
    nn.utils.parametrizations.weight_norm(vit.blocks[1].mlp.fc1)
    parametrize.register_parametrization(vit.blocks[2].mlp.fc1, "weight", nn.Identity())
    gp.unwrap(model)
    for name, parameter in vit.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.dtype == torch.float32, name
    for name in ("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight"):
        assert torch.equal(vit.get_parameter(name), before[name])
    pruned = vit.blocks[0].mlp.fc1.weight_orig
    assert torch.equal(pruned, before["blocks.0.mlp.fc1.weight"])


def test_options_that_cannot_be_had_say_so():
    class Mine(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block, self.attn = block, block.attn

        def forward(self, x):
            return self.block(x)

    vit = make_vit()
    vit.blocks[0] = Mine(vit.blocks[0])
    assert wrapped(vit, "vpt-shallow").options.last_block == "pooled-rows"
    vit = make_vit()
    vit.blocks[2] = Mine(vit.blocks[2])
    assert gp.wrap(vit, num_prompts=P).options.last_block == "all-rows"
    with pytest.raises(TypeError, match=r"memory='low' .* memory='default' and last_block='all"):
        gp.wrap(gp.unwrap(vit), memory="low")
    with pytest.raises(TypeError, match=r"got a compiled one; wrap vit._orig_mod"):
        gp.wrap(torch.compile(make_vit()))
    with pytest.raises(ValueError, match="frozen_dtype needs weights, and vit is on the meta"):
        gp.wrap(make_vit().to("meta"), frozen_dtype=torch.bfloat16)
    model = wrapped(make_vit(), "gpt")
    model.blocks[0].attn = nn.Identity()
    with pytest.raises(RuntimeError, match="block 0 must have an `attn` with a `q_norm`, as"):
        model(torch.randn(2, 3, 16, 16, dtype=torch.float64))


@pytest.mark.parametrize("fused", [True, False])
def test_an_attention_that_does_not_divide_its_queries_is_told(fused):
    """With separate biases, Eva's own forward may read qkv.weight and call no module at all."""
    vit = make_vit(Eva, qkv_fused=fused)
    model = wrapped(vit, "gpt")
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model(images)
    attn = vit.blocks[1].attn

    def forward(x, rope=None, attn_mask=None, **_):
        return attn.proj(x)

    attn.forward = forward
    with pytest.raises(RuntimeError, match="attention of block 1 has not divided its queries"):
        model(images)
    del attn.forward
    model(images)
