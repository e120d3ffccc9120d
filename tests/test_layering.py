# SPDX-License-Identifier: Apache-2.0
"""The house: who may import whom, and what an import of the package brings along."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gated_prompt"

# A module imports only from rows above its own.
LAYERS = (
    {"reference", "ops"},
    {"functional"},
    {"modules", "attention", "prompt_init", "checkpoint"},
    {"shortcuts"},
    {"vit"},
    {"backbones"},
    {"artifacts"},
    {"tune", "plots"},
    {"demo", "profile"},
    {"cli"},
)
THIRD_PARTY = {
    "timm",
    "xformers",
    "safetensors",
    "sklearn",
    "matplotlib",
    "rich",
    "tyro",
    "torchmetrics",
}


def imports_of(path):
    """Modules that a file imports anywhere in it, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_files():
    return [p for p in PACKAGE.glob("*.py") if p.stem not in ("__init__", "__main__")]


def test_every_module_has_a_layer():
    assert {p.stem for p in module_files()} == set().union(*LAYERS)


@pytest.mark.parametrize("path", module_files(), ids=lambda p: p.stem)
def test_imports_point_downwards(path):
    level = next(i for i, layer in enumerate(LAYERS) if path.stem in layer)
    below = set().union(*LAYERS[:level])
    inside = {name.split(".")[1] for name in imports_of(path) if name.startswith("gated_prompt.")}
    compiled = {"_C", "_C_cuda"} if path.stem == "ops" else set()
    assert inside & set().union(*LAYERS) <= below
    assert {name for name in inside if name.startswith("_C")} <= compiled


def test_the_op_needs_torch_alone():
    for stem in ("reference", "ops", "functional", "modules"):
        third_party = {name.split(".")[0] for name in imports_of(PACKAGE / f"{stem}.py")}
        assert third_party & THIRD_PARTY == set(), stem


def test_xformers_is_imported_in_one_file():
    users = {p.stem for p in module_files() if any("xformers" in n for n in imports_of(p))}
    assert users == {"attention"}


def test_torch_headers_are_in_the_bindings_alone():
    for path in (ROOT / "csrc").iterdir():
        includes = re.findall(r'#include [<"]([^>"]+)', path.read_text())
        uses_torch = any(i.startswith(("torch/", "ATen/", "c10/", "pybind11/")) for i in includes)
        assert uses_torch == path.stem.startswith("bindings"), path.name


def test_import_brings_neither_timm_nor_xformers_nor_a_cuda_context():
    code = (
        "import sys, torch, gated_prompt; "
        f"print(sorted({THIRD_PARTY!r} & set(sys.modules)), torch.cuda.is_initialized())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[] False"
