# SPDX-License-Identifier: Apache-2.0
"""The op under compilers, function transforms, autocast, CUDA graphs and streams."""

import contextlib
import copy
import dataclasses
import functools
import io
import pickle
import threading

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import GATES as SHAPES
from cases import (
    LINEAR_GATES,
    RULES,
    Case,
    all_pairs,
    case_of,
    check_against_reference,
    run_op,
    same_bits,
)
from conftest import timm_or_skip
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gated_prompt as gp
from gated_prompt import autograd, reference

B, N, D, P = 2, 7, 12, 3
GATES = ("scalar", "channel", "token", "sample", "full", "linear", "linear-token")
MODULE_GATES = tuple(gp.modules.GATES)
FORMS = ("new", "in place", "carrier")
pytestmark = pytest.mark.usefixtures("one_thread")


def function_of(gate, form, module=gp):
    name = "prompt_gate_linear" if gate in LINEAR_GATES else "prompt_gate"
    return getattr(module, name if form == "new" or module is reference else f"{name}_")


def call(gate, form, rule, h, x, carrier, *of_gate, length=P, module=gp):
    """Applies the gate to a sum, as a block returns one; form "carrier" also uses the new carrier.

    As in a chain of blocks, block_in's prompt rows are then made from the carrier.
    """
    rows = slice(1, 1 + length)
    if form == "carrier":
        x = x.slice_scatter(carrier, 1, rows.start, rows.stop)
    function = function_of(gate, form, module)
    arguments = (h + 0, x, *of_gate, 1, length, rule)
    if form != "carrier":
        return function(*arguments)
    if module is reference:
        out = function(*arguments)
        carrier = out[:, rows]
    else:
        out, carrier = function(*arguments, carrier=carrier)
    # a carrier's values mean nothing: this adds zeros that send a gradient to it
    return out * 1 + torch.zeros_like(out).slice_scatter(_Gradient.apply(carrier), 1, 1, rows.stop)


