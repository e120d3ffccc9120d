# SPDX-License-Identifier: Apache-2.0
"""If a private name of torch is missing, everything still runs correctly, if more slowly."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gated_prompt as gp
from gated_prompt.torch_private import NAMES

timm = pytest.importorskip("timm")
ROOT = Path(__file__).parent.parent
PATHS = [*NAMES, "autograd.forward_ad._current_level"]

RUN = """
import torch

owner, name = {owner}, {name!r}
if name == "_use_count":  # a method of a C type can't be deleted, so hide it
    owner._use_count = None
elif name.startswith("_global_"):  # torch itself needs it: only the package gets its substitute
    from gated_prompt import torch_private

    torch_private.global_hooks.append(torch_private.NAMES["nn.modules.module." + name])
elif name:
    delattr(owner, name)

import timm
import gated_prompt as gp
from gated_prompt import autograd, reference

reused, decide = [], autograd.is_reusable
autograd.is_reusable = lambda *given: reused.append(decide(*given)) or reused[-1]
torch.manual_seed(0)
leaves = [torch.randn(*size, dtype=torch.float64) for size in ((2, 9, 8), (2, 9, 8), (8,))]
found = []
for function in (reference.prompt_gate, gp.prompt_gate, gp.prompt_gate_):
    h, x, logit = own = [leaf.clone().requires_grad_() for leaf in leaves]
    out = function(h * 1, x, logit, 1, 4, "mix")
    with torch.no_grad():
        inferred = function(h.detach().clone(), x, logit, 1, 4, "mix")
    found.append([out, inferred, *torch.autograd.grad(out.square().sum(), own)])
for wanted, *others in zip(*found):
    for got in others:
        torch.testing.assert_close(got, wanted)

results = []
for gates in (3, 0):  # 0: without gates, timm's own blocks
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=16, num_heads=2, num_classes=3
    )
    options = {{"gated_blocks": gates, "gate_init": 50.0, "prompt_dropout": 0}}
    model = gp.wrap(vit.double(), num_prompts=2, **options)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model.eval()
    inferred = model(images).detach()
    loss = model.train()(images).square().sum()
    loss.backward()
    results.append([inferred, loss.detach(), model.prompts.tokens.grad])
for a, b in zip(*results):  # open gates change nothing
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
print(any(reused), len(reused))
"""


def run(path):
    owner, _, name = path.rpartition(".")
    code = RUN.format(owner=f"torch.{owner}" if owner else "torch", name=name)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reuses, calls = done.stdout.split()
    return reuses == "True", int(calls)


def test_with_all_names_gradients_are_reused():
    reuses, calls = run("")
    assert reuses
    assert calls > 0


@pytest.mark.parametrize("path", PATHS)
def test_without_a_private_name_all_is_right(path):
    reuses, calls = run(path)
    counts = ("_storage_Use_Count", "_storage_address", "_use_count", "_len_torch_dispatch_stack")
    if path.endswith(counts):  # gradients are copied
        assert not reuses
        assert calls > 0
    elif path.endswith(("peek_interpreter_stack", "_current_level")):
        assert calls == 0  # the gate is computed by aten
    else:
        assert reuses


def test_a_timm_without_its_private_method_is_named(monkeypatch):
    monkeypatch.delattr(timm.models.vision_transformer.VisionTransformer, "_pos_embed")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    with pytest.raises(RuntimeError, match=r"wrap: vit must have the method _pos_embed.*timm \d"):
        gp.wrap(vit)


def test_no_other_file_uses_a_private_name_of_torch():
    names = {path.rpartition(".")[2] for path in PATHS}
    for path in sorted((ROOT / "gated_prompt").rglob("*.py")):
        if path.name == "torch_private.py":
            continue
        tree = ast.parse(path.read_text())
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not used & names, path
        private = re.findall(r"\b(?:torch|timm)(?:\.\w+)*\.(_[a-z]\w*)", path.read_text())
        assert set(private) <= {"_check"}, path  # torch._check is documented
