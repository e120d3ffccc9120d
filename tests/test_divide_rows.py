# SPDX-License-Identifier: Apache-2.0
"""Tests of the raw op divide_rows: bit equality with aten, layouts, clamping, bad inputs."""

import itertools

import pytest
import torch
from torch._subclasses import FakeTensorMode

divide_rows = torch.ops.gated_prompt.divide_rows

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PAIRS = [(t, t) for t in DTYPES] + [(torch.float32, narrow) for narrow in DTYPES[2:]]
SHAPES = [(6, 5), (1, 1), (24, 16), (192, 64), (2304, 768), (7, 1000)]


def wanted(weight, bias, temperature, rows, dtype):
    """The expected results by aten, in float32 or wider, so that each element is rounded once. On
    CUDA, aten casts a scalar temperature to bfloat16 before it divides."""
    tau = temperature.clamp(0.01, 10.0)
    results = []
    for tensor in (weight, bias):
        wide = torch.promote_types(tensor.dtype, torch.float32)
        new = tensor.to(dtype, copy=True)
        new[:rows] = tensor[:rows].to(wide) / tau.reshape(()).to(wide)
        results.append(new)
    return *results, tau


def make(shape, dtype, device="cpu"):
    return torch.randn(shape, device=device).to(dtype), torch.randn(shape[0], device=device).to(
        dtype
    )


def check(weight, bias, temperature, rows, dtype):
    before = weight.clone(), bias.clone(), temperature.clone()
    got = divide_rows(weight, bias, temperature, rows, 0.01, 10.0, dtype)
    for name, new, exact in zip(
        ("weight", "bias", "temperature"),
        got,
        wanted(weight, bias, temperature, rows, dtype),
        strict=True,
    ):
        assert new.is_contiguous(), name
        assert new.dtype == exact.dtype, name
        assert torch.equal(new, exact), name
    assert all(torch.equal(a, b) for a, b in zip((weight, bias, temperature), before, strict=True))
    assert torch.equal(divide_rows(weight, None, temperature, rows, 0.01, 10.0, dtype)[0], got[0])
    return got


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bits_are_not_those_of_aten_on_cuda(dtype):
    """Reproduces both divisions on the CPU, where aten keeps a scalar temperature in float32."""
    weight, bias = make((24, 16), dtype)
    tau = torch.tensor([0.73])
    exact = wanted(weight, bias, tau, 24, dtype)[0]
    assert torch.equal(weight / tau.reshape(()), exact)
    assert not torch.equal(weight / tau.to(dtype), exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_the_bits_of_aten(device, dtypes, shape):
    weight, bias = make(shape, dtypes[0], device)
    for rows in {0, 1, shape[0] // 3, shape[0]}:
        for value in (0.73, 1.0, 3.7):
            temperature = torch.tensor([value], device=device)
            check(weight, bias, temperature, rows, dtypes[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("value", [-3.0, 0.0, 0.01, 0.02, 9.9, 10.0, 12.0, float("inf")])
def test_the_temperature_is_clamped_in_its_dtype(device, value, shape, dtype):
    temperature = torch.full(shape, value, dtype=dtype, device=device)
    check(*make((6, 8), torch.float32, device), temperature, 2, torch.float32)


def test_nan_stays_where_it_belongs(device):
    weight, bias = make((6, 8), torch.float32, device)
    weight[4, 1] = float("nan")
    temperature = torch.tensor(float("nan"), device=device)
    for dtype in DTYPES[1:]:
        new, new_bias, tau = divide_rows(weight, bias, temperature, 2, 0.01, 10.0, dtype)
        assert torch.cat([new[:2].flatten(), new_bias[:2], tau.to(dtype).view(1)]).isnan().all()
        assert new[2:].isnan().sum() == 1
        assert new[4, 1].isnan()
        assert torch.equal(new_bias[2:], bias[2:].to(dtype))


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_any_offset(device, dtypes):
    """Slices of larger tensors at any alignment, like the parts of a packed weight."""
    memory, biases = make((200, 24), dtypes[0], device)
    temperature = torch.tensor([9.0, 1.7, 9.0], device=device)[1:2]
    for offset in range(9):
        weight = memory.view(-1)[offset : offset + 24 * 24].view(24, 24)
        check(weight, biases[offset : offset + 24], temperature, 8, dtypes[1])


def test_empty(device):
    temperature = torch.tensor(2.0, device=device)
    for shape in ((0, 4), (4, 0)):
        check(*make(shape, torch.float32, device), temperature, 0, torch.bfloat16)


def test_any_number_of_threads_gives_the_same_bits():
    weight, bias = make((2304, 768), torch.float32)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            temperature = torch.tensor([0.7])
            found.append(divide_rows(weight, bias, temperature, 768, 0.01, 10.0, torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


def test_opcheck(device):
    for (from_, to), bias in itertools.product(PAIRS, (True, False)):
        weight, with_bias = make((6, 8), from_, device)
        temperature = torch.tensor([0.7], device=device)
        arguments = weight, with_bias if bias else None, temperature, 2, 0.01, 10.0, to
        torch.library.opcheck(divide_rows.default, arguments)


def test_fake_tensors_have_the_shapes():
    with FakeTensorMode():
        weight, bias, tau = divide_rows(
            torch.empty(6, 8), torch.empty(6), torch.empty(1), 2, 0.01, 10.0, torch.bfloat16
        )
    assert (weight.shape, bias.shape, tau.shape) == ((6, 8), (6,), (1,))
    assert (weight.dtype, bias.dtype, tau.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


GOOD = {
    "weight": torch.randn(6, 8),
    "bias": torch.randn(6),
    "temperature": torch.ones(1),
    "rows": 2,
    "low": 0.01,
    "high": 10.0,
    "dtype": torch.bfloat16,
}
FREED = torch.randn(6, 8)
FREED.untyped_storage().resize_(0)
BAD = {
    "weight of 3 dimensions": ({"weight": torch.randn(1, 6, 8)}, "weight must have 2 dimensions"),
    "strided weight": ({"weight": torch.randn(8, 6).T}, "weight must be contiguous"),
    "freed weight": ({"weight": FREED}, "storage of 0 bytes"),
    "integers": ({"weight": torch.ones(6, 8, dtype=torch.int64)}, "weight"),
    "longer bias": ({"bias": torch.randn(7)}, "bias must be contiguous, of weight's dtype"),
    "bias of another dtype": ({"bias": torch.randn(6).double()}, "bias must be contiguous, of"),
    "bias of 2 dimensions": ({"bias": torch.randn(6, 1)}, "bias must have 1 dimension, got 2"),
    "two temperatures": (
        {"temperature": torch.ones(2)},
        "temperature must have one element, got 2",
    ),
    "more rows": ({"rows": 7}, r"rows must be in \[0, 6\], got 7"),
    "fewer rows": ({"rows": -1}, r"rows must be in \[0, 6\], got -1"),
    "a wider result": ({"dtype": torch.float64}, "no kernel for these dtypes"),
    "bfloat16 to float16": (
        {"weight": GOOD["weight"].bfloat16(), "bias": None, "dtype": torch.float16},
        "no kernel for these dtypes",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs_raise(name):
    changes, message = BAD[name]
    with pytest.raises(RuntimeError, match=message):
        divide_rows(*(GOOD | changes).values())
