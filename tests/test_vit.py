# SPDX-License-Identifier: Apache-2.0
"""The wrapper against the method, restated step by step in float64; and what it leaves alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import timm_or_skip
from torch import nn

import gated_prompt as gp
from gated_prompt import attention

timm = timm_or_skip()
from timm.models.vision_transformer import VisionTransformer


def small_vit(**changes):
    torch.manual_seed(0)
    options = {
        "img_size": (40, 24), "patch_size": 8, "embed_dim": 36, "depth": 3, "num_heads": 3,
        "num_classes": 5, "reg_tokens": 0, "global_pool": "token", "init_values": 0.5,
    }  # fmt: skip
    vit = VisionTransformer(**{**options, **changes}).double()
    for parameter in vit.parameters():  # away from the zeros and ones of initialisation
        nn.init.normal_(parameter, std=0.3)
    return vit


def restated(model, images):
    """The method as the paper states it, by explicit attention and cat: features and logits."""
    vit, depth = model.backbone, len(model.backbone.blocks)
    batch, prompts = images.shape[0], model.num_prompts
    patch = vit.patch_embed.patch_size[0]
    x = F.conv2d(images, vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=patch)
    x = x.flatten(2).transpose(1, 2)
    prefix = [vit.cls_token] + ([vit.reg_token] if vit.reg_token is not None else [])
    x = torch.cat([token.expand(batch, -1, -1) for token in prefix] + [x], dim=1) + vit.pos_embed
    at_end = model.prompts is not None and model.prompts.position == "end"
    first = x.shape[1] if at_end else vit.num_prefix_tokens
    if prompts:
        inserted = model.prompts.tokens.expand(batch, -1, -1)
        x = torch.cat([x[:, :first], inserted, x[:, first:]], dim=1)
    for index, block in enumerate(vit.blocks):
        attn = (
            block.attn.attn if isinstance(block.attn, attention.TemperedAttention) else block.attn
        )
        tau = getattr(block.attn, "temperature", torch.tensor(1.0, dtype=x.dtype))
        y = F.layer_norm(x, (x.shape[-1],), block.norm1.weight, block.norm1.bias, block.norm1.eps)
        q, k, v = (
            part.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
            for part in F.linear(y, attn.qkv.weight, attn.qkv.bias).chunk(3, dim=2)
        )
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 / tau
        y = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)
        h = x + block.ls1.gamma * F.linear(y, attn.proj.weight, attn.proj.bias)
        y = F.layer_norm(h, (x.shape[-1],), block.norm2.weight, block.norm2.bias, block.norm2.eps)
        y = F.gelu(F.linear(y, block.mlp.fc1.weight, block.mlp.fc1.bias))
        h = h + block.ls2.gamma * F.linear(y, block.mlp.fc2.weight, block.mlp.fc2.bias)
        if index < len(model.gates):
            gate = model.gates[index]
            old, new = x[:, first : first + prompts], h[:, first : first + prompts]
            logit = F.linear(new, gate.weight, gate.bias) if gate.logit is None else gate.logit
            g = torch.sigmoid(logit)
            mixed = g * new + (1 - g) * old if gate.rule == "mix" else old + g * new
            h = torch.cat([h[:, :first], mixed, h[:, first + prompts :]], dim=1)
        x = h
    assert depth == index + 1
    is_prompt = torch.zeros(x.shape[1], dtype=torch.bool)
    is_prompt[first : first + prompts] = True
    is_prefix = torch.zeros_like(is_prompt)
    is_prefix[: vit.num_prefix_tokens] = True
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
    """Gates, temperatures and prompts away from their start, so that a mix-up would show."""
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
OPTIONS = [
    {"method": "linear"},
    {"method": "linear", "pool": "patch"},
    {"method": "vpt-shallow", "pool": "prompt+patch"},
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
    {"method": "gpt", "gated_blocks": 1},
    {"method": "gpt", "gated_blocks": 3, "pool": "prompt"},
    {"method": "gpt", "gated_blocks": 0},
    {"method": "gpt", "temperature": False},
    {"method": "gpt", "temperature": 0.5},
    {"method": "gpt", "attention": "math"},
    {"method": "gpt", "attention": "sdpa", "prompt_init": "normal"},
]


@pytest.mark.parametrize("vit_options", [{}, {"reg_tokens": 2}, {"global_pool": "avg"}], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_wrapper_equals_the_restated_method(options, vit_options):
    vit = small_vit(**vit_options)
    model = randomise(gp.wrap(vit, num_prompts=4, prompt_dropout=0.0, **options))
    images = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    weights = torch.randn(2, 5, dtype=torch.float64)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    wanted_features, wanted_logits = restated(model, images)
    logits = model(images)
    assert (features - wanted_features).abs().max() < 1e-9
    assert (logits - wanted_logits).abs().max() < 1e-9
    parameters = tuned(model)
    got = torch.autograd.grad((logits * weights).sum(), list(parameters.values()))
    wanted = torch.autograd.grad((wanted_logits * weights).sum(), list(parameters.values()))
    for name, a, b in zip(parameters, got, wanted, strict=True):
        assert b.abs().max() > 1e-6, f"{name}: a gradient of zero tests nothing"
        assert (a - b).abs().max() < 1e-9, name


@pytest.mark.parametrize("logit", [-50.0, 0.0, 50.0])
def test_extreme_gates_equal_the_restated_method(logit):
    model = randomise(gp.wrap(small_vit(), num_prompts=4, prompt_dropout=0.0), logit)
    images = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    assert (model(images) - restated(model, images)[1]).abs().max() < 1e-9


def test_open_gates_and_temperature_one_are_vpt_shallow():
    vit = small_vit()
    gpt = gp.wrap(copy.deepcopy(vit), "gpt", num_prompts=4, gate_init=1e4).double().eval()
    vpt = gp.wrap(vit, "vpt-shallow", num_prompts=4).double().eval()
    vpt.load_state_dict(
        {k: v for k, v in gpt.state_dict().items() if k in vpt.state_dict()}, strict=False
    )
    images = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    with torch.no_grad():
        assert (gpt(images) - vpt(images)).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_clamped_temperature_is_exact_in_every_dtype(dtype):
    for value in (-100.0, -1.0, -0.5, 0.0, 0.01, 0.7, 10.0, 11.0, 3e4):
        tau = torch.tensor(value, dtype=dtype, requires_grad=True)
        clamped = attention.clamp_straight_through(tau)
        assert clamped == tau.clamp(0.01, 10.0)
        assert torch.autograd.grad(clamped, tau)[0] == 1
    q, k, v = torch.randn(3, 2, 5, 2, 4)
    tensor = gp.tempered_attention(q, k, v, torch.tensor(100.0))
    assert torch.equal(gp.tempered_attention(q, k, v, 100.0), tensor)


def test_gradient_checkpointing_gives_the_same_and_saves_less():
    images = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    model = randomise(gp.wrap(small_vit(), num_prompts=4, prompt_dropout=0.0))
    results, saved = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        saved.append(0)

        def count(tensor):
            saved[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            logits = model(images)
        results.append([logits, *torch.autograd.grad(logits.sum(), list(tuned(model).values()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert saved[1] < saved[0] / 2


def saved_bytes(function):
    """Bytes of the storages that autograd keeps for backward, and the result."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(storages.values()), result


