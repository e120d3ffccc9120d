# SPDX-License-Identifier: Apache-2.0
"""Laws of the raw op scaled_dot: values against float64, layouts, bits, bad inputs."""

import itertools

import pytest
import torch
from conftest import assert_within_rule
from torch._subclasses import FakeTensorMode

scaled_dot = torch.ops.gated_prompt.scaled_dot

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MIXED = [(torch.float32, narrow) for narrow in DTYPES[2:]]
PAIRS = [(t, t) for t in DTYPES] + MIXED + [pair[::-1] for pair in MIXED]

# Each function makes a [B, N, H, d] tensor. To test another layout, add a row.
LAYOUTS = {
    "contiguous": lambda b, n, h, d: torch.randn(b, n, h, d),
    "packed_qkv": lambda b, n, h, d: torch.randn(b, n, 3, h, d)[:, :, 0],
    "packed_v": lambda b, n, h, d: torch.randn(b, n, 3, h, d)[:, :, 2],
    "heads_first": lambda b, n, h, d: torch.randn(b, h, n, d).transpose(1, 2),
    "seq_first": lambda b, n, h, d: torch.randn(n, b, h, d).transpose(0, 1),
    "channels_first": lambda b, n, h, d: torch.randn(b, h, d, n).permute(0, 3, 1, 2),
    "odd_offset": lambda b, n, h, d: torch.randn(b * n * h * d + 1)[1:].view(b, n, h, d),
    "odd_rows": lambda b, n, h, d: torch.randn(b, n, h, d + 1)[..., :d],
    "every_second": lambda b, n, h, d: torch.randn(b, n, h, 2 * d)[..., ::2],
    "every_second_token": lambda b, n, h, d: torch.randn(b, 2 * n, h, d)[:, ::2],
    "one_sample": lambda b, n, h, d: torch.randn(1, n, h, d).expand(b, n, h, d),
    "one_channel": lambda b, n, h, d: torch.randn(b, n, h, 1).expand(b, n, h, d),
    "one_element": lambda b, n, h, d: torch.randn(()).expand(b, n, h, d),
}


def to(tensor, dtype, device):
    """Converts the whole storage of `tensor`, so that strides and offset stay the same."""
    flat = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
    flat = flat.to(device=device, dtype=dtype)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def make(shape, layouts=("packed_qkv", "contiguous"), dtypes=DTYPES[1:2] * 2, device="cpu"):
    return [to(LAYOUTS[la](*shape), t, device) for la, t in zip(layouts, dtypes, strict=True)]


def check(a, b, temperature):
    """Compares with float64. Inputs are exact, so only sums and the result have been rounded."""
    tau = temperature.double()
    products = a.double() * b.double()
    compute = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    eager = -(a.to(compute) * b.to(compute)).sum() / tau.to(compute)
    got = scaled_dot(a, b, temperature)
    assert got.device == a.device
    assert got.is_contiguous()
    assert_within_rule(
        "scaled_dot",
        got,
        reference=(-1 / tau * products.sum()),
        eager=eager.to(temperature.dtype),
        terms=products.abs().sum() / tau.abs(),
        backward=True,
        reduced=True,
        dtype=compute,
    )
    return got


# ---- values ----


@pytest.mark.parametrize("shape", [(2, 5, 3, 7), (3, 37, 12, 64)])
@pytest.mark.parametrize("temperature_dtype", DTYPES)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_every_dtype_equals_float64(device, dtypes, temperature_dtype, shape):
    for value in (0.07, 1.0, 9.5, -2.0):
        temperature = torch.tensor(value, dtype=temperature_dtype, device=device)
        check(*make(shape, dtypes=dtypes, device=device), temperature)


@pytest.mark.parametrize("dtypes", PAIRS[1:5], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_pair_of_layouts_equals_float64(device, layout, dtypes):
    temperature = torch.tensor(1.3, device=device)
    for other, shape in itertools.product(LAYOUTS, ((2, 5, 3, 7), (3, 7, 4, 16))):
        check(*make(shape, (layout, other), dtypes, device), temperature)


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 36, 64, 96, 1023, 1025, 5000])
def test_odd_sizes_equal_float64(device, dim):
    temperature = torch.tensor(0.9, device=device)
    for layouts in itertools.product(("packed_qkv", "contiguous", "heads_first"), repeat=2):
        for shape, dtypes in itertools.product(((1, 1, 1, dim), (3, 11, 2, dim)), PAIRS[1:3]):
            check(*make(shape, layouts, dtypes, device), temperature)


