# SPDX-License-Identifier: Apache-2.0
"""The layers of the package: which file may import which, and what importing the package loads."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gated_prompt"

# What each folder may import, in addition to torch, the standard library and its own files: folders
# of this package, and the third-party packages that its pip extra installs (pyproject.toml).
FOLDERS = {
    "": ((), ()),
    "vit": (("",), ("timm", "safetensors", "numpy", "xformers")),
    "job": (
        ("", "vit"),
        ("timm", "numpy", "sklearn", "matplotlib", "rich", "tyro"),
    ),
}
THIRD_PARTY = {name for _, brought in FOLDERS.values() for name in brought}
THIRD_PARTY -= {"numpy"}  # torch imports it
# Optional packages, which a file imports only if it needs them.
OPTIONAL = {"ops.py": {"nvtx"}, "temperature.py": {"xformers"}, "vit/prompt_init.py": {"sklearn"}}
FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))
LAZY = ("__init__.py", "__main__.py")  # the package's entry points, which lead to all of it
MODULES = [name for name in FILES if name not in LAZY]


def imports_of(name):
    """Yields the dotted names of all modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folder_of(name):
    return name.rpartition("/")[0]


def files_imported_by(name):
    """Returns the files of the package that a file imports; module vit.wrap is vit/wrap.py."""
    inside = (n.removeprefix("gated_prompt.") for n in imports_of(name) if "gated_prompt." in n)
    found = {f"{part.replace('.', '/')}.py" for part in inside}
    return found & set(FILES) - {name}


def test_there_is_no_other_folder():
    assert {folder_of(name) for name in FILES} == set(FOLDERS)


@pytest.mark.parametrize("name", MODULES)
def test_a_file_imports_its_own_folder_and_those_below(name):
    below, _ = FOLDERS[folder_of(name)]
    assert {folder_of(file) for file in files_imported_by(name)} <= {folder_of(name), *below}


@pytest.mark.parametrize("name", MODULES)
def test_a_file_imports_what_its_extra_brings(name):
    _, brought = FOLDERS[folder_of(name)]
    others = {n.split(".")[0] for n in imports_of(name)} - set(sys.stdlib_module_names)
    allowed = {"torch", "gated_prompt", *brought, *OPTIONAL.get(name, ())}
    assert others <= allowed


def test_no_imports_go_in_a_circle():
    graph = {name: files_imported_by(name) for name in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_compiled_modules_are_imported_in_one_file():
    users = {n for n in FILES if any(i.startswith("gated_prompt._C") for i in imports_of(n))}
    assert users == {"ops.py"}


def test_xformers_is_imported_in_one_file():
    assert {n for n in FILES if any("xformers" in i for i in imports_of(n))} == {"temperature.py"}


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
