# SPDX-License-Identifier: Apache-2.0
"""Test cases for the op: input layouts in guarded buffers, special values, and comparison with the
reference."""

import contextlib
import itertools
import random
from dataclasses import dataclass

import torch
from conftest import assert_within_rule

import gated_prompt as gp
from gated_prompt import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RULES = ("mix", "residual")

# name -> shape of the logit, or of the weight of a linear gate, for [B, P, D]
GATES = {
    "scalar": lambda b, p, d: (),
    "channel": lambda b, p, d: (d,),
    "token": lambda b, p, d: (p, 1),
    "sample": lambda b, p, d: (b, 1, 1),
    "full": lambda b, p, d: (b, p, d),
    "token-channel": lambda b, p, d: (p, d),
    "sample-channel": lambda b, p, d: (b, 1, d),
    "row": lambda b, p, d: (b, p, 1),
    "linear": lambda b, p, d: (d, d),
    "linear-token": lambda b, p, d: (1, d),
}
LINEAR_GATES = ("linear", "linear-token")
LOGIT_GATES = tuple(gate for gate in GATES if gate not in LINEAR_GATES)

# name -> (element strides of [B, N, D], elements before the first one)
LAYOUTS = {
    "contiguous": lambda b, n, d: ((n * d, d, 1), 0),
    "odd_offset": lambda b, n, d: ((n * d, d, 1), 3),
    "row_padded": lambda b, n, d: ((n * (d + 5), d + 5, 1), 0),
    "slice_of_wider": lambda b, n, d: ((2 * n * d + 6, 2 * d, 1), d),
    "transposed": lambda b, n, d: ((d * n, 1, n), 1),
    "sequence_first": lambda b, n, d: ((d, b * d, 1), 0),
    "every_second_channel": lambda b, n, d: ((2 * n * d, 2 * d, 2), 0),
    "expanded": lambda b, n, d: ((0, d, 1), 2),  # for read-only tensors
}
WRITABLE = tuple(name for name in LAYOUTS if name != "expanded")

# "sequence" [B, N, D], "rows" [B, P, D], "shared" [P, D]; "carrier" (in place only): rows that are
# passed as the carrier too, so that their gradient, and half of the incoming one, goes through it
IN_FORMS = ("sequence", "rows", "shared", "carrier")
VALUES = ("normal", "zeros", "denormal", "large", "saturated", "nonfinite")

SIZES = (  # batch, num_tokens, dim, start, length
    (2, 7, 12, 1, 3),
    (3, 9, 64, -4, 4),  # prompts at the end
    (1, 1, 1, 0, 1),
    (2, 5, 7, 0, 5),  # P = N, odd D
    (2, 6, 33, 5, 1),  # the last token
    *((2, 4, dim, 1, 2) for dim in (1, 2, 3, 4, 8, 15, 16, 31, 32, 100)),
    (3, 60, 96, 1, 50),  # the CPU kernel splits the rows into several tasks
    (2, 200, 24, 1, 3),  # a short slice of a long sequence
)
EMPTY_SIZES = (
    (2, 5, 4, 2, 0),
    (2, 5, 4, 5, 0),
    (2, 5, 4, -5, 0),
    (0, 5, 4, 1, 2),
    (2, 0, 4, 0, 0),
    (2, 5, 0, 1, 2),
)


class Guarded:
    """A tensor of up to three dimensions in a buffer of NaN; the NaN around it must survive."""

    def __init__(self, values, layout, offset=0):
        shape = values.shape
        strides, first = LAYOUTS[layout](*(1,) * (3 - len(shape)), *shape)
        strides, first = list(strides[3 - len(shape) :]), first + offset
        if layout == "expanded" and shape:
            strides[0] = 0
        last = first + sum((max(n, 1) - 1) * s for n, s in zip(shape, strides, strict=True))
        self.buffer = values.new_full((last + 4,), float("nan"))
        self.tensor = self.buffer.as_strided(shape, strides, first)
        distinct = slice(1) if layout == "expanded" and shape else ...
        self.tensor[distinct] = values[distinct]
        self.guard = torch.ones_like(self.buffer, dtype=torch.bool)
        self.guard.as_strided(shape, strides, first)[distinct] = False

    def assert_guard_intact(self, name):
        assert self.buffer[self.guard].isnan().all(), f"{name}: written outside the tensor"


