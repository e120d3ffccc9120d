# SPDX-License-Identifier: Apache-2.0
"""Laws of the op: values and gradients against float64, which memory it writes, composition."""

import inspect
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DIMENSIONS,
    DTYPES,
    EMPTY_SIZES,
    GATES,
    IN_FORMS,
    LAYOUTS,
    LINEAR_GATES,
    RULES,
    SIZES,
    WRITABLE,
    Case,
    all_pairs,
    case_of,
    check_against_reference,
    run_op,
    same_bits,
)

import gated_prompt as gp
from gated_prompt import autograd, checks, ops, reference

pytestmark = pytest.mark.usefixtures("one_thread")

NARROW = (torch.float32, torch.bfloat16, torch.float16)
MATRIX = all_pairs()
WITHOUT_GEMM = [gate for gate in GATES if gate != "linear"]


def op_of(case, module=gp):
    return getattr(module, case.op_name + ("_" if case.inplace and module is gp else ""))


def leaves_of(case):
    """Returns ([h, x and the gate's tensors, which require grad], the incoming gradient)."""
    *tensors, grad = case.inputs()
    return [t.requires_grad_() for t in tensors if t is not None], grad


def assert_close_by_float64(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


# ---- values and gradients ----


@pytest.mark.parametrize("choice", MATRIX, ids=range(len(MATRIX)))
def test_pairwise_matrix_equals_the_reference(device, choice):
    case = case_of(choice)
    case.device = device
    check_against_reference(case)


def test_pairwise_matrix_has_every_pair():
    for (a, values_a), (b, values_b) in itertools.combinations(DIMENSIONS.items(), 2):
        covered = {(choice[a], choice[b]) for choice in MATRIX}
        assert len(covered) == len(values_a) * len(values_b), (a, b)
    assert 390 <= len(MATRIX) <= 410


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("size", SIZES[:5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
def test_output_and_gradients_equal_the_reference(device, gate, dtype, size, inplace):
    for rule in RULES:
        check_against_reference(Case(*size, rule, dtype, inplace=inplace, device=device, gate=gate))


@pytest.mark.parametrize("dtype", DTYPES[1:3])
@pytest.mark.parametrize("gate", GATES)
def test_more_than_one_task_of_rows_equals_the_reference(device, gate, dtype):
    for size in ((2, 60, 768, 1, 50), (40, 12, 300, 2, 9)):
        check_against_reference(Case(*size, dtype=dtype, inplace=True, device=device, gate=gate))


def one_term_after_the_other(h, weight, bias):
    logit = bias.expand(*h.shape[:-1], -1).clone()
    for d in range(h.shape[-1]):
        logit.addcmul_(h[..., d, None], weight[:, d])
    return logit


def test_rule_allows_another_order_of_a_logits_sum_and_no_more(monkeypatch):
    """On CUDA the op and the eager form run different GEMMs, and eager may be more exact."""
    case = Case(2, 60, 768, 1, 50, gate="linear", inplace=True)
    monkeypatch.setattr(autograd, "linear_logit", one_term_after_the_other)
    check_against_reference(case)
    for wrong in (
        lambda h, weight, bias: F.linear(h, weight, bias) * (1 + 1e-4),
        lambda h, weight, bias: F.linear(h[..., 1:], weight[:, 1:], bias),
        lambda h, weight, bias: F.linear(h, weight.bfloat16().float(), bias),
    ):
        monkeypatch.setattr(autograd, "linear_logit", wrong)
        with pytest.raises(AssertionError, match="out: error"):
            check_against_reference(case)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["layout", "in_layout", "grad_layout", "gate_layout"])
def test_any_layout_gives_the_same(device, which, layout, gate):
    for inplace, dim, dtype in itertools.product((False, True), (8, 13), NARROW[:2]):
        if inplace and which == "layout" and layout not in WRITABLE:
            continue  # raises: see test_bad_inputs
        case = Case(dim=dim, dtype=dtype, inplace=inplace, device=device, gate=gate)
        setattr(case, which, layout)
        check_against_reference(case)


@pytest.mark.parametrize(
    ("form", "inplace"),
    [*itertools.product(IN_FORMS, [True]), *itertools.product(IN_FORMS[:3], [False])],
)
@pytest.mark.parametrize("gate", GATES)
def test_sequences_with_the_batch_in_dimension_1(device, gate, inplace, form):
    """[N, B, D] gives the same output bits as [B, N, D], and the same gradients. The case has more
    samples than tokens, so the wrong dimension would raise no error."""
    for rule in RULES:
        case = Case(9, 6, 8, 1, 3, rule, in_form=form, inplace=inplace, device=device, gate=gate)
        h, x, *others, grad = case.inputs()
        results = []
        for batch_dim in (0, 1):

            def moved(t, batch_dim=batch_dim):
                return t.transpose(0, batch_dim).contiguous() if t.dim() == 3 else t.clone()

            leaves = [moved(h), moved(x), *(t.clone() for t in others)]
            leaves = [t.requires_grad_() for t in leaves]
            arguments = [leaves[0] + 0, *leaves[1:], case.start, case.length, rule]
            extra = {"carrier": leaves[1]} if form == "carrier" else {}
            out = op_of(case)(*arguments, **extra, batch_dim=batch_dim)
            out, carrier = out if form == "carrier" else (out, None)
            assert (out is arguments[0]) == inplace
            loss = (out * moved(grad)).sum()
            if carrier is not None:
                assert carrier.shape == leaves[1].shape
            loss.backward()
            found = [out, *(t.grad for t in leaves[:2])]
            found = [t.transpose(0, batch_dim) if t.dim() == 3 else t for t in found]
            results.append([*found, *(t.grad for t in leaves[2:])])
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
        assert same_bits(*(found[0] for found in results))
    for wrong in (2, -1, None):
        with pytest.raises(ValueError, match=r"prompt_gate\w*: batch_dim must be 0 or 1, got"):
            op_of(case)(h, x, *others, case.start, case.length, rule, batch_dim=wrong)


def bits_that_paths_share(case):
    """Runs the op and returns the results whose bits must not depend on the code path.

    Results of PyTorch's GEMMs are left out. So are, on CUDA, sums over a row or more: their order
    depends on the packs. On CUDA all results are compared with the reference instead.
    """
    outcome = run_op(case)
    out, (h, x, *gate) = outcome.out, outcome.grads
    if case.is_linear:
        h, gate = None, gate[1:]
    if torch.device(case.device).type == "cuda":
        check_against_reference(case)
        gate = gate if case.gate == "full" else []
        if case.gate == "linear-token":  # its logit is a sum
            out = x = None
    return [t for t in (out, h, x, *gate) if t is not None]


def assert_same_bits(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("gate", GATES)
def test_vector_scalar_and_misaligned_paths_give_the_same_bits(device, gate, dtype):
    def case(layout, gate_layout, **changes):
        return Case(
            3, 20, 40, 2, 9, dtype=dtype, inplace=True, device=device, gate=gate,
            layout=layout, in_layout=layout, grad_layout=layout, gate_layout=gate_layout, **changes
        )  # fmt: skip

    wanted = bits_that_paths_share(case("contiguous", "contiguous"))
    for layout in WRITABLE:
        # for a weight in another layout PyTorch may run another GEMM
        gate_layout = "contiguous" if gate == "linear" else layout
        assert_same_bits(bits_that_paths_share(case(layout, gate_layout)), wanted)
    for offset in range(16) if gate != "linear" else ():
        got = bits_that_paths_share(case("contiguous", "contiguous", offset=offset))
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("gate", WITHOUT_GEMM)
def test_odd_sizes_at_odd_addresses_give_the_bits_of_one_channel_at_a_time(device, gate):
    """The vector path, with its remainder, equals the scalar path that strided channels take."""
    for dim, offset in itertools.product((1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33), (0, 1, 2, 4, 8)):
        case = Case(2, 3, dim, 1, 2, device=device, gate=gate, offset=offset, inplace=True)
        got = bits_that_paths_share(case)
        case.layout = case.in_layout = case.grad_layout = "every_second_channel"
        assert_same_bits(got, bits_that_paths_share(case))


@pytest.mark.parametrize("in_form", IN_FORMS)
@pytest.mark.parametrize("gate", GATES)
def test_block_in_may_be_the_prompt_rows_alone(device, gate, in_form):
    for rule, dtype in itertools.product(RULES, DTYPES):
        check_against_reference(
            Case(in_form=in_form, rule=rule, dtype=dtype, device=device, gate=gate, inplace=True)
        )


@pytest.mark.parametrize("in_form", ["sequence", "carrier"])
@pytest.mark.parametrize("gate", GATES)
def test_dtypes_of_block_out_block_in_and_gate_may_differ(device, gate, in_form):
    """A float32 residual stream with bfloat16 blocks, the reverse, and gates of any dtype."""
    for dtype, in_dtype, gate_dtype in itertools.product(DTYPES, repeat=3):
        case = Case(
            dtype=dtype, in_dtype=in_dtype, gate_dtype=gate_dtype, device=device, gate=gate,
            in_form=in_form, inplace=in_form == "carrier",
        )  # fmt: skip
        check_against_reference(case)


@pytest.mark.parametrize("logit", [-1e4, -88.0, -10.0, -5.0, 0.0, 10.0, 88.0, 1e4])
@pytest.mark.parametrize("gate", GATES)
def test_extreme_gates(device, gate, logit):
    for rule, dtype in itertools.product(RULES, DTYPES):
        case = Case(logit=logit, rule=rule, dtype=dtype, device=device, gate=gate)
        check_against_reference(case)
        if abs(logit) == 1e4:
            assert not any(grad.any() for grad in run_op(case).grads[2:])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("size", EMPTY_SIZES)
def test_empty_slices_and_tensors(device, size, gate):
    for inplace, rule in itertools.product((False, True), RULES):
        case = Case(*size, rule, inplace=inplace, device=device, gate=gate)
        h, *_, grad = case.inputs()
        got = run_op(case)
        assert same_bits(got.out, h)
        assert same_bits(got.grads[0], grad)
        assert not any(grad.any() for grad in got.grads[1:])


def test_negative_start_counts_from_the_end(device):
    a = run_op(Case(start=-3, length=2, device=device))
    b = run_op(Case(start=4, length=2, device=device))
    assert torch.equal(a.out, b.out)


def test_a_gate_of_any_other_shape_that_broadcasts(device):
    h, x, _, grad = Case(dtype=torch.float64, device=device).inputs()
    for shape, rule in itertools.product([(1,), (1, 1), (1, 1, 1), (1, 12), (1, 3, 1)], RULES):
        logit = torch.randn(shape, dtype=torch.float64, device=device)
        results = []
        for gate in (gp.prompt_gate, reference.prompt_gate):
            leaves = [t.clone().requires_grad_() for t in (h, x, logit)]
            out = gate(*leaves, 1, 3, rule)
            results.append([out, *torch.autograd.grad(out, leaves, grad)])
        assert_close_by_float64(*results)


@pytest.mark.parametrize("gate", GATES)
def test_docstring_states_the_formula(gate):
    case = Case(dtype=torch.float64, gate=gate)
    h, x, *gates, _ = case.inputs()
    names = dict(zip(case.names[2:-1], gates, strict=True))
    names |= {"h": h[:, case.rows], "x": x[:, case.rows], "sigmoid": torch.sigmoid}
    doc = inspect.getdoc(op_of(case))
    (of_gate,) = re.findall(r"\bg =\s+(sigmoid\([^)]*\))", doc)
    formulas = dict(re.findall(r"^\s*(\w+): +out = (.*)$", doc, re.MULTILINE))
    assert tuple(formulas) == RULES
    names["g"] = eval(of_gate, {}, names)
    for rule, formula in formulas.items():
        wanted = h.clone()
        wanted[:, case.rows] = eval(formula, {}, names)
        assert_close_by_float64([op_of(case)(h, x, *gates, 1, 3, rule)], [wanted])


# ---- what is computed and saved for backward ----


@pytest.fixture
def bwd_sizes(monkeypatch):
    """Collects the numel of each tensor returned, one list for each call of the raw backward."""
    sizes, bwd = [], ops.prompt_gate_bwd_

    def spy(*args):
        result = bwd(*args)
        sizes.append([t.numel() for t in result])
        return result

    monkeypatch.setattr(autograd, "prompt_gate_bwd_", spy)
    return sizes


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gate", GATES)
def test_only_wanted_gradients_are_computed(device, gate, rule, bwd_sizes):
    """All 8 subsets of h, x, logit, or 16 of h, x, weight, bias; each in place and not."""
    case = Case(rule=rule, gate=gate, device=device, in_form="rows")
    wanted = run_op(case).grads
    for *needs, case.inplace in itertools.product((True, False), repeat=len(wanted) + 1):
        bwd_sizes.clear()
        case.needs = needs
        grads = run_op(case).grads
        assert [grad is not None for grad in grads] == needs
        assert_same_bits(
            [grad for grad in grads if grad is not None],
            [grad for grad, need in zip(wanted, needs, strict=True) if need],
        )
        rows = case.batch * case.length * case.dim
        width = case.dim if gate == "linear" else 1
        if case.is_linear:  # the logit depends on h
            logits = (needs[0] or needs[2]) * case.batch * case.length * width
            biases = needs[3] * width
        else:
            logits, biases = needs[2] * wanted[2].numel(), 0
        assert bwd_sizes == ([[needs[1] * rows, logits, biases]] if any(needs) else [])


@pytest.mark.parametrize("gate", LINEAR_GATES)
def test_a_linear_gate_without_bias(device, gate):
    for rule, inplace, *needs in itertools.product(RULES, *[(True, False)] * 4):
        case = Case(rule=rule, gate=gate, bias=False, inplace=inplace, needs=needs, device=device)
        check_against_reference(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gate", GATES)
def test_saved_bytes_are_one_slice_where_the_gate_learns(device, gate, rule, dtype):
    """Linear gates: the logit, h and, for mix, (h - x) / 2. All gates: the gate tensor, too."""
    case = Case(rule=rule, dtype=dtype, gate=gate, inplace=True, device=device)
    itself = case.inputs()[2].nbytes
    one = case.batch * case.length * case.dim * dtype.itemsize
    for needs in itertools.product((True, False), repeat=4 if case.is_linear else 3):
        case.needs, kept = needs, []

        def keep(tensor, kept=kept):
            kept.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run_op(case)
        h, _, weight, *bias = needs
        if case.is_linear:
            logit = one if gate == "linear" else case.batch * case.length * 4
            slices = (h or weight or bias[0]) + (weight and rule == "mix")
            wanted = logit + slices * one + itself
        else:
            wanted = weight * one + itself
        assert sum(kept) == (wanted if any(needs) else 0), needs


@pytest.mark.parametrize("gate", GATES)
def test_nothing_is_saved_for_evaluation(device, gate, monkeypatch):
    sizes, fwd, linear_token_fwd = [], ops.prompt_gate_fwd_, ops.prompt_gate_linear_token_fwd_

    def count(tensors):
        sizes.extend(t.numel() for t in tensors)
        return tensors

    monkeypatch.setattr(autograd, "prompt_gate_fwd_", lambda *a: count([fwd(*a)])[0])
    monkeypatch.setattr(
        autograd, "prompt_gate_linear_token_fwd_", lambda *a: count(linear_token_fwd(*a))
    )
    case = Case(gate=gate, inplace=True, device=device)
    (h, x, *gates), _ = leaves_of(case)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            op_of(case)(h.clone(), x, *gates, 1, 3)
    assert sizes
    assert not any(sizes)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(device, gate, rule, inplace):
    case = Case(2, 4, 3, 1, 2, rule, torch.float64, gate=gate, inplace=inplace, device=device)
    inputs, _ = leaves_of(case)

    def function(h, *others):
        return op_of(case)(h * 1, *others, 1, 2, rule)

    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-4, nondet_tol=0)


@pytest.mark.parametrize("power", [1, 2])  # with 1 the incoming gradient is a constant
@pytest.mark.parametrize("gate", GATES)
def test_double_backward_says_that_it_is_not_there(device, gate, power):
    case = Case(gate=gate, device=device)
    leaves, _ = leaves_of(case)
    total = op_of(case)(*leaves, 1, 3).pow(power).sum()
    for grad in torch.autograd.grad(total, leaves, create_graph=True):
        with pytest.raises(
            RuntimeError, match=r"no second derivative; use torch.func .* gated_prompt\.reference"
        ):
            (grad.sum() + leaves[2].sum()).backward(retain_graph=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gate", GATES)
def test_two_runs_give_the_same_bits(device, gate, rule):
    case = Case(4, 60, 192, 1, 50, rule, torch.bfloat16, inplace=True, device=device, gate=gate)
    first = run_op(case)
    for _ in range(5):
        assert_same_bits(run_op(case).tensors, first.tensors)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield (1, 2, 3)
    torch.set_num_threads(before)


@pytest.mark.parametrize("gate", WITHOUT_GEMM)
def test_any_number_of_threads_gives_the_same_bits(gate, threads):
    outcomes = []
    for number in threads:
        torch.set_num_threads(number)
        outcomes.append(bits_that_paths_share(Case(8, 60, 384, 1, 50, inplace=True, gate=gate)))
    for other in outcomes[1:]:
        assert_same_bits(other, outcomes[0])


def test_any_number_of_threads_gives_the_same_bits_of_a_bias(threads):
    """The sum over rows for a linear gate's bias, without the GEMMs, which PyTorch computes."""
    grad, saved, logit = torch.randn(3, 8, 50, 384)
    outcomes = []
    for number in threads:
        torch.set_num_threads(number)
        outcomes.append(
            torch.ops.gated_prompt.prompt_gate_bwd_(
                grad.clone(), saved, logit, None, 0, 50, True, True, True, True, True, grad.dtype
            )
        )
    for other in outcomes[1:]:
        assert_same_bits(other, outcomes[0])


def test_inf_and_nan_are_where_eager_has_them(device):
    inf, nan = float("inf"), float("nan")
    specials = torch.tensor([0.0, -0.0, 1.0, 1e-42, inf, -inf, nan], device=device)
    h, x = torch.meshgrid(specials, specials, indexing="ij")
    h, x = h.reshape(1, 1, -1), x.reshape(1, 1, -1)
    logits = (-1e4, -1.0, 0.0, 20.0, 1e4)
    for rule, value, shape in itertools.product(RULES, logits, [(), (49,), (1, 1, 1), (1, 1, 49)]):
        logit = torch.full(shape, value, device=device)
        got = gp.prompt_gate(h, x, logit, 0, 1, rule)
        wanted = reference.prompt_gate(h, x, logit, 0, 1, rule)
        torch.testing.assert_close(got, wanted, equal_nan=True, rtol=1e-6, atol=1e-44)


# ---- in place ----


@pytest.mark.parametrize("gate", GATES)
def test_in_place_under_no_grad_and_inference_mode(device, gate):
    case = Case(device=device, gate=gate, inplace=True)
    h, x, *gates, _ = case.inputs()
    wanted = run_op(Case(device=device, gate=gate, rule="mix")).out
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            copy = h.clone()
            assert op_of(case)(copy, x, *gates, 1, 3, "mix") is copy
        assert same_bits(copy, wanted)


@pytest.mark.parametrize("gate", GATES)
def test_in_place_on_what_a_vit_block_returns(device, gate):
    """block_out = x + change: gradients reach the block and, by the residual path, its input."""
    case = Case(dtype=torch.float64, device=device, gate=gate)
    _, x, *gates, grad = case.inputs()
    weight = torch.randn(case.dim, case.dim, dtype=torch.float64, device=device)
    results = []
    for case.inplace, module in ((True, gp), (False, gp), (False, reference)):
        leaves = [t.clone().requires_grad_() for t in (x, weight, *gates)]
        block_out = leaves[0] + leaves[0] @ leaves[1]
        out = op_of(case, module)(block_out, leaves[0], *leaves[2:], 1, 3)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for got in results[:2]:
        assert_close_by_float64(got, results[2])


def chain(case, start, carriers, views, used):
    """Runs three blocks with a gate after each; returns the sequence and the leaves' gradients.

    used: the outputs that get an incoming gradient: "sequence", "carrier" (the last carrier, or
    without carriers the last prompt rows), or both.
    """
    h, _, *gates, _ = case.inputs()
    block = torch.linspace(-1, 1, case.dim**2, dtype=torch.float64).view(case.dim, case.dim).cos()
    block = block.to(case.device) / 3
    leaves = [t.clone().requires_grad_() for t in (h[:, start:], h[:, : case.length], *gates)]
    tokens, prompts, *gates = leaves
    rows = slice(start, start + case.length)
    x = torch.cat([tokens[:, :start], prompts, tokens[:, start:]], dim=1)
    carrier = prompts
    for _ in range(3):
        block_out = x + (x @ block).sin()
        if views:
            block_out = torch.stack([block_out, block_out])[1]
        arguments = (block_out, x, *gates, start, case.length, case.rule)
        if carriers:
            x, carrier = op_of(case)(*arguments, carrier=carrier)
        else:
            x = op_of(case)(*arguments)
    last = carrier if carriers else x[:, rows]
    grads = [torch.ones_like(x) + x.detach().cos(), torch.ones_like(last) * 2]
    outputs = [out for out, name in ((x, "sequence"), (last, "carrier")) if name in used]
    grads = [g for g, name in zip(grads, ("sequence", "carrier"), strict=True) if name in used]
    return [x.detach(), *torch.autograd.grad(outputs, leaves, grads)]


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gate", GATES)
def test_a_chain_with_carriers_equals_one_without(device, gate, rule, views):
    case = Case(rule=rule, dtype=torch.float64, gate=gate, inplace=True, device=device)
    for used in (("sequence",), ("sequence", "carrier"), ("carrier",)):
        results = [chain(case, 2, carriers, views, used) for carriers in (True, False)]
        assert_close_by_float64(*results)


def test_a_chain_with_carriers_gives_block_in_no_gradient(device):
    h, x, logit, grad = Case(device=device).inputs()
    x.requires_grad_()
    prompts = x.detach()[:, 1:4].clone().requires_grad_()
    out, _ = gp.prompt_gate_(h * 1, x, logit, 1, 3, carrier=prompts)
    of_x, of_prompts = torch.autograd.grad(out, [x, prompts], grad, allow_unused=True)
    assert of_x is None
    assert same_bits(of_prompts, run_op(Case(device=device)).grads[1][:, 1:4])


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)))
def test_a_carrier_goes_on_to_the_next_gate_in_any_dtype(device, dtypes):
    """Blocks in one dtype, prompts in another: the returned carrier fits the next gate."""
    h, x, logit, grad = Case(dtype=dtypes[0], in_dtype=dtypes[1], device=device).inputs()
    prompts = x[:, 1:4].clone().requires_grad_()
    out, carrier = gp.prompt_gate_(h * 1, x, logit, 1, 3, carrier=prompts)
    out, _ = gp.prompt_gate_(out * 2, out, logit, 1, 3, carrier=carrier)
    (got,) = torch.autograd.grad(out, prompts, grad)
    exact = x[:, 1:4].double().requires_grad_()
    wanted = reference.prompt_gate(h.double(), exact, logit.double(), 1, 3)
    wanted = reference.prompt_gate(wanted * 2, wanted, logit.double(), 1, 3)
    (wanted,) = torch.autograd.grad(wanted, exact, grad.double())
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    assert got.dtype == dtypes[1]
    torch.testing.assert_close(got.double(), wanted, rtol=4 * eps, atol=4 * eps)


def test_in_place_over_a_saved_tensor_gets_torchs_error(device):
    h, x, logit, _ = Case(device=device).inputs()
    out = gp.prompt_gate_(h.requires_grad_().relu(), x, logit, 1, 3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("gate", GATES)
def test_in_place_on_a_view_reaches_its_base(device, gate):
    case = Case(dtype=torch.float64, device=device, gate=gate, inplace=True)
    h, x, *gates, grad = case.inputs()
    results = []
    for module in (gp, reference):
        leaf = torch.stack([h, 2 * h]).requires_grad_()
        base = leaf * 1
        out = op_of(case, module)(base[1], x, *gates, 1, 3)
        results.append(torch.autograd.grad(out, leaf, grad))
    assert_close_by_float64(*results)


@pytest.mark.parametrize("gate", GATES)
def test_block_in_may_be_block_out_itself(device, gate):
    case = Case(dtype=torch.float64, device=device, gate=gate, inplace=True)
    h, _, *gates, grad = case.inputs()
    for rule in RULES:
        results = []
        for module in (gp, reference):
            leaves = [t.clone().requires_grad_() for t in (h, *gates)]
            block_out = leaves[0] * 1
            out = op_of(case, module)(block_out, block_out, *leaves[1:], 1, 3, rule)
            results.append([out, *torch.autograd.grad(out, leaves, grad)])
        assert_close_by_float64(*results)


def test_interleaved_sequences_of_one_buffer_are_not_an_overlap(device):
    h, x, logit, _ = Case(device=device).inputs()
    buffer = torch.stack([h, x], dim=2)  # [B, N, 2, D]: rows of h and x alternate
    block_out, block_in = buffer.unbind(2)
    gp.prompt_gate_(block_out, block_in, logit, 1, 3)
    assert torch.equal(block_out, gp.prompt_gate(h, x, logit, 1, 3))
    assert torch.equal(block_in, x)


@pytest.mark.parametrize("gate", GATES)
def test_gate_changed_before_backward_raises(device, gate):
    case = Case(device=device, gate=gate)
    leaves, grad = leaves_of(case)
    out = op_of(case)(*leaves, 1, 3)
    with torch.no_grad():
        leaves[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(grad)


# ---- value ranges, shapes, launch plans ----


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


@pytest.mark.parametrize("gate", ["scalar", "channel", "token", "linear-token"])
def test_positions_beyond_2_31_elements(gate):
    """Large strides suffice: of 8.6 GB of address space only a few pages are touched."""
    far, case = 2**31 + 64, Case(2, 4, 8, 1, 2, dtype=torch.bfloat16, gate=gate, inplace=True)
    h, x, *gates, _ = case.inputs()
    block_out, block_in = (
        torch.empty(far + 64, dtype=torch.bfloat16).as_strided((2, 4, 8), (far, 8, 1)).copy_(t)
        for t in (h, x)
    )
    op_of(case)(block_out, block_in, *gates, 1, 2)
    assert same_bits(block_out, op_of(case)(h.clone(), x, *gates, 1, 2))


@pytest.mark.parametrize("gate", GATES)
def test_meta_tensors_give_the_shape(gate):
    case = Case(dtype=torch.bfloat16, device="meta", gate=gate)
    leaves, grad = leaves_of(case)
    out = op_of(case)(*leaves, 1, 3)
    assert out.is_meta
    assert (out.shape, out.dtype) == (leaves[0].shape, torch.bfloat16)
    for got, leaf in zip(torch.autograd.grad(out, leaves, grad), leaves, strict=True):
        assert (got.shape, got.dtype) == (leaf.shape, leaf.dtype)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_the_raw_ops(device, dtype, gate):
    """Each flag is on once and off once; not all combinations are run."""
    raw = torch.ops.gated_prompt
    case = Case(2, 4, 6, 1, 2, dtype=dtype, gate=gate, device=device)
    h, x, weight, *bias, grad = case.inputs()
    rows, other = x[:, case.rows], torch.float32 if dtype in DTYPES[2:] else dtype
    logit = weight
    if case.is_linear:
        logit = torch.randn(2, 2, len(weight), dtype=other, device=device)
    if gate == "linear-token":
        for mix, b, save in ((True, bias[0], True), (False, None, False)):
            arguments = (h.clone(), rows, weight[0], b, 1, 2, mix, save, save, save)
            torch.library.opcheck(raw.prompt_gate_linear_token_fwd_.default, arguments)
    else:
        for mix, save in ((True, True), (False, False)):
            arguments = (h.clone(), rows, logit, 1, 2, mix, save)
            torch.library.opcheck(raw.prompt_gate_fwd_.default, arguments)
    for mix, needs, in_dtype in (
        (True, (True, True, True), other),
        (False, (False, True, False), dtype),
    ):
        carrier = grad[:, case.rows].clone() if mix else None
        arguments = (grad.clone(), rows.contiguous(), logit, carrier, 1, 2, mix, *needs)
        arguments += (case.is_linear, in_dtype)
        torch.library.opcheck(raw.prompt_gate_bwd_.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_copy_rows(device, dtype):
    rows = Case(dtype=dtype, device=device).inputs()[1][:, 1:4].requires_grad_()
    torch.library.opcheck(torch.ops.gated_prompt.copy_rows.default, (rows,))


@pytest.mark.parametrize(
    ("gate", "backward", "grid", "logits"),
    [
        # 50 rows are one run of 4800 packs of 8 elements, 256 packs per block. Backward sums, so it
        # has few blocks: each takes 3 samples (scalar) or a fourth of one (sample).
        ("scalar", False, (19, 64, 1), 1),
        ("scalar", True, (19, 22, 1), 1),
        ("sample", False, (19, 64, 1), 64),
        ("sample", True, (4, 64, 1), 64),
        # 3200 rows, 8 at a time per block, in 3 strips of 32 packs: 264 blocks in all
        ("channel", False, (88, 1, 3), 768),
        ("full", True, (88, 1, 3), 64 * 50 * 768),
        # 3200 rows, 8 per block; backward of token: 50 prompts, 8 per block
        ("token", False, (400, 1, 1), 50),
        ("token", True, (37, 7, 1), 50),
        ("linear-token", True, (400, 1, 1), 64 * 50),
    ],
)
def test_launch_plan_covers_the_slice_and_counts_its_bytes(gate, backward, grid, logits):
    shape = {"batch": 64, "num_tokens": 247, "dim": 768, "length": 50}
    plan = ops.launch_plan(**shape, dtype="bfloat16", gate=gate, backward=backward)
    assert plan["grid"] == grid
    assert plan["vector_width"] == 8
    item = 2 if gate == "linear-token" else 4
    read_and_written = 2 if backward else 1
    assert plan["bytes_moved"] == 4 * 64 * 50 * 768 * 2 + read_and_written * logits * item


def test_launch_plan_refuses_what_it_does_not_know():
    shape = {"batch": 1, "num_tokens": 1, "dim": 1, "length": 1}
    with pytest.raises(ValueError, match="int8"):
        ops.launch_plan(**shape, dtype="int8")
    with pytest.raises(ValueError, match="pixel"):
        ops.launch_plan(**shape, gate="pixel")


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("batch", "num_tokens", "dim", "length"),
    [
        (5000, 5, 64, 3),
        (2, 1060, 4096, 1050),
        (2100, 3, 7, 2),
    ],  # beyond the grid: samples, packs, samples
)
@pytest.mark.parametrize("gate", ["scalar", "channel", "token", "sample", "full", "linear-token"])
def test_backward_on_cuda_beyond_its_grid(gate, batch, num_tokens, dim, length):
    """More samples, or more packs per sample, than there may be blocks with a partial sum."""
    check_against_reference(
        Case(batch, num_tokens, dim, 1, length, device="cuda", inplace=True, gate=gate)
    )


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(2, 1_400_000, 1024), (70_000, 3, 8)])
def test_large_tensors_and_batches_on_cuda(shape):
    """More than 2^31 elements, and more samples than gridDim.y allows."""
    batch, num_tokens, dim = shape
    h = torch.ones(shape, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros(batch, 2, dim, dtype=torch.bfloat16, device="cuda")
    gp.prompt_gate_(h, x, torch.zeros((), device="cuda"), num_tokens - 2, 2)
    assert (h[:, -2:] == 0.5).all()
    assert (h[:, -3] == 1).all()


def test_dtype_tables_agree():
    assert checks.DTYPES == DTYPES