def test_a_gate_saves_one_slice_and_makes_no_dense_gradient():
    """Beside VPT-shallow: [B, P, D] and a logit per gate; no slice of the sequence in backward."""
    images = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    amounts, counts = [], []
    for method in ("vpt-shallow", "gpt"):
        options = {} if method == "vpt-shallow" else {"temperature": False, "gated_blocks": 3}
        model = gp.wrap(small_vit(), method, num_prompts=4, pool="prompt+patch", **options)
        model.double().train()
        amount, logits = saved_bytes(lambda model=model: model(images))
        amounts.append(amount)
        with torch.profiler.profile() as profile:
            logits.sum().backward()
        names = [event.name for event in profile.events()]
        counts.append({n: names.count(n) for n in ("aten::slice_backward", "aten::zeros")})
    assert amounts[1] - amounts[0] == 3 * (2 * 4 * 36 + 1) * 8
    assert counts[1] == counts[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "float16 autocast"], ids=str)
def test_second_system_trains_stably_from_its_default_start(dtype, monkeypatch):
    """Its prompts grow with each block, since x + g*h doubles them where g is 1."""
    calls = []
    kernel = torch.ops.gated_prompt.prompt_gate_fwd_
    monkeypatch.setattr(
        torch.ops.gated_prompt, "prompt_gate_fwd_", lambda *args: calls.append(1) or kernel(*args)
    )
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=12, num_heads=4, num_classes=4
    )
    model = gp.wrap(vit, num_prompts=8, pool="cls", temperature=False, **SECOND_SYSTEM).train()
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(0, 4, (32,))
    half = dtype == "float16 autocast"
    if not half:
        model, images = model.to(dtype), images.to(dtype)
    largest = []
    for gate in model.gates:
        gate.register_forward_hook(
            lambda module, args, out: largest.append(out[0][:, -8:].abs().max().item())
        )
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=half)
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert len(calls) == 30 * 12
    assert losses[-1] < 0.6 * losses[0], losses  # False for NaN
    assert max(largest) < torch.finfo(torch.float16).max / 2