def same_bits(a, b):
    """True if dtypes, shapes and bits are equal: NaN equals NaN, and -0 differs from 0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_floating_point():
        integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.itemsize]
        a, b = (t.detach().contiguous().view(integer) for t in (a, b))
    return torch.equal(a, b)


class _Into(torch.autograd.Function):
    """Identity that writes its output into a given tensor, to make a non-leaf of any layout."""

    @staticmethod
    def forward(ctx, values, target):
        target.copy_(values)
        storage = target.untyped_storage()  # shared memory, but not a view for autograd
        return target.new_empty(0).set_(
            storage, target.storage_offset(), target.shape, target.stride()
        )

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@dataclass
class Case:
    """One call of the op on [B, N, D], with P = length prompt rows from start."""

    batch: int = 2
    num_tokens: int = 7
    dim: int = 12
    start: int = 1
    length: int = 3
    rule: str = "mix"
    dtype: torch.dtype = torch.float32
    in_dtype: torch.dtype | None = None  # dtype if None
    gate_dtype: torch.dtype | None = None  # float32 (float64 for float64) if None
    logit: float = -0.7  # of a scalar gate; other gates vary around it
    layout: str = "contiguous"
    in_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    in_form: str = "sequence"
    inplace: bool = False
    device: torch.device | str = "cpu"
    compiled: str = ""  # a backend of torch.compile, or "" for eager
    gate: str = "scalar"
    bias: bool = True  # of a linear gate
    gate_layout: str = "contiguous"
    offset: int = 0  # elements by which every tensor is shifted in its buffer
    values: str = "normal"
    needs: tuple = (True, True, True, True)  # requires_grad of h, x, logit or weight, bias
    autocast: bool = False

    @property
    def rows(self):
        first = self.start if self.start >= 0 else self.start + self.num_tokens
        return slice(first, first + self.length)

    @property
    def is_linear(self):
        return self.gate in LINEAR_GATES

    @property
    def op_name(self):
        return "prompt_gate_linear" if self.is_linear else "prompt_gate"

    @property
    def names(self):
        """The names of what `inputs` returns."""
        gate = ("weight", "bias") if self.is_linear else ("gate_logit",)
        return ("block_out", "block_in", *gate, "grad_out")

    @property
    def coarsest(self):
        """The activation dtype with the largest epsilon, which limits the precision of results."""
        return max(self.dtype, self.in_dtype or self.dtype, key=lambda t: torch.finfo(t).eps)

    def inputs(self):
        """Returns h, x, gate_logit, grad_out; for a linear gate h, x, weight, bias (or None),
        grad_out."""
        size = (self.batch, self.num_tokens, self.dim)
        row_size = (self.batch, self.length, self.dim)
        in_size = {"sequence": size, "shared": row_size[1:]}.get(self.in_form, row_size)
        in_dtype = self.in_dtype or self.dtype
        gate_dtype = self.gate_dtype or torch.promote_types(self.dtype, torch.float32)
        gate_size = GATES[self.gate](*row_size)
        generator = torch.Generator().manual_seed(1)
        scale = 2.0**10 if self.values == "large" else 1.0

        def draw(shape, dtype, scale, layout, specials=(), signs=None):
            values = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
            values = values if signs is None else values.copysign(signs)
            return self._placed(values, dtype, layout, specials)

        inf, nan, tiny = float("inf"), float("nan"), torch.finfo(self.coarsest).smallest_normal
        of_activations, of_gate, of_grad = {
            "zeros": ((0.0, -0.0), (0.0,), (0.0,)),
            "denormal": ((tiny / 3, -tiny / 7), (tiny / 3,), (-tiny / 3,)),
            "saturated": ((), (-1e4, 88.0, -88.0, 1e4), ()),
            # no inf in grad_out: eager multiplies it by h and by x separately, which gives NaN
            # where the op's result is inf
            "nonfinite": ((inf, nan, -inf), (nan, inf, -inf), (nan,)),
        }.get(self.values, ((), (), ()))
        of_input = of_activations[::-1]
        if 0 in row_size:  # an empty sum is 0, where eager computes 0 * NaN
            of_input, of_gate = (), ()
        h = draw(size, self.dtype, scale, self.layout, of_activations)
        x = draw(in_size, in_dtype, scale, self.in_layout, of_input)
        # All terms of the gate's gradient get the same sign. If their sum cancelled, only rounding
        # errors would be compared, and eager's luck would decide.
        signs = h.double().clone()
        if self.rule == "mix":
            signs[:, self.rows] -= x[:, self.rows] if self.in_form == "sequence" else x
        grad = draw(size, self.dtype, 1 / scale, self.grad_layout, of_grad, signs)
        if self.is_linear:
            spread = 1 / (scale * max(self.dim, 1) ** 0.5)
            gate = [draw(gate_size, gate_dtype, spread, self.gate_layout), None]
            if self.bias:
                bias = self.logit + torch.randn(gate_size[:1], generator=generator).double()
                gate[1] = self._placed(bias, gate_dtype, self.gate_layout, of_gate)
        else:
            spread = torch.randn(gate_size, generator=generator, dtype=torch.float64)
            values = self.logit + (spread if gate_size else 0 * spread)
            gate = [self._placed(values, gate_dtype, self.gate_layout, of_gate)]
        return tuple(None if t is None else t.to(self.device) for t in (h, x, *gate, grad))

    def _placed(self, values, dtype, layout, specials):
        """Replaces every fifth value by a special one; the first element stays normal."""
        places = values.view(-1)[3::5]
        if specials:
            places.copy_(torch.tensor(specials).double().repeat(len(places))[: len(places)])
        values = values.to(dtype)
        if layout == "expanded" and values.dim() > 0:
            values = values[:1].expand_as(values).contiguous()
        return values


@dataclass
class Outcome:
    out: torch.Tensor
    grads: list  # of h, x, and logit (or weight, bias); None if not requested

    @property
    def tensors(self):
        return [self.out, *(grad for grad in self.grads if grad is not None)]


def run_op(case):
    """Runs the op and its backward; asserts that only the result was written."""
    values = dict(zip(case.names, case.inputs(), strict=True))
    layouts = {"block_out": case.layout, "block_in": case.in_layout, "grad_out": case.grad_layout}
    held = {
        name: Guarded(value, layouts.get(name, case.gate_layout), case.offset)
        for name, value in values.items()
        if value is not None
    }
    leaves = {name: held[name].tensor.detach() for name in case.names[:-1] if name in held}
    if case.inplace:
        leaves["block_out"] = values["block_out"].clone()
    for leaf, need in zip((leaves.get(name) for name in case.names), case.needs, strict=False):
        if leaf is not None:
            leaf.requires_grad_(need)
    mode = contextlib.nullcontext()
    if case.autocast:
        mode = torch.autocast(torch.device(case.device).type, torch.bfloat16)
    with mode:
        outputs = _call(case, leaves, held["block_out"].tensor)
    incoming = [held["grad_out"].tensor]
    if len(outputs) == 2:  # half comes through the carrier, the rest directly
        incoming = [incoming[0].clone(), incoming[0][:, case.rows] / 2]
        incoming[0][:, case.rows] -= incoming[1]
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = {}
    if wanted:
        grads = torch.autograd.grad(outputs, list(wanted.values()), incoming)
        found = dict(zip(wanted, grads, strict=True))
    for name, tensor in held.items():
        tensor.assert_guard_intact(name)
        if name != "block_out" or not case.inplace:
            assert same_bits(tensor.tensor, values[name]), f"{name} must not be written"
    return Outcome(outputs[0].detach(), [found.get(name) for name in case.names[:-1]])


def _call(case, leaves, target):
    """Returns (block_out,) or (block_out, carrier) after the op; in place, in `target`."""
    gate = [leaves.get(name) for name in case.names[2:-1]]
    where = (case.start, case.length, case.rule)
    op = getattr(gp, case.op_name + ("_" if case.inplace else ""))
    if case.compiled:
        torch._dynamo.reset()
        op = torch.compile(op, fullgraph=True, backend=case.compiled)
    if not case.inplace:
        return (op(leaves["block_out"], leaves["block_in"], *gate, *where),)
    block_out, x = _Into.apply(leaves["block_out"], target), leaves["block_in"]
    version = block_out._version
    if case.in_form == "carrier":
        outputs = op(block_out, x.detach(), *gate, *where, carrier=x)
    else:
        outputs = (op(block_out, x, *gate, *where),)
    assert outputs[0] is block_out
    assert block_out._version > version, "an in-place op must bump the version"
    return outputs


def _as_computed(case, tensor):
    """Narrows float64 to float32 if block_out is narrower: the op then computes in float32."""
    is_narrowed = tensor is not None and tensor.dtype == torch.float64 != case.dtype
    return tensor.float() if is_narrowed else tensor


def _exact_inputs(case):
    """`case.inputs()` in float64, with the values that the op computes with."""
    inputs = (_as_computed(case, t) for t in case.inputs())
    return [None if t is None else t.double() for t in inputs]


def run_reference(case, exact=True):
    """Runs `gated_prompt.reference` on the case, in float64 or (not exact) in the case's dtypes."""
    *inputs, grad = _exact_inputs(case) if exact else case.inputs()
    inputs = [None if t is None else t.requires_grad_() for t in inputs]
    arguments = list(inputs) if exact else [_as_computed(case, t) for t in inputs]
    if case.gate == "linear" and arguments[3] is not None:  # added by the GEMM
        arguments[3] = arguments[3].to(inputs[0].dtype)
    out = getattr(reference, case.op_name)(*arguments, case.start, case.length, case.rule)
    wanted = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype)))
    return Outcome(out.detach(), [None if t is None else next(found) for t in inputs])


