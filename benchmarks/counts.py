# SPDX-License-Identifier: Apache-2.0
"""Counts what a step costs: ops, FLOPs, bytes moved, and bytes that are kept for backward.

    python benchmarks/counts.py docs/counts.md      # rewrites the tables there

A dispatch mode sees each op of a training step of vit_peers' models on the meta device, which
computes nothing: the counts are exact, the same on every machine, and need no GPU. The whole models
are in bfloat16. SDPA is counted as the flash kernel; on a Hopper GPU torch may use cuDNN's instead.
Our gates write into the incoming gradient, as they do in training.
"""

import gc
import math
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from gates import Alone
from shapes import MODELS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gated_prompt import autograd, ops
from gated_prompt.vit import model as vit_model
from gated_prompt.vit import shortcuts

# ---- bytes kept for backward ----


class _Births(TorchDispatchMode):
    """Records each storage that an op creates, and the block in which it was created."""

    def __init__(self):
        super().__init__()
        self.block = -1
        self.storages = {}  # address: (weak reference, block, bytes), or None: existed before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs)):  # seen first as an input: existed before
            self.storages.setdefault(tensor.untyped_storage()._cdata, None)
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            # the weak reference keeps the address from being used again
            if storage._cdata not in self.storages:
                entry = StorageWeakRef(storage), self.block, storage.nbytes()
                self.storages[storage._cdata] = entry
        return out

    def alive(self):
        """Returns [(block, bytes)] of the storages that are still alive."""
        entries = filter(None, self.storages.values())
        return [(block, count) for weak, block, count in entries if not weak.expired()]


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def saved_bytes(model, images):
    """Returns (total, [bytes of each block]): activations alive between forward and backward.

    Counts each storage that an op created in forward and that is still alive when the caller holds
    only the sum of the logits. It may be kept by autograd's saved tensors, by the closure of a
    checkpoint, or by a context. A storage counts once, with its full size. Not counted: the sum
    itself, and storages that existed before, such as parameters, buffers and images. Casts and
    other copies of weights made in forward are counted. A storage belongs to a block if it was
    created between the block's norm1 and the next block's norm1.

    For eager models on any device, but not under FakeTensorMode, where gated_prompt takes the path
    for compilers. Misses the state of a random generator that torch.utils.checkpoint keeps (5 kB
    for each block on the CPU).
    """
    blocks = (getattr(model, "vit", None) or model.backbone).blocks
    births = _Births()

    first = {block.norm1: index for index, block in enumerate(blocks)}
    norm = type(blocks[0].norm1)

    # replaces the method of the class, since a hook would make gated_prompt take the plain path
    def forward(self, x, forward=norm.forward):
        births.block = first.get(self, births.block)
        return forward(self, x)

    with mock.patch.object(norm, "forward", forward), births:
        held = model(images).sum()
    per_block = [0] * len(blocks)
    total = -held.untyped_storage().nbytes()
    for index, count in births.alive():
        total += count
        if index >= 0:
            per_block[index] += count
    return total, per_block


def allocated_bytes(model, images):
    """Returns the total of `saved_bytes`, measured in another way: the bytes that forward allocated
    and did not free. Works for compiled models, too."""
    gc.collect()
    if images.is_cuda:
        before = requested_bytes()
        held = model(images).sum()
        gc.collect()
        return requested_bytes() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        held = model(images).sum()
        gc.collect()
    del held
    return sum(event.self_cpu_memory_usage for event in profile.events())


def requested_bytes(when="current"):
    """Returns the bytes of CUDA memory that were requested. The allocator hands out whole blocks,
    which are up to 2 MB larger."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]


# ---- ops, FLOPs, traffic ----


class _Traffic(TorchDispatchMode):
    """Counts the ops that launch kernels, and the bytes that these kernels read and write.

    An op reads each input and writes each output once, as a whole. A view moves nothing, and each
    element of an expanded tensor is read once. For our gates, launch_plan gives the bytes.
    """

    def __init__(self):
        super().__init__()
        self.kernels = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        if func.namespace == "gated_prompt" and "prompt_gate" in func.__name__:
            moved = _gate_bytes(func, args)
        elif "empty" in func.__name__ or (
            not func._schema.is_mutable and _aliases(inputs, outputs)
        ):
            return out
        else:
            moved = sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))
        self.kernels += 1
        self.bytes += moved
        return out


def _aliases(inputs, outputs):
    """True if all outputs are views of inputs."""
    storages = {t.untyped_storage()._cdata for t in inputs}
    return all(t.untyped_storage()._cdata in storages for t in outputs)


def _bytes(tensor):
    """Returns the bytes of the distinct elements."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * math.prod(size for size, stride in sizes if stride != 0)


