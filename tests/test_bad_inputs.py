# SPDX-License-Identifier: Apache-2.0
"""Bad inputs of the op raise an error that names argument, rule and value; nothing is written."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import same_bits
from torch._subclasses import FakeTensorMode

import gated_prompt as gp
from gated_prompt import functional, ops

B, N, D, START, P = 2, 5, 4, 1, 2


def sparse(tensor, how):
    return {
        "coo": tensor.to_sparse,
        "csr": lambda: tensor[0].to_sparse_csr(),
        "mkldnn": tensor.to_mkldnn,
        "nested": lambda: torch.nested.nested_tensor([tensor[0], tensor[1]]),
        "jagged": lambda: torch.nested.nested_tensor([tensor[0]], layout=torch.jagged),
        "quantized": lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8),
    }[how]()


def freed(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def too_small(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.nbytes - 1)
    return tensor


# (class of bad input, name, changes of the good arguments, error, pattern of the message)
BAD = [
    (1, "start > N", {"start": 6}, ValueError, r"start must be in \[-5, 5\].* got 6"),
    (1, "start < -N", {"start": -6}, ValueError, r"start must be in \[-5, 5\].* got -6"),
    (1, "length < 0", {"length": -1}, ValueError, r"length must be at least 0, got -1"),
    (2, "beyond the end", {"start": 4}, ValueError, r"slice \[4, 6\) is outside N=5"),
    (2, "negative start beyond the end", {"start": -1}, ValueError, r"slice \[4, 6\) is outside N=5"),
    (2, "length > N", {"start": 0, "length": 6}, ValueError, r"slice \[0, 6\) is outside N=5"),
    (3, "start 2^32", {"start": 2**32}, ValueError, r"start must be in .* got 4294967296"),
    (3, "start + length beyond int64", {"start": 1, "length": 2**63 - 1}, ValueError, r"outside N=5"),
    (3, "start beyond int64", {"start": 2**70}, ValueError, r"start must be in"),
    (3, "length beyond int64", {"length": 2**70}, ValueError, r"outside N=5"),
    (4, "float start", {"start": 1.0}, TypeError, r"start must be an int, got float"),
    (4, "str start", {"start": "1"}, TypeError, r"start must be an int, got str"),
    (4, "None start", {"start": None}, TypeError, r"start must be an int, got NoneType"),
    (4, "bool start", {"start": True}, TypeError, r"start must be an int, got bool"),
    (4, "tensor start", {"start": torch.tensor(1)}, TypeError, r"start must be an int, got Tensor"),
    (4, "float length", {"length": 2.0}, TypeError, r"length must be an int, got float"),
    (4, "bool length", {"length": True}, TypeError, r"length must be an int, got bool"),
    (5, "2-D block_out", {"block_out": lambda h: h[0]}, ValueError, r"block_out must be \[B, N, D\], got \[5, 4\]"),
    (5, "4-D block_out", {"block_out": lambda h: h[None]}, ValueError, r"block_out must be \[B, N, D\]"),
    (5, "0-D block_out", {"block_out": lambda h: h.sum()}, ValueError, r"block_out must be \[B, N, D\], got \[\]"),
    (5, "1-D block_in", {"block_in": lambda x: x[0, 0]}, ValueError, r"block_in must be \[B, N, D\] = \[2, 5, 4\].* got \[4\]"),
    (5, "4-D block_in", {"block_in": lambda x: x[None]}, ValueError, r"block_in must be"),
    (5, "other token count", {"block_in": lambda x: x[:, :4]}, ValueError, r"block_in must be .* got \[2, 4, 4\]"),
    (5, "[3, D] rows", {"block_in": lambda x: x[0, :3]}, ValueError, r"block_in must be .* got \[3, 4\]"),
    (6, "other batch", {"block_in": lambda x: x.repeat(2, 1, 1)}, ValueError, r"got \[4, 5, 4\]"),
    (6, "batch 1 beside 2", {"block_in": lambda x: x[:1]}, ValueError, r"got \[1, 5, 4\]"),
    (6, "batch 1 rows beside 2", {"block_in": lambda x: x[:1, :2]}, ValueError, r"got \[1, 2, 4\]"),
    (6, "other D", {"block_in": lambda x: x[:, :, :3]}, ValueError, r"got \[2, 5, 3\]"),
    (7, "int block_in", {"block_in": lambda x: x.int()}, TypeError, r"block_in must be float64, .* got torch.int32"),
    (7, "complex block_in", {"block_in": lambda x: x.cfloat()}, TypeError, r"block_in must be .* got torch.complex64"),
    (7, "float8 block_in", {"block_in": lambda x: x.to(torch.float8_e4m3fn)}, TypeError, r"got torch.float8_e4m3fn"),
    (8, "int block_out", {"block_out": lambda h: h.int()}, TypeError, r"block_out must be float64, .* got torch.int32"),
    (8, "bool block_out", {"block_out": lambda h: h > 0}, TypeError, r"got torch.bool"),
    (8, "complex block_out", {"block_out": lambda h: h.cfloat()}, TypeError, r"got torch.complex64"),
    (8, "float8 block_out", {"block_out": lambda h: h.to(torch.float8_e5m2)}, TypeError, r"got torch.float8_e5m2"),
    (11, "meta block_in", {"block_in": lambda x: x.to("meta")}, RuntimeError, r"block_in must be on the device of block_out, cpu, got meta"),
    (11, "meta block_out", {"block_out": lambda h: h.to("meta")}, RuntimeError, r"device of block_out, meta, got cpu"),
    *[
        (12, f"{how} {name}", {name: lambda t, how=how: sparse(t, how)}, NotImplementedError, rf"{name} must be a dense strided tensor, got")
        for how in ("coo", "csr", "mkldnn", "nested", "jagged", "quantized")
        for name in ("block_out", "block_in")
    ],
    (13, "numpy block_out", {"block_out": lambda h: h.numpy()}, TypeError, r"block_out must be a torch.Tensor, got ndarray"),
    (13, "list block_in", {"block_in": lambda x: x.tolist()}, TypeError, r"block_in must be a torch.Tensor, got list"),
    (13, "None block_in", {"block_in": lambda x: None}, TypeError, r"block_in must be a torch.Tensor, got NoneType"),
    (14, "freed block_out", {"block_out": freed}, RuntimeError, r"block_out reaches 160 bytes into a storage of 0 bytes"),
    (14, "freed block_in", {"block_in": freed}, RuntimeError, r"block_in reaches .* storage of 0 bytes"),
    (14, "small block_out", {"block_out": too_small}, RuntimeError, r"reaches 160 bytes into a storage of 159 bytes"),
    (14, "small rows", {"block_in": lambda x: too_small(x[:, :2].contiguous())}, RuntimeError, r"reaches 64 bytes"),
    (0, "unknown rule", {"rule": "lerp"}, ValueError, r"rule must be 'mix' or 'residual', got 'lerp'"),
]  # fmt: skip

# gate arguments: a logit, or weight and bias
BAD_LOGIT = [
    (9, "logit [3]", {"gate_logit": lambda z: z.expand(3)}, ValueError, r"broadcast to \[B, P, D\] = \[2, 2, 4\], got \[3\]"),
    (9, "logit [N, 1]", {"gate_logit": lambda z: z.expand(5, 1)}, ValueError, r"gate_logit must broadcast .* got \[5, 1\]"),
    (9, "logit [P]", {"gate_logit": lambda z: z.expand(2)}, ValueError, r"gate_logit must broadcast .* got \[2\]"),
    (9, "logit 4-D", {"gate_logit": lambda z: z.expand(1, 1, 1, 1)}, ValueError, r"gate_logit must broadcast"),
    (10, "int logit", {"gate_logit": lambda z: z.long()}, TypeError, r"gate_logit must be .* got torch.int64"),
    (10, "bool logit", {"gate_logit": lambda z: z > 0}, TypeError, r"gate_logit must be .* got torch.bool"),
    (11, "meta logit", {"gate_logit": lambda z: z.to("meta")}, RuntimeError, r"gate_logit must be on .* cpu, got meta"),
    (13, "float logit", {"gate_logit": lambda z: -5.0}, TypeError, r"gate_logit must be a torch.Tensor, got float"),
    (14, "freed logit", {"gate_logit": freed}, RuntimeError, r"gate_logit reaches 4 bytes into a storage of 0 bytes"),
    (14, "freed full gate", {"gate_logit": lambda z: freed(z.expand(2, 4).contiguous())}, RuntimeError, r"gate_logit reaches 32 bytes"),
    *[
        (12, f"{how} logit", {"gate_logit": lambda z, how=how: sparse(z.expand(2, 2, 4).contiguous(), how)}, NotImplementedError, r"gate_logit must be a dense strided tensor, got")
        for how in ("coo", "csr", "mkldnn", "nested", "quantized")
    ],
    (13, "None logit", {"gate_logit": None}, TypeError, r"gate_logit must be a torch.Tensor, got NoneType"),
]  # fmt: skip

BAD_LINEAR = [
    (10, "weight [D]", {"weight": lambda w: w[0]}, ValueError, r"weight must be \[D, D\] or \[1, D\] with D=4, got \[4\]"),
    (10, "weight [2, D]", {"weight": lambda w: w[:2]}, ValueError, r"weight must be .* got \[2, 4\]"),
    (10, "weight [D, 1]", {"weight": lambda w: w[:, :1]}, ValueError, r"weight must be .* got \[4, 1\]"),
    (10, "weight [1, D, D]", {"weight": lambda w: w[None]}, ValueError, r"weight must be .* got \[1, 4, 4\]"),
    (10, "weight of another D", {"weight": lambda w: w.repeat(2, 2)}, ValueError, r"weight must be .* got \[8, 8\]"),
    (10, "scalar weight", {"weight": lambda w: w.sum()}, ValueError, r"weight must be .* got \[\]"),
    (10, "bias [1] beside [D, D]", {"bias": lambda b: b[:1]}, ValueError, r"bias must be \[4\], as weight has 4 rows, got \[1\]"),
    (10, "bias [D] beside [1, D]", {"weight": lambda w: w[:1]}, ValueError, r"bias must be \[1\], as weight has 1 rows, got \[4\]"),
    (10, "bias []", {"bias": lambda b: b.sum()}, ValueError, r"bias must be \[4\].* got \[\]"),
    (10, "bias [1, D]", {"bias": lambda b: b[None]}, ValueError, r"bias must be \[4\].* got \[1, 4\]"),
    (10, "bias without weight", {"weight": None}, TypeError, r"weight must be a torch.Tensor, got NoneType"),
    (10, "int weight", {"weight": lambda w: w.int()}, TypeError, r"weight must be float64, .* got torch.int32"),
    (10, "complex bias", {"bias": lambda b: b.cfloat()}, TypeError, r"bias must be float64, .* got torch.complex64"),
    (11, "meta weight", {"weight": lambda w: w.to("meta")}, RuntimeError, r"weight must be on the device of block_out, cpu, got meta"),
    (11, "meta bias", {"bias": lambda b: b.to("meta")}, RuntimeError, r"bias must be on .* cpu, got meta"),
    (12, "coo weight", {"weight": lambda w: w.to_sparse()}, NotImplementedError, r"weight must be a dense strided tensor, got"),
    (12, "quantized bias", {"bias": lambda b: sparse(b, "quantized")}, NotImplementedError, r"bias must be a dense strided tensor, got"),
    (13, "list weight", {"weight": lambda w: w.tolist()}, TypeError, r"weight must be a torch.Tensor, got list"),
    (13, "numpy bias", {"bias": lambda b: b.numpy()}, TypeError, r"bias must be a torch.Tensor, got ndarray"),
    (13, "a torch.nn.Linear", {"weight": torch.nn.Linear(4, 4)}, TypeError, r"weight must be a torch.Tensor, got Linear"),
    (14, "freed weight", {"weight": freed}, RuntimeError, r"weight reaches 64 bytes into a storage of 0 bytes"),
    (14, "freed bias", {"bias": freed}, RuntimeError, r"bias reaches 16 bytes into a storage of 0 bytes"),
    (14, "freed weight [1, D]", {"weight": lambda w: freed(w[:1]), "bias": None}, RuntimeError, r"weight reaches 16 bytes"),
    (14, "freed bias [1]", {"weight": lambda w: w[:1], "bias": lambda b: freed(b[:1])}, RuntimeError, r"bias reaches 4 bytes"),
]  # fmt: skip

# in-place ops only: leaves, overlaps, carriers
BAD_IN_PLACE = [
    (15, "leaf that requires grad", {"block_out": lambda h: h.clone().requires_grad_()}, RuntimeError, "leaf that requires grad"),
    (16, "expanded block_out", {"block_out": lambda h: h[:1].expand(2, 5, 4)}, RuntimeError, "overlap themselves"),
    (16, "sliding window", {"block_out": lambda h: h.flatten().as_strided((2, 5, 4), (4, 4, 1))}, RuntimeError, "overlap themselves"),
    (5, "carrier [B, N, D]", {"carrier": torch.zeros(2, 5, 4)}, ValueError, r"carrier must be \[B, P, D\] = \[2, 2, 4\] .*got \[2, 5, 4\]"),
    (5, "carrier [P, D]", {"carrier": torch.zeros(2, 4)}, ValueError, r"carrier must be .* got \[2, 4\]"),
    (7, "carrier of another dtype", {"carrier": torch.zeros(2, 2, 4).double()}, ValueError, r"carrier must be .* torch.float32, got .* torch.float64"),
    (11, "meta carrier", {"carrier": torch.zeros(2, 2, 4, device="meta")}, RuntimeError, r"carrier must be on the device of block_out, cpu, got meta"),
    (12, "sparse carrier", {"carrier": torch.zeros(2, 2, 4).to_sparse()}, NotImplementedError, r"carrier must be a dense strided tensor"),
    (13, "True for a carrier", {"carrier": True}, TypeError, r"carrier must be a torch.Tensor, got bool"),
]  # fmt: skip

OUT_OF_PLACE = (gp.prompt_gate, gp.prompt_gate_linear)
IN_PLACE = (gp.prompt_gate_, gp.prompt_gate_linear_)
OF_LOGIT = (gp.prompt_gate, gp.prompt_gate_)
OF_LINEAR = (gp.prompt_gate_linear, gp.prompt_gate_linear_)


def bad_inputs():
    for functions, table in (
        (OUT_OF_PLACE + IN_PLACE, BAD),
        (OF_LOGIT, BAD_LOGIT),
        (OF_LINEAR, BAD_LINEAR),
        (IN_PLACE, BAD_IN_PLACE),
    ):
        for number, name, *rest in table:
            for function in functions:
                yield pytest.param(function, *rest, id=f"{number}: {name}, {function.__name__}")


def good_arguments(function=gp.prompt_gate):
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "block_out": torch.randn(B, N, D, generator=generator),
        "block_in": torch.randn(B, N, D, generator=generator),
    }
    if function in OF_LOGIT:
        arguments["gate_logit"] = torch.tensor(-0.5)
    else:
        arguments["weight"] = torch.randn(D, D, generator=generator)
        arguments["bias"] = torch.randn(D, generator=generator)
    return {**arguments, "start": START, "length": P, "rule": "mix"}


def call_and_check(function, changes, error, pattern):
    """Asserts the type and message of the error, and that no argument was written."""
    arguments = good_arguments(function)
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    call = dict(arguments)
    for name, change in changes.items():
        is_change = callable(change) and not isinstance(change, torch.nn.Module)
        call[name] = change(arguments[name]) if is_change else change
    with pytest.raises(error, match=pattern) as caught:
        function(**call)
    assert type(caught.value) is error
    # the checks of memory safety are in the raw op, which all functions share
    names = (function.__name__, *(("prompt_gate",) if error is RuntimeError else ()))
    assert any(f"{name}: " in str(caught.value) for name in names)
    for name, tensor in before.items():
        assert same_bits(arguments[name], tensor), f"{name} was written"


@pytest.mark.parametrize(("function", "changes", "error", "pattern"), list(bad_inputs()))
def test_bad_input_gets_its_error_and_nothing_is_written(function, changes, error, pattern):
    call_and_check(function, changes, error, pattern)


@pytest.mark.parametrize("function", [*OF_LOGIT, *OF_LINEAR])
def test_good_arguments_are_good(function):
    assert function(**good_arguments(function)).isfinite().all()


def test_an_out_of_place_gate_takes_no_carrier():
    for function in OUT_OF_PLACE:
        with pytest.raises(TypeError, match="carrier"):
            function(**good_arguments(function), carrier=torch.zeros(B, P, D))


@pytest.mark.parametrize("function", IN_PLACE)
def test_inference_tensor_outside_inference_mode(function):
    arguments = good_arguments(function)
    with torch.inference_mode():
        arguments["block_out"] = arguments["block_out"].clone()
    with pytest.raises(RuntimeError, match="inference tensor"):
        function(**arguments)


@pytest.mark.parametrize("strides", [(N * D, D, 1), (D, B * D, 1), (2 * N * D, 2 * D, 2)])
def test_overlap_of_block_in_with_the_written_rows(strides):
    """For every shift: raises if and only if a written element is also read at another place."""
    places = torch.arange(600).as_strided((B, N, D), strides, 200)[:, START : START + P]
    written = set(places.flatten().tolist())
    outcomes = set()
    for shift in range(-90, 91):
        buffer = torch.randn(600)
        block_out = buffer.as_strided((B, N, D), strides, 200)
        block_in = buffer.as_strided((B, N, D), strides, 200 + shift)
        before = buffer.clone()
        overlaps = shift != 0 and not written.isdisjoint({place + shift for place in written})
        outcomes.add(overlaps)
        if overlaps:
            with pytest.raises(
                RuntimeError, match="block_in overlaps the prompt rows of block_out"
            ):
                gp.prompt_gate_(block_out, block_in, torch.tensor(0.0), START, P)
            assert torch.equal(buffer, before)
        else:
            wanted = gp.prompt_gate(block_out, block_in, torch.tensor(0.0), START, P)
            gp.prompt_gate_(block_out, block_in, torch.tensor(0.0), START, P)
            assert torch.equal(block_out, wanted)
    assert outcomes == {True, False}


@pytest.mark.parametrize(("shape", "dims"), [((1, 4, 4), (1, 2)), ((3, 3, 8), (0, 1))])
def test_transposed_alias_is_an_overlap(shape, dims):
    h = torch.randn(shape)
    with pytest.raises(RuntimeError, match="block_in overlaps"):
        gp.prompt_gate_(h, h.transpose(*dims), torch.tensor(0.0), 0, shape[1])


@pytest.mark.parametrize(
    ("function", "of_rows"),
    [
        (gp.prompt_gate_, {"gate_logit": lambda rows: rows[0, 0, 0]}),
        (gp.prompt_gate_, {"gate_logit": lambda rows: rows[0, 0]}),
        (gp.prompt_gate_, {"gate_logit": lambda rows: rows}),
        (gp.prompt_gate_linear_, {"weight": lambda rows: rows[0, :1], "bias": None}),
        (gp.prompt_gate_linear_, {"weight": torch.ones(1, D), "bias": lambda rows: rows[0, 0, :1]}),
    ],
)
def test_gate_among_the_written_rows(function, of_rows):
    arguments = good_arguments(function)
    rows = arguments["block_out"][:, START : START + P]
    for name, make in of_rows.items():
        arguments[name] = make(rows) if callable(make) else make
    before = arguments["block_out"].clone()
    with pytest.raises(RuntimeError, match=r"(gate_logit|weight|bias) lies among the prompt rows"):
        function(**arguments)
    assert torch.equal(arguments["block_out"], before)
    for name, make in of_rows.items():
        arguments[name] = make(rows.clone()) if callable(make) else make
    function(**arguments)


@pytest.mark.parametrize("is_before", [True, False])
@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (gp.prompt_gate_, {"gate_logit": ()}),
        (gp.prompt_gate_, {"gate_logit": (D,)}),
        (gp.prompt_gate_, {"gate_logit": (P, 1)}),
        (gp.prompt_gate_, {"gate_logit": (B, 1, 1)}),
        (gp.prompt_gate_, {"gate_logit": (B, P, D)}),
        (gp.prompt_gate_linear_, {"weight": (1, D), "bias": (1,)}),
        (gp.prompt_gate_linear_, {"bias": (1,), "weight": (1, D)}),
    ],
)
def test_gate_beside_the_written_rows(function, shapes, is_before):
    """The gate may be adjacent in memory to the written rows, as an allocator may place it."""
    rows, sizes = B * P * D, [torch.Size(shape).numel() for shape in shapes.values()]
    buffer = torch.randn(sum(sizes) + rows)
    parts = buffer.split([*sizes, rows] if is_before else [rows, *sizes])
    h, gate = (parts[-1], parts[:-1]) if is_before else (parts[0], parts[1:])
    h = h.view(B, P, D)
    arguments = {"block_out": h, "block_in": torch.randn(B, P, D), "start": 0, "length": P}
    arguments |= {name: t.view(shapes[name]) for name, t in zip(shapes, gate, strict=True)}
    copies = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    assert torch.equal(function(**arguments), function(**copies))


def test_weight_of_a_gemm_may_be_anywhere():
    """The GEMM reads its weight before the first write."""
    arguments = good_arguments(gp.prompt_gate_linear_)
    h = arguments["block_out"] = torch.randn(B, 4, D)
    arguments |= {"weight": h[0], "bias": h[1, 0], "start": 0, "length": 4, "block_in": h.clone()}
    copies = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    assert torch.equal(gp.prompt_gate_linear_(**arguments), gp.prompt_gate_linear_(**copies))


def leaf_view(h):
    return h.clone().requires_grad_()[:]


def unbound(h):
    return torch.stack([h, h]).requires_grad_().mul(1).unbind(0)[0]


def chunked(h):
    return torch.cat([h, h]).requires_grad_().mul(1).chunk(2)[0]


def view_under_no_grad(h):
    base = h.clone().requires_grad_() * 1
    with torch.no_grad():
        return base[:]


@pytest.mark.parametrize("function", IN_PLACE)
@pytest.mark.parametrize("make", [leaf_view, unbound, chunked, view_under_no_grad])
def test_views_that_autograd_refuses_are_refused_before_the_write(make, function):
    arguments = good_arguments(function)
    arguments["block_out"] = make(arguments["block_out"])
    before = arguments["block_out"].detach().clone()
    instead = function.__name__.rstrip("_")
    with pytest.raises(RuntimeError, match=rf"block_out is a (view|leaf) .*use {instead}$"):
        function(**arguments)
    assert torch.equal(arguments["block_out"], before)


@pytest.mark.parametrize(
    ("function", "name"),
    [(gp.prompt_gate_, "gate_logit"), *((gp.prompt_gate_linear_, n) for n in ("weight", "bias"))],
)
def test_inference_gate_is_refused_before_the_write(function, name):
    arguments = good_arguments(function)
    with torch.inference_mode():
        arguments[name] = arguments[name].clone()
    block_out = arguments["block_out"].requires_grad_() * 1
    before = block_out.detach().clone()
    with pytest.raises(RuntimeError, match=f"{name}.* is an inference tensor"):
        function(**{**arguments, "block_out": block_out})
    assert torch.equal(block_out, before)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (function, name)
        for function in OUT_OF_PLACE
        for name in ("block_out", "block_in", "gate_logit", "weight", "bias")
        if name in good_arguments(function)
    ],
)
def test_negative_views_are_read_but_not_written(function, name):
    arguments = good_arguments(function)
    wanted = function(**arguments)
    arguments[name] = torch.complex(arguments[name], -arguments[name]).conj().imag
    assert arguments[name].is_neg()
    assert torch.equal(function(**arguments), wanted)
    if name == "block_out":
        with pytest.raises(RuntimeError, match="block_out is a negative view"):
            getattr(gp, function.__name__ + "_")(**arguments)


def test_overlap_outside_the_prompt_rows_is_fine():
    """Rows of block_in outside the slice are not read and may share memory with block_out."""
    buffer = torch.randn(1, 2 * N, D)
    block_out, block_in = buffer[:, :N], buffer[:, P : N + P]
    wanted = gp.prompt_gate(block_out.clone(), block_in.clone(), torch.tensor(0.0), START, P)
    gp.prompt_gate_(block_out, block_in, torch.tensor(0.0), START, P)
    assert torch.equal(block_out[:, START : START + P], wanted[:, START : START + P])


def test_numpy_integers_are_not_silently_taken():
    with pytest.raises(TypeError, match="start must be an int, got int64"):
        gp.prompt_gate(**{**good_arguments(), "start": np.int64(1)})


def test_kernels_that_are_not_there_are_named_with_the_cure(monkeypatch):
    monkeypatch.setattr(ops, "cuda_unavailable_reason", "it was built without CUDA")
    ops.require_kernels("prompt_gate", torch.device("cpu"))
    with pytest.raises(
        RuntimeError, match=r"on cuda:1, but it was built without CUDA.*pip install"
    ):
        ops.require_kernels("prompt_gate", torch.device("cuda:1"))
    with pytest.raises(RuntimeError, match="device type must be cpu or cuda, got xpu"):
        ops.require_kernels("prompt_gate", torch.device("xpu"))


@pytest.mark.skipif(torch.version.cuda is None, reason="a CPU-only torch cannot make a CUDA tensor")
@pytest.mark.parametrize("function", OUT_OF_PLACE + IN_PLACE)
def test_cuda_tensor_without_cuda_kernels(function, monkeypatch):
    """Passes fake CUDA tensors, with the traced path that would accept them switched off."""
    reason = "gated_prompt was built without CUDA"
    monkeypatch.setattr(ops, "cuda_unavailable_reason", reason)
    monkeypatch.setattr(functional, "is_traced", lambda *tensors: False)
    with FakeTensorMode():
        arguments = {
            name: torch.empty(value.shape, device="cuda") if torch.is_tensor(value) else value
            for name, value in good_arguments(function).items()
        }
    with pytest.raises(
        RuntimeError,
        match=rf"{function.__name__}: got a tensor on cuda:0, but {reason}.*pip install",
    ):
        function(**arguments)


def test_gpu_whose_architecture_was_not_built(monkeypatch):
    """Replaces the build info and the GPU's capability, so that no such GPU is needed."""
    monkeypatch.setattr(ops, "cuda_unavailable_reason", None)
    monkeypatch.setattr(ops, "build_info", lambda: {"architectures": "8.0,9.0"})
    for capability, runs in (((8, 6), True), ((9, 0), True), ((7, 5), False), ((10, 0), False)):
        ops._lacking_architecture.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, c=capability: c)
        if runs:
            ops.require_kernels("prompt_gate", torch.device("cuda:0"))
            continue
        with pytest.raises(RuntimeError, match=r"on cuda:0, .* (7\.5|10\.0) .*8\.0,9\.0"):
            ops.require_kernels("prompt_gate", torch.device("cuda:0"))
    ops._lacking_architecture.cache_clear()


