# SPDX-License-Identifier: Apache-2.0
"""A backward may write into its incoming gradient only if nothing else can ever see it."""

import contextlib
import mmap
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook, save_on_cpu, saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gated_prompt as gp
from gated_prompt import autograd, gradient_ownership, reference

B, N, D, P = 2, 7, 12, 3
GATES = ("scalar", "full", "linear", "linear-token")
pytestmark = pytest.mark.usefixtures("one_thread")


class _Identity(torch.autograd.Function):
    """Identity whose backward calls `see` with the gradient and returns the same tensor."""

    @staticmethod
    def forward(ctx, x, see):
        ctx.see = see
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.see(grad)
        return grad, None


class _Loss(torch.autograd.Function):
    """A loss of two tensors; `make` returns their gradients."""

    @staticmethod
    def forward(ctx, a, b, make):
        ctx.make = make
        return a.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        return *ctx.make(), None


class _SavedGradient(torch.autograd.Function):
    """A loss whose gradient is saved in forward, as in fused losses."""

    @staticmethod
    def forward(ctx, x, grad):
        ctx.save_for_backward(grad)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0], None


class Gated:
    """A gate, and `early`, a tensor that backward reaches after the gate."""

    def __init__(self, gate="scalar", rule="mix"):
        self.module = gp.PromptGate(gate, rule, dim=D, num_prompts=P, init=0.3).double()
        self.other, self.h, self.x = (
            torch.randn(B, N, D, dtype=torch.float64, requires_grad=True) for _ in range(3)
        )
        self.early = self.other * 1
        self.out = self.module(self.h * 1, self.x, 1, P)
        self.w = torch.randn(B, N, D, dtype=torch.float64)
        self.leaves = [self.h, self.x, *self.module.parameters()]

    def second_gate(self):
        return gp.prompt_gate_(self.other * 1, self.x.detach(), self.x.new_tensor(0.3), 1, P)

    def assert_gradients(self, grad):
        m = self.module
        gate = (m.logit,) if m.weight is None else (m.weight, m.bias)
        function = reference.prompt_gate if m.weight is None else reference.prompt_gate_linear
        out = function(self.h, self.x, *gate, 1, P, m.rule)
        for leaf, wanted in zip(
            self.leaves, torch.autograd.grad(out, self.leaves, grad), strict=True
        ):
            torch.testing.assert_close(leaf.grad, wanted, rtol=1e-10, atol=1e-12)


# ---- who else may hold the gradient ----
#
# Each function runs a backward. It returns the gradient that the gate received, and a list of
# (what another holder has afterwards, what it should have).


def _added(total):
    def run(s):
        (total(s) * s.w).sum().backward()
        return s.w, [(s.other.grad, s.w)]

    return run


def _handed_to_backward(s):
    given = s.w.clone()
    s.out.backward(gradient=given)
    return s.w, [(given, s.w)]


def _handed_to_grad(s):
    given = s.w.clone()
    for leaf, grad in zip(s.leaves, torch.autograd.grad(s.out, s.leaves, given), strict=True):
        leaf.grad = grad
    return s.w, [(given, s.w)]


def _handed_in_expanded(s):
    given = s.w[:1, :1].clone()
    s.out.backward(given.expand_as(s.out))
    return given.expand_as(s.out), [(given, s.w[:1, :1])]


def _expanded_by_sum(s):
    seed = torch.ones((), dtype=torch.float64)
    s.out.sum().backward(seed)
    return torch.ones_like(s.w), [(seed, torch.ones_like(seed))]


def _captured(s):
    grads = torch.autograd.grad((s.out * s.w).sum(), [s.out, *s.leaves])
    for leaf, grad in zip(s.leaves, grads[1:], strict=True):
        leaf.grad = grad
    return s.w, [(grads[0], s.w)]


def _retained(s):
    s.out.retain_grad()
    (s.out * s.w).sum().backward()
    return s.w, [(s.out.grad, s.w)]


def _part_of_a_larger_one(join):
    def run(s):
        large = []
        joined = join(s)
        joined.register_hook(lambda grad: large.append((grad, grad.clone())))
        weight = torch.randn_like(joined)
        given = torch.autograd.grad((join(s) * weight).sum(), s.out)[0]
        (joined * weight).sum().backward()
        return given, large

    return run


def _non_contiguous(s):
    weight = s.w.transpose(1, 2).contiguous()
    (s.out.transpose(1, 2) * weight).sum().backward()
    return s.w, [(weight, s.w.transpose(1, 2))]