def _gate_bytes(func, args):
    batch, num_tokens, dim = args[0].shape
    backward = "bwd" in func.__name__
    length, saves = (args[5], True) if backward else (args[4], args[6])
    plan = ops.launch_plan(
        batch=batch, num_tokens=num_tokens, dim=dim, length=length, backward=backward, save=saves,
        dtype=str(args[0].dtype).removeprefix("torch."), gate="scalar",
    )  # fmt: skip
    return plan["bytes_moved"]


def gate_bytes(case, peer):
    """Returns the bytes that forward and backward of a single gate move."""
    work, traffic = Alone(case, peer), _Traffic()
    work.prepare()
    with mock.patch.object(autograd, "is_reusable", return_value=True), traffic:
        work.forward()
        work.backward()
    return traffic.bytes


def _addmm_flop(self, a, b, *args, **kwargs):
    return 2 * a[0] * a[1] * b[1]


def _flash(q, k, v, *args, **kwargs):
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


CASES = (  # model, pixels, P; 64 images each
    ("ViT-S/16", 224, 50),
    ("ViT-B/16", 224, 50),
    ("ViT-B/16", 224, 200),
    ("ViT-B/16", 384, 50),
    ("ViT-L/16", 384, 50),
    ("ViT-H/14", 224, 50),
)
ROWS = (
    "original",
    "vpt-shallow",
    "vpt-deep",
    "gated_prompt",
    "gated_prompt, all rows",
    "gated_prompt, memory low",
)


def count(name, arch, pixels, prompts, batch, **vit_options):
    """Returns {"kernels", "flop", "bytes", "saved_bytes"} of a peer's training step in bfloat16."""
    from vit_peers import make, tuned

    model = (
        make(name, arch, prompts, img_size=pixels, **vit_options).to("meta", torch.bfloat16).train()
    )
    images = torch.empty(batch, 3, pixels, pixels, device="meta", dtype=torch.bfloat16)
    labels = torch.empty(batch, device="meta", dtype=torch.long)
    parameters = [p for group in tuned(model).values() for p in group]
    flop = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flop})
    traffic = _Traffic()
    with (
        mock.patch.object(F, "scaled_dot_product_attention", _flash),
        mock.patch.object(autograd, "is_reusable", return_value=True),
        # FlopCounterMode hooks every module, which would make the model take the plain path
        mock.patch.object(shortcuts, "is_observed", return_value=False),
        mock.patch.object(vit_model, "is_observed", return_value=False),
    ):
        saved = saved_bytes(model, images)[0]
        with flop, traffic:
            loss = F.cross_entropy(model(images), labels)
            torch.autograd.grad(loss, parameters)
    return {
        "kernels": traffic.kernels,
        "flop": flop.get_total_flops(),
        "bytes": traffic.bytes,
        "saved_bytes": saved,
    }


def table(case, batch=64):
    """Returns a Markdown table with a row for each of ROWS."""
    model, pixels, prompts = case
    lines = [
        f"### {model}, {pixels} px, P = {prompts}, B = {batch}\n",
        "| | kernels | TFLOP | GB moved | GB kept | kept / original |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    first = None
    for name in ROWS:
        found = count(name, MODELS[model][0], pixels, prompts, batch)
        first = first or found["saved_bytes"]
        tflop, moved, saved = found["flop"] / 1e12, found["bytes"] / 1e9, found["saved_bytes"] / 1e9
        lines.append(
            f"| {name} | {found['kernels']} | {tflop:.2f} | {moved:.1f} | {saved:.2f} | "
            f"{found['saved_bytes'] / first:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    prose = page.read_text().split("### ")[0]
    page.write_text(prose + "\n".join(table(case) for case in CASES))
