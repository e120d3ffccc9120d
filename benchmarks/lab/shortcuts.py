# SPDX-License-Identifier: Apache-2.0
"""Measures the gain of each short cut of gated_prompt/vit/shortcuts.py in a training step, by
switching off one short cut at a time. Steps run in turns. Prints rows for the table of docs/vit.md.

    python benchmarks/lab/shortcuts.py --arch vit_small_patch16_224 --batch 8 [--compiled]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import timm
import torch
import torch.nn.functional as F

import gated_prompt as gp
from gated_prompt.vit import shortcuts

sys.path.insert(0, str(Path(__file__).parent.parent))  # the suite: benchmarks/
from counts import saved_bytes

OFF = {  # name: (conditions that are made false, options of wrap)
    "none": ((), {}),
    "folded projections": (("folded_layers",), {}),
    "pooled rows": (("pools_rows",), {}),
    "recomputed MLP": (("recomputes",), {"memory": "low"}),
    "all": (("is_restated", "recomputes"), {}),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pool", default="cls")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, 224, 224, device=device, dtype=dtype)
    labels = torch.randint(100, (options.batch,), device=device)

    def make(memory="default"):
        vit = timm.create_model(options.arch, num_classes=100).to(device, dtype)
        return gp.wrap(vit, num_prompts=50, pool=options.pool, memory=memory).train()

    def switched_off(names):
        return [mock.patch.object(shortcuts, name, return_value=None) for name in names]

    steps, kept = {}, {}
    low_is_measured = ("low", (), {"memory": "low"})
    for name, off, changes in (
        low_is_measured, *((name, off, changes) for name, (off, changes) in OFF.items()),
    ):  # fmt: skip
        patches = switched_off(off)
        for patch in patches:
            patch.start()
        torch._dynamo.reset()
        model = make(**changes)
        kept[name] = saved_bytes(model, images)[0] / options.batch / 1e6
        call = torch.compile(model) if options.compiled else model

        def step(call=call, model=model, off=off):
            patches = switched_off(off)
            for patch in patches:
                patch.start()
            start = time.perf_counter()
            F.cross_entropy(call(images), labels).backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            for patch in patches:
                patch.stop()
            model.zero_grad(set_to_none=True)
            return time.perf_counter() - start

        step()  # compiles
        steps[name] = step
        for patch in patches:
            patch.stop()
    times = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(step())
    how = "compiled" if options.compiled else "eager"
    print(f"{options.arch}, {options.batch} images, pool={options.pool}, {how}, {device.type}")
    for name in OFF:
        base = "low" if name == "recomputed MLP" else "none"
        ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
        print(
            f"| {name} | {1e3 * statistics.median(times[name]):.0f} ms | "
            f"{100 * (statistics.median(ratios) - 1):+.1f} % | "
            f"{kept[name]:.1f} MB | {100 * (kept[name] / kept[base] - 1):+.1f} % |"
        )


if __name__ == "__main__":
    main()