def _made_under_create_graph(s):
    kept, weight = [], s.w.clone().requires_grad_()
    s.out.register_hook(kept.append)
    (s.out * weight).sum().backward(create_graph=True)
    slope = torch.autograd.grad(kept[0].sum(), weight)[0]
    for leaf in s.leaves:
        leaf.grad = leaf.grad.detach()
    return s.w, [(kept[0].detach(), s.w), (slope, torch.ones_like(s.w))]


def _two_backwards(s):
    kept = s.w.clone()
    loss = _SavedGradient.apply(s.out, kept)
    loss.backward(retain_graph=True)
    loss.backward()
    return 2 * s.w, [(kept, s.w)]


def _two_backwards_of_saved_only(s):
    loss = _SavedGradient.apply(s.out, s.w.clone())
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    return 2 * s.w, [(loss.grad_fn.saved_tensors[0], s.w)]


def _made_by(make):
    """make(w) -> (gradient for the gate, gradient for `early` or None, *other holders of w)."""

    def run(s):
        holders = []

        def both():
            first, second, *held = make(s.w.clone())
            holders.extend((t, s.w) for t in held)
            return first, second

        _Loss.apply(s.out, s.early, both).backward()
        holders += [(s.other.grad, s.w)] if s.other.grad is not None else []
        return s.w, holders

    return run


def _ctx_attribute(s):
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            ctx.kept = grad
            return grad

    out = Keeps.apply(s.out)
    node = out.grad_fn
    (out * s.w).sum().backward()
    return s.w, [(node.kept, s.w)]


def _from_buffer(w):
    memory = bytearray(w.numpy().tobytes())
    held = torch.frombuffer(memory, dtype=w.dtype)
    return torch.frombuffer(memory, dtype=w.dtype).view_as(w), None, held.view_as(w)


SHARED = {
    "residual add, gate first": _added(lambda s: s.out + s.early),
    "residual add, gate second": _added(lambda s: s.early + s.out),
    "residual add, the other is younger": _added(lambda s: s.out + s.other * 1),
    "residual add, a leaf": _added(lambda s: s.out + s.other),
    "residual add, a leaf first": _added(lambda s: s.other + s.out),
    "three terms": _added(lambda s: s.early + (s.out + 0) + 0),
    "handed to backward": _handed_to_backward,
    "handed to autograd.grad": _handed_to_grad,
    "handed in expanded": _handed_in_expanded,
    "expanded by sum": _expanded_by_sum,
    "captured by autograd.grad": _captured,
    "retain_grad": _retained,
    "cat": _part_of_a_larger_one(lambda s: torch.cat([s.out, s.early])),
    "cat, second": _part_of_a_larger_one(lambda s: torch.cat([s.early, s.out])),
    "cat of two gates": _part_of_a_larger_one(lambda s: torch.cat([s.out, s.second_gate()])),
    "stack": _part_of_a_larger_one(lambda s: torch.stack([s.out, s.early])),
    "split": _part_of_a_larger_one(lambda s: s.out.split(2, dim=1)[1]),
    "unbind": _part_of_a_larger_one(lambda s: s.out.unbind(0)[0]),
    "reshape": _part_of_a_larger_one(lambda s: s.out.reshape(-1)),
    "unsqueeze": _part_of_a_larger_one(lambda s: s.out.unsqueeze(0)),
    "alias": _part_of_a_larger_one(lambda s: s.out.view_as(s.out)),
    "non-contiguous": _non_contiguous,
    "create_graph": _made_under_create_graph,
    "two backwards": _two_backwards,
    "two backwards, held by the graph": _two_backwards_of_saved_only,
    "kept in a ctx": _ctx_attribute,
    "one tensor for two inputs": _made_by(lambda w: (w, w)),
    "a tensor and its alias": _made_by(lambda w: (w, w.view_as(w))),
    "a tensor and its detached self": _made_by(lambda w: (w.detach(), w)),
    "kept by the function": _made_by(lambda w: (w, None, w)),
    "a lazy clone": _made_by(lambda w: (torch._lazy_clone(w), None, w)),
    "a negative view": _made_by(lambda w: (torch._neg_view(-w), None)),
    "memory of a bytearray": _made_by(_from_buffer),
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("sharing", SHARED)
def test_shared_gradient_stays_and_all_gradients_are_right(sharing, gate):
    for rule in ("mix", "residual"):
        s = Gated(gate, rule)
        incoming, holders = SHARED[sharing](s)
        for held, wanted in holders:
            assert torch.equal(held, wanted), f"{rule}: another holder's gradient was written"
        s.assert_gradients(incoming)


def test_memory_of_numpy_that_a_backward_returns_is_the_engines():
    """By its counts nothing else holds this memory, so PyTorch adds to it in place, as we do."""

    class FromNumpy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, array):
            ctx.array = array
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return torch.from_numpy(ctx.array), None

    s, arrays = Gated(), [torch.ones(B, N, D).double().numpy() for _ in range(2)]
    y = s.other * 1
    (y.square().sum() + FromNumpy.apply(y, arrays[0]).sum()).backward()
    assert (arrays[0] != 1).all()
    FromNumpy.apply(s.out, arrays[1]).sum().backward()
    s.assert_gradients(torch.ones_like(s.w))
    assert (arrays[1][:, 1 : 1 + P] != 1).all()