class _Gradient(torch.autograd.Function):
    """Returns zeros in the shape of x; x receives half of their gradient."""

    @staticmethod
    def forward(x):
        return torch.zeros_like(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


def draw(gate, form="new", device="cpu", size=(B, N, D), length=P, dtype=torch.float64):
    """Returns random h, x, carrier (None unless form is "carrier") and the gate's tensors."""
    batch, _, dim = size
    shapes = [size, size, (batch, length, dim), SHAPES[gate](batch, length, dim)]
    if gate in LINEAR_GATES:
        shapes.append(shapes[-1][:1])
    tensors = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
    if form != "carrier":
        tensors[2] = None
    return tensors


def with_gradients(function, tensors):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    wanted = [t for t in leaves if t is not None]
    # x gets no gradient if a carrier takes all of it
    return [out.detach(), *torch.autograd.grad(out, wanted, grad, materialize_grads=True)]


def assert_all_close(got, wanted, tolerance=1e-11):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", GATES)
def test_helpers_agree_with_the_reference(gate, form):
    for rule in RULES:
        tensors = draw(gate, form)
        of_op, of_reference = (
            with_gradients(functools.partial(call, gate, form, rule, module=m), tensors)
            for m in (gp, reference)
        )
        assert_all_close(of_op, of_reference)


# ---- torch.compile ----


@pytest.mark.parametrize(
    ("form", "rule", "dynamic"),
    [
        ("new", "mix", None),
        ("new", "residual", True),
        ("in place", "residual", None),
        ("in place", "mix", True),
        ("in place", "mix", False),
        ("carrier", "mix", None),
    ],
)
@pytest.mark.parametrize("gate", GATES)
def test_traced_whole_equals_eager(device, gate, form, rule, dynamic):
    torch._dynamo.reset()
    function = functools.partial(call, gate, form, rule)
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    tensors = draw(gate, form, device)
    assert_all_close(with_gradients(compiled, tensors), with_gradients(function, tensors))


@pytest.mark.parametrize("form", ["new", "in place"])
def test_code_of_inductor_equals_eager(device, form):
    torch._dynamo.reset()
    gates = ("scalar", "full", "linear")

    def function(*tensors):
        tensors, outs = iter(tensors), []
        for gate, rule in zip(gates, (*RULES, "mix"), strict=True):
            own = [next(tensors) for _ in range(4 + (gate in LINEAR_GATES))]
            outs.append(call(gate, form, rule, *own))
        return torch.stack(outs)

    tensors = [t for gate in gates for t in draw(gate, form, device, dtype=torch.float32)]
    compiled = torch.compile(function, fullgraph=True)
    wanted = with_gradients(function, tensors)
    assert_all_close(with_gradients(compiled, tensors), wanted, tolerance=5e-6)


@pytest.mark.parametrize(("varies", "dynamic"), [("size", None), ("length", None), ("size", True)])
@pytest.mark.parametrize("gate", GATES)
def test_at_most_two_recompilations_for_twenty_sizes(gate, dynamic, varies):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = functools.partial(call, gate, "new" if varies == "size" else "in place", "mix")
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    for i in range(20):
        batch, tokens = (2 + i % 5, 9 + i) if varies == "size" else (3, 30)
        length = P if varies == "size" else 2 + i
        tensors = draw(gate, size=(batch, tokens, D), length=length)
        with torch.no_grad():
            got, wanted = (f(*tensors, length=length) for f in (compiled, function))
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert counter.frame_count <= 3


def as_traced(case):
    """Without what a traced gate does not promise: a gradient for a carrier, and GEMMs in backward
    that autocast does not round (docs/prompt_gate.md)."""
    autocast = case.autocast and case.gate != "linear"
    return dataclasses.replace(case, compiled="aot_eager", autocast=autocast)


TRACED = [case for case in map(case_of, all_pairs()) if case.in_form != "carrier"]


@pytest.mark.parametrize("case", TRACED[::3], ids=str)
def test_traced_cases_keep_the_tolerance_rule(device, case):
    """Layouts, dtypes, shapes, values and subsets of gradients, as for the kernels."""
    check_against_reference(dataclasses.replace(as_traced(case), device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_code_of_inductor_keeps_the_tolerance_rule(device, gate, dtype):
    # an odd D, and prompts at the end
    size = {"batch": 3, "num_tokens": 9, "dim": 67, "start": -4, "length": 4}
    for rule, inplace in zip(RULES, (False, True), strict=True):
        case = Case(**size, gate=gate, rule=rule, dtype=dtype, inplace=inplace, device=device)
        check_against_reference(dataclasses.replace(case, compiled="inductor"))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gate", GATES)
def test_compiled_gate_keeps_only_prompt_rows(gate, rule):
    """For backward: one [B, P, D] tensor, and for a linear gate the rows of h and the logit. A view
    of rows of h would keep all of h."""
    torch._dynamo.reset()
    a, x, _, *of_gate = (t if t is None else t.requires_grad_() for t in draw(gate))

    def function(a, x, *of_gate):
        return function_of(gate, "new")(2 * a, x, *of_gate, 1, P, rule)

    out = torch.compile(function, fullgraph=True)(a, x, *of_gate)
    given = {t.data_ptr() for t in of_gate}
    saved = [t for t in out.grad_fn.saved_tensors if t.data_ptr() not in given]
    kept = sum(t.untyped_storage().nbytes() for t in saved)
    rows = B * P * D * a.itemsize
    assert rows <= kept <= (3.2 if gate in LINEAR_GATES else 1.1) * rows


@pytest.mark.parametrize("gate", ["scalar", "full", "linear"])
def test_compiled_in_place_copies_no_rows_in_backward(gate):
    """Even if both inputs are kept for another op: they may be overwritten before backward."""
    torch._dynamo.reset()
    h, x, _, *of_gate = (t if t is None else t.requires_grad_() for t in draw(gate))

    def function(h, x, *of_gate):
        other = h.sin() + x.sin()
        return function_of(gate, "in place")(h * 1, x, *of_gate, 1, P) + other

    out = torch.compile(function, fullgraph=True)(h, x, *of_gate)
    with profile() as recorded:
        out.sum().backward()
    assert not [event.key for event in recorded.key_averages() if "copy_rows" in event.key]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_gate_has_no_second_derivative(backend):
    torch._dynamo.reset()
    h, x, _, logit = (t if t is None else t.requires_grad_() for t in draw("scalar"))
    compiled = torch.compile(gp.prompt_gate, fullgraph=True, backend=backend)
    out = compiled(h, x, logit, 1, P)

    def second():
        first = torch.autograd.grad(out.square().sum(), logit, create_graph=True)
        return torch.autograd.grad(first, h)

    with pytest.raises(RuntimeError, match=r"does not require grad|not .* support double backward"):
        second()


class Gated(nn.Module):
    """Blocks, each followed by a gate: the module with carriers, or the in-place function."""

    def __init__(self, gate, rule="mix", blocks=None, inplace=False):
        super().__init__()
        self.blocks = nn.ModuleList(blocks or [nn.Identity()])
        self.gates = nn.ModuleList(
            gp.PromptGate(gate, rule, dim=D, num_prompts=P, init=0.3) for _ in self.blocks
        )
        self.tokens = gp.PromptTokens(P, D, dropout=0.0)
        self.inplace = inplace

    def forward(self, images):
        x, carrier, start = self.tokens(images)
        for block, gate in zip(self.blocks, self.gates, strict=True):
            h = block(x) + 0
            if self.inplace:
                function = gp.prompt_gate_ if gate.weight is None else gp.prompt_gate_linear_
                x = function(h, x, *gate.parameters(), start, P, gate.rule)
            else:
                x, carrier = gate(h, x, start, P, carrier)
        return x


def trained(model):
    return [p for name, p in model.named_parameters() if not name.startswith("blocks")]


def step(model, call, images):
    out = call(images)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), trained(model))]


