# SPDX-License-Identifier: Apache-2.0
"""Attention with a temperature: the function, and timm's attention modules."""

import copy
import importlib.util
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_within_rule, timm_or_skip
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

timm_or_skip()
from timm.layers import Attention, AttentionRope, DiffAttention
from timm.models.eva import EvaAttention

import gated_prompt as gp
from gated_prompt import temperature as attention
from gated_prompt.tempering import Temperatures, Tempering
from gated_prompt.vit import shortcuts
from gated_prompt.vit.attention import FrozenProjection

pytestmark = pytest.mark.usefixtures("one_thread")

B, N, H, D = 2, 9, 3, 8


def leaf(*size, dtype=torch.float64):
    return torch.randn(*size, dtype=dtype).requires_grad_()


@pytest.fixture
def scaled_dots(monkeypatch):
    """Records the arguments of each call of the kernel."""
    calls, kernel = [], attention.scaled_dot
    monkeypatch.setattr(attention, "scaled_dot", lambda *args: calls.append(args) or kernel(*args))
    return calls


# ---- the function ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_clamped_temperature_is_exact_in_every_dtype(dtype):
    for value in (-100.0, -1.0, -0.5, 0.0, 0.01, 0.7, 10.0, 11.0, 3e4):
        tau = torch.tensor(value, dtype=dtype, requires_grad=True)
        clamped = attention.clamp_straight_through(tau)
        assert clamped == tau.clamp(0.01, 10.0)
        assert torch.autograd.grad(clamped, tau)[0] == 1
        (gradient,) = torch.autograd.grad(attention.clamp_straight_through(tau[None]), tau)
        assert gradient == 1
    q, k, v = torch.randn(3, 2, 5, 2, 4)
    tensor = gp.tempered_attention(q, k, v, torch.tensor(100.0))
    assert torch.equal(gp.tempered_attention(q, k, v, 100.0), tensor)


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


def test_attention_backends_agree_or_say_why_not():
    q, k, v = torch.randn(3, 2, 7, 3, 8, dtype=torch.float64)
    tau = torch.tensor(0.7, dtype=torch.float64)
    wanted = gp.tempered_attention(q, k, v, tau, "math")
    torch.testing.assert_close(gp.tempered_attention(q, k, v, tau, "sdpa"), wanted)
    torch.testing.assert_close(gp.tempered_attention(q, k, v, tau, "auto"), wanted)
    with pytest.raises(RuntimeError, match="backend='xformers' can't run: q is on cpu"):
        gp.tempered_attention(q, k, v, tau, "xformers")
    with pytest.raises(ValueError, match="backend must be one of"):
        gp.tempered_attention(q, k, v, tau, "flash")