@pytest.mark.parametrize("gate", GATES)
def test_two_gates_on_one_gradient(gate):
    """The backward that runs last may reuse the gradient; neither may see what the other wrote."""
    for order in (0, 1):
        s = Gated(gate)
        second = s.second_gate()
        total = s.out + second if order == 0 else second + s.out
        (total * s.w).sum().backward()
        s.assert_gradients(s.w)
        wanted = torch.autograd.grad(s.second_gate(), s.other, s.w.clone())[0]
        assert torch.equal(s.other.grad, wanted)


# ---- kept by hooks ----


def _shared_memory(grad):
    descriptor, size = grad.share_memory_().untyped_storage()._share_fd_cpu_()
    memory = mmap.mmap(os.dup(descriptor), size)
    return torch.frombuffer(memory, dtype=grad.dtype).view_as(grad)


class _SavesForBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, leaf, grad):
        ctx.save_for_backward(grad)
        return leaf * 1

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _in_a_graph(grad):
    with torch.enable_grad():
        return _SavesForBackward.apply(torch.zeros((), requires_grad=True), grad)


def _of_a_leaf(grad):
    leaf = torch.zeros_like(grad).requires_grad_()
    leaf.grad = grad
    return leaf


def _from_storage(storage):
    return torch.empty(0, dtype=torch.float64).set_(storage, 0, (B, N, D))


KEPT = {  # name: (what a hook keeps of the gradient, how to read it later)
    "itself": (lambda g: g, lambda t: t),
    "twice": (lambda g: [g, g], lambda ts: ts[1]),
    "detached": (lambda g: g.detach(), lambda t: t),
    "data": (lambda g: g.data, lambda t: t),
    "rows": (lambda g: g.unbind(0), torch.stack),
    "bound method": (lambda g: g.clone, lambda clone: clone()),
    "numpy": (lambda g: g.numpy(), torch.from_numpy),
    "memoryview": (
        lambda g: memoryview(g.numpy()),
        lambda m: torch.tensor(m.tolist(), dtype=torch.float64),
    ),
    "dlpack": (lambda g: g.__dlpack__(), torch.from_dlpack),
    "storage": (lambda g: g.untyped_storage(), _from_storage),
    "typed storage": (lambda g: g.storage(), lambda s: _from_storage(s.untyped())),
    "lazy clone": (torch._lazy_clone, lambda t: t),
    "nested": (lambda g: torch.nested.as_nested_tensor(list(g)), lambda n: torch.stack(n.unbind())),
    "saved for a backward": (_in_a_graph, lambda t: t.grad_fn.saved_tensors[0]),
    "grad of a leaf": (_of_a_leaf, lambda leaf: leaf.grad),
    "shared memory": (_shared_memory, lambda t: t),
}


def _tensor_hook(out, keep):
    out.register_hook(lambda grad: keep(grad))


def _node_prehook(out, keep):
    out.grad_fn.register_prehook(lambda grads: keep(grads[0]))


def _node_hook(out, keep):
    out.grad_fn.register_hook(lambda grads_in, grads_out: keep(grads_out[0]))


def _upstream_function(out, keep):
    return _Identity.apply(out, keep)


def _retaining_hook(out, keep):
    out.register_hook(keep)
    out.register_hook(lambda grad: grad.view_as(grad))


HOOKS = (_tensor_hook, _node_prehook, _node_hook, _upstream_function, _retaining_hook)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("what", KEPT)
def test_what_a_hook_keeps_of_a_gradient_stays(what, hook):
    keep, read = KEPT[what]
    for gate in ("scalar", "linear"):
        s, kept = Gated(gate), []
        out = hook(s.out, lambda grad, kept=kept: kept.append(keep(grad)))
        ((s.out if out is None else out) * s.w).sum().backward()
        s.assert_gradients(s.w)
        assert torch.equal(read(kept[0]), s.w), "a kept gradient was written"


def test_hook_that_hands_in_its_own_tensor_keeps_it():
    s = Gated()
    own = s.w.clone()
    s.out.register_hook(lambda grad: own)
    (s.out * 3).sum().backward()
    assert torch.equal(own, s.w)
    s.assert_gradients(s.w)


