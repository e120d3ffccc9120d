# SPDX-License-Identifier: Apache-2.0
"""Counts what Inductor makes of a compiled gate on an H100: kernels, the bytes that they move, and
the bytes that are kept for backward.

    python benchmarks/lab/inductor_code.py [--frame norm] [--logit channel] [--out FOLDER]

Needs a CUDA build of PyTorch, but no GPU. Three blocks x + f(x) with a gate after each, where f is
linear(layer_norm(x)) or layer_norm(x), in bfloat16, are traced with meta tensors and partitioned as
in training. Inductor gets the description of an H100. Its Triton code then runs in numpy, which
computes only indices and masks: a kernel moves each element that it loads or stores once.
"""

import argparse
import contextlib
import functools
import re
import sys
import types
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch._functorch.config
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, graph
from torch._inductor.fx_passes import fuse_attention, joint_graph, pad_mm
from torch._subclasses import fake_tensor
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).parent.parent))  # the suite: benchmarks/
import peers

B, N, P, D, START, FRAMES = 64, 247, 50, 768, 1, 3
CARRIER = "gated_prompt, carrier"
FORMS = {"no gate": lambda h, *_: h, **peers.FORMS, CARRIER: peers.gated_prompt_carrier}


def chain(form, x, logits, weight):
    carrier = x[:, START : START + P]
    for logit in logits:
        h = torch.nn.functional.layer_norm(x, (D,))
        h = x + (h if weight is None else torch.nn.functional.linear(h, weight))
        arguments = h, x, (logit,), START, P, "mix"
        if form == CARRIER:
            x, carrier = peers.gated_prompt_carrier(*arguments, carrier)
        else:
            x = FORMS[form](*arguments)
    return x


# ---- Inductor without a GPU ----

H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, total_memory=80 << 30,
    max_threads_per_block=1024, shared_memory_per_block_optin=232448,
)  # fmt: skip


@contextlib.contextmanager
def pretended_h100():
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": H100.name,
        "get_device_properties": H100, "get_device_capability": (9, 0), "set_device": None,
        "_lazy_init": None, "get_rng_state": torch.zeros(1, dtype=torch.uint8),
        "set_rng_state": None, "device": contextlib.nullcontext(),
        "_DeviceGuard": contextlib.nullcontext(),
    }  # fmt: skip
    say = {name: lambda *_, answer=answer: answer for name, answer in answers.items()}
    names = "is_available", "get_device_properties"
    target = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    driver.set_active(target)
    torch.utils._triton.has_triton.cache_clear()
    fold = joint_graph.constant_fold_uniform_value

    def fold_on_cpu(gm):  # it computes with constants
        create_on("cpu", gm)
        fold(gm)
        create_on("cuda:0", gm)

    with (
        mock.patch.multiple(torch.cuda, **say),
        mock.patch.multiple(CudaInterface, **{name: staticmethod(say[name]) for name in names}),
        mock.patch.object(CudaInterface.Worker, names[1], staticmethod(say[names[1]])),
        mock.patch.object(fake_tensor, "init_gpu_context"),
        mock.patch.object(joint_graph, "constant_fold_uniform_value", fold_on_cpu),
        # patterns of attention and of unaligned GEMMs, of which there are none here, take a GPU
        mock.patch.object(fuse_attention, "_sfdp_init"),
        mock.patch.object(pad_mm, "_pad_mm_init"),
    ):
        yield


def create_on(device, gm):
    for node in gm.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.update_kwarg("device", torch.device(device))


def on_h100(compiler):
    """Autograd can't trace for a GPU that is not there: traced on meta, and moved afterwards."""

    def moved(gm, inputs, **options):
        for value in tree_leaves([inputs, [node.meta.get("val") for node in gm.graph.nodes]]):
            if isinstance(value, fake_tensor.FakeTensor):
                value.fake_device = torch.device("cuda:0")
        create_on("cuda:0", gm)
        with pretended_h100():
            return compiler(gm, inputs, **options)

    return moved


class Generated(Exception):
    """There is code, and nothing that could run it."""