def timm_model(gate, inplace=False, dtype=torch.float64):
    timm_or_skip()
    from timm.models.vision_transformer import Block

    blocks = [Block(D, 2, init_values=0.3).requires_grad_(False) for _ in range(3)]
    return Gated(gate, blocks=blocks, inplace=inplace).to(dtype)


@pytest.mark.parametrize(
    ("gate", "inplace"),
    [("scalar", False), ("scalar", True), ("token", False), ("linear", False), ("linear", True)],
)
def test_three_timm_blocks_compile_without_a_break(gate, inplace):
    torch._dynamo.reset()
    model = timm_model(gate, inplace)
    images = torch.randn(B, N - P, D, dtype=torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert_all_close(step(model, compiled, images), step(model, model, images), tolerance=1e-10)
    assert counter.frame_count == 1


def test_three_timm_blocks_by_inductor(device):
    torch._dynamo.reset()
    model = timm_model("scalar", inplace=True, dtype=torch.float32).to(device)
    images = torch.randn(B, N - P, D, device=device)
    compiled = torch.compile(model, fullgraph=True)
    assert_all_close(step(model, compiled, images), step(model, model, images), tolerance=2e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("gate", MODULE_GATES)
def test_reduce_overhead_equals_eager(gate):
    torch._dynamo.reset()
    model = timm_model(gate, dtype=torch.float32).cuda()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        images = torch.randn(B, N - P, D, device="cuda")
        got = [t.clone() for t in step(model, compiled, images)]
        for a, b in zip(got, step(model, model, images), strict=True):
            # sums may cancel, so the bound is relative to the largest value
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * max(1.0, b.abs().max().item()))


def test_carrier_takes_the_gradient_of_block_in_or_says_that_it_does_not():
    """Eager: also if block_in does not require grad. Traced: raises if it does not."""
    h, x, carrier, logit = (t.requires_grad_() for t in draw("scalar", "carrier"))
    out, _ = gp.prompt_gate_(h + 0, x.detach(), logit, 1, P, carrier=carrier)
    wanted = torch.autograd.grad(reference.prompt_gate(h, x, logit, 1, P).sum(), x)[0][:, 1 : 1 + P]
    torch.testing.assert_close(torch.autograd.grad(out.sum(), carrier)[0], wanted)
    compiled = torch.compile(gp.prompt_gate_, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="pass block_in without detach"):
        compiled(h + 0, x.detach(), logit, 1, P, carrier=carrier)


# ---- patterns of mutation that torch.compile gets wrong ----


@pytest.mark.parametrize(
    ("rule", "gate"),
    [
        ("mix", "scalar"),
        ("residual", "scalar"),
        ("mix", "channel"),
        ("residual", "sample"),
        ("mix", "linear"),
    ],
)
def test_compiled_in_place_on_a_graph_input_keeps_its_gradients(device, rule, gate):
    """Inductor repeats a plain clone in backward, after the write: the gradient was 60 % off."""
    h, x, _, *of_gate = draw(gate, device=device, dtype=torch.float32)
    results = []
    for module in (gp, reference):
        function = function_of(gate, "in place", module)
        if module is gp:
            function = torch.compile(function, fullgraph=True)
        leaves = [t.clone().requires_grad_() for t in (h, x, *of_gate)]
        out = function(leaves[0] + 0, *leaves[1:], 1, P, rule)
        grad = torch.linspace(-1, 1, out.numel(), device=device).view_as(out)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert_all_close(*results, tolerance=1e-5)


def test_compiled_in_place_keeps_block_in_for_backward(device):
    """block_in is overwritten after the gate, but backward must multiply with its old values."""

    def function(h, x, logit):
        out = gp.prompt_gate_(h, x, logit, 1, P)
        return out + gp.prompt_gate_(x, h.sin(), logit, 1, P)

    h, x, _, logit = draw("scalar", device=device, dtype=torch.float32)
    results = []
    for run in (torch.compile(function, fullgraph=True), function):
        leaves = [t.clone().requires_grad_() for t in (h, x, logit)]
        out = run(leaves[0] * 1, leaves[1] * 1, leaves[2])
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert_all_close(*results, tolerance=1e-5)


@pytest.mark.parametrize("gate", ["scalar", "linear"])
def test_compiled_in_place_after_a_clone_leaves_the_original(device, gate):
    """pytorch#198031: a mutating op on a clone must not reach the tensor that was cloned."""

    def function(h, x, *of_gate):
        copied = h.clone()
        return function_of(gate, "in place")(copied, x, *of_gate, 1, P), h + 0

    h, x, _, *of_gate = draw(gate, device=device, dtype=torch.float32)
    wanted, before = function_of(gate, "new")(h, x, *of_gate, 1, P), h.clone()
    got, original = torch.compile(function, fullgraph=True)(h, x, *of_gate)
    torch.testing.assert_close(got, wanted)
    assert torch.equal(original, before)
    assert torch.equal(h, before)


def _assign(h, x, logit):
    h[:, 1 : 1 + P] = h[:, 1 : 1 + P] * logit + x


def _gate(h, x, logit):
    gp.prompt_gate_(h, x, logit, 1, P)


_wrong_in_torch = pytest.mark.xfail(
    strict=True, reason="pytorch#153389: two views that share elements, both written to"
)
VIEWS = {"apart": (0, 10), "overlapping": (0, 2), "the same": (0, 0)}


@pytest.mark.parametrize(
    ("write", "views"),
    [
        pytest.param(write, views, marks=[] if views == "apart" else [_wrong_in_torch])
        for write in (_assign, _gate)
        for views in VIEWS
    ],
)
def test_compiled_writes_to_two_views_of_one_base(write, views):
    """Plain aten (slice assignment) and the op behave the same."""
    torch._dynamo.reset()

    def function(a, b, x, logit):
        write(a, x, logit)
        write(b, x, logit)
        return a + b

    x, logit = torch.randn(B, P, D), torch.tensor(0.4)
    results = []
    for run in (torch.compile(function, fullgraph=True), function):
        base = torch.linspace(-1, 1, B * 20 * D).view(B, 20, D)
        a, b = (base[:, first : first + N] for first in VIEWS[views])
        results.append([run(a, b, x, logit), base])
    assert_all_close(*results, tolerance=1e-5)


# ---- torch.export ----


class OneGate(nn.Module):
    def __init__(self, gate, form):
        super().__init__()
        self.gate, self.form = gp.PromptGate(gate, dim=D, num_prompts=P, init=0.3), form

    def forward(self, h, x):
        if self.form == "module":
            return self.gate(h * 1, x, 1, P)
        return call(self.gate.gate, self.form, "mix", h, x, None, *self.gate.parameters())


def _exported(model, inputs, dynamic_shapes, strict):
    program = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes, strict=strict)
    for exported in (program, program.run_decompositions()):
        for target in (node.target for node in exported.graph.nodes if node.op == "call_function"):
            own = isinstance(target, torch._ops.OpOverload) and target.namespace == "gated_prompt"
            assert not (own and target._schema.is_mutable), target
        yield exported.module()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("form", ["module", "new", "in place"])