def magnitudes(case):
    """Returns the scales of the tolerance, in float64.

    Returns:
        out: Sum of |terms| for each element of the output.
        carried: Sum of |terms| of the logit, times the derivative of the output by the logit.
        gradients: Sum of |terms| for each gradient.
    """
    h, x, *gate, grad = _exact_inputs(case)
    x_rows = x[:, case.rows] if case.in_form == "sequence" else x
    h_rows, grad_rows = h[:, case.rows], grad[:, case.rows].abs()
    dtypes = (case.dtype, case.in_dtype, case.gate_dtype)
    # below the smallest normal number, the rounding error is absolute
    tiny = max(torch.finfo(t).smallest_normal for t in dtypes if t is not None)
    logit, terms, off = gate[0], 0.0, 0.0  # off: error of g due to the logit's, in epsilons
    if case.is_linear:  # the logit is off by some epsilons of its own terms
        weight, bias = gate[0], 0.0 if gate[1] is None else gate[1]
        logit = h_rows @ weight.T + bias
        terms = h_rows.abs() @ weight.abs().T + torch.as_tensor(bias).abs()
        computed = torch.promote_types(case.dtype, torch.float32)
        computed = case.dtype if case.gate == "linear" else computed  # the GEMM's dtype
        eps = torch.finfo(computed).eps
        flattest = (logit.abs() - 2 * eps * terms).clamp(min=0).sigmoid()
        off = flattest * (1 - flattest) * terms * (eps / torch.finfo(case.coarsest).eps)
        off = off.nan_to_num(nan=0.0)  # an infinite logit has no rounding error
    # The reference computes 1 - g and h - x as differences, which are exact to an epsilon of their
    # operands. The float64 rule (1e-12 of the terms) has no room for this error, so it is a term.
    blur = 2**-52 / (1e-12 if case.coarsest == torch.float64 else 1)
    g = logit.sigmoid()
    slope = g * (1 - g) + blur + off
    w = 1 - g + blur + off if case.rule == "mix" else torch.ones_like(g)
    change = (h_rows - x_rows).abs() + blur * (h_rows.abs() + x_rows.abs())
    change = (change if case.rule == "mix" else h_rows.abs()) + tiny
    carried = torch.zeros_like(h)
    carried[:, case.rows] = (g * (1 - g) * terms * change).nan_to_num(nan=0.0, posinf=0.0)
    out, grad_h = h.abs() + tiny, grad.abs() + tiny
    g = g + off
    out[:, case.rows] = g * h_rows.abs() + w * x_rows.abs() + tiny
    grad_h[:, case.rows] = g * grad_rows + tiny
    grad_x = w * grad_rows + tiny
    if case.in_form == "sequence":
        grad_x = torch.zeros_like(h).slice_scatter(grad_x, 1, case.rows.start, case.rows.stop)
    elif case.in_form == "shared":
        grad_x = grad_x.sum(0)
    grad_logit = slope * (change * grad_rows) + tiny
    if not case.is_linear:
        return out, carried, [grad_h, grad_x, grad_logit.sum_to_size(gate[0].shape)]
    if case.gate == "linear-token":
        grad_logit = grad_logit.sum(-1, keepdim=True)
    grad_h[:, case.rows] += grad_logit @ weight.abs()
    grad_weight = torch.einsum("bpk,bpd->kd", grad_logit, h_rows.abs())
    return out, carried, [grad_h, grad_x, grad_weight, grad_logit.sum((0, 1))]


