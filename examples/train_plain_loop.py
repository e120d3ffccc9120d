# SPDX-License-Identifier: Apache-2.0
"""Gated prompts in a training script with its own loop over the blocks: the op is one line.

    python examples/train_plain_loop.py --steps 20

Trains on random images, because only the loop matters here. `gate` is a parameter of `main` so that
a test can replace it by the eager formula and compare the losses.
"""

import argparse

import timm
import torch
import torch.nn.functional as F

import gated_prompt as gp


def main(steps=20, gate=gp.prompt_gate_, device="cpu"):
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10)
    vit.requires_grad_(False).eval().to(device)
    vit.head.requires_grad_(True)

    num_prompts, depth, dim = 8, len(vit.blocks), vit.embed_dim
    prompts = torch.empty(num_prompts, dim, device=device).uniform_(-0.06, 0.06).requires_grad_()
    gate_logits = [torch.tensor(-3.0, device=device, requires_grad=True) for _ in range(depth - 1)]
    parameters = [prompts, *gate_logits, *vit.head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

    images = torch.randn(16, 3, 64, 64, device=device)
    labels = torch.randint(10, (16,), device=device)
    losses = []
    for _ in range(steps):
        x = vit._pos_embed(vit.patch_embed(images))
        x = torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        for i, block in enumerate(vit.blocks):
            if i < depth - 1:
                x = gate(block(x), x, gate_logits[i], start=1, length=num_prompts)  # the one line
            else:
                x = block(x)
        loss = F.cross_entropy(vit.head(vit.norm(x)[:, 0]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    for step, value in enumerate(main(options.steps, device=options.device)):
        print(f"step {step:3}  loss {value:.4f}")