def explicit(q, k, v, tau):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return ((q @ k.mT / (q.shape[-1] ** 0.5 * tau)).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_function_and_gradients_are_those_of_the_formula(backend, scaled_dots):
    leaves = [leaf(B, N, H, D) for _ in range(3)]
    tau = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(B, N, H, D, dtype=torch.float64)
    results = []
    for function in (lambda *a: gp.tempered_attention(*a, backend), explicit):
        out = function(*leaves, tau)
        results.append([out, *torch.autograd.grad(out, [*leaves, tau], grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert len(scaled_dots) == 1


def test_first_and_second_derivatives_are_right():
    q, k, v = (leaf(1, 4, 2, 3) for _ in range(3))
    tau = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    arguments = (q, k, v, tau)

    def function(q, k, v, tau):
        return gp.tempered_attention(q, k, v, tau, "math")

    torch.autograd.gradcheck(function, arguments, atol=1e-6, rtol=1e-4)
    torch.autograd.gradgradcheck(function, arguments, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_temperature_gradient_is_summed_in_float32(dtype, device):
    q, k, v = (torch.randn(4, 50, 3, 32, device=device).to(dtype) for _ in range(3))
    grad = torch.randn(4, 50, 3, 32, device=device).to(dtype)
    tau = torch.tensor(0.7, device=device, requires_grad=True)
    q.requires_grad_()
    divided = attention.tempered(q, tau)
    divided.retain_grad()
    gp_out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (divided, k, v)))
    (gradient,) = torch.autograd.grad(gp_out.transpose(1, 2), tau, grad, retain_graph=True)
    (of_divided,) = torch.autograd.grad(gp_out.transpose(1, 2), divided, grad)
    terms = divided.detach().double() * of_divided.double()
    eager = (-(divided.detach().float() * of_divided.float()).sum() / tau.detach()).to(tau.dtype)
    assert_within_rule(
        "temperature", gradient, -terms.sum() / 0.7, eager, terms.abs().sum() / 0.7,
        backward=True, reduced=True,
    )  # fmt: skip


def test_nothing_of_the_size_of_q_is_saved_beside_what_attention_saves():
    q, k, v = (leaf(B, N, H, D, dtype=torch.float32) for _ in range(3))
    tau = torch.tensor(0.6, requires_grad=True)
    storages = []
    for function in (
        lambda: F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q * 1, k, v))),
        lambda: gp.tempered_attention(q, k, v, tau),
    ):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.update({t.data_ptr(): t}) or t, lambda t: t
        ):
            function()
        storages.append(sum(t.numel() for t in kept.values()))
    assert storages[1] == storages[0] + 1  # the temperature


def test_transformed_and_compiled_calls_are_plain_pytorch():
    q, k, v = (leaf(B, N, H, D) for _ in range(3))
    tau = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(explicit(q, k, v, tau).square().sum(), (q, tau))

    def loss(q, tau):
        return gp.tempered_attention(q, k.detach(), v.detach(), tau, "math").square().sum()

    torch._dynamo.reset()
    with torch.profiler.profile() as profile:
        for got in (
            torch.func.grad(loss, argnums=(0, 1))(q, tau),
            torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, tau), (q, tau)),
        ):
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert not any("scaled_dot" in event.name and "product" not in event.name
                   for event in profile.events())  # fmt: skip
    mapped = torch.vmap(lambda q: gp.tempered_attention(q[None], k[:1], v[:1], tau, "math")[0])(q)
    each = [gp.tempered_attention(one[None], k[:1], v[:1], tau, "math")[0] for one in q]
    torch.testing.assert_close(mapped, torch.stack(each))
    many = torch.randn(3, B, N, H, D, dtype=torch.float64)
    out = gp.tempered_attention(q, k, v, tau, "math")
    batched = torch.autograd.grad(out, tau, many, is_grads_batched=True, retain_graph=True)[0]
    single = [torch.autograd.grad(out, tau, one, retain_graph=True)[0] for one in many]
    torch.testing.assert_close(batched, torch.stack(single))


def test_temperature_of_several_elements_is_refused():
    q, k, v = torch.randn(3, B, N, H, D)
    with pytest.raises(ValueError, match=r"temperature must have one element or .*, got \[3\]"):
        gp.tempered_attention(q, k, v, torch.ones(3))
    with pytest.raises(TypeError, match="temperature must be a tensor or a float, got NoneType"):
        gp.tempered_attention(q, k, v, None)
    with pytest.raises(ValueError, match=r"must be \[B, N, H, d\] of one shape, got \[\[9, 3, 8\]"):
        gp.tempered_attention(q[0], k[0], v[0], 1.0)
    with pytest.raises(ValueError, match=r"must be \[B, N, H, d\] of one shape"):
        gp.tempered_attention(q, k[:, :4], v, 1.0)
    with pytest.raises(TypeError, match="q, k and v must have one dtype"):
        gp.tempered_attention(q, k.double(), v, 1.0)


# ---- timm's modules ----

