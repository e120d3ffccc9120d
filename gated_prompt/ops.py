# SPDX-License-Identifier: Apache-2.0
"""The compiled modules, their raw ops as torch sees them, and the autograd Function over them.

The documented functions are in `gated_prompt.functional`; nothing here checks the meaning of
arguments.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from typing import ClassVar

import torch

_REUSES_GRADIENTS = os.environ.get("GATED_PROMPT_REUSE_GRADIENTS", "1") != "0"  # for debugging
_HAS_RANGES = os.environ.get("GATED_PROMPT_NVTX", "") not in ("", "0")  # docs/profiling.md
BUILD_HINT = "run `pip install .` in the source tree (docs/building.md)"

try:
    import gated_prompt._C as _C
except ImportError as error:
    raise ImportError(
        f"gated_prompt: the compiled module gated_prompt._C does not load under torch "
        f"{torch.__version__} (one build serves torch 2.10 and later): {error}. To build it, "
        f"{BUILD_HINT}."
    ) from error

# None: CUDA kernels are there. Else: why not, for the error that a CUDA tensor gets.
cuda_unavailable_reason: str | None = None
if torch.version.cuda is None:
    cuda_unavailable_reason = f"torch {torch.__version__} is a CPU-only build"
else:
    try:
        import gated_prompt._C_cuda as _C_cuda
    except ModuleNotFoundError:
        cuda_unavailable_reason = (
            "gated_prompt was built without CUDA (no CUDA toolkit then, or a CPU-only torch)"
        )
    except ImportError as error:
        cuda_unavailable_reason = f"gated_prompt._C_cuda does not load: {error}"

if _HAS_RANGES:
    try:
        import nvtx
    except ImportError as error:
        raise ImportError(
            f"gated_prompt: GATED_PROMPT_NVTX={os.environ['GATED_PROMPT_NVTX']} needs the package "
            f"nvtx: {error}. Unset it, or pip install nvtx."
        ) from error


def has_kernel(capability: tuple[int, int], architectures: str) -> bool:
    """Whether a build for `architectures` ("8.0,9.0+PTX") runs on a GPU of this capability.

    Machine code runs on its own major version from its minor on; PTX is compiled for any later GPU.
    """
    for major, minor, ptx in re.findall(r"(\d+)\.(\d)[af]?(\+PTX)?", architectures):
        built = (int(major), int(minor))
        if built <= capability and (built[0] == capability[0] or ptx):
            return True
    return False


def require_kernels(op: str, device: torch.device) -> None:
    """Raises RuntimeError unless there are kernels for `device` (on meta, there are shapes)."""
    if device.type in ("cpu", "meta"):
        return
    if device.type != "cuda":
        raise RuntimeError(f"{op}: device type must be cpu or cuda, got {device}")
    reason = cuda_unavailable_reason or _lacking_architecture(device.index)
    if reason is not None:
        raise RuntimeError(
            f"{op}: got a tensor on {device}, but {reason}. To use CUDA, install a torch with CUDA "
            f"and a CUDA toolkit (or let pip fetch nvcc), then {BUILD_HINT}."
        )


@functools.cache
def _lacking_architecture(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    architectures = build_info()["architectures"]
    if has_kernel(capability, architectures):
        return None
    return (
        f"its architecture {'.'.join(map(str, capability))} is not among those of this build, "
        f"{architectures} (set TORCH_CUDA_ARCH_LIST)"
    )


# ---- raw ops ----


def ranged(name, function, length=None):
    """`function` itself; under GATED_PROMPT_NVTX=1, `function` inside an nvtx range.

    The range, in the domain "gated_prompt", is named by shape and dtype of the first argument, and
    by the argument at position `length`: "prompt_gate_fwd_ [64, 247, 768] P=50 bfloat16".
    """
    if not _HAS_RANGES:
        return function

    def run(*args):
        if torch.compiler.is_compiling():  # a graph has no place for a range
            return function(*args)
        parts = [name, str(list(args[0].shape)), str(args[0].dtype).removeprefix("torch.")]
        if length is not None:
            parts.insert(2, f"P={args[length]}")
        with nvtx.annotate(" ".join(parts), domain="gated_prompt"):
            return function(*args)

    return run


_raw = torch.ops.gated_prompt
prompt_gate_fwd_ = ranged("prompt_gate_fwd_", _raw.prompt_gate_fwd_.default, length=4)
prompt_gate_linear_token_fwd_ = ranged(
    "prompt_gate_linear_token_fwd_", _raw.prompt_gate_linear_token_fwd_.default, length=5
)
prompt_gate_bwd_ = ranged("prompt_gate_bwd_", _raw.prompt_gate_bwd_.default, length=5)
scaled_dot = ranged("scaled_dot", _raw.scaled_dot.default)
divide_rows = ranged("divide_rows", _raw.divide_rows.default)


@torch.library.register_fake("gated_prompt::prompt_gate_fwd_")
def _(block_out, block_in, gate_logit, start, length, mix, save):
    batch, _, dim = block_out.shape
    return block_out.new_empty((batch, length, dim) if save else (0,))


@torch.library.register_fake("gated_prompt::prompt_gate_linear_token_fwd_")
def _(
    block_out, block_in, weight, bias, start, length, mix, save_logit, save_derivative, save_rows
):  # fmt: skip
    batch, _, dim = block_out.shape
    dtype = torch.promote_types(block_out.dtype, torch.float32)
    return (
        block_out.new_empty((batch, length, 1) if save_logit else (0,), dtype=dtype),
        block_out.new_empty((batch, length, dim) if save_derivative else (0,)),
        block_out.new_empty((batch, length, dim) if save_rows else (0,)),
    )


@torch.library.register_fake("gated_prompt::prompt_gate_bwd_")
def _(
    grad_out, saved, gate_logit, grad_carrier, start, length, mix,
    need_out, need_in, need_logit, need_bias, in_dtype,
):  # fmt: skip
    batch, _, dim = grad_out.shape
    by_channel = gate_logit.dim() > 0 and gate_logit.shape[-1] != 1
    width = 0 if not need_bias else dim if by_channel else 1
    return (
        grad_out.new_empty((batch, length, dim) if need_in else (0,), dtype=in_dtype),
        gate_logit.new_empty(gate_logit.shape if need_logit else (0,)),
        grad_out.new_empty((width,), dtype=torch.promote_types(grad_out.dtype, torch.float32)),
    )


@torch.library.register_fake("gated_prompt::scaled_dot")
def _(a, b, temperature):
    devices = {a.device, b.device, temperature.device}  # a mix with meta comes here, too
    torch._check(
        len(devices) == 1,
        lambda: f"scaled_dot: a, b and temperature must be on one device, got {devices}",
    )
    return temperature.new_empty(temperature.shape)


@torch.library.register_fake("gated_prompt::divide_rows")
def _(weight, bias, temperature, rows, low, high, dtype):
    return (
        torch.empty_like(weight, dtype=dtype),
        weight.new_empty((0,) if bias is None else bias.shape, dtype=dtype),
        temperature.new_empty(temperature.shape),
    )


@torch.library.custom_op("gated_prompt::copy_rows", mutates_args=())
def copy_rows(rows: torch.Tensor) -> torch.Tensor:
    """A copy that compilers keep.

    Of rows of a graph input that are overwritten later, torch.compile recomputes an aten clone in
    backward, from the new values: the gate's gradient was 60 % off, without a word (torch 2.11).
    """
    return rows.clone(memory_format=torch.contiguous_format)


@copy_rows.register_fake
def _(rows):
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


copy_rows.register_autograd(lambda ctx, grad: grad)
copy_rows.register_vmap(lambda info, in_dims, rows: (copy_rows(rows), in_dims[0]))


# ---- whose a gradient is ----
#
# A backward may rescale the incoming gradient in place, instead of a copy, only if nothing else can
# see it. What PyTorch's engine hands over and keeps nowhere else has the same reference counts each
# time; a gradient that is also on its way to another node, was handed in by the caller, is kept by
# a hook, or is a view of something has others. Memory of numpy that a backward returns is the
# engine's by these counts, to the engine itself as well, which adds to it in place.


def _uses(argument):
    return sys.getrefcount(argument)


def _uses_of_an_argument():
    """Of one that nobody else has. It is one more where frames are evaluated by torch.compile, as
    they are in the whole process after a compilation has failed."""
    nobody_else_has = object()
    return _uses(nobody_else_has)


def _counts(grad):
    """Uses of an argument; of the tensor, in C++ and in Python, and of its storage. None: they
    don't tell.

    The storage is asked by its address: grad.untyped_storage() would count as a use for as long as
    the storage lives, and the engine, which asks the same, would then add the next gradient to this
    one out of place.
    """
    if grad is None or torch._C._functorch.is_legacy_batchedtensor(grad) or grad.is_meta:
        return None
    of_storage = torch._C._storage_Use_Count(torch._C._storage_address(grad))
    return _uses_of_an_argument(), (grad._use_count(), sys.getrefcount(grad), of_storage)


class _Probe(torch.autograd.Function):
    """Measures the counts of a gradient that is nobody else's, called as our own backwards are."""

    counts: ClassVar = {}  # {uses of an argument: the others}, as measured

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad, unused=None):
        found = _counts(grad)
        if found is not None:
            _Probe.counts.update([found])
        return grad