def generate(form, frame, logit_shape):
    """[(names of the inputs, inputs without data, code)] of forward and of backward."""
    found = []

    def keep(lowering):
        code = lowering.codegen()[0].value
        nodes = lowering.orig_gm.graph.find_nodes(op="placeholder")
        with fake_tensor.unset_fake_temporarily():
            values = [empty(t.shape, t.stride(), t.dtype) for t in (n.meta["val"] for n in nodes)]
        found.append(([n.name for n in nodes], values, code))
        call = mock.Mock(side_effect=Generated)
        return types.SimpleNamespace(call=call, __file__="/dev/null", runner=None)

    inner = on_h100(compile_fx.compile_fx_inner)
    torch._dynamo.reset()
    with (
        mock.patch.object(graph.GraphLowering, "compile_to_module", keep),
        mock.patch.object(compile_fx, "partition_fn", on_h100(compile_fx.partition_fn)),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        torch._inductor.config.patch(force_disable_caches=True, compile_threads=1),
        fake_tensor.FakeTensorMode(),
        contextlib.suppress(Generated),
    ):
        make = functools.partial(torch.empty, device="meta")
        x = make(B, N, D, dtype=torch.bfloat16, requires_grad=True)
        logits = [make(logit_shape, requires_grad=True) for _ in range(FRAMES)]
        weight = make(D, D, dtype=torch.bfloat16) if frame == "linear" else None
        backend = functools.partial(compile_fx.compile_fx, inner_compile=inner)
        torch.compile(chain, backend=backend, fullgraph=True)(form, x, logits, weight)
    return found


# ---- its code, in numpy ----


class Value:
    """A number that does not matter; what is computed from it does not, either."""

    __array_ufunc__ = None  # numpy leaves operators to us

    def _value(self, *args, **kwargs):
        return self

    def __iter__(self):  # mean, m2, weight of triton_helpers.welford
        return iter([self] * 3)

    __call__ = __getattr__ = __getitem__ = __neg__ = __invert__ = _value
    __add__ = __sub__ = __mul__ = __truediv__ = __and__ = __or__ = __lt__ = __gt__ = _value
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rand__ = __le__ = __ge__ = __eq__ = _value


class Index(np.ndarray):
    def __iadd__(self, other):
        return self + other

    def to(self, dtype):
        return self

    def broadcast_to(self, *shape):
        return np.broadcast_to(self, shape, subok=True)