def test_ddp_under_autocast_gives_every_tuned_parameter_a_gradient():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        model = randomise(gp.wrap(small_vit(), num_prompts=4, prompt_dropout=0.0)).float()
        parallel = nn.parallel.DistributedDataParallel(model)
        images = torch.randn(2, 3, 40, 24)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = parallel(images).float().square().sum()
        loss.backward()
        got = [p.grad for p in tuned(model).values()]
        wanted = torch.autograd.grad(model(images).square().sum(), list(tuned(model).values()))
        for name, a, b in zip(tuned(model), got, wanted, strict=True):
            assert (a - b).norm() < 0.2 * b.norm(), name
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("second", ["linear", "vpt-shallow", "gpt"])
@pytest.mark.parametrize("first", ["linear", "vpt-shallow", "gpt"])
def test_wrapping_twice_is_refused(first, second):
    vit = small_vit()
    model = gp.wrap(vit, first, num_prompts=2)
    with pytest.raises(RuntimeError, match="vit is wrapped already; call unwrap"):
        gp.wrap(vit, second, num_prompts=2)
    gp.unwrap(model)
    gp.wrap(vit, second, num_prompts=2)


@pytest.mark.parametrize("value", [0.001, 50.0])
def test_temperature_is_clamped_with_a_straight_through_gradient(value):
    q, k, v = torch.randn(3, 2, 5, 2, 4, dtype=torch.float64)
    clamped = min(max(value, 0.01), 10.0)
    gradients = []
    for start in (value, clamped):
        tau = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        out = gp.tempered_attention(q, k, v, tau)
        (gradient,) = torch.autograd.grad(out.square().sum(), tau)
        gradients.append((out.detach(), gradient))
        assert tau.item() == start, "the stored value must not change"
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert gradients[0][1] != 0


@pytest.mark.parametrize("method", ["linear", "vpt-shallow", "gpt"])
def test_only_what_the_method_tunes_gets_gradients(method):
    vit = small_vit()
    model = gp.wrap(vit, method, num_prompts=4)
    frozen = {n: p.clone() for n, p in model.backbone.named_parameters() if not p.requires_grad}
    groups = {g["name"]: g["params"] for g in model.double().param_groups(lr=0.5, gate_lr=5.0)}
    expected = {"linear": ["head"], "vpt-shallow": ["prompts", "head"],
                "gpt": ["prompts", "gates", "temperatures", "head"]}[method]  # fmt: skip
    assert list(groups) == expected
    listed = {id(p) for group in groups.values() for p in group}
    assert listed == {id(p) for p in tuned(model).values()}
    optimizer = torch.optim.SGD(model.param_groups(lr=0.5), momentum=0.9)
    before = {n: p.clone() for n, p in tuned(model).items()}
    F.cross_entropy(model(torch.randn(4, 3, 40, 24).double()), torch.arange(4)).backward()
    optimizer.step()
    for name, parameter in tuned(model).items():
        assert not torch.equal(parameter, before[name]), f"{name} did not move"
    for name, parameter in model.backbone.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), f"{name} moved"


def test_sizes_of_vit_b_with_100_prompts():
    vit = VisionTransformer(num_classes=0)
    model = gp.wrap(vit, "gpt", num_prompts=100, pool="cls")
    assert sum(p.numel() for p in tuned(model).values()) == 76_800 + 11 + 12
    bound = 0.0625 * 1.0001  # sqrt(6 / (3 * 16 * 16 + 768))
    assert model.prompts.tokens.abs().max() <= bound
    assert model.prompts.tokens.abs().max() > 0.062
    assert all(gate.logit == -5 for gate in model.gates)
    model.reset_classifier(200)
    torch.testing.assert_close(model.head.bias, torch.full((200,), -4.59512))
    assert abs(model.head.weight.std() * 10 - 1) < 0.05  # sqrt(2 / fan_out) = 0.1