@pytest.mark.parametrize("dims", [0, 1, 2, 3, 4])
def test_up_to_four_dimensions(device, dims):
    a, b = torch.randn(2, *(6, 5, 4, 3)[:dims], device=device)
    check(a, b, torch.tensor(1.3, device=device))
    check(a.T if dims == 2 else a, b.T if dims == 2 else b, torch.tensor(1.3, device=device))


@pytest.mark.parametrize("dtype", DTYPES[1:3])
@pytest.mark.parametrize("layout", ["contiguous", "heads_first", "channels_first"])
def test_many_tasks_of_one_sign_equal_float64(device, layout, dtype):
    """All terms have one sign, so a float32 sum over too many of them would lose digits."""
    a, b = make((8, 247, 12, 64), ("packed_qkv", layout), (dtype, dtype), device)
    check(a.abs(), b.abs(), torch.tensor(1.3, device=device))


def test_products_beyond_float16_do_not_overflow(device):
    a = torch.full((2, 3, 4, 8), 300.0, dtype=torch.float16, device=device)
    got = scaled_dot(a, -a, torch.tensor(2.0, device=device))
    assert got.item() == 90000 * a.numel() / 2


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_result_has_shape_and_dtype_of_the_temperature(device, shape, dtype):
    temperature = torch.full(shape, 1.5, dtype=dtype, device=device)
    got = scaled_dot(*make((2, 3, 2, 4), device=device), temperature)
    assert (got.shape, got.dtype) == (temperature.shape, dtype)
    got = scaled_dot(*make((2, 0, 2, 4), device=device), temperature)
    assert (got.shape, got.dtype) == (temperature.shape, dtype)


def test_a_temperature_in_a_larger_tensor(device):
    temperatures = torch.tensor([9.0, 2.0, 9.0], device=device)
    a, b = make((2, 3, 2, 4), device=device)
    wanted = scaled_dot(a, b, torch.tensor(2.0, device=device))
    assert torch.equal(scaled_dot(a, b, temperatures[1]), wanted)
    assert torch.equal(scaled_dot(a, b, temperatures[1:2].expand(1)), wanted[None])