def _is_observed() -> bool:
    """Whether Python looks on at each op (FakeTensorMode, FlopCounterMode): counts differ then."""
    return torch._C._len_torch_dispatch_stack() > 0


def _is_debugged() -> bool:
    """Whether a debugger or profiler may hold the variables of our frames."""
    monitoring = getattr(sys, "monitoring", None)  # Python 3.12 on
    tools = () if monitoring is None else map(monitoring.get_tool, range(6))
    return bool(sys.gettrace() or sys.getprofile() or any(tools))


def _compiles_autograd() -> bool:
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return bool(getattr(module, "compiled_autograd_enabled", False))


def _measure_counts() -> None:
    """Waits for the first gate that runs undisturbed."""
    if not _REUSES_GRADIENTS or torch.is_inference_mode_enabled():
        return
    if _is_observed() or _is_debugged() or _compiles_autograd():
        return
    with torch.enable_grad():  # nothing here saves a tensor: hooks of the caller see none
        leaf = torch.zeros((), requires_grad=True, device="cpu")
        _Probe.apply(leaf.clone()).neg().sum().backward()  # neg makes a gradient of its own


def _is_reusable(grad, counts) -> bool:
    return (
        counts is not None
        and _Probe.counts.get(counts[0]) == counts[1]
        and _REUSES_GRADIENTS
        and not grad.requires_grad
        and not torch.is_grad_enabled()
        and grad.is_contiguous()
        and not grad.is_neg()
        and not _is_observed()
        and not torch.compiler.is_compiling()
    )


