# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled modules and registers fakes for their raw ops.

The meaning of arguments is checked in the documented functions (`gated_prompt.functional`), not
here.
"""

from __future__ import annotations

import functools
import os
import re

import torch

_HAS_RANGES = os.environ.get("GATED_PROMPT_NVTX", "") not in ("", "0")  # docs/profiling.md
BUILD_HINT = "run `pip install .` in the source tree (docs/building.md)"

try:
    import gated_prompt._C as _C
except ImportError as error:
    raise ImportError(
        f"gated_prompt: the compiled module gated_prompt._C does not load under torch "
        f"{torch.__version__} (one build works with torch 2.10 and later): {error}. To build it, "
        f"{BUILD_HINT}."
    ) from error

# None if the CUDA kernels are available, otherwise the reason, for error messages.
cuda_unavailable_reason: str | None = None
if torch.version.cuda is None:
    cuda_unavailable_reason = f"torch {torch.__version__} is a CPU-only build"
else:
    try:
        import gated_prompt._C_cuda as _C_cuda
    except ModuleNotFoundError:
        cuda_unavailable_reason = (
            "gated_prompt was built without CUDA (found no CUDA toolkit, or only a CPU-only torch)"
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
    """True if a build for `architectures` ("8.0,9.0+PTX") runs on a GPU of this capability.

    Machine code runs on GPUs of the same major version and the same or a later minor version. The
    driver compiles PTX for any later GPU.
    """
    for major, minor, ptx in re.findall(r"(\d+)\.(\d)[af]?(\+PTX)?", architectures):
        built = (int(major), int(minor))
        if built <= capability and (built[0] == capability[0] or ptx):
            return True
    return False


def require_kernels(op: str, device: torch.device) -> None:
    """Raises RuntimeError if there are no kernels for `device` (meta needs none, only shapes)."""
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
        f"the GPU's architecture {'.'.join(map(str, capability))} is not in this build, which has "
        f"{architectures} (set TORCH_CUDA_ARCH_LIST)"
    )


# ---- raw ops ----


def ranged(name, function, length=None):
    """Returns `function`; under GATED_PROMPT_NVTX=1, `function` inside an nvtx range.

    The range is in the domain "gated_prompt". Its name has the shape and dtype of the first
    argument and the argument at position `length`: "prompt_gate_fwd_ [64, 247, 768] P=50 bfloat16".
    """
    if not _HAS_RANGES:
        return function

    def run(*args):
        if torch.compiler.is_compiling():  # a compiled graph can't contain a range
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
    devices = {a.device, b.device, temperature.device}  # some may be meta
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
    """clone() that torch.compile does not recompute.

    If the rows belong to a graph input that is overwritten later, torch.compile recomputes an
    ATen clone in backward, from the new values: the gate's gradient was silently 60 % off (torch
    2.11).
    """
    return rows.clone(memory_format=torch.contiguous_format)


@copy_rows.register_fake
def _(rows):
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


copy_rows.register_autograd(lambda ctx, grad: grad)
copy_rows.register_vmap(lambda info, in_dims, rows: (copy_rows(rows), in_dims[0]))


def build_info() -> dict:
    """Returns the compiler, torch, instruction set, nvcc and GPU architectures, or why no CUDA."""
    info = dict(_C.build_info())
    info["cuda_unavailable_reason"] = cuda_unavailable_reason
    if cuda_unavailable_reason is None:
        info.update(_C_cuda.build_info())
    return info


launch_plan = _C.launch_plan
