# SPDX-License-Identifier: Apache-2.0
"""The compiled modules, their raw ops as torch sees them, and the autograd Function over them.

The documented functions are in `gated_prompt.functional`; nothing here checks the meaning of
arguments.
"""

from __future__ import annotations

import torch

BUILD_HINT = "run `pip install .` in the source tree (docs/building.md)"

try:
    import gated_prompt._C as _C
except ImportError as error:
    raise ImportError(
        f"gated_prompt: the compiled module gated_prompt._C does not load under torch "
        f"{torch.__version__}: {error}. To build it, {BUILD_HINT}."
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


def require_kernels(op: str, device: torch.device) -> None:
    """Raises RuntimeError unless there are kernels for `device` (on meta, there are shapes)."""
    if device.type in ("cpu", "meta") or (
        device.type == "cuda" and cuda_unavailable_reason is None
    ):
        return
    if device.type == "cuda":
        raise RuntimeError(
            f"{op}: got a tensor on {device}, but {cuda_unavailable_reason}. To use CUDA, install "
            f"a torch with CUDA and a CUDA toolkit (or let pip fetch nvcc), then {BUILD_HINT}."
        )
    raise RuntimeError(f"{op}: device type must be cpu or cuda, got {device}")


@torch.library.register_fake("gated_prompt::prompt_gate_fwd_")
def _(block_out, block_in, gate_logit, start, length, mix, save):
    batch, _, dim = block_out.shape
    return block_out.new_empty((batch, length, dim) if save else (0,))


@torch.library.register_fake("gated_prompt::prompt_gate_bwd_")
def _(
    grad_out, saved, gate_logit, start, length, mix, need_out, need_in, need_logit, in_dtype
):  # fmt: skip
    batch, _, dim = grad_out.shape
    grad_in = grad_out.new_empty((batch, length, dim) if need_in else (0,), dtype=in_dtype)
    return grad_in, gate_logit.new_empty(() if need_logit else (0,))


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


class PromptGateFunction(torch.autograd.Function):
    """The gate on rows [start, start + length) of block_out [B, N, D], in place.

    block_in [B, P, D] holds the prompt rows alone; gate_logit is []. Between forward and backward
    one [B, P, D] tensor lives, (h - x) / 2 (mix) or h / 2 (residual), and only if `save`, that is
    if the gate needs a gradient. It is not rebuilt from the result: with g = 4.5e-5 that division
    loses every digit of bfloat16.
    """

    @staticmethod
    def forward(ctx, block_out, block_in, gate_logit, start, length, mix, save):
        saved = torch.ops.gated_prompt.prompt_gate_fwd_(
            block_out, block_in, gate_logit, start, length, mix, save
        )
        ctx.mark_dirty(block_out)
        ctx.save_for_backward(saved, gate_logit)
        ctx.start, ctx.length, ctx.mix, ctx.in_dtype = start, length, mix, block_in.dtype
        return block_out

    @staticmethod
    def backward(ctx, grad_out):
        needs = ctx.needs_input_grad[:3]
        is_batched = torch._C._functorch.is_legacy_batchedtensor(grad_out)
        with torch.no_grad():
            grads = (_batched_backward if is_batched else _kernel_backward)(ctx, grad_out, *needs)
        grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        if torch.is_grad_enabled():  # create_graph=True
            anchor = torch.empty((), requires_grad=True)
            guarded = _NoSecondDerivative.apply(anchor, *(g for g in grads if g is not None))
            guarded = iter(guarded)
            grads = [None if grad is None else next(guarded) for grad in grads]
        return (*grads, *[None] * 5)


def _kernel_backward(ctx, grad_out, need_out, need_in, need_logit):
    saved, gate_logit = ctx.saved_tensors
    grad_out = grad_out.resolve_neg()
    if need_out:  # its rows are rescaled in place, and the incoming gradient may be shared
        grad_out = grad_out.clone(memory_format=torch.contiguous_format)
    grad_in, grad_logit = torch.ops.gated_prompt.prompt_gate_bwd_(
        grad_out, saved, gate_logit, ctx.start, ctx.length, ctx.mix,
        need_out, need_in, need_logit, ctx.in_dtype,
    )  # fmt: skip
    return grad_out, grad_in, grad_logit


def _batched_backward(ctx, grad_out, need_out, need_in, need_logit):
    """The same in aten, for is_grads_batched=True, which maps it over many incoming gradients."""
    saved, gate_logit = ctx.saved_tensors
    dtype = torch.promote_types(grad_out.dtype, torch.float32)
    rows = grad_out[:, ctx.start : ctx.start + ctx.length].to(dtype)
    g = gate_logit.to(dtype).sigmoid()
    grad_in = (1 - g if ctx.mix else 1) * rows
    grad_rows = (g * rows).to(grad_out.dtype)
    grad_out = grad_out.slice_scatter(grad_rows, 1, ctx.start, ctx.start + ctx.length)
    grad_logit = 2 * g * (1 - g) * (saved.to(dtype) * rows).sum() if need_logit else g
    return grad_out, grad_in.to(ctx.in_dtype), grad_logit.to(gate_logit.dtype)


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
            "prompt_gate: the kernels have no second derivative; "
            "use gated_prompt.reference.prompt_gate"
        )


def build_info() -> dict:
    """What was built: compiler, torch, instruction set, nvcc, GPU architectures; or why no CUDA."""
    info = dict(_C.build_info())
    info["cuda_unavailable_reason"] = cuda_unavailable_reason
    if cuda_unavailable_reason is None:
        info.update(_C_cuda.build_info())
    return info


launch_plan = _C.launch_plan