@pytest.mark.parametrize("shape", [(0,), (0, 5, 3, 7), (2, 0, 3, 7), (2, 5, 0, 7), (2, 5, 3, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_tensors_give_zero(device, dtype, shape):
    a = torch.empty(shape, dtype=dtype, device=device)
    assert scaled_dot(a, a, torch.tensor(0.5, dtype=dtype, device=device)).item() == 0


def test_inf_and_nan_propagate(device):
    inf, nan = float("inf"), float("nan")
    for value, at in itertools.product(
        (inf, -inf, nan), ((0, 0, 0, 0), (1, 3, 2, 1), (2, 6, 3, 3))
    ):
        for layout in ("contiguous", "heads_first"):
            a, b = make((3, 7, 4, 4), ("packed_qkv", layout), device=device)
            a[at] = value
            for temperature in (2.0, -2.0, 0.0, inf, nan):
                tau = torch.tensor(temperature, device=device)
                wanted = -(1 / tau) * (a * b).sum()
                got = scaled_dot(a, b, tau)
                torch.testing.assert_close(got, wanted, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_lazy_negatives_are_resolved(device, dtype):
    a, b = make((2, 3, 2, 8), dtypes=(dtype, dtype), device=device)
    temperature = torch.tensor(1.3, device=device)
    assert torch.equal(
        scaled_dot(torch._neg_view(a), b, temperature), -scaled_dot(a, b, temperature)
    )


def test_is_the_gradient_of_a_temperature(device):
    """Equals autograd's gradient of a temperature that divides the queries."""
    q, weight = make((2, 5, 3, 8), dtypes=DTYPES[:1] * 2, device=device)
    temperature = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)
    scaled = q / temperature
    scaled.retain_grad()
    (scaled.sin() * weight).sum().backward()
    got = scaled_dot(scaled.detach(), scaled.grad, temperature.detach())
    torch.testing.assert_close(got, temperature.grad, rtol=1e-12, atol=0)


def test_inputs_are_not_written(device):
    inputs = [*make((2, 5, 3, 8), device=device), torch.tensor(1.3, device=device)]
    before = [t.clone() for t in inputs]
    scaled_dot(*inputs)
    assert all(torch.equal(t, copy) for t, copy in zip(inputs, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[1:3])
def test_positions_beyond_2_31_elements(dtype):
    """Large strides suffice: only a few pages of the address space are touched."""
    far = 2**31 + 64
    a = torch.empty(far + 64, dtype=dtype).as_strided((2, 4, 8), (far, 8, 1)).normal_()
    b = torch.randn(2, 4, 8, dtype=dtype)
    temperature = torch.tensor(1.3)
    assert torch.equal(scaled_dot(a, b, temperature), scaled_dot(a.clone(), b, temperature))


# ---- bits ----


@pytest.mark.parametrize("dtypes", PAIRS[:5], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "heads_first", "channels_first"])
def test_twenty_runs_give_the_same_bits(device, layout, dtypes):
    a, b = make((4, 60, 12, 64), ("packed_qkv", layout), dtypes, device)
    temperature = torch.tensor(1.3, dtype=torch.float64, device=device)
    assert len({scaled_dot(a, b, temperature).item() for _ in range(20)}) == 1


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield (1, 2, 3)
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtypes", PAIRS[:5], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "heads_first", "channels_first"])
def test_any_number_of_threads_gives_the_same_bits(layout, dtypes, threads):
    a, b = make((4, 247, 12, 64), ("packed_qkv", layout), dtypes)
    results = set()
    for number in threads:
        torch.set_num_threads(number)
        results.add(scaled_dot(a, b, torch.tensor(1.3, dtype=torch.float64)).item())
    assert len(results) == 1


def test_order_of_the_operands_does_not_matter(device):
    temperature = torch.tensor(1.3, dtype=torch.float64, device=device)
    for dtypes in PAIRS:
        a, b = make((3, 37, 12, 64), ("packed_qkv", "heads_first"), dtypes, device)
        assert torch.equal(scaled_dot(a, b, temperature), scaled_dot(b, a, temperature))


@pytest.mark.cuda
@pytest.mark.parametrize("layout", ["contiguous", "heads_first"])
def test_a_captured_graph_gives_the_same_bits(layout):
    a, b = make((4, 60, 12, 64), ("packed_qkv", layout), device="cuda")
    temperature = torch.tensor(1.3, device="cuda")
    wanted = scaled_dot(a, b, temperature)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = scaled_dot(a, b, temperature)
    for factor in (1.0, 2.0, 2.0):
        temperature.mul_(factor)
        wanted = wanted / factor
        got.zero_()
        graph.replay()
        assert torch.equal(got, wanted)


@pytest.mark.cuda
def test_launches_on_two_streams_do_not_disturb_each_other():
    a, b = make((8, 247, 12, 64), device="cuda")
    temperature = torch.tensor(1.3, device="cuda")
    wanted = scaled_dot(a, b, temperature)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(scaled_dot(a, b, temperature))
    torch.cuda.synchronize()
    assert all(torch.equal(result, wanted) for result in results)


@pytest.mark.cuda
def test_more_than_2_31_elements_on_cuda():
    a = torch.ones(2**31 + 9, dtype=torch.bfloat16, device="cuda")
    tau = torch.tensor(-1.0, dtype=torch.float64, device="cuda")
    assert scaled_dot(a[1:], a[:-1], tau).item() == 2**31 + 8


# ---- opcheck, meta and fake tensors ----


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_opcheck_of_the_raw_op(device, dtypes):
    for layout, shape in itertools.product(("contiguous", "heads_first"), ((), (1,))):
        a, b = make((2, 5, 3, 8), ("packed_qkv", layout), dtypes, device)
        for dtype in DTYPES:
            temperature = torch.full(shape, 1.5, dtype=dtype, device=device)
            torch.library.opcheck(scaled_dot.default, (a, b, temperature))


def test_meta_tensors_give_the_shape():
    for dtype in DTYPES:
        a = torch.empty(2, 5, 3, 8, dtype=torch.bfloat16, device="meta")
        got = scaled_dot(a, a, torch.empty(1, dtype=dtype, device="meta"))
        assert (got.is_meta, got.shape, got.dtype) == (True, (1,), dtype)
    with FakeTensorMode():
        a = torch.empty(2, 5, 3, 8)
        assert scaled_dot(a, a, torch.empty(())).shape == ()


# ---- bad inputs ----


def freed(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


# id: (what replaces the good arguments, pattern of the message)
BAD = {
    "b_of_other_size": (
        {"b": lambda b: b[:, :4]},
        "b must have .* of a, got 4 in dimension 1, not 5",
    ),
    "b_that_would_broadcast": ({"b": lambda b: b[:1]}, "b must .* got 1 in dimension 0, not 2"),
    "b_of_fewer_dimensions": ({"b": lambda b: b[0]}, "b must .* of a, got 3 dimensions, not 4"),
    "5d_b": ({"b": lambda b: b[None]}, "b must have at most 4 dimensions, got 5"),
    "5d_a": ({"a": lambda a: a[None]}, "a must have at most 4 dimensions, got 5"),
    "int_a": ({"a": lambda a: a.int()}, "a must be float64, float32, bfloat16 or float16, got"),
    "int_b": ({"b": lambda b: b.int()}, "b must be float64, float32, bfloat16 or float16, got"),
    "complex_b": ({"b": lambda b: b.cfloat()}, "b must be float64, .* got"),
    "float8_a": ({"a": lambda a: a.to(torch.float8_e4m3fn)}, "a must be float64, .* got"),
    "float64_beside_float32": ({"b": lambda b: b.double()}, "a and b must have one dtype, or"),
    "float16_beside_bfloat16": (
        {"a": lambda a: a.half(), "b": lambda b: b.bfloat16()},
        "a and b must have one dtype, or",
    ),
    "two_temperatures": (
        {"temperature": lambda t: t.expand(2)},
        "temperature must have one element, got 2",
    ),
    "no_temperature": (
        {"temperature": lambda t: t.new_empty(0)},
        "temperature must have one element, got 0",
    ),
    "int_temperature": ({"temperature": lambda t: t.int()}, "temperature must be float64, .* got"),
    "freed_a": ({"a": freed}, "a reaches 480 bytes into a storage of 0 bytes"),
    "freed_b": ({"b": freed}, "b reaches 480 bytes into a storage of 0 bytes"),
    "freed_temperature": (
        {"temperature": freed},
        "temperature reaches 4 bytes into a storage of 0",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_inputs_say_what_is_wrong(device, changes, message):
    shape = (2, 5, 3, 4)
    inputs = {name: torch.randn(shape, device=device) for name in "ab"}
    inputs["temperature"] = torch.tensor([1.3], device=device)
    inputs |= {name: change(inputs[name]) for name, change in changes.items()}
    with pytest.raises(RuntimeError, match="scaled_dot: " + message):
        scaled_dot(**inputs)


@pytest.mark.parametrize("which", range(3))
def test_a_tensor_on_meta_beside_the_others_raises(which):
    inputs = [torch.randn(2, 3), torch.randn(2, 3), torch.tensor(1.3)]
    inputs[which] = inputs[which].to("meta")
    with pytest.raises(
        RuntimeError, match="scaled_dot: a, b and temperature must be on one device"
    ):
        scaled_dot(*inputs)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("which", "message"),
    [
        (0, "a must be on CUDA"),
        (1, "b is not on the device of a"),
        (2, "temperature is not on the device of a"),
    ],
)
def test_a_tensor_on_the_cpu_beside_cuda_raises(which, message):
    inputs = [t.cuda() for t in (torch.randn(2, 3), torch.randn(2, 3), torch.tensor(1.3))]
    inputs[which] = inputs[which].cpu()
    with pytest.raises(RuntimeError, match="scaled_dot: " + message):
        scaled_dot(*inputs)