def check_against_reference(case):
    """Checks the output and gradients by the tolerance rule, untouched rows and dtypes exactly."""
    got, exact, eager = run_op(case), run_reference(case), run_reference(case, exact=False)
    out_terms, carried, grad_terms = magnitudes(case)
    within_rule("out", got.out, exact.out, eager.out, out_terms, backward=False, carried=carried)
    outside = torch.ones(case.num_tokens, dtype=torch.bool)
    outside[case.rows] = False
    h, *_, grad = case.inputs()
    assert same_bits(got.out[:, outside], h[:, outside]), "rows outside the slice changed"
    for index, (name, need) in enumerate(zip(case.names[:-1], case.needs, strict=False)):
        result, wanted = got.grads[index], need and exact.grads[index] is not None
        assert (result is not None) == wanted, f"gradient of {name}"
        if not wanted:
            continue
        reduced = index >= 2 or case.is_linear or case.in_form == "shared"
        within_rule(
            f"gradient of {name}", result, exact.grads[index], eager.grads[index],
            grad_terms[index], backward=True, reduced=reduced, dtype=case.coarsest,
        )  # fmt: skip
    if case.needs[0]:
        assert same_bits(got.grads[0][:, outside], grad[:, outside]), "gradient outside the slice"
    if case.needs[1] and case.in_form == "sequence":
        assert not got.grads[1][:, outside].any()


