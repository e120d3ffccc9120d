# SPDX-License-Identifier: Apache-2.0
"""Host time of a training step, with models of 12 blocks whose kernels take almost no time.

    python benchmarks/lab/host.py      # milliseconds of CPU time, medians, one thread

Images have one patch, D = 16, and there is one prompt. Runs under autocast to bfloat16, with the
weights of linear and convolution layers in bfloat16.
"""

import gc
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))  # the suite: benchmarks/
import vit_peers

PEERS = ("original", "vpt-shallow", "gated_prompt vpt-shallow", "gated_prompt, all rows")
TINY = {"arch": "vit_tiny_patch16_224", "img_size": 16, "embed_dim": 16, "num_heads": 2}
ROUNDS = 80


def make(name):
    model = vit_peers.make(name, num_prompts=1, depth=12, **TINY).train()
    vit = model.backbone if hasattr(model, "backbone") else model.vit
    for layer in vit.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            layer.to(torch.bfloat16)
    return model


def step(model, images, labels):
    """Returns (seconds of forward, seconds of backward)."""
    model.zero_grad()
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(images), labels)
    middle = time.process_time()
    loss.backward()
    return middle - start, time.process_time() - middle


def main():
    torch.set_num_threads(1)
    images, labels = torch.randn(1, 3, 16, 16), torch.zeros(1, dtype=torch.long)
    models = {name: make(name) for name in PEERS}
    times = {name: [] for name in PEERS}
    gc.disable()
    for _ in range(ROUNDS):  # in turns, so that other load affects all models
        for name, model in models.items():
            times[name].append(step(model, images, labels))
    print(f"{'':26} forward  backward")
    for name, found in times.items():
        forward, backward = (1e3 * statistics.median(part) for part in zip(*found, strict=True))
        print(f"{name:26} {forward:7.2f} {backward:9.2f}")


if __name__ == "__main__":
    main()
