# SPDX-License-Identifier: Apache-2.0
"""Inputs for the op: layouts in a guarded buffer, and a run of the op beside its oracles."""

from dataclasses import dataclass

import torch

import gated_prompt as gp
from gated_prompt import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RULES = ("mix", "residual")

# name -> (element strides of [B, N, D], elements before the first one)
LAYOUTS = {
    "contiguous": lambda b, n, d: ((n * d, d, 1), 0),
    "odd_offset": lambda b, n, d: ((n * d, d, 1), 3),
    "row_padded": lambda b, n, d: ((n * (d + 5), d + 5, 1), 0),
    "slice_of_wider": lambda b, n, d: ((2 * n * d + 6, 2 * d, 1), d),
    "transposed": lambda b, n, d: ((d * n, 1, n), 1),
    "sequence_first": lambda b, n, d: ((d, b * d, 1), 0),
    "every_second_channel": lambda b, n, d: ((2 * n * d, 2 * d, 2), 0),
    "expanded": lambda b, n, d: ((0, d, 1), 2),  # for what is read only
}
WRITABLE = tuple(name for name in LAYOUTS if name != "expanded")


class Guarded:
    """A [B, N, D] tensor in a buffer of NaN, which must stay NaN around it."""

    def __init__(self, values, layout):
        shape = values.shape
        strides, offset = LAYOUTS[layout](*shape)
        last = offset + sum((max(n, 1) - 1) * s for n, s in zip(shape, strides, strict=True))
        self.buffer = values.new_full((last + 4,), float("nan"))
        self.tensor = self.buffer.as_strided(shape, strides, offset)
        distinct = slice(1) if layout == "expanded" else slice(None)
        self.tensor[distinct] = values[distinct]
        mask = torch.ones_like(self.buffer, dtype=torch.bool)
        mask.as_strided(shape, strides, offset)[distinct] = False
        self.guard = mask

    def assert_guard_intact(self, name):
        assert self.buffer[self.guard].isnan().all(), f"{name}: written outside the tensor"


class _Into(torch.autograd.Function):
    """Identity whose output lies in a given tensor: a non-leaf of any layout."""

    @staticmethod
    def forward(ctx, values, target):
        target.copy_(values)
        storage = target.untyped_storage()  # not a view for autograd
        return target.new_empty(0).set_(
            storage, target.storage_offset(), target.shape, target.stride()
        )

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@dataclass
class Case:
    """One call; sizes are [B, N, D] with P rows from start."""

    batch: int = 2
    num_tokens: int = 7
    dim: int = 12
    start: int = 1
    length: int = 3
    rule: str = "mix"
    dtype: torch.dtype = torch.float32
    in_dtype: torch.dtype | None = None  # dtype if None
    gate_dtype: torch.dtype | None = None  # float32 (float64 for float64) if None
    logit: float = -0.7
    layout: str = "contiguous"
    in_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    in_form: str = "sequence"  # "sequence" [B, N, D], "rows" [B, P, D], "shared" [P, D]
    inplace: bool = False
    device: torch.device | str = "cpu"

    @property
    def rows(self):
        first = self.start if self.start >= 0 else self.start + self.num_tokens
        return slice(first, first + self.length)

    def inputs(self):
        size = (self.batch, self.num_tokens, self.dim)
        in_size = {
            "sequence": size,
            "rows": (self.batch, self.length, self.dim),
            "shared": (self.length, self.dim),
        }[self.in_form]
        generator = torch.Generator().manual_seed(1)

        def draw(shape, dtype):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        in_dtype = self.in_dtype or self.dtype
        values = [draw(size, self.dtype), draw(in_size, in_dtype), draw(size, self.dtype)]
        h, x, grad = (v.to(self.device) for v in values)
        gate_dtype = torch.promote_types(self.dtype, torch.float32)
        logit = torch.tensor(self.logit, dtype=self.gate_dtype or gate_dtype, device=self.device)
        return h, x, logit, grad


@dataclass
class Outcome:
    out: torch.Tensor
    grads: list