@pytest.mark.parametrize("method", ["linear", "vpt-shallow", "gpt"])
def test_unwrap_gives_back_the_same_model(method):
    vit = small_vit().train()
    vit.blocks[1].eval()
    vit.patch_embed.requires_grad_(False)
    images = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    state = {k: v.clone() for k, v in vit.state_dict().items()}
    flags = [p.requires_grad for p in vit.parameters()]
    modes = [m.training for m in vit.modules()]
    names = [n for n, _ in vit.named_modules()]
    wanted = vit(images)
    model = gp.wrap(vit, method, num_prompts=4).double().train()
    model(images).sum().backward()
    assert gp.unwrap(model) is vit
    assert [p.requires_grad for p in vit.parameters()] == flags
    assert [m.training for m in vit.modules()] == modes
    assert [n for n, _ in vit.named_modules()] == names
    assert all(torch.equal(v, state[k]) for k, v in vit.state_dict().items())
    assert torch.equal(vit(images), wanted)
    gp.wrap(vit, method, num_prompts=4)  # and it may be wrapped again


def test_train_mode_leaves_the_backbone_in_eval_mode():
    model = gp.wrap(small_vit(proj_drop_rate=0.5, drop_path_rate=0.5), num_prompts=4)
    assert model.train() is model
    assert model.training
    assert model.prompts.dropout.training
    assert not any(m.training for m in model.backbone.modules())
    assert model.eval() is model
    assert not model.prompts.dropout.training


def test_deepcopy_and_state_dict_round_trip():
    model = randomise(gp.wrap(small_vit(), num_prompts=4)).eval()
    images = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    wanted = model(images)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(images), wanted)
    with torch.no_grad():
        copied.prompts.tokens.zero_()
    assert torch.equal(model(images), wanted), "a copy must not share parameters"
    other = gp.wrap(small_vit(), num_prompts=4).double().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), wanted)


def test_gate_report_and_selection():
    model = randomise(gp.wrap(small_vit(), num_prompts=4))
    report = model.gate_report()
    g1, g2 = (gate.logit.sigmoid().item() for gate in model.gates)
    assert report["gates"] == pytest.approx([g1, g2])
    assert report["selection"] == pytest.approx([(1 - g1) * (1 - g2), g1 * (1 - g2), g2])
    assert sum(report["selection"]) == pytest.approx(1)
    assert report["temperatures"] == pytest.approx([0.6, 1.1, 1.6])
    assert gp.wrap(small_vit(), "linear").gate_report() == {
        "gates": [], "temperatures": [], "selection": [],
    }  # fmt: skip


def test_clamping_stored_temperatures():
    model = gp.wrap(small_vit(), num_prompts=4)
    with torch.no_grad():
        model.temperatures[0].fill_(-3.0)
        model.temperatures[1].fill_(30.0)
    assert model.gate_report()["temperatures"] == pytest.approx([0.01, 10.0, 1.0])
    model.clamp_temperatures_()
    assert [t.item() for t in model.temperatures] == pytest.approx([0.01, 10.0, 1.0])


@pytest.mark.parametrize("options", [{}, {"rule": "residual", "prompt_position": "end"}], ids=str)
def test_compiled_model_equals_eager(options):
    # "math": compiled float64 SDPA on the CPU fails in backward in torch itself (logsumexp is
    # float32)
    model = gp.wrap(small_vit(), num_prompts=4, prompt_dropout=0.0, attention="math", **options)
    model = randomise(model)
    images = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True)
    parameters = list(tuned(model).values())
    results = []
    for call in (compiled, model):
        logits = call(images)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), parameters)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_default_pool_is_the_papers_or_the_backbones():
    mae = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2)
    mae.pretrained_cfg = {"tag": "mae"}
    assert gp.wrap(mae, num_prompts=2).pool == "prompt+patch"
    assert gp.wrap(small_vit(), num_prompts=2).pool == "cls"
    assert gp.wrap(small_vit(global_pool="avg"), num_prompts=2).pool == "patch"
    with pytest.raises(ValueError, match=r"pool must be one of .* got None"):
        gp.wrap(small_vit(global_pool="avg", fc_norm=False), num_prompts=2)