# ---- autograd ----


class PromptGateFunction(torch.autograd.Function):
    """The gate on rows [start, start + length) of block_out [B, N, D], in place.

    rows [B, P, D] are the prompt rows of block_in; gate_logit broadcasts to [B, P, D]. carrier, if
    it is not None, receives the gradient of `rows`; if `carries`, another carrier [B, P, D] is
    returned beside block_out: it has no values, only a gradient, that of the updated rows, for the
    next gate. Between forward and backward one [B, P, D] tensor lives, (h - x) / 2 (mix) or h
    (residual), and only if `save`, that is if the gate needs a gradient. It is not rebuilt from the
    result: with g = 4.5e-5 that division loses every digit of bfloat16.
    """

    @staticmethod
    def forward(ctx, block_out, rows, carrier, carries, gate_logit, start, length, mix, save):
        saved = prompt_gate_fwd_(block_out, rows, gate_logit, start, length, mix, save)
        ctx.save_for_backward(saved, gate_logit)
        return _outputs(ctx, block_out, rows, saved, carries, start, length, mix)

    @staticmethod
    def backward(ctx, grad_out, grad_carrier=None):
        counts = _counts(grad_out)
        return _backward(ctx, grad_out, grad_carrier, counts, _gate_gradients)


class PromptGateLinearFunction(torch.autograd.Function):
    """`PromptGateFunction` with gate_logit = h @ weight.T + bias, h the prompt rows of block_out.

    weight is [D, D] or [1, D]. Between forward and backward live the logit, [B, P, D] or [B, P, 1];
    what block_out, weight and bias need of h and x, see there; and, for weight, h [B, P, D], which
    for the rule residual is the same. `saves` says which of the three.
    """

    @staticmethod
    def forward(
        ctx, block_out, rows, carrier, carries, weight, bias, start, length, mix, saves
    ):  # fmt: skip
        save_logit, save, save_rows = saves
        if weight.shape[0] == 1:
            logit, saved, h = prompt_gate_linear_token_fwd_(
                block_out, rows, weight[0], bias, start, length, mix,
                save_logit, save, save_rows and mix,
            )  # fmt: skip
        else:
            h = block_out[:, start : start + length].clone(memory_format=torch.contiguous_format)
            logit = linear_logit(h, weight, bias)
            saved = prompt_gate_fwd_(block_out, rows, logit, start, length, mix, save and mix)
            if save and not mix:
                saved = h
        # for the rule residual, `saved` is h itself
        ctx.save_for_backward(logit, saved, weight, *((h,) if save_rows and mix else ()))
        return _outputs(ctx, block_out, rows, saved, carries, start, length, mix)

    @staticmethod
    def backward(ctx, grad_out, grad_carrier=None):
        counts = _counts(grad_out)
        return _backward(ctx, grad_out, grad_carrier, counts, _linear_gradients)