def not_built(path):
    path.unlink()


def emptied(path):
    path.write_bytes(b"")


def not_a_library(path):
    path.write_bytes(b"<!DOCTYPE html>" * 1000)


def of_another_torch(path):
    """Makes the module need a function that torch does not have."""
    path.write_bytes(
        path.read_bytes().replace(b"torch_get_storage_size", b"torch_got_storage_size")
    )


@pytest.mark.parametrize("spoil", [not_built, emptied, not_a_library, of_another_torch])
def test_compiled_module_that_does_not_load(spoil, tmp_path):
    """The ImportError has the running torch's version, the loader's reason and the remedy."""
    package = pathlib.Path(gp.__file__).parent
    shutil.copytree(package, tmp_path / "gated_prompt", ignore=shutil.ignore_patterns("*_cuda.*"))
    (library,) = (tmp_path / "gated_prompt").glob("_C.*")
    spoil(library)
    site = pathlib.Path(torch.__file__).parents[1]
    done = subprocess.run(
        # -S: without the finder of an editable install, which has another path
        [sys.executable, "-S", "-c", "import gated_prompt"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{site}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr  # not killed by a signal
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ImportError: gated_prompt: the compiled module gated_prompt._C does not"
    )
    assert torch.__version__ in last
    assert "pip install" in last
    reason = {
        not_built: "cannot import name|No module named",
        emptied: "file too short",
        not_a_library: "invalid ELF header",
        of_another_torch: "undefined symbol: aoti_torch_got_storage_size",
    }[spoil]
    assert re.search(reason, last)


CONVERTED = """
import torch
import gated_prompt as gp

def cut(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor

h = torch.randn(2, 5, 4)
zero, rows, weight, bias = torch.zeros(()), torch.randn(2, 2, 4), torch.randn(4, 4), torch.randn(4)
for name, call in {
    "block_in": lambda: gp.prompt_gate(h.double(), cut(rows.clone()), zero, 1, 2),
    "block_in ": lambda: gp.prompt_gate_(h.half(), cut(rows.bfloat16()), zero, 1, 2),
    "weight": lambda: gp.prompt_gate_linear(h.double(), h.double(), cut(weight.clone()), bias, 1, 2),
    "weight ": lambda: gp.prompt_gate_linear(h.half(), h.half(), cut(weight[:1].clone()), None, 1, 2),
    "bias": lambda: gp.prompt_gate_linear_(h.double(), h.double(), weight, cut(bias.clone()), 1, 2),
}.items():
    try:
        call()
    except RuntimeError as error:
        assert f"{name.strip()} reaches" in str(error), f"{name}: {error}"
    else:
        raise AssertionError(name)
"""


def test_freed_tensors_are_not_read_to_convert_them():
    """Runs in a subprocess: aten would read freed memory and crash."""
    done = subprocess.run([sys.executable, "-c", CONVERTED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"signal {-done.returncode}"


# ---- raw ops are memory-safe without the Python checks ----


def raw_arguments():
    arguments = good_arguments()
    rows = arguments["block_in"][:, START : START + P]
    return [arguments["block_out"], rows, arguments["gate_logit"], START, P, True, True]


OTHER_SEQUENCE = [
    (0, torch.randn(5, 4), "block_out must have 3 dimensions, got 2"),
    (0, torch.zeros(B, N, D, dtype=torch.int32), "block_out must be float64.* scalar type"),
    (0, freed(torch.zeros(B, N, D)), "block_out reaches 160 bytes into a storage of 0"),
    (0, torch.zeros(()).expand(B, N, D), "overlap themselves"),
    (1, torch.randn(P, D), "block_in must have 3 dimensions, got 2"),
    (1, torch.randn(B, P + 1, D), r"block_in must be \[2, 2, 4\], got \[2, 3, 4\]"),
    (1, torch.randn(B, P, D, dtype=torch.float64), "no kernel"),
    (1, freed(torch.zeros(B, P, D)), "block_in reaches 64 bytes into a storage of 0"),
]
OTHER_SLICE = [(-1, P), (4, P), (START, -1), (START, 2**62), (2**63 - 1, 2**63 - 1), (-(2**63), 1)]


@pytest.mark.parametrize(
    ("index", "value", "pattern"),
    [
        *OTHER_SEQUENCE,
        (2, torch.zeros(1, 1, 1, 1), "gate_logit must have at most 3 dimensions, got 4"),
        (2, torch.zeros(3), "gate_logit must broadcast to .* got size 3 for 4"),
        (2, torch.zeros(3, 1), "gate_logit must broadcast to .* got size 3 for 2"),
        (2, torch.zeros(3, 1, 1), "gate_logit must broadcast to .* got size 3 for 2"),
        (2, torch.zeros(4, dtype=torch.int64), "gate_logit must be float64.* scalar type"),
        (2, freed(torch.zeros(4)), "gate_logit reaches 16 bytes into a storage of 0"),
    ],
)
def test_raw_forward_is_memory_safe_on_its_own(index, value, pattern):
    arguments = raw_arguments()
    arguments[index] = value
    with pytest.raises(RuntimeError, match=pattern):
        torch.ops.gated_prompt.prompt_gate_fwd_(*arguments)


@pytest.mark.parametrize(
    ("index", "value", "pattern"),
    [
        *OTHER_SEQUENCE,
        (2, torch.zeros(1, D), "weight must have 1 dimensions, got 2"),
        (2, torch.zeros(D + 1), r"weight must be \[4\], got \[5\]"),
        (2, freed(torch.zeros(D)), "weight reaches 16 bytes into a storage of 0"),
        (3, torch.zeros(()), "bias must have 1 dimensions, got 0"),
        (3, torch.zeros(2), r"bias must be \[1\], got \[2\]"),
        (3, torch.zeros(1, dtype=torch.bool), "bias must be float64.* scalar type"),
        (3, freed(torch.zeros(1)), "bias reaches 4 bytes into a storage of 0"),
    ],
)
def test_raw_linear_forward_is_memory_safe_on_its_own(index, value, pattern):
    out, rows, _, start, length, mix, _ = raw_arguments()
    arguments = [out, rows, torch.ones(D), torch.ones(1), start, length, mix, True, True, True]
    arguments[index] = value
    with pytest.raises(RuntimeError, match=pattern):
        torch.ops.gated_prompt.prompt_gate_linear_token_fwd_(*arguments)


def backward_arguments():
    grad, saved = torch.randn(B, N, D), torch.randn(B, P, D)
    flags = (True, True, True, True, False, torch.float32)
    return [grad, saved, torch.tensor(0.0), None, START, P, *flags]


@pytest.mark.parametrize(
    ("index", "value", "pattern"),
    [
        OTHER_SEQUENCE[0],
        OTHER_SEQUENCE[2],
        OTHER_SEQUENCE[3],
        (1, torch.randn(B, P, D + 1), r"saved must be \[2, 2, 4\], got \[2, 2, 5\]"),
        (1, torch.randn(0), "saved must have 3 dimensions, got 1"),
        (1, torch.randn(B, D, P).transpose(1, 2), "saved must be contiguous"),
        (1, torch.randn(B, P, D).double(), "dtype of the gradient"),
        (2, torch.zeros(3), "gate_logit must broadcast"),
        (3, torch.zeros(B, N, D), r"grad_carrier must be \[2, 2, 4\], got \[2, 5, 4\]"),
        (3, torch.zeros(B, P, D).double(), "grad_carrier must have the dtype"),
        (3, freed(torch.zeros(B, P, D)), "grad_carrier reaches 64 bytes into a storage of 0"),
        (10, True, r"a bias needs a gate_logit \[B, P, D\]"),
        (11, torch.float64, "no kernel"),
        (11, torch.int64, "scalar type"),
    ],
)
def test_raw_backward_is_memory_safe_on_its_own(index, value, pattern):
    arguments = backward_arguments()
    arguments[index] = value
    with pytest.raises(RuntimeError, match=pattern):
        torch.ops.gated_prompt.prompt_gate_bwd_(*arguments)


@pytest.mark.parametrize(("index", "name"), [(1, "saved"), (2, "gate_logit"), (3, "grad_carrier")])
def test_raw_backward_refuses_to_read_what_it_writes(index, name):
    arguments = backward_arguments()
    arguments[0] = torch.zeros(64).as_strided((B, N, D), (N * D, D, 1))
    arguments[index] = torch.as_strided(arguments[0], (B, P, D), (P * D, D, 1), D)
    with pytest.raises(RuntimeError, match=f"{name} lies among the prompt rows"):
        torch.ops.gated_prompt.prompt_gate_bwd_(*arguments)


@pytest.mark.parametrize(("start", "length"), OTHER_SLICE)
def test_raw_ops_refuse_a_slice_outside_the_sequence(start, length):
    forward, backward = raw_arguments(), backward_arguments()
    forward[3:5] = backward[4:6] = start, length
    linear = [*forward[:2], torch.ones(D), None, start, length, True, True, True, True]
    for op, arguments in (
        (torch.ops.gated_prompt.prompt_gate_fwd_, forward),
        (torch.ops.gated_prompt.prompt_gate_linear_token_fwd_, linear),
        (torch.ops.gated_prompt.prompt_gate_bwd_, backward),
    ):
        with pytest.raises(RuntimeError, match="outside N=5"):
            op(*arguments)
