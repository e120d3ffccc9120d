# SPDX-License-Identifier: Apache-2.0
"""Two gloo processes train as one, on every stack; and `check` sees what is not synchronised."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from stacks import SIDE, STACKS, logits
from test_attach import attached
from torch.nn.parallel import DistributedDataParallel

import gated_prompt as gp


def wrapped():
    from stacks import DEPTH, DIM, HEADS
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    vit = VisionTransformer(SIDE, 8, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, num_classes=4)
    return gp.wrap(vit, num_prompts=3, prompt_dropout=0.0).double()


def models():
    """{name: a function that makes the model}, without the stacks that are not installed."""
    made = {"timm, wrapped": wrapped}
    for name in STACKS:
        with contextlib.suppress(pytest.skip.Exception):
            attached(name)
            made[name] = lambda name=name: attached(name)
    return made


def steps(model, x, labels, count=2):
    tuned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(tuned.values(), lr=0.1, momentum=0.9)
    for step in range(count):
        optimizer.zero_grad()
        F.cross_entropy(logits(model, x), labels).backward()
        if step == 0:
            gp.check(model, optimizer)
        optimizer.step()
    return {name.removeprefix("module."): p.detach() for name, p in tuned.items()}


def data():
    torch.manual_seed(2)
    return torch.randn(4, 3, SIDE, SIDE, dtype=torch.float64), torch.tensor([0, 1, 2, 1])


def dino_steps(x, labels, parallel):
    """As in docs/drop_in.md: the prompts are a part of the classifier, which alone is in DDP."""
    backbone = attached("DINO")
    torch.manual_seed(4)
    classifier = torch.nn.Linear(2 * 16, 4).double()
    classifier.gated_prompts = backbone.gated_prompts
    classifier = DistributedDataParallel(classifier) if parallel else classifier
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layers = backbone.get_intermediate_layers(x, 2)
        features = torch.cat([tokens[:, 0] for tokens in layers], dim=-1)
        F.cross_entropy(classifier(features), labels).backward()
        gp.check(classifier, optimizer)
        optimizer.step()
    return {n.removeprefix("module."): p.detach() for n, p in classifier.named_parameters()}


def run(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    x, labels = (t[2 * rank : 2 * rank + 2] for t in data())
    ends = {n: steps(DistributedDataParallel(make()), x, labels) for n, make in models().items()}
    ends["DINO's eval_linear"] = dino_steps(x, labels, parallel=True)
    words = {}
    model = attached("DINO")
    F.cross_entropy(model(x), labels).backward()
    words["no DDP"] = message_of(model)
    model = attached("DINO")
    model.gated_prompts.gates.requires_grad_(False)
    parallel = DistributedDataParallel(model)
    model.gated_prompts.gates.requires_grad_(True)
    F.cross_entropy(parallel(x), labels).backward()
    words["thawed"] = message_of(parallel)
    model = attached("DINO")
    head, model.head = model.head, torch.nn.Identity()
    model.inner = DistributedDataParallel(head)
    F.cross_entropy(model.inner(model(x)), labels).backward()
    words["part"] = message_of(model)
    torch.save((ends, words), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def message_of(model):
    try:
        gp.check(model)
    except RuntimeError as error:
        return str(error)
    return "nothing found"


def test_two_processes_tune_as_one(tmp_path):
    pytest.importorskip("timm")
    torch.multiprocessing.spawn(run, (str(tmp_path),), nprocs=2)
    (ends, words), (others, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(ends) >= 5
    wanted_ends = {name: steps(make(), *data()) for name, make in models().items()}
    wanted_ends["DINO's eval_linear"] = dino_steps(*data(), parallel=False)
    for name, wanted in wanted_ends.items():
        assert ends[name].keys() == wanted.keys()
        for part, value in wanted.items():
            torch.testing.assert_close(ends[name][part], value, rtol=1e-9, atol=1e-11)
            assert torch.equal(ends[name][part], others[name][part])
    assert "have other gradients in another process" in words["no DDP"]
    assert "2 tuned parameters (" in words["thawed"]
    assert "gates.0.logit" in words["thawed"]
    assert "are outside" not in words["thawed"]
    assert "6 tuned parameters (" in words["part"]
    assert "are outside DistributedDataParallel" in words["part"]