@pytest.mark.parametrize("mode", ["all", "any"])
def test_multi_grad_hook_sees_the_gradient_as_it_was(mode):
    s, seen = Gated(), []
    register_multi_grad_hook([s.out, s.early], seen.append, mode=mode)
    ((s.out * s.w).sum() + (s.early * s.w).sum()).backward()
    grads = seen[0] if mode == "all" else [seen[0]]
    for grad in grads:
        assert torch.equal(grad, s.w)
    s.assert_gradients(s.w)


def test_batched_gradients_stay():
    for gate in ("scalar", "full"):
        s = Gated(gate)
        grads = torch.randn(4, B, N, D, dtype=torch.float64)
        before = grads.clone()
        batched = torch.autograd.grad(
            s.out, s.leaves, grads, is_grads_batched=True, retain_graph=True
        )
        assert torch.equal(grads, before)
        for i, grad in enumerate(before):
            for leaf, one in zip(s.leaves, batched, strict=True):
                leaf.grad = one[i]
            s.assert_gradients(grad)


@pytest.mark.parametrize("gate", GATES)
def test_one_gradient_for_the_sequence_and_its_carrier(gate):
    """With P = N, one tensor arrives twice at the same node."""
    module = gp.PromptGate(gate, dim=D, num_prompts=N, init=0.3).double()
    leaves = [torch.randn(B, N, D, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    w = torch.randn(B, N, D, dtype=torch.float64)
    out, carrier = module(leaves[0] * 1, leaves[1].detach(), 0, N, carrier=leaves[1])
    seen = []
    total = out + carrier
    total.register_hook(lambda grad: seen.append(grad))
    (total * w).sum().backward()
    assert torch.equal(seen[0], w)
    plain = [t.detach().requires_grad_() for t in leaves]
    wanted = torch.autograd.grad(module(plain[0] * 1, plain[1], 0, N), plain, 2 * w)
    torch.testing.assert_close([t.grad for t in leaves], list(wanted))


# ---- a gradient that nothing else holds is reused ----


@pytest.fixture
def reused(monkeypatch):
    """A list that gets one bool for each incoming gradient from now on: True if it was reused."""
    decisions, decide = [], autograd.is_reusable

    def spy(grad, counts):
        decisions.append(decide(grad, counts))
        return decisions[-1]

    monkeypatch.setattr(autograd, "is_reusable", spy)
    return decisions


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_a_gradient_of_ones_own_is_written_in_place(gate, inplace):
    module = gp.PromptGate(gate, dim=D, num_prompts=P)
    function = {
        (True, True): gp.prompt_gate_,
        (True, False): gp.prompt_gate,
        (False, True): gp.prompt_gate_linear_,
        (False, False): gp.prompt_gate_linear,
    }[module.weight is None, inplace]
    h = torch.randn(B, N, D, requires_grad=True)
    x = torch.randn(B, N, D, requires_grad=True)
    pointers, see = [], lambda grad: pointers.append(grad.data_ptr())
    block_out = _Identity.apply(h, see) + 0
    out = _Identity.apply(function(block_out, x, *module.parameters(), 1, P), see)
    w = torch.randn(B, N, D)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        (out * w).sum().backward()
    assert pointers[0] == pointers[1], "a gradient that nothing else holds was copied"
    assert "aten::clone" not in {event.key for event in profiled.key_averages()}


OWNED = {
    "by a C++ node": lambda s: (s.out * s.w).sum(),
    "through a sum": lambda s: ((s.out + 0) * s.w).sum(),
    "the last of two": lambda s: ((s.out + s.other * 1) * s.w).sum(),
    "made in Python": lambda s: _Loss.apply(s.out, s.early, lambda: (s.w.clone(), None)),
    "seen in Python": lambda s: (_Identity.apply(s.out, lambda grad: None) * s.w).sum(),
    "seen by a hook": lambda s: s.out.register_hook(lambda grad: None) and (s.out * s.w).sum(),
    "added up": lambda s: (s.out * s.w).sum() + s.out.square().sum(),
    "of a norm": lambda s: nn.functional.layer_norm(s.out, (D,)).square().sum(),
}


@pytest.mark.parametrize("owned", OWNED)
def test_these_gradients_are_owned(owned, reused):
    OWNED[owned](Gated()).backward()
    assert reused == [True]


def test_a_gradient_that_overlaps_itself_is_copied(reused):
    """It is not a view of another tensor, so its counts are those of an owned gradient."""
    s = Gated()

    def make():
        overlapping = torch.empty_strided((B, N, D), (0, D, 1), dtype=torch.float64)
        return overlapping.fill_(2.0), None

    _Loss.apply(s.out, s.early, make).backward()
    s.assert_gradients(torch.full_like(s.w, 2.0))
    assert reused == [False]


def test_a_gradient_is_copied_while_a_graph_of_gradients_is_made(reused):
    s = Gated()
    loss = _Loss.apply(s.out, s.early, lambda: (s.w.clone(), None))
    loss.backward(create_graph=True, inputs=s.leaves)
    s.assert_gradients(s.w)
    assert reused == [False]


def test_a_gradient_with_a_graph_is_copied(reused):
    """Otherwise the gradient of h would keep the graph of the incoming gradient."""
    s, scale = Gated(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def scaled(grad):
        with torch.enable_grad():
            return grad * scale

    s.out.register_hook(scaled)
    gradients = torch.autograd.grad((s.out * s.w).sum(), s.leaves)
    for leaf, gradient in zip(s.leaves, gradients, strict=True):
        assert not gradient.requires_grad
        leaf.grad = gradient
    s.assert_gradients(2 * s.w)
    assert reused == [False]


@pytest.mark.parametrize("gate", GATES)
def test_a_gradient_that_is_an_inference_tensor_is_copied(gate, reused):
    s = Gated(gate)

    def make():
        with torch.inference_mode():
            return s.w.clone(), None

    _Loss.apply(s.out, s.early, make).backward()
    s.assert_gradients(s.w)
    assert reused == [False]


@pytest.mark.parametrize("is_detached", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_a_lazily_negated_gradient_of_a_backward_is_resolved(gate, is_detached):
    s = Gated(gate)

    def make():
        negated = torch._neg_view(s.w.clone())
        return negated.detach() if is_detached else negated, None

    _Loss.apply(s.out, s.early, make).backward()
    s.assert_gradients(-s.w)


@pytest.mark.parametrize("needs_h", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_a_lazily_negated_gradient_is_resolved(gate, needs_h):
    s = Gated(gate)
    if not needs_h:
        s.h.requires_grad_(False)
        s.out = s.module(s.h * 1, s.x, 1, P)
    leaves = [leaf for leaf in s.leaves if leaf.requires_grad]
    negated = torch._neg_view(s.w.clone())
    assert negated.is_neg()
    gradients = torch.autograd.grad(s.out, leaves, negated)
    plain = torch.autograd.grad(s.module(s.h * 1, s.x, 1, P), leaves, -s.w)
    for got, wanted in zip(gradients, plain, strict=True):
        assert torch.equal(got, wanted)


class Block(nn.Module):
    """A block like timm's: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, D // 2)).permute(2, 0, 3, 1, 4)
        a = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        x = x + self.proj(a.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


DEPTH = 6


class Chain(nn.Module):
    """Blocks on a residual stream with prompts, and a gate after each block except the last."""

    def __init__(self, gate, carries=True, checkpointed=None, rule="mix"):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH)).requires_grad_(False)
        self.prompts = gp.modules.PromptTokens(P, D, dropout=0.0)
        make = gp.PromptGate if gate else lambda *_, **__: None
        self.gates = [make(gate, rule, dim=D, num_prompts=P, init=0.3) for _ in range(DEPTH - 1)]
        self.trained = [self.prompts.tokens]
        self.trained += [p for gate in self.gates if gate for p in gate.parameters()]
        self.carries, self.checkpointed = carries, checkpointed

    def forward(self, images):
        x, carrier, start = self.prompts(images)

        def step(block, gate, x, carrier):
            h = block(x)
            if gate is None:
                return h, carrier
            if self.carries:
                return gate(h, x, start, P, carrier=carrier)
            return gate(h, x, start, P), carrier

        for block, gate in zip(self.blocks, [*self.gates, None], strict=True):
            if self.checkpointed is None:
                x, carrier = step(block, gate, x, carrier)
            else:
                x, carrier = checkpoint(
                    step, block, gate, x, carrier, use_reentrant=self.checkpointed
                )
        return nn.functional.layer_norm(x, (D,)).mul(torch.arange(D)).sum()


@pytest.mark.parametrize("carries", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_of_a_residual_stream_reuses_its_gradient(gate, carries, reused):
    Chain(gate, carries)(torch.randn(B, N, D)).backward()
    assert reused == [True] * (DEPTH - 1)


@pytest.mark.parametrize("gate", GATES)
def test_carriers_make_no_dense_gradient(gate):
    """The chain makes no more copies and zero-padded gradients than the chain without gates. Where
    that one adds gradients in place, so does this one: our code must not hold their storage.
    """
    names = ("clone", "zeros", "zeros_like", "new_zeros", "slice_backward", "slice_scatter", "add")

    def count(chain):
        loss = chain(torch.randn(B, N, D))
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            loss.backward()
        events = {event.key: event.count for event in profiled.key_averages()}
        return {name: events.get(f"aten::{name}", 0) for name in names}

    bare = count(Chain(None))
    assert count(Chain(gate)) == bare
    dense = count(Chain(gate, carries=False))
    assert dense["slice_backward"] == bare["slice_backward"] + DEPTH - 1  # what carriers avoid


@pytest.mark.parametrize("checkpointed", [None, True, False])
@pytest.mark.parametrize("carries", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_chain_has_the_same_bits_without_reuse(gate, carries, checkpointed, monkeypatch, reused):
    chain, images = Chain(gate, carries, checkpointed), torch.randn(B, N, D)

    def gradients():
        return torch.autograd.grad(chain(images), chain.trained)

    if checkpointed:  # reentrant checkpoints do not support autograd.grad

        def gradients():
            for p in chain.trained:
                p.grad = None
            chain(images).backward()
            return [p.grad for p in chain.trained]

    wanted = gradients()
    assert any(reused) == (not checkpointed)  # a reentrant checkpoint holds each gradient itself
    reused.clear()
    monkeypatch.setattr(gradient_ownership, "_REUSES_GRADIENTS", False)
    for a, b in zip(gradients(), wanted, strict=True):
        assert torch.equal(a, b)
    assert reused
    assert not any(reused)


def test_environment_variable_turns_reuse_off():
    program = f"""
import torch, gated_prompt as gp
from gated_prompt import autograd
seen, decide = [], autograd.is_reusable
autograd.is_reusable = lambda *a: seen.append(decide(*a)) or seen[-1]
h = torch.randn({B}, {N}, {D}, requires_grad=True)
out = gp.prompt_gate(h, h.detach(), torch.zeros((), requires_grad=True), 1, {P})
(out * out.detach()).sum().backward()
print(seen)
"""
    for value, wanted in (("0", "[False]"), ("1", "[True]")):
        environment = os.environ | {"GATED_PROMPT_REUSE_GRADIENTS": value}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == wanted, done.stderr


# ---- the counts are measured once, wherever the first gate runs ----


class _Logging(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls.append((args, kwargs))
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def _debugger(install):
    kept = []

    def trace(frame, event, argument):
        kept.append((frame.f_locals, argument))
        return trace

    install(trace)
    try:
        yield
    finally:
        install(None)


@contextlib.contextmanager
def _compiled_autograd():
    from torch._dynamo import compiled_autograd

    with compiled_autograd._enable(torch.compile(backend="eager")):
        yield


FIRST = {
    "nothing": contextlib.nullcontext,
    "saved_tensors_hooks": lambda: saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
    "save_on_cpu": save_on_cpu,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "dispatch mode": lambda: FlopCounterMode(display=False),
    "function mode": _Logging,
    "default device": lambda: torch.device("meta"),
    "profiler": lambda: profile(
        activities=[ProfilerActivity.CPU], record_shapes=True, with_stack=True
    ),
    "anomaly mode": torch.autograd.detect_anomaly,
    "autocast": lambda: torch.autocast("cpu"),
    "deterministic, one thread": lambda: torch.autograd.set_multithreading_enabled(False),
    "debugger": lambda: _debugger(sys.settrace),
    "profiler of Python": lambda: _debugger(sys.setprofile),
    "compiled autograd": _compiled_autograd,
}


def _small_gate():
    h = torch.randn(B, N, D, device="cpu", requires_grad=True)
    logit = torch.zeros((), device="cpu", requires_grad=True)
    return gp.prompt_gate(h, torch.zeros(B, N, D, device="cpu"), logit, 1, P)


@pytest.fixture
def unmeasured(monkeypatch):
    """Removes the measured counts, as in a fresh process; returns the right counts."""
    monkeypatch.setattr(gradient_ownership.Probe, "counts", {})
    _small_gate()
    right, gradient_ownership.Probe.counts = gradient_ownership.Probe.counts, {}
    assert len(right) == 1
    return right


def _assert_kept_gradients_stay():
    for references in range(6):
        out, kept = _small_gate(), []
        out.register_hook(lambda g, kept=kept, n=references: kept.extend([g] * n))
        w = torch.randn(B, N, D)
        (out * w).sum().backward()
        assert all(torch.equal(grad, w) for grad in kept), f"written, with {references} references"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("context", FIRST)
def test_first_gate_anywhere_measures_the_right_counts_or_none(context, unmeasured, reused):
    with FIRST[context]():
        _small_gate()
    assert gradient_ownership.Probe.counts in ({}, unmeasured)
    _assert_kept_gradients_stay()
    assert reused == [True] + [False] * 5, (
        "only the gradient that no hook keeps may be reused, and it must be"
    )


AFTER_A_FAILED_COMPILATION = """
import sys

sys.path.insert(0, {tests!r})
import torch
import test_gradient_ownership as tests
from gated_prompt import autograd


def breaks(x):
    torch._dynamo.graph_break()
    return x + 1


if {gate_before}:
    tests._small_gate()
try:
    torch.compile(breaks, fullgraph=True, backend="eager")(torch.ones(2))
except torch._dynamo.exc.Unsupported:
    pass
reused, real = [], autograd.is_reusable
autograd.is_reusable = lambda *given: reused.append(real(*given)) or reused[-1]
tests._assert_kept_gradients_stay()
print(reused)
"""


@pytest.mark.parametrize("gate_before", [False, True])
def test_after_a_failed_compilation(gate_before):
    """Runs in a subprocess: after a failed compilation torch keeps evaluating frames itself, and a
    call then holds one more reference to each argument."""
    tests = Path(__file__).parent
    script = AFTER_A_FAILED_COMPILATION.format(tests=str(tests), gate_before=gate_before)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tests.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str([True] + [False] * 5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_first_gate_in_a_recomputation(reentrant, unmeasured):
    chain, images = Chain("scalar", checkpointed=reentrant), torch.randn(B, N, D)
    loss = chain(images)
    gradient_ownership.Probe.counts = {}
    loss.backward()
    assert gradient_ownership.Probe.counts == unmeasured
    plain = torch.autograd.grad(_without_checkpoints(chain)(images), chain.trained)
    torch.testing.assert_close([p.grad for p in chain.trained], list(plain))


def _without_checkpoints(chain):
    chain.checkpointed = None
    return chain


def test_first_gate_in_a_hook_or_in_threads(unmeasured):
    def first_gate(grad):
        _small_gate()

    out = torch.zeros(3, requires_grad=True) * 1
    out.register_hook(first_gate)
    out.sum().backward()
    with_hook = gradient_ownership.Probe.counts
    gradient_ownership.Probe.counts = {}
    threads = [threading.Thread(target=_small_gate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert with_hook == gradient_ownership.Probe.counts == unmeasured


def test_measuring_disturbs_nothing(unmeasured):
    packed, hooks = [], []
    hook = nn.modules.module.register_module_full_backward_hook(lambda *a: hooks.append(a))
    state = torch.get_rng_state()
    h = torch.zeros(B, N, D, requires_grad=True)
    logit = torch.zeros((), requires_grad=True)
    for _ in range(2):  # the first iteration measures
        with saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t), torch.no_grad():
            gp.prompt_gate(h, h, logit, 1, P)
        assert not torch.is_grad_enabled() or gradient_ownership.Probe.counts == unmeasured
    hook.remove()
    assert not hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert h.grad is None
    with saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        packed.clear()
        gp.prompt_gate(h, h, logit, 1, P)
        second = len(packed)
        gradient_ownership.Probe.counts = {}
        gp.prompt_gate(h, h, logit, 1, P)
        assert len(packed) == 2 * second


@pytest.mark.parametrize("gate", GATES)
def test_no_reuse_while_a_mode_looks_on(gate, reused):
    s = Gated(gate)
    loss = (s.out * s.w).sum()
    with FlopCounterMode(display=False):
        loss.backward()
    assert reused == [False]
    s.assert_gradients(s.w)


# ---- random graphs, and threads ----


STEPS = (
    *("gate", "gate", "gate", "linear", "add", "add", "cat", "view", "relu", "same"),
    *("hook", "prehook", "retain", "wide"),
)


class _RandomGraph:
    """A graph of gates and of ops that share, keep, view or make gradients; the seed defines it."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.leaves = [torch.randn(B, N, D, dtype=torch.float64) for _ in range(2)]
        self.logit, self.weight = torch.zeros(D).double(), torch.randn(D, D).double() / D
        self.inputs = [t.requires_grad_() for t in (*self.leaves, self.logit, self.weight)]
        self.kept, self.seen = [], []

    def keep(self, grad):
        if grad is not None:
            self.kept.append(grad)
            self.seen.append(grad.clone())

    def keep_all(self, grads):
        for grad in grads:
            self.keep(grad)

    def step(self, pool):
        pick = self.random.choice
        a, b = pick(pool), pick(pool)
        kind = pick(STEPS)
        if kind == "gate":
            return [gp.prompt_gate_(a + 0, b, self.logit, 1, P)]
        if kind == "linear":
            return [gp.prompt_gate_linear_(a + 0, b, self.weight, self.logit, 2, P)]
        if kind == "add":
            return [a + b]
        if kind == "cat":
            return list(torch.cat([a, b]).split(B))
        if kind == "view":
            return [a.reshape(-1).view(B, N, D)]
        if kind == "relu":
            return [a.relu()]
        if kind == "same":
            return [_Identity.apply(a, pick([self.keep, lambda grad: None]))]
        if kind == "wide":
            return [a.transpose(1, 2).contiguous().transpose(1, 2)]
        if a.requires_grad and not a.is_leaf:
            if kind == "hook":
                a.register_hook(self.keep)
            elif kind == "prehook":
                a.grad_fn.register_prehook(self.keep_all)
            else:
                a.retain_grad()
        return []

    def run(self):
        pool = [leaf * 1 for leaf in self.leaves]
        for _ in range(14):
            pool += self.step(pool)
        loss = sum((t * torch.randn_like(t)).sum() for t in pool[-3:])
        loss.backward(retain_graph=True)
        loss.backward()
        retained = [t.grad for t in pool if t.retains_grad and t.grad is not None]
        return [t.grad for t in self.inputs if t.grad is not None] + retained + self.kept


@pytest.mark.parametrize("block", range(4))
def test_random_graphs_have_the_same_bits_without_reuse(block, monkeypatch, reused):
    for seed in range(60 * block, 60 * (block + 1)):
        graph = _RandomGraph(seed)
        got = graph.run()
        assert all(torch.equal(a, b) for a, b in zip(graph.kept, graph.seen, strict=True)), seed
        with monkeypatch.context() as patch:
            patch.setattr(gradient_ownership, "_REUSES_GRADIENTS", False)
            wanted = _RandomGraph(seed).run()
        assert len(got) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), seed
    assert sum(reused) > 20
    assert reused.count(False) > 20


def _two_gates_and_a_hook(seed):
    generator = torch.Generator().manual_seed(seed)
    h, x, w = (torch.randn(B, N, D, generator=generator) for _ in range(3))
    h.requires_grad_()
    logit, kept = torch.zeros(D, requires_grad=True), []
    first = gp.prompt_gate_(h * 1, x, logit, 1, P)
    out = gp.prompt_gate_(first + 0, x, logit, 1, P)
    out.register_hook(kept.append)
    (out * w).sum().backward()
    assert torch.equal(kept[0], w)
    return h.grad, logit.grad


def test_threads_do_not_mix_up_their_gradients(unmeasured):
    """Four threads run at the same time; the first gate of the process is in one of them."""
    results, start = {}, threading.Barrier(4)

    def work(index):
        start.wait()
        results[index] = [grad for seed in range(20) for grad in _two_gates_and_a_hook(seed)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = [grad for seed in range(20) for grad in _two_gates_and_a_hook(seed)]
    for index in range(4):
        assert all(torch.equal(a, b) for a, b in zip(results[index], wanted, strict=True))


# ---- on CUDA ----
#
# The counts are measured by a backward on the CPU, in the caller's thread. On CUDA, a backward runs
# in a thread of the autograd engine.


def on_cuda(gate):
    """Builds a chain of two gates.

    Returns a list and the output. Backward fills the list with the addresses of the gradients
    after, between and before the gates.
    """
    modules = [gp.PromptGate(gate, dim=D, num_prompts=P, init=0.3).cuda() for _ in range(2)]
    x = torch.randn(B, N, D, device="cuda", requires_grad=True)
    pointers, see = [], lambda grad: pointers.append(grad.data_ptr())
    h = _Identity.apply(x, see) + 0
    for module in modules:
        h = _Identity.apply(module(h, x.detach(), 1, P), see) + 0
    return pointers, h


@pytest.mark.cuda
@pytest.mark.parametrize("gate", GATES)
def test_gates_on_cuda_write_into_a_gradient_of_their_own(gate, reused):
    pointers, out = on_cuda(gate)
    w = torch.randn(B, N, D, device="cuda")
    (out * w).sum().backward()
    assert reused == [True, True]
    assert len(pointers) == 3
    assert len(set(pointers)) == 1, "a gradient that nothing else holds was copied"


@pytest.mark.cuda
@pytest.mark.parametrize("gate", GATES)
def test_a_shared_gradient_on_cuda_stays(gate):
    """The other holder is the caller, then another node, then a hook."""
    w = torch.randn(B, N, D, device="cuda")
    given = w.clone()
    on_cuda(gate)[1].backward(given)
    assert torch.equal(given, w)
    other = torch.randn(B, N, D, device="cuda", requires_grad=True)
    ((on_cuda(gate)[1] + other) * w).sum().backward()
    assert torch.equal(other.grad, w)
    kept, out = [], on_cuda(gate)[1]
    out.register_hook(kept.append)
    (out * w).sum().backward()
    assert torch.equal(kept[0], w)
