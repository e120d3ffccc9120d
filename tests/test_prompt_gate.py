# SPDX-License-Identifier: Apache-2.0
"""Laws of the op: values and gradients against float64, what it may touch, how it composes."""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import DTYPES, LAYOUTS, RULES, WRITABLE, Case, magnitudes, run_op, run_reference
from conftest import assert_within_rule

import gated_prompt as gp
from gated_prompt import functional, ops, reference

SIZES = (  # batch, num_tokens, dim, start, length
    (2, 7, 12, 1, 3),
    (3, 9, 64, -4, 4),  # at the end
    (1, 1, 1, 0, 1),
    (2, 5, 7, 0, 5),  # P = N, odd D
    (2, 6, 33, 5, 1),  # the last token
    (5, 60, 768, 1, 50),  # more than one chunk of rows
)


def check_against_reference(case):
    got, exact, eager = run_op(case), run_reference(case), run_reference(case, dtype="own")
    out_terms, grad_terms = magnitudes(case)
    assert_within_rule("out", got.out, exact.out, eager.out, out_terms, backward=False)
    outside = torch.ones(case.num_tokens, dtype=torch.bool)
    outside[case.rows] = False
    h, _, _, grad = case.inputs()
    assert torch.equal(got.out[:, outside], h[:, outside]), "rows outside the slice changed"
    names = ("grad of block_out", "grad of block_in", "grad of gate_logit")
    coarsest = max((case.dtype, case.in_dtype or case.dtype), key=lambda t: torch.finfo(t).eps)
    for index, name in enumerate(names):
        reduced = index == 2 or (index == 1 and case.in_form == "shared")
        assert_within_rule(
            name, got.grads[index], exact.grads[index], eager.grads[index], grad_terms[index],
            backward=True, reduced=reduced, dtype=coarsest,
        )  # fmt: skip
    if case.grad_layout == "contiguous":
        assert torch.equal(got.grads[0][:, outside], grad[:, outside])
    if case.in_form == "sequence":
        assert not got.grads[1][:, outside].any()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_gradients_equal_the_reference(device, dtype, rule, size, inplace):
    batch, num_tokens, dim, start, length = size
    check_against_reference(
        Case(batch, num_tokens, dim, start, length, rule, dtype, inplace=inplace, device=device)
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["layout", "in_layout", "grad_layout"])
def test_any_layout_gives_the_same(device, which, layout, dtype, rule):
    if which == "layout" and layout not in WRITABLE:
        pytest.skip("an expanded block_out is refused in place; see test_bad_inputs")
    for inplace, dim in itertools.product((False, True), (8, 13)):
        case = Case(dim=dim, rule=rule, dtype=dtype, inplace=inplace, device=device)
        setattr(case, which, layout)
        check_against_reference(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", WRITABLE)
def test_vector_and_scalar_paths_give_the_same_bits(device, layout, dtype):
    def bits(outcome):
        return [outcome.out, *outcome.grads]

    plain = run_op(Case(3, 20, 40, 2, 9, dtype=dtype, inplace=True, device=device))
    other = run_op(
        Case(3, 20, 40, 2, 9, dtype=dtype, inplace=True, device=device,
             layout=layout, in_layout=layout, grad_layout=layout)
    )  # fmt: skip
    for a, b in zip(bits(plain)[:3], bits(other)[:3], strict=True):
        assert torch.equal(a, b)
    # the CUDA launch, and so the order of the sum, depends on the pack size
    if device.type == "cpu":
        assert torch.equal(plain.grads[2], other.grads[2])


@pytest.mark.parametrize("in_form", ["sequence", "rows", "shared"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_in_may_be_the_prompt_rows_alone(device, dtype, rule, in_form):
    check_against_reference(Case(in_form=in_form, rule=rule, dtype=dtype, device=device))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("dtype", "in_dtype"), [p for p in itertools.product(DTYPES, DTYPES) if p[0] != p[1]]
)
def test_dtypes_of_block_out_and_block_in_may_differ(device, dtype, in_dtype, rule):
    check_against_reference(Case(dtype=dtype, in_dtype=in_dtype, rule=rule, device=device))


@pytest.mark.parametrize("gate_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_dtype_is_free(device, dtype, gate_dtype):
    outcome = run_op(Case(dtype=dtype, gate_dtype=gate_dtype, device=device))
    assert outcome.out.dtype == dtype
    assert outcome.grads[2].dtype == gate_dtype
    if gate_dtype == torch.float32:
        check_against_reference(Case(dtype=dtype, gate_dtype=gate_dtype, device=device))


@pytest.mark.parametrize("logit", [-1e4, -88.0, -10.0, -5.0, 0.0, 10.0, 88.0, 1e4])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_gates(device, dtype, rule, logit):
    check_against_reference(Case(logit=logit, rule=rule, dtype=dtype, device=device))
    if abs(logit) == 1e4:
        assert run_op(Case(logit=logit, rule=rule, dtype=dtype, device=device)).grads[2] == 0


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("batch", "num_tokens", "dim", "start", "length"),
    [
        (2, 5, 4, 2, 0),
        (2, 5, 4, 5, 0),
        (2, 5, 4, -5, 0),
        (0, 5, 4, 1, 2),
        (2, 0, 4, 0, 0),
        (2, 5, 0, 1, 2),
    ],
)
def test_empty_slices_and_tensors(device, batch, num_tokens, dim, start, length, inplace):
    case = Case(batch, num_tokens, dim, start, length, inplace=inplace, device=device)
    h, _, _, grad = case.inputs()
    got = run_op(case)
    assert torch.equal(got.out, h)
    assert torch.equal(got.grads[0], grad)
    assert not got.grads[1].any()
    assert got.grads[2] == 0


def test_negative_start_counts_from_the_end(device):
    a = run_op(Case(start=-3, length=2, device=device))
    b = run_op(Case(start=4, length=2, device=device))
    assert torch.equal(a.out, b.out)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_only_wanted_gradients_are_computed(device, needs, monkeypatch):
    sizes = []
    bwd = torch.ops.gated_prompt.prompt_gate_bwd_

    def spy(*args):
        result = bwd(*args)
        sizes.append([t.numel() for t in result])
        return result

    case = Case(device=device, in_form="rows")
    wanted = run_op(case).grads
    monkeypatch.setattr(torch.ops.gated_prompt, "prompt_gate_bwd_", spy)
    outcome = run_op(case, needs)
    for need, got, want in zip(needs, outcome.grads, wanted, strict=True):
        assert (got is not None) == need
        assert not need or torch.equal(got, want)
    if any(needs):
        rows = case.batch * case.length * case.dim
        assert sizes == [[rows if needs[1] else 0, 1 if needs[2] else 0]]


@pytest.mark.parametrize("needs", [(True, True, False), (True, True, True)])
def test_saved_bytes_are_one_slice(device, needs):
    case = Case(device=device, inplace=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        h, x, logit, _ = case.inputs()
        block_out = h.requires_grad_(needs[0]) + 0
        gp.prompt_gate_(
            block_out,
            x.requires_grad_(needs[1]),
            logit.requires_grad_(needs[2]),
            case.start,
            case.length,
        )
    slice_bytes = case.batch * case.length * case.dim * 4
    assert sum(t.nbytes for t in saved) == (slice_bytes if needs[2] else 0) + 4


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_gradcheck(device, rule, inplace):
    def function(h, x, logit):
        if inplace:
            return gp.prompt_gate_(h * 1, x, logit, 1, 3, rule)
        return gp.prompt_gate(h, x, logit, 1, 3, rule)

    h, x, logit, _ = Case(dtype=torch.float64, gate_dtype=torch.float64, device=device).inputs()
    inputs = [t.requires_grad_() for t in (h, x, logit)]
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-4, nondet_tol=0)


@pytest.mark.parametrize("power", [1, 2])  # with 1 the incoming gradient is a constant
def test_double_backward_says_that_it_is_not_there(device, power):
    leaves = [t.requires_grad_() for t in Case(device=device).inputs()[:3]]
    total = gp.prompt_gate(*leaves, 1, 3).pow(power).sum()
    for grad in torch.autograd.grad(total, leaves, create_graph=True):
        with pytest.raises(
            RuntimeError, match=r"no second derivative; use gated_prompt\.reference"
        ):
            (grad.sum() + leaves[2]).backward(retain_graph=True)


@pytest.mark.parametrize("rule", RULES)
def test_two_runs_give_the_same_bits(device, rule):
    case = Case(8, 60, 384, 1, 50, rule, torch.bfloat16, inplace=True, device=device)
    first = run_op(case)
    for _ in range(20):
        again = run_op(case)
        for a, b in zip([first.out, *first.grads], [again.out, *again.grads], strict=True):
            assert torch.equal(a, b)


def test_any_number_of_threads_gives_the_same_bits():
    case = Case(8, 60, 384, 1, 50, inplace=True)
    threads = torch.get_num_threads()
    try:
        outcomes = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            outcomes.append(run_op(case))
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        assert torch.equal(outcomes[0].out, other.out)
        for a, b in zip(outcomes[0].grads, other.grads, strict=True):
            assert torch.equal(a, b)


def test_inf_and_nan_are_where_eager_has_them(device):
    inf, nan = float("inf"), float("nan")
    specials = torch.tensor([0.0, -0.0, 1.0, 1e-42, inf, -inf, nan], device=device)
    h, x = torch.meshgrid(specials, specials, indexing="ij")
    h, x = h.reshape(1, 1, -1), x.reshape(1, 1, -1)
    for rule, value in itertools.product(RULES, (-1e4, -1.0, 0.0, 20.0, 1e4)):
        logit = torch.tensor(value, device=device)
        got = gp.prompt_gate(h, x, logit, 0, 1, rule)
        torch.testing.assert_close(
            got,
            reference.prompt_gate(h, x, logit, 0, 1, rule),
            equal_nan=True,
            rtol=1e-6,
            atol=1e-44,
        )


# ---- in place ----


def test_in_place_under_no_grad_and_inference_mode(device):
    h, x, logit, _ = Case(device=device).inputs()
    wanted = gp.prompt_gate(h, x, logit, 1, 3)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            copy = h.clone()
            assert gp.prompt_gate_(copy, x, logit, 1, 3) is copy
        assert torch.equal(copy, wanted)


def test_in_place_on_what_a_vit_block_returns(device):
    """block_out = x + change: gradients reach the block and, through the skip, its input."""
    case = Case(dtype=torch.float64, gate_dtype=torch.float64, device=device)
    _, x, logit, grad = case.inputs()
    weight = torch.randn(case.dim, case.dim, dtype=torch.float64, device=device)
    results = []
    for gate in (gp.prompt_gate_, gp.prompt_gate, reference.prompt_gate):
        leaves = [t.clone().requires_grad_() for t in (x, weight, logit)]
        out = gate(leaves[0] + leaves[0] @ leaves[1], leaves[0], leaves[2], 1, 3)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for got in results[:2]:
        for a, b in zip(got, results[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_in_place_over_a_saved_tensor_gets_torchs_error(device):
    h, x, logit, _ = Case(device=device).inputs()
    out = gp.prompt_gate_(h.requires_grad_().relu(), x, logit, 1, 3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_in_place_on_a_view_reaches_its_base(device):
    h, x, logit, grad = Case(dtype=torch.float64, device=device).inputs()
    results = []
    for gate in (gp.prompt_gate_, reference.prompt_gate):
        leaf = torch.stack([h, 2 * h]).requires_grad_()
        base = leaf * 1
        out = gate(base[1], x, logit, 1, 3)
        results.append(torch.autograd.grad(out, leaf, grad)[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_block_in_may_be_block_out_itself(device):
    h, _, logit, _ = Case(device=device).inputs()
    copy = h.clone()
    gp.prompt_gate_(copy, copy, logit, 1, 3, "residual")
    wanted = gp.prompt_gate(h, h, logit, 1, 3, "residual")
    assert torch.equal(copy, wanted)


def test_interleaved_sequences_of_one_buffer_are_not_an_overlap(device):
    h, x, logit, _ = Case(device=device).inputs()
    buffer = torch.stack([h, x], dim=2)  # [B, N, 2, D]: rows of h and x alternate
    block_out, block_in = buffer.unbind(2)
    gp.prompt_gate_(block_out, block_in, logit, 1, 3)
    assert torch.equal(block_out, gp.prompt_gate(h, x, logit, 1, 3))
    assert torch.equal(block_in, x)


# ---- other gates, traced forms ----


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [(1,), (1, 1, 1), (12,), (3, 1), (2, 1, 1), (3, 12), (2, 3, 12)])
@pytest.mark.parametrize("rule", RULES)
def test_any_gate_that_broadcasts(device, rule, shape, inplace):
    h, x, _, grad = Case(dtype=torch.float64, device=device).inputs()
    logit = torch.randn(shape, dtype=torch.float64, device=device)
    results = []
    for gate in (gp.prompt_gate_ if inplace else gp.prompt_gate, reference.prompt_gate):
        leaves = [t.clone().requires_grad_() for t in (h, x, logit)]
        out = gate(leaves[0] * 1, leaves[1], leaves[2], 1, 3, rule)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_compiled_equals_eager(device, rule, inplace):
    def function(h, x, logit):
        if inplace:
            return gp.prompt_gate_(h * 1, x, logit, 1, 3, rule)
        return gp.prompt_gate(h * 1, x, logit, 1, 3, rule)

    h, x, logit, grad = Case(device=device).inputs()
    results = []
    for call in (torch.compile(function, fullgraph=True), function):
        leaves = [t.clone().requires_grad_() for t in (h, x, logit)]
        out = call(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("shape", [(), (12,), (2, 1, 1)])
@pytest.mark.parametrize("rule", RULES)
def test_compiled_in_place_on_a_graph_input_keeps_its_gradients(device, rule, shape):
    """Inductor recomputes a plain clone from the new values: the gate gradient was 60 % off."""
    h, x, _, grad = Case(device=device).inputs()
    logit = torch.randn(shape, device=device)
    results = []
    for gate in (torch.compile(gp.prompt_gate_, fullgraph=True), reference.prompt_gate):
        leaves = [t.clone().requires_grad_() for t in (h, x, logit)]
        out = gate(leaves[0] + 0, leaves[1], leaves[2], 1, 3, rule)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compiled_in_place_keeps_block_in_for_backward(device):
    """block_in is overwritten after the gate: its products must keep the values of before."""

    def function(h, x, logit):
        out = gp.prompt_gate_(h, x, logit, 1, 3)
        return out + gp.prompt_gate_(x, h.sin(), logit, 1, 3)

    h, x, logit, grad = Case(device=device).inputs()
    results = []
    for call in (torch.compile(function, fullgraph=True), function):
        leaves = [t.clone().requires_grad_() for t in (h, x, logit)]
        out = call(leaves[0] * 1, leaves[1] * 1, leaves[2])
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compiled_in_place_after_a_clone_leaves_the_original(device):
    """pytorch#198031: a mutating op on a clone must not reach the tensor that was cloned."""

    def function(h, x, logit):
        copy = h.clone()
        return gp.prompt_gate_(copy, x, logit, 1, 3), h + 0

    h, x, logit, _ = Case(device=device).inputs()
    wanted, before = gp.prompt_gate(h, x, logit, 1, 3), h.clone()
    got, original = torch.compile(function, fullgraph=True)(h, x, logit)
    torch.testing.assert_close(got, wanted)
    assert torch.equal(original, before)
    assert torch.equal(h, before)


@pytest.mark.parametrize("rule", RULES)
def test_compiled_once_for_many_sizes(device, rule):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    call = torch.compile(
        lambda h, x, logit: gp.prompt_gate(h, x, logit, 1, 3, rule), fullgraph=True, backend=counter
    )
    for num_tokens in range(6, 16):
        h, x, logit, _ = Case(num_tokens=num_tokens, device=device).inputs()
        torch.testing.assert_close(call(h, x, logit), gp.prompt_gate(h, x, logit, 1, 3, rule))
    assert counter.frame_count <= 2


def test_function_transforms_run_the_traced_form(device):
    h, x, logit, _ = Case(dtype=torch.float64, gate_dtype=torch.float64, device=device).inputs()

    def total(h, x, logit):
        return gp.prompt_gate(h, x, logit, 1, 3).square().sum()

    leaves = [t.clone().requires_grad_() for t in (h, x, logit)]
    wanted = torch.autograd.grad(total(*leaves), leaves)
    for a, b in zip(torch.func.grad(total, argnums=(0, 1, 2))(h, x, logit), wanted, strict=True):
        torch.testing.assert_close(a, b)
    tangents = [torch.randn_like(t) for t in (h, x, logit)]
    _, slope = torch.func.jvp(total, (h, x, logit), tuple(tangents))
    expected = sum((w * t).sum() for w, t in zip(wanted, tangents, strict=True))
    torch.testing.assert_close(slope, expected)
    gates = torch.linspace(-2, 2, 4, dtype=torch.float64, device=device)
    batched = torch.vmap(lambda z: gp.prompt_gate(h, x, z, 1, 3))(gates)
    for one, z in zip(batched, gates, strict=True):
        torch.testing.assert_close(one, gp.prompt_gate(h, x, z, 1, 3))


def test_forward_mode_and_compiled_transforms_keep_the_tangent(device):
    h, x, logit, _ = Case(dtype=torch.float64, gate_dtype=torch.float64, device=device).inputs()
    tangent = torch.randn_like(h)

    def derivative(gate, h):
        return torch.func.jvp(lambda h: gate(h * 1, x, logit, 1, 3), (h,), (tangent,))[1]

    wanted = derivative(reference.prompt_gate, h)
    for gate in (gp.prompt_gate, gp.prompt_gate_):
        torch.testing.assert_close(derivative(gate, h), wanted)
        compiled = torch.compile(lambda h, gate=gate: derivative(gate, h), backend="eager")
        torch.testing.assert_close(compiled(h), wanted)
        with forward_ad.dual_level():
            out = gate(forward_ad.make_dual(h, tangent) * 1, x, logit, 1, 3)
            torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, wanted)
    gates = torch.linspace(-2, 2, 4, dtype=torch.float64, device=device)
    mapped = torch.vmap(lambda z: gp.prompt_gate_(h * z.exp(), x, z, 1, 3))
    torch.testing.assert_close(torch.compile(mapped, backend="eager")(gates), mapped(gates))


@pytest.mark.parametrize("gate", [gp.prompt_gate, gp.prompt_gate_])
def test_batched_incoming_gradients(device, gate):
    leaves = [
        t.requires_grad_()
        for t in Case(dtype=torch.float64, gate_dtype=torch.float64, device=device).inputs()[:3]
    ]
    grads = torch.randn(5, *leaves[0].shape, dtype=torch.float64, device=device)
    for rule in RULES:
        out = gate(leaves[0] * 1, leaves[1], leaves[2], 1, 3, rule)
        batched = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
        for index, grad in enumerate(grads):
            single = torch.autograd.grad(out, leaves, grad, retain_graph=True)
            for a, b in zip(batched, single, strict=True):
                torch.testing.assert_close(a[index], b)


def test_tensor_subclasses_run_the_traced_form(monkeypatch):
    class Subclass(torch.Tensor):
        pass

    def kernels(*args):
        raise AssertionError("a subclass may look at the ops; it must not be handed to the kernels")

    monkeypatch.setattr(ops.PromptGateFunction, "apply", kernels)
    h, x, logit, _ = Case().inputs()
    for gate in (gp.prompt_gate, gp.prompt_gate_):
        got = gate(h.clone().as_subclass(Subclass), x, logit, 1, 3)
        assert type(got) is Subclass
        torch.testing.assert_close(
            got.as_subclass(torch.Tensor), reference.prompt_gate(h, x, logit, 1, 3)
        )


def test_float16_differences_beyond_its_range_keep_the_gate_gradient(device):
    h = torch.full((1, 1, 2), 4e4, dtype=torch.float16, device=device)
    logit = torch.tensor(5.0, device=device, requires_grad=True)
    grad = torch.tensor([[[1e-3, 0.0]]], dtype=torch.float16, device=device)
    out = gp.prompt_gate(h, -h, logit, 0, 1)
    (got,) = torch.autograd.grad(out, logit, grad)
    exact = logit.detach().double().requires_grad_()
    wanted = reference.prompt_gate(h.double(), -h.double(), exact, 0, 1)
    (wanted,) = torch.autograd.grad(wanted, exact, grad.double())
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=0)


def test_bfloat16_block_in_is_not_squeezed_into_float16(device):
    h = torch.zeros(1, 1, 4, dtype=torch.float16, device=device)
    x = torch.full((1, 1, 4), 2.0**17, dtype=torch.bfloat16, device=device)
    assert (gp.prompt_gate(h, x, torch.tensor(2.0, device=device), 0, 1) < 2.0**14).all()


def test_nothing_is_saved_for_evaluation(device, monkeypatch):
    sizes = []
    fwd = torch.ops.gated_prompt.prompt_gate_fwd_

    def spy(*args):
        saved = fwd(*args)
        sizes.append(saved.numel())
        return saved

    monkeypatch.setattr(torch.ops.gated_prompt, "prompt_gate_fwd_", spy)
    h, x, logit, _ = Case(device=device).inputs()
    logit.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            gp.prompt_gate_(h.clone(), x, logit, 1, 3)
    assert sizes == [0, 0]


def test_gate_changed_before_backward_raises(device):
    h, x, logit, grad = Case(device=device).inputs()
    logit.requires_grad_()
    out = gp.prompt_gate(h, x, logit, 1, 3)
    with torch.no_grad():
        logit.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(grad)


def test_positions_beyond_2_31_elements():
    """By strides alone: of 8.6 GB of address space a few pages are touched."""
    far = 2**31 + 64
    block_out = torch.empty(far + 64, dtype=torch.bfloat16).as_strided((2, 4, 8), (far, 8, 1))
    block_in = torch.empty(far + 64, dtype=torch.bfloat16).as_strided((2, 4, 8), (far, 8, 1))
    h, x = torch.randn(2, 2, 4, 8).bfloat16()
    block_out.copy_(h)
    block_in.copy_(x)
    gp.prompt_gate_(block_out, block_in, torch.tensor(0.3), 1, 2)
    assert torch.equal(block_out, gp.prompt_gate(h, x, torch.tensor(0.3), 1, 2))


def test_meta_tensors_give_the_shape():
    h, x, logit, grad = Case(dtype=torch.bfloat16, device="meta").inputs()
    leaves = [t.requires_grad_() for t in (h, x, logit)]
    out = gp.prompt_gate(*leaves, 1, 3)
    assert out.is_meta
    assert (out.shape, out.dtype) == (h.shape, h.dtype)
    for got, leaf in zip(torch.autograd.grad(out, leaves, grad), leaves, strict=True):
        assert (got.shape, got.dtype) == (leaf.shape, leaf.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_the_raw_ops(device, dtype):
    h, x, logit, grad = Case(dtype=dtype, device=device).inputs()
    rows = x[:, 1:4]
    for mix, save in itertools.product((True, False), repeat=2):
        torch.library.opcheck(
            torch.ops.gated_prompt.prompt_gate_fwd_.default,
            (h.clone(), rows, logit, 1, 3, mix, save),
        )
    saved = rows.contiguous()
    for needs in itertools.product((True, False), repeat=3):
        torch.library.opcheck(
            torch.ops.gated_prompt.prompt_gate_bwd_.default,
            (grad.clone(), saved, logit, 1, 3, True, *needs, dtype),
        )
    if dtype != torch.float64:
        other = torch.float32 if dtype != torch.float32 else torch.bfloat16
        torch.library.opcheck(
            torch.ops.gated_prompt.prompt_gate_bwd_.default,
            (grad.clone(), saved, logit, 1, 3, True, True, True, True, other),
        )
    torch.library.opcheck(torch.ops.gated_prompt.copy_rows.default, (rows,))


def test_autocast_does_not_change_the_result(device):
    h, x, logit, _ = Case(device=device).inputs()
    wanted = gp.prompt_gate(h, x, logit, 1, 3)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = gp.prompt_gate(h, x, logit, 1, 3)
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)


def test_launch_plan_counts_the_bytes_of_the_slice():
    plan = ops.launch_plan(batch=64, num_tokens=247, dim=768, length=50, dtype="bfloat16")
    assert plan["bytes_moved"] == 4 * 64 * 50 * 768 * 2
    assert plan["vector_width"] == 8
    assert plan["grid"] == (10, 64)  # 4800 packs of 8 elements, 512 to a block
    with pytest.raises(ValueError, match="int8"):
        ops.launch_plan(batch=1, num_tokens=1, dim=1, length=1, dtype="int8")


@pytest.mark.cuda
def test_cuda_graph_replay_equals_eager():
    cuda = torch.device("cuda")
    case = Case(16, 60, 384, 1, 50, dtype=torch.bfloat16, inplace=True, device=cuda)
    h, x, logit, grad = case.inputs()
    logit.requires_grad_()

    def step():
        block_out = h * 1
        out = gp.prompt_gate_(block_out, x, logit, 1, 50)
        return out, torch.autograd.grad(out, logit, grad)[0]

    side = torch.cuda.Stream()
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
def test_side_stream_follows_its_own_order():
    h, x, logit, _ = Case(8, 60, 384, 1, 50, device=torch.device("cuda")).inputs()
    wanted = gp.prompt_gate(2 * h, x, logit, 1, 50)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        got = gp.prompt_gate_(2 * h, x, logit, 1, 50)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, wanted)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("batch", "num_tokens", "dim", "length"),
    [
        (5000, 5, 64, 3),
        (3, 4100, 4096, 4000),
        (2100, 3, 7, 2),
    ],  # samples, then packs, beyond the grid
)
def test_backward_on_cuda_beyond_its_grid(batch, num_tokens, dim, length):
    """More samples, or more packs of a sample, than the blocks that may hold a partial sum."""
    check_against_reference(Case(batch, num_tokens, dim, 1, length, device="cuda", inplace=True))


@pytest.mark.cuda
def test_backward_on_two_streams_at_once():
    cases = [Case(64, 60, 768, 1, 50, logit=z, device="cuda") for z in (-1.0, 1.0)]
    wanted = [run_op(case).grads for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(20):
        got = []
        for case, stream in zip(cases, streams, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                leaves = [t.requires_grad_() for t in case.inputs()[:3]]
                out = gp.prompt_gate(*leaves, 1, 50)
                got.append(torch.autograd.grad(out, leaves, case.inputs()[3]))
        torch.cuda.synchronize()
        for a, b in zip(got, wanted, strict=True):
            assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(2, 1_400_000, 1024), (70_000, 3, 8)])
def test_large_tensors_and_batches_on_cuda(shape):
    """More than 2^31 elements, and more samples than gridDim.y holds."""
    batch, num_tokens, dim = shape
    h = torch.ones(shape, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros(batch, 2, dim, dtype=torch.bfloat16, device="cuda")
    gp.prompt_gate_(h, x, torch.zeros((), device="cuda"), num_tokens - 2, 2)
    assert (h[:, -2:] == 0.5).all()
    assert (h[:, -3] == 1).all()


def test_dtype_tables_agree():
    assert functional.DTYPES == DTYPES