def within_rule(name, got, exact, eager, terms, **how):
    """Applies the rule where the reference is finite; elsewhere NaN and infinity must be equal."""
    finite = exact.isfinite()
    if not finite.all():
        strange = torch.where(finite, torch.zeros_like(exact), got.double())
        wanted = torch.where(finite, torch.zeros_like(exact), exact)
        torch.testing.assert_close(strange, wanted, equal_nan=True, rtol=0, atol=0, msg=name)
        got, exact, terms = (t.where(finite, torch.zeros_like(t)) for t in (got, exact, terms))
        eager = torch.where(finite & eager.isfinite(), eager, exact.to(eager.dtype))
    assert_within_rule(name, got, exact, eager, terms, **how)


# ---- all pairs ----

DIMENSIONS = {
    "gate": tuple(GATES),
    "size": SIZES + EMPTY_SIZES,
    "rule": RULES,
    "dtype": DTYPES,
    "in_dtype": DTYPES,
    "gate_dtype": DTYPES,
    "layout": WRITABLE,
    "in_layout": tuple(LAYOUTS),
    "grad_layout": tuple(LAYOUTS),
    "gate_layout": tuple(LAYOUTS),
    "offset": (0, 1, 4, 15),
    "values": VALUES,
    "form": tuple(
        (inplace, form)
        for inplace, form in itertools.product((False, True), IN_FORMS)
        if inplace or form != "carrier"
    ),
    "bias": (True, False),
    "needs": tuple((h, x, gate, gate) for h, x, gate in itertools.product((True, False), repeat=3)),
    "autocast": (False, True),
}


def pairs_of(choice):
    """The pairs of (dimension, index of its value) that a choice covers."""
    return set(itertools.combinations(sorted(choice.items()), 2))


def all_pairs(number=400, seed=0, candidates=20):
    """Returns at least `number` choices {dimension: index of its value} that together cover every
    pair of values. The search is greedy and deterministic."""
    rng = random.Random(seed)
    counts = {name: len(values) for name, values in DIMENSIONS.items()}
    missing = {
        tuple(sorted(((a, i), (b, j))))
        for a, b in itertools.combinations(counts, 2)
        for i, j in itertools.product(range(counts[a]), range(counts[b]))
    }
    choices = []
    while missing or len(choices) < number:
        seeded = dict(min(missing, default=()))  # keep this pair, draw the rest, take the best
        drawn = [
            {name: seeded.get(name, rng.randrange(count)) for name, count in counts.items()}
            for _ in range(candidates)
        ]
        best = max(drawn, key=lambda choice: len(pairs_of(choice) & missing))
        missing -= pairs_of(best)
        choices.append(best)
    return choices


def case_of(choice):
    values = {name: DIMENSIONS[name][index] for name, index in choice.items()}
    (inplace, in_form), size = values.pop("form"), values.pop("size")
    return Case(*size, inplace=inplace, in_form=in_form, **values)
