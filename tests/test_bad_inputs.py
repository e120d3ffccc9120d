# SPDX-License-Identifier: Apache-2.0
"""Bad inputs of the op: the right error, naming argument, wanted and got; and nothing written."""

import numpy as np
import pytest
import torch
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


# row of the table: name, what replaces the good arguments, error, pattern of the message
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
    (9, "logit [3]", {"gate_logit": lambda z: z.expand(3)}, ValueError, r"broadcast to \[B, P, D\] = \[2, 2, 4\], got \[3\]"),
    (9, "logit [N, 1]", {"gate_logit": lambda z: z.expand(5, 1)}, ValueError, r"gate_logit must broadcast .* got \[5, 1\]"),
    (9, "logit [P]", {"gate_logit": lambda z: z.expand(2)}, ValueError, r"gate_logit must broadcast .* got \[2\]"),
    (9, "logit 4-D", {"gate_logit": lambda z: z.expand(1, 1, 1, 1)}, ValueError, r"gate_logit must broadcast"),
    (10, "int logit", {"gate_logit": lambda z: z.long()}, TypeError, r"gate_logit must be .* got torch.int64"),
    (10, "bool logit", {"gate_logit": lambda z: z > 0}, TypeError, r"gate_logit must be .* got torch.bool"),
    (11, "meta block_in", {"block_in": lambda x: x.to("meta")}, RuntimeError, r"block_in must be on the device of block_out, cpu, got meta"),
    (11, "meta logit", {"gate_logit": lambda z: z.to("meta")}, RuntimeError, r"gate_logit must be on .* cpu, got meta"),
    (11, "meta block_out", {"block_out": lambda h: h.to("meta")}, RuntimeError, r"device of block_out, meta, got cpu"),
    *[
        (12, f"{how} {name}", {name: lambda t, how=how: sparse(t, how)}, NotImplementedError, rf"{name} must be a dense strided tensor, got")
        for how in ("coo", "csr", "mkldnn", "nested", "jagged", "quantized")
        for name in ("block_out", "block_in")
    ],
    (13, "numpy block_out", {"block_out": lambda h: h.numpy()}, TypeError, r"block_out must be a torch.Tensor, got ndarray"),
    (13, "list block_in", {"block_in": lambda x: x.tolist()}, TypeError, r"block_in must be a torch.Tensor, got list"),
    (13, "None block_in", {"block_in": lambda x: None}, TypeError, r"block_in must be a torch.Tensor, got NoneType"),
    (13, "float logit", {"gate_logit": lambda z: -5.0}, TypeError, r"gate_logit must be a torch.Tensor, got float"),
    (14, "freed block_out", {"block_out": freed}, RuntimeError, r"block_out reaches 160 bytes into a storage of 0 bytes"),
    (14, "freed block_in", {"block_in": freed}, RuntimeError, r"block_in reaches .* storage of 0 bytes"),
    (14, "freed logit", {"gate_logit": freed}, RuntimeError, r"gate_logit reaches 4 bytes into a storage of 0 bytes"),
    (14, "small block_out", {"block_out": too_small}, RuntimeError, r"reaches 160 bytes into a storage of 159 bytes"),
    (14, "small rows", {"block_in": lambda x: too_small(x[:, :2].contiguous())}, RuntimeError, r"reaches 64 bytes"),
    (14, "freed full gate", {"gate_logit": lambda z: freed(z.expand(2, 4).contiguous())}, RuntimeError, r"gate_logit reaches 32 bytes"),
    (0, "unknown rule", {"rule": "lerp"}, ValueError, r"rule must be 'mix' or 'residual', got 'lerp'"),
]  # fmt: skip