DIM = H * D
NORM = {"norm_layer": nn.LayerNorm}
MODULES = {
    "Attention": lambda: Attention(DIM, H, qkv_bias=True),
    "Attention, no bias": lambda: Attention(DIM, H),
    "Attention, norms": lambda: Attention(DIM, H, qk_norm=True, scale_norm=True, **NORM),
    "Attention, gated": lambda: Attention(DIM, H, gated=True, qkv_bias=True),
    "Attention, wide heads": lambda: Attention(DIM, H, attn_head_dim=12, qkv_bias=True),
    "AttentionRope": lambda: AttentionRope(DIM, H),
    "AttentionRope, grouped": lambda: AttentionRope(
        DIM, 4, attn_head_dim=D, num_kv_heads=2, qkv_fused=False
    ),
    "AttentionRope, norms, half": lambda: AttentionRope(
        DIM, H, qk_norm=True, rotate_half=True, num_prefix_tokens=3, **NORM
    ),
    "EvaAttention": lambda: EvaAttention(DIM, H, **NORM),
    "EvaAttention, no bias": lambda: EvaAttention(DIM, H, qkv_bias=False, scale_norm=False),
    "EvaAttention, separate": lambda: EvaAttention(DIM, H, qkv_fused=False, **NORM),
    "EvaAttention, separate bias": lambda: EvaAttention(DIM, H, qkv_bias_separate=True, **NORM),
}


class TemperedAttention(nn.Module):
    """Runs attention as a wrapped block does: by the shortcut, or by timm's forward (`plain`)."""

    def __init__(self, attn, temperature, learnable, backend):
        super().__init__()
        self.attn, self.backend = attn, backend
        self.temperatures = Temperatures(int(learnable), attn.proj.weight.device)
        if learnable:
            nn.init.constant_(self.temperature, temperature)
        source = self.temperatures if learnable else float(temperature)
        self.tempering = Tempering(attn, source, 0)

    @property
    def temperature(self):
        return self.temperatures[0]

    def forward(self, x, rope=None, rows=None):
        return shortcuts.attention(self.attn, x, rope, rows, self.tempering, self.backend)

    def plain(self, x, **options):
        return self.attn(x, **options)


