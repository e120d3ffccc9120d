# SPDX-License-Identifier: Apache-2.0
"""What people copy runs: the example, the code, diffs and commands of the documentation."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import timm_or_skip

import gated_prompt as gp
from gated_prompt import reference

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")
PAGES += tuple(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md")))


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


BLOCKS = [(page, code) for page in PAGES for code in blocks(page, "python")]
COMMANDS = [
    (page, line.partition(" #")[0].strip())
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.partition("#")[0].strip()
]


def test_plain_loop_has_the_losses_of_the_eager_formula():
    timm_or_skip()
    main = runpy.run_path(str(ROOT / "examples/train_plain_loop.py"))["main"]
    losses = main(steps=6)
    assert losses == pytest.approx(main(steps=6, gate=reference.prompt_gate), rel=1e-5)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_code_in_the_documentation_runs(page, code):
    if "timm" in code or "torchvision" in code:  # timm brings torchvision
        timm_or_skip()
    exec(compile(code, page, "exec"), {})


def test_the_documentation_has_code_and_commands():
    pages = [page for page, _ in BLOCKS]
    for page in ("docs/prompt_gate.md", "docs/vit.md", "docs/profiling.md"):
        assert page in pages
    for page in PAGES[:3]:
        assert page in [page for page, _ in COMMANDS]
    assert len(blocks("README.md", "diff")) == 2


# ---- README's diffs ----


def run_diff(index, sign, monkeypatch):
    """Runs README's diff number `index`, before (sign "-") or after (sign "+") the change, with a
    small ViT and random images; returns its variables."""
    timm = timm_or_skip()
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, depth=3).eval()
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: vit)
    lines = blocks("README.md", "diff")[index].splitlines()
    code = "\n".join(line[1:] for line in lines if line[0] in (" ", sign))
    found = {"timm": timm, "torch": torch, "images": torch.randn(2, 3, 32, 32), "P": 4}
    exec(compile(code, "README.md", "exec"), found)
    return found


def test_the_loop_of_the_readme_is_timms_before_and_the_formula_after(monkeypatch):
    before = run_diff(0, "-", monkeypatch)
    assert torch.equal(before["logits"], before["vit"](before["images"]))
    after = run_diff(0, "+", monkeypatch)
    monkeypatch.setattr(gp, "prompt_gate_", reference.prompt_gate)
    eager = run_diff(0, "+", monkeypatch)
    torch.testing.assert_close(after["logits"], eager["logits"])
    gradients = []
    for found in (after, eager):
        F.cross_entropy(found["logits"], torch.tensor([1, 2])).backward()
        tuned = [found["prompts"], *found["gate_logits"], *found["vit"].head.parameters()]
        others = set(found["vit"].parameters()) - set(tuned)
        assert all(not p.requires_grad for p in others)
        gradients.append([p.grad for p in tuned])
    torch.testing.assert_close(*gradients)
    assert all(gradient.any() for gradient in gradients[0])


def test_the_wrapped_model_of_the_readme_learns(monkeypatch):
    before = run_diff(1, "-", monkeypatch)
    count = len(list(before["model"].parameters()))
    after = run_diff(1, "+", monkeypatch)
    model, images, labels = after["model"], after["images"], torch.tensor([1, 2])
    tuned = [p for group in after["optimizer"].param_groups for p in group["params"]]
    assert 0 < len(tuned) < count
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(images), labels)
        after["optimizer"].zero_grad()
        loss.backward()
        after["optimizer"].step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# ---- commands ----


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_of_the_documentation_exist(page, command):
    words = shlex.split(command)
    while words and re.match(r"[A-Z_]+=", words[0]):  # FUZZ_CASES=20000 pytest ...
        words.pop(0)
    dry_run = None
    if words[:1] == ["make"]:
        dry_run = [shutil.which("make") or pytest.skip("needs make"), "--dry-run", *words[1:]]
    elif words[:1] == ["gated-prompt"]:
        pytest.importorskip("tyro")
        dry_run = [sys.executable, "-m", "gated_prompt", *words[1:]]
        dry_run += [] if words[1:] == ["info"] else ["--help"]
    elif words[:1] == ["pytest"]:
        pytest.importorskip("pytest_benchmark")
        dry_run = [sys.executable, "-m", *words, "--collect-only", "-q"]
    if dry_run is not None:
        unset = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTEST_")  # this run's own
        environment = {k: v for k, v in os.environ.items() if not k.startswith(unset)}
        done = subprocess.run(dry_run, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    for extra in re.findall(r"\.\[(\w+)\]", command):
        assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for path in (word for word in words if re.match(r"(tests|benchmarks|examples)/", word)):
        assert (ROOT / path).exists(), path