# only in place: leaf, inference tensor, overlaps
BAD_IN_PLACE = [
    (15, "leaf that requires grad", {"block_out": lambda h: h.clone().requires_grad_()}, RuntimeError, "leaf that requires grad"),
    (16, "expanded block_out", {"block_out": lambda h: h[:1].expand(2, 5, 4)}, RuntimeError, "overlap themselves"),
    (16, "sliding window", {"block_out": lambda h: h.flatten().as_strided((2, 5, 4), (4, 4, 1))}, RuntimeError, "overlap themselves"),
]  # fmt: skip


def good_arguments():
    generator = torch.Generator().manual_seed(0)
    return {
        "block_out": torch.randn(B, N, D, generator=generator),
        "block_in": torch.randn(B, N, D, generator=generator),
        "gate_logit": torch.tensor(-0.5),
        "start": START,
        "length": P,
        "rule": "mix",
    }


def call_and_check(function, changes, error, pattern):
    arguments = good_arguments()
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    call = dict(arguments)
    for name, change in changes.items():
        call[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(error, match=pattern) as caught:
        function(**call)
    assert type(caught.value) is error
    assert function.__name__ in str(caught.value) or "prompt_gate:" in str(caught.value)
    for name, tensor in before.items():
        assert torch.equal(arguments[name], tensor), f"{name} was written"


@pytest.mark.parametrize("function", [gp.prompt_gate, gp.prompt_gate_])
@pytest.mark.parametrize(
    ("changes", "error", "pattern"),
    [pytest.param(*row[2:], id=f"{row[0]}: {row[1]}") for row in BAD],
)
def test_bad_input_gets_its_error(function, changes, error, pattern):
    call_and_check(function, changes, error, pattern)


@pytest.mark.parametrize(
    ("changes", "error", "pattern"),
    [pytest.param(*row[2:], id=f"{row[0]}: {row[1]}") for row in BAD_IN_PLACE],
)
def test_bad_input_in_place_gets_its_error(changes, error, pattern):
    call_and_check(gp.prompt_gate_, changes, error, pattern)


def test_inference_tensor_outside_inference_mode():
    arguments = good_arguments()
    with torch.inference_mode():
        arguments["block_out"] = arguments["block_out"].clone()
    with pytest.raises(RuntimeError, match="inference tensor"):
        gp.prompt_gate_(**arguments)


@pytest.mark.parametrize("strides", [(N * D, D, 1), (D, B * D, 1), (2 * N * D, 2 * D, 2)])
def test_overlap_of_block_in_with_the_written_rows(strides):
    """Refused if and only if a written element is read at another place; for every shift."""
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


def test_gate_among_the_written_rows():
    arguments = good_arguments()
    h = arguments["block_out"]
    with pytest.raises(RuntimeError, match="gate_logit lies among the prompt rows"):
        gp.prompt_gate_(h, arguments["block_in"], h[0, START, 0], START, P)
    gp.prompt_gate_(h, arguments["block_in"], h[0, START, 0].clone(), START, P)


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


@pytest.mark.parametrize("make", [leaf_view, unbound, chunked, view_under_no_grad])
def test_views_that_autograd_refuses_are_refused_before_the_write(make):
    arguments = good_arguments()
    arguments["block_out"] = make(arguments["block_out"])
    before = arguments["block_out"].detach().clone()
    with pytest.raises(RuntimeError, match=r"block_out is a (view|leaf) .*use prompt_gate"):
        gp.prompt_gate_(**arguments)
    assert torch.equal(arguments["block_out"], before)


def test_inference_gate_is_refused_before_the_write():
    arguments = good_arguments()
    with torch.inference_mode():
        arguments["gate_logit"] = torch.tensor(-0.5)
    block_out = arguments["block_out"].requires_grad_() * 1
    before = block_out.detach().clone()
    with pytest.raises(RuntimeError, match="gate_logit is an inference tensor"):
        gp.prompt_gate_(**{**arguments, "block_out": block_out})
    assert torch.equal(block_out, before)


@pytest.mark.parametrize("name", ["block_out", "block_in", "gate_logit"])
def test_negative_views_are_read_but_not_written(name):
    arguments = good_arguments()
    wanted = gp.prompt_gate(**arguments)
    arguments[name] = torch.complex(arguments[name], -arguments[name]).conj().imag
    assert arguments[name].is_neg()
    assert torch.equal(gp.prompt_gate(**arguments), wanted)
    if name == "block_out":
        with pytest.raises(RuntimeError, match="block_out is a negative view"):
            gp.prompt_gate_(**arguments)


def test_overlap_outside_the_prompt_rows_is_fine():
    """Other rows of block_in may lie where block_out does: they are not read."""
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


@pytest.mark.skipif(
    torch.version.cuda is None, reason="a CPU-only torch has no CUDA tensor to pass"
)
@pytest.mark.parametrize("function", [gp.prompt_gate, gp.prompt_gate_])
def test_cuda_tensor_without_cuda_kernels(function, monkeypatch):
    """Row 17. A fake CUDA tensor stands for a real one; the traced path that would take it is closed."""
    reason = "gated_prompt was built without CUDA"
    monkeypatch.setattr(ops, "cuda_unavailable_reason", reason)
    monkeypatch.setattr(functional, "_is_traced", lambda *tensors: False)
    with FakeTensorMode():
        tensors = [torch.empty(s, device="cuda") for s in ((B, N, D), (B, N, D), ())]
    with pytest.raises(
        RuntimeError,
        match=rf"{function.__name__}: got a tensor on cuda:0, but {reason}.*pip install",
    ):
        function(*tensors, START, P)


def raw_arguments():
    arguments = good_arguments()
    rows = arguments["block_in"][:, START : START + P]
    return [arguments["block_out"], rows, arguments["gate_logit"], START, P, True, True]


@pytest.mark.parametrize(
    ("index", "value", "pattern"),
    [
        (0, torch.randn(5, 4), "must have 3 dimensions, got 2"),
        (0, torch.zeros(B, N, D, dtype=torch.int32), "scalar type"),
        (1, torch.randn(B, P + 1, D), r"must be \[2, 2, 4\], got \[2, 3, 4\]"),
        (1, torch.randn(B, P, D, dtype=torch.float64), "no kernel"),
        (2, torch.zeros(1), "must have 0 dimensions, got 1"),
        (3, -1, "outside N=5"),
        (3, 4, "outside N=5"),
        (4, -1, "outside N=5"),
        (4, 2**62, "outside N=5"),
    ],
)
def test_raw_op_is_memory_safe_on_its_own(index, value, pattern):
    arguments = raw_arguments()
    arguments[index] = value
    with pytest.raises(RuntimeError, match=pattern):
        torch.ops.gated_prompt.prompt_gate_fwd_(*arguments)


@pytest.mark.parametrize(
    ("index", "value", "pattern"),
    [
        (1, torch.randn(B, P, D + 1), "saved must be"),
        (1, torch.randn(B, D, P).transpose(1, 2), "contiguous"),
        (1, torch.randn(B, P, D).double(), "dtype of the gradient"),
        (0, torch.ones(()).expand(B, N, D), "overlap themselves"),
        (0, "saved in a buffer", "saved overlaps the prompt rows"),
    ],
)
def test_raw_backward_is_memory_safe_on_its_own(index, value, pattern):
    grad = torch.randn(B, N, D)
    arguments = [
        grad,
        torch.randn(B, P, D),
        torch.tensor(0.0),
        START,
        P,
        True,
        True,
        True,
        True,
        torch.float32,
    ]
    arguments[index] = value
    if value == "saved in a buffer":
        arguments[index] = arguments[1].new_empty(64).as_strided((B, N, D), (N * D, D, 1))
        arguments[1] = arguments[index].flatten()[D : D + B * P * D].view(B, P, D)
    with pytest.raises(RuntimeError, match=pattern):
        torch.ops.gated_prompt.prompt_gate_bwd_(*arguments)