def make_module(name):
    torch.manual_seed(1)
    attn = MODULES[name]().double().eval().requires_grad_(False)
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.3)
    rope = None
    if not isinstance(attn, Attention):
        angle = torch.randn(N - attn.num_prefix_tokens, attn.head_dim // 2, dtype=torch.float64)
        # a pair of channels has one angle: channels i and i + d/2 (rotate_half), else neighbours
        wide = angle.repeat(1, 2) if attn.rotate_half else angle.repeat_interleave(2, 1)
        rope = torch.cat([wide.sin(), wide.cos()], dim=1)
    return attn, {} if rope is None else {"rope": rope}


def timms_own(attn, x, options, tau):
    """Runs timm's attention, not fused, with the scale d^-0.5 / tau."""
    attn = copy.deepcopy(attn)
    while isinstance(attn.q_norm, Tempering):
        attn.q_norm.leave()
    attn.fused_attn, attn.scale = False, attn.scale / tau
    return attn(x, **options)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("value", [1.0, 0.6, "learned", "thawed"])
def test_module_is_timms_with_a_temperature(name, value, scaled_dots):
    attn, options = make_module(name)
    attn.requires_grad_(value == "thawed")
    learned = isinstance(value, str)
    module = TemperedAttention(attn, 0.6 if learned else value, learned, "sdpa").double()
    x = leaf(B, N, DIM)
    tau = torch.tensor([0.6 if learned else value], dtype=torch.float64, requires_grad=learned)
    if learned:
        with torch.no_grad():
            module.temperature.copy_(tau)
    grad = torch.randn(B, N, DIM, dtype=torch.float64)
    wanted = timms_own(attn, x, options, tau)
    want = torch.autograd.grad(wanted, [x, tau] if learned else [x], grad)
    for run in (module, module.plain):
        out = run(x, **options)
        torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-11)
        got = torch.autograd.grad(out, [x, module.temperature] if learned else [x], grad)
        for a, b in zip(got, want, strict=True):
            assert b.abs().max() > 1e-3
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert len(scaled_dots) == 2 * learned
    assert (shortcuts.folded_layers(attn, x) is None) == (value == "thawed")


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 5), slice(4, N)], ids=str)
def test_rows_alone_are_those_rows_of_all(name, rows):
    attn, options = make_module(name)
    module = TemperedAttention(attn, 0.6, True, "sdpa").double()
    x = leaf(B, N, DIM)
    grad = torch.randn(B, rows.stop - rows.start, DIM, dtype=torch.float64)
    results = []
    for out in (module(x, rows=rows, **options), module(x, **options)[:, rows]):
        results.append([out, *torch.autograd.grad(out, [x, module.temperature], grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_folded_projection_has_first_and_second_derivatives():
    x, weight, bias = leaf(1, 3, 4), torch.randn(12, 4).double(), torch.randn(12).double()
    tau = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

    def function(x, tau):
        return FrozenProjection.apply(x, weight, bias, tau, 3, 2)

    torch.autograd.gradcheck(function, (x, tau), atol=1e-6, rtol=1e-4)
    torch.autograd.gradgradcheck(function, (x, tau), atol=1e-6, rtol=1e-4)
    many = [torch.randn(5, *t.shape, dtype=torch.float64) for t in function(x, tau)]
    batched = torch.autograd.grad(function(x, tau), (x, tau), many, is_grads_batched=True)
    for i in range(5):
        single = torch.autograd.grad(function(x, tau), (x, tau), [t[i] for t in many])
        for a, b in zip(batched, single, strict=True):
            torch.testing.assert_close(a[i], b)
    q, _, _ = function(x, tau)  # k and v are not used
    torch.testing.assert_close(
        torch.autograd.grad(q.sum(), x)[0],
        torch.autograd.grad(F.linear(x, weight[:4], bias[:4]).sum() / tau, x)[0],
    )


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast_computes_as_a_cast_module_does(weights):
    attn, _ = make_module("Attention")
    attn = attn.to(weights)
    module = TemperedAttention(attn, 0.6, True, "sdpa")
    x = leaf(B, N, DIM, dtype=torch.float32)
    exact = copy.deepcopy(attn).double()
    with torch.no_grad():  # grad: the direction in which the temperature changes the result
        ends = [timms_own(exact, x.double(), {}, tau) for tau in (0.5, 0.7)]
        grad = (ends[0] - ends[1]).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    got = torch.autograd.grad(out, [x, module.temperature], grad.bfloat16())
    x64, tau = x.detach().double().requires_grad_(), torch.tensor(0.6).double().requires_grad_()
    q, k, v = exact.qkv(x64).unflatten(2, (3, H, D)).unbind(2)
    q = q / tau
    wanted = exact.proj(explicit(q, k, v, 1.0).flatten(2))
    want = torch.autograd.grad(wanted, [x64, tau, q], grad.bfloat16().double())
    for a, b in ((out, wanted), (got[0], want[0])):
        assert (a.double() - b).norm() < 0.02 * b.norm()
    # the sum cancels: compare the error with its terms
    eps, terms = torch.finfo(torch.bfloat16).eps, (q * want[2]).abs().sum() / 0.6
    assert (got[1] - want[1]).abs() < eps * terms
    assert want[1].abs() > 3 * eps * terms, "too small: a wrong factor would pass"
    assert got[0].dtype == got[1].dtype == torch.float32


def test_gradients_of_q_k_and_v_are_not_stacked(device):
    attn, _ = make_module("Attention")
    names = {}
    for make in (lambda: attn, lambda: TemperedAttention(attn, 0.6, True, "sdpa")):
        module = make().float().to(device)
        x = torch.randn(B, N, DIM, device=device, requires_grad=True)
        loss = module(x).square().sum()  # without square(), proj would clone the expanded gradient
        with torch.profiler.profile() as profile:
            loss.backward()
        names[type(module)] = [event.name for event in profile.events()]
    assert "aten::stack" in names[Attention], "timm no longer stacks, so the test shows nothing"
    assert not {"aten::stack", "aten::cat"} & set(names[TemperedAttention])
    # torch's CPU kernel returns the three gradients as [B, H, N, d], which a GEMM must copy first;
    # its CUDA kernel copies a sum [B, H, N] in float32
    assert names[TemperedAttention].count("aten::clone") <= (3 if device.type == "cpu" else 1)


def test_every_change_of_a_weight_is_seen():
    attn, options = make_module("EvaAttention")
    module = TemperedAttention(attn, 0.6, True, "sdpa").double().eval()
    x = torch.randn(B, N, DIM, dtype=torch.float64)
    changes = [
        lambda: module.temperature.data.mul_(1.5),
        lambda: attn.q_bias.data.add_(0.5),
        lambda: attn.qkv.weight.data.mul_(1.1),
        lambda: setattr(attn.qkv.weight, "data", attn.qkv.weight.data * 0.9),
        lambda: module.float().double(),
    ]
    for change in changes:
        with torch.no_grad():
            before = module(x, **options)
            change()
            wanted = timms_own(attn, x, options, module.temperature)
            torch.testing.assert_close(module(x, **options), wanted, rtol=1e-10, atol=1e-11)
            assert not torch.equal(wanted, before)


def test_float64_is_not_narrowed_by_autocast():
    attn, _ = make_module("Attention")
    module = TemperedAttention(attn, 0.6, True, "sdpa").double()
    x = torch.randn(B, N, DIM, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            module(x), module.float()(x.float()).double(), rtol=0.1, atol=0.1
        )


class Lora(nn.Module):
    """An adapter as users put it on a linear layer, before or after wrap."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.weight, self.bias = linear, linear.weight, linear.bias
        self.a = nn.Parameter(torch.randn(2, linear.in_features, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(linear.out_features, 2, dtype=torch.float64))

    def forward(self, x):
        return self.linear(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("name", ["Attention", "EvaAttention, separate"])
def test_what_others_put_on_a_projection_takes_part(name):
    attn, options = make_module(name)
    module = TemperedAttention(attn, 0.6, True, "sdpa").double()
    where = "qkv" if attn.qkv is not None else "k_proj"
    setattr(attn, where, Lora(getattr(attn, where)))
    lora, x = getattr(attn, where), leaf(B, N, DIM)
    out, wanted = module(x, **options), timms_own(attn, x, options, module.temperature.item())
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-11)
    assert shortcuts.folded_layers(attn, x) is None
    grad = torch.randn(B, N, DIM, dtype=torch.float64)
    got = torch.autograd.grad(out, [x, module.temperature, lora.a, lora.b], grad)
    copied = copy.deepcopy(attn)
    copied.q_norm.leave()
    copied.fused_attn, copied.scale = False, copied.scale / module.temperature.item()
    want = torch.autograd.grad(
        copied(x, **options), [x, getattr(copied, where).a, getattr(copied, where).b], grad
    )
    for a, b in zip((got[0], got[2], got[3]), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_hooks_on_a_projection_run():
    attn, _ = make_module("Attention")
    module = TemperedAttention(attn, 0.6, True, "sdpa").double()
    seen = []
    attn.qkv.register_forward_hook(lambda *_: seen.append(1))
    module(torch.randn(B, N, DIM, dtype=torch.float64))
    assert seen == [1]


def test_a_subclass_of_tensor_gets_the_temperature():
    attn, _ = make_module("Attention")
    module = TemperedAttention(attn, 0.6, True, "math").double()

    class Mine(torch.Tensor):
        pass

    x = torch.randn(B, N, DIM, dtype=torch.float64)
    wanted = timms_own(attn, x, {}, module.temperature.item())
    for given in (x, x.as_subclass(Mine)):
        torch.testing.assert_close(module(given).as_subclass(torch.Tensor), wanted)
        with torch.no_grad():
            torch.testing.assert_close(module(given).as_subclass(torch.Tensor), wanted)


@pytest.mark.parametrize("thawed", ["k_proj", "v_proj", "q_bias", "v_bias", "qkv"])
def test_whatever_is_tuned_of_the_projection_gets_its_gradient(thawed):
    name = "EvaAttention, separate" if "proj" in thawed else "EvaAttention"
    attn, options = make_module(name)
    module = TemperedAttention(attn, 0.6, True, "sdpa").double()
    part = getattr(attn, thawed)
    tuned = [part] if isinstance(part, nn.Parameter) else [part.weight]
    tuned[0].requires_grad_(True)
    x = torch.randn(B, N, DIM, dtype=torch.float64)
    assert shortcuts.folded_layers(attn, x) is None
    got = torch.autograd.grad(module(x, **options).square().sum(), tuned)
    attn.q_norm.leave()
    attn.fused_attn, attn.scale = False, attn.scale / module.temperature.item()
    want = torch.autograd.grad(attn(x, **options).square().sum(), tuned)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_what_it_does_not_restate_is_left_to_timm():
    attn, _ = make_module("Attention")
    assert shortcuts.is_restated(attn)
    for change in (
        lambda a: a.attn_drop.register_forward_hook(lambda *_: None),
        lambda a: setattr(a, "fused_attn", False),
        lambda a: setattr(a, "attn_drop", nn.Sequential()),
        lambda a: a.q_norm.register_forward_pre_hook(lambda *_: None),
        lambda a: a.register_full_backward_hook(lambda *_: None),
        lambda a: setattr(a, "forward", a.forward),
        lambda a: (setattr(a.attn_drop, "p", 0.5), a.train()),
        lambda a: a.compile(),
    ):
        changed = copy.deepcopy(attn)
        change(changed)
        assert not shortcuts.is_restated(changed)
    assert not shortcuts.is_restated(None)
    assert not shortcuts.is_restated(DiffAttention(DIM, H))


def test_auto_says_once_what_it_took_and_why(caplog):
    attention._why_not_xformers.cache_clear()
    q, k, v = torch.randn(3, B, N, H, D)
    with caplog.at_level("INFO", logger="gated_prompt.attention"):
        for _ in range(2):
            gp.tempered_attention(q, k, v, 0.7)
    (record,) = caplog.records
    assert "takes sdpa for torch.float32, head size 8: q is on cpu" in record.getMessage()


@pytest.mark.parametrize("raised", [KeyError(torch.float64), NotImplementedError("no such head")])
def test_whatever_xformers_raises_is_a_reason(monkeypatch, raised):
    """xformers 0.0.35 on CUDA raises a KeyError for float64."""

    def refuse(q, k, v):
        raise raised

    xformers = types.SimpleNamespace(memory_efficient_attention=refuse)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=xformers))
    monkeypatch.setitem(sys.modules, "xformers.ops", xformers)
    monkeypatch.setattr(attention, "unavailable_reason", lambda backend: None)
    monkeypatch.setattr(attention, "is_traced", lambda *tensors: False)
    for name in ("_why_not_xformers", "_xformers_failure"):  # without cached results
        monkeypatch.setattr(attention, name, getattr(attention, name).__wrapped__)
    says = re.escape(f"{type(raised).__name__}: {raised}")
    with FakeTensorMode():
        q, k, v = torch.empty(3, B, N, H, D, dtype=torch.float64, device="cuda")
        assert gp.tempered_attention(q, k, v, 0.7).shape == q.shape
        with pytest.raises(RuntimeError, match=f"backend='xformers' can't run: {says}"):
            gp.tempered_attention(q, k, v, 0.7, "xformers")


def test_an_xformers_that_imports_but_does_not_run_is_unavailable(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "_xformers_failure", lambda *sample: "No operator found")
    assert attention.unavailable_reason("xformers") == "No operator found"


def skip_unless_it_runs(backend):
    if backend == "xformers":
        reason = attention._why_not_xformers(torch.bfloat16, 64, torch.device("cuda:0"), True)
        if reason is not None:  # checked by test_auto_takes_xformers_where_it_runs_and_else_sdpa
            pytest.skip(reason)


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["sdpa", "xformers"])
def test_attention_backends_on_cuda(backend):
    skip_unless_it_runs(backend)
    q, k, v = torch.randn(3, 2, 70, 3, 64, dtype=torch.bfloat16, device="cuda")
    tau = torch.tensor(0.7, device="cuda", requires_grad=True)
    results = []
    for name in (backend, "math"):
        out = gp.tempered_attention(q, k, v, tau, name)
        results.append((out, torch.autograd.grad(out.float().square().sum(), tau)[0]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=5e-2, atol=5e-2)


KERNELS = {  # backend: names of its forward in a profile, at least one of which must appear
    "xformers": ("flash_fwd", "fmha_cutlass", "efficient_attention_forward"),
    "sdpa": (
        "_flash_attention_forward",
        "_efficient_attention_forward",
        "_cudnn_attention_forward",
    ),
    "math": ("aten::softmax", "aten::_softmax"),
}


@pytest.mark.cuda
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("backend", KERNELS)
def test_backend_that_was_asked_for_is_the_kernel_that_ran(backend, learned):
    skip_unless_it_runs(backend)
    torch.manual_seed(1)
    attn = Attention(3 * 64, 3, qkv_bias=True).cuda().bfloat16().requires_grad_(False)
    module = TemperedAttention(attn, 0.7, learned, backend)
    x = torch.randn(4, 100, 3 * 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with torch.profiler.profile() as profile:
        out = module(x)
    names = " ".join(event.name for event in profile.events())
    assert any(name in names for name in KERNELS[backend]), names
    others = {"math"} if backend != "math" else {"xformers", "sdpa"}
    for other in others:
        assert not any(name in names for name in KERNELS[other]), names
    wanted, exact = TemperedAttention(attn, 0.7, learned, "math"), copy.deepcopy(attn).float()
    with torch.no_grad():  # grad: how the temperature changes the result, so that nothing cancels
        ends = [TemperedAttention(exact, tau, False, "math")(x.float()) for tau in (0.6, 0.8)]
        grad = (ends[0] - ends[1]).bfloat16()
    results = [
        [y, *torch.autograd.grad(y, [x, m.temperature] if learned else [x], grad)]
        for m, y in ((module, out), (wanted, wanted(x)))
    ]
    for a, b in zip(*results, strict=True):
        assert (a.double() - b.double()).norm() < 0.02 * b.double().norm()


@pytest.mark.cuda
def test_auto_takes_xformers_where_it_runs_and_else_sdpa():
    for dtype, head_dim in ((torch.bfloat16, 64), (torch.float64, 64)):
        q, k, v = torch.randn(3, 2, 70, 3, head_dim, dtype=torch.float64, device="cuda").to(dtype)
        wanted = gp.tempered_attention(q, k, v, 0.7, "math")
        torch.testing.assert_close(
            gp.tempered_attention(q, k, v, 0.7), wanted, rtol=2e-2, atol=2e-2
        )
    assert "xformers" in attention._why_not_xformers(torch.float64, 64, q.device, True)
    with pytest.raises(RuntimeError, match="backend='xformers' can't run"):
        gp.tempered_attention(q, k, v, 0.7, "xformers")
    try:  # ask xformers itself
        from xformers.ops import memory_efficient_attention

        memory_efficient_attention(*(t.bfloat16().requires_grad_() for t in (q, k, v)))
        runs = True
    except (ImportError, NotImplementedError):
        runs = False
    assert (attention._why_not_xformers(torch.bfloat16, 64, q.device, True) is None) == runs