def linear_logit(h, weight, bias):
    """h @ weight.T + bias in h's dtype, for weight [1, D] in float32 (float64); autocast or not."""
    dtype = h.dtype if weight.shape[0] != 1 else torch.promote_types(h.dtype, torch.float32)
    bias = None if bias is None else bias.to(dtype)
    with no_autocast(h.device.type):
        return torch.nn.functional.linear(h.to(dtype), weight.to(dtype), bias)


def is_autocast(device_type):
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def no_autocast(device_type):
    if not is_autocast(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _outputs(ctx, block_out, rows, saved, carries, start, length, mix):
    if _uses_of_an_argument() not in _Probe.counts:
        _measure_counts()
    ctx.mark_dirty(block_out)
    ctx.set_materialize_grads(False)
    ctx.start, ctx.length, ctx.mix, ctx.in_dtype = start, length, mix, rows.dtype
    if not carries:
        return block_out
    ctx.like = block_out.shape, block_out.dtype, block_out.device
    if saved.shape == rows.shape:  # whatever has the shape serves as a carrier
        return block_out, saved.detach()
    return block_out, block_out.new_empty(()).expand(rows.shape)


def _backward(ctx, grad_out, grad_carrier, counts, gradients):
    needs = ctx.needs_input_grad
    if grad_out is None:
        if grad_carrier is None:
            return (None,) * len(needs)
        shape, dtype, device = ctx.like  # of the sequence nothing was used but its carrier
        grad_out = torch.zeros(shape, dtype=dtype, device=device)
    is_batched = torch._C._functorch.is_legacy_batchedtensor(grad_out) or (
        grad_carrier is not None and torch._C._functorch.is_legacy_batchedtensor(grad_carrier)
    )
    if needs[0] and not is_batched and not _is_reusable(grad_out, counts):
        # its rows are rescaled in place
        grad_out = grad_out.clone(memory_format=torch.contiguous_format)
    given = (ctx, grad_out.resolve_neg(), grad_carrier, needs[0], needs[1] or needs[2])
    bwd = functools.partial(_bwd_in_aten if is_batched else _bwd_kernel, *given)
    device_type = grad_out.device.type
    if torch.is_grad_enabled() or is_autocast(device_type):
        with torch.no_grad(), no_autocast(device_type):
            grad_out, grad_in, *of_gate = gradients(ctx, bwd)
    else:
        grad_out, grad_in, *of_gate = gradients(ctx, bwd)
    grads = [grad_out, grad_in, grad_in, None, *of_gate]
    grads = [grad if need else None for grad, need in zip(grads, needs, strict=False)]
    grads += [None] * (len(needs) - len(grads))
    if torch.is_grad_enabled():  # create_graph=True
        anchor = torch.empty((), requires_grad=True)
        guarded = _NoSecondDerivative.apply(anchor, *(g for g in grads if g is not None))
        guarded = iter(guarded)
        grads = [None if grad is None else next(guarded) for grad in grads]
    return tuple(grads)


def _gate_gradients(ctx, bwd):
    saved, gate_logit = ctx.saved_tensors
    return bwd(saved, gate_logit, ctx.needs_input_grad[4], False)[:3]


def _linear_gradients(ctx, bwd):
    logit, saved, weight, *kept = ctx.saved_tensors
    need_out, (need_weight, need_bias) = ctx.needs_input_grad[0], ctx.needs_input_grad[4:6]
    grad_out, grad_in, grad_logit, grad_bias = bwd(saved, logit, need_out or need_weight, need_bias)
    if need_out:  # h changes the logit, too
        rows = grad_out[:, ctx.start : ctx.start + ctx.length]
        cast = weight.to(rows.dtype)
        is_batched = torch._C._functorch.is_legacy_batchedtensor(grad_out)
        if weight.shape[0] == 1 and not is_batched:
            rows.addcmul_(grad_logit.to(rows.dtype), cast)
        elif rows.is_cuda and not is_batched:
            rows.baddbmm_(grad_logit, cast.expand(len(rows), -1, -1))
        else:  # on a CPU, a GEMM that accumulates is slower than a GEMM and a sum
            rows += grad_logit.to(rows.dtype) @ cast
    grad_weight = None
    if need_weight:
        rows = grad_logit.shape[0] * grad_logit.shape[1]
        h = (kept[0] if kept else saved).reshape(rows, weight.shape[1])
        of_logit = grad_logit.reshape(rows, weight.shape[0]).to(h.dtype)
        grad_weight = (of_logit.transpose(0, 1) @ h).to(weight.dtype)
    return grad_out, grad_in, grad_weight, grad_bias if need_bias else None


def _bwd_kernel(
    ctx, grad_out, grad_carrier, need_out, need_in, saved, gate_logit, need_logit, need_bias
):  # fmt: skip
    grads = prompt_gate_bwd_(
        grad_out, saved, gate_logit, grad_carrier, ctx.start, ctx.length, ctx.mix,
        need_out, need_in, need_logit, need_bias, ctx.in_dtype,
    )  # fmt: skip
    return grad_out, *grads


def _bwd_in_aten(
    ctx, grad_out, grad_carrier, need_out, need_in, saved, gate_logit, need_logit, need_bias
):  # fmt: skip
    """The same for is_grads_batched=True, which maps it over many incoming gradients."""
    dtype = torch.promote_types(grad_out.dtype, torch.float32)
    rows = grad_out[:, ctx.start : ctx.start + ctx.length].to(dtype)
    rows = rows if grad_carrier is None else rows + grad_carrier.to(dtype)
    g = gate_logit.to(dtype).sigmoid()
    grad_in = ((1 - g if ctx.mix else 1) * rows).to(ctx.in_dtype)
    grad_rows = (g * rows).to(grad_out.dtype)
    grad_out = grad_out.slice_scatter(grad_rows, 1, ctx.start, ctx.start + ctx.length)
    grad_logit = grad_bias = None
    if need_logit or need_bias:
        grad_logit = (2 if ctx.mix else 1) * g * (1 - g) * saved.to(dtype) * rows
        own = gate_logit.shape
        grad_logit = grad_logit.sum_to_size(own)
        grad_bias = grad_logit.sum((0, 1)) if need_bias else None
        grad_logit = grad_logit.to(gate_logit.dtype)
    return grad_out, grad_in, grad_logit, grad_bias


class _NoSecondDerivative(torch.autograd.Function):
    """Identity on gradients that raises when differentiated.

    torch's once_differentiable does so only where the incoming gradient requires grad; here the
    gate's own inputs are missing from the graph of the gradient as well, and a silent zero would be
    wrong.
    """

    @staticmethod
    def forward(ctx, anchor, *grads):
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "prompt_gate: the kernels have no second derivative; use torch.func (grad, jvp, "
            "hessian), which also serves what wrap returns, or gated_prompt.reference.prompt_gate "
            "(prompt_gate_linear)"
        )


def build_info() -> dict:
    """What was built: compiler, torch, instruction set, nvcc, GPU architectures; or why no CUDA."""
    info = dict(_C.build_info())
    info["cuda_unavailable_reason"] = cuda_unavailable_reason
    if cuda_unavailable_reason is None:
        info.update(_C_cuda.build_info())
    return info


launch_plan = _C.launch_plan