@pytest.mark.parametrize("gate", MODULE_GATES)
def test_exported_gate_gives_the_same_result(gate, form, strict):
    model = OneGate(gate, form)
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("tokens", min=P + 2)}
    inputs = torch.randn(B, N, D), torch.randn(B, N, D)
    for exported in _exported(model, inputs, (sizes, sizes), strict):
        for size in ((B, N, D), (5, 19, D)):
            h, x = torch.randn(size), torch.randn(size)
            torch.testing.assert_close(exported(h, x), model(h, x))


@pytest.mark.parametrize("strict", [True, False])
def test_exported_prompts_take_any_batch(strict):
    model = Gated("linear")
    sizes = {0: torch.export.Dim("batch", min=2)}
    for exported in _exported(model, (torch.randn(B, N, D),), (sizes,), strict):
        images = torch.randn(5, N, D)
        torch.testing.assert_close(exported(images), model(images))


def test_model_compiled_ahead_of_time_equals_eager(tmp_path):
    timm_or_skip()
    import timm

    vit = timm.create_model(
        "vit_tiny_patch16_224", depth=2, num_classes=3, img_size=32, embed_dim=24, num_heads=2
    )
    model = gp.wrap(vit, num_prompts=4).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        compiled = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-5)


# ---- function transforms ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", GATES)
def test_grad_jvp_vjp_and_vmap_of_functorch(device, gate, form):
    tensors = draw(gate, form, device)
    places = tuple(i for i, t in enumerate(tensors) if t is not None)

    def function(*given):
        given = dict(zip(places, given, strict=True))
        return call(gate, form, "mix", *(given.get(i) for i in range(len(tensors))))

    given = [tensors[i] for i in places]

    def total(*given):
        return function(*given).square().sum()

    leaves = [t.clone().requires_grad_() for t in given]
    wanted = torch.autograd.grad(total(*leaves), leaves, materialize_grads=True)
    argnums = tuple(range(len(given)))
    assert_all_close(torch.func.grad(total, argnums=argnums)(*given), wanted)
    out, pull = torch.func.vjp(function, *given)
    assert_all_close(pull(2 * out), wanted)
    if form != "carrier":  # _Gradient defines no jvp
        tangents = [torch.randn_like(t) for t in given]
        expected = sum((w * t).sum() for w, t in zip(wanted, tangents, strict=True))
        _, slope = torch.func.jvp(total, tuple(given), tuple(tangents))
        torch.testing.assert_close(slope, expected)
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(*pair) for pair in zip(given, tangents, strict=True)]
            torch.testing.assert_close(forward_ad.unpack_dual(total(*dual)).tangent, expected)
        many = [torch.stack([t, -t, 2 * t]) for t in given]
        for index, one in enumerate(torch.vmap(function)(*many)):
            torch.testing.assert_close(one, function(*(t[index] for t in many)))
        if form == "new":  # vmap can't write the results of several gates into one h
            gates = [torch.stack([t, t / 2]) for t in given[2:]]
            mapped = torch.vmap(function, in_dims=(None, None, *(0 for _ in gates)))
            for index, one in enumerate(mapped(*given[:2], *gates)):
                torch.testing.assert_close(one, function(*given[:2], *(t[index] for t in gates)))
        per_sample = torch.vmap(torch.func.grad(total, argnums=argnums))(*many)
        assert_all_close([t[0] for t in per_sample], wanted)