@pytest.mark.parametrize(
    ("options", "error", "pattern"),
    [
        ({"method": "vpt"}, ValueError, "method must be one of .* got 'vpt'"),
        ({"num_prompts": 0}, ValueError, "num_prompts must be at least 1 for gpt, got 0"),
        ({"num_prompts": -3}, ValueError, "num_prompts must be at least 1 for gpt, got -3"),
        ({"num_prompts": 4.0}, TypeError, "num_prompts must be an int, got float"),
        ({"gated_blocks": 1.5}, TypeError, "gated_blocks must be an int, got float"),
        ({"temperature": None}, TypeError, "temperature must be a bool or a float, got None"),
        ({"gated_blocks": 4}, ValueError, r"gated_blocks must be in \[0, 3\], got 4"),
        ({"gate": "vector"}, ValueError, "gate must be one of .* got 'vector'"),
        ({"rule": "lerp"}, ValueError, "rule must be one of .* got 'lerp'"),
        ({"temperature": 0.0}, ValueError, r"temperature must be in \[0.01, 10.0\], got 0.0"),
        ({"prompt_position": "middle"}, ValueError, "prompt_position must be one of"),
        ({"prompt_init": "zeros"}, ValueError, "prompt_init must be one of"),
        ({"pool": "max"}, ValueError, "pool must be one of"),
        ({"method": "linear", "pool": "prompt"}, ValueError, "pool='prompt' needs prompts"),
        ({"attention": "flash3"}, ValueError, "attention must be one of"),
    ],
    ids=str,
)
def test_bad_options_get_their_error(options, error, pattern):
    vit = small_vit()
    with pytest.raises(error, match=f"(wrap|PromptGate): {pattern}"):
        gp.wrap(vit, **options)
    assert all(p.requires_grad for p in vit.parameters()), "a refused model must stay as it was"
    assert vit.training


def test_bad_models_get_their_error():
    with pytest.raises(
        TypeError, match=r"vit must be a timm.*VisionTransformer, got torch.nn.*Linear"
    ):
        gp.wrap(nn.Linear(2, 2))
    vit = small_vit()
    model = gp.wrap(vit, num_prompts=2)
    with pytest.raises(RuntimeError, match="vit is wrapped already; call unwrap"):
        gp.wrap(vit, num_prompts=2)
    with pytest.raises(TypeError, match="got a model that is wrapped already"):
        gp.wrap(model)
    with pytest.raises(TypeError, match="num_prompts must be an int, got NoneType"):
        gp.wrap(small_vit(), num_prompts=None)
    with pytest.raises(TypeError, match="model must be what wrap returned, got VisionTransformer"):
        gp.unwrap(vit)
    parallel = timm.create_model("vit_small_patch16_18x2_224", img_size=32, num_classes=2)
    gp.unwrap(gp.wrap(parallel, "linear"))  # its blocks have no attention to replace
    with pytest.raises(
        TypeError, match=r"attn must be a timm.layers.Attention, got builtins.NoneType"
    ):
        gp.wrap(parallel, "gpt")
    odd = small_vit()
    odd.blocks[1].attn = nn.Identity()
    with pytest.raises(
        TypeError, match=r"attn must be a timm.layers.Attention, got torch.nn.*Identity"
    ):
        gp.wrap(odd)
    assert all(p.requires_grad for p in odd.parameters())


def test_attention_backends_agree_or_say_why_not():
    q, k, v = torch.randn(3, 2, 7, 3, 8, dtype=torch.float64)
    tau = torch.tensor(0.7, dtype=torch.float64)
    wanted = gp.tempered_attention(q, k, v, tau, "math")
    torch.testing.assert_close(gp.tempered_attention(q, k, v, tau, "sdpa"), wanted)
    torch.testing.assert_close(gp.tempered_attention(q, k, v, tau, "auto"), wanted)
    with pytest.raises(RuntimeError, match="backend='xformers' can't run: q is on the CPU"):
        gp.tempered_attention(q, k, v, tau, "xformers")
    with pytest.raises(ValueError, match="backend must be one of"):
        gp.tempered_attention(q, k, v, tau, "flash")


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["sdpa", "xformers"])
def test_attention_backends_on_cuda(backend):
    if attention.unavailable_reason(backend) is not None:
        pytest.skip(attention.unavailable_reason(backend))
    q, k, v = torch.randn(3, 2, 70, 3, 64, dtype=torch.bfloat16, device="cuda")
    tau = torch.tensor(0.7, device="cuda", requires_grad=True)
    results = []
    for name in (backend, "math"):
        out = gp.tempered_attention(q, k, v, tau, name)
        results.append((out, torch.autograd.grad(out.float().square().sum(), tau)[0]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=5e-2, atol=5e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_on_cuda_equals_cpu(dtype):
    model = randomise(gp.wrap(small_vit(), num_prompts=4, prompt_dropout=0.0)).float()
    images = torch.randn(2, 3, 40, 24)
    wanted = torch.autograd.grad(model(images).sum(), list(tuned(model).values()))
    model = model.cuda()
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        logits = model(images.cuda())
    got = torch.autograd.grad(logits.float().sum(), list(tuned(model).values()))
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    for name, a, b in zip(tuned(model), got, wanted, strict=True):
        error = (a.cpu() - b).norm() / b.norm()
        assert error < tolerance, f"{name}: relative error {error:.3g}"
