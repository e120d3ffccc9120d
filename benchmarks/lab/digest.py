# SPDX-License-Identifier: Apache-2.0
"""Digests of outputs and gradients on the CPU, to check that a change keeps every bit the same.

    python benchmarks/lab/digest.py before.json     # then change the code
    python benchmarks/lab/digest.py after.json && cmp before.json after.json

The cases are gates for all dtypes, rules, slices, and in place or not; and wrapped ViTs for all
methods, pools, memory options, with and without autocast. Compare only on one machine with one
torch. If a case raises an error, its message replaces the digest.
"""

import hashlib
import itertools
import json
import sys
from pathlib import Path

import timm
import torch

import gated_prompt as gp

sys.path.insert(0, str(Path(__file__).parent.parent))  # the suite: benchmarks/
from shapes import GATES

B, N, D, P = 3, 11, 24, 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WAYS = ("new", "in place", "carrier", "rows")
METHODS = ("gpt", "gpt-deep", "vpt-shallow", "vpt-deep", "linear", "bias", "partial-1", "full")


def digest(tensors):
    found = hashlib.sha256()
    for t in tensors:
        found.update(str((t.dtype, t.shape)).encode())
        found.update(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def of_a_gate(gate, dtype, in_dtype, rule, start, way):
    generator = torch.Generator().manual_seed(1)

    def randn(*size, dtype=torch.float32):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    x = randn(B, N, D, dtype=in_dtype).requires_grad_()
    h = randn(B, N, D, dtype=dtype).requires_grad_()
    parameters = [randn(*shape).requires_grad_() for shape in GATES[gate](B, P, D)]
    names = ("prompt_gate", "prompt_gate_linear")
    function = getattr(gp, names[len(parameters) - 1] + "_" * (way != "new"))
    first = start % N
    rows = x[:, first : first + P]
    options = {"carrier": rows * 1} if way == "carrier" else {}
    block_in = rows if way == "rows" else x
    out = function(h * 1, block_in, *parameters, start, P, rule, **options)
    outs = list(out) if way == "carrier" else [out]
    seeds = [randn(*out.shape, dtype=out.dtype) for out in outs]
    gradients = torch.autograd.grad(outs, [h, x, *parameters], seeds)
    return digest([outs[0], *gradients])


def of_a_vit(method, pool, memory, autocast):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    vit = timm.create_model("vit_tiny_patch16_224", **sizes)
    model = gp.wrap(vit, method, num_prompts=3, pool=pool, memory=memory).train()
    images = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(images)
    logits.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return digest([logits, *gradients, *model.state_dict().values()])


def cases():
    for dtype in DTYPES:
        axes = (GATES, [dtype], {dtype, torch.float32}, ("mix", "residual"), (1, -P), WAYS)
        yield from ((of_a_gate, case) for case in itertools.product(*axes))
    axes = (METHODS, ("cls", "prompt", "patch"), ("default", "low"), (False, True))
    yield from ((of_a_vit, case) for case in itertools.product(*axes))


def main():
    torch.set_num_threads(1)
    found = {}
    for function, case in cases():
        try:
            found[str(case)] = function(*case)
        except (RuntimeError, ValueError) as error:
            found[str(case)] = str(error)
    with open(sys.argv[1], "w") as file:
        json.dump(found, file, indent=0, sort_keys=True)
    print(
        len(found), "cases:", hashlib.sha256(str(sorted(found.items())).encode()).hexdigest()[:16]
    )


if __name__ == "__main__":
    main()