@pytest.mark.parametrize("form", ["new", "in place"])
@pytest.mark.parametrize("gate", ["scalar", "linear"])
def test_compiled_transforms_keep_the_tangent(device, gate, form):
    h, x, _, *of_gate = draw(gate, device=device)
    tangent = torch.randn_like(h)

    def derivative(function, h):
        return torch.func.jvp(lambda h: function(h * 1, x, *of_gate, 1, P), (h,), (tangent,))[1]

    function = function_of(gate, form)
    compiled = torch.compile(lambda h: derivative(function, h), backend="eager")
    wanted = derivative(function_of(gate, form, reference), h)
    torch.testing.assert_close(compiled(h), wanted)
    mapped = torch.vmap(lambda *of_gate: function(h * of_gate[-1].mean(), x, *of_gate, 1, P))
    many = [torch.stack([t, t / 2]) for t in of_gate]
    torch.testing.assert_close(torch.compile(mapped, backend="eager")(*many), mapped(*many))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", GATES)
def test_batched_incoming_gradients(device, gate, form):
    tensors = [t if t is None else t.requires_grad_() for t in draw(gate, form, device)]
    leaves = [t for i, t in enumerate(tensors) if t is not None and (i != 1 or form != "carrier")]
    grads = torch.randn(5, B, N, D, dtype=torch.float64, device=device)
    for rule in RULES:
        out = call(gate, form, rule, *tensors)
        batched = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
        for index, grad in enumerate(grads):
            single = torch.autograd.grad(out, leaves, grad, retain_graph=True)
            assert_all_close([t[index] for t in batched], single)