class Pointer:
    def __init__(self, tensor, touched, offset=0):
        self.tensor, self.touched, self.offset = tensor, touched, offset

    def __add__(self, offset):
        return Pointer(self.tensor, self.touched, self.offset + offset)

    def touch(self, kind, mask):
        storage, size = self.tensor.untyped_storage(), self.tensor.itemsize
        key = kind, storage._cdata, size
        bits = self.touched.setdefault(key, np.zeros(storage.nbytes() // size, bool))
        at = self.tensor.storage_offset() + np.asarray(self.offset)
        at, mask = np.broadcast_arrays(at, True if mask is None else mask)
        bits[at[mask]] = True
        return Value()


class Triton(Value):
    """triton.language, for a grid of one block."""

    constexpr = object

    def program_id(self, axis):
        return 0

    def num_programs(self, axis):
        return 1

    def range(self, start, end, step, num_stages=1):
        return range(start, end, step)

    def arange(self, start, end):
        return np.arange(start, end).view(Index)

    def full(self, shape, value, dtype):
        return shape if isinstance(shape, Value) else np.full(shape, value).view(Index)

    def broadcast_to(self, value, shape):
        return value if isinstance(value, Value) else Index.broadcast_to(value, *shape)

    def where(self, *choice):
        values = [c for c in choice if isinstance(c, Value)]
        return values[0] if values else np.where(*choice).view(Index)

    def load(self, pointer, mask=None, **_):
        return pointer.touch("read", mask)

    def store(self, pointer, value, mask=None):
        pointer.touch("write", mask)


def empty(size, stride, dtype):
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


class Run:
    """The wrapper, run without data: .calls, [(name, bytes of each buffer)], and .results."""

    def __init__(self, code, inputs):
        self.calls = []
        body = code.split("async_compile = AsyncCompile()\n")[1]
        body = re.sub(r"torch\.ops\.gated_prompt\.(\w+)\.default", r"extern_kernels.\1", body)
        ignore = lambda *_: None  # noqa: E731
        names = {
            "torch": torch, "extern_kernels": self, "empty_strided_cuda": empty,
            "async_compile": types.SimpleNamespace(triton=self.kernel, wait=ignore),
            "reinterpret_tensor": lambda t, size, stride, offset: t.as_strided(
                size, stride, t.storage_offset() + offset),
            "get_raw_stream": ignore, "assert_size_stride": ignore, "assert_alignment": ignore,
            "empty_strided_p2p": None,
        }  # fmt: skip
        with pretended_h100():
            exec(body, names)
            self.results = names["call"](list(inputs))

    def mm(self, a, b, out):
        self.calls.append(("mm", [a.nbytes, b.nbytes, out.nbytes]))

    def copy_rows(self, rows):
        self.calls.append(("copy_rows", [rows.nbytes, rows.nbytes]))
        return rows.new_empty(rows.shape)

    def kernel(self, name, source, device_str):
        names = dict.fromkeys(["libdevice", "tl_math", "triton_helpers"], Value())
        names["tl"] = Triton()
        exec(source.split("@triton.jit\n")[1], names)
        return types.SimpleNamespace(run=functools.partial(self.launch, names[name]))

    def launch(self, function, *arguments, stream):
        parameters = function.__code__.co_varnames[: function.__code__.co_argcount]
        given, touched = dict(zip(parameters, arguments, strict=False)), {}
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                given[name] = Pointer(value, touched)
        for name in parameters[len(arguments) :]:  # one block of threads does it all
            numel = {"YBLOCK": "ynumel", "R0_BLOCK": "r0_numel"}.get(name, "xnumel")
            given[name] = 1 if name == "NUM_STAGES" else given[numel]
        function(**given)
        moved = [int(bits.sum()) * size for (_, _, size), bits in touched.items()]
        self.calls.append((function.__name__, moved))


# ---- report ----


def passes(moved):
    """Passes over [B, N, D], over [B, P, D] and, if they make up half a pass, over parts of the
    first; in parentheses all bytes as a multiple of the first."""
    n, p = (2 * B * rows * D for rows in (N, P))
    counts = {"N": moved.count(n), "P": moved.count(p)}
    rest = (sum(moved) - counts["N"] * n - counts["P"] * p) / n
    text = " + ".join(f"{count}{unit}" for unit, count in counts.items() if count) or "0"
    return text + (f" + {rest:.1f}N in parts" if rest > 0.5 else "") + f" ({sum(moved) / n:.2f}N)"


def measure(form, frame, logit_shape, folder):
    """Of forward and of backward the calls; and the bytes of the storages kept between them."""
    (_, inputs, forward), (names, values, backward) = generate(form, frame, logit_shape)
    fwd, bwd = Run(forward, inputs), Run(backward, values)
    kept = fwd.results[len(fwd.results) - sum(not n.startswith("tangents") for n in names) :]
    kept = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
    for tensor in [*inputs, fwd.results[0]]:
        kept.pop(tensor.untyped_storage()._cdata, None)
    if folder:
        for run, code, direction in ((fwd, forward, "fwd"), (bwd, backward, "bwd")):
            lines = [f"# {name}: {passes(moved)}" for name, moved in run.calls]
            name = re.sub(r"\W+", "_", form)
            (folder / f"{name}.{direction}.py").write_text("\n".join([*lines, "", code]))
    return fwd.calls, bwd.calls, list(kept.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--frame", choices=("linear", "norm"), default="linear")
    parser.add_argument("--logit", choices=("scalar", "channel"), default="scalar")
    parser.add_argument("--out", type=Path, help="folder for the generated code")
    given = parser.parse_args()
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
    print("| form | kernels forward | backward | traffic forward | backward | kept |")
    print("| --- | --- | --- | --- | --- | --- |")
    for form in FORMS:
        shape = (D,) if given.logit == "channel" else ()
        *both, kept = measure(form, given.frame, shape, given.out)
        names = {"mm": "GEMM", "copy_rows": "copy"}
        kinds = [[names.get(name, "Triton") for name, _ in calls] for calls in both]
        counts = [", ".join(f"{c} {kind}" for kind, c in Counter(of).items()) for of in kinds]
        traffic = [passes([m for _, moved in calls for m in moved]) for calls in both]
        print("|", " | ".join([form, *counts, *traffic, passes(kept)]), "|", flush=True)


if __name__ == "__main__":
    main()