def run_op(case, needs=(True, True, True)):
    """The op and its gradients; asserts that nothing but the result was written."""
    h, x, logit, grad = case.inputs()
    held_h = Guarded(h, case.layout)
    held_x = Guarded(x, case.in_layout) if x.dim() == 3 else None
    held_grad = Guarded(grad, case.grad_layout)
    if held_x is not None:
        x = held_x.tensor
    x_values, grad_values = x.clone(), held_grad.tensor.clone()
    x = x.detach().requires_grad_(needs[1])
    logit.requires_grad_(needs[2])
    arguments = (case.start, case.length, case.rule)
    if case.inplace:
        leaf = h.clone().requires_grad_(needs[0])
        block_out = _Into.apply(leaf, held_h.tensor)
        version = block_out._version
        out = gp.prompt_gate_(block_out, x, logit, *arguments)
        assert out is block_out
        assert out._version > version, "an in-place op must bump the version"
    else:
        leaf = held_h.tensor.detach().requires_grad_(needs[0])
        out = gp.prompt_gate(leaf, x, logit, *arguments)
        assert torch.equal(held_h.tensor, h), "prompt_gate must not write into block_out"
    inputs = [t for t, need in zip((leaf, x, logit), needs, strict=True) if need]
    grads = [None] * 3
    if inputs:
        found = iter(torch.autograd.grad(out, inputs, held_grad.tensor))
        grads = [next(found) if need else None for need in needs]
    held_h.assert_guard_intact("block_out")
    held_grad.assert_guard_intact("grad_out")
    assert torch.equal(held_grad.tensor, grad_values), "the incoming gradient must not be written"
    assert torch.equal(x, x_values), "block_in must not be written"
    if held_x is not None:
        held_x.assert_guard_intact("block_in")
    return Outcome(out.detach(), grads)


def run_reference(case, dtype=None):
    """The same by `reference.prompt_gate`, in float64 or (dtype="own") in the case's dtypes."""
    h, x, logit, grad = case.inputs()
    if case.in_layout == "expanded" and x.dim() == 3:
        x = x[:1].expand_as(x).contiguous()
    if case.grad_layout == "expanded":
        grad = grad[:1].expand_as(grad).contiguous()
    if dtype != "own":
        h, x, logit, grad = (t.double() for t in (h, x, logit, grad))
    inputs = [t.requires_grad_() for t in (h, x, logit)]
    out = reference.prompt_gate(*inputs, case.start, case.length, case.rule)
    grads = torch.autograd.grad(out, inputs, grad.to(out.dtype))
    return Outcome(out.detach(), list(grads))


def magnitudes(case):
    """Sum of |terms| of the output and of each gradient, float64: the scale of the tolerance."""
    h, x, logit, grad = (t.double() for t in case.inputs())
    if case.in_layout == "expanded" and x.dim() == 3:
        x = x[:1].expand_as(x)
    if case.grad_layout == "expanded":
        grad = grad[:1].expand_as(grad)
    x_rows = x[:, case.rows] if case.in_form == "sequence" else x
    g = logit.sigmoid()
    w = 1 - g if case.rule == "mix" else torch.ones_like(g)
    h_rows, grad_rows = h[:, case.rows], grad[:, case.rows].abs()
    out, grad_h = h.abs(), grad.abs()
    out[:, case.rows] = g * h_rows.abs() + w * x_rows.abs()
    grad_h[:, case.rows] = g * grad_rows
    if case.in_form == "sequence":
        grad_x = torch.zeros_like(h)
        grad_x[:, case.rows] = w * grad_rows
    else:
        grad_x = w * grad_rows
    if case.in_form == "shared":
        grad_x = grad_x.sum(0)
    derivative = h_rows - x_rows if case.rule == "mix" else h_rows
    slope = g * (1 - g) + 2**-52  # the 1 - g of the reference is itself exact to that only
    grad_logit = slope * (derivative.abs() * grad_rows).sum()
    return out, [grad_h, grad_x, grad_logit]