@pytest.mark.parametrize("incoming", ["constant", "of a square"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", GATES)
def test_second_derivative_is_one_clear_error(gate, form, incoming):
    leaves = [t if t is None else t.requires_grad_() for t in draw(gate, form)]
    out = call(gate, form, "mix", *leaves)
    out = out.sum() if incoming == "constant" else out.square().sum()
    wanted = [t for i, t in enumerate(leaves) if t is not None and (i != 1 or form != "carrier")]
    first = torch.autograd.grad(out, wanted, create_graph=True)
    for grad in first:
        if grad.requires_grad:
            with pytest.raises(RuntimeError, match=r"no second derivative.*reference"):
                grad.sum().backward(retain_graph=True)
    assert first[-1].requires_grad, "a gradient without a graph is a silent zero"


@pytest.mark.parametrize("gate", GATES)
def test_second_derivative_of_functorch_is_right(gate):
    h, x, _, *of_gate = draw(gate)

    def slope(module, logit):
        function = function_of(gate, "new", module)
        loss = torch.func.grad(lambda z: function(h, x, z, *of_gate[1:], 1, P).square().sum())
        return torch.func.grad(lambda z: loss(z).square().sum())(logit)

    torch.testing.assert_close(slope(gp, of_gate[0]), slope(reference, of_gate[0]))


@pytest.mark.parametrize("gate", MODULE_GATES)
def test_functional_call(gate):
    model, other = Gated(gate), Gated(gate)
    for p in other.parameters():
        nn.init.normal_(p)
    images = torch.randn(B, N, D)
    parameters = dict(other.named_parameters())
    got = torch.func.functional_call(model, parameters, images)
    assert torch.equal(got, other(images))
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, images).square().sum())(
        parameters
    )
    wanted = torch.autograd.grad(other(images).square().sum(), list(parameters.values()))
    assert_all_close(grads.values(), wanted, tolerance=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", GATES)
def test_checkpointed_has_the_same_bits(device, gate, form, reentrant):
    tensors = draw(gate, form, device)

    def run(h, x, carrier, *of_gate):
        return call(gate, form, "residual", h.sin(), x.cos(), carrier, *of_gate)

    def run_again(*tensors):
        return checkpoint(run, *tensors, use_reentrant=reentrant)

    results = []
    for function in (run, run_again):
        leaves = [t if t is None else t.clone().requires_grad_() for t in tensors]
        out = function(*leaves)
        out.square().sum().backward()
        results.append([out, *(t.grad for t in leaves if t is not None and t.grad is not None)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


# ---- tensor subclasses, and modes that observe ops ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", GATES)
def test_tensor_subclasses_run_the_traced_form(monkeypatch, gate, form):
    class Subclass(torch.Tensor):
        pass

    def kernels(*args):
        raise AssertionError("a subclass may intercept ops, so it must not reach the kernels")

    for function in (autograd.PromptGateFunction, autograd.PromptGateLinearFunction):
        monkeypatch.setattr(function, "apply", kernels)
    tensors = draw(gate, form)
    wanted = call(gate, form, "mix", *tensors, module=reference)
    for index, t in enumerate(tensors):
        if t is not None and not (form == "carrier" and index == 2):
            given = [*tensors]
            given[index] = t.as_subclass(Subclass)
            got = call(gate, form, "mix", *given)
            assert form != "new" or type(got) is Subclass
            torch.testing.assert_close(got.as_subclass(torch.Tensor), wanted)


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", GATES)
def test_tensors_without_values_have_the_real_shapes(gate, form, kind):
    function = functools.partial(call, gate, form, "mix")
    for dtype in (torch.float64, torch.bfloat16):
        wanted = with_gradients(function, draw(gate, form, dtype=dtype))
        if kind == "fake":
            with FakeTensorMode():
                got = with_gradients(function, draw(gate, form, dtype=dtype))
        else:
            got = with_gradients(function, draw(gate, form, "meta", dtype=dtype))
        for a, b in zip(got, wanted, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


class _LooksOn(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def _deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _nested_autocast():
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        yield


CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast off in autocast": _nested_autocast,
    "FlopCounterMode": lambda: FlopCounterMode(display=False),
    "TorchDispatchMode": _LooksOn,
    "saved_tensors_hooks": lambda: saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy),
    "save_on_cpu": save_on_cpu,
    "anomaly mode": torch.autograd.detect_anomaly,
    "deterministic algorithms": _deterministic,
    "profiler": lambda: profile(record_shapes=True),
    "one autograd thread": lambda: torch.autograd.set_multithreading_enabled(False),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("gate", GATES)
def test_forward_and_backward_have_the_same_bits_in(context, gate):
    for inplace, in_form in ((False, "sequence"), (True, "sequence"), (True, "carrier")):
        case = Case(gate=gate, inplace=inplace, in_form=in_form)
        wanted = run_op(case).tensors
        with CONTEXTS[context]():
            got = run_op(case).tensors
        assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_anomaly_mode_names_the_gate():
    h = torch.randn(B, N, D)
    h[:, 1, :2] = torch.tensor([float("inf"), -float("inf")])
    out = gp.prompt_gate(h, torch.zeros(B, N, D), torch.zeros((), requires_grad=True), 1, P)
    with (
        torch.autograd.detect_anomaly(),
        pytest.raises(RuntimeError, match="PromptGateFunctionBackward"),
    ):
        out.sum().backward()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", GATES)
def test_hooks_see_no_saved_sequence(gate, form):
    """Only [B, P, D] tensors and the gate's own tensors are saved for backward, no [B, N, D]."""
    sizes = []
    h, x, carrier, *of_gate = draw(gate, form, size=(B, 50, D))
    tensors = [t.requires_grad_() for t in of_gate]
    if carrier is not None:
        carrier.requires_grad_()
    arguments = (h + 0, x, *tensors, 1, P)
    extra = {"carrier": carrier} if form == "carrier" else {}
    with saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        function_of(gate, form)(*arguments, **extra)
    assert sizes
    assert max(sizes) <= max(B * P * D, D * D)


# ---- autocast ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", GATES)
def test_backward_outside_autocast_and_compiled_in_it(device, gate, form, dtype):
    """Autocast does not change the dtype of a linear gate's GEMM: same bits, same dtypes."""
    tensors = draw(gate, form, device, dtype=dtype)
    function = functools.partial(call, gate, form, "mix")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    plain = with_gradients(function, tensors)

    def autocast(function):
        def run(*tensors):
            with torch.autocast(device.type, torch.bfloat16):
                return function(*tensors)

        return run

    got = with_gradients(autocast(function), tensors)
    assert all(same_bits(a, b) for a, b in zip(got, plain, strict=True))
    if dtype == torch.float32:
        torch._dynamo.reset()
        # By default torch traces the whole backward under the autocast around the compiled call,
        # also for ops inside autocast(enabled=False): even plain aten then runs it in bfloat16.
        with torch._functorch.config.patch(backward_pass_autocast="off"):
            got = with_gradients(autocast(compiled), tensors)
        assert_all_close(got, plain, tolerance=1e-5)


# ---- modules ----


@pytest.mark.parametrize("gate", MODULE_GATES)
def test_copied_pickled_and_reloaded_modules_have_the_same_bits(gate):
    model = Gated(gate)
    for p in model.parameters():
        nn.init.normal_(p)
    images = torch.randn(B, N, D)
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    loaded = Gated(gate)
    loaded.load_state_dict(torch.load(stored, weights_only=True))
    wanted = step(model, model, images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert all(same_bits(a, b) for a, b in zip(step(other, other, images), wanted, strict=True))
        assert not {p.data_ptr() for p in model.parameters()} & {
            p.data_ptr() for p in other.parameters()
        }


@pytest.mark.parametrize("gate", GATES)
def test_inference_mode_gives_the_same_bits(device, gate):
    tensors = draw(gate, device=device)
    wanted = {form: call(gate, form, "mix", *tensors) for form in ("new", "in place")}
    with torch.inference_mode():
        for form, out in wanted.items():
            assert same_bits(call(gate, form, "mix", *tensors), out)
        h, x, _, *of_gate = (None if t is None else t.clone() for t in tensors)
    out = function_of(gate, "new")(h, x, *of_gate, 1, P)  # normal tensor from inference ones
    assert same_bits(out, function_of(gate, "new")(*(t.clone() for t in (h, x, *of_gate)), 1, P))
    with pytest.raises(RuntimeError, match="inference"):
        function_of(gate, "in place")(h, x, *of_gate, 1, P)


@pytest.mark.parametrize("gate", GATES)
def test_four_threads_have_the_same_bits(gate):
    cases = [
        Case(4, 40, 24, 1, 30, gate=gate, inplace=inplace, rule=rule)
        for inplace in (False, True)
        for rule in RULES
    ]
    wanted = [run_op(case).tensors for case in cases]
    results, start = {}, threading.Barrier(4)

    def work(index):
        start.wait()
        turn = cases[index:] + cases[:index]
        for _ in range(3):
            results[index] = [run_op(case).tensors for case in turn]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        for got, expected in zip(results[index], wanted[index:] + wanted[:index], strict=True):
            assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("gate", "form"), [("scalar", "new"), ("linear", "carrier"), ("linear-token", "in place")]
)
def test_compiled_autograd_gives_the_same_gradients(gate, form):
    from torch._dynamo import compiled_autograd

    torch._dynamo.reset()
    tensors = draw(gate, form)
    results = []
    for enabled in (False, True):
        leaves = [t if t is None else t.clone().requires_grad_() for t in tensors]
        out = call(gate, form, "mix", *leaves)
        kept = []
        out.register_hook(kept.append)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        with (
            compiled_autograd._enable(torch.compile(backend="aot_eager"))
            if enabled
            else contextlib.nullcontext()
        ):
            (out * weight).sum().backward()
        grads = [t.grad for t in leaves if t is not None and t.grad is not None]
        results.append([*grads, kept[0]])
    assert_all_close(*results)


# ---- CUDA graphs and streams ----


@pytest.mark.cuda
@pytest.mark.parametrize("gate", GATES)
def test_cuda_graph_replay_equals_eager(gate):
    cuda = torch.device("cuda")
    case = Case(16, 60, 384, 1, 50, dtype=torch.bfloat16, gate=gate, device=cuda)
    h, x, *of_gate, grad = case.inputs()
    of_gate = [t.requires_grad_() for t in of_gate]

    def step():
        out = function_of(gate, "in place")(h * 1, x, *of_gate, 1, 50, "mix")
        return out, *torch.autograd.grad(out, of_gate, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(100):
        h.normal_()
        graph.replay()
        wanted = step()
        for a, b in zip(captured, wanted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.cuda
def test_any_number_of_captures_replay_as_eager():
    """More captures than workspaces are allocated outside of captures (csrc/bindings_cuda.cpp)."""
    h, x, logit, grad = Case(4, 20, 64, 1, 10, device=torch.device("cuda")).inputs()
    logit.requires_grad_()

    def step():
        out = gp.prompt_gate_(h * 1, x, logit, 1, 10, "mix")
        return torch.autograd.grad(out, logit, grad)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        wanted = step()
    torch.cuda.synchronize()
    graphs, captured = [torch.cuda.CUDAGraph() for _ in range(100)], []
    for graph in graphs:
        with torch.cuda.graph(graph):
            captured.append(step())
    for _ in range(2):
        for graph, gradient in zip(graphs, captured, strict=True):
            graph.replay()
            assert torch.equal(gradient, wanted)


@pytest.mark.cuda
@pytest.mark.parametrize("gate", GATES)
def test_side_stream_follows_its_own_order(gate):
    h, x, *of_gate, _ = Case(8, 60, 384, 1, 50, gate=gate, device=torch.device("cuda")).inputs()
    wanted = function_of(gate, "new")(2 * h, x, *of_gate, 1, 50)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        got = function_of(gate, "in place")(2 * h, x, *of_gate, 1, 50)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("gate", GATES)
def test_backward_on_two_streams_at_once(gate, device):
    """On the CPU, without streams, this only checks that both sides make the same call."""
    is_cuda = device.type == "cuda"
    cases = [Case(64, 60, 768, 1, 50, logit=z, gate=gate, device=device) for z in (-1.0, 1.0)]
    wanted = [run_op(case).grads for case in cases]
    inputs = [case.inputs() for case in cases]  # before the loop: takes longer than backward
    streams = [torch.cuda.Stream() if is_cuda else None for _ in cases]
    for _ in range(20 if is_cuda else 1):
        got = []
        for (*tensors, grad), stream in zip(inputs, streams, strict=True):
            if is_cuda:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                leaves = [t.detach().requires_grad_() for t in tensors]
                out = function_of(gate, "new")(*leaves, 1, 50, cases[0].rule)
                got.append(torch.autograd.grad(out, leaves, grad))
        if is_cuda:
            torch.cuda.synchronize()
        for a, b in zip(got, wanted, strict=True):
            assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
